"""Seconds and memory of drawing and training on a GPU, beside diffusers and PEFT; not in CI.

    python -m benchmarks.gpu --out gpu.json         four or five minutes on an H100
    python -m benchmarks.gpu --tiny --device cpu    every line on a processor: no number counts

Random weights and conditions, SD1.5 at 512 x 512 pixels, SDXL and SSD-1B at 1024 x 1024. Sections
of the table:

    machine     a large matrix product and a copy: rates of the card, to place the other numbers
    draw        four LCM steps without guidance, then the VAE, a picture at a time: seconds a
                picture. UNet in float16, the VAE in float16 for SD1.5 and in float32 for the
                others, as SDXL's own overflows in float16
    train       one LCM-LoRA step of rank 64 as train.py takes it, forward in bfloat16, with
                gradient checkpointing, clipping and AdamW; the peak of allocated memory beside
                what `train.py --plan` says
    emoji       draw by the small model: 64 channels in the UNet, 16 x 16 latents, a VAE of factor 8
    decode      the VAE alone, in its number formats and memory layouts
    compile     draw with torch.compile, which works for a minute at the first call

"channels last": what belongs to one pixel lies together in memory, as the card's convolutions want
it. Seconds are medians of five runs (of three slow ones) after one or two that do not count, GB the
peak during them, weights included.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.gpu_cases import (
    OBJECTIVE,
    Bench,
    Result,
    config_of,
    copy,
    decode,
    draw,
    matrix_product,
    train,
)
from minilcm.run.plan import Step, step_bytes

COLUMNS = ("section", "model", "by", "batch", "seconds", "GB", "remark")
WAYS = ("ours", "ours, channels last", "diffusers")
FORMATS = [x + y for x in ("float32", "float16", "bfloat16") for y in ("", " channels last")]
SECTIONS = {  # section: [(function, model, by, batch)], what says most first
    "machine": [(matrix_product, "", "torch", 1), (copy, "", "torch", 1)],
    "draw SD1.5": [(draw, "SD1.5", by, b) for b in (1, 8) for by in WAYS],
    "train SD1.5": [(train, "SD1.5", *x) for x in (("ours", 1), ("ours", 4), ("diffusers", 4))],
    "draw SDXL": [(draw, "SDXL", by, b) for b in (1, 8) for by in WAYS],
    "train SDXL": [(train, "SDXL", "ours", b) for b in (1, 4)],
    "emoji": [(draw, "emoji", "ours", b) for b in (1, 8, 64)],
    "train SSD-1B": [(train, "SSD-1B", "ours", b) for b in (1, 4)],
    "decode": [(decode, model, by, 1) for model in ("SD1.5", "SDXL") for by in FORMATS],
    "compile": [(draw, "SD1.5", "compiled", 1)],
}


def run_case(bench: Bench, function: Callable, model: str, by: str, batch: int) -> Result:
    """What `function` says; where it cannot, the remark says why."""
    missing = [name for name in ("diffusers", "peft") if not find_spec(name)]
    if by == "diffusers" and missing:
        return None, None, f"skipped: no {' and no '.join(missing)} here"
    try:
        return function(bench, model, by, batch)
    except torch.OutOfMemoryError:
        return None, None, "out of memory"
    except Exception as error:  # the other cases are worth their time all the same
        return None, None, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def plan_beside(pool: Executor, bench: Bench, cases: list[tuple]) -> None:
    """Begin what training's cases compare themselves with: fake tensors are slow."""
    for function, model, by, batch in cases:
        if function is train and by == "ours":
            config = config_of(model, bench.tiny)
            step = Step(batch, config.size, bench.device, bench.forward)
            bench.plans[model, batch] = pool.submit(step_bytes, OBJECTIVE, config, step)


def parse() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add, best = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    device = f"where to run (default here: {best})"
    add("--device", choices=["cpu", "cuda"], default=best, help=device)
    budget = "begin no section later than this (default 170)"
    add("--budget", type=float, default=170, metavar="SECONDS", help=budget)
    only = f"some of: {', '.join(SECTIONS)}"
    add("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help=only)
    out = "write the rows there too, after each of them"
    add("--out", type=Path, metavar="FILE.json", help=out)
    tiny = "narrow networks and small pictures, to try the program, not to measure"
    add("--tiny", action="store_true", help=tiny)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    start, rows, on_card = time.perf_counter(), [], args.device == "cuda"
    # ---- where it runs
    about = {"card": torch.cuda.get_device_name() if on_card else "a processor"}
    about |= {"torch": torch.__version__, "CUDA": torch.version.cuda, "tiny": args.tiny}
    if find_spec("diffusers"):
        import diffusers  # takes seconds, which belong to no case

        about["diffusers"] = diffusers.__version__
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)

    # ---- the table
    chosen = {name: SECTIONS[name] for name in SECTIONS if not args.only or name in args.only}
    half, forward = (torch.float16, torch.bfloat16) if on_card else (torch.float32, torch.float32)
    bench = Bench(args.device, half, forward, args.tiny, {})
    with ProcessPoolExecutor(6, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        plan_beside(pool, bench, [case for cases in chosen.values() for case in cases])
        for section, cases in chosen.items():
            now = time.perf_counter() - start
            late = None, None, f"skipped: {now:.0f} s have gone by"
            for case in cases:
                result = late if now > args.budget else run_case(bench, *case)
                gc.collect()  # the case's networks
                if on_card:
                    torch.cuda.empty_cache()
                rows.append(dict(zip(COLUMNS, (section, *case[1:], *result))))
                cells = [f"{x:.4g}" if isinstance(x, float) else x for x in rows[-1].values()]
                print(f"| {' | '.join('' if x is None else str(x) for x in cells)} |", flush=True)
                if args.out:
                    args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
        pool.shutdown(cancel_futures=True)
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    sys.exit(any(row["remark"].startswith("failed") for row in rows))


if __name__ == "__main__":
    main(parse())
