"""base: Does it work on a base it never saw?

Claim (abstract): LCM-LoRA plugs into fine-tuned models of the same base without training. A base
trained from scratch in another style would be the hardest test and takes days of two cores; in its
place one fine-tune goes as far as it can. (About 1.0 h, of which 0.9 training.)
"""

from matplotlib.figure import Figure

from minilcm.metrics import decide, interval, together
from weights.emoji.styles import REAL

from .charts import BLUE, GREEN, GREY, LIGHT, ORANGE, line, panels
from .pictures import Base, Draw, Found, Vectors, about, against, in_style, over_runs, pictures
from .setup import Budget, W, names_of, prompts_of, shipped, shipped_lora
from .training import far, runs_of, short, train, tuning

FOUR, TEACHER = Draw("lcm", 4), Draw("ddim", 25, W)
# of being right, and of sharpness: against 25 guided steps of the base, and a vector made there
ALLOWED, MARGIN = 0.1, 0.05
SHIPPED, OLD, THERE, NONE = "shipped", "short, old base", "short, trained there", "none"


def measure(budget: Budget) -> dict:
    prompts = [p for style in REAL for p in prompts_of(style, max(1, budget.names // 4))]
    groups, before = names_of(prompts), dict(shipped().unet.named_parameters())
    numbers = {"prompts": len(prompts), "bases": {}}

    def found(bases: list[Base | None], way: list[Vectors], draw: Draw = FOUR) -> Found:
        """By run, each with its base; vectors that have no runs are the same on all bases."""
        each = zip(bases, way * (len(bases) // len(way)))
        return over_runs([pictures(prompts, budget.seeds[:1], draw, v, b) for b, v in each])

    runs = [train(tuning(budget, seed)).at for seed in budget.runs]
    old = runs_of(short(budget), budget)
    bases = {str(step): [at[step] for at in runs] for step in sorted(runs[0])}
    bases = {"0": [None]} | bases | {"far": [train(far(budget)).end]}
    for label, mine in bases.items():
        ways = {NONE: [[]], SHIPPED: [[(shipped_lora(), 1.0)]], OLD: old[: len(mine)]}
        if label != "0":
            there = [short(budget, seed)._replace(data="styles") for seed in budget.runs]
            ways[THERE] = [[(train(r, base).end, 1.0)] for r, base in zip(there, mine)]
        teacher = found(mine, [[]], TEACHER)
        seen = {way: found(mine, v) for way, v in ways.items()}
        row = {}
        for way, x in (seen | {"teacher": teacher}).items():
            style = {"style": interval(in_style(x, REAL), groups=groups)}
            row[way] = about(x, teacher, groups) | style
        row["shipped against teacher"] = against(seen[SHIPPED], teacher, teacher, groups)
        row["distance"], row["runs"] = 0.0, len(mine)
        if label != "0":
            row["old against there"] = against(seen[OLD], seen[THERE], teacher, groups)
            # |dW| / |W| over all weights
            moved = sum((x - before[k]).square().sum() for k, x in mine[0].weights.items())
            whole = sum(x.square().sum() for x in before.values())
            row["distance"] = (moved / whole).sqrt().item()
        numbers["bases"][label] = row
    return numbers


def verdict(n: dict) -> dict:
    """On every fine-tuned base. Plugs in: the shipped vector in 4 steps is less than 0.1 below 25
    guided steps of that base in finding the name, and less than 10 % in sharpness. As good as one
    made there: a short vector of the old base is less than 0.05 and 5 % below one of the same short
    recipe that was trained on the new base and its art.
    """
    bases = [row for label, row in n["bases"].items() if label != "0"]

    def all_of(key: str, margin: float) -> list:
        rows = [row[key] for row in bases]
        right = together(decide(r["right"], above=-margin) for r in rows)
        sharp = together(decide(r["sharpness"], above=1 - margin) for r in rows)
        return [together([right, sharp]), min(r["right"] for r in rows)]

    return {
        "the shipped vector plugs into fine-tunes": all_of("shipped against teacher", ALLOWED),
        "as good as one made there": all_of("old against there", MARGIN),
    }


def figure(n: dict) -> Figure:
    worst = min(r["shipped against teacher"]["right"][0] for r in n["bases"].values())
    title = f"On fine-tunes 4 steps against 25 guided ones: at worst {worst:+.2f} of names found"
    fig, axes = panels(3, title)
    looks = {THERE: (GREEN, "^-"), SHIPPED: (BLUE, "o-"), OLD: (LIGHT, "o--"), NONE: (GREY, "s-")}
    titles = {"right": "name found, 4 steps", "sharpness": "sharpness, of 25 guided steps'"}
    titles["style"] = "looks like one of the four new sets"
    for ax, (what, title) in zip(axes, titles.items()):
        for way, (color, mark) in (looks | {"teacher": (ORANGE, "v:")}).items():
            mine = [r for r in n["bases"].values() if way in r]
            label = "25 guided steps" if way == "teacher" else way
            x, y = [r["distance"] for r in mine], [r[way][what] for r in mine]
            line(ax, x, y, label, color, mark)
        ax.set(title=title, xlabel="distance of the base, |dW| / |W|")
    return fig
