"""The plan against the memory that training really takes, on this processor; not in CI.

    python -m benchmarks.plan_peak emoji     some minutes
    python -m benchmarks.plan_peak sd15      half an hour; writes a random SD1.5 (2 GB) under TMPDIR

Each run is a process of its own: two steps of train.py on eight pictures, twice. `process` is the
highest resident set of the first run, all in, against the plan's total and what it says Python
takes beside it. `run` is by how much the second run rises above what the first one left, which is
Python, its libraries and the kernels that oneDNN compiles for each shape, against the plan's total
alone. Both as the C library is, and with tensors given back when they are freed
(MALLOC_MMAP_THRESHOLD_=65536): glibc raises that threshold by itself up to 32 MB and keeps what is
smaller in a heap with gaps, of a small model's step a third. What is drawn and measured for the
sheets, for SD1.5 an hour here and no more memory than a step, is left out. Goal: within 10 %.
"""

import contextlib
import ctypes
import gc
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "emoji": [
        ["--objective", "lcm", "--rank", "32", "--batch", "32"],
        ["--objective", "lcm", "--rank", "32", "--batch", "32", "--checkpointing"],
        ["--objective", "diffusion", "--full", "--batch", "64"],
        ["--objective", "lcm", "--full", "--batch", "32"],
    ],
    "sd15": [
        "--objective lcm --rank 64 --batch 1 --size 512".split(),
        "--objective lcm --rank 64 --batch 2 --size 256 --no-checkpointing".split(),
    ],
}
ALLOCATORS = {"as it is": {}, "no gaps": {"MALLOC_MMAP_THRESHOLD_": "65536"}}


def resident(which: str) -> float:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{which}:\s*(\d+) kB", status)[1]) / 1e9


def job(argv: list[str]) -> None:
    """Train twice; print the GB after the first run and how far the second rises above its rest."""
    import train
    from minilcm.run import diagnostics

    diagnostics.guided_trajectory = lambda network, z_T, *_: torch.zeros(51, *z_T.shape)
    diagnostics.from_seeds = lambda eps_fn, like, *_: torch.zeros_like(like)
    diagnostics.consistency_along_trajectory = lambda *_: ({}, {})
    for name in ("loss_by_index", "loss_by_band"):
        setattr(diagnostics, name, lambda *_: {})
    diagnostics.few_step_columns = lambda *args: ({"a sheet": args[2][-1]}, {})
    # one fixed batch instead of eight
    train.islice = lambda batches, _: itertools.islice(batches, 1)
    train.main(train.parse(argv))
    process = resident("VmHWM")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # the high-water mark starts at what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    shutil.rmtree(argv[argv.index("--out") + 1])
    train.main(train.parse(argv))
    print(process, resident("VmHWM") - before)


def planned(argv: list[str]) -> float:
    import train

    with contextlib.redirect_stdout(io.StringIO()) as out:
        train.main(train.parse([*argv, "--device", "cpu", "--plan"]))
    return float(out.getvalue().splitlines()[-1].split()[1])


def main(name: str, folder: Path) -> None:
    from PIL import Image

    from minilcm.run.plan import RUNTIME

    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(8):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, (600, 600, 3), generator=generator).byte()
        Image.fromarray(pixels.numpy()).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"picture {i}")
    model = ROOT / "weights/emoji/model.safetensors"
    if name == "sd15":
        from benchmarks.full_size import make_files

        model, _ = make_files("sd15", folder)
    print(f"{'flags':72} {'plan':>8} {'allocator':>9} {'process':>17} {'run':>17}")
    for i, flags in enumerate(RUNS[name]):
        argv = [*flags, "--model", str(model)]
        run = ["--data", str(pictures), "--out", str(folder / f"run{i}")]
        run += "--steps 2 --looks 1".split()
        plan = planned(argv)
        for allocator, environment in ALLOCATORS.items():
            command = [sys.executable, "-m", "benchmarks.plan_peak", "--job", *argv, *run]
            how = dict(stdout=subprocess.PIPE, text=True, env=os.environ | environment)
            job = subprocess.run(command, check=True, **how)
            shutil.rmtree(folder / f"run{i}")
            process, rise = map(float, job.stdout.splitlines()[-1].split())
            line = f"{' '.join(flags):72} {plan:5.2f} GB {allocator:>9}"
            for measured, expected in ((process, plan + RUNTIME["cpu"]), (rise, plan)):
                line += f" {measured:5.2f} GB {expected / measured - 1:+8.1%}"
            print(line, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        job([*sys.argv[2:], "--device", "cpu"])
    elif sys.argv[1:] in (["emoji"], ["sd15"]):
        with tempfile.TemporaryDirectory() as name:
            main(sys.argv[1], Path(name))
    else:
        sys.exit(__doc__)
