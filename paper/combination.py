"""3 combination: does it add to any style LoRA with no training?

Claim (section 3.2, Fig. 3): tau_mix = lambda1 tau_style + lambda2 tau_lcm (its tau'_LCM) draws in
the style in few steps, with no training, for any style LoRA.
"""

import random
from itertools import product
from statistics import correlation, mean

from matplotlib.figure import Figure

from minilcm.lora import Tau
from minilcm.merge import delta_norms, factorise
from minilcm.metrics import interval, wilson

from .charts import BLUE, GREEN, ORANGE, RED, panels
from .pictures import FOUR, Draw, held_out_art, in_style, pictures, save_sheet
from .setup import Budget, Vector, W, prompts_of, shipped_lora
from .styles import KINDS
from .training import style_vectors

LAMBDA_STYLE, LAMBDA_LCM = 0.8, 1.0  # of the report's Fig. 3
ALLOWED, FLOOR = 0.1, 0.5  # see `verdict`


def measure(budget: Budget) -> dict:
    numbers, sheet = {"allowed": ALLOWED, "styles": {}, "grid": {}}, {}
    for style, tau in style_vectors(budget).items():
        prompts = prompts_of(style, budget.prompts)
        found = compare(style, tau, budget)
        numbers["styles"][style] = measured_style(style, tau, found)
        sharp = found["alone"]["sharpness"].mean()
        for lambda1, lambda2 in product(budget.grid, budget.grid):
            some = prompts_of(style, budget.few // 4)
            x = pictures(some, budget.seeds[:1], FOUR, [(tau, lambda1), (shipped_lora(), lambda2)])
            cell = numbers["grid"].setdefault(f"{lambda1:g} {lambda2:g}", {})
            seen = {
                "right": x["right"],
                "style": in_style(x, [style]),
                "sharpness": x["sharpness"] / sharp,
            }
            for what, each in seen.items():
                cell.setdefault(what, []).append(each.mean().item())
        for way, label in (
            ("alone", f"{style} 25 steps"),
            ("both", f"0.8 {style} + 1.0 lcm, 4 steps"),
        ):
            sheet[label] = found[way]["z0"][:: max(1, len(prompts) // 6), 0][:6]
    save_sheet("combination", sheet, [""] * 6, budget)
    rows, plain = list(numbers["styles"].values()), held_out_art(None, 2 * budget.looks)
    read = {
        word: mean(row[f"{x} in art"] for row in rows)
        for word, x in (("styles", "found"), ("names", "right"))
    }
    numbers["reader"] = read | {"plain names": plain["right"].mean().item()}
    numbers |= failures(rows)
    numbers["lowest accuracy"] = min(mean(cell["right"]) for cell in numbers["grid"].values())
    product_of = {
        k: sum(a * b for a, b in zip(cell["right"], cell["style"]))
        for k, cell in numbers["grid"].items()
    }
    return numbers | {"best lambdas": max(product_of, key=product_of.get)}


def compare(style: str, tau: Vector, budget: Budget) -> dict[str, dict]:
    """{way: pictures of one style}: the style LoRA alone in 25 guided steps, and others in 4."""
    style_lora, lcm_lora = (tau, LAMBDA_STYLE), (shipped_lora(), LAMBDA_LCM)
    ways = {
        "alone": (Draw("ddim", 25, W), [(tau, 1.0)]),
        "both": (FOUR, [style_lora, lcm_lora]),
        "lcm": (FOUR, [lcm_lora]),
        "equal": (FOUR, [(tau, 1.0), lcm_lora]),  # the style as strong as it is alone
        "without lcm": (FOUR, [style_lora]),
    }
    return {
        way: pictures(prompts_of(style, budget.prompts), budget.seeds, *how)
        for way, how in ways.items()
    }


def measured_style(style: str, tau: Vector, found: dict[str, dict]) -> dict:
    """The numbers of one style: what it has, what it loses in the sum, what may explain that."""
    right = {way: x["right"] for way, x in found.items()}
    kept = {way: in_style(x, [style]) for way, x in found.items()}
    sharp, art = {way: x["sharpness"] for way, x in found.items()}, held_out_art(style, looks=2)
    row = {
        "kind": KINDS[style],
        "right": {way: interval(x) for way, x in right.items()},
        "style": {way: interval(x) for way, x in kept.items()},
        "sharpness": {
            way: interval(sharp[way], sharp["alone"], ratio=True) for way in ("both", "without lcm")
        },
        "found in art": in_style(art, [style]).mean().item(),
        "right in art": art["right"].mean().item(),
        "lost accuracy": interval(right["alone"], right["both"]),
        "lost style": interval(kept["alone"], kept["both"]),
        "both against lcm": interval(right["both"], right["lcm"]),
        "lost, equal": [(x["alone"] - x["equal"]).mean().item() for x in (right, kept)],
        "blocks": blocks(tau.tau),
    }
    row["overlap"], row["overlap by chance"], row["norm"] = overlap(tau.tau, shipped_lora().tau)
    return row | what_became(row)


# ---- what the two LoRA are to each other


def overlap(a: Tau, b: Tau) -> tuple[float, float, float]:
    """(share of a's delta in the column spaces of b's, the same by chance, norm ratio |a| / |b|).

    The columns of U span what a delta can write. The first is sum_ij s_i^2 (u_i . u'_j)^2 / sum_i
    s_i^2 over U' of b, all modules together: 0 if a writes where b does not, 1 if wholly within. A
    random U would give r' / out.
    """
    inside = chance = whole = other = 0.0
    for path in a.keys() & b.keys():
        (u, s, _), (u_, s_, _) = factorise(*a[path]), factorise(*b[path])
        kept = s_ > 1e-6 * s_[0]
        energy = s.square().sum().item()
        inside += (s[None, :] * (u_[:, kept].T @ u)).square().sum().item()
        chance += energy * kept.sum().item() / len(u_)
        whole, other = whole + energy, other + s_.square().sum().item()
    return inside / whole, chance / whole, (whole / other) ** 0.5


def blocks(tau: Tau) -> dict[str, float]:
    """Share of the squared norm on the way down, in the middle and on the way up."""
    squares = {block: norm**2 for block, norm in delta_norms(tau).items()}
    whole, starts = sum(squares.values()), {"down": "input", "middle": "middle", "up": "output"}
    return {
        part: sum(v for k, v in squares.items() if k.startswith(x)) / whole
        for part, x in starts.items()
    }


# ---- the rule, and what goes with failing


def what_became(row: dict) -> dict:
    """Did a style in the sum fail, does its interval say so, and would it with lambda1 = 1?"""
    if min(row["right"]["alone"][0], row["style"]["alone"][0]) < FLOOR:
        return {"outcome": "not measurable", "surely": False, "failed, equal": False}
    lost = row["lost accuracy"], row["lost style"]
    outcome = "failed" if max(x for x, _, _ in lost) > ALLOWED else "works"
    surely = max(low for _, low, _ in lost) > ALLOWED
    return {
        "outcome": outcome,
        "surely": surely,
        "failed, equal": max(row["lost, equal"]) > ALLOWED,
    }


def failures(rows: list[dict]) -> dict:
    """How many styles failed, of those with something to lose, and what goes with their losses."""
    lost = [row for row in rows if row["outcome"] != "not measurable"]
    failed = sum(row["outcome"] == "failed" for row in lost)
    numbers = {
        "failed": failed,
        "measurable": len(lost),
        "failure rate": wilson(failed, max(1, len(lost))),
    }
    numbers |= {
        "surely failed": sum(r["surely"] for r in lost),
        "failed, equal": sum(r["failed, equal"] for r in lost),
    }
    causes = {
        "overlap": [r["overlap"] - r["overlap by chance"] for r in lost],
        "norm": [r["norm"] for r in lost],
    }
    causes |= {
        f"share {part}": [r["blocks"][part] for r in lost] for part in ("down", "middle", "up")
    }
    losses = {loss: [r[loss][0] for r in lost] for loss in ("lost accuracy", "lost style")}
    numbers["causes"] = {
        cause: {loss: rank_correlation(x, y) for loss, y in losses.items()}
        for cause, x in causes.items()
    }
    return numbers | {"by chance": correlation_by_chance(len(lost))}


def correlation_by_chance(n: int) -> float:
    """The size that one in a hundred rank correlations of `n` shuffled pairs surpasses."""
    rng, order = random.Random(0), list(range(n))
    return sorted(abs(rank_correlation(order, rng.sample(order, n))) for _ in range(2000))[1980]


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's, equal values sharing their mean rank; 0 if all of one are equal."""
    ranks = [
        [mean(j for j, other in enumerate(sorted(v)) if other == value) for value in v]
        for v in (x, y)
    ]
    return correlation(*ranks) if all(len(set(v)) > 1 for v in ranks) else 0.0


def verdict(n: dict) -> str:
    """A style fails if accuracy or style is more than 0.1 below the style LoRA alone at 25 guided
    steps; styles whose LoRA alone is below 0.5 in either have nothing to lose and are not counted.
    Held if none fails; in part if less than half.
    """
    if n["failed"] == 0 < n["measurable"]:
        return "held"
    return "held in part" if 2 * n["failed"] < n["measurable"] else "did not hold"


def figure(n: dict) -> Figure:
    title = "0.8 style + 1.0 LCM-LoRA in 4 steps, against the style LoRA alone in 25 guided ones"
    fig, (a, b, c) = panels(3, title)
    colors = {"colour": ORANGE, "line": BLUE, "texture": GREEN, "shape": RED}
    ordered = sorted(n["styles"].items(), key=lambda item: item[1]["lost style"][0])
    for y, (style, r) in enumerate(ordered):
        mid, low, high = r["lost style"]
        fill = "none" if r["outcome"] == "not measurable" else "full"
        a.errorbar(
            mid,
            y,
            xerr=[[mid - low], [high - mid]],
            fmt="o",
            color=colors[r["kind"]],
            fillstyle=fill,
        )
        a.plot(r["lost accuracy"][0], y, "x", color="0.5", markersize=4)
    for kind, color in colors.items():
        a.plot([], [], "o", color=color, label=f"style lost: {kind}")
    a.plot([], [], "o", color="0.4", fillstyle="none", label="has too little to lose")
    a.plot([], [], "x", color="0.5", markersize=4, label="prompt accuracy lost")
    a.axvline(n["allowed"], color="0.4", linestyle=":")
    a.set_yticks(range(len(ordered)), [style for style, _ in ordered], fontsize=8)
    a.set_title("lost; right of the dotted line: failed", fontsize=10)
    a.legend(fontsize=7, loc="lower right")
    heat_map(b, n["grid"], "style", "in the style")
    heat_map(c, n["grid"], "sharpness", "sharpness, of the style LoRA's alone")
    return fig


def heat_map(ax, grid: dict, what: str, title: str) -> None:
    """Means of all styles over lambda1 and lambda2."""
    lambdas = sorted({float(cell.split()[0]) for cell in grid})
    cells = [
        [mean(grid[f"{lambda1:g} {lambda2:g}"][what]) for lambda2 in lambdas] for lambda1 in lambdas
    ]
    ax.imshow(cells, vmin=0, vmax=1, cmap="viridis", origin="lower")
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            ax.text(
                j,
                i,
                f"{cell:.2f}",
                ha="center",
                va="center",
                color="white" if cell < 0.6 else "black",
            )
    for set_ticks in (ax.set_xticks, ax.set_yticks):
        set_ticks(range(len(lambdas)), [f"{v:g}" for v in lambdas])
    ax.set(xlabel="lambda2, LCM-LoRA", ylabel="lambda1, style")
    ax.set_title(f"{title},\n4 steps, mean of all styles", fontsize=10)
    ax.grid(False)
