"""A training run on one page: RUN/metrics.jsonl -> RUN/plot.png. Needs the extra `plot`."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..files.safetensors_file import atomic
from .diagnostics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

INDEX, BAND = "grid index n,  t = 20 n + 19", "timestep t, first of a band of 100"
RMS, NOISE = "RMS, latent units", "mean squared error of the noise"
NEIGHBOURS = "Self-consistency: f at neighbours\non the teacher's trajectory"
END = "Solving the ODE: f against the end\nof the teacher's trajectory"
SAVES = {  # key in a record: title and axes of a panel with one line per save
    "loss_by_index": ("Loss by grid index", INDEX, "distillation loss, latent units"),
    "loss_by_band": ("Loss by timestep", BAND, NOISE),
    "self_consistency": (NEIGHBOURS, INDEX, RMS),
    "to_end": (END, INDEX, RMS),
    "delta_norms": ("Size of the LoRA's change", "block of the UNet", "Frobenius norm ||dW||"),
}


def plot_run(run: Path) -> Path:
    """Write RUN/plot.png and return its path. Raises ValueError as the two it calls do."""
    figure, out = draw_run(read_metrics(run / "metrics.jsonl"), str(run)), run / "plot.png"
    with atomic(out) as part:
        figure.savefig(part, format="png", dpi=120)
    return out


def draw_run(records: list[dict], title: str) -> "Figure":
    """A panel for each quantity in the records. Raises ValueError without any, or matplotlib."""
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('plot needs matplotlib: pip install -e ".[plot]"') from None
    if not records:
        raise ValueError(f"{title}: no complete record in its metrics.jsonl yet")

    saved = [key for key in SAVES if any(key in record for record in records)]
    far = [record for record in records if "to_teacher" in record]
    panels = ["loss", *saved, *(["to_teacher"] if far else [])]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns + 0.8, 3.7 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = {panel: figure.add_subplot(rows, columns, i) for i, panel in enumerate(panels, 1)}
    colour = ScalarMappable(Normalize(0, max(1, records[-1]["step"])), "viridis_r")

    draw_loss(axes["loss"], records)
    if far:
        draw_distance(axes["to_teacher"], far)
    for key in saved:
        draw_saves(axes[key], key, records, colour)
    if saved:
        label = "optimizer step of a save"
        figure.colorbar(colour, ax=list(axes.values()), label=label, shrink=0.6)
    for ax in axes.values():
        ax.grid(alpha=0.3)
    return figure


def draw_loss(ax: "Axes", records: list[dict]) -> None:
    """The training loss by step, and at each save the loss on fixed latents."""
    trained = {r["step"]: r["loss"] for r in records if "loss" in r}
    ax.plot(list(trained), list(trained.values()), color="0.6", label="of the current batch")
    fixed = {r["step"]: r["fixed_loss"] for r in records if "fixed_loss" in r}
    ax.plot(list(fixed), list(fixed.values()), "ko-", markersize=4, label="of fixed batches")
    ax.set(title="Training loss", xlabel="optimizer step", ylabel="loss", yscale="log")
    ax.legend()


def draw_distance(ax: "Axes", records: list[dict]) -> None:
    """The student's distance to the teacher by step, a line per number of LCM steps."""
    for steps, mark in zip(records[0]["to_teacher"], "o^sDv"):
        distance = {r["step"]: r["to_teacher"][steps] for r in records}
        label = f"{steps} step{'s' * (steps > 1)}"
        ax.plot(*zip(*distance.items()), f"{mark}-", label=label)
    title = "Student against the teacher's\nguided 50 steps"
    ax.set(title=title, xlabel="optimizer step", ylabel=RMS, yscale="log")
    ax.legend()


def draw_saves(ax: "Axes", key: str, records: list[dict], colour: "ScalarMappable") -> None:
    """A line per save, its colour the step."""
    title, x, y = SAVES[key]
    for record in records:
        if key in record:
            ax.plot(*zip(*record[key].items()), ".-", color=colour.to_rgba(record["step"]))
    ax.set(title=title, xlabel=x, ylabel=y)
    if key == "delta_norms":
        ax.tick_params(axis="x", rotation=90, labelsize=7)
        ax.set_ylim(bottom=0)
    else:
        ax.set_yscale("log")
