"""Figures and README.md out of results/*.json: no result in the report is typed.

    python paper/report.py           results/ -> figures/*.png, README.md
    python paper/report.py --quick   the same of runs/paper/quick, into that folder: is anything missing?

report.md is the text, with {{steps/numbers/rows/LCM-LoRA 4/right|i}} where a number of steps.json belongs, and
{{table steps/numbers/rows: key; evaluations; right|i}} for a row of each of its entries. Formats: Python's, or i
(value and interval), p (%), h (hours), v (a list in words). A field that is not there stops the command.
"""

import json
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
QUICK = HERE.parent / "runs/paper/quick"
BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#e07b00", "#2e8b57", "#c0392b", "0.55"


SAMPLERS = {
    "LCM-LoRA": (BLUE, "o-"),
    "LCM sampler, no LoRA": (GREY, "s-"),
    "DDIM": (ORANGE, "^-"),
    "DPM-Solver++": (GREEN, "v-"),
    "DDIM, no guidance": (ORANGE, "^:"),
    "DPM-Solver++, no guidance": (GREEN, "v:"),
}


# ---- figures


def new(panels: int, title: str, width: float = 4.6) -> tuple[Figure, list]:
    figure = Figure(figsize=(width * panels, 3.9), layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure, axes


def line(ax, x: list, intervals: list, label: str, color: str, mark: str = "o-") -> None:
    """Means with their intervals as bars."""
    mean, low, high = zip(*intervals)
    off = [[m - a for m, a in zip(mean, low)], [b - m for m, b in zip(mean, high)]]
    ax.errorbar(x, mean, off, fmt=mark, color=color, label=label, capsize=2, markersize=4)


def memory(n: dict) -> Figure:
    figure, (a,) = new(1, "Memory of one distillation step, batch 1: LCM-LoRA of rank 64 against full LCM", 9)
    a.set_title("a frozen UNet in bfloat16, all that is trained or averaged in float32", fontsize=10)
    bottoms, bars = {}, [(f, way) for f in n["planned"] for way in ("LCM-LoRA", "full LCM")]
    names = [f"{f}\n{way}\n{n['planned'][f]['pixels']} px" for f, way in bars]
    parts = list(dict.fromkeys(p for f, way in bars for p in n["planned"][f][way]["parts"]))
    for part, color in zip(parts, ("#1f5fa8", "#7fb2e5", "#e07b00", "#f2b705", "#2e8b57", "#999999", "#c0392b")):
        sizes = [n["planned"][f][way]["parts"].get(part, 0) for f, way in bars]
        if max(sizes) > 0:
            bottom = [bottoms.get(i, 0) for i in range(len(bars))]
            a.bar(names, sizes, bottom=bottom, label=part, color=color)
            bottoms = {i: b + s for i, (b, s) in enumerate(zip(bottom, sizes))}
    for i, (f, way) in enumerate(bars):
        a.text(i, bottoms[i], f"{n['planned'][f][way]['total']:.1f} GB", ha="center", va="bottom")
    a.set(ylabel="GB"), a.margins(y=0.1)
    a.legend()
    return figure


def steps(n: dict) -> Figure:
    figure, (a, b, c) = new(3, "Quality by network evaluations; a guided step of DDIM or DPM-Solver++ costs two")
    rows = n["rows"]
    for sampler, (color, mark) in SAMPLERS.items():
        mine = [r for label, r in rows.items() if r["sampler"] == sampler and r["steps"] < 50]
        x = [r["evaluations"] for r in mine]
        line(a, x, [r["right"] for r in mine], sampler, color, mark)
        b.plot(x, [r["frechet"] for r in mine], mark, color=color, label=sampler)
    a.axhline(rows["DDIM 50"]["right"][0], color=ORANGE, linestyle=":", label="DDIM 50 (100 evaluations)")
    b.axhline(rows["DDIM 50"]["frechet"], color=ORANGE, linestyle=":", label="DDIM 50 (100 evaluations)")
    a.set(xlabel="network evaluations", ylabel="prompt accuracy", title="shows what was asked for")
    b.set(xlabel="network evaluations", ylabel="Frechet distance", title="held-out art, small CLIP's features")
    a.legend(fontsize=7)
    few = {label: rows[label] for label in ("LCM-LoRA 1", "LCM-LoRA 2", "LCM-LoRA 4", "DDIM 50") if label in rows}
    for i, (label, row) in enumerate(few.items()):
        x = [j + 0.2 * i - 0.3 for j in range(len(row["content"]))]
        color = (GREY, "#7fb2e5", BLUE, ORANGE)[i % 4]
        line(c, x, list(row["content"].values()), label, color, "o")
    c.set_xticks(range(len(row["content"])), row["content"], fontsize=8)
    c.set(title="by content", ylabel="prompt accuracy")
    c.legend(fontsize=7)
    return figure


def combination(n: dict) -> Figure:
    figure, (a, b, c) = new(3, "0.8 style + 1.0 LCM-LoRA in 4 steps, against the style LoRA alone in 25 guided ones")
    colors = {"colour": ORANGE, "line": BLUE, "texture": GREEN, "shape": RED}
    ordered = sorted(n["styles"].items(), key=lambda item: item[1]["lost style"][0])
    for y, (style, r) in enumerate(ordered):
        mean, low, high = r["lost style"]
        fill = "none" if r["outcome"] == "not measurable" else "full"
        a.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=colors[r["kind"]], fillstyle=fill)
        a.plot(r["lost accuracy"][0], y, "x", color="0.5", markersize=4)
    for kind, color in colors.items():
        a.plot([], [], "o", color=color, label=f"style lost: {kind}")
    a.plot([], [], "o", color="0.4", fillstyle="none", label="has too little to lose")
    a.plot([], [], "x", color="0.5", markersize=4, label="prompt accuracy lost")
    a.axvline(n["allowed"], color="0.4", linestyle=":")
    a.set_yticks(range(len(ordered)), [style for style, _ in ordered], fontsize=8)
    a.set_title("lost; right of the dotted line: failed", fontsize=10), a.legend(fontsize=7, loc="lower right")
    ones = sorted({float(k.split()[0]) for k in n["grid"]})
    for ax, what, title in ((b, "style", "in the style"), (c, "sharpness", "sharpness, of the style LoRA's alone")):
        cells = [[sum(x := n["grid"][f"{l1:g} {l2:g}"][what]) / len(x) for l2 in ones] for l1 in ones]
        ax.imshow(cells, vmin=0, vmax=1, cmap="viridis", origin="lower")
        for i, row in enumerate(cells):
            for j, cell in enumerate(row):
                ax.text(j, i, f"{cell:.2f}", ha="center", va="center", color="white" if cell < 0.6 else "black")
        for set_ticks in (ax.set_xticks, ax.set_yticks):
            set_ticks(range(len(ones)), [f"{v:g}" for v in ones])
        ax.set(xlabel="lambda2, LCM-LoRA", ylabel="lambda1, style")
        ax.set_title(f"{title},\n4 steps, mean of all styles", fontsize=10)
        ax.grid(False)
    return figure


