"""The sections: rules at their thresholds, a report that misses nothing and tells no lie."""

import json

import pytest
import torch

from minilcm.merge import delta
from paper import __main__ as command
from paper import (
    base,
    combination,
    fail,
    gamma,
    memory,
    no_pictures,
    pictures,
    rank,
    recipe,
    report,
    setup,
    solver,
    steps,
    training,
)

CLEAR = 1e-3  # by how much an interval's end is beyond a bound


def near(bound: float, side: int, surely: bool = True) -> list[float]:
    """An interval on one side of a bound, just wholly (surely) or just not."""
    end = bound + (CLEAR if surely else -CLEAR) * side
    return [bound + 0.1 * side, *sorted((end, bound + 0.2 * side))]


def words(found: dict) -> list[str]:
    return [verdict for verdict, _ in found.values()]


# ---- verdicts at their thresholds


def test_verdict_memory():
    row = {"times": 10.0, "off": -0.01}
    assert words(memory.verdict({"planned": {"a": row}})) == ["shown"] * 3
    other = {"planned": {"a": row, "b": {"times": 9.9, "off": 0.011}}}
    assert words(memory.verdict(other)) == ["refuted", "shown", "refuted"]
    few = {"planned": {"a": row, "b": {"times": 1.9, "off": 0.0}}}
    assert words(memory.verdict(few)) == ["refuted", "refuted", "shown"]


def some_steps(right=(0, 0, 0), two=(0, 0, 0), rival_right=(0, 0, 0), sharp=(1.2, 1.1, 1.3)):
    def row(sampler, evaluations, right, sharp=(1.0, 1.0, 1.0)):
        four = {"right": list(right), "sharpness": list(sharp)}
        return {"sampler": sampler, "evaluations": evaluations, "LCM-LoRA 4": four}

    rows = {"DDIM 50": row("teacher", 100, right), "LCM-LoRA 4": row("LCM-LoRA", 4, (9, 9, 9))}
    rows["DDIM 2"] = row("DDIM", 4, rival_right, sharp)
    rows["DDIM 4"] = row("DDIM", 8, (-1, -1, -1))  # costs more: may be better
    return steps.verdict({"rows": rows, "two": list(two)})


def test_verdict_steps():
    assert words(some_steps()) == ["shown"] * 3
    for i, how in enumerate(("right", "two")):
        for side, surely, word in (
            (1, True, "shown"),
            (1, False, "not shown"),
            (-1, True, "refuted"),
        ):
            assert words(some_steps(**{how: near(-0.05, side, surely)}))[2 * i] == word
    rival = {
        "shown": dict(rival_right=near(-0.05, 1)),  # as often right, and sharper
        "not shown": dict(sharp=(1.0, 0.96, 1.04)),  # better in neither
        "refuted": dict(rival_right=near(-0.05, -1)),
    }
    assert all(words(some_steps(**how))[1] == word for word, how in rival.items())
    assert words(some_steps(sharp=near(0.95, -1)))[1] == "refuted"  # softer
    assert words(some_steps(rival_right=near(-0.05, 1, False)))[1] == "not shown"


def test_verdict_gamma():
    def found(far=near(1, 1), right=(0, -0.1, 0.1), sharp=(1, 0.9, 1.1)):
        row = {"distance": list(far), "right": list(right), "sharpness": list(sharp)}
        return words(gamma.verdict({"fresh": {"4": row | {"distance": near(1, 1)}, "8": row}}))

    assert found() == ["shown", "not shown"]
    assert found(far=near(1, 1, False))[0] == "not shown" and found(far=near(1, -1))[0] == "refuted"
    assert found(right=near(0, 1))[1] == "shown" and found(right=near(0, -1))[1] == "refuted"
    assert found(right=near(-0.05, 1), sharp=near(1, 1))[1] == "shown"
    assert found(right=near(-0.05, 1, False), sharp=near(1, 1))[1] == "not shown"


def a_style(lost=(0, -0.1, 0.09), measurable=True) -> dict:
    row = {"lost": list(lost), "lost to the vector": [0, 0, 0], "lost, equal": [0, 0, 0]}
    none = {k: [0, 0, 0] for k in row}
    return {"name": none, "style": row, "measurable": measurable}


def test_verdict_combination():
    def found(**styles):
        return words(combination.verdict({"styles": styles}))[0]

    assert found(a=a_style(), b=a_style()) == "shown"
    assert found(a=a_style(), b=a_style(near(0.1, -1, False))) == "not shown"
    assert found(a=a_style(), b=a_style((0.3, 0.2, 0.4))) == "refuted"
    assert found(a=a_style(), b=a_style((0.3, 0.2, 0.4), measurable=False)) == "shown"
    # refuted by itself, but not after the correction for sixteen losses
    many = {str(i): a_style() for i in range(7)}
    assert found(b=a_style((0.3, 0.11, 0.49))) == "refuted"
    assert found(b=a_style((0.3, 0.11, 0.49)), **many) == "not shown"
    assert found(b=a_style(measurable=False)) == "not shown"  # nothing to lose: nothing shown


