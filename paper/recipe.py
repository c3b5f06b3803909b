"""7 recipe: which choices matter?

Claim (section 2 and the official scripts): LCM needs no averaged target and no w as an input when
it is distilled as a LoRA.
"""

from matplotlib.figure import Figure

from minilcm.metrics import interval

from .charts import BLUE, GREY, ORANGE, bars, panels
from .pictures import TEACHER, Draw, pictures, rms
from .setup import Budget, W, pairs, prompts_of
from .training import Recipe, short, train

FULL = "full LCM, w in 1 to 6 as input"
QUICK = (
    "baseline",
    "L2 in place of Huber",
    "without c_skip",
    "EMA target, 0.95",
    "w = 0, guided while sampling",
    FULL,
)


def choices(start: Recipe) -> dict[str, tuple[Recipe, float, bool]]:
    """{label: (recipe, guidance w while sampling, does it undo a simplification of LCM-LoRA?)}."""
    full = start._replace(rank=None, w=(1.0, 6.0), lr=1e-4, marks=())
    return {
        "baseline": (start, 0.0, False),
        "w drawn from 1 to 6, not told": (start._replace(w=(1.0, 6.0)), 0.0, True),
        "w = 0, guided while sampling": (start._replace(w=(0.0, 0.0)), W, False),
        "w = 7.5": (start._replace(w=(7.5, 7.5)), 0.0, False),
        "L2 in place of Huber": (start._replace(distance="l2"), 0.0, False),
        "EMA target, 0.95": (start._replace(target_ema=0.95), 0.0, True),
        "k = 1": (start._replace(k=1), 0.0, False),
        "k = 5": (start._replace(k=5), 0.0, False),
        "k = 20": (start._replace(k=20), 0.0, False),
        "without c_skip": (start._replace(c_skip=False), 0.0, False),
        "rank 64, alpha 64": (start._replace(rank=64), 0.0, False),
        "rank 64, alpha 8": (start._replace(rank=64, lora_alpha=8.0), 0.0, False),
        FULL: (full, 0.0, True),
    }


def measure(budget: Budget) -> dict:
    prompts = prompts_of("all", budget.few)
    groups, teacher = pairs(prompts), pictures(prompts, budget.seeds, TEACHER)
    numbers = {"steps": budget.steps, "prompts": len(prompts), "rows": {}}
    numbers["teacher"] = interval(teacher["right"], groups=groups)
    baseline = None
    for label, (choice, w, takes_back) in choices(short(budget)).items():
        if budget.quick and label not in QUICK:
            continue
        made = train(choice).end
        vectors, base, w_emb = ([], made, W) if choice.rank is None else ([(made, 1.0)], None, None)
        draws = [Draw("lcm", n, w, w_emb) for n in (1, 2, 4)]
        found = [pictures(prompts, budget.seeds, draw, vectors, base) for draw in draws]
        four = found[-1]
        baseline = baseline or four
        row = {
            word: interval(x["right"], groups=groups)
            for word, x in zip(("one", "two", "four"), found)
        }
        numbers["rows"][label] = row | {
            "evaluations": draws[-1].evaluations,
            "distance": interval(rms(found[0]["z0"], teacher["z0"]), groups=groups),
            "sharpness": interval(
                four["sharpness"], teacher["sharpness"], ratio=True, groups=groups
            ),
            "against baseline": interval(four["right"], baseline["right"], groups=groups),
            "takes back": takes_back,
        }
    numbers["worse"] = [k for k, row in numbers["rows"].items() if row["against baseline"][2] < 0]
    numbers["better"] = [k for k, row in numbers["rows"].items() if row["against baseline"][1] > 0]
    return numbers


def verdict(n: dict) -> str:
    """LCM-LoRA simplifies LCM: a fixed w that the network is not told, and no averaged target. Held
    if no row that takes a simplification back is surely better than the baseline at 4 steps.
    """
    back = [row for label, row in n["rows"].items() if row["takes back"]]
    return "did not hold" if any(row["against baseline"][1] > 0 for row in back) else "held"


def figure(n: dict) -> Figure:
    rows, height = n["rows"].values(), 0.42 * len(n["rows"]) + 2
    title = "One choice of the recipe changed at a time; intervals of 95 %"
    fig, (a, b) = panels(2, title, width=5.5, height=height, sharey=True)
    y = list(range(len(rows)))[::-1]
    drawn = ((a, "four", BLUE), (a, "two", ORANGE), (a, "one", GREY), (b, "distance", BLUE))
    for ax, key, color in drawn:
        mean, off = bars([row[key] for row in rows])
        label = f"{key} step{'s' * (key != 'one')}"
        ax.errorbar(mean, y, xerr=off, fmt="o", color=color, label=label, capsize=2)
        ax.axvline(mean[0], color=color, linestyle=":", alpha=0.5)  # of the baseline
    a.axvline(n["teacher"][0], color="black", linestyle="--", linewidth=1, label="DDIM 50, guided")
    a.set_yticks(y, list(n["rows"]))
    fig.legend(*a.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    a.set(xlabel="prompt accuracy")
    b.set(xlabel="RMS of 1 step to the teacher's 50")
    return fig
