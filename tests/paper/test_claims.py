"""The sections: rules at their thresholds, a report that misses nothing and tells no lie."""

import json

import pytest
import torch

from minilcm.generate import generate
from minilcm.merge import delta
from minilcm.metrics import interval
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
    assert words(memory.verdict(other)) == ["shown", "refuted", "refuted"]
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
    softer, even = near(0.95, -1), (1.0, 0.96, 1.04)
    for word, how in (
        ("shown", dict(rival_right=near(-0.05, 1))),  # as often right, and sharper
        ("not shown", dict(rival_right=near(-0.05, 1, False))),
        ("not shown", dict(sharp=even)),  # better in neither
        ("refuted", dict(rival_right=near(-0.05, -1), sharp=even)),
        ("refuted", dict(sharp=softer)),
        # either is better in one of the two
        ("not shown", dict(rival_right=near(-0.05, -1), sharp=near(1.05, 1))),
        ("not shown", dict(rival_right=near(0.05, 1), sharp=softer)),
        ("shown", dict(rival_right=near(0.2, 1), sharp=softer)),  # the rival draws something else
        ("not shown", dict(rival_right=near(0.2, 1, False), sharp=softer)),
    ):
        assert words(some_steps(**how))[1] == word, how


def test_verdict_gamma():
    def found(far=near(1, 1), right=(0, -0.1, 0.1)):
        row = {"distance": list(far), "right": list(right)}
        return words(gamma.verdict({"fresh": {"4": row | {"distance": near(1, 1)}, "8": row}}))

    assert found() == ["shown", "not shown"]
    assert found(far=near(1, 1, False))[0] == "not shown" and found(far=near(1, -1))[0] == "refuted"
    assert found(right=near(0, 1))[1] == "shown" and found(right=near(0, -1))[1] == "refuted"


def a_style(lost=(0, -0.1, 0.09), measurable=True) -> dict:
    row = {"lost": list(lost), "lost to the vector": [0, 0, 0], "lost, equal": [0, 0, 0]}
    none = {k: [0, 0, 0] for k in row}
    return {"name": none, "style": row, "measurable": measurable}


def test_verdict_combination():
    def found(at=1, mean=None, **styles):
        return words(combination.verdict({"styles": styles, "mean": mean or {}}))[at]

    assert found(a=a_style(), b=a_style()) == "shown"
    assert found(a=a_style(), b=a_style(near(0.1, -1, False))) == "not shown"
    assert found(a=a_style(), b=a_style((0.3, 0.2, 0.4))) == "refuted"
    assert found(a=a_style(), b=a_style((0.3, 0.2, 0.4), measurable=False)) == "shown"
    # refuted by itself, but not after the correction for sixteen losses
    many = {str(i): a_style() for i in range(7)}
    assert found(b=a_style((0.3, 0.11, 0.49))) == "refuted"
    assert found(b=a_style((0.3, 0.11, 0.49)), **many) == "not shown"
    assert found(b=a_style(measurable=False)) == "not shown"  # nothing to lose: nothing shown
    for side, word in ((-1, "shown"), (1, "refuted")):
        mean = {"name": near(0.1, -1), "style": near(0.1, side)}
        assert found(2, mean, a=a_style()) == word
    told = combination.verdict({"styles": {"a": a_style()}, "mean": mean})
    assert told["on average styles keep it"] == ["refuted", mean["style"]]  # the larger loss
    assert found(2, a=a_style()) == "not shown"