def test_verdict_base():
    def found(right=near(-0.1, 1), sharp=near(0.9, 1), old=near(-0.05, 1), soft=near(0.95, 1)):
        row = {"shipped against teacher": {"right": right, "sharpness": sharp}}
        row["old against there"] = {"right": old, "sharpness": soft}
        good = {
            "shipped against teacher": {"right": near(-0.1, 1), "sharpness": near(0.9, 1)},
            "old against there": {"right": near(-0.05, 1), "sharpness": near(0.95, 1)},
        }
        # the untouched base is in no rule
        return words(base.verdict({"bases": {"0": {}, "100": good, "far": row}}))

    assert found() == ["shown", "shown"]
    assert found(right=near(-0.1, 1, False)) == ["not shown", "shown"]
    assert found(sharp=near(0.9, -1)) == ["refuted", "shown"]
    assert found(old=near(-0.05, -1)) == ["shown", "refuted"]
    assert found(soft=near(0.95, 1, False)) == ["shown", "not shown"]


def a_row(right=(0, 0, 0), far=(1, 1, 1)) -> dict:
    other = {"right": list(right), "distance": list(far)}
    return {"against": {"1": other, "4": other}}


LEARNED = a_row(far=near(1, 1))  # no LoRA is further away


def test_as_good():
    """Less than 0.05 oftener wrong, and less than 5 % further away."""
    rows = {
        "shown": a_row(near(-0.05, 1), near(1.05, -1)),
        "not shown": a_row(near(-0.05, 1, False), near(1.05, -1)),
        "refuted": a_row(near(-0.05, 1), near(1.05, 1)),
    }
    assert all(training.as_good(row["against"]) == word for word, row in rows.items())
    assert training.as_good(a_row(near(-0.05, -1))["against"]) == "refuted"


def test_verdict_rank():
    worse = a_row(far=near(1.05, 1))
    rows = {"rank 1": worse, "rank 16": a_row(), "rank 64": a_row(), "cut to 1": a_row()}
    rows = {k: row | {"rank": int(k.split()[-1])} for k, row in rows.items()}
    found = rank.verdict({"rows": rows | {"no LoRA": LEARNED}})
    assert words(found) == ["shown", "refuted", "shown"] and "rank 16" in next(iter(found))
    found = rank.verdict({"rows": rows | {"no LoRA": a_row(far=near(1, 1, False))}})
    assert words(found) == ["not shown"] * 3


def test_verdict_solver():
    def found(far=near(0.5, -1), one=near(1, -1), trained=near(1, -1)):
        rows = {"LCM-LoRA 1": {"far": far, "solver": False, "evaluations": 1}}
        rows["DDIM 1"] = {"solver": True, "evaluations": 2, "one step, of it": one}
        rows["DDIM 4"] = {"solver": True, "evaluations": 8, "one step, of it": [9, 9, 9]}
        return words(solver.verdict({"distance": rows, "trained": trained}))

    assert found() == ["shown"] * 3
    assert found(near(0.5, 1), near(1, 1), near(1, 1)) == ["refuted"] * 3
    bounds = (near(0.5, -1, False), near(1, -1, False), near(1, -1, False))
    assert found(*bounds) == ["not shown"] * 3


def test_verdict_recipe():
    def found(other=None, learned=LEARNED, differ=("no c_skip",)):
        rows = {recipe.AVERAGED: other or a_row(), recipe.MIXED: a_row(), recipe.NONE: learned}
        return words(recipe.verdict({"rows": rows, "differ": list(differ), "comparisons": 9}))

    assert found() == ["shown"] * 4 and found(differ=())[2] == "not shown"
    assert found(learned=a_row(far=near(1, -1))) == ["not shown"] * 3 + ["refuted"]
    # a row that takes a simplification back is better
    assert found(a_row(right=near(0.05, 1)))[0] == "refuted"
    assert found(a_row(far=near(1 / 1.05, -1)))[0] == "refuted"
    assert found(a_row(far=near(1 / 1.05, 1, False)))[0] == "not shown"


def test_verdict_no_pictures():
    rows = dict(zip(no_pictures.ROWS, (a_row(), a_row(), a_row(far=near(1.05, 1)))))
    assert words(no_pictures.verdict({"rows": rows})) == ["refuted", "shown"]


