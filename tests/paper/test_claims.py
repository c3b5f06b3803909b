"""The paper's questions: closed forms, rules at their thresholds, a report that misses nothing."""

import json
import shutil

import pytest
import torch

from minilcm.merge import delta
from minilcm.metrics import wilson
from paper import __main__ as command
from paper import (
    base,
    combination,
    fail,
    memory,
    rank,
    recipe,
    report,
    setup,
    solver,
    steps,
    training,
)


def test_overlap_of_column_spaces():
    """1 for a delta that writes where the other does, 0 elsewhere, between by energy; the norms."""
    up = torch.eye(6)[:, :2]  # writes to rows 0 and 1
    a = {"x": (up, torch.tensor([[3.0, 0, 0], [0, 4.0, 0]]), 2.0)}
    for rows, expected in (([0, 1], 1.0), ([4, 5], 0.0), ([0, 5], 9 / 25), ([1, 2], 16 / 25)):
        b = {"x": (torch.eye(6)[:, rows], torch.eye(3)[:2], 2.0), "elsewhere": (up, up.T, 2.0)}
        inside, chance, ratio = combination.overlap(a, b)
        assert inside == pytest.approx(expected, abs=1e-6) and chance == pytest.approx(2 / 6)
        assert ratio == pytest.approx((25 / 2) ** 0.5)


def test_rank_correlation():
    assert combination.rank_correlation([1, 2, 3, 10], [1, 4, 9, 100]) == pytest.approx(1)
    assert combination.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert combination.rank_correlation([1, 2, 3], [5, 5, 5]) == 0
    # ranks 0 1 2 3 and 0.5 0.5 2 3: sum of products of deviations 4.5, of squares 5 and 4.5
    assert combination.rank_correlation([1, 2, 3, 4], [7, 7, 8, 9]) == pytest.approx(
        4.5 / (5 * 4.5) ** 0.5
    )


def a_style(
    alone=(0.9, 0.8), accuracy=(0.0, -0.1, 0.1), style=(0.0, -0.1, 0.1), equal=(0.0, 0.0)
) -> dict:
    right, kept = ({"alone": [x, x - 0.1, x + 0.1]} for x in alone)
    row = {
        "right": right,
        "style": kept,
        "lost accuracy": list(accuracy),
        "lost style": list(style),
    }
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
        (
            a_style(alone=(0.9, 0.4), style=(0.20, 0.15, 0.30), equal=(0.3, 0.3)),
            "not measurable",
            False,
            False,
        ),
        (
            a_style(alone=(0.4, 0.9), style=(0.20, 0.15, 0.30), equal=(0.3, 0.3)),
            "not measurable",
            False,
            False,
        ),
    ],
)
def test_what_became_of_a_style(row, outcome, surely, equal):
    assert combination.what_became(row) == {
        "outcome": outcome,
        "surely": surely,
        "failed, equal": equal,
    }


def test_failures():
    """Styles with nothing to lose are in no count and no correlation."""
    losses = [(0.0, -0.1, 0.1), (0.05, 0.0, 0.1), (0.15, 0.05, 0.2), (0.3, 0.2, 0.4)]
    rows = [
        a_style(accuracy=x) | {"norm": i, "overlap": 0.5 - 0.1 * i} for i, x in enumerate(losses)
    ]
    rows += [a_style(alone=(0.4, 0.9), accuracy=(0.9, 0.8, 1.0)) | {"norm": -9}]
    found = combination.failures([row | combination.what_became(row) for row in rows])
    counts = {"failed": 2, "measurable": 4, "surely failed": 1, "failed, equal": 0}
    assert found | counts == found and found["failure rate"] == wilson(2, 4)
    assert found["causes"]["norm"]["lost accuracy"] == pytest.approx(1)
    assert found["causes"]["overlap"]["lost accuracy"] == pytest.approx(-1)
    assert found["causes"]["norm"]["lost style"] == 0  # all lost as much


def test_correlation_by_chance():
    """For many pairs a normal of std 1 / sqrt(n - 1), in size above 2.576 std once in a hundred."""
    assert combination.correlation_by_chance(200) == pytest.approx(2.576 / 199**0.5, rel=0.1)


def test_the_gaussian_case():
    """DDIM's error falls as 1 / n, DPM-Solver++'s is less; LCM in skips of 20 is DDIM in 50."""
    far = solver.gaussian()
    ddim, lcm_step = far["DDIM"], far["lcm, one step"]
    assert ddim["16"] / ddim["32"] == pytest.approx(2, rel=0.25)
    assert far["DPM-Solver++"]["16"] < ddim["16"]
    assert lcm_step["k=20"] == pytest.approx(ddim["50"], rel=1e-3)
    assert ddim["16"] < lcm_step["k=100"] < ddim["8"] and ddim["8"] < lcm_step["k=200"] < ddim["4"]


