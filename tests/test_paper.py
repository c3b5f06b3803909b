"""What paper/ measures with: intervals, distances and overlaps in closed form, and a report that misses nothing."""

import sys

import pytest
import torch
from PIL import Image
from tiny import ROOT

sys.path.insert(0, str(ROOT / "paper"))
import lab  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import styles  # noqa: E402

from minilcm import lcm  # noqa: E402
from minilcm.merge import merge_into  # noqa: E402


def test_interval_of_a_share():
    """For n independent pictures the interval is p +- 1.96 sqrt(p (1 - p) / n), whatever the seeds."""
    x = (torch.rand(600, 2, generator=torch.Generator().manual_seed(0)) < 0.7).float()
    mean, low, high = lab.interval(x)
    half = 1.96 * (mean * (1 - mean) / 1200) ** 0.5
    assert mean == pytest.approx(x.mean().item(), abs=1e-4)
    assert low == pytest.approx(mean - half, abs=half / 4) and high == pytest.approx(mean + half, abs=half / 4)


def test_pictures_of_one_prompt_are_not_independent():
    """Where a prompt decides alone, a second seed brings no certainty: the interval stays as wide as with one."""
    one = (torch.rand(600, 1, generator=torch.Generator().manual_seed(0)) < 0.7).float()
    widths = [high - low for _, low, high in (lab.interval(one), lab.interval(one.expand(-1, 2)))]
    assert widths[1] == pytest.approx(widths[0], rel=0.15)


def test_pairs_take_away_what_both_have():
    """x - y of the same prompts is far surer than x is; mean(x) / mean(x) is 1 for sure."""
    y = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) + 5
    mean, low, high = lab.interval(y + 1, y)
    assert (mean, low, high) == pytest.approx((1, 1, 1), abs=1e-4)
    assert lab.interval(2 * y, y, ratio=True) == pytest.approx([2, 2, 2], abs=1e-4)


def test_frechet_of_two_gaussians():
    """|m - m'|^2 + sum (s - s')^2 for diagonal covariances; 0 of a cloud and itself."""
    generator = torch.Generator().manual_seed(0)
    s, t = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.5, 0.5, 0.5])
    x, y = (torch.randn(200_000, 3, generator=generator) * scale for scale in (s, t))
    y = y + torch.tensor([1.0, 0.0, -2.0])
    assert lab.frechet(x, y) == pytest.approx(5 + (s - t).square().sum().item(), rel=0.02)
    assert lab.frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_overlap_of_column_spaces():
    """1 for a delta that writes where the other does, 0 for one that does not, by energy between; then the norms."""
    up = torch.eye(6)[:, :2]  # writes to rows 0 and 1
    a = {"x": (up, torch.tensor([[3.0, 0, 0], [0, 4.0, 0]]), 2.0)}
    for rows, expected in (([0, 1], 1.0), ([4, 5], 0.0), ([0, 5], 9 / 25), ([1, 2], 16 / 25)):
        b = {"x": (torch.eye(6)[:, rows], torch.eye(3)[:2], 2.0), "elsewhere": (up, up.T, 2.0)}
        inside, ratio = run.overlap(a, b)
        assert inside == pytest.approx(expected, abs=1e-6) and ratio == pytest.approx((25 / 2) ** 0.5)


def test_rank_correlation():
    assert run.rank_correlation([1, 2, 3, 10], [1, 4, 9, 100]) == pytest.approx(1)
    assert run.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_changed_leaves_no_trace():
    """Inside: other weights and sum_i lambda_i tau_i, as merge_into makes them. After it, or an error, all bits."""
    unet = lab.open_lab().unet
    before = {k: x.clone() for k, x in unet.state_dict().items()}
    vector = lab.shipped("lcm_lora")
    base = {k: x + 1e-3 for k, x in before.items()}
    with pytest.raises(KeyboardInterrupt):
        with lab.changed(unet, base, [(vector, 0.25), (vector, 0.5)]):
            inside = {k: x.clone() for k, x in unet.state_dict().items()}
            raise KeyboardInterrupt
    assert all(torch.equal(x, before[k]) for k, x in unet.state_dict().items())
    merge_into(base := {k: x.clone() for k, x in base.items()}, vector.tau, 0.75)
    assert all(torch.allclose(x, base[k], atol=1e-6) for k, x in inside.items())


