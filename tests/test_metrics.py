"""The judge's shapes and file, what it picks; intervals, distances and sharpness in closed form."""

import json

import pytest
import torch

from minilcm.files.checkpoint import load_judge
from minilcm.files.safetensors_file import write_tensors
from minilcm.metrics import (
    Judge,
    accuracy,
    decide,
    holm,
    interval,
    picked,
    psnr,
    sharpness,
    together,
)

NAMES, STYLES = ["cat face", "pizza", "rocket"], ["noto", "sepia"]
NARROW = dict(width=8, dim=16)  # a small judge: width of the ResNet, features


def small_judge() -> Judge:
    torch.manual_seed(0)
    return Judge(NAMES, STYLES, **NARROW).eval().requires_grad_(False)


def some_pixels(b: int, side: int = 128) -> torch.Tensor:
    return torch.rand(b, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def normals(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def coins(n: int, seeds: int = 1) -> torch.Tensor:
    """(n, seeds) of ones, with probability 0.7, and zeros."""
    return (torch.rand(n, seeds, generator=torch.Generator().manual_seed(0)) < 0.7).float()


# ---- the judge


@pytest.mark.parametrize("side", [64, 96, 128])
def test_the_judge_reads_pictures_of_any_size(side):
    """Logits of names (b, n) and styles (b, s), from features (b, dim); each picture by itself."""
    judge, pixels = small_judge(), some_pixels(2, side)
    of_names, of_styles = judge(pixels)
    assert judge.features(pixels).shape == (2, 16)
    assert of_names.shape == (2, 3) and of_styles.shape == (2, 2)
    alone = torch.cat([judge(pixels[i : i + 1])[0] for i in range(2)])
    torch.testing.assert_close(of_names, alone)


def test_a_judge_is_read_back_from_its_file(tmp_path):
    """Written in float16 with its words and sizes in the header, it says the same in float32; a
    file without a tensor does not load.
    """
    judge = small_judge()
    half = {k: x.half() if x.is_floating_point() else x for k, x in judge.state_dict().items()}
    header = {"config": json.dumps([NAMES, STYLES, *NARROW.values()])}
    write_tensors(tmp_path / "judge.safetensors", half, header)
    loaded = load_judge(tmp_path / "judge.safetensors")
    assert loaded.names == NAMES and loaded.styles == STYLES and not loaded.training
    judge.load_state_dict(half)  # rounded to float16, as the file is
    assert all(x.dtype == torch.float32 for x in loaded.parameters())
    for ours, theirs in zip(loaded(some_pixels(2)), judge(some_pixels(2))):
        assert torch.equal(ours, theirs)
    del half["name.weight"]
    write_tensors(tmp_path / "part.safetensors", half, header)
    with pytest.raises(RuntimeError, match="name.weight"):
        load_judge(tmp_path / "part.safetensors")


def test_picked():
    """The likeliest word of all, or of some, in whatever order these are given."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
    assert picked(logits, NAMES) == ["pizza", "cat face"]
    for choices in (["cat face", "rocket"], ["rocket", "cat face"]):
        assert picked(logits, NAMES, choices) == ["rocket", "cat face"]


class HandMadeJudge:
    """Reads the name from the colour (red, green, blue), the style from the last pixel's sign."""

    names, styles = NAMES, ["dark", "light", "neither"]

    def __call__(self, pixels):
        assert pixels.abs().max() <= 1
        light = pixels[:, 0, -1, -1]
        return pixels.mean(dim=(2, 3)), torch.stack([-light, light, torch.ones_like(light)], dim=1)


def test_accuracy():
    """Red, green, blue, blue pictures asked for as red, blue, blue, green: right, wrong, right,
    wrong. Styles are picked among all, or among the choices; values beyond [-1, 1] are cut.
    """
    pixels = torch.zeros(4, 3, 4, 4)
    for i, channel in enumerate((0, 1, 2, 2)):
        pixels[i, channel] = 5
    pixels[:, 0, -1, -1] = torch.tensor([0.5, 0.5, -0.5, -0.5])
    names, styles = ["cat face", "rocket", "rocket", "pizza"], ["light", "dark", "light", "dark"]
    right, none = accuracy(HandMadeJudge(), pixels, names)
    assert right.tolist() == [True, False, True, False] and none is None
    # "neither" is likeliest
    assert accuracy(HandMadeJudge(), pixels, names, styles)[1].tolist() == [False] * 4
    of_two = accuracy(HandMadeJudge(), pixels, names, styles, ["light", "dark"])[1]
    assert of_two.tolist() == [True, False, False, True]


def test_accuracy_of_many_pictures():
    """Pictures are judged 64 at a time; none is lost or moved."""
    pixels = torch.zeros(130, 3, 4, 4)
    pixels[range(130), torch.arange(130) % 3] = 0.5
    names = [NAMES[i % 3] for i in range(130)]
    assert accuracy(HandMadeJudge(), pixels, names)[0].all()
    assert not accuracy(HandMadeJudge(), pixels, names[::-1])[0].all()


# ---- intervals


def test_interval_of_a_share():
    """For n independent pictures the interval is p +- 1.96 sqrt(p (1 - p) / n)."""
    x = coins(600, 2)
    mean, low, high = interval(x)
    half = 1.96 * (mean * (1 - mean) / 1200) ** 0.5
    assert mean == pytest.approx(x.mean().item(), abs=1e-4)
    assert low == pytest.approx(mean - half, abs=half / 4) and high == pytest.approx(
        mean + half, abs=half / 4
    )


def test_interval_covers_the_truth():
    """Of 200 experiments with a mean of 0, some 95 % have it in their intervals (190 +- 3)."""
    experiments = normals(200, 50, 1)
    inside = sum(low <= 0 <= high for _, low, high in (interval(x, draws=400) for x in experiments))
    assert 180 <= inside <= 198


def test_pictures_of_one_prompt_are_not_independent():
    """Where the prompt decides alone, a second seed brings no certainty: the interval stays."""
    one = coins(600)
    assert interval(one) == interval(one.expand(-1, 2))


def test_prompts_of_one_group_are_not_independent():
    """A pair asked for four times counts four times in the mean and once in the interval."""
    pair = coins(300)
    four, groups = pair.repeat(4, 1), torch.arange(300).repeat(4)
    assert interval(four, groups=groups) == interval(pair)
    narrow = interval(four)
    assert narrow[2] - narrow[1] < 0.6 * (interval(pair)[2] - interval(pair)[1])


def test_pairs_take_away_what_both_have():
    """x - y of the same prompts is far surer than x is; mean(2 y) / mean(y) is 2 for sure."""
    y = normals(200, 2) + 5
    assert interval(y + 1, y) == pytest.approx([1, 1, 1], abs=1e-4)
    assert interval(2 * y, y, ratio=True) == pytest.approx([2, 2, 2], abs=1e-4)


def test_interval_over_runs_and_prompts():
    """One number is the sum of a run's, a prompt's and its own part, of known variance: in 95 % or
    some more of 60 experiments the interval has the truth in it, where one over prompts alone has
    not; and it is at most 2.4 (five runs: 1.7) times as wide as if the variance had been known,
    also where the runs do not differ.
    """
    g = torch.Generator().manual_seed(1)
    for runs, most in ((3, 2.4), (5, 1.7)):
        for of_run, of_prompt in ((1.0, 0.1), (0.3, 1.0), (0.0, 0.0)):
            parts = [
                (
                    of_run * torch.randn(runs, 1, 1, generator=g)
                    + of_prompt * torch.randn(1, 40, 1, generator=g)
                    + 0.5 * torch.randn(runs, 40, 2, generator=g)
                )
                for _ in range(60)
            ]
            found = [interval(x, draws=400) for x in parts]
            known = (of_run**2 / runs + of_prompt**2 / 40 + 0.25 / (runs * 80)) ** 0.5
            width = sum(high - low for _, low, high in found) / len(found) / (3.92 * known)
            assert sum(low <= 0 <= high for _, low, high in found) >= 53 and 1 < width < most
            over_prompts = [interval(x.mean(dim=0), draws=400) for x in parts]
            if of_run > of_prompt:
                assert sum(low <= 0 <= high for _, low, high in over_prompts) < 30


def test_two_runs_that_differ_in_all_pictures():
    """A quarter of the draws has the one run twice: the bounds are its distance from the mean, 0.5,
    times sqrt(2 / 1), times Student's t of one degree, 12.706, over 1.96.
    """
    x = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 40, 2)
    half = 0.5 * 2**0.5 * 12.706 / 1.96
    assert interval(x) == pytest.approx([0.5, 0.5 - half, 0.5 + half], rel=2e-3)


def test_runs_that_are_alike_are_no_runs():
    """As many copies of one run have that run's interval; y may have one run for all of x's."""
    one, y = coins(50, 2), coins(50, 2).roll(1, dims=0)
    three = one.expand(3, -1, -1)
    assert interval(three) == interval(one)
    assert interval(three, y) == interval(three, y.expand(3, -1, -1)) == interval(one, y)
    assert interval(three, y + 1, ratio=True) == interval(one, y + 1, ratio=True)


def test_runs_are_paired():
    """What two rows have in common by run is no difference."""
    of_run = torch.tensor([0.0, 5.0, -5.0])[:, None, None]
    x = coins(50).expand(3, -1, -1) + of_run
    assert interval(x + 1, x) == pytest.approx([1, 1, 1], abs=1e-4)
    _, low, high = interval(x)
    assert high - low > 10


def test_decide():
    """Shown if the whole interval is on the side of the bound, refuted if none of it is."""
    for found, word in (
        ((0, 0.1, 1), "shown"),
        ((0, -1, -0.1), "refuted"),
        ((0, -1, 1), "not shown"),
    ):
        assert decide(found, above=0.0) == word
        assert decide([-x for x in (found[0], found[2], found[1])], below=0.0) == word
    assert decide([0, 0, 1], above=0.0) == "not shown"


def test_together():
    assert together(["shown", "shown"]) == "shown" and together([]) == "not shown"
    assert together(["shown", "not shown"]) == "not shown"
    assert together(["shown", "refuted", "not shown"]) == "refuted"


def test_holm():
    """Of p = 0.011, 0.02, 0.2 by 3: 0.05 / 3 passes the first, 0.05 / 2 the second, 0.05 not the
    third; of 0.02, 0.011, 0.2 and 0.3 the first must pass 0.05 / 4 and the second 0.05 / 3.
    """

    def found(*z: float) -> dict:
        return {str(i): [1 + x, 1 + x - 1.96, 1 + x + 1.96] for i, x in enumerate(z)}

    # p = 0.05 at 1.960, 0.02 at 2.326, 0.011 at 2.543, 0.2 at 1.282, 0.3 at 1.036
    assert holm(found(-2.543, 2.326, 1.282), 1.0) == ["0", "1"]
    assert holm(found(2.326, -2.543, 1.282, 1.036), 1.0) == ["1"]
    assert holm(found(1.97), 1.0) == ["0"] and holm(found(1.95), 1.0) == []
    # of three runs: Student's t is 4.303 for p = 0.05, and 6.205 for 0.025, by the tables
    assert holm(found(1.96 * 6.21 / 4.303, 1.97), 1.0, runs=3) == ["0", "1"]
    assert holm(found(1.96 * 6.19 / 4.303, 1.97), 1.0, runs=3) == []


# ---- distances and sharpness


def test_sharpness():
    """Of each picture: 0 on plain ground or a slope; 8 a on a chessboard of +-a; a row of a gives
    a, 2 a, a on three of ten rows.
    """
    board = 0.25 * (1 - 2 * ((torch.arange(16)[:, None] + torch.arange(16)) % 2)).float().expand(
        3, 16, 16
    )
    slope = torch.linspace(-1, 1, 16).expand(3, 16, 16)
    found = sharpness(torch.stack([torch.ones(3, 16, 16), slope, board]))
    assert found.shape == (3,) and found.tolist() == pytest.approx([0, 0, 2], abs=1e-5)
    line = torch.zeros(1, 3, 12, 12)
    line[..., 5, :] = 0.5
    assert sharpness(line).item() == pytest.approx((0.5 + 1 + 0.5) / 10, abs=1e-5)


def test_psnr():
    """An error of 0.1 of the range is 20 dB, of half of it 6.02; each picture has its own."""
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 1.0)])
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 6.0206]), rtol=0, atol=1e-3)