def test_verdict_base():
    """At home the vector loses 0.08 of right and 0.1 of sharpness: no more than 0.1 beyond that."""
    home = {"right": [-0.08, -0.1, 0.0], "sharpness": [0.9, 0.8, 1.0]}
    bounds = {"right": -0.18, "sharpness": 0.8}, {"right": -0.1, "sharpness": 0.9}
    pairs = dict(zip(("shipped - teacher", "old - there"), bounds))
    for bound in bounds:
        bound["own"] = -0.1  # of pictures nearer to the new base's than to the old one's

    def found(pair=None, what=None, side=1, surely=True, floor=0.5):
        bases = {"0": {"shipped - teacher": home}}
        for label in ("100", "far"):
            row = {p: {k: near(x, 1) for k, x in bound.items()} for p, bound in pairs.items()}
            bases[label] = row | {"teacher": {"right": [floor, 0, 1]}}
        if pair:
            row[pair][what] = near(pairs[pair][what], side, surely)
        return words(base.verdict({"bases": bases}))

    assert found() == ["shown", "shown"] and found(floor=0.49) == ["not shown"] * 2
    # the number that is told is the one furthest below its bound
    worst = {"0": {"shipped - teacher": home}, "100": {"teacher": {"right": [0.9, 0, 1]}}}
    worst["100"] |= {p: {k: near(x, 1) for k, x in bound.items()} for p, bound in pairs.items()}
    worst["100"]["shipped - teacher"] |= {"sharpness": [0.5, 0.4, 0.6], "own": [-0.2, -0.3, -0.1]}
    told = base.verdict({"bases": worst})["the shipped vector plugs into fine-tunes"]
    assert told == ["refuted", "0.50 [0.40, 0.60] times as sharp, base after 100 steps"]
    for i, (pair, bound) in enumerate(pairs.items()):
        for what in bound:
            for how, word in (((-1,), "refuted"), ((1, False), "not shown")):
                assert found(pair, what, *how)[i] == word
                assert found(pair, what, *how)[1 - i] == "shown"


def test_which_base_a_picture_is_nearer_to():
    latents = [torch.full((1, 1, 2, 4, 2, 2), x) for x in (0.4, 0.0, 1.0)]
    latents[0][..., 1, :, :, :] = 0.6
    x, own, other = ({"z0": z} for z in latents)
    assert base.nearer(x, own, other).tolist() == [[[1, 0]]]
    # an old base's pictures, one run, beside those of three fine-tunes
    many = {"z0": own["z0"].expand(3, -1, -1, -1, -1, -1)}
    assert base.nearer(x, other, many).tolist() == [[[0, 1]]] * 3


def test_whose_pictures_are_nearer_to_which_base(monkeypatch):
    """Latents at 0 are the old base's, at 1 a fine-tune's. On each the shipped vector ends beside
    its own, and four steps without it beside the old one's.
    """
    vector = setup.Vector("shipped", {})
    tuned = pictures.Base("tuned", {k: x + 1 for k, x in setup.shipped().unet.named_parameters()})
    short = setup.Vector("short", {})

    def drawn(prompts, seeds, draw, vectors, at):
        x = 0.2
        if draw == pictures.SLOW:
            x = float(at is not None)
        elif vectors and vectors[0][0] == vector:
            x = 0.1 if at is None else 0.9
        shape = len(prompts), len(seeds)
        return {"z0": torch.full((*shape, 4, 2, 2), x)} | dict.fromkeys(
            ("right", "sharpness"), torch.ones(shape)
        )

    def trained(recipe, at=None):
        end = tuned if recipe.rank is None else short
        return training.Trained({step: end for step in (*recipe.marks, recipe.steps)}, None)

    for module in (base, training):
        monkeypatch.setattr(module, "train", trained)
    monkeypatch.setattr(base, "pictures", drawn)
    monkeypatch.setattr(base, "shipped_lora", lambda: vector)
    for own in base.measure(setup.QUICK)["own"].values():
        assert [own[way][0] for way in ("shipped", "home", base.NONE, base.OLD)] == [1, 1, 0, 0]


def a_row(right=(0, 0, 0), far=(1, 1, 1), sharp=(1, 1, 1)) -> dict:
    other = {"right": list(right), "distance": list(far), "sharpness": list(sharp)}
    return {"against": {"1": other, "4": other}}


