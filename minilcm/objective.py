"""Student, teacher and target of a loss, made out of one UNet.

Algorithm 1 of 2310.04378 asks for a student, a teacher and a target. For an LCM-LoRA (2311.05556)
they are one UNet with its LoRA on, off, and on without gradient; for a full LCM they are three. The
loss is the same for both.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .lcm import GRID, Network, draw, guidance_embedding, lcd_loss
from .lora import TARGETS, add_lora, lora_layers, lora_off, target_paths
from .model.precision import add_checkpointing, autocast, quantize
from .model.unet import Cond, UNet
from .schedule import Schedule, T, diffusion_loss, make_schedule

W_DIM = 256  # width of a full LCM's guidance embedding


class Objective(NamedTuple):
    """A loss, and the weights that are trained to lower it."""

    kind: str  # "diffusion": eps_hat. "lcm": the consistency function
    rank: int | None  # of the LoRA; None: all weights of the UNet
    lora_alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    w_range: tuple[float, float] = (7.5, 7.5)  # lcm: w distilled in, guidance - 1
    k: int = T // GRID  # lcm: skipping interval
    psi_steps: int = 1  # lcm: DDIM steps of the teacher in it
    checkpointing: bool = False
    narrow: bool = False  # adapted layers keep frozen weights in float16, widened where used
    quantized: bool = False  # the same in int8


class Networks(NamedTuple):
    """Student, teacher and target, (z_t, t, cond, w) -> eps_hat or v, and the modules behind them.
    Only a full LCM's read w.
    """

    student: Network
    teacher: Network
    target: Network
    net: nn.Module  # what the student runs: the UNet, as `wrap` returned it
    schedule: Schedule  # on the UNet's device
    target_unet: UNet | None = None  # of a full LCM: the student's average


# prepares a UNet for many processes; by default there is one
Wrap = Callable[[nn.Module], nn.Module]


def one_process(unet: nn.Module) -> nn.Module:
    return unet


def run(
    net: nn.Module, dtype: torch.dtype, z_t: Tensor, t: Tensor, cond: Cond, *w_emb: Tensor
) -> Tensor:
    """The network in mixed precision; everything around it is float32."""
    with autocast(z_t.device, dtype):
        return net(z_t, t, cond, *w_emb)


def without_w(net: nn.Module, dtype: torch.dtype) -> Network:
    return lambda z_t, t, cond, w=None: run(net, dtype, z_t, t, cond)


def with_w(net: nn.Module, dtype: torch.dtype) -> Network:
    return lambda z_t, t, cond, w: run(net, dtype, z_t, t, cond, guidance_embedding(w, W_DIM))


def make_networks(
    objective: Objective, unet: UNet, dtype: torch.dtype, seed: int = 0, wrap: Wrap = one_process
) -> Networks:
    """Prepare the UNet for training, in place, and say what student, teacher and target are.

    `dtype` is that of the forward pass; `wrap` gets each UNet, of a LoRA the student's alone, and
    returns what to run in its place. Raises ValueError as `lora.check_rank` does.
    """
    if objective.rank is not None:
        return lora_networks(objective, unet, dtype, seed, wrap)
    if objective.kind == "lcm":
        return full_lcm_networks(objective, unet, dtype, wrap)
    unet.requires_grad_(True)
    if objective.checkpointing:
        add_checkpointing(unet)
    net = wrap(unet)
    student = without_w(net, dtype)
    # the diffusion loss asks the student only
    return Networks(student, student, student, net, schedule_of(unet))


def device_of(unet: UNet) -> torch.device:
    return unet.out[2].weight.device


def schedule_of(unet: UNet) -> Schedule:
    """The one that the UNet was trained with, on its device."""
    return make_schedule(unet.cfg.v, unet.cfg.zero_snr).to(device_of(unet))


def lora_networks(
    objective: Objective, unet: UNet, dtype: torch.dtype, seed: int, wrap: Wrap
) -> Networks:
    """One UNet: LoRA on, off, on (tour/07). Frozen weights have the forward pass's dtype; those
    under the LoRA are float16 if `narrow`, int8 if `quantized`.
    """
    adapted = set(target_paths(unet, objective.targets))
    for path, layer in unet.named_modules():
        narrow = objective.narrow and path in adapted
        for x in layer.parameters(recurse=False):
            x.data = x.data.to(torch.float16 if narrow else dtype)
    generator = torch.Generator().manual_seed(seed)
    add_lora(unet, objective.rank, objective.lora_alpha, objective.targets, generator)
    if objective.quantized:
        for layer in lora_layers(unet).values():
            quantize(layer)
    if objective.checkpointing:
        add_checkpointing(unet)
    net = wrap(unet)

    # teacher and target do not run `net`: DDP expects one forward pass per backward pass
    student, target = without_w(net, dtype), without_w(unet, dtype)

    def teacher(z_t: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        with lora_off(unet):
            return target(z_t, t, cond)

    return Networks(student, teacher, target, net, schedule_of(unet))


def frozen_copy(unet: UNet, dtype: torch.dtype) -> UNet:
    with torch.device("meta"):
        copy = UNet(unet.cfg).requires_grad_(False)
    copy.load_state_dict(
        {key: x.to(dtype, copy=True) for key, x in unet.state_dict().items()}, assign=True
    )
    return copy


def full_lcm_networks(objective: Objective, unet: UNet, dtype: torch.dtype, wrap: Wrap) -> Networks:
    """Three UNets: a student with an input for w, a frozen teacher, and an average of the student
    as target.
    """
    device = device_of(unet)
    teacher_unet = frozen_copy(unet, dtype)
    with torch.device(device):
        unet.time_embedding = nn.ModuleDict(
            {"cond_proj": nn.Linear(W_DIM, unet.cfg.channels[0], bias=False)}
        )
    # the student begins as its teacher, whatever w is
    nn.init.zeros_(unet.time_embedding["cond_proj"].weight)
    unet.cfg = replace(unet.cfg, w_dim=W_DIM)
    target_unet = frozen_copy(unet, torch.float32)
    unet.requires_grad_(True)
    if objective.checkpointing:
        add_checkpointing(unet)
    net = wrap(unet)
    teacher, target = without_w(wrap(teacher_unet), dtype), with_w(wrap(target_unet), dtype)
    return Networks(with_w(net, dtype), teacher, target, net, schedule_of(unet), target_unet)


def loss_of(
    objective: Objective,
    nets: Networks,
    z0: Tensor,
    cond: Cond,
    null_cond: Cond,
    generator: torch.Generator,
    process: int = 0,
    world: int = 1,
) -> Tensor:
    """The objective on clean latents z0 (b, 4, h, w) -> scalar.

    Of `world` processes, every one draws the whole global batch's randomness (`generator` is the
    same on all of them) and keeps its own rows, so the result does not depend on how many processes
    there are.
    """
    b = len(z0)
    rows, shape = slice(process * b, (process + 1) * b), (world * b, *z0.shape[1:])
    if objective.kind == "lcm":
        n, w, eps = (x[rows] for x in draw(shape, generator, objective.w_range))
        skip = dict(k=objective.k, psi_steps=objective.psi_steps)
        given = *nets[:3], z0, cond, null_cond, nets.schedule, n, w, eps
        # checkpointing means that memory is short
        return lcd_loss(*given, **skip, one_batch=not objective.checkpointing)
    t = torch.randint(0, T, shape[:1], generator=generator)[rows].to(z0.device)
    eps = torch.randn(shape, generator=generator)[rows].to(z0.device)
    return diffusion_loss(lambda z_t, t: nets.student(z_t, t, cond), z0, t, eps, nets.schedule)


def learning_rate(
    peak: float, step: int, steps: int, warmup: float | None = None, floor: float = 0.0
) -> float:
    """At step 0 ... steps - 1: a linear warm-up, times a cosine from 1 to `floor`.

    The warm-up takes a tenth of the steps, 100 at most, unless `warmup`, 1 or more, says how many;
    `floor` is a share of the peak.
    """
    warmup = min(100, steps / 10) if warmup is None else warmup
    rising = min(1, (step + 1) / warmup)
    return peak * rising * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))
