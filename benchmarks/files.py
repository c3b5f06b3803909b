"""Time and memory of loading a checkpoint and merging an LCM-LoRA into it, beside diffusers.

    python -m benchmarks.files    (`reference` extra; 20 GB of memory, 40 GB of disk under TMPDIR)

SD1.5 in float32 and SDXL in float16, random weights, warm cache. Each job is a process of its own,
the two programs take turns. load: the file to a model that could run, in the file's dtype. merge:
from the two files to the merged model on disk, here `python -m minilcm merge`, there
from_single_file, load_lora_weights, fuse_lora, save_pretrained; both wait until the disk has it;
with --out in memory the disk's speed, the same for both, is left out. Seconds leave out Python's
imports; the memory is the process's highest resident set, pages of the mapped file and imports
included. Prints medians and ratios.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

DTYPES = {"sd15": torch.float32, "sdxl": torch.float16}


def job(who: str, what: str, family: str, folder: Path, out: Path) -> None:
    """Run in a process of its own; prints {"seconds", "peak"}."""
    model, lora, dtype = folder / "model.safetensors", folder / "lora.safetensors", DTYPES[family]
    if who == "minilcm":
        from minilcm.__main__ import main, parse
        from minilcm.files.checkpoint import load_model

        start = time.perf_counter()
        if what == "load":
            load_model(model, dtype)
        else:
            merged = out / "merged.safetensors"
            main(parse(["merge", str(model), str(lora), "-o", str(merged), "--force"]))
    else:
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        cls = StableDiffusionPipeline if family == "sd15" else StableDiffusionXLPipeline
        start = time.perf_counter()
        pipe = cls.from_single_file(model, config=str(folder / "config"), torch_dtype=dtype)
        if what == "merge":
            pipe.load_lora_weights(str(lora))
            pipe.fuse_lora()
            pipe.unload_lora_weights()
            pipe.save_pretrained(out / "merged")
            os.sync()
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()  # ru_maxrss would have the parent's too
    peak = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
    print(json.dumps({"seconds": seconds, "peak": peak}))


def run(*argv) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.files", *map(str, argv)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    done = subprocess.run(command, check=True, text=True, **pipes)
    return json.loads(done.stdout.splitlines()[-1])


def make(family: str, folder: Path) -> None:
    """Run in a process of its own, which gives its memory back."""
    from benchmarks.files_for_others import write_configs
    from benchmarks.full_size import make_files
    from minilcm.files.safetensors_file import read_tensors, write_tensors

    model, _ = make_files(family, folder)
    if DTYPES[family] == torch.float32:
        tensors = read_tensors(model)[0].items()
        wide = {key: x.float() if x.is_floating_point() else x for key, x in tensors}
        write_tensors(model, wide, {})
    write_configs(folder / "config", family)
    os.sync()


def bench(family: str, folder: Path, out: Path, rounds: int) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(make, family, folder).result()
    model = folder / "model.safetensors"
    size = model.stat().st_size
    print(f"{family} {str(DTYPES[family])[6:]}, {size:,} bytes, median of {rounds}")
    for what in ("load", "merge"):
        results: dict[str, list] = {"minilcm": [], "diffusers": []}
        for i in range(rounds + 1):
            for who in results:
                subprocess.run(["cat", model], stdout=subprocess.DEVNULL)  # warm
                results[who] += [run(who, what, family, folder, out)] * (i > 0)
                for old in out.glob("merged*"):
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
        ours, theirs = (
            {key: median(x[key] for x in results[who]) for key in ("seconds", "peak")}
            for who in results
        )
        for who, x in (("minilcm", ours), ("diffusers", theirs)):
            print(f"  {what:6} {who:10} {x['seconds']:6.1f} s  {x['peak'] / size:5.2f} x the file")
        time = f"time {ours['seconds'] / theirs['seconds']:.2f} of diffusers', goal 0.5"
        memory = f"memory {ours['peak'] / size:.2f} of the file, goal 1.2"
        print(f"  {what:6} {time}; {memory}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 6:
        job(*sys.argv[1:4], Path(sys.argv[4]), Path(sys.argv[5]))
    else:
        raw = argparse.RawDescriptionHelpFormatter
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
        parser.add_argument("--rounds", type=int, default=3)
        parser.add_argument("--family", choices=[*DTYPES, "both"], default="both")
        where = "where merged models go: memory, e.g. /dev/shm, or TMPDIR (default)"
        parser.add_argument("--out", type=Path, help=where)
        args = parser.parse_args()
        for family in DTYPES if args.family == "both" else [args.family]:
            with tempfile.TemporaryDirectory() as name:
                bench(family, Path(name), args.out or Path(name), args.rounds)
