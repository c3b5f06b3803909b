"""What paper/ measures with: intervals, distances and overlaps in closed form, and a report that misses nothing."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny import ROOT

sys.path[:0] = [str(ROOT / "paper"), str(ROOT / "weights/emoji")]
import lab  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import styled  # noqa: E402
import styles  # noqa: E402
import verdicts  # noqa: E402
from evaluate import interval  # noqa: E402

from minilcm import lcm  # noqa: E402
from minilcm.merge import merge_into  # noqa: E402


def test_interval_of_a_share():
    """For n independent pictures the interval is p +- 1.96 sqrt(p (1 - p) / n), whatever the seeds."""
    x = (torch.rand(600, 2, generator=torch.Generator().manual_seed(0)) < 0.7).float()
    mean, low, high = interval(x)
    half = 1.96 * (mean * (1 - mean) / 1200) ** 0.5
    assert mean == pytest.approx(x.mean().item(), abs=1e-4)
    assert low == pytest.approx(mean - half, abs=half / 4) and high == pytest.approx(mean + half, abs=half / 4)


def test_pictures_of_one_prompt_are_not_independent():
    """Where a prompt decides alone, a second seed brings no certainty: the interval stays as wide as with one."""
    one = (torch.rand(600, 1, generator=torch.Generator().manual_seed(0)) < 0.7).float()
    widths = [high - low for _, low, high in (interval(one), interval(one.expand(-1, 2)))]
    assert widths[1] == pytest.approx(widths[0], rel=0.15)


def test_prompts_of_one_pair_are_not_independent():
    """A pair asked for four times counts four times in the mean and once in the interval."""
    pair = (torch.rand(300, 1, generator=torch.Generator().manual_seed(0)) < 0.7).float()
    four, groups = pair.repeat(4, 1), torch.arange(300).repeat(4)
    assert interval(four, groups=groups) == interval(pair)
    narrow = interval(four)
    assert narrow[2] - narrow[1] < 0.6 * (interval(pair)[2] - interval(pair)[1])
    prompts = lab.prompts_of("all")
    assert lab.pairs(prompts).max() + 1 == len({(p.name, p.style) for p in prompts}) < len(prompts)


def test_wilson():
    """Known values: none of 16 leaves up to 0.194, 5 of 10 is [0.237, 0.763]."""
    assert lab.wilson(0, 16) == pytest.approx([0, 0, 0.1936], abs=1e-4)
    assert lab.wilson(5, 10) == pytest.approx([0.5, 0.2366, 0.7634], abs=1e-4)


@pytest.mark.parametrize("most", [6, 64, 100])
def test_some_prompts_are_spread_and_all_others(most):
    prompts = lab.prompts_of("bare", most)
    assert len({p.name for p in prompts}) == len(prompts) == min(most, 64)


def test_pairs_take_away_what_both_have():
    """x - y of the same prompts is far surer than x is; mean(x) / mean(x) is 1 for sure."""
    y = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) + 5
    mean, low, high = interval(y + 1, y)
    assert (mean, low, high) == pytest.approx((1, 1, 1), abs=1e-4)
    assert interval(2 * y, y, ratio=True) == pytest.approx([2, 2, 2], abs=1e-4)


def test_frechet_of_two_gaussians():
    """|m - m'|^2 + sum (s - s')^2 for diagonal covariances; 0 of a cloud and itself."""
    generator = torch.Generator().manual_seed(0)
    s, t = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.5, 0.5, 0.5])
    x, y = (torch.randn(200_000, 3, generator=generator) * scale for scale in (s, t))
    y = y + torch.tensor([1.0, 0.0, -2.0])
    assert lab.frechet(x, y) == pytest.approx(5 + (s - t).square().sum().item(), rel=0.02)
    assert lab.frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_sharpness():
    """0 on plain ground or a slope; 8 a on a chessboard of +-a; a row of a gives a, 2 a, a on three of ten rows."""
    board = 0.25 * (1 - 2 * ((torch.arange(16)[:, None] + torch.arange(16)) % 2)).float().expand(1, 3, 16, 16)
    slope = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    line = torch.zeros(1, 3, 12, 12)
    line[..., 5, :] = 0.5
    found = [lab.sharpness(x).item() for x in (torch.ones(1, 3, 16, 16), slope, board, line)]
    assert found == pytest.approx([0, 0, 2, (0.5 + 1 + 0.5) / 10], abs=1e-5)


def test_a_reader_can_be_taught():
    """Name by colour, style by a stripe, one style a hundred times as common; then prompt by prompt, seed by seed."""
    names = torch.arange(404) % 2
    style = torch.tensor([0] * 400 + [1] * 4)
    pixels = torch.zeros(404, 3, 64, 64, dtype=torch.uint8)
    pixels[range(404), 2 * names] = 255  # red or blue
    pixels[style == 1, 1, 20:40] = 255
    torch.manual_seed(0)
    net = styled.Reader(["bare", "plain"], ["red", "blue"])
    styled.teach(net, styled.Lesson(pixels, style, names), steps=30, batch=16)
    looks, found = styled.read(net.eval(), styled.to_pixels(pixels[-6:]))
    assert (looks[:, 0] > 0).tolist() == [True, True, False, False, False, False] and (looks[:, 1] == 0).all()
    assert found.tolist() == [0, 1] * 3


def test_names_are_found_prompt_by_prompt(monkeypatch):
    """Latents (prompts, seeds): each is held against the name of its own prompt."""
    name = torch.tensor([3, 4, 3, 4, 4, 3])
    looks = torch.tensor([[1, -1, 0], [-1, 1, 0], [1, 2, 0], [-1, -2, 0], [-1, -1, 0], [2, -1, 0]])
    monkeypatch.setattr(styled, "read", lambda net, pixels: (looks, name))
    net = styled.Reader(["outline", "sepia", "plain"], lab.open_lab().names)
    prompts = [lab.Prompt("", net.names[i]) for i in (3, 4)]
    right, kept, _ = styled.read_latents(net, torch.zeros(2, 3, 4, 16, 16), ["outline"], prompts)
    assert right.tolist() == [[1, 0, 1], [1, 1, 0]] and kept.tolist() == [[1, 0, 1], [0, 0, 1]]
    _, kept, sharp = styled.read_latents(net, torch.zeros(2, 3, 4, 16, 16), ["outline", "sepia"], prompts)
    assert kept.tolist() == [[1, 1, 1], [0, 0, 1]] and sharp.shape == (2, 3)


def test_overlap_of_column_spaces():
    """1 for a delta that writes where the other does, 0 for one that does not, by energy between; then the norms."""
    up = torch.eye(6)[:, :2]  # writes to rows 0 and 1
    a = {"x": (up, torch.tensor([[3.0, 0, 0], [0, 4.0, 0]]), 2.0)}
    for rows, expected in (([0, 1], 1.0), ([4, 5], 0.0), ([0, 5], 9 / 25), ([1, 2], 16 / 25)):
        b = {"x": (torch.eye(6)[:, rows], torch.eye(3)[:2], 2.0), "elsewhere": (up, up.T, 2.0)}
        inside, chance, ratio = run.overlap(a, b)
        assert inside == pytest.approx(expected, abs=1e-6) and chance == pytest.approx(2 / 6)
        assert ratio == pytest.approx((25 / 2) ** 0.5)


def test_rank_correlation():
    assert run.rank_correlation([1, 2, 3, 10], [1, 4, 9, 100]) == pytest.approx(1)
    assert run.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert run.rank_correlation([1, 2, 3], [5, 5, 5]) == 0
    # ranks 0 1 2 3 and 0.5 0.5 2 3: sum of products of deviations 4.5, of squares 5 and 4.5
    assert run.rank_correlation([1, 2, 3, 4], [7, 7, 8, 9]) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)


def a_style(alone=(0.9, 0.8), accuracy=(0.0, -0.1, 0.1), style=(0.0, -0.1, 0.1), equal=(0.0, 0.0)) -> dict:
    right, kept = ({"alone": [x, x - 0.1, x + 0.1]} for x in alone)
    row = {"right": right, "style": kept, "lost accuracy": list(accuracy), "lost style": list(style)}
    row |= {"lost, equal": list(equal), "overlap": 0.3, "overlap by chance": 0.1, "norm": 1.0}
    return row | {"blocks": {"down": 0.2, "middle": 0.3, "up": 0.5}}


@pytest.mark.parametrize(
    "row, outcome, surely, equal",
    [
        (a_style(), "works", False, False),
        (a_style(accuracy=(0.09, 0.05, 0.99)), "works", False, False),  # neither by its upper end
        (a_style(accuracy=(0.11, 0.09, 0.13)), "failed", False, False),
        (a_style(accuracy=(0.20, 0.11, 0.30)), "failed", True, False),
        (a_style(style=(0.20, 0.11, 0.30)), "failed", True, False),
        (a_style(equal=(0.05, 0.2)), "works", False, True),
        (a_style(alone=(0.9, 0.4), style=(0.20, 0.15, 0.30), equal=(0.3, 0.3)), "not measurable", False, False),
        (a_style(alone=(0.4, 0.9), style=(0.20, 0.15, 0.30), equal=(0.3, 0.3)), "not measurable", False, False),
    ],
)
def test_what_became_of_a_style(row, outcome, surely, equal):
    assert run.what_became(row) == {"outcome": outcome, "surely": surely, "failed, equal": equal}


def test_failures():
    """Styles with nothing to lose are in no count and no correlation."""
    losses = [(0.0, -0.1, 0.1), (0.05, 0.0, 0.1), (0.15, 0.05, 0.2), (0.3, 0.2, 0.4)]
    rows = [a_style(accuracy=x) | {"norm": i, "overlap": 0.5 - 0.1 * i} for i, x in enumerate(losses)]
    rows += [a_style(alone=(0.4, 0.9), accuracy=(0.9, 0.8, 1.0)) | {"norm": -9}]
    found = run.failures([row | run.what_became(row) for row in rows])
    counts = {"failed": 2, "measurable": 4, "surely failed": 1, "failed, equal": 0}
    assert found | counts == found and found["failure rate"] == lab.wilson(2, 4)
    assert found["causes"]["norm"]["lost accuracy"] == pytest.approx(1)
    assert found["causes"]["overlap"]["lost accuracy"] == pytest.approx(-1)
    assert found["causes"]["norm"]["lost style"] == 0  # all lost as much


def test_correlation_by_chance():
    """For many pairs a normal of deviation 1 / sqrt(n - 1), whose size is above 2.576 of it once in a hundred."""
    assert run.correlation_by_chance(200) == pytest.approx(2.576 / 199**0.5, rel=0.1)


def test_a_section_takes_as_long_as_if_nothing_had_been_kept(tmp_path, monkeypatch):
    """A part that was read from the cache counts with what it took when it was made; one made now counts once."""

    def section(size):
        run.spent["kept from another day"] = 1000.0
        run.spent["made now"] = 200.0
        run.spent_now.append(200.0)
        return {"planned": {}}

    clock = iter([0.0, 207.0])
    monkeypatch.setattr(run, "CACHE", tmp_path)
    monkeypatch.setitem(run.SECTIONS, "memory", section)
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(clock))
    run.measure_section("memory", quick=True, seed=0)
    assert json.loads((tmp_path / "quick/memory.json").read_text())["seconds"] == 1207


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
    """DDIM's error falls as 1 / n, DPM-Solver++ is nearer; LCM in skips of 20 is worth 50 steps of DDIM, of 100 ten."""
    far = run.gaussian()
    ddim, lcm_step = far["DDIM"], far["lcm, one step"]
    assert ddim["16"] / ddim["32"] == pytest.approx(2, rel=0.25)
    assert far["DPM-Solver++"]["16"] < ddim["16"]
    assert lcm_step["k=20"] == pytest.approx(ddim["50"], rel=1e-3)
    assert ddim["16"] < lcm_step["k=100"] < ddim["8"] and ddim["8"] < lcm_step["k=200"] < ddim["4"]


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


