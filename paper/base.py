"""4 base: does it work on a base it never saw?

Claim (abstract): LCM-LoRA plugs into fine-tuned models of the same base without training.
"""

from matplotlib.figure import Figure

from minilcm.metrics import interval

from .charts import BLUE, GREEN, GREY, LIGHT, ORANGE, line, panels
from .pictures import FOUR, Base, Draw, Vectors, in_style, pictures
from .setup import Budget, W, pairs, prompts_of, shipped, shipped_lora
from .styles import REAL
from .training import short, train, tuning


def measure(budget: Budget) -> dict:
    prompts = [p for style in REAL for p in prompts_of(style, max(1, budget.few // 4))]
    groups, before = pairs(prompts), dict(shipped().unet.named_parameters())
    vectors = {
        "none": [],
        "shipped": [(shipped_lora(), 1.0)],
        "short, old base": [(train(short(budget)).end, 1.0)],
    }

    def found_on(base: Base | None, vectors: dict[str, Vectors]) -> dict[str, dict]:
        """{way: pictures}, 25 guided steps without a vector among them."""
        found = {way: pictures(prompts, budget.seeds, FOUR, v, base) for way, v in vectors.items()}
        return found | {
            "25 guided steps": pictures(prompts, budget.seeds, Draw("ddim", 25, W), (), base)
        }

    def intervals(found: dict[str, dict]) -> dict:
        # any of the four new sets
        both = {way: (x["right"], in_style(x, REAL)) for way, x in found.items()}
        return {
            way: {k: interval(v, groups=groups) for k, v in zip(("right", "style"), x)}
            for way, x in both.items()
        }

    numbers = {"untouched": intervals(found_on(None, vectors)), "bases": {}}
    for step, tuned in train(tuning(budget)).at.items():
        # |dW| / |W| over all weights
        far = sum((x - before[k]).square().sum().item() for k, x in tuned.weights.items()) ** 0.5
        far /= sum(x.square().sum().item() for x in before.values()) ** 0.5
        there = train(short(budget)._replace(data="styles"), tuned).end
        found = found_on(tuned, vectors | {"short, trained there": [(there, 1.0)]})
        right = {way: x["right"] for way, x in found.items()}
        row = intervals(found) | {"distance": far}
        row["shipped against none"] = interval(right["shipped"], right["none"], groups=groups)
        row["short against there"] = interval(
            right["short, old base"], right["short, trained there"], groups=groups
        )
        numbers["bases"][str(step)] = row
    return numbers


def verdict(n: dict) -> str:
    """Held if, on every base, the shipped vector is surely better than none, and a short vector of
    the old base is not surely worse by 0.05 than the same made there; in part if the first only.
    """
    bases = n["bases"].values()
    if not all(b["shipped against none"][1] > 0 for b in bases):
        return "did not hold"
    return "held in part" if any(b["short against there"][2] < -0.05 for b in bases) else "held"


def figure(n: dict) -> Figure:
    title = "The vector on fine-tuned bases, 4 steps, against 25 guided steps of the same base"
    fig, (a, b) = panels(2, title, width=5.4)
    looks = {
        "short, trained there": (GREEN, "^-"),
        "shipped": (BLUE, "o-"),
        "short, old base": (LIGHT, "o--"),
        "none": (GREY, "s-"),
        "25 guided steps": (ORANGE, "v:"),
    }
    rows = [n["untouched"] | {"distance": 0.0}, *n["bases"].values()]
    for way, look in looks.items():
        mine = [r for r in rows if way in r]
        for ax, what in ((a, "right"), (b, "style")):
            line(ax, [r["distance"] for r in mine], [r[way][what] for r in mine], way, *look)
    for ax, what in ((a, "prompt accuracy"), (b, "looks like one of the four new sets")):
        ax.set(xlabel="distance of the base, |dW| / |W|", ylabel=what)
    a.legend(fontsize=8)
    return fig
