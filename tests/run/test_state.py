"""A run's folder: its states by number, and one process at a time."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from tiny import ROOT

from minilcm.run.state import latest_state, locked, save_state, start_folder, states_in


def test_states_are_in_the_order_of_their_numbers(tmp_path):
    """As text, 1000000 comes before 999999; a result or a backup beside them is no state."""
    for name in ("state_1000000", "state_000500", "state_999999", "lora", "state_000500 (copy)"):
        save_state(tmp_path / f"{name}.safetensors", {"x": torch.ones(1)}, {})
    steps = ["state_000500", "state_999999", "state_1000000"]
    assert [path.stem for path in states_in(tmp_path)] == steps
    assert latest_state(tmp_path).stem == "state_1000000"


HOLD = """
import sys, time
from pathlib import Path
from minilcm.run.state import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(100)
"""


def test_one_training_in_a_folder(tmp_path):
    """While another process trains into it, a folder is refused with its owner's name, and what it
    is writing stays; a killed owner leaves a lock that nobody heeds.
    """
    folder = tmp_path / "run"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as owner:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(
            ValueError, match=f"run: process {owner.pid} on .* trains into it; give"
        ):
            with locked(folder):
                pass
        owner.send_signal(signal.SIGKILL)
    assert (folder / ".lock").exists()
    with locked(folder):
        assert str(os.getpid()) in (folder / ".lock").read_text()
    assert not list(folder.iterdir())


def test_half_written_files_of_a_killed_run_are_removed(tmp_path):
    """Its own; what another program is writing here stays."""
    own = ["lora.safetensors", "model.safetensors", "state_1000000.safetensors", "step_000500.png"]
    for name in [*own, "merged.safetensors", "0000_rocket_seed0.png"]:
        (tmp_path / f".{name}.123.part").touch()
    start_folder(tmp_path, resume=False)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".0000_rocket_seed0.png.123.part", ".merged.safetensors.123.part"]
