"""recipe: Which choices matter?

Claim (section 2 and the official scripts): as a LoRA, LCM is distilled without an averaged target,
and for one w that the network is not told. (About 1.6 h, of which 1.4 training.)
"""

from matplotlib.figure import Figure

from minilcm.metrics import decide, holm, together

from .charts import three
from .setup import Budget
from .training import MARGIN, Recipe, compare, runs_of, short

START, AVERAGED, MIXED, NONE = "short recipe", "target averaged", "w 1 to 5, not told", "no LoRA"


def choices(start: Recipe) -> dict[str, Recipe]:
    """The short recipe, and one choice of it changed at a time; at last the official scripts'."""
    official = dict(w=(5.0, 15.0), k=20, psi_steps=1, constant=True, rank=64, lora_alpha=8.0)
    return {
        START: start,
        AVERAGED: start._replace(target_ema=0.95),
        MIXED: start._replace(w=(1.0, 5.0)),
        "L2 in place of Huber": start._replace(distance="l2"),
        "no c_skip": start._replace(c_skip=False),
        "constant learning rate": start._replace(constant=True),
        "rank 64, alpha 8": start._replace(rank=64, lora_alpha=8.0),
        "k 100, one step in it": start._replace(k=100, psi_steps=1),
        "k 20, one step in it": start._replace(k=20, psi_steps=1),
        "official, but for lr": start._replace(**official),
    }


def measure(budget: Budget) -> dict:
    some = list(choices(short(budget)).items())[: 5 if budget.quick else None]
    rows = {label: runs_of(recipe, budget) for label, recipe in some}
    numbers = {"rows": compare(rows | {NONE: [[]] * len(budget.runs)}, budget)}
    others = {k: r["against"] for k, r in numbers["rows"].items() if k not in (START, NONE)}
    numbers["comparisons"] = len(others)
    numbers["differ"] = holm({k: x["1"]["distance"] for k, x in others.items()}, 1.0)
    return numbers | {"differ in right": holm({k: x["4"]["right"] for k, x in others.items()})}


def verdict(n: dict) -> dict:
    """Every other row against the short recipe, which is compared only if it beats no LoRA in
    distance at one step. Without an averaged target, and with one w in place of a mixture that the
    network is not told: no row with it is better, the short recipe being less than 0.05 below in
    being right at 4 steps, and less than 5 % further from the teacher's end at one. Some choice
    matters: after Holm's correction for their number, at least one row differs in distance.
    """
    nothing = n["rows"][NONE]["against"]["1"]["distance"]
    learned = decide(nothing, above=1.0)

    def needless(label: str) -> list:
        other = n["rows"][label]["against"]
        right, far = other["4"]["right"], other["1"]["distance"]
        found = together([decide(right, below=MARGIN), decide(far, above=1 / (1 + MARGIN))])
        return [found if learned == "shown" else "not shown", far]

    matters = "shown" if n["differ"] and learned == "shown" else "not shown"
    return {
        "no averaged target is needed": needless(AVERAGED),
        "one w is as good as a mixture": needless(MIXED),
        "some choice matters": [matters, f"{len(n['differ'])} of {n['comparisons']} rows"],
        "the short recipe beats no LoRA in distance at 1 step": [learned, nothing],
    }


def figure(n: dict) -> Figure:
    title = f"{len(n['differ'])} of {n['comparisons']} choices change the distance of one step"
    return three(n["rows"], f"{title} (red)", n["differ"])
