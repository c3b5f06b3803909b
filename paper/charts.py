"""What the figures share: panels, intervals as bars, labels at the lines themselves."""

from collections.abc import Collection, Iterator

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams |= {"svg.hashsalt": "minilcm", "svg.fonttype": "none"}  # equal bytes

BLUE, LIGHT, ORANGE = "#1f5fa8", "#7fb2e5", "#e07b00"
GREEN, RED, GREY = "#2e8b57", "#c0392b", "0.45"
LOOKS = {"LCM-LoRA": (BLUE, "o-"), "gamma 0": (BLUE, "o:"), "LCM sampler, no LoRA": (GREY, "s-")}
LOOKS |= {"guidance distilled, at its best": (RED, "D-"), "DDIM": (ORANGE, "^-")}
LOOKS["DPM-Solver++"] = GREEN, "v-"
ABOUT = {"distance": "RMS to 50 guided steps' end", "right": "right: name and style"}
ABOUT["sharpness"] = "sharpness, of 50 guided steps'"


def panels(titles: Collection[str], finding: str, xlabel="", width=4.6, height=3.9, sharey=False):
    """A figure with the finding as its title, and its panels, one of each title, side by side."""
    figure = Figure(figsize=(width * len(titles), height), layout="constrained")
    figure.suptitle(finding, fontsize=12)
    axes = list(figure.subplots(1, len(titles), squeeze=False, sharey=sharey)[0])
    for ax, title in zip(axes, titles):
        ax.set(title=title, xlabel=xlabel)
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
    at = likes[0].xy[1] if likes else mean[-1]
    ax.annotate(label, (x[-1], at), color=color, annotation_clip=False, **beside)


def by_sampler(rows: dict[str, dict]) -> Iterator[tuple[list[dict], tuple]]:
    """The rows of each sampler that has any, and its `line`'s label, color and mark."""
    for sampler, look in LOOKS.items():
        if mine := [row for row in rows.values() if row["sampler"] == sampler]:
            yield mine, (sampler, *look)


def forest(ax, rows: dict[str, list], bounds: tuple, color: str = BLUE, red=()) -> None:
    """A row for each interval, the first at the top, and dotted lines at the bounds."""
    y = range(len(rows))[::-1]
    for at, (label, interval) in zip(y, rows.items()):
        mean, off = bars([interval])
        ax.errorbar(mean, at, xerr=off, fmt="o", color=RED if label in red else color, ms=4)
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
    fig, axes = panels([""] * 3, title, height=0.3 * len(rows) + 1.7, sharey=True)
    for ax, what, steps in zip(axes, ABOUT, ("1 step", "4 steps", "4 steps")):
        mine = {k: r[steps[0]][what] for k, r in rows.items()}
        first, *_ = next(iter(mine.values()))
        forest(ax, mine, (first,), red=red if what == "distance" else ())
        ax.set(xlabel=f"{ABOUT[what]}, {steps}")
    return fig
