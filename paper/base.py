"""base: Does it work on a base it never saw?

Claim (abstract): LCM-LoRA plugs into fine-tuned models of the same base without training. A base
trained from scratch in another style would be the hardest test and takes days of two cores; in its
place one fine-tune goes as far as it can. (About 1.2 h, of which 0.9 training.)
"""

from matplotlib.figure import Figure

from minilcm.metrics import decide, interval, together
from weights.emoji.styles import REAL

from .charts import BLUE, GREEN, GREY, LIGHT, ORANGE, line, panels
from .pictures import Base, Draw, Found, Vectors, about, against, in_style, over_runs, pictures
from .setup import Budget, W, names_of, prompts_of, shipped, shipped_lora
from .training import far, runs_of, short, train, tuning

FOUR, TEACHER = Draw("lcm", 4), Draw("ddim", 25, W)
ALLOWED, FLOOR = 0.1, 0.5  # see `verdict`
SHIPPED, OLD, THERE, NONE = "shipped", "short, old base", "short, trained there", "none"


def measure(budget: Budget) -> dict:
    prompts = [p for style in REAL for p in prompts_of(style, max(1, budget.names // 4))]
    seeds = budget.seeds[:2]
    groups, before = names_of(prompts), dict(shipped().unet.named_parameters())
    numbers = {"prompts": len(prompts), "bases": {}}

    def found(bases: list[Base | None], way: list[Vectors], draw: Draw = FOUR) -> Found:
        """By run, each with its base; vectors that have no runs are the same on all bases."""
        each = zip(bases, way * (len(bases) // len(way)))
        return over_runs([pictures(prompts, seeds, draw, v, b) for b, v in each])

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
        seen["teacher"], row = teacher, {"distance": 0.0, "runs": len(mine)}
        looks = {way: in_style(x, REAL) for way, x in seen.items()}
        for way, x in seen.items():
            style = {"style": interval(looks[way], groups=groups)}
            row[way] = about(x, teacher, groups) | style
        pairs = {"shipped against teacher": (SHIPPED, "teacher")}
        pairs |= {"old against there": (OLD, THERE)} if label != "0" else {}
        for pair, (a, b) in pairs.items():
            style = {"style": interval(looks[a], looks[b], groups=groups)}
            row[pair] = against(seen[a], seen[b], teacher, groups) | style
        if label != "0":
            # |dW| / |W| over all weights
            moved = sum((x - before[k]).square().sum() for k, x in mine[0].weights.items())
            whole = sum(x.square().sum() for x in before.values())
            row["distance"] = (moved / whole).sqrt().item()
        numbers["bases"][label] = row
    return numbers


def verdict(n: dict) -> dict:
    """On every fine-tuned base that draws its own new sets: in 25 guided steps at least half of its
    pictures have the name, and half the new style. Plugs in: against 25 guided steps of that base,
    the shipped vector in 4 steps is less than 0.1 lower in finding the name, and 10 % in sharpness,
    than it is on its own base; and less than 0.1 lower in drawing the new style. As good as one
    made there: a short vector of the old base is less than 0.1, 10 % and 0.1 below one of the same
    short recipe that was trained on the new base and its art.
    """
    at_home, alike = n["bases"]["0"]["shipped against teacher"], {"right": 0.0, "sharpness": 1.0}
    tuned = [row for label, row in n["bases"].items() if label != "0"]
    drawn = [min(r["teacher"][what][0] for what in ("right", "style")) for r in tuned]
    bases = [r for r, share in zip(tuned, drawn) if share >= FLOOR]
    none = f"no fine-tune draws its sets, by name and style in at most {max(drawn):.2f}"

    def all_of(key: str, expected: dict[str, float]) -> list:
        bounds = {what: x - ALLOWED for what, x in expected.items()} | {"style": -ALLOWED}
        found = [decide(r[key][what], above=x) for r in bases for what, x in bounds.items()]
        return [together(found), min((r[key]["right"] for r in bases), default=none)]

    home = {what: at_home[what][0] for what in alike}
    return {
        "the shipped vector plugs into fine-tunes": all_of("shipped against teacher", home),
        "as good as one made there": all_of("old against there", alike),
    }


def figure(n: dict) -> Figure:
    tuned = [r for label, r in n["bases"].items() if label != "0"]
    worst = min(r["shipped against teacher"]["right"][0] for r in tuned)
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
