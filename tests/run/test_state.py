"""A run's folder: its states by number, and one process at a time."""

import os
import time
from argparse import Namespace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from minilcm.run.state import (
    how_to_draw,
    latest_state,
    load_state,
    locked,
    save_state,
    start_folder,
    state_tensors,
    states_in,
)


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
    assert folder.exists() and not list(folder.iterdir())  # it was there before
    with locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()  # nothing was written into it


def test_a_lock_that_cannot_be_removed(tmp_path, monkeypatch):
    """As on Windows, while it is open: the training that has ended is not an error."""

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(f"{path} is used by another process")

    with monkeypatch.context() as windows:
        windows.setattr(Path, "unlink", refuse)
        with locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_a_state_is_read_once(tmp_path):
    """What happens to its file afterwards, which the next saves delete, reaches no run."""
    path, weight = tmp_path / "state_000001.safetensors", torch.ones(4096, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    save_state(path, state_tensors({"weight": weight}, optimizer), {})
    load_state(path, {"weight": weight}, optimizer)
    moment = optimizer.state[weight]["exp_avg_sq"]
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(bytes(size))
    assert moment.count_nonzero() == 4096


def test_a_finished_run_whose_result_is_gone(tmp_path):
    """It is not called done, and what is not there is not named; the next line is the way on."""
    args = Namespace(out=tmp_path, full=False, objective="lcm", steps=2, model=Path("m"))
    (tmp_path / "state_000002.safetensors").touch()
    with pytest.raises(ValueError, match="lora.*: gone, though .*; give another --out"):
        how_to_draw(args, "pizza", True)
    (tmp_path / "state_000001.safetensors").touch()
    with pytest.raises(ValueError, match="remove .*state_000002.safetensors and give --resume ag"):
        how_to_draw(args, "pizza", True)
    (tmp_path / "lora.safetensors").touch()
    assert how_to_draw(args, "pizza", True).startswith(f"{tmp_path}/lora.safetensors is done; to")
    (tmp_path / "step_000002.png").touch()
    assert "is done, " in how_to_draw(args, "pizza", True)


def test_a_folder_that_no_result_could_be_written_to(tmp_path):
    """Before the work: the safetensors library takes no name that is not UTF-8."""
    with pytest.raises(ValueError, match="is not UTF-8; rename it"):
        start_folder(Path(os.fsdecode(bytes(tmp_path) + b"/b\xff")), resume=False)


def test_half_written_files_of_a_killed_run_are_removed(tmp_path):
    """Its own; what another program is writing here stays."""
    own = ["lora.safetensors", "model.safetensors", "state_1000000.safetensors", "step_000500.png"]
    for name in [*own, "merged.safetensors", "0000_rocket_seed0.png"]:
        (tmp_path / f".{name}.123.part").touch()
    start_folder(tmp_path, resume=False)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".0000_rocket_seed0.png.123.part", ".merged.safetensors.123.part"]