NOTHING = a_row(far=(1.08, 1.07, 1.09))  # no LoRA is further away: half of that is 1.04
UNLEARNED = a_row(far=near(1, 1, False))


def test_as_good():
    """Less than 0.1 oftener wrong, or softer, and half of what training brought in distance."""

    def word(**row):
        return training.as_good({"no LoRA": NOTHING}, a_row(**row)["against"])[0]

    edge = dict(right=near(-0.1, 1), sharp=near(0.9, 1), far=near(1.04, -1))
    assert word(**edge) == "shown"
    for what, bound, side in (("right", -0.1, 1), ("sharp", 0.9, 1), ("far", 1.04, -1)):
        assert word(**edge | {what: near(bound, side, False)}) == "not shown"
        assert word(**edge | {what: near(bound, -side)}) == "refuted"
    assert training.as_good({"no LoRA": UNLEARNED}, a_row()["against"])[0] == "not shown"
    # what training brought nothing to is not as good
    assert training.as_good({"no LoRA": NOTHING}, NOTHING["against"])[0] == "refuted"

    # the number that is told comes nearest to its bound, or is furthest beyond it
    def told(**row):
        return training.as_good({"no LoRA": NOTHING}, a_row(**row)["against"])[1]

    assert told(sharp=(0.95, 0.92, 0.98)) == "0.95 [0.92, 0.98] times as sharp, bound 0.90"
    assert told(sharp=(0.95, 0.92, 0.98), far=(1.02, 1, 1.05)).endswith("times as far, bound 1.04")
    assert told(sharp=(0.95, 0.92, 0.98), right=(0, -0.3, 0.3)).endswith("right, bound -0.10")
    assert training.as_good({"no LoRA": UNLEARNED}, a_row()["against"])[1].startswith("nothing")


def test_a_comparison_from_the_other_side():
    row = a_row((0.1, 0.0, 0.3), (2, 1, 4), (0.5, 0.25, 1))["against"]
    assert training.turned(row)["4"] == {
        "right": [-0.1, -0.3, 0.0],
        "distance": [0.5, 0.25, 1],
        "sharpness": [2, 1, 4],
    }


def test_verdict_rank():
    rows = {"rank 1": a_row(far=near(1.04, 1)), "rank 16": a_row(), "rank 64": a_row()}
    rows = {k: row | {"rank": int(k.split()[-1])} for k, row in rows.items()}

    def found(nothing=NOTHING, low=1e-3, high=1e-3):
        rates = {"1": {"best": low}, "16": {"best": 1e-3}, "64": {"best": high}}
        return rank.verdict({"rows": rows | {"no LoRA": nothing}, "rates": rates})

    assert words(found()) == ["shown", "refuted", "shown"] and "rank 16" in next(iter(found()))
    assert words(found(UNLEARNED)) == ["not shown"] * 3
    assert words(found(low=3e-3)) == ["shown", "not shown", "shown"]  # 3e-2 might be better
    assert words(found(high=3e-4)) == ["not shown", "not shown", "shown"]


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
    """A row that takes a simplification back is better, or not."""

    def found(other=None, nothing=NOTHING):
        rows = {recipe.AVERAGED: other or a_row(), recipe.MIXED: a_row(), recipe.NONE: nothing}
        return words(recipe.verdict({"rows": rows}))

    assert found() == ["shown"] * 3 and found(nothing=UNLEARNED) == ["not shown"] * 3
    for how, word in (
        (dict(right=near(0.1, 1)), "refuted"),
        (dict(right=near(0.1, -1)), "shown"),
        (dict(sharp=near(1 / 0.9, 1)), "refuted"),
        (dict(far=near(1 / 1.04, -1)), "refuted"),
        (dict(far=near(1 / 1.04, 1, False)), "not shown"),
    ):
        assert found(a_row(**how)) == [word, "shown", "shown"], how


