"""What is measured at every save of a training run, on fixed latents, captions and noise.

No noise is drawn anew, so the numbers of two saves differ only because the weights do. As in
lcm.py, student, teacher and target are callables (z_t, t, cond, w) -> eps_hat, or v. The teacher
does not learn: its trajectory is computed once, before the loop.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.pictures import draw_sheet, save_png
from ..generate import generate, noise
from ..lcm import GRID, Network, draw, f_theta, lcd_loss, train_grid
from ..lora import Tau
from ..merge import delta_norms
from ..model.unet import Cond
from ..model.vae import VAE
from ..objective import Objective
from ..schedule import Schedule, T, diffusion_loss
from ..solver import EpsFn, guided_eps, sample_ddim, trailing_grid
from .processes import mean_over_processes

INDICES = tuple(round(i * (GRID - 1) / 9) for i in range(10))  # 0, 5, 11, ..., 49 of 50
STEPS = (1, 2, 4)  # numbers of LCM steps that the student is sampled with


class Probe(NamedTuple):
    """What every save is measured on."""

    z0: Tensor  # (b, 4, h, w) of a batch, for the loss
    cond: Cond  # of its captions
    null_cond: Cond
    prompts_cond: Cond  # of the eight prompts that are drawn, from seeds 0-7
    prompts_null: Cond
    w: float  # guidance
    # lcm: the teacher's trajectory (51, 8, 4, h, w); diffusion: z0 (8, 4, h, w) at first
    before: Tensor


def make_probe(
    objective: Objective,
    teacher: Network,
    z0: Tensor,
    cond: Cond,
    null_cond: Cond,
    prompts: tuple[Cond, Cond],
    side: int,
    schedule: Schedule,
    guidance: float,
) -> Probe:
    """Before the first step; what is drawn are latents (8, 4, side, side), for diffusion guided."""
    z_T, _ = noise(range(8), (4, side, side), z0.device)
    w = sum(objective.w_range) / 2 if objective.kind == "lcm" else guidance - 1
    if objective.kind == "lcm":
        before = guided_trajectory(teacher, z_T, *prompts, schedule, w)
    else:
        before = from_seeds(guided(teacher, *prompts, w), z_T, "ddim", 20, schedule)
    return Probe(z0, cond, null_cond, *prompts, w, before)


@torch.no_grad()
def measure(
    objective: Objective, networks: list[Network], probe: Probe, schedule: Schedule, tau: Tau
) -> tuple[dict, dict[str, Tensor]]:
    """(measurements of student, teacher and target, {label: z0 (8, 4, h, w)} for the sheet)."""
    student, teacher, _ = networks
    norms = {"delta_norms": delta_norms(tau)} if tau else {}
    if objective.kind != "lcm":
        eps_fn = guided(student, probe.prompts_cond, probe.prompts_null, probe.w)
        now = from_seeds(eps_fn, probe.before, "ddim", 20, schedule)
        record = {"loss_by_band": loss_by_band(student, probe.z0, probe.cond, schedule)}
        return record | norms, {"before, 20 DDIM": probe.before, "now, 20 DDIM": now}
    latents = probe.z0, probe.cond, probe.null_cond, schedule, probe.w
    along = probe.before, probe.prompts_cond, schedule, probe.w
    neighbours, to_end = consistency_along_trajectory(student, *along)
    record = {
        "loss_by_index": loss_by_index(*networks, *latents, objective.k, objective.psi_steps),
        "self_consistency": neighbours,
        "to_end": to_end,
    }
    columns, record["to_teacher"] = few_step_columns(student, teacher, *along)
    return record | norms, columns


@torch.no_grad()
def loss_on(batches: list[Batch], batch_loss: Callable[[Batch], Tensor]) -> float:
    """The mean loss on batches, whose generators are restored: every save sees the same noise."""
    states = [batch.generator.get_state() for batch in batches]
    loss = sum(batch_loss(batch).item() for batch in batches) / len(batches)
    for batch, state in zip(batches, states):
        batch.generator.set_state(state)
    return mean_over_processes(loss)[0]


def bind(network: Network, cond: Cond, w: float) -> EpsFn:
    """eps_fn(z_t, t) -> eps_hat of a network, with the same cond and w at every call."""

    def eps_fn(z_t: Tensor, t: int | Tensor) -> Tensor:
        t = torch.as_tensor(t, device=z_t.device).expand(len(z_t))  # (b,)
        return network(z_t, t, cond, torch.full((len(z_t),), float(w), device=z_t.device))

    return eps_fn


def in_parts(network: Network, most: int) -> Network:
    """The network on at most `most` images at a time: no more memory than a training step."""

    def call(z_t: Tensor, t: Tensor, cond: Cond, w: Tensor) -> Tensor:
        parts = [slice(i, i + most) for i in range(0, len(z_t), most)]
        return torch.cat([network(z_t[p], t[p], cond.rows(p), w[p]) for p in parts])

    return call


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


# ---- the loss


@torch.no_grad()
def loss_by_index(
    student: Network,
    teacher: Network,
    target: Network,
    z0: Tensor,
    cond: Cond,
    null_cond: Cond,
    schedule: Schedule,
    w: float,
    k: int = T // GRID,
    psi_steps: int = 1,
) -> dict[int, float]:
    """{n: distillation loss at grid index n} for ten n, on z0 (b, c, h, w), with the same noise."""
    _, ws, eps = draw(z0.shape, torch.Generator().manual_seed(0), (w, w))
    given = student, teacher, target, z0, cond, null_cond, schedule
    at = {n: torch.full((len(z0),), n) for n in INDICES}
    return {n: lcd_loss(*given, at_n, ws, eps, k, psi_steps).item() for n, at_n in at.items()}


@torch.no_grad()
def loss_by_band(student: Network, z0: Tensor, cond: Cond, schedule: Schedule) -> dict[int, float]:
    """{first t of a band of 100: mean squared error of eps_hat}: 1 if the network says 0."""
    b, losses, eps_fn = len(z0), {}, bind(student, cond, 0.0)
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0)).to(z0.device)
    for start in range(0, T, 100):  # image i at (i + 1/2) / b of every band
        t = start + (torch.arange(b, device=z0.device) * 2 + 1) * 100 // (2 * b)  # (b,)
        losses[start] = diffusion_loss(eps_fn, z0, t, eps, schedule, snr_gamma=None).item()
    return losses


# ---- is the student a solver of the teacher's ODE?


@torch.no_grad()
def guided_trajectory(
    network: Network,
    z_T: Tensor,
    cond: Cond,
    null_cond: Cond,
    schedule: Schedule,
    w: float,
    steps: int = GRID,
) -> Tensor:
    """All points of guided DDIM, (steps + 1, b, c, h, w): from z_T at t = 999 to z0 at t = 0.

    With 50 steps they are at the timesteps of the training grid: [49 - n] is at t = 20 n + 19.
    """
    eps_fn, points = guided(network, cond, null_cond, w), []

    def record(z_t: Tensor, t: int) -> Tensor:
        points.append(z_t)
        return eps_fn(z_t, t)

    z0 = sample_ddim(record, z_T, schedule, trailing_grid(steps))
    return torch.stack([*points, z0])


def guided(network: Network, cond: Cond, null_cond: Cond, w: float) -> EpsFn:
    return guided_eps(lambda z_t, t, cond: bind(network, cond, w)(z_t, t), cond, null_cond, w)


def from_seeds(eps_fn: EpsFn, like: Tensor, sampler: str, steps: int, schedule: Schedule) -> Tensor:
    """z0 (b, c, h, w), of the shape and device of `like`, from seeds 0 to b - 1."""
    seeds, shape = range(len(like)), like.shape[1:]
    return generate(eps_fn, seeds, shape, sampler, steps, device=like.device, schedule=schedule)


@torch.no_grad()
def consistency_along_trajectory(
    student: Network, trajectory: Tensor, cond: Cond, schedule: Schedule, w: float
) -> tuple[dict[int, float], dict[int, float]]:
    """How far f is from constant along the teacher's trajectory (51, b, c, h, w), by index n.

    {n: RMS of f at index n minus f at its neighbour}, 20 timesteps below; {n: RMS of f at index n
    minus z0, the trajectory's end}. Both are 0 if the student solves the teacher's ODE as 50 steps
    of DDIM do. 2303.01469 def. 1.
    """
    eps_fn, neighbours, end = bind(student, cond, w), {}, {}

    def f(z_t: Tensor, t: int) -> Tensor:
        return f_theta(z_t, eps_fn(z_t, t), t, schedule)

    for n in INDICES:
        t_start = int(train_grid()[n])
        f_start = f(trajectory[GRID - 1 - n], t_start)  # (b, c, h, w)
        f_end = f(trajectory[GRID - n], max(t_start - T // GRID, 0))
        neighbours[n], end[n] = rms(f_start - f_end), rms(f_start - trajectory[-1])
    return neighbours, end


def few_steps(
    network: Network, like: Tensor, cond: Cond, schedule: Schedule, w: float, steps: int
) -> Tensor:
    """z0 (b, c, h, w), shape and device of `like`, by 1 to 50 LCM steps from seeds 0 to b - 1."""
    return from_seeds(bind(network, cond, w), like, "lcm", steps, schedule)


def few_step_columns(
    student: Network, teacher: Network, trajectory: Tensor, cond: Cond, schedule: Schedule, w: float
) -> tuple[dict[str, Tensor], dict[int, float]]:
    """({label: z0 (b, c, h, w)} for `pictures.draw_sheet`, all from the same seeds; {steps: RMS of
    the student's z0 minus the trajectory's end}). Only one step can reach 0: more draw fresh noise.
    """
    drawn = {n: few_steps(student, trajectory[0], cond, schedule, w, n) for n in STEPS}
    columns = {"base, 4 steps": few_steps(teacher, trajectory[0], cond, schedule, w, 4)}
    columns |= {f"student, {n} step{'s' * (n > 1)}": z0 for n, z0 in drawn.items()}
    columns["teacher, 50 DDIM"] = trajectory[-1]
    return columns, {n: rms(z0 - trajectory[-1]) for n, z0 in drawn.items()}


# ---- the sheet and the log


def write_sheet(
    folder: Path, step: int, columns: dict[str, Tensor], prompts: list[str], vae: VAE
) -> None:
    """step_NNNNNN.png: a row per prompt, a column per label of `columns`."""
    sheet = draw_sheet(columns, prompts, lambda z0: vae.decode_tiled(z0, tile=64))
    save_png(folder / f"step_{step:06d}.png", sheet, f"step {step}")


def append_metrics(path: str | Path, record: dict) -> None:
    """Append a line of JSON, on the disk when this returns; a kill meanwhile may truncate it."""
    with open(path, "a+b") as f:
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)  # a truncated line would merge with this one
        f.write(json.dumps(record).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def read_metrics(path: str | Path) -> list[dict]:
    """The records by step, without a truncated last line; of a step written twice, the last."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    records = {}

    def numbered(d: dict) -> dict:  # JSON's keys are strings: indices and steps become int again
        return {int(k) if k.isdigit() else k: v for k, v in d.items()}

    complete = Path(path).read_bytes().split(b"\n")[:-1]  # without a truncated last line
    for i, line in enumerate(complete, 1):
        try:
            record = json.loads(line, object_hook=numbered)
            records[record["step"]] = record
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {i} is not a record of a step") from None
    return [records[step] for step in sorted(records)]
