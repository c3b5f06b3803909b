"""A training run on one page: the records of metrics.jsonl -> a figure. Needs matplotlib, the extra `plot`."""

INDEX = "grid index n,  t = 20 n + 19"
SAVES = {  # key in a record: title, axes of a panel with one line a save
    "loss_by_index": ("Loss by grid index", INDEX, "distillation loss, latent units"),
    "loss_by_band": ("Loss by timestep", "timestep t, first of a band of 100", "mean squared error of the noise"),
    "self_consistency": ("Self-consistency: f at neighbours\non the teacher's trajectory", INDEX, "RMS, latent units"),
    "to_end": ("Solving the ODE: f against the end\nof the teacher's trajectory", INDEX, "RMS, latent units"),
    "delta_norms": ("Size of the LoRA's change", "block of the UNet", "Frobenius norm ||dW||"),
}


def draw_run(records: list[dict], title: str):
    """A matplotlib Figure with a panel for each thing that the records, sorted by step, have measured.

    Raises ValueError if matplotlib is not installed, or there is no record.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('plot needs matplotlib: pip install -e ".[plot]"') from None
    if not records:
        raise ValueError(f"{title}: no whole record in its metrics.jsonl yet")

    saved = [key for key in SAVES if any(key in record for record in records)]
    far = [record for record in records if "to_teacher" in record]
    panels = ["loss", *saved, *(["to_teacher"] if far else [])]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns + 0.8, 3.7 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = {panel: figure.add_subplot(rows, columns, i) for i, panel in enumerate(panels, 1)}
    colour = ScalarMappable(Normalize(0, max(1, records[-1]["step"])), "viridis_r")

    # ---- by step
    ax = axes["loss"]
    trained = [record for record in records if "loss" in record]
    ax.plot([r["step"] for r in trained], [r["loss"] for r in trained], color="0.6", label="of the batch in hand")
    for key in ("loss_by_index", "loss_by_band"):
        means = {r["step"]: sum(r[key].values()) / len(r[key]) for r in records if key in r}
        if means:
            ax.plot(*zip(*means.items()), "o-", color="black", markersize=4, label="of fixed latents, mean over t")
    ax.set(title="Training loss", xlabel="optimizer step", ylabel="loss", yscale="log")
    ax.legend()
    if far:
        ax = axes["to_teacher"]
        for (steps, _), mark in zip(far[0]["to_teacher"].items(), "o^sDv"):
            distance = [record["to_teacher"][steps] for record in far]
            ax.plot([r["step"] for r in far], distance, f"{mark}-", label=f"{steps} step{'s' * (steps > 1)}")
        ax.set(title="Student against the teacher's\nguided 50 steps", xlabel="optimizer step", yscale="log")
        ax.set_ylabel("RMS, latent units")
        ax.legend()

    # ---- one line a save, its colour the step
    for key in saved:
        ax, (name, x, y) = axes[key], SAVES[key]
        for record in records:
            if key in record:
                ax.plot(*zip(*record[key].items()), ".-", color=colour.to_rgba(record["step"]))
        ax.set(title=name, xlabel=x, ylabel=y)
        if key == "delta_norms":
            ax.tick_params(axis="x", rotation=90, labelsize=7)
            ax.set_ylim(bottom=0)
        else:
            ax.set_yscale("log")
    if saved:
        figure.colorbar(colour, ax=list(axes.values()), label="optimizer step of a save", shrink=0.6)
    for ax in axes.values():
        ax.grid(alpha=0.3)
    return figure
