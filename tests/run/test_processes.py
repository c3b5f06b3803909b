"""Two gloo processes of batch b are one of batch 2b: DDP for a LoRA, FSDP2 for all; a rank lost.

Called by torchrun this file is train.py in float32: bfloat16 rounds a batch of two otherwise than
two of one.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import ROOT, write_art, write_model

from minilcm.files.safetensors_file import read_tensors
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


def start(
    files: Path, out: Path, world: int, batch: int, steps: int, *flags: str
) -> subprocess.Popen:
    argv = ["--lr", "0.001", *flags, "--batch", batch, "--steps", steps]
    argv += "--looks 1 --device cpu".split()
    argv += ["--model", files / "model.safetensors", "--data", files / "art", "--out", out]
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", world]
    command = [sys.executable, *(runner if world > 1 else []), __file__, *argv]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*map(str, command)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out[-3000:]
    return out


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_are_one_with_twice_the_batch(files, tmp_path, objective):
    """The gradient of a step, clipped, is the same to 1e-6 of its largest value; so is the loss
    that is printed. For the consistency loss to 1e-3: it is nearly a sum of absolute values, whose
    gradient jumps within c = 1e-3 of zero.

    It is read off Adam's first moment, a tenth of it. Two ranks that saw the same rows, drew the
    same noise or summed gradients would be off by as much as the gradient. The weights say less:
    Adam makes a step of lr out of any sign.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*OBJECTIVES[objective], "--lr", "1e-5"]
    printed = [finish(start(files, one, 1, 4, 1, *flags))]
    printed += [finish(start(files, two, 2, 2, 1, *flags))]
    a, b = (read_tensors(latest_state(out))[0] for out in (one, two))
    assert a.keys() == b.keys()
    moments = [key for key in a if key.endswith("exp_avg")]
    largest = max(a[key].abs().max().item() for key in moments)
    far = max((a[key] - b[key]).abs().max().item() for key in moments)
    assert moments and far <= (1e-3 if "lcm" in objective else 1e-6) * largest, far / largest
    names = [key for key in a if not key.startswith("optimizer")]
    assert all((a[key] - b[key]).abs().max() <= 3e-5 for key in names)  # lr is 1e-5
    losses = [
        next(line for line in out.splitlines() if line.startswith("step 1: ")) for out in printed
    ]
    assert losses[0].split()[3] == losses[1].split()[3]


def test_a_lost_rank_stops_the_run_which_goes_on(files, tmp_path):
    """SIGKILL to one of two: the other does not hang, torchrun says which rank it was, and its
    state is whole: resumed, the run ends with the bits of one that lost nobody.
    """
    job = files, tmp_path / "run", 2, 1, 6, "--objective", "lcm", "--rank", "4", "--save-every", "1"
    process = start(*job)
    while process.poll() is None and not list((tmp_path / "run").glob("state_*")):
        time.sleep(0.1)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in out
    assert 1 <= read_run(latest_state(tmp_path / "run"))["step"] < 6
    finish(start(*job, "--resume"))
    finish(start(files, tmp_path / "untouched", *job[2:]))
    a, b = (read_tensors(latest_state(tmp_path / out))[0] for out in ("run", "untouched"))
    assert read_run(latest_state(tmp_path / "run"))["step"] == 6
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


if __name__ == "__main__":
    import train

    train.forward_dtype = lambda device: torch.float32
    try:
        train.main(train.parse(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
