"""Seeing a training run: what is measured at every save, on fixed latents, captions and noise.

No noise is drawn anew, so the numbers of two saves differ by the weights only. As in lcm.py, student, teacher, target
are callables (z_t, t, cond, w) -> eps_hat. The teacher does not learn: its trajectory is walked once, before the loop.
"""

import json
import os
import re
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ..lcm import K, Network, draw, f_theta, lcd_loss, sample_lcm, train_grid
from ..lora import Tau
from ..model.unet import Cond
from ..schedule import Schedule, T, diffusion_loss
from ..solver import EpsFn, guided_eps, sample_ddim

INDICES = tuple(round(i * (K - 1) / 9) for i in range(10))  # 0, 5, 11, ..., 49: ten of the 50 grid indices
STEPS = (1, 2, 4)  # of the student


def fixed_noise(shape: tuple[int, ...], device="cpu") -> tuple[Tensor, list[torch.Generator]]:
    """z_T (b, c, h, w) and the generators that drew it, image i by seed i, as `sample.py --seed 0` does."""
    generators = [torch.Generator().manual_seed(i) for i in range(shape[0])]
    z_T = torch.stack([torch.randn(shape[1:], generator=g) for g in generators])  # (b, c, h, w)
    return z_T.to(device), generators


def bind(network: Network, cond: Cond, w: float) -> EpsFn:
    """eps_fn(z_t, t) -> eps_hat of a network, the same cond and w at every call."""

    def eps_fn(z_t: Tensor, t: int | Tensor) -> Tensor:
        t = torch.as_tensor(t, device=z_t.device).expand(len(z_t))  # (b,)
        return network(z_t, t, cond, torch.full((len(z_t),), float(w), device=z_t.device))

    return eps_fn


def in_parts(network: Network, most: int) -> Network:
    """The network on at most `most` images at a time: looking takes no more memory than a step of training."""

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
    k: int = T // K,
) -> dict[int, float]:
    """{n: distillation loss at grid index n} for ten n, on clean latents z0 (b, c, h, w), the same noise at each."""

    _, ws, eps = draw(z0.shape, torch.Generator().manual_seed(0), (w, w))

    def loss_at(n: int) -> float:
        at_n = torch.full((len(z0),), n)
        return lcd_loss(student, teacher, target, z0, cond, null_cond, schedule, at_n, ws, eps, k).item()

    return {n: loss_at(n) for n in INDICES}


@torch.no_grad()
def loss_by_band(student: Network, z0: Tensor, cond: Cond, schedule: Schedule) -> dict[int, float]:
    """{first t of a band of 100: mean squared error of eps_hat there}, not weighted: 1 is knowing nothing.

    z0 (b, c, h, w): image i is at the same place (i + 1/2) / b of every band, with the same noise.
    """
    b, losses = len(z0), {}
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0)).to(z0.device)
    for start in range(0, T, 100):
        t = start + (torch.arange(b) * 2 + 1) * 100 // (2 * b)  # (b,)
        losses[start] = diffusion_loss(bind(student, cond, 0.0), z0, t.to(z0.device), eps, schedule, gamma=None).item()
    return losses


# ---- is the student a solver of the teacher's ODE?


@torch.no_grad()
def guided_trajectory(
    network: Network, z_T: Tensor, cond: Cond, null_cond: Cond, schedule: Schedule, w: float, steps: int = K
) -> Tensor:
    """All points of guided DDIM, (steps + 1, b, c, h, w): from z_T at t = 999 to z0 at t = 0.

    With 50 steps these are the points of the training grid: [49 - n] is at t = 20 n + 19.
    """
    eps_fn = guided_eps(lambda z_t, t, cond: bind(network, cond, w)(z_t, t), cond, null_cond, w)
    points = []

    def record(z_t: Tensor, t: int) -> Tensor:
        points.append(z_t)
        return eps_fn(z_t, t)

    z0 = sample_ddim(record, z_T, schedule, steps)
    return torch.stack([*points, z0])


