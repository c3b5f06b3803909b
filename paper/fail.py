"""8 fail: can its failures be recognised?

Each failure that people meet is provoked, beside good cases that should not be flagged, with the
numbers that may show it without a judge: sharpness, the error to the teacher's end, the norm of the
delta.
"""

from copy import deepcopy
from statistics import mean

import torch
from matplotlib.figure import Figure

from minilcm.merge import combine, delta_norms
from minilcm.metrics import interval
from minilcm.objective import Objective, loss_of, make_networks
from minilcm.run.plan import LiveBytes, size_of

from .charts import BLUE, GREY, RED, panels
from .pictures import (
    FOUR,
    Base,
    Vectors,
    conds_of,
    errors_along,
    pictures,
    save_sheet,
    teacher_path,
)
from .setup import HALF, Budget, Prompt, Vector, prompts_of, shipped, shipped_lora
from .training import short, style_vectors, train, tuning


def cases_of(budget: Budget) -> dict[str, tuple[Vectors, Base | None, bool]]:
    """{label: (vectors, base, is it a good one?)}; the first of a base is the others' measure."""
    tau_lcm, style = shipped_lora(), style_vectors(budget)[budget.styles[-1]]
    far = train(tuning(budget)).end
    there = train(short(budget)._replace(data="styles"), far).end
    nothing = train(short(budget)._replace(steps=2, lr=0.0, marks=())).end
    # the norms of the shipped vector, and what it reads, but written into the wrong channels
    order = torch.Generator().manual_seed(0)
    rows = {
        path: (up[torch.randperm(len(up), generator=order)], *rest)
        for path, (up, *rest) in tau_lcm.tau.items()
    }
    shuffled = Vector(["rows shuffled", tau_lcm.key], rows)
    return {
        "as it should be": ([(tau_lcm, 1.0)], None, True),
        "0.8 style + 1.0 lcm": ([(style, 0.8), (tau_lcm, 1.0)], None, True),
        "a short run's vector": ([(train(short(budget)).end, 1.0)], None, True),
        "no LCM-LoRA": ([], None, False),
        "lambda2 = 0.25": ([(tau_lcm, 0.25)], None, False),
        "lambda2 = 2": ([(tau_lcm, 2.0)], None, False),
        "lambda1 = 2.5 beside it": ([(tau_lcm, 1.0), (style, 2.5)], None, False),
        "left out of the optimizer": ([(nothing, 1.0)], None, False),
        "rows shuffled": ([(shuffled, 1.0)], None, False),
        "made on a far fine-tune": ([(there, 1.0)], None, False),
        "far fine-tune, its own vector": ([(there, 1.0)], far, True),
        "far fine-tune, the shipped vector": ([(tau_lcm, 1.0)], far, False),
        "far fine-tune, style of the old base": ([(there, 1.0), (style, 0.8)], far, False),
    }


def measure(budget: Budget) -> dict:
    prompts, some = prompts_of("bare", budget.few), prompts_of("bare", min(32, budget.few))
    numbers, sheet, paths, good = {"style": budget.styles[-1], "cases": {}}, {}, {}, {}
    for label, (vectors, base, control) in cases_of(budget).items():
        where = "shipped" if base is None else "far"
        if where not in paths:
            paths[where] = teacher_path(some, 0, base)
        x = pictures(prompts, budget.seeds, FOUR, vectors, base)
        error = mean(errors_along(paths[where], some, vectors, base)[1].values())
        best, best_error = good.setdefault(where, (x, error))
        tau = combine([v.tau for v, _ in vectors], [lam for _, lam in vectors])
        row = {
            "right": interval(x["right"]),
            "sharpness": interval(x["sharpness"], best["sharpness"], ratio=True),
            "error": error / best_error,
            "control": control,
            "against good": interval(x["right"], best["right"]),
            "norm": sum(norm**2 for norm in delta_norms(tau).values()) ** 0.5,
        }
        row["flagged"] = (
            not 0.85 < row["sharpness"][0] < 1.15 or row["error"] > 1.25 or row["norm"] == 0
        )
        numbers["cases"][label] = row
        sheet[label] = x["z0"][:6, 0]
    save_sheet("fail", sheet, [p.name for p in prompts], budget)
    numbers["memory"] = {
        label: step_memory(label == "base unfrozen") for label in ("base frozen", "base unfrozen")
    }
    cases = numbers["cases"]
    numbers["bad"] = [k for k, row in cases.items() if row["against good"][2] < 0]
    numbers["missed"] = [k for k in numbers["bad"] if not cases[k]["flagged"]]
    numbers["false alarms"] = [k for k, row in cases.items() if row["control"] and row["flagged"]]
    return numbers


def step_memory(unfrozen: bool) -> float:
    """GB of a training step's tensors on the emoji model: activations, gradients, Adam moments."""
    objective, unet = Objective("lcm", 32), deepcopy(shipped().unet)
    nets = make_networks(objective, unet, HALF)
    if unfrozen:
        unet.requires_grad_(True)
    trained = [x for x in unet.parameters() if x.requires_grad]
    batch = torch.zeros(12, *shipped().shape), *conds_of([Prompt("a cat face", "cat face")] * 12)
    with LiveBytes() as live:
        loss_of(objective, nets, *batch, torch.Generator()).backward()
    return (live.peak + 2 * size_of(trained)) / 1e9


def verdict(n: dict) -> str:
    """A case is flagged, without a judge, if sharpness is off by 15 % or the error to the teacher's
    end by 25 %, both against the good case of the same base, or if the norm of the delta is 0. Held
    if every case that is surely worse is flagged, and no good one; in part if every bad one.
    """
    bad = [c for c in n["cases"].values() if c["against good"][2] < 0]
    missed = any(not c["flagged"] for c in bad)
    alarms = any(c["flagged"] for c in n["cases"].values() if c["control"])
    return "did not hold" if missed or not bad else "held in part" if alarms else "held"


def figure(n: dict) -> Figure:
    fig, axes = panels(
        4, "Every failure beside the number that shows it; dotted: as it should be", width=3.6
    )
    cases, y = n["cases"], list(range(len(n["cases"])))[::-1]
    colors = [
        GREY if row["control"] else RED if label in n["bad"] else BLUE
        for label, row in cases.items()
    ]
    titles = {
        "right": "prompt accuracy",
        "sharpness": "sharpness,\nof the good ones'",
        "error": "error to the teacher's end,\nof the good one's",
        "norm": "norm of the delta",
    }
    for ax, (key, title) in zip(axes, titles.items()):
        values = [row[key][0] if isinstance(row[key], list) else row[key] for row in cases.values()]
        ax.barh(y, values, color=colors)
        ax.axvline(values[0], color="black", linestyle=":")
        ax.set(title=title, yticks=y, yticklabels=list(cases) if ax is axes[0] else [])
    kinds = {"a good case": GREY, "surely worse": RED, "provoked, not surely worse": BLUE}
    marks = [axes[0].barh([0], [0], color=color) for color in kinds.values()]
    fig.legend(marks, list(kinds), loc="outside lower center", ncols=3, fontsize=9)
    return fig
