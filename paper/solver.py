"""6 solver: is it a neural solver of the ODE?

Claim (abstract): LCM-LoRA is a plug-in neural solver of the probability-flow ODE, in the place of
DDIM or DPM-Solver.
"""

from statistics import mean

import torch
from matplotlib.figure import Figure
from torch import Tensor

from minilcm.generate import SAMPLERS as WAYS
from minilcm.metrics import interval
from minilcm.schedule import eps_from_x0
from minilcm.solver import ddim_step

from .charts import BLUE, SAMPLERS, line, panels
from .pictures import SOLVERS, TEACHER, drawn, errors_along, rms, teacher_path
from .setup import SCHEDULE, Budget, pairs, prompts_of, shipped_lora
from .steps import about, samplers
from .training import short, train


def measure(budget: Budget) -> dict:
    numbers = {"along": {}, "distance": {}, "gaussian": gaussian()}
    # how far f is from the end of the teacher's trajectory, along it: short runs, the shipped one
    some = prompts_of("all", min(64, budget.few))
    path = teacher_path(some, 2 * budget.seed)
    stages = {str(step): vector for step, vector in train(short(budget)).at.items()} | {
        "shipped": shipped_lora()
    }
    for stage, vector in stages.items():
        near, end = errors_along(path, some, [(vector, 1.0)])
        numbers["along"][stage] = {
            "neighbours": near,
            "to the end": end,
            "mean to the end": mean(end.values()),
        }
    before, after = (numbers["along"][stage]["mean to the end"] for stage in ("0", "shipped"))
    numbers["error left"] = after / before

    # how far each sampler ends from that end, from the same noise
    prompts, rows = prompts_of("all", budget.few), samplers((1, 2, 4, 8))
    groups, teacher = pairs(prompts), drawn(prompts, budget.seeds, TEACHER)
    far = {label: rms(drawn(prompts, budget.seeds, *how), teacher) for label, how in rows.items()}
    for label, (draw, _) in rows.items():
        row = about(label, draw) | {"rms": interval(far[label], groups=groups)}
        row["one step against it"] = interval(far["LCM-LoRA 1"], far[label], groups=groups)
        numbers["distance"][label] = row
    return numbers


def gaussian(m: float = 0.7, s: float = 0.5) -> dict:
    """Where the answer is known: data N(m, s^2).

    Its ODE ends at m + s (z - alpha m) / sqrt(alpha^2 s^2 + sigma^2).
    RMS over z ~ N(0, 1) of each solver's end minus the exact one. What distillation leads to, as
    tests/test_convergence shows, is f = one step of DDIM from each skip to the next, down to t = 0:
    so many skips of k, in one evaluation.
    """
    z_T = torch.randn(4096, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    def x0_of(z_t: Tensor, t: int) -> Tensor:
        # E[z0 | z_t] = m + alpha s^2 / (alpha^2 s^2 + sigma^2) (z_t - alpha m)
        alpha, sigma = SCHEDULE.at(t, z_t)
        return m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (z_t - alpha * m)

    def eps_fn(z_t: Tensor, t: int) -> Tensor:
        return eps_from_x0(z_t, x0_of(z_t, t), t, SCHEDULE)

    def fixed_point(k: int) -> Tensor:
        z_t, t = z_T, 999
        while t > 0:
            t_end = max(t - k, 0)
            z_t, t = ddim_step(x0_of(z_t, t), eps_fn(z_t, t), t_end, SCHEDULE), t_end
        return z_t

    alpha, sigma = SCHEDULE.at(999, z_T)
    exact = m + s * (z_T - alpha * m) / (alpha**2 * s**2 + sigma**2).sqrt()

    ends = {"lcm, one step": {f"k={k}": fixed_point(k) for k in (20, 100, 200)}}
    for sampler, label in SOLVERS.items():
        ends[label] = {
            str(n): WAYS[sampler].sample(eps_fn, z_T, SCHEDULE, n) for n in (1, 2, 4, 8, 16, 32, 50)
        }
    return {
        label: {k: (z0 - exact).square().mean().sqrt().item() for k, z0 in row.items()}
        for label, row in ends.items()
    }


def verdict(n: dict) -> str:
    """Held if the error to the trajectory's end falls to half or less, and one evaluation comes
    surely nearer to that end than any solver in one or two, guided or not; in part if one of the
    two.
    """
    few = [r for label, r in n["distance"].items() if r["solver"] and r["evaluations"] <= 2]
    both = [n["error left"] <= 0.5, all(r["one step against it"][2] < 0 for r in few)]
    return "held" if all(both) else "held in part" if any(both) else "did not hold"


def figure(n: dict) -> Figure:
    fig, (a, b, c) = panels(3, "Is it a solver of the teacher's ODE?")
    for i, (stage, row) in enumerate(n["along"].items()):
        color = BLUE if stage == "shipped" else str(0.75 - 0.2 * i)
        label = "the shipped one" if stage == "shipped" else f"short run, step {stage}"
        end, near = (
            {int(index): x for index, x in row[key].items()} for key in ("to the end", "neighbours")
        )
        a.plot(list(end), list(end.values()), ".-", color=color, label=label)
        if stage in ("0", "shipped"):
            a.plot(
                list(near),
                list(near.values()),
                ":",
                color=color,
                label=f"{label}: to its neighbour",
            )
    a.set(
        xlabel="grid index n, t = 20 n + 19",
        ylabel="RMS of f(z_t) to the trajectory's end",
        yscale="log",
    )
    a.set_title("f along the teacher's trajectory; dotted: between neighbours", fontsize=10)
    for sampler, look in SAMPLERS.items():
        mine = [r for r in n["distance"].values() if r["sampler"] == sampler]
        line(b, [r["evaluations"] for r in mine], [r["rms"] for r in mine], sampler, *look)
    b.set(xlabel="network evaluations", ylabel="RMS to 50 guided steps", xscale="log")
    b.set_title("samplers from the same noise", fontsize=10)
    for label in SOLVERS.values():
        far, (color, mark) = n["gaussian"][label], SAMPLERS[label]
        c.plot([int(k) for k in far], list(far.values()), mark, color=color, label=label)
    for k, far in n["gaussian"]["lcm, one step"].items():
        c.plot([1], [far], "o", color=BLUE)
        c.annotate(f"LCM, {k}", (1, far), xytext=(6, -3), textcoords="offset points")
    c.set(xlabel="network evaluations", ylabel="RMS to the exact end", xscale="log", yscale="log")
    c.set_title("Gaussian data, closed form", fontsize=10)
    for ax, counts in ((b, (1, 2, 4, 8, 16)), (c, (1, 2, 4, 8, 16, 50))):
        ax.set_xticks(counts, counts)
        ax.minorticks_off()
    for ax in (a, b, c):
        ax.legend(fontsize=8)
    return fig