@torch.no_grad()
def consistency_along_trajectory(
    student: Network, trajectory: Tensor, cond: Cond, schedule: Schedule, w: float
) -> tuple[dict[int, float], dict[int, float]]:
    """How far f is from constant along the teacher's 50-step trajectory (51, b, c, h, w), by grid index n.

    {n: RMS of f(z_{t_{n+k}}) - f(z_{t_n})}, neighbours, k = 20; {n: RMS of f(z_{t_{n+k}}) - z0}, z0 the trajectory's
    end. Both vanish if the student solves the teacher's ODE as 50 steps of DDIM do. 2303.01469 definition 1.
    """
    eps_fn, neighbours, end = bind(student, cond, w), {}, {}

    def f(z_t: Tensor, t: int) -> Tensor:
        return f_theta(z_t, eps_fn(z_t, t), t, schedule)

    for n in INDICES:
        t_start = int(train_grid()[n])
        f_start = f(trajectory[K - 1 - n], t_start)  # (b, c, h, w)
        f_end = f(trajectory[K - n], max(t_start - T // K, 0))
        neighbours[n], end[n] = rms(f_start - f_end), rms(f_start - trajectory[-1])
    return neighbours, end


def few_steps(network: Network, z_T: Tensor, cond: Cond, schedule: Schedule, w: float, steps: int) -> Tensor:
    """z0 (b, c, h, w) of 1 to 50 LCM steps; the noise between steps is the same for every network and save."""
    _, generators = fixed_noise(z_T.shape)  # each has drawn its z_T: the noise that follows is another
    return sample_lcm(bind(network, cond, w), z_T, schedule, steps, generators)


def distance_to_teacher(
    student: Network, trajectory: Tensor, cond: Cond, schedule: Schedule, w: float
) -> dict[int, float]:
    """{steps: RMS of the student's z0 in 1, 2, 4 steps minus the trajectory's end}, both from z_T = trajectory[0].

    One step alone can reach 0: the noise between steps leads more of them to another picture of the same prompt.
    """
    z0 = {steps: few_steps(student, trajectory[0], cond, schedule, w, steps) for steps in STEPS}
    return {steps: rms(z0[steps] - trajectory[-1]) for steps in STEPS}


def lcm_columns(
    student: Network, teacher: Network, trajectory: Tensor, cond: Cond, schedule: Schedule, w: float
) -> dict[str, Tensor]:
    """{label: z0 (b, c, h, w)} for `pictures.draw_sheet`, all columns from the trajectory's z_T."""
    columns = {"base, 4 steps": few_steps(teacher, trajectory[0], cond, schedule, w, 4)}
    for steps, label in zip(STEPS, ("student, 1 step", "student, 2 steps", "student, 4 steps")):
        columns[label] = few_steps(student, trajectory[0], cond, schedule, w, steps)
    return columns | {"teacher, 50 DDIM": trajectory[-1]}


# ---- the LoRA


@torch.no_grad()
def delta_norms(tau: Tau) -> dict[str, float]:
    """{block: ||dW||_F over all its modules}, input_blocks.i first, then middle_block, output_blocks.i and the text
    encoders; no dW is formed.
    """
    squares = {}
    for path, (up, down, lora_alpha) in tau.items():
        block = re.match(r"(?:in|out)put_blocks\.\d+|te\d\.encoder\.layers\.\d+|\w+", path)[0]
        B = rearrange(up.double(), "out r ... -> out (r ...)")  # (out, r)
        A = rearrange(down.double(), "r ... -> r (...)")  # (r, in k k)
        # ||s B A||_F^2 = s^2 tr((B^T B)(A A^T)), s = lora_alpha / r; both factors are symmetric
        squares[block] = squares.get(block, 0.0) + (lora_alpha / len(A)) ** 2 * ((B.T @ B) * (A @ A.T)).sum()
    in_order = sorted(squares, key=lambda block: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", block)])
    return {block: squares[block].clamp(min=0).sqrt().item() for block in in_order}


# ---- the log


def append_metrics(path: str | Path, record: dict) -> None:
    """One more line of JSON, on the disk when this returns. A kill meanwhile leaves at most a torn last line."""
    with open(path, "a+b") as f:
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)  # a torn line would swallow this one
        f.write(json.dumps(record).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def read_metrics(path: str | Path) -> list[dict]:
    """The records by step, as appended. A torn last line is ignored; of a step written twice the later counts.

    Raises ValueError if there is no such file or a whole line is no record.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    records = {}
    for i, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):  # what follows the last break is torn
        try:
            # JSON has names only: indices and numbers of steps become int again
            record = json.loads(line, object_hook=lambda d: {int(k) if k.isdigit() else k: v for k, v in d.items()})
            records[record["step"]] = record
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {i} is not a record of a step") from None
    return [records[step] for step in sorted(records)]
