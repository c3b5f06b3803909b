"""Short training runs: the LCM-LoRA that is trained many times, style LoRAs, fine-tuned bases."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minilcm import lcm
from minilcm.data.emoji import Cache, art_batches, cache_art
from minilcm.lora import TARGETS, Tau, get_tau, lora_layers
from minilcm.model.unet import UNet
from minilcm.objective import Networks, Objective, learning_rate, loss_of, make_networks, run

from .pictures import Base
from .setup import HALF, Budget, Vector, W, cached, shipped
from .styles import REAL, split_style


class Recipe(NamedTuple):
    """One training run; the defaults are the questions' short LCM-LoRA."""

    kind: str = "lcm"
    rank: int | None = 32  # None: all weights
    steps: int = 300
    batch: int = 12
    lr: float = 1e-3
    data: str = "art"  # the base's own; a style; or "styles", the four real sets together
    lora_alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    w: tuple[float, float] = (W, W)
    k: int = 100
    seed: int = 0
    distance: str = "huber"  # or l2
    c_skip: bool = True
    target_ema: float | None = None  # of a LoRA: the target is an average of the student
    looks: int = 4  # compositions of each drawing
    marks: tuple[int, ...] = ()  # steps whose weights are kept besides the last ones


def short(budget: Budget) -> Recipe:
    """The LCM-LoRA that is trained many times: of few steps, in other things as the shipped one."""
    marks = (0, budget.steps // 8, budget.steps // 2)
    return Recipe(steps=budget.steps, seed=budget.seed, looks=budget.looks, marks=marks)


def tuning(budget: Budget) -> Recipe:
    """A fine-tune of all weights on the four real sets, kept at four distances."""
    marks = tuple(budget.tune_steps * i // 16 for i in (1, 2, 6))
    few = short(budget)._replace(
        kind="diffusion", rank=None, steps=budget.tune_steps, data="styles", marks=marks
    )
    return few._replace(batch=16, lr=3e-4)


def style_vectors(budget: Budget) -> dict[str, Vector]:
    """{style: its LoRA}, rank 8, all by one recipe."""
    one = short(budget)._replace(
        kind="diffusion", rank=8, steps=budget.style_steps, batch=16, marks=()
    )
    return {style: train(one._replace(data=style)).end for style in budget.styles}


# ---- a run


class Trained(NamedTuple):
    # {step: a LoRA's tau, or all weights}, at the recipe's marks and its end
    at: dict[int, Vector | Base]
    loss: Tensor  # (steps,)

    @property
    def end(self) -> Vector | Base:
        return self.at[max(self.at)]


def train(recipe: Recipe, base: Base | None = None) -> Trained:
    """What the recipe makes of the shipped model, or of a fine-tuned one."""
    key = [recipe, base and base.key]
    kept = cached("trained", key, lambda: train_now(recipe, base))
    at = {}
    for step in sorted({int(k.partition(":")[0]) for k in kept if k != "loss"}):
        tensors = {k.partition(":")[2]: x for k, x in kept.items() if k.startswith(f"{step}:")}
        at[step] = (
            Base([key, step], tensors)
            if recipe.rank is None
            else Vector([key, step], to_tau(tensors))
        )
    return Trained(at, kept["loss"])


def train_now(recipe: Recipe, base: Base | None = None) -> dict[str, Tensor]:
    """{"step:name": tensor} of what is trained, at the recipe's marks, and {"loss": (steps,)}."""
    model, data = shipped(), training_data(recipe.data, recipe.looks)
    unet = deepcopy(model.unet)
    if base is not None:
        unet.load_state_dict(base.weights)
    objective = objective_of(recipe)
    nets = make_networks(objective, unet, HALF, recipe.seed)
    if recipe.target_ema is not None:
        nets = averaged_target(nets, unet)
    parameters = [x for x in unet.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0, fused=True)
    null_cond, kept, losses = model.text.null_cond(recipe.batch), {}, []

    source = art_batches(data, recipe.batch, recipe.seed)
    label = f"{recipe.kind} {recipe.data} rank {recipe.rank}"
    for step in tqdm(range(recipe.steps), desc=label, disable=None, leave=False):
        if step in recipe.marks:
            kept |= {f"{step}:{k}": x for k, x in trained_weights(unet).items()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.lr, step, recipe.steps, warmup=50)
        z0, captions, _, generator = next(source)
        with as_asked(recipe):
            loss = loss_of(objective, nets, z0, model.text.encode(captions), null_cond, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if nets.target_unet is not None:
            rate = 0.95 if recipe.target_ema is None else recipe.target_ema
            lcm.update_ema(nets.target_unet, unet, rate)
    kept |= {f"{recipe.steps}:{k}": x for k, x in trained_weights(unet).items()}
    return kept | {"loss": torch.tensor(losses)}


def objective_of(recipe: Recipe) -> Objective:
    return Objective(
        recipe.kind, recipe.rank, recipe.lora_alpha, recipe.targets, recipe.w, recipe.k
    )


def averaged_target(nets: Networks, unet: UNet) -> Networks:
    """A LoRA's networks with an average of the student as target, which LCM-LoRA does without."""
    average = deepcopy(unet).requires_grad_(False)

    def target(z_t, t, cond, w=None):
        return run(average, HALF, z_t, t, cond)

    return nets._replace(target=target, target_unet=average)


@contextmanager
def as_asked(recipe: Recipe) -> Iterator[None]:
    """What train.py has no flags for, changed where the formula stands."""

    def no_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
        """f = x0 everywhere: c_skip = 0, c_out = 1."""
        return torch.zeros_like(t, dtype=torch.float32), torch.ones_like(t, dtype=torch.float32)

    l2 = patch.object(lcm, "huber", F.mse_loss) if recipe.distance == "l2" else nullcontext()
    skip = nullcontext() if recipe.c_skip else patch.object(lcm, "boundary_scalings", no_scalings)
    with l2, skip:
        yield


@functools.cache
def training_data(data: str, looks: int) -> Cache:
    names = shipped().names
    parts = REAL if data == "styles" else [None if data == "art" else data]
    art = [a for style in parts for a in split_style(style, names)[0]]
    if looks == 1:  # --quick
        art = art[::4]
    return cache_art(shipped().vae, art, shipped().config.size, looks, seed=0)


# ---- what is trained, as tensors


def trained_weights(unet: UNet) -> dict[str, Tensor]:
    """A copy of the tau that `to_tau` reads, or of all weights."""
    if not lora_layers(unet):
        return {name: x.detach().clone() for name, x in unet.named_parameters()}
    flat = {}
    for path, (up, down, lora_alpha) in get_tau(unet).items():
        flat |= {f"{path}/up": up, f"{path}/down": down, f"{path}/alpha": torch.tensor(lora_alpha)}
    return {name: x.detach().clone() for name, x in flat.items()}


def to_tau(flat: dict[str, Tensor]) -> Tau:
    paths = sorted({name.rpartition("/")[0] for name in flat})
    return {p: (flat[f"{p}/up"], flat[f"{p}/down"], flat[f"{p}/alpha"].item()) for p in paths}
