"""Kill training again and again, resume, compare with a run nobody touched; not in CI, minutes.

    python tests/kill_and_resume.py    (--kills 20 --seed 0 --objective lcm)

Each run of train.py is a process of its own on a small random model. Half of the kills (SIGKILL)
come at a random moment, half while a file is being written. Then one Ctrl-C and one full disk (a
limit on the size of files). After each it goes on with --resume. At the end result and state must
equal the untouched run's bit for bit, optimizer included.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tiny import ROOT, write_art, write_model

from minilcm.files.safetensors_file import read_tensors
from minilcm.run.state import latest_state, read_run

STEPS = 80


def start(
    folder: Path, out: Path, objective: str, *more: str, limit: int | None = None
) -> subprocess.Popen:
    argv = ["--objective", objective, *"--rank 4 --batch 2 --looks 1 --device cpu".split(), *more]
    argv += ["--steps", str(STEPS), "--save-every", "1", "--model", folder / "model.safetensors"]
    argv += ["--data", folder / "art", "--out", out]

    def small_disk() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    # one thread: so small a model is slower on two
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, folder / "train.py", *map(str, argv)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=small_disk,
    )


def step_of(out: Path) -> int:
    return read_run(latest_state(out))["step"] if list(out.glob("state_*.safetensors")) else 0


def wait_for_save(
    out: Path, process: subprocess.Popen, while_writing: bool, rng: random.Random
) -> None:
    """Some steps and a random moment more; or until the next file is half written."""
    first, some = step_of(out), rng.randint(1, 3)
    while process.poll() is None and step_of(out) < first + some:
        time.sleep(0.01)
    if not while_writing:
        time.sleep(rng.uniform(0, 0.3))
    while while_writing and process.poll() is None and not list(out.glob(".*.part")):
        pass


def differences(whole: Path, killed: Path, name: str) -> list[str]:
    """What a file of the killed run has that the untouched run's has not: a line for each kind."""
    (a, about_a), (b, about_b) = (read_tensors(x / name) for x in (whole, killed))
    lines = [f"{key} is there once" for key in sorted(a.keys() ^ b.keys())[:3]]
    lines += [f"{x} in the header" for x in sorted(about_a.items() ^ about_b.items())]
    shared = sorted(a.keys() & b.keys())
    if other := [key for key in shared if not torch.equal(a[key], b[key])]:
        far = {key: (a[key] - b[key]).abs().max().item() for key in other}
        key = max(far, key=far.get)
        size = f"{far[key]:.2g} of {a[key].abs().max().item():.2g}"
        lines += [f"{len(other)} of {len(shared)} tensors differ, most {key}, by {size}"]
    return [f"{name}: {line}" for line in lines]


def main(kills: int, seed: int, objective: str, folder: Path) -> None:
    rng, out = random.Random(seed), folder / "killed"
    # a copy, so that all runs are of one program, whatever is edited or committed meanwhile
    shutil.copy(ROOT / "train.py", folder)
    shutil.copytree(ROOT / "minilcm", folder / "minilcm")
    write_model(folder / "model.safetensors")
    (folder / "art").mkdir()
    write_art(folder / "art/noto.tar", "noto")
    assert start(folder, folder / "whole", objective).wait() == 0
    resume: tuple[str, ...] = ()
    writing = 0
    for i in range(kills):
        process = start(folder, out, objective, *resume)
        wait_for_save(out, process, i % 2 == 1, rng)
        writing += bool(list(out.glob(".*.part")))
        process.kill()
        assert process.wait() == -signal.SIGKILL, (
            "the run ended before it was killed; give fewer --kills"
        )
        resume = ("--resume",)
        print(f"kill {i + 1}: last state of step {step_of(out)}", flush=True)

    process = start(folder, out, objective, *resume)
    wait_for_save(out, process, False, rng)
    process.send_signal(signal.SIGINT)
    line = process.communicate()[1].splitlines()[-1]
    print(f"Ctrl-C: exit {process.returncode}, {line!r}")
    assert process.returncode == 1 and line.startswith("stopped after step")

    before = step_of(out)
    process = start(folder, out, objective, *resume, limit=latest_state(out).stat().st_size // 2)
    line = process.communicate()[1].splitlines()[-1]
    print(f"full disk: exit {process.returncode}, {line!r}")
    assert process.returncode == 1 and line.startswith("train.py: ") and step_of(out) == before

    assert start(folder, out, objective, *resume).wait() == 0
    names = "lora.safetensors", latest_state(out).name
    if found := [x for name in names for x in differences(folder / "whole", out, name)]:
        raise SystemExit("\n".join(["not the untouched run:", *found]))
    left = [p.name for p in out.glob(".*.part")]
    assert not left and len(list(out.glob("state_*"))) == 2, left
    print(f"{kills} kills, {writing} while a file was written: result and state equal bit for bit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objective", choices=["diffusion", "lcm"], default="lcm")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        main(args.kills, args.seed, args.objective, Path(name))