def test_a_part_is_made_once(tmp_path, monkeypatch):
    """The same key: read; another: made."""
    monkeypatch.setattr(lab, "CACHE", tmp_path)
    made = []

    def make():
        made.append(1)
        return {"x": torch.ones(2)}

    for key in ("a", "a", "b"):
        assert torch.equal(lab.cached("part", key, make)["x"], torch.ones(2))
    assert len(made) == 2 and len(list(tmp_path.iterdir())) == 2


def test_a_recipe_is_what_it_says():
    """L2 and c_skip change the formulas inside, and nothing outside."""
    a, b, t = torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0, 999])
    assert lcm.huber(a, b).item() == pytest.approx(2, abs=1e-2)
    with lab.as_asked(lab.Recipe(distance="l2", c_skip=False)):
        assert lcm.huber(a, b).item() == 4
        c_skip, c_out = lcm.boundary_scalings(t)
        assert c_skip.tolist() == [0, 0] and c_out.tolist() == [1, 1]
    assert lcm.huber(a, b).item() == pytest.approx(2, abs=1e-2) and lcm.boundary_scalings(t)[0][0] == 1


def test_the_gaussian_case():
    """DDIM's error falls as 1 / n, DPM-Solver++ is nearer, and LCM in skips of 20 is worth 50 steps of DDIM."""
    far = run.gaussian()
    assert far["ddim"]["16"] / far["ddim"]["32"] == pytest.approx(2, rel=0.25)
    assert far["dpmpp"]["16"] < far["ddim"]["16"]
    assert far["lcm, one step"]["k=20"] == far["ddim"]["50"] < far["lcm, one step"]["k=100"] < far["ddim"]["8"]


@pytest.mark.parametrize("style", styles.PROCESSED)
def test_styles_keep_what_they_should(style):
    """Size and kind of picture stay, the drawing changes; what is far from the drawing stays empty."""
    image = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    image.paste((230, 120, 40, 255), (24, 24, 72, 72))
    image.paste((250, 250, 250, 255), (40, 30, 60, 40))
    image.paste((10, 60, 30, 255), (30, 50, 66, 64))
    out = styles.PROCESSED[style][1](image)
    assert out.size == image.size and out.mode == "RGBA"
    assert out.tobytes() != image.tobytes() and out.getpixel((2, 2))[3] == 0


def test_all_styles_have_drawings():
    """Sixteen, of four kinds; those held out are not trained on."""
    assert len(styles.KINDS) == 16 and set(styles.KINDS.values()) == {"colour", "line", "texture", "shape"}
    names = lab.open_lab().names
    for style in ("outline", *styles.REAL):
        seen, held_out = styles.split_style(style, names)
        assert {a.style for a in seen + held_out} == {style} and len(held_out) >= 8
        assert not {a.image.tobytes() for a in seen} & {a.image.tobytes() for a in held_out}


def test_every_name_has_a_content():
    assert set(lab.CATEGORY) == set(lab.open_lab().names)


def test_the_report_is_filled():
    rows = {"a, b = 1": {"x": [0.5, 0.25, 0.75], "n": 1234}, "c": {"x": [1, 1, 1], "n": 2}}
    results = {"steps": {"verdict": "held", "rows": rows}}
    text = "{{steps/verdict}}: {{steps/rows/a, b = 1/x|i}}, {{steps/rows/a, b = 1/n|,}}, {{steps/rows/c/x|p}}"
    assert report.fill(text, results) == "held: 0.50 [0.25, 0.75], 1,234, 100 %"
    table = report.fill("{{table steps/rows: key; n; x|i}}", results)
    assert table == "| a, b = 1 | 1234 | 0.50 [0.25, 0.75] |\n| c | 2 | 1.00 [1.00, 1.00] |"


@pytest.mark.parametrize("text", ["{{steps/absent}}", "{{absent/rows}}", "{{table steps/rows: key; absent|i}}"])
def test_a_missing_number_stops_the_report(text):
    with pytest.raises(ValueError, match="no 'absent' in the results"):
        report.fill(text, {"steps": {"rows": {"a": {"x": 1}}}})
