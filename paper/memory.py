"""1 memory: what does LoRA save against full LCM distillation?

Claim (section 3.1 and Table 1): distilling only LoRA matrices takes so much less memory that SDXL
and SSD-1B can be distilled with limited means; 67.5 M, 105 M and 197 M parameters are trained.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from matplotlib.figure import Figure

from minilcm.files.identify import Config, sd15_config, sdxl_config, ssd1b_config
from minilcm.model.text import TextEncoder
from minilcm.model.unet import UNet
from minilcm.model.vae import VAE
from minilcm.objective import Objective
from minilcm.run.plan import Step, peak_bytes, step_bytes

from .charts import BLUE, GREEN, LIGHT, ORANGE, RED, panels
from .setup import CACHE, HERE, Budget
from .styles import ART

FAMILIES = {  # base: its config, pixels across, trained parameters by the report's Table 1
    "SD-V1.5": (sd15_config(), 512, 67.5e6),
    "SSD-1B": (ssd1b_config(), 1024, 105e6),
    "SDXL": (sdxl_config(), 1024, 197e6),
}


def measure(budget: Budget) -> dict:
    ways = {"LCM-LoRA": ["--rank", "64", "--w", "3"], "full LCM": ["--full", "--w", "2:14"]}
    measured = {}
    for way, flags in ways.items():
        out = CACHE / f"memory-{way.replace(' ', '-')}"
        for old in out.glob("*"):
            old.unlink()
        argv = ["--objective", "lcm", *flags, "--out", str(out), "--device", "cpu", "--steps", "2"]
        art, batch = (HERE / "art/blob.tar", "2") if budget.quick else (ART, "32")
        argv += ["--data", str(art), "--looks", "1", "--batch", batch]
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            measured[way] = pool.submit(peak_of, argv).result()
    planned = {}
    for family, (config, side, report) in list(FAMILIES.items())[: 1 if budget.quick else 3]:
        lora, full = row = [planned_step(config, side, rank) for rank in (64, None)]
        planned[family] = dict(zip(ways, row)) | {"report": report, "pixels": side}
        planned[family]["off"] = lora["trained"] / report - 1
        planned[family]["share"] = lora["total"] / full["total"]
        planned[family]["times"] = full["total"] / lora["total"]
    share = measured["LCM-LoRA"] / measured["full LCM"]
    with torch.device("meta"):  # parameters of each part, from shapes alone
        made = {
            f: (UNet(c.unet), TextEncoder(c.text), VAE(c.vae)) for f, (c, *_) in FAMILIES.items()
        }
    counts = {
        f: [sum(x.numel() for x in part.parameters()) for part in parts]
        for f, parts in made.items()
    }
    parameters = {
        family: dict(zip(("UNet", "text", "VAE"), count)) for family, count in counts.items()
    }
    return {
        "measured": measured,
        "measured share": share,
        "planned": planned,
        "parameters": parameters,
    }


def peak_of(flags: list[str]) -> float:
    """GB that train.py holds at its peak, above the imports; in a process of its own."""
    import train as script

    before = peak_bytes("cpu")
    script.main(script.parse(flags))
    return (peak_bytes("cpu") - before) / 1e9


def planned_step(config: Config, side: int, rank: int | None) -> dict:
    """GB of a training step, batch 1, gradient checkpointing, by part; and trained parameters."""
    w_range = (2.0, 14.0) if rank is None else (7.5, 7.5)
    objective = Objective("lcm", rank, w_range=w_range, checkpointing=True)
    parts, count = step_bytes(objective, config, Step(1, side, "cuda", torch.bfloat16))
    parts = {part: size / 1e9 for part, size in parts.items() if part != "pictures to look at"}
    return {"parts": parts, "total": sum(parts.values()), "trained": count}


def verdict(n: dict) -> str:
    """Held if, on every full-size base, an LCM-LoRA takes half of full distillation's memory or
    less, and trains the report's number of parameters to 1 %.
    """
    held = all(p["share"] <= 0.5 and abs(p["off"]) <= 0.01 for p in n["planned"].values())
    return "held" if held else "did not hold"


def figure(n: dict) -> Figure:
    title = "Memory of one distillation step, batch 1: LCM-LoRA of rank 64 against full LCM"
    fig, (a,) = panels(1, title, width=9)
    a.set_title(
        "a frozen UNet in bfloat16, all that is trained or averaged in float32", fontsize=10
    )
    steps = {}  # label of the bar: its step
    for family, row in n["planned"].items():
        for way in ("LCM-LoRA", "full LCM"):
            steps[f"{family}\n{way}\n{row['pixels']} px"] = row[way]
    bottom = [0.0] * len(steps)
    parts = dict.fromkeys(part for step in steps.values() for part in step["parts"])
    for part, color in zip(parts, (BLUE, LIGHT, ORANGE, "#f2b705", GREEN, "#999999", RED)):
        sizes = [step["parts"].get(part, 0.0) for step in steps.values()]
        if any(sizes):
            a.bar(list(steps), sizes, bottom=bottom, label=part, color=color)
            bottom = [x + size for x, size in zip(bottom, sizes)]
    for i, step in enumerate(steps.values()):
        a.text(i, bottom[i], f"{step['total']:.1f} GB", ha="center", va="bottom")
    a.set(ylabel="GB")
    a.margins(y=0.1)
    a.legend()
    return fig