def base(n: dict) -> Figure:
    figure, (a, b) = new(2, "The vector on fine-tuned bases, 4 steps, against 25 guided steps of the same base", 5.4)
    looks = {"short, trained there": (GREEN, "^-"), "shipped": (BLUE, "o-"), "short, old base": ("#7fb2e5", "o--"),
        "none": (GREY, "s-"), "25 guided steps": (ORANGE, "v:")}  # fmt: skip
    rows = [n["untouched"] | {"distance": 0.0}, *n["bases"].values()]
    for way, (color, mark) in looks.items():
        mine = [r for r in rows if way in r]
        line(a, [r["distance"] for r in mine], [r[way]["right"] for r in mine], way, color, mark)
        line(b, [r["distance"] for r in mine], [r[way]["style"] for r in mine], way, color, mark)
    for ax, what in ((a, "prompt accuracy"), (b, "looks like one of the four new sets")):
        ax.set(xlabel="distance of the base, |dW| / |W|", ylabel=what)
    a.legend(fontsize=8)
    return figure


def rank(n: dict) -> Figure:
    figure, (a, b, c) = new(3, "Rank of the LCM-LoRA, all by one short recipe")
    for key, color, mark in (("trained", BLUE, "o-"), ("truncated", ORANGE, "s--")):
        ranks = [int(r) for r in n[key]]
        label = "trained at the rank" if key == "trained" else f"rank {ranks[-1]}, truncated by SVD"
        line(a, ranks, [r["four"] for r in n[key].values()], label, color, mark)
        line(b, ranks, [r["distance"] for r in n[key].values()], label, color, mark)
    a.axhline(n["teacher"][0], color=GREY, linestyle=":", label="DDIM 50, guided")
    a.set(xlabel="rank", ylabel="prompt accuracy, 4 steps", xscale="log", xticks=ranks, xticklabels=ranks)
    a.minorticks_off(), b.minorticks_off()
    b.set(xlabel="rank", ylabel="RMS of 1 step to the teacher's 50", xscale="log", xticks=ranks, xticklabels=ranks)
    a.legend(fontsize=8)
    line(c, range(len(n["layers"])), [r["four"] for r in n["layers"].values()], "4 steps", BLUE, "o")
    line(c, range(len(n["layers"])), [r["two"] for r in n["layers"].values()], "2 steps", ORANGE, "s")
    c.set_xticks(range(len(n["layers"])), n["layers"])
    c.set(ylabel="prompt accuracy", title="layers adapted"), c.legend(fontsize=8)
    return figure