def test_verdict_no_pictures():
    rows = dict(zip(no_pictures.ROWS, (a_row(), a_row(), a_row(far=near(1.04, 1)))))
    found = no_pictures.verdict({"rows": rows | {"no LoRA": NOTHING}})
    assert words(found) == ["refuted", "shown", "shown"]
    found = no_pictures.verdict({"rows": rows | {"no LoRA": UNLEARNED}})
    assert words(found) == ["not shown"] * 3


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
    """Of six pairs of a bad and a good one, four and a half are in order; certain if all are. Two
    settings of one family say no more than one.
    """
    score, bad = [1.0, 2.0, 3.0, 0.5, 2.0], [True, True, True, False, False]
    assert fail.area(score, bad, list("abcde"))[0] == pytest.approx(4.5 / 6)
    assert fail.area([1, 2, 3, 4], [False, False, True, True], list("abcd")) == [1, 1, 1]
    one, two = ([1.0, 2.0, 3.0, 0.5] * n for n in (1, 2))
    bad, families = [True, False, True, False], list("abcd")
    mean, low, high = fail.area(one, bad, families)
    assert low < mean < high and fail.area(two, bad * 2, families * 2) == [mean, low, high]


def test_area_draws_families_with_all_their_settings():
    """The same bootstrap with settings repeated as often as their family is drawn."""
    score, bad = [4.0, 1.0, 3.0, 3.5, 2.0, 0.5, 3.0], [True, False] * 3 + [True]
    families, g, drawn = list("aabbccd"), torch.Generator().manual_seed(0), []
    for picked in torch.randint(0, 4, (2000, 4), generator=g).tolist():
        rows = [i for family in picked for i in range(7) if families[i] == "abcd"[family]]
        pairs = [(score[i], score[j]) for i in rows for j in rows if bad[i] and not bad[j]]
        drawn += [sum((x > y) + (x == y) / 2 for x, y in pairs) / len(pairs)] if pairs else []
    low, high = torch.tensor(drawn, dtype=torch.float64).quantile(
        torch.tensor([0.025, 0.975]).double()
    )
    assert fail.area(score, bad, families)[1:] == pytest.approx([low.item(), high.item()])


def test_labels_are_of_the_shipped_lora(tmp_path, monkeypatch):
    """Votes of other weights, or of too few pictures, are none."""
    rows = {f"{x} 1": {"distance": 1.0, "judged wrong": 0.5} for x in "abcde"}
    rows |= {f"{x} 2": {"distance": 2.0, "judged wrong": 0} for x in "fghij"}
    rows["k 2"] = rows["a 1"].copy()
    shown = [*reversed(rows), *rows]
    votes = {str(i): [1, 1, 0] if label[-1] == "2" else [0, 0, 1] for i, label in enumerate(shown)}
    votes["0"] = [1, 0, 0]  # of the setting that is last; half of its votes are bad
    monkeypatch.setattr(fail, "LABELS", tmp_path / "labels.json")
    assert fail.with_labels(rows, shown) == {}
    for key, given, found in (
        ("other", votes, {}),
        (setup.shipped_lora().key, {"0": [1]}, {}),
        (setup.shipped_lora().key, votes, {"distance": [1, 1, 1], "judged wrong": [0, 0, 0]}),
    ):
        fail.LABELS.write_text(json.dumps({"lcm_lora": key, "votes": given}))
        assert fail.with_labels(rows, shown) == found
    assert not rows["k 2"]["bad"] and rows["f 2"]["bad"] and not rows["a 1"]["bad"]
    few = {label.replace("f", "g"): {"distance": 1.0} for label in rows}  # four bad families
    assert fail.with_labels(few, [label.replace("f", "g") for label in shown]) == {}


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
    """With guidance half the steps; chosen on pictures of a seed that nothing else has: the
    sharpest of those that are right as often as any within 0.02.
    """
    asked, right = [], {0.0: 0.2, 0.5: 0.5, 1.0: 0.51, 2.0: 0.495, 3.0: 0.48}

    def pictures_of(prompts, seeds, draw):
        asked.append((seeds, draw))
        return {"right": torch.tensor(right[draw.w]), "sharpness": torch.tensor(draw.w)}

    monkeypatch.setattr(steps, "pictures", pictures_of)
    assert steps.tuned(steps.in_as_many("ddim", 4), []) == pictures.Draw("ddim", 2, 2.0)
    assert {d.evaluations for _, d in asked} == {4} and {s for s, _ in asked} == {setup.TUNE}
    assert not set(setup.TUNE) & {*setup.FULL.seeds, *setup.QUICK.seeds}
    assert steps.tuned(steps.in_as_many("ddim", 1), []) == pictures.Draw("ddim", 1, 0.0)