def test_a_shadow_does_not_come_back_on_the_other_side():
    """papercut of a square that touches the right and lower edges: nothing at the left and at the top."""
    image = Image.new("RGBA", (64, 64))
    image.paste((200, 40, 40, 255), (32, 32, 64, 64))
    alpha = styles.PROCESSED["papercut"][1](image).getchannel("A")
    assert alpha.crop((0, 0, 16, 64)).getextrema() == alpha.crop((0, 0, 64, 16)).getextrema() == (0, 0)
    assert alpha.getpixel((62, 62)) == 255


def test_all_styles_have_drawings():
    """Sixteen, of four kinds; those held out are not trained on."""
    assert len(styles.KINDS) == 16 and set(styles.KINDS.values()) == {"colour", "line", "texture", "shape"}
    names = lab.open_lab().names
    for style in ("outline", *styles.REAL):
        seen, held_out = styles.split_style(style, names)
        assert {a.style for a in seen + held_out} == {style} and len(held_out) >= 8
        assert not {a.image.tobytes() for a in seen} & {a.image.tobytes() for a in held_out}


def test_what_a_drawing_costs():
    """A guided step evaluates the network twice; w as an input of a full LCM costs nothing."""
    costs = [lab.Draw("ddim", 4, 3.0), lab.Draw("ddim", 4), lab.Draw("lcm", 4), lab.Draw("lcm", 4, 0.0, 3.0)]
    assert [draw.evaluations for draw in costs] == [8, 4, 4, 4]