def solver(n: dict) -> Figure:
    figure, (a, b, c) = new(3, "Is it a solver of the teacher's ODE?")
    for i, (stage, row) in enumerate(n["along"].items()):
        color = BLUE if stage == "shipped" else str(0.75 - 0.2 * i)
        label = "the shipped one" if stage == "shipped" else f"short run, step {stage}"
        a.plot([int(k) for k in row["to the end"]], list(row["to the end"].values()), ".-", color=color, label=label)
        if stage in ("0", "shipped"):
            near = row["neighbours"]
            a.plot([int(k) for k in near], list(near.values()), ":", color=color, label=f"{label}: to its neighbour")
    a.set(xlabel="grid index n, t = 20 n + 19", ylabel="RMS of f(z_t) to the trajectory's end", yscale="log")
    a.set_title("f along the teacher's trajectory; dotted: between neighbours", fontsize=10)
    a.legend(fontsize=8)
    for sampler, (color, mark) in SAMPLERS.items():
        mine = [r for r in n["distance"].values() if r["sampler"] == sampler]
        line(b, [r["evaluations"] for r in mine], [r["rms"] for r in mine], sampler, color, mark)
    b.set(xlabel="network evaluations", ylabel="RMS to 50 guided steps", xscale="log")
    b.set_title("samplers from the same noise", fontsize=10)
    b.legend(fontsize=8)
    for name, color, mark in (("DDIM", ORANGE, "^-"), ("DPM-Solver++", GREEN, "v-")):
        c.plot([int(k) for k in n["gaussian"][name]], list(n["gaussian"][name].values()), mark, color=color, label=name)
    for k, far in n["gaussian"]["lcm, one step"].items():
        (
            c.plot([1], [far], "o", color=BLUE),
            c.annotate(f"LCM, {k}", (1, far), xytext=(6, -3), textcoords="offset points"),
        )
    c.set(xlabel="network evaluations", ylabel="RMS to the exact end", xscale="log", yscale="log")
    c.set_title("Gaussian data, closed form", fontsize=10), c.legend(fontsize=8)
    for ax, counts in ((b, (1, 2, 4, 8, 16)), (c, (1, 2, 4, 8, 16, 50))):
        ax.set_xticks(counts, counts), ax.minorticks_off()
    return figure


