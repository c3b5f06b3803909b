"""Two gloo processes of batch b are one of batch 2b: DDP for a LoRA, FSDP2 for all; a rank lost.

Called by torchrun this file is train.py in float32: bfloat16 rounds a batch of two otherwise than
two of one.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny import ROOT, write_art, write_model

import train
from minilcm.files.safetensors_file import read_tensors
from minilcm.run import diagnostics
from minilcm.run.diagnostics import from_seeds, guided_trajectory
from minilcm.run.state import latest_state, read_run

OBJECTIVES = {
    "DDP": ["--objective", "diffusion", "--rank", "4", "--accumulate", "2"],
    "DDP, lcm": ["--objective", "lcm", "--rank", "4"],
    "FSDP2": ["--objective", "diffusion", "--full", "--checkpointing"],
    "FSDP2, lcm": ["--objective", "lcm", "--full"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_model(folder / "model.safetensors")
    (folder / "art").mkdir()
    write_art(folder / "art/noto.tar", "noto")
    return folder


def flags(files: Path, out: Path, batch: int, steps: int, *more: str) -> list[str]:
    argv = ["--lr", "0.001", *more, "--batch", batch, "--steps", steps]
    argv += "--looks 1 --device cpu".split()
    argv += ["--model", files / "model.safetensors", "--data", files / "art", "--out", out]
    return [*map(str, argv)]


def start(*runs: list[str]) -> subprocess.Popen:
    """Two processes that do the runs one by one: most of a short one's time is importing torch."""
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *runner, __file__, json.dumps(runs)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out[-3000:]
    return out


def trained_here(runs: list[list[str]]) -> str:
    """The same runs, one after another, by this process; what they print."""
    handler, out = signal.getsignal(signal.SIGINT), io.StringIO()
    with pytest.MonkeyPatch.context() as change, contextlib.redirect_stdout(out):
        measure_little(change.setattr)
        for argv in runs:
            train.main(train.parse(argv))
    signal.signal(signal.SIGINT, handler)
    return out.getvalue()


def measure_little(change: Callable) -> None:
    """In float32. What a save measures costs more than the steps: one fixed batch for eight, two
    indices for ten, four steps for twenty, five for fifty.
    """
    change(train, "forward_dtype", lambda device: torch.float32)
    change(train, "islice", lambda batches, _: islice(batches, 1))
    change(diagnostics, "INDICES", (0, 49))
    change(diagnostics, "from_seeds", lambda *a: from_seeds(*a[:3], 4, a[4]))

    def five_steps(*args):
        return guided_trajectory(*args, steps=5).repeat_interleave(9, dim=0)[-51:]

    change(diagnostics, "guided_trajectory", five_steps)


LCM = "--objective", "lcm", "--rank", "4", "--save-every", "1"


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> tuple[Path, dict[int, str]]:
    """OUT/WORLD/OBJECTIVE, each a run of one step, and OUT/2/untouched; what was printed."""
    out, printed = tmp_path_factory.mktemp("out"), {}
    for world, batch in ((1, 4), (2, 2)):
        here = out / str(world)
        runs = [
            flags(files, here / name, batch, 1, *how, "--lr", "1e-5")
            for name, how in OBJECTIVES.items()
        ]
        runs += [flags(files, here / "untouched", 1, 6, *LCM)] if world == 2 else []
        printed[world] = finish(start(*runs)) if world == 2 else trained_here(runs)
    return out, printed


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_are_one_with_twice_the_batch(finished, objective):
    """The gradient of a step, clipped, is the same to 1e-6 of its largest value; so is the loss
    that is printed. For the consistency loss to 1e-3: it is nearly a sum of absolute values, whose
    gradient jumps within c = 1e-3 of zero.

    It is read off Adam's first moment, a tenth of it. Two ranks that saw the same rows, drew the
    same noise or summed gradients would be off by as much as the gradient. The weights say less:
    Adam makes a step of lr out of any sign.
    """
    out, printed = finished
    a, b = (read_tensors(latest_state(out / world / objective))[0] for world in "12")
    assert a.keys() == b.keys()
    moments = [key for key in a if key.endswith("exp_avg")]
    largest = max(a[key].abs().max().item() for key in moments)
    far = max((a[key] - b[key]).abs().max().item() for key in moments)
    assert moments and far <= (1e-3 if "lcm" in objective else 1e-6) * largest, far / largest
    names = [key for key in a if not key.startswith("optimizer")]
    assert all((a[key] - b[key]).abs().max() <= 3e-5 for key in names)  # lr is 1e-5
    said = [
        [line.split()[3] for line in text.splitlines() if line.startswith("step 1: ")]
        for text in printed.values()
    ]
    i = list(OBJECTIVES).index(objective)
    assert said[0][i] == said[1][i]


def test_a_lost_rank_stops_the_run_which_goes_on(files, tmp_path, finished):
    """SIGKILL to one of two: the other does not hang, torchrun says which rank it was, and its
    state is whole: resumed, the run ends with the bits of one that lost nobody.
    """
    run = flags(files, tmp_path / "run", 1, 6, *LCM)
    process = start(run)
    while process.poll() is None and not list((tmp_path / "run").glob("state_*")):
        time.sleep(0.1)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in out
    assert 1 <= read_run(latest_state(tmp_path / "run"))["step"] < 6
    finish(start([*run, "--resume"]))
    states = latest_state(tmp_path / "run"), latest_state(finished[0] / "2/untouched")
    a, b = (read_tensors(state)[0] for state in states)
    assert read_run(states[0])["step"] == 6
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


if __name__ == "__main__":
    measure_little(setattr)
    # the processes of the first run are those of the others
    torch.distributed.init_process_group = cache(torch.distributed.init_process_group)
    try:
        for argv in json.loads(sys.argv[1]):
            train.main(train.parse(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
