"""solver: Is it a neural solver of the ODE?

Claim (abstract): LCM-LoRA is a plug-in neural solver of the probability-flow ODE, in the place of
DDIM or DPM-Solver.
"""

from matplotlib.figure import Figure

from minilcm.metrics import decide, interval, together

from .charts import BLUE, GREEN, by_sampler, line, panels, ticks
from .pictures import SOLVERS, Draw, drawn, rms
from .setup import Budget, W, names_of, prompts_of, shipped_lora
from .training import long, train

EXACT = Draw("ddim", 100, W)  # the end that all are held against


def samplers() -> dict[str, tuple[str, Draw, bool]]:
    """{label: (sampler, how it draws, with the LCM-LoRA?)}."""
    rows, many = {}, (1, 2, 4, 8)
    for label, lora in (("LCM-LoRA", True), ("LCM sampler, no LoRA", False)):
        rows |= {f"{label} {n}": (label, Draw("lcm", n), lora) for n in many}
    rows |= {f"gamma 0, {n}": ("gamma 0", Draw("lcm", n, 0.0, 0.0), True) for n in many}
    rows |= {f"gamma {g:g}, 4": ("", Draw("lcm", 4, 0.0, g), True) for g in (0.5, 1.0)}
    for name, label in SOLVERS.items():
        rows |= {f"{label} {n}": (label, Draw(name, n, W), False) for n in (*many, 10, 50)}
        rows |= {f"{label} {n}, w 0": ("", Draw(name, n), False) for n in (1, 2)}
        rows |= {f"{label} 1, w {w:g}": ("", Draw(name, 1, w), False) for w in (0.5, 1.0, 2.0)}
    return rows


def measure(budget: Budget) -> dict:
    prompts = prompts_of(None, budget.names)
    groups, seed = names_of(prompts), budget.seeds[:1]
    end = drawn(prompts, seed, EXACT)
    apart = rms(end, drawn(prompts, budget.seeds[1:2], EXACT))
    numbers = {"two seeds apart": apart.mean().item(), "distance": {}, "training": {}}
    ends = {}
    for label, (sampler, draw, lora) in samplers().items():
        ends[label] = rms(drawn(prompts, seed, draw, [(shipped_lora(), 1.0)] if lora else []), end)
        numbers["distance"][label] = {
            "sampler": sampler,
            "solver": draw.sampler in SOLVERS,
            "evaluations": draw.evaluations,
            "far": interval(ends[label], apart, True, groups),
            "one step, of it": interval(ends["LCM-LoRA 1"], ends[label], True, groups),
        }
    # how far one step ends, while the short recipe trains
    stages = {str(k): v for k, v in train(long(budget)).at.items()} | {"shipped": shipped_lora()}
    for stage, vector in stages.items():
        ends[stage] = rms(drawn(prompts, seed, Draw("lcm", 1), [(vector, 1.0)]), end)
        numbers["training"][stage] = {"one step": interval(ends[stage], apart, True, groups)}
    numbers["trained"] = interval(ends[str(budget.long)], ends["0"], True, groups)
    return numbers


def verdict(n: dict) -> dict:
    """Distances are to the end of 100 guided DDIM steps, of the distance of two seeds' ends. A
    neural solver: one evaluation ends within half of it. In the place of solvers: one evaluation
    ends nearer than every solver in one or two, guided by any of five w. What training brings: in
    one run six times as long as the short recipe, one step ends nearer after it than before. (The
    first was known before the run: README of weights/emoji, `evaluate distance`.)
    """
    rivals = [r for r in n["distance"].values() if r["solver"] and r["evaluations"] <= 2]
    few, one = [r["one step, of it"] for r in rivals], n["distance"]["LCM-LoRA 1"]["far"]
    nearer = together(decide(x, below=1.0) for x in few)
    return {
        "one evaluation ends within half of two seeds' distance": [decide(one, below=0.5), one],
        "one evaluation ends nearer than any solver in one or two": [nearer, max(few)],
        "training brings one step nearer": [decide(n["trained"], below=1.0), n["trained"]],
    }


def figure(n: dict) -> Figure:
    one = n["distance"]["LCM-LoRA 1"]["far"][0]
    title = f"One step ends {one:.2f} of two seeds' distance away from the teacher's end"
    titles = ["one step, while it trains; dotted: the shipped one"]
    titles.append("samplers from the same noise; dotted: another seed, mean of all seeds")
    fig, (a, b) = panels(titles, title, width=6)
    *run, last = n["training"].items()
    line(a, [int(k) for k, _ in run], [r["one step"] for _, r in run], "short recipe", GREEN)
    a.axhline(last[1]["one step"][0], color=BLUE, linestyle=":")
    a.set(xlabel="steps of training", ylabel="distance to the teacher's end, of two seeds'")
    for mine, look in by_sampler(n["distance"]):
        line(b, [r["evaluations"] for r in mine], [r["far"] for r in mine], *look)
    for y in (1, 0.5**0.5):
        b.axhline(y, color="0.3", linestyle=":")
    b.set(xlabel="network evaluations", ylabel="distance to the teacher's end", ylim=(0, 2))
    ticks(b, [1, 2, 4, 8, 20, 100])
    for ax in (a, b):
        ax.title.set_size(10)
    return fig