@pytest.mark.parametrize(
    "argv, error",
    [(["run.py", "speed"], "no section 'speed'; choose from memory, steps"), (["report.py", "--fast"], "report.py")],
)
def test_the_scripts_run_by_themselves(argv, error):
    """From any folder, nothing on the path; a wrong word is told in a line."""
    done = subprocess.run([sys.executable, ROOT / "paper" / argv[0], argv[1]], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1 and error in done.stderr and "Traceback" not in done.stderr


def test_every_name_has_a_content():
    assert set(lab.CATEGORY) == set(lab.open_lab().names)


# ---- verdicts at their thresholds


def test_verdict_steps():
    def numbers(share=0.95, two=0.85, low=0.01, evaluations=4):
        solver = {
            "solver": True,
            "evaluations": evaluations,
            "four against it": [0.2 if low > -0.5 else -0.2, low, 0.3],
        }
        four = {"solver": False, "evaluations": 4, "share": [share, 0, 1], "four against it": [0, 0, 0]}
        return {"rows": {"LCM-LoRA 4": four, "LCM-LoRA 2": four | {"share": [two, 0, 1]}, "DDIM 2": solver}}

    assert verdicts.steps(numbers()) == "held"
    assert verdicts.steps(numbers(share=0.949)) == verdicts.steps(numbers(two=0.84)) == "held in part"
    assert verdicts.steps(numbers(low=-0.1)) == "held in part"
    assert verdicts.steps(numbers(share=0.89)) == verdicts.steps(numbers(low=-0.9)) == "did not hold"
    assert verdicts.steps(numbers(low=-0.9, evaluations=5)) == "held"  # costs more: may be better


@pytest.mark.parametrize(
    "failed, measurable, verdict",
    [(0, 16, "held"), (1, 16, "held in part"), (8, 16, "did not hold"), (0, 0, "did not hold")],
)
def test_verdict_combination(failed, measurable, verdict):
    assert verdicts.combination({"failed": failed, "measurable": measurable}) == verdict


def test_verdict_base():
    good = {"shipped against none": [0.2, 0.01, 0.3], "short against there": [-0.1, -0.2, -0.049]}
    assert verdicts.base({"bases": {"1": good}}) == "held"
    worse = good | {"short against there": [-0.1, -0.2, -0.051]}
    assert verdicts.base({"bases": {"1": good, "2": worse}}) == "held in part"
    assert verdicts.base({"bases": {"1": good | {"shipped against none": [0.2, -0.01, 0.3]}}}) == "did not hold"


def test_verdict_rank():
    rows = {"16": {"against the highest": [-0.1, -0.2, -0.031]}, "32": {"against the highest": [0, 0, 0]}}
    assert verdicts.rank({"trained": rows}) == "did not hold"
    assert verdicts.rank({"trained": rows | {"4": {"against the highest": [-0.1, -0.2, -0.029]}}}) == "held"


def test_verdict_solver():
    def numbers(left, high):
        near = {"solver": True, "evaluations": 2, "one step against it": [-1, -2, high]}
        costly = {"solver": True, "evaluations": 8, "one step against it": [1, 1, 1]}
        return {"error left": left, "distance": {"DDIM 1": near, "DDIM 4": costly}}

    assert verdicts.solver(numbers(0.5, -0.01)) == "held"
    assert verdicts.solver(numbers(0.51, -0.01)) == verdicts.solver(numbers(0.5, 0.01)) == "held in part"
    assert verdicts.solver(numbers(0.51, 0.01)) == "did not hold"


def test_verdict_recipe():
    back, other = {"takes back": True, "against baseline": [0, -0.1, 0.1]}, {"takes back": False}
    assert verdicts.recipe({"rows": {"a": back, "b": other | {"against baseline": [0.2, 0.1, 0.3]}}}) == "held"
    assert verdicts.recipe({"rows": {"a": back | {"against baseline": [0.2, 0.1, 0.3]}}}) == "did not hold"


def test_verdict_fail():
    good = {"against good": [0, 0, 0], "flagged": False, "control": True}
    bad = {"against good": [-0.3, -0.4, -0.2], "flagged": True, "control": False}
    assert verdicts.fail({"cases": {"a": good, "b": bad}}) == "held"
    assert verdicts.fail({"cases": {"a": good | {"flagged": True}, "b": bad}}) == "held in part"
    assert verdicts.fail({"cases": {"a": good, "b": bad | {"flagged": False}}}) == "did not hold"
    assert verdicts.fail({"cases": {"a": good}}) == "did not hold"  # nothing failed: nothing shown


def test_verdict_memory():
    row = {"share": 0.5, "off": -0.01}
    assert verdicts.memory({"planned": {"a": row}}) == "held"
    assert verdicts.memory({"planned": {"a": row, "b": row | {"share": 0.51}}}) == "did not hold"
    assert verdicts.memory({"planned": {"a": row | {"off": 0.02}}}) == "did not hold"


def test_the_report_is_filled():
    rows = {"a, b = 1": {"x": [0.5, 0.25, 0.75], "n": 1234}, "c": {"x": [1, 1, 1], "n": 2}}
    results = {"steps": {"verdict": "held", "rows": rows}}
    text = "{{steps/verdict}}: {{steps/rows/a, b = 1/x|i}}, {{steps/rows/a, b = 1/n|,}}, {{steps/rows/c/x|p}}"
    assert report.fill(text, results) == "held: 0.50 [0.25, 0.75], 1,234, 100 %"
    table = report.fill("{{table steps/rows: key; n; x|i}}", results)
    assert table == "| a, b = 1 | 1234 | 0.50 [0.25, 0.75] |\n| c | 2 | 1.00 [1.00, 1.00] |"


def test_the_committed_report_is_that_of_the_committed_results():
    text = report.fill((report.HERE / "report.md").read_text(), report.read_results(report.HERE / "results"))
    assert "{{" not in text and text == (report.HERE / "README.md").read_text()


@pytest.mark.parametrize("text", ["{{steps/absent}}", "{{absent/rows}}", "{{table steps/rows: key; absent|i}}"])
def test_a_missing_number_stops_the_report(text):
    with pytest.raises(ValueError, match="no 'absent' in the results"):
        report.fill(text, {"steps": {"rows": {"a": {"x": 1}}}})
