"""memory: What does LoRA save against full LCM distillation?

Claim (section 3.1 and Table 1): distilling only LoRA matrices takes so much less memory that SDXL
and SSD-1B can be distilled with limited means; 67.5 M, 105 M and 197 M parameters are trained. It
is sometimes taken to mean orders of magnitude.
"""

import torch
from matplotlib.figure import Figure

from minilcm.files.identify import Config, sd15_config, sdxl_config, ssd1b_config
from minilcm.objective import Objective
from minilcm.run.plan import Step, step_bytes

from .charts import BLUE, GREEN, LIGHT, ORANGE, RED, panels
from .setup import Budget

FAMILIES = {  # base: its config, pixels across, trained parameters by the report's Table 1
    "SD-V1.5": (sd15_config(), 512, 67.5e6),
    "SSD-1B": (ssd1b_config(), 1024, 105e6),
    "SDXL": (sdxl_config(), 1024, 197e6),
}
OFFICIAL = 12  # batch a GPU, in the official recipes of SD1.5 and SDXL


def measure(budget: Budget) -> dict:
    planned = {}
    for family, (config, side, report) in list(FAMILIES.items())[: 1 if budget.quick else 3]:
        for batch in (1, OFFICIAL):
            lora, full = (planned_step(config, side, rank, batch) for rank in (64, None))
            row = {"LCM-LoRA": lora, "full LCM": full, "pixels": side}
            row |= {"off": lora["trained"] / report - 1, "times": full["total"] / lora["total"]}
            # as most official scripts: all UNets in 4 bytes, and an LCM-LoRA's teacher beside it
            base = lora["parts"]["UNet"] / 2
            row["official"] = (full["total"] + 2 * base) / (lora["total"] + 6 * base)
            planned[f"{family}, batch {batch}"] = row
    return {"planned": planned}


def planned_step(config: Config, side: int, rank: int | None, batch: int) -> dict:
    """GB of a training step, gradient checkpointing, by part; and trained parameters."""
    w_range = (2.0, 14.0) if rank is None else (7.5, 7.5)
    objective = Objective("lcm", rank, w_range=w_range, checkpointing=True)
    parts, count = step_bytes(objective, config, Step(batch, side, "cuda", torch.bfloat16))
    parts = {part: size / 1e9 for part, size in parts.items() if part != "pictures to look at"}
    return {"parts": parts, "total": sum(parts.values()), "trained": count}


def verdict(n: dict) -> dict:
    """All three follow from shapes, without chance. Significantly less: full distillation takes
    twice an LCM-LoRA's memory or more, on every full-size base, at batch 1 and at the official 12.
    Orders of magnitude: ten times or more, likewise. Either is refuted by one base and batch of
    which it is not true. The report's counts are shown if every base's is met to 1 %.
    """
    times = [row["times"] for row in n["planned"].values()]
    off = max(abs(row["off"]) for row in n["planned"].values())
    said = f"{min(times):.1f} to {max(times):.1f} times"
    word = {True: "shown", False: "refuted"}
    return {
        "full distillation takes twice as much, or more": [word[min(times) >= 2], said],
        "full distillation takes orders of magnitude more": [word[min(times) >= 10], said],
        "Table 1's counts of trained parameters": [word[off <= 0.01], f"{off:.1%} off"],
    }


def figure(n: dict) -> Figure:
    times = [row["times"] for row in n["planned"].values()]
    title = f"Full LCM distillation takes {min(times):.1f} to {max(times):.1f} times the memory"
    fig, (a,) = panels([""], f"{title} of an LCM-LoRA's, rank 64", width=10, height=4.4)
    steps = {}  # label of the bar: its step
    for label, row in n["planned"].items():
        for way in ("LCM-LoRA", "full LCM"):
            steps[f"{way}\n{label.replace(', ', chr(10))}"] = row[way]
    bottom = [0.0] * len(steps)
    parts = dict.fromkeys(part for step in steps.values() for part in step["parts"])
    for part, color in zip(parts, (BLUE, LIGHT, ORANGE, "#f2b705", GREEN, "#999999", RED)):
        sizes = [step["parts"].get(part, 0.0) for step in steps.values()]
        if any(sizes):
            a.bar(list(steps), sizes, bottom=bottom, label=part, color=color)
            bottom = [x + size for x, size in zip(bottom, sizes)]
    for i, step in enumerate(steps.values()):
        a.text(i, bottom[i], f"{step['total']:.1f} GB", ha="center", va="bottom", fontsize=8)
    a.set(ylabel="GB of a training step")
    a.tick_params(axis="x", labelsize=7)
    a.legend(fontsize=8)
    return fig
