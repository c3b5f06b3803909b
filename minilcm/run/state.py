"""The state of a training run, and its files: all that it needs to continue as if never stopped."""

import json
import os
import re
import shlex
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from socket import gethostname
from typing import NamedTuple

import torch
from torch import Tensor

from ..files.checkpoint import Model, save_model
from ..files.lora_file import write_tau
from ..files.safetensors_file import check_name, read_header, read_tensors, sha256, write_tensors
from ..lcm import GRID, T_SCALE
from ..lora import get_tau
from ..model.unet import UNet
from ..objective import Networks, Objective
from .processes import share_of, whole


class Training(NamedTuple):
    """What is trained."""

    unet: UNet
    nets: Networks
    named: dict[str, Tensor]  # the trained parameters
    average: dict[str, Tensor]  # of them; empty without --average
    optimizer: torch.optim.Optimizer

    def saved(self) -> dict[str, Tensor]:
        """All tensors of a state, except the optimizer's."""
        saved = self.named | {f"average.{k}": v for k, v in self.average.items()}
        if self.nets.target_unet is not None:
            saved |= {f"target.{k}": v for k, v in self.nets.target_unet.named_parameters()}
        return saved

    def update_average(self, rate: float, step: int) -> None:
        """average <- mu average + (1 - mu) weights, mu growing to its rate.

        Of a LoRA A and B are averaged apart, so their product is not the average of the products.
        While the weights change slowly the difference is small, of second order in the change.
        """
        mu = min(rate, (step + 1) / (step + 10))
        weights = [x.detach() for x in self.named.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - mu)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange weights and average, if there is one; a second call undoes it."""
        for x, y in zip(self.named.values(), self.average.values()):
            kept = x.clone()
            x.copy_(y), y.copy_(kept)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside the block no other process trains into the folder; `.lock` there says which does."""
    ours = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            from fcntl import LOCK_EX, LOCK_NB, lockf

            lockf(file, LOCK_EX | LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read() or "another process"
            raise ValueError(f"{folder}: {owner} trains into it; give another --out") from None
        except (OSError, ImportError):
            pass  # a file system, or a Windows, without such locks
        file.truncate(0)
        print(f"process {os.getpid()} on {gethostname()}", end="", file=file, flush=True)
        try:
            yield
        finally:
            with suppress(OSError):  # Windows keeps a file that is open
                (folder / ".lock").unlink()
                if ours:
                    folder.rmdir()  # only if nothing was written into it


def start_folder(folder: Path, resume: bool) -> None:
    """Refuse to write over a run, and remove what a killed run left half written."""
    check_name(folder)
    if states_in(folder) and not resume:
        how = "continue it with --resume, or give another --out"
        raise ValueError(f"{folder} already holds a run; {how}")
    for part in folder.glob(".*.part"):
        if re.match(r"\.(lora|model|target|state_\d+|step_\d+)\.", part.name):
            part.unlink()


def states_in(folder: Path) -> list[Path]:
    """The states of a run, the oldest first: by number, as step 1,000,000 comes after 999,999."""
    named = {path: re.fullmatch(r"state_(\d+)", path.stem) for path in folder.glob("*.safetensors")}
    return sorted((path for path, x in named.items() if x), key=lambda path: int(named[path][1]))


# Not compared on --resume: they may change, or repeat another flag
NOT_OF_THE_RUN = ("resume", "out", "cache", "device", "compile", "save_every", "plan", "w_range")


def flags_of(args: Namespace, model_sha256: str, data: str, world: int) -> dict[str, str]:
    """What is compared when the run is resumed: the flags of train.py, files by what is in them."""
    flags = {k: str(v) for k, v in vars(args).items() if k not in NOT_OF_THE_RUN}
    flags |= {
        "model": f"{args.model.name}, sha256 {model_sha256[:10]}",
        "nproc_per_node": str(world),
    }
    flags |= {"init": f"sha256 {sha256(args.init)[:10]}"} if args.init else {}
    return flags | {"data": data}


def check_flags(now: dict[str, str], then: dict[str, str]) -> None:
    """Raises ValueError at the first flag that would make the resumed run another run."""
    for key, value in now.items():
        if (was := then.get(key)) != value:
            changed = f"--{key.replace('_', '-')} was {was}, is now {value}"
            how = "give the flags of that run, or go on from its result: a new --out and --init"
            raise ValueError(f"--resume: {changed}; {how}")


def state_tensors(
    named: dict[str, Tensor], optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, Tensor]:
    """What a run needs to continue, on the CPU: trained tensors, averages, moments.

    There is no generator to save: everything random in a step is drawn from (seed, step). All
    processes must call this, as each may have only a share; those that do not `keep` get {}.
    """
    moments = {}
    for i, state in optimizer.state_dict()["state"].items():
        moments |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    out = {}
    for key, value in (named | moments).items():
        value = whole(value).detach()
        if keep:
            out[key] = value.cpu().clone()
    return out


def save_state(path: str | Path, tensors: dict[str, Tensor], run: dict) -> None:
    """Write `state_tensors` and `run` (step, flags, positions) as safetensors, atomically."""
    write_tensors(path, tensors, {"minilcm.run": json.dumps(run)})


def latest_state(folder: str | Path) -> Path:
    """The newest complete state of a run. Raises ValueError if there is none."""
    for path in reversed(states_in(Path(folder))):
        try:
            read_run(path)
            return path
        except ValueError as error:
            print(f"{error}; continuing from the one before")
    raise ValueError(f"{folder}: no state of a run to continue from; start one without --resume")


def read_run(path: str | Path) -> dict:
    """{"step", "flags", "positions"} of a state. Raises ValueError if it is not complete."""
    _, metadata = read_header(path)
    if "minilcm.run" not in metadata:
        raise ValueError(f"{path}: not the state of a run")
    return json.loads(metadata["minilcm.run"])


@torch.no_grad()
def load_state(
    path: str | Path, named: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict:
    """Fill `named` and the optimizer from a state; -> its `run`. ValueError for other keys."""
    tensors, _ = read_tensors(path)
    moments = {k: tensors.pop(k) for k in list(tensors) if k.startswith("optimizer.")}
    if set(tensors) != set(named) or any(tensors[k].shape != named[k].shape for k in named):
        what = "state of another model or objective"
        raise ValueError(f"{path}: {what}; give another --out, or that run's flags")
    for key, value in named.items():
        value.copy_(share_of(tensors[key], value))
    saved, parameters = optimizer.state_dict(), optimizer.param_groups[0]["params"]
    saved["state"] = {}
    for key, value in moments.items():
        _, i, name = key.split(".")
        like = parameters[int(i)]
        value = share_of(value, like) if value.shape == like.shape else value
        # a copy: what safetensors reads is the file's own pages, and a later save deletes the file
        saved["state"].setdefault(int(i), {})[name] = value.clone()
    optimizer.load_state_dict(saved)
    return read_run(path)


def restore(path: Path, training: Training, positions: list[int], process: int) -> int:
    """Fill training and the positions of this process's workers from a state; returns its step."""
    run = load_state(path, training.saved(), training.optimizer)
    positions[:] = run["positions"][process]
    return run["step"]


def recipe_of_run(
    objective: Objective, step: int, seed: int, model: str, model_sha256: str
) -> dict[str, str]:
    """What the metadata of a LoRA tells about its training."""
    recipe = {"objective": objective.kind, "steps": str(step), "seed": str(seed)}
    recipe |= {"model": model, "model_sha256": model_sha256}
    if objective.kind == "lcm":
        recipe["w"] = ":".join(f"{w:g}" for w in dict.fromkeys(objective.w_range))
        recipe |= {"k": str(objective.k), "psi_steps": str(objective.psi_steps)}
        recipe |= {"K": str(GRID), "timestep_scaling": f"{T_SCALE:g}"}
    return recipe


def save_run(
    folder: Path, training: Training, base: Model, recipe: dict[str, str], run: dict, first: bool
) -> None:
    """The result and the state, of which two are kept; `run` has step, flags and positions.

    Every process must call this, and the `first` one writes. Of a full LCM the target is written
    too: the official script writes both, as `unet` and `unet_target`.
    """
    weights = {}
    for name, x in (training.average or training.named).items():
        x = whole(x)  # one at a time on the GPU; all only in the main memory of the first process
        weights |= {name: x.detach().cpu()} if first else {}
    tensors = state_tensors(training.saved(), training.optimizer, keep=first)
    if not first:
        return
    if tau := get_tau(training.unet):
        for path, (_, _, lora_alpha) in tau.items():
            up, down = (weights[f"{path}.lora_{x}.weight"] for x in ("up", "down"))
            tau[path] = up, down, lora_alpha
        write_tau(folder / "lora.safetensors", tau, recipe)
    else:
        config = replace(base.config, unet=training.unet.cfg)
        save_model(folder / "model.safetensors", weights, base.vae, base.text, config)
        if target := {k[7:]: x for k, x in tensors.items() if k.startswith("target.")}:
            save_model(folder / "target.safetensors", target, base.vae, base.text, config)
    save_state(folder / f"state_{run['step']:06d}.safetensors", tensors, run)
    for old in states_in(folder)[:-2]:
        old.unlink()


def how_to_draw(args: Namespace, prompt: str, shipped: bool) -> str:
    """Where the result and its sheet are, and how to draw; `shipped`: whether the base is. Raises
    ValueError if the result is gone.
    """
    result = args.out / ("model.safetensors" if args.full else "lora.safetensors")
    base = [] if shipped else ["--model", args.model]
    words = ["--model", result] if args.full else [*base, "--lora", result]
    if args.objective == "diffusion":  # few steps need an LCM-LoRA
        words += ["--lora", "lcm"] if shipped and not args.full else ["--sampler", "ddim"]
    line = shlex.join(["python", "sample.py", prompt, *map(str, words)])
    sheet = args.out / f"step_{args.steps:06d}.png"
    if not result.exists():
        *before, last = states_in(args.out)
        how = f"remove {last} and give --resume again" if before else "give another --out"
        raise ValueError(f"{result}: gone, though the run is finished; {how}")
    looks = f", {sheet} is its sheet" if sheet.exists() else ""
    return f"{result} is done{looks}; to draw with it:\n{line}"