def test_verdict_fail():
    found = {"distance": near(0.8, 1), "norm off": [0.5, 0.4, 0.6], "judged wrong": near(0.8, -1)}
    assert words(fail.verdict({"detectors": found})) == ["shown", "refuted"]
    found["distance"] = near(0.8, 1, False)
    assert words(fail.verdict({"detectors": found}))[0] == "not shown"
    assert fail.verdict({"detectors": {}}) == {
        "a number shows which settings are bad": ["not shown", "no labels"]
    }


# ---- what they compute


def test_area_under_the_roc():
    """Of six pairs of a bad and a good one, four and a half are in order; certain if all are."""
    score, bad = [1.0, 2.0, 3.0, 0.5, 2.0], [True, True, True, False, False]
    assert fail.area(score, bad)[0] == pytest.approx(4.5 / 6)
    assert fail.area([1, 2, 3, 4], [False, False, True, True]) == [1, 1, 1]


def test_labels_are_of_the_shipped_lora(tmp_path, monkeypatch):
    """Votes of other weights, or of too few pictures, are none."""
    rows = {"a": {"distance": 1.0, "judged wrong": 0.5}, "b": {"distance": 2.0, "judged wrong": 0}}
    votes = {"0": [1, 1, 0], "1": [0, 0, 1], "2": [1, 0, 1], "3": [0, 0, 0]}
    monkeypatch.setattr(fail, "LABELS", tmp_path / "labels.json")
    shown = ["b", "a", "b", "a"]
    assert fail.with_labels(rows, shown) == {}
    for key, given, found in (
        ("other", votes, {}),
        (setup.shipped_lora().key, {"0": [1]}, {}),
        (setup.shipped_lora().key, votes, {"distance": [1, 1, 1], "judged wrong": [0, 0, 0]}),
    ):
        fail.LABELS.write_text(json.dumps({"lcm_lora": key, "votes": given}))
        assert fail.with_labels(rows, shown) == found
    assert rows["b"]["bad"] and not rows["a"]["bad"]


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


def test_the_best_w_at_as_many_evaluations(monkeypatch):
    """With guidance half the steps; chosen on pictures of a seed that nothing else has."""
    asked = []

    def pictures_of(prompts, seeds, draw):
        asked.append((seeds, draw))
        return {"right": torch.tensor([0.5 + (draw.w == 1.0)])}

    monkeypatch.setattr(steps, "pictures", pictures_of)
    draw, found = steps.tuned("ddim", 4, [])
    assert draw == pictures.Draw("ddim", 2, 1.0) and found["1"] == 1.5 and len(found) == 5
    assert {d.evaluations for _, d in asked} == {4} and {s for s, _ in asked} == {setup.TUNE}
    assert not set(setup.TUNE) & {*setup.FULL.seeds, *setup.QUICK.seeds}
    assert list(steps.tuned("ddim", 1, [])[1]) == ["0"]


def test_two_pictures_that_look_alike_are_not_diverse():
    same, across = torch.tensor([[1.0, 0], [2, 0]]), torch.tensor([[1.0, 0], [0, 3]])
    found = steps.diversity({"features": torch.stack([same, across])})
    assert found.tolist() == [[pytest.approx(0)], [pytest.approx(1)]]


def test_a_choice_of_the_recipe_changes_one_thing():
    """From the short recipe, whose w is the shipped LCM-LoRA's, to the official scripts'."""
    start = training.Recipe()
    changed = {
        label: {k for k, x in made._asdict().items() if x != getattr(start, k)}
        for label, made in recipe.choices(start).items()
    }
    official = changed.pop("official, but for lr")
    assert official == {"w", "k", "psi_steps", "constant", "rank", "lora_alpha"}
    assert changed.pop("short recipe") == set()
    assert changed.pop("rank 64, alpha 8") == {"rank", "lora_alpha"}
    for label in ("k 100, one step in it", "k 20, one step in it"):
        assert changed.pop(label) == {"k", "psi_steps"}
    assert all(len(fields) == 1 for fields in changed.values()) and start.w == (3.0, 3.0)
    assert all(made.k % 20 == 0 for made in recipe.choices(start).values())


def test_forty_settings_fail_or_not(monkeypatch):
    """With fewer a ROC is a guess; what would be trained is the shipped vector here."""
    lcm = setup.shipped_lora()
    trained = training.Trained(dict.fromkeys((0, 1, 2, 4, 8, 16), lcm), None)
    monkeypatch.setattr(fail, "train", lambda recipe, base=None: trained)
    monkeypatch.setattr(fail, "style_vector", lambda *how: lcm)
    settings = fail.settings(setup.FULL)
    assert len(settings) >= 40 and len(fail.settings(setup.QUICK)) < 10


def test_every_name_has_a_content():
    names = {p.name for p in setup.prompts_of(None, setup.NAMES)}
    assert set(steps.CATEGORY) == names and len(names) == 64


