"""What is learned, by which weights: the networks of a diffusion or a consistency loss, made out of one UNet.

Algorithm 1 of 2310.04378 asks for a student, a teacher and a target. For an LCM-LoRA (2311.05556) they are one UNet
with its LoRA on, off, and on without gradient; for a full LCM they are three. The loss cannot tell the two apart.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .lcm import K, Network, draw, guidance_embedding, lcd_loss
from .lora import TARGETS, add_lora, lora_off, target_paths
from .model.precision import add_checkpointing
from .model.unet import Cond, UNet
from .run.processes import shard
from .schedule import Schedule, T, diffusion_loss, make_schedule

W_DIM = 256  # sinusoids of a full LCM's guidance embedding


class Objective(NamedTuple):
    """A loss, and the weights that are to lower it."""

    kind: str  # "diffusion": eps_hat. "lcm": the consistency function
    rank: int | None  # of the LoRA; None: all weights of the UNet
    lora_alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    w_range: tuple[float, float] = (7.5, 7.5)  # lcm: guidance distilled in
    k: int = T // K  # lcm: skipping interval
    checkpointing: bool = False
    narrow: bool = False  # frozen weights of the adapted layers stay in float16, and are widened one by one in use


class Networks(NamedTuple):
    """(z_t, t, cond, w) -> eps_hat, three times; those with a LoRA take no notice of w."""

    student: Network
    teacher: Network
    target: Network
    net: nn.Module  # what the student runs: the UNet, over several ranks in DDP or FSDP2
    target_unet: UNet | None = None  # of a full LCM: the student's average


def run(net: nn.Module, half: torch.dtype, z_t: Tensor, t: Tensor, cond: Cond, *w_emb: Tensor) -> Tensor:
    """The network in mixed precision; around it all is float32."""
    with torch.autocast(z_t.device.type, dtype=half, enabled=half != torch.float32):
        return net(z_t, t, cond, *w_emb)


def make_networks(objective: Objective, unet: UNet, half: torch.dtype, seed: int = 0, world: int = 1) -> Networks:
    """Prepare the UNet for training, in place, and say what student, teacher and target are. `half`: of the forward.

    Over `world` ranks a LoRA is trained by DDP and all weights by FSDP2. Raises ValueError as `lora.check_rank` does.
    """
    if objective.rank is not None:
        return lora_networks(objective, unet, half, seed, world)
    if objective.kind == "lcm":
        return full_lcm_networks(objective, unet, half, world)
    unet.requires_grad_(True)
    if objective.checkpointing:
        add_checkpointing(unet)
    if world > 1:
        shard(unet, unet.out[2].weight.device.type)

    def student(z_t: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        return run(unet, half, z_t, t, cond)

    return Networks(student, student, student, unet)


def lora_networks(objective: Objective, unet: UNet, half: torch.dtype, seed: int, world: int) -> Networks:
    """One UNet: LoRA on, off, on. What is frozen takes no more bits than the forward pass looks at."""
    adapted = set(target_paths(unet, objective.targets))
    for path, layer in unet.named_modules():
        dtype = torch.float16 if objective.narrow and path in adapted else half
        for x in layer.parameters(recurse=False):
            x.data = x.data.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    add_lora(unet, objective.rank, objective.lora_alpha, objective.targets, generator)
    if objective.checkpointing:
        add_checkpointing(unet)
    net = DistributedDataParallel(unet) if world > 1 else unet

    def student(z_t: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        return run(net, half, z_t, t, cond)

    def teacher(z_t: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        with lora_off(unet):
            return run(unet, half, z_t, t, cond)

    def target(z_t: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        return run(unet, half, z_t, t, cond)  # not `net`: DDP counts forward passes

    return Networks(student, teacher, target, net)


def frozen_copy(unet: UNet, dtype: torch.dtype) -> UNet:
    with torch.device("meta"):
        copy = UNet(unet.cfg).requires_grad_(False)
    copy.load_state_dict({key: x.to(dtype, copy=True) for key, x in unet.state_dict().items()}, assign=True)
    return copy


def full_lcm_networks(objective: Objective, unet: UNet, half: torch.dtype, world: int) -> Networks:
    """Three UNets: a student with an input for w, a frozen teacher, and an average of the student as target."""
    teacher_unet = frozen_copy(unet, half)
    with torch.device(unet.out[2].weight.device):
        unet.time_embedding = nn.ModuleDict({"cond_proj": nn.Linear(W_DIM, unet.cfg.channels[0], bias=False)})
    nn.init.zeros_(unet.time_embedding["cond_proj"].weight)  # the student begins as the teacher, whatever w
    unet.cfg = replace(unet.cfg, w_dim=W_DIM)
    target_unet = frozen_copy(unet, torch.float32)
    unet.requires_grad_(True)
    if objective.checkpointing:
        add_checkpointing(unet)
    if world > 1:
        for each in (unet, teacher_unet, target_unet):
            shard(each, unet.out[2].weight.device.type)

    def student(z_t: Tensor, t: Tensor, cond: Cond, w: Tensor) -> Tensor:
        return run(unet, half, z_t, t, cond, guidance_embedding(w, W_DIM))

    def teacher(z_t: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        return run(teacher_unet, half, z_t, t, cond)

    def target(z_t: Tensor, t: Tensor, cond: Cond, w: Tensor) -> Tensor:
        return run(target_unet, half, z_t, t, cond, guidance_embedding(w, W_DIM))

    return Networks(student, teacher, target, unet, target_unet)


def loss_of(
    objective: Objective,
    nets: Networks,
    z0: Tensor,
    cond: Cond,
    null_cond: Cond,
    generator: torch.Generator,
    rank: int = 0,
    world: int = 1,
) -> Tensor:
    """The objective on clean latents z0 (b, 4, h, w) -> scalar.

    What is random is drawn for the batches of all ranks, by a generator that is the same on each; each takes its rows.
    """
    schedule, b = Schedule(*(table.to(z0.device) for table in make_schedule())), len(z0)
    rows, shape = slice(rank * b, (rank + 1) * b), (world * b, *z0.shape[1:])
    if objective.kind == "lcm":
        n, w, eps = (x[rows] for x in draw(shape, generator, objective.w_range))
        together = not objective.checkpointing  # where there is memory for it
        networks = nets.student, nets.teacher, nets.target
        return lcd_loss(*networks, z0, cond, null_cond, schedule, n, w, eps, objective.k, together)
    t = torch.randint(0, T, shape[:1], generator=generator)[rows].to(z0.device)
    eps = torch.randn(shape, generator=generator)[rows].to(z0.device)
    return diffusion_loss(lambda z_t, t: nets.student(z_t, t, cond), z0, t, eps, schedule)
