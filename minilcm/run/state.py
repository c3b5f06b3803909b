"""The state of a training run: all that it needs to continue as if it had never stopped."""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..files.safetensors_file import read_header, read_tensors, write_tensors
from .processes import share_of, whole


def state_tensors(named: dict[str, Tensor], optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Tensor]:
    """What a run needs to continue, on the CPU: trained tensors (and averages), and the optimizer's moments.

    There is no generator to save: everything random in a step is drawn from (seed, step). If every process has only
    its share of the tensors, all of them must call this; those that do not `keep` get {}.
    """
    moments = {
        f"optimizer.{i}.{key}": value
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    out = {}
    for key, value in (named | moments).items():
        value = whole(value).detach()
        if keep:
            out[key] = value.cpu().clone()
    return out


def save_state(path: str | Path, tensors: dict[str, Tensor], run: dict) -> None:
    """Write `state_tensors` and `run` (step, flags) as safetensors with JSON in the header, atomically."""
    write_tensors(path, tensors, {"minilcm.run": json.dumps(run)})


def latest_state(folder: str | Path) -> Path:
    """The newest complete state of a run. Raises ValueError if there is none."""
    for path in sorted(Path(folder).glob("state_*.safetensors"), reverse=True):
        try:
            read_run(path)
            return path
        except ValueError as error:
            print(f"{error}; continuing from the one before")
    raise ValueError(f"{folder}: no state of a run to continue from; start one without --resume")


def read_run(path: str | Path) -> dict:
    """{"step", "flags", "positions"} of a state. Raises ValueError if the file is not a complete state."""
    _, metadata = read_header(path)
    if "minilcm.run" not in metadata:
        raise ValueError(f"{path}: not the state of a run")
    return json.loads(metadata["minilcm.run"])


@torch.no_grad()
def load_state(path: str | Path, named: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict:
    """Fill `named` and the optimizer in place from a state; returns its `run`. Raises ValueError on other keys."""
    tensors, _ = read_tensors(path)
    moments = {k: tensors.pop(k) for k in list(tensors) if k.startswith("optimizer.")}
    if set(tensors) != set(named) or any(tensors[k].shape != named[k].shape for k in named):
        raise ValueError(f"{path}: state of another model or objective; give another --out, or the flags of that run")
    for key, value in named.items():
        value.copy_(share_of(tensors[key], value))
    parameters = optimizer.param_groups[0]["params"]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        _, i, name = key.split(".")
        like = parameters[int(i)]
        state.setdefault(int(i), {})[name] = share_of(value, like) if value.shape == like.shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return read_run(path)