def recipe(n: dict) -> Figure:
    figure = Figure(figsize=(11, 0.42 * len(n["rows"]) + 2), layout="constrained")
    figure.suptitle("One choice of the recipe changed at a time; intervals of 95 %")
    a, b = figure.subplots(1, 2, sharey=True)
    y, base = range(len(n["rows"]))[::-1], n["rows"]["baseline"]
    for ax, keys in ((a, (("four", BLUE), ("two", ORANGE), ("one", GREY))), (b, (("distance", BLUE),))):
        for key, color in keys:
            mean, low, high = zip(*(row[key] for row in n["rows"].values()))
            off = [[m - v for m, v in zip(mean, low)], [v - m for m, v in zip(mean, high)]]
            label = f"{key} step{'s' * (key != 'one')}"
            ax.errorbar(mean, y, xerr=off, fmt="o", color=color, label=label, capsize=2)
            ax.axvline(base[key][0], color=color, linestyle=":", alpha=0.5)
        ax.grid(alpha=0.3)
    a.axvline(n["teacher"][0], color="black", linestyle="--", linewidth=1, label="DDIM 50, guided")
    a.set_yticks(list(y), list(n["rows"]))
    figure.legend(*a.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    a.set(xlabel="prompt accuracy"), b.set(xlabel="RMS of 1 step to the teacher's 50")
    return figure


def fail(n: dict) -> Figure:
    figure, axes = new(4, "Every failure beside the number that shows it; dotted: as it should be", 3.6)
    kinds = {"a good case": GREY, "surely worse": RED, "provoked, not surely worse": BLUE}
    cases, y = n["cases"], range(len(n["cases"]))[::-1]
    titles = {
        "right": "prompt accuracy",
        "sharpness": "sharpness,\nof the good ones'",
        "error": "error to the teacher's end,\nof the good one's",
        "norm": "norm of the delta",
    }
    for ax, (key, title) in zip(axes, titles.items()):
        values = [c[key][0] if isinstance(c[key], list) else c[key] for c in cases.values()]
        ax.barh(list(y), values, color=[GREY if cases[k]["control"] else RED if k in n["bad"] else BLUE for k in cases])
        ax.axvline(values[0], color="black", linestyle=":")
        ax.set(title=title, yticks=list(y), yticklabels=list(cases) if ax is axes[0] else [])
    marks = [axes[0].barh([0], [0], color=color) for color in kinds.values()]
    figure.legend(marks, list(kinds), loc="outside lower center", ncols=3, fontsize=9)
    return figure


FIGURES = {f.__name__: f for f in (memory, steps, combination, base, rank, solver, recipe, fail)}


# ---- numbers


def field(results: dict, path: str):
    value = results
    for key in path.strip().split("/"):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"report.md: {path.strip()}: no {key!r} in the results; run the section again")
        value = value[key]
    return value


def form(value, how: str) -> str:
    if how == "i":
        return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"
    if how == "p":
        return f"{100 * (value[0] if isinstance(value, list) else value):.0f} %"
    if how == "h":
        return f"{value / 3600:.2f}"
    if how == "v":
        return ", ".join(map(str, value)) or "none"
    return format(value, how)


def fill(text: str, results: dict) -> str:
    """Raises ValueError for a field that is not there."""

    def table(match: re.Match) -> str:
        columns = [column.strip().partition("|") for column in match[2].split(";")]
        lines = []
        for key, row in field(results, match[1]).items():
            cells = [
                key if name == "key" else form(field({"row": row}, f"row/{name}"), how) for name, _, how in columns
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    text = re.sub(r"\{\{table ([^:}]+): ([^}]+)\}\}", table, text)
    return re.sub(r"\{\{([^}|]+)(?:\|([^}]*))?\}\}", lambda m: form(field(results, m[1]), m[2] or ""), text)


def read_results(folder: Path) -> dict:
    """{section, or section-seed1: its JSON}, the hours of all, and whether the verdicts stand with another seed."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    results["hours"] = sum(r["seconds"] for r in results.values()) / 3600
    for name in [stem.removesuffix("-seed1") for stem in results if stem.endswith("-seed1")]:
        stands = results[f"{name}-seed1"]["verdict"] == results[name]["verdict"]
        results[f"{name}-seed1"]["stands"] = "stands" if stands else "does not stand"
    return results


def main(quick: bool) -> None:
    source = QUICK if quick else HERE / "results"
    results = read_results(source)
    figures = QUICK if quick else HERE / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        if name not in results:
            raise ValueError(f"{source}/{name}.json: not there; python paper/run.py {name}")
        draw(results[name]["numbers"]).savefig(figures / f"{name}.png", dpi=110)
    text = fill((HERE / "report.md").read_text(), results)
    text = text.replace("](figures/", "](") if quick else text
    (QUICK if quick else HERE).joinpath("README.md").write_text(text)
    print(f"{len(FIGURES)} figures, {len(text.split())} words")


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--quick"]):
        sys.exit(__doc__)
    try:
        main("--quick" in sys.argv)
    except ValueError as error:
        sys.exit(f"report.py: {error}")