def test_truncated():
    """Singular values 4 and 3 in one module, 12 in another: rank 1 loses the 3, of 13 in all."""
    eye = torch.eye(2)
    tau = {
        "a": (eye, torch.diag(torch.tensor([4.0, 3.0])), 2.0),
        "b": (eye[:, :1], 12 * eye[:1], 1.0),
    }
    small, residual = rank.truncated(tau, 1)
    assert residual == pytest.approx(3 / 13) and delta(
        *small["a"]
    ).diag().tolist() == pytest.approx([4, 0], abs=1e-5)
    assert rank.truncated(tau, 2)[1] == pytest.approx(0, abs=1e-6)


def test_every_row_says_what_it_is():
    """A guided step costs two evaluations; only solvers are rivals at equal evaluations."""
    rows = {label: steps.about(label, draw) for label, (draw, _) in steps.samplers((1, 4)).items()}
    assert rows["LCM-LoRA 4"] == {"sampler": "LCM-LoRA", "solver": False, "evaluations": 4}
    assert rows["DDIM 4"] == {"sampler": "DDIM", "solver": True, "evaluations": 8}
    assert rows["DPM-Solver++, no guidance, 1"]["sampler"] == "DPM-Solver++, no guidance"
    assert (
        not rows["LCM sampler, no LoRA, 1"]["solver"]
        and not steps.about("DDIM 50", steps.TEACHER)["solver"]
    )


def test_a_choice_of_the_recipe_changes_one_thing():
    """From the baseline, whose w is the shipped LCM-LoRA's, to the full LCM and all it changes."""
    start = training.Recipe()
    rows = recipe.choices(start)
    changed = {
        label: {k for k, x in made._asdict().items() if x != getattr(start, k)}
        for label, (made, _, _) in rows.items()
    }
    full = changed.pop(recipe.FULL)
    assert full >= {"rank", "w", "lr"} and changed.pop("baseline") == set()
    assert changed.pop("rank 64, alpha 8") == {"rank", "lora_alpha"}
    assert all(len(words) == 1 for words in changed.values()) and set(recipe.QUICK) <= set(rows)
    assert start.w == (3.0, 3.0) and rows["EMA target, 0.95"][0].target_ema == 0.95
    assert [label for label, (_, w, _) in rows.items() if w] == ["w = 0, guided while sampling"]


def test_every_name_has_a_content():
    assert set(steps.CATEGORY) == set(setup.shipped().names)


def test_a_wrong_word_is_told_in_a_line():
    with pytest.raises(
        SystemExit, match="^python -m paper: no section 'speed'; choose from memory, steps"
    ):
        command.main(["steps", "speed"])


# ---- all of it, on a tiny model


SMALL = setup.Budget(True, (0,), 0, 8, 4, 2, 2, 16, 1, ("sepia",), (1.0,))


def test_from_measurement_to_report(monkeypatch, capsys):
    """Each claim measures, judges and draws itself; the report finds every number it wants. Memory
    takes its numbers from train.py, in a process of its own, so here they are the committed ones;
    the second seed's are the first's.
    """
    committed = json.loads((setup.HERE / "results/memory.json").read_text())["numbers"]
    monkeypatch.setattr(memory, "measure", lambda budget: committed)
    monkeypatch.setattr(command, "budget_of", lambda quick, seed: SMALL)
    command.main(["--quick", *command.CLAIMS])
    out = setup.CACHE / "quick"
    for name in command.REPEATED:
        shutil.copy(out / f"{name}.json", out / f"{name}-seed1.json")
    command.main(["--quick", "report"])
    said = capsys.readouterr().out
    for name in command.CLAIMS:
        verdict = json.loads((out / f"{name}.json").read_text())["verdict"]
        assert f"{name}, seed 0: {verdict} (" in said and (out / f"{name}.png").exists()
    assert {f"{name}-pictures.png" for name in ("steps", "combination", "fail")} <= {
        x.name for x in out.iterdir()
    }
    text = (out / "README.md").read_text()
    assert "{{" not in text and "figures/" not in text and "the verdict stands" in text


# ---- verdicts at their thresholds


def test_verdict_steps():
    def numbers(share=0.95, two=0.85, low=0.01, evaluations=4):
        solver = {
            "solver": True,
            "evaluations": evaluations,
            "four against it": [0.2 if low > -0.5 else -0.2, low, 0.3],
        }
        four = {
            "solver": False,
            "evaluations": 4,
            "share": [share, 0, 1],
            "four against it": [0, 0, 0],
        }
        return {
            "rows": {
                "LCM-LoRA 4": four,
                "LCM-LoRA 2": four | {"share": [two, 0, 1]},
                "DDIM 2": solver,
            }
        }

    assert steps.verdict(numbers()) == "held"
    assert steps.verdict(numbers(share=0.949)) == steps.verdict(numbers(two=0.84)) == "held in part"
    assert steps.verdict(numbers(low=-0.1)) == "held in part"
    assert steps.verdict(numbers(share=0.89)) == steps.verdict(numbers(low=-0.9)) == "did not hold"
    assert steps.verdict(numbers(low=-0.9, evaluations=5)) == "held"  # costs more: may be better


