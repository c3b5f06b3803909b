"""A run's folder: its states by number, and one process at a time."""

import os
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from minilcm.run.state import latest_state, locked, save_state, start_folder, states_in


def test_states_are_in_the_order_of_their_numbers(tmp_path):
    """As text, 1000000 comes before 999999; a result or a backup beside them is no state."""
    for name in ("state_1000000", "state_000500", "state_999999", "lora", "state_000500 (copy)"):
        save_state(tmp_path / f"{name}.safetensors", {"x": torch.ones(1)}, {})
    steps = ["state_000500", "state_999999", "state_1000000"]
    assert [path.stem for path in states_in(tmp_path)] == steps
    assert latest_state(tmp_path).stem == "state_1000000"


def hold(folder: Path, ready: Connection) -> None:
    with locked(folder):
        ready.send("locked")
        time.sleep(100)


def test_one_training_in_a_folder(tmp_path):
    """While another process trains into it, a folder is refused with its owner's name, and what it
    is writing stays; a killed owner leaves a lock that nobody heeds.
    """
    folder, fork = tmp_path / "run", get_context("fork")
    here, there = fork.Pipe()
    owner = fork.Process(target=hold, args=(folder, there))
    owner.start()
    assert here.recv() == "locked"
    with pytest.raises(ValueError, match=f"run: process {owner.pid} on .* trains into it; give"):
        with locked(folder):
            pass
    owner.kill()
    owner.join()
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
