"""What the figures share: panels, intervals as bars, and how each sampler looks."""

from matplotlib.figure import Figure

BLUE, LIGHT, ORANGE = "#1f5fa8", "#7fb2e5", "#e07b00"
GREEN, RED, GREY = "#2e8b57", "#c0392b", "0.55"
SAMPLERS = {
    "LCM-LoRA": (BLUE, "o-"),
    "LCM sampler, no LoRA": (GREY, "s-"),
    "DDIM": (ORANGE, "^-"),
    "DPM-Solver++": (GREEN, "v-"),
    "DDIM, no guidance": (ORANGE, "^:"),
    "DPM-Solver++, no guidance": (GREEN, "v:"),
}


def panels(
    count: int, title: str, width: float = 4.6, height: float = 3.9, **how
) -> tuple[Figure, list]:
    """A figure, and its panels side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(1, count, squeeze=False, **how)[0])
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure, axes


def bars(intervals: list) -> tuple[list, list]:
    """(means, how far their intervals reach below and above) as matplotlib takes them."""
    mean, low, high = zip(*intervals)
    return list(mean), [[m - a for m, a in zip(mean, low)], [b - m for m, b in zip(mean, high)]]


def line(ax, x: list, intervals: list, label: str, color: str, mark: str = "o-") -> None:
    """Means by x, with their intervals as bars."""
    mean, off = bars(intervals)
    ax.errorbar(x, mean, off, fmt=mark, color=color, label=label, capsize=2, markersize=4)