@pytest.mark.parametrize(
    "failed, measurable, verdict",
    [(0, 16, "held"), (1, 16, "held in part"), (8, 16, "did not hold"), (0, 0, "did not hold")],
)
def test_verdict_combination(failed, measurable, verdict):
    assert combination.verdict({"failed": failed, "measurable": measurable}) == verdict


def test_verdict_base():
    good = {"shipped against none": [0.2, 0.01, 0.3], "short against there": [-0.1, -0.2, -0.049]}
    assert base.verdict({"bases": {"1": good}}) == "held"
    worse = good | {"short against there": [-0.1, -0.2, -0.051]}
    assert base.verdict({"bases": {"1": good, "2": worse}}) == "held in part"
    assert (
        base.verdict({"bases": {"1": good | {"shipped against none": [0.2, -0.01, 0.3]}}})
        == "did not hold"
    )


def test_verdict_rank():
    rows = {
        "16": {"against the highest": [-0.1, -0.2, -0.031]},
        "32": {"against the highest": [0, 0, 0]},
    }
    assert rank.verdict({"trained": rows}) == "did not hold"
    assert (
        rank.verdict({"trained": rows | {"4": {"against the highest": [-0.1, -0.2, -0.029]}}})
        == "held"
    )


def test_verdict_solver():
    def numbers(left, high):
        near = {"solver": True, "evaluations": 2, "one step against it": [-1, -2, high]}
        costly = {"solver": True, "evaluations": 8, "one step against it": [1, 1, 1]}
        return {"error left": left, "distance": {"DDIM 1": near, "DDIM 4": costly}}

    assert solver.verdict(numbers(0.5, -0.01)) == "held"
    assert (
        solver.verdict(numbers(0.51, -0.01)) == solver.verdict(numbers(0.5, 0.01)) == "held in part"
    )
    assert solver.verdict(numbers(0.51, 0.01)) == "did not hold"


def test_verdict_recipe():
    back, other = {"takes back": True, "against baseline": [0, -0.1, 0.1]}, {"takes back": False}
    assert (
        recipe.verdict({"rows": {"a": back, "b": other | {"against baseline": [0.2, 0.1, 0.3]}}})
        == "held"
    )
    assert (
        recipe.verdict({"rows": {"a": back | {"against baseline": [0.2, 0.1, 0.3]}}})
        == "did not hold"
    )


def test_verdict_fail():
    good = {"against good": [0, 0, 0], "flagged": False, "control": True}
    bad = {"against good": [-0.3, -0.4, -0.2], "flagged": True, "control": False}
    assert fail.verdict({"cases": {"a": good, "b": bad}}) == "held"
    assert fail.verdict({"cases": {"a": good | {"flagged": True}, "b": bad}}) == "held in part"
    assert fail.verdict({"cases": {"a": good, "b": bad | {"flagged": False}}}) == "did not hold"
    assert fail.verdict({"cases": {"a": good}}) == "did not hold"  # nothing failed: nothing shown


def test_verdict_memory():
    row = {"share": 0.5, "off": -0.01}
    assert memory.verdict({"planned": {"a": row}}) == "held"
    assert memory.verdict({"planned": {"a": row, "b": row | {"share": 0.51}}}) == "did not hold"
    assert memory.verdict({"planned": {"a": row | {"off": 0.02}}}) == "did not hold"


def test_the_report_is_filled():
    rows = {"a, b = 1": {"x": [0.5, 0.25, 0.75], "n": 1234}, "c": {"x": [1, 1, 1], "n": 2}}
    results = {"steps": {"verdict": "held", "rows": rows}}
    text = "{{steps/verdict}}: {{steps/rows/a, b = 1/x|i}}, "
    text += "{{steps/rows/a, b = 1/n|,}}, {{steps/rows/c/x|p}}"
    assert report.fill(text, results) == "held: 0.50 [0.25, 0.75], 1,234, 100 %"
    table = report.fill("{{table steps/rows: key; n; x|i}}", results)
    assert table == "| a, b = 1 | 1234 | 0.50 [0.25, 0.75] |\n| c | 2 | 1.00 [1.00, 1.00] |"


def test_the_committed_report_is_that_of_the_committed_results():
    text = report.fill(
        (report.HERE / "report.md").read_text(), report.read_results(report.HERE / "results")
    )
    assert "{{" not in text and text == (report.HERE / "README.md").read_text()


@pytest.mark.parametrize(
    "text", ["{{steps/absent}}", "{{absent/rows}}", "{{table steps/rows: key; absent|i}}"]
)
def test_a_missing_number_stops_the_report(text):
    with pytest.raises(ValueError, match="no 'absent' in the results"):
        report.fill(text, {"steps": {"rows": {"a": {"x": 1}}}})