def test_two_pictures_that_look_alike_are_not_diverse():
    same, across = torch.tensor([[1.0, 0], [2, 0]]), torch.tensor([[1.0, 0], [0, 3]])
    found = steps.diversity({"features": torch.stack([same, across])})
    assert found.tolist() == [[pytest.approx(0)] * 2, [pytest.approx(1)] * 2]


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
    assert set().union(*steps.CONTENT.values()) == names and len(names) == 64


def test_a_wrong_word_is_told_in_a_line():
    with pytest.raises(ValueError, match="^no section 'speed'; choose from memory, steps"):
        command.main(["steps", "speed"])


# ---- all of it, on a tiny model


STEP = {"parts": {"weights": 1.0, "activations": 2.0}, "total": 3.0, "trained": 5}
PLANNED = {"LCM-LoRA": STEP, "full LCM": STEP, "pixels": 512, "off": 0.0, "times": 3.0}
PLANNED["official"] = 2.0
MEMORY = {"planned": {"SD-V1.5, batch 1": PLANNED}}


def test_memory_as_the_official_scripts_lay_it_out(monkeypatch):
    """A UNet of 1 billion in 2 bytes: with a LoRA two in 4 bytes, 6 GB more; of a full LCM's three
    only the teacher is not in 4 yet, 2 GB more.
    """
    totals = {64: 10.0, None: 40.0}

    def step(config, side, rank, batch):
        return {"parts": {"UNet": 2.0}, "total": totals[rank], "trained": 1}

    monkeypatch.setattr(memory, "planned_step", step)
    for row in memory.measure(setup.FULL)["planned"].values():
        assert row["official"] == pytest.approx(42 / 16) and row["times"] == 4


def test_from_measurement_to_report(monkeypatch, capsys):
    """Each section measures, judges and draws itself; the report finds every number it wants.
    Memory's networks are of full size, so here its numbers are made up; of 50 steps three are
    drawn.
    """

    def few_steps(eps_fn, seeds, shape, sampler, steps, **how):
        return generate(eps_fn, seeds, shape, sampler, min(steps, 3), **how)

    def grouped(x, y=None, ratio=False, groups=None):
        assert groups is not None  # prompts of one name are drawn together, everywhere
        return interval(x, y, ratio, groups)

    monkeypatch.setattr(combination, "interval", grouped)
    monkeypatch.setattr(combination, "FLOOR", 0.0)  # so that there is a mean over styles
    monkeypatch.setattr(memory, "measure", lambda budget: MEMORY)
    monkeypatch.setattr(pictures, "generate", few_steps)
    monkeypatch.setattr(command, "QUICK", setup.QUICK._replace(names=2, steps=1, style_steps=1))
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
    front = report.FRONT.read_text()
    assert "| [memory](paper/README.md#memory): " in front
    assert report.front_page(front, results) == front


@pytest.mark.parametrize("text", ["{{rows/absent}}", "{{absent}}", "{{table rows: key; absent}}"])
def test_a_missing_number_stops_the_report(text):
    with pytest.raises(ValueError, match="no 'absent' in the result"):
        report.fill(text, {"rows": {"a": {"x": 1}}})