def test_a_wrong_word_is_told_in_a_line():
    with pytest.raises(ValueError, match="^no section 'speed'; choose from memory, steps"):
        command.main(["steps", "speed"])


# ---- all of it, on a tiny model


STEP = {"parts": {"weights": 1.0, "activations": 2.0}, "total": 3.0, "trained": 5}
PLANNED = {"LCM-LoRA": STEP, "full LCM": STEP, "pixels": 512, "off": 0.0, "times": 3.0}
MEMORY = {"planned": {"SD-V1.5, batch 1": PLANNED}}


def test_from_measurement_to_report(monkeypatch, capsys):
    """Each section measures, judges and draws itself; the report finds every number it wants.
    Memory's networks are of full size, so here its numbers are made up.
    """
    monkeypatch.setattr(memory, "measure", lambda budget: MEMORY)
    monkeypatch.setattr(command, "QUICK", setup.QUICK._replace(names=2))
    command.main(["--quick"])
    out, said = setup.CACHE / "quick", capsys.readouterr().out
    for name in command.CLAIMS:
        found = json.loads((out / f"{name}.json").read_text())["verdict"]
        assert all(
            f"{name}: {statement}: {word} (" in said for statement, (word, _) in found.items()
        )
        assert "<svg" in (out / f"{name}.svg").read_text()
    text = (out / "README.md").read_text()
    assert "{{" not in text and "figures/" not in text and report.UNKNOWN not in text.lower()
    files = {path.stem for path in out.glob("*.png")}
    assert {"steps-pictures", "combination-pictures", "fail-blind-1"} <= files
    before = {path.name: path.read_bytes() for path in out.glob("*.svg")}
    command.main(["--quick", "report"])
    assert before == {path.name: path.read_bytes() for path in out.glob("*.svg")}


def test_what_was_measured_with_other_weights_is_not_told(tmp_path):
    """A section is read if all files that it used are those that are shipped now."""
    shipped = {"model": setup.content_of(setup.MODEL)}
    for name, weights in (("steps", shipped), ("rank", shipped | {"lcm_lora": "another"})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"weights": weights}))
    assert list(report.read_results(tmp_path, command.CLAIMS)) == ["steps"]


def test_a_missing_section_says_so():
    template = "# T\n\n{{claims}} {{steps/now}} {{rank/now}}\n\n## steps\n\n{{numbers/x}}\n\n"
    template += "## rank\n\n{{numbers/x|i}}\n"
    claims = {name: command.CLAIMS[name] for name in ("steps", "rank")}
    result = {"verdict": {"it is": ["shown", [1, 0, 2]]}, "rule": "r", "numbers": {"x": [1, 1, 1]}}
    result |= {"commit": "abc", "seconds": 3600, "processor": "p"}
    text = report.assemble(template, claims, {"rank": result})
    assert f"{report.UNKNOWN} shown" in text and "1.00 [1.00, 1.00]" in text
    assert text.count(f"**{report.UNKNOWN.capitalize()}.**") == 1 and "{{" not in text
    assert "| it is | **shown** | 1.00 [0.00, 2.00] |" in text


def test_the_report_is_filled():
    rows = {"a, b = 1": {"x": [0.5, 0.25, 0.75], "n": 1234}, "c": {"x": [1, 1, 1], "n": 2}}
    result = {"verdict": "held", "rows": rows}
    text = "{{verdict}}: {{rows/a, b = 1/x}}, {{rows/a, b = 1/n|,}}"
    assert report.fill(text, result) == "held: 0.50 [0.25, 0.75], 1,234"
    table = report.fill("{{table rows: key; n; x}}", result)
    assert table == "| a, b = 1 | 1234 | 0.50 [0.25, 0.75] |\n| c | 2 | 1.00 [1.00, 1.00] |"


def test_the_committed_report_is_that_of_the_committed_results(monkeypatch):
    for constant in ("model", "lcm_lora", "judge"):
        name = {"lcm_lora": "LORA"}.get(constant, constant.upper())
        monkeypatch.setattr(setup, name, setup.EMOJI / f"{constant}.safetensors")
    results = report.read_results(report.HERE / "results", command.CLAIMS)
    text = report.assemble((report.HERE / "report.md").read_text(), command.CLAIMS, results)
    assert "{{" not in text and text == (report.HERE / "README.md").read_text()


@pytest.mark.parametrize("text", ["{{rows/absent}}", "{{absent}}", "{{table rows: key; absent}}"])
def test_a_missing_number_stops_the_report(text):
    with pytest.raises(ValueError, match="no 'absent' in the result"):
        report.fill(text, {"rows": {"a": {"x": 1}}})
