"""What the figures share: panels, intervals as bars, labels at the lines themselves."""

import matplotlib
from matplotlib.figure import Figure

# the same bytes every time
matplotlib.rcParams |= {"svg.hashsalt": "minilcm", "svg.fonttype": "none"}

BLUE, LIGHT, ORANGE = "#1f5fa8", "#7fb2e5", "#e07b00"
GREEN, RED, GREY = "#2e8b57", "#c0392b", "0.45"
LOOKS = {"LCM-LoRA": (BLUE, "o-"), "gamma 0": (BLUE, "o:"), "LCM sampler, no LoRA": (GREY, "s-")}
LOOKS |= {"guidance distilled, at its best": (RED, "D-"), "DDIM": (ORANGE, "^-")}
LOOKS["DPM-Solver++"] = GREEN, "v-"


def panels(count: int, title: str, width=4.6, height=3.9, **how) -> tuple[Figure, list]:
    """A figure with the finding as its title, and its panels side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = list(figure.subplots(1, count, squeeze=False, **how)[0])
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def bars(intervals: list) -> tuple[list, list]:
    """(means, how far their intervals reach below and above) as matplotlib takes them."""
    mean, low, high = zip(*intervals)
    off = [[max(0, m - a) for m, a in zip(mean, low)], [max(0, b - m) for m, b in zip(mean, high)]]
    return list(mean), off


def line(ax, x: list, intervals: list, label: str, color: str, mark: str = "o-") -> None:
    """Means by x, with their intervals as bars, and the label at the end, below its likes."""
    mean, off = bars(intervals)
    ax.errorbar(x, mean, off, fmt=mark, color=color, capsize=2, markersize=4)
    likes = [t for t in ax.texts if t.xy[0] == x[-1] and abs(t.xy[1] - mean[-1]) <= 0.03 * mean[-1]]
    beside = dict(xytext=(6, 3 - 9 * len(likes)), textcoords="offset points", fontsize=8)
    ax.annotate(label, (x[-1], mean[-1]), color=color, annotation_clip=False, **beside)


def forest(ax, rows: dict[str, list], bounds: tuple, colors=BLUE) -> None:
    """A row for each interval, the first at the top, and dotted lines at the bounds."""
    y, (mean, off) = list(range(len(rows)))[::-1], bars(list(rows.values()))
    colors = [colors] * len(y) if isinstance(colors, str) else colors
    for i, color in enumerate(colors):
        ax.errorbar(mean[i], y[i], xerr=[[off[0][i]], [off[1][i]]], fmt="o", color=color, ms=4)
    for at in bounds:
        ax.axvline(at, color="0.3", linestyle=":")
    ax.set_yticks(y, list(rows), fontsize=8)


def ticks(ax, values: list) -> None:
    """A logarithmic axis x with these ticks only."""
    ax.set_xscale("log")
    ax.set_xticks(values, [f"{v:g}" for v in values])
    ax.minorticks_off()


def three(rows: dict[str, dict], title: str, red: list[str] = ()) -> Figure:
    """Rows of `training.compare`: distance of 1 step, right and sharp at 4; the first dotted."""
    fig, axes = panels(3, title, height=0.3 * len(rows) + 1.7, sharey=True)
    wanted = {("1", "distance"): "RMS to 50 guided steps' end, 1 step"}
    wanted[("4", "right")] = "right: name and style, 4 steps"
    wanted[("4", "sharpness")] = "sharpness, of 50 guided steps', 4 steps"
    for ax, ((steps, what), label) in zip(axes, wanted.items()):
        mine = {k: r[steps][what] for k, r in rows.items()}
        colors = [RED if k in red and what == "distance" else BLUE for k in rows]
        forest(ax, mine, (next(iter(mine.values()))[0],), colors)
        ax.set(xlabel=label)
    return fig
