"""rank: Is a low rank enough?

Claim (sections 2 and 3.1): the update of a fine-tune has a low rank. The released files have rank
64; the report compares none.
"""

from matplotlib.figure import Figure

from minilcm.files.lora_file import write_tau
from minilcm.lora import Tau
from minilcm.merge import delta, reduce_rank

from .charts import BLUE, GREY, ORANGE, line, panels, ticks
from .pictures import TEACHER, Draw, drawn, rms
from .setup import CACHE, TUNE, Budget, Vector, prompts_of
from .training import as_good, compare, learned, runs_of, short, train

RANKS, RATES = (1, 4, 16, 64), (3e-4, 1e-3, 3e-3)
TUNED_BY = 9  # seed of the runs by which the rate of a rank is chosen


def measure(budget: Budget) -> dict:
    prompts, ranks = prompts_of(None, budget.names), RANKS[:3:2] if budget.quick else RANKS
    end, numbers, rows = drawn(prompts, TUNE, TEACHER), {"rates": {}}, {}
    for r in ranks:
        tried = {}
        for rate in RATES:
            one = [(train(short(budget, TUNED_BY)._replace(rank=r, lr=rate)).end, 1.0)]
            tried[rate] = rms(drawn(prompts, TUNE, Draw("lcm", 1), one), end).mean().item()
        best = min(tried, key=tried.get)
        numbers["rates"][str(r)] = {"best": best} | {f"{k:g}": x for k, x in tried.items()}
        rows[f"rank {r}"] = runs_of(short(budget)._replace(rank=r, lr=best), budget)
    high, sizes = f"rank {ranks[-1]}", {}
    for r in ranks:
        path = CACHE / "lora-for-its-size.safetensors"
        write_tau(path, rows[f"rank {r}"][0][0][0].tau, {})
        sizes[f"rank {r}"] = {"rank": r, "bytes": path.stat().st_size}
        if r < ranks[-1]:
            cut = [(v, *truncated(v.tau, r)) for ((v, _),) in rows[high]]
            rows[f"cut to {r}"] = [[(Vector([v.key, r], small), 1.0)] for v, small, _ in cut]
            residual = sum(left for *_, left in cut) / len(cut)
            sizes[f"cut to {r}"] = sizes[f"rank {r}"] | {"residual": residual}
    sizes["no LoRA"] = {"rank": 0, "bytes": 0}
    found = compare(rows, budget, high)
    return numbers | {"rows": {k: {"residual": 0.0} | sizes[k] | x for k, x in found.items()}}


def truncated(tau: Tau, r: int) -> tuple[Tau, float]:
    """The best tau of rank r, and ||dW - dW'||_F / ||dW||_F over all modules."""
    small, residual = reduce_rank(tau, rank=r)
    squares = {path: delta(*three).square().sum().item() for path, three in tau.items()}
    lost = sum(residual[path] ** 2 * square for path, square in squares.items())
    return small, (lost / sum(squares.values())) ** 0.5


def verdict(n: dict) -> dict:
    """Each rank with the best of three learning rates for it, chosen on runs and pictures of their
    own; alpha is the rank. Rank 16, and rank 1, are as good as 64: less than 0.1 below it in being
    right, and 10 % in sharpness, at 4 steps; and at one step it ends nearer to the teacher's end
    than halfway from rank 64 to no LoRA. Nothing is compared unless rank 64 beats no LoRA in
    distance at one step, and unless rates were tried below rank 64's best and above the other's.
    """
    rows, rates = n["rows"], n["rates"]
    trained = [r["rank"] for k, r in rows.items() if k.startswith("rank")]
    high, found = trained[-1], {}
    for r in dict.fromkeys((max(r for r in trained if r <= 16), trained[0])):
        word, said = as_good(rows, rows[f"rank {r}"]["against"])
        inside = rates[str(high)]["best"] > RATES[0] and rates[str(r)]["best"] < RATES[-1]
        found[f"rank {r} is as good as {high}"] = [word if inside else "not shown", said]
    return found | {f"rank {high} beats no LoRA in distance at 1 step": learned(rows)}


def figure(n: dict) -> Figure:
    trained = [r for k, r in n["rows"].items() if k.startswith("rank")]
    cut = [r for k, r in n["rows"].items() if k.startswith("cut")]
    low, high, far = *(trained[i]["rank"] for i in (0, -1)), trained[0]["against"]["1"]["distance"]
    title = f"Rank {low} ends {far[0]:.2f} times as far from the teacher's end as rank {high}"
    titles = {"1": "RMS to 50 guided steps' end, 1 step", "2": "the same, 2 steps; dotted: no LoRA"}
    titles["4"] = "right: name and style, 4 steps"
    fig, axes = panels(titles.values(), f"{title}, at 1 step", "megabytes of the file")
    for ax, steps in zip(axes, titles):
        what = "right" if steps == "4" else "distance"
        for rows, look in ((trained, ("trained", BLUE)), (cut, (f"{high}, truncated", ORANGE))):
            line(ax, [r["bytes"] / 1e6 for r in rows], [r[steps][what] for r in rows], *look)
        for r in trained:
            ax.annotate(f"rank {r['rank']}", (r["bytes"] / 1e6, r[steps][what][1]), fontsize=7)
        ax.axhline(n["rows"]["no LoRA"][steps][what][0], color=GREY, linestyle=":")
        ticks(ax, [0.2, 0.5, 1, 2, 5, 10])
    return fig
