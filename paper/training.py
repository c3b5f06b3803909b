"""Short training runs: the LCM-LoRA that is trained many times, style LoRAs, fine-tuned bases."""

import functools
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minilcm import lcm
from minilcm.data.emoji import COLORS, Cache, art_batches, cache_art
from minilcm.lora import Tau, get_tau
from minilcm.metrics import decide, together
from minilcm.model.unet import UNet
from minilcm.objective import Networks, Objective, learning_rate, loss_of, make_networks, without_w

from .pictures import SLOW, TEACHER, Base, Draw, Vectors, about, against, drawn, over_runs, pictures
from .report import form
from .setup import HALF, Budget, Vector, W, cached, names_of, prompts_of, said, shipped, taught


class Recipe(NamedTuple):
    """One training run; the defaults are the sections' short LCM-LoRA."""

    kind: str = "lcm"  # or diffusion
    rank: int | None = 32  # None: all weights
    steps: int = 160
    batch: int = 12
    lr: float = 1e-3
    constant: bool = False  # the learning rate after its warm-up, in place of a cosine
    # art, the base's own; teacher, what the base draws for the same captions; half, of each; a
    # style; or styles, the four real sets together
    data: str = "art"
    lora_alpha: float | None = None
    w: tuple[float, float] = (W, W)
    k: int = 300
    psi_steps: int = 3
    seed: int = 0
    distance: str = "huber"  # or l2
    c_skip: bool = True
    target_ema: float | None = None  # the target is an average of the student
    drawings: int = 1200  # at most, spread evenly over those that there are
    marks: tuple[int, ...] = ()  # steps whose weights are kept besides the last ones


def short(budget: Budget, seed: int = 0) -> Recipe:
    """The LCM-LoRA that is trained many times: of few steps, in other things as the shipped one."""
    few = 16 if budget.quick else 1200
    return Recipe(steps=budget.steps, batch=budget.batch, seed=seed, drawings=few)


def long(budget: Budget) -> Recipe:
    """The short recipe for six times as many steps, kept where its error is looked at."""
    marks = tuple(budget.long * i // 16 for i in (0, 1, 2, 4, 8))
    return short(budget)._replace(steps=budget.long, marks=marks)


def tuning(budget: Budget, seed: int = 0) -> Recipe:
    """A fine-tune of all weights on the four real sets, kept at two distances."""
    few = short(budget, seed)._replace(kind="diffusion", rank=None, data="styles", lr=3e-4)
    return few._replace(steps=budget.tune_steps, marks=(budget.tune_steps // 4,))


def far(budget: Budget) -> Recipe:
    """The same, far away: longer, and in steps three times as large."""
    return tuning(budget)._replace(steps=budget.far_steps, lr=1e-3, marks=())


def style_vector(budget: Budget, style: str, rank: int, lora_alpha: float) -> Vector:
    few = short(budget)._replace(kind="diffusion", rank=rank, lora_alpha=lora_alpha, data=style)
    return train(few._replace(steps=budget.style_steps)).end


class Trained(NamedTuple):
    at: dict[int, Vector | Base]  # {step: what was trained}, at the recipe's marks and its end
    loss: Tensor  # (steps,)

    @property
    def end(self) -> Vector | Base:
        return self.at[max(self.at)]


def train(recipe: Recipe, base: Base | None = None) -> Trained:
    """What the recipe makes of the shipped model, or of a fine-tuned one."""
    key = [recipe, base and base.key]
    kept, at = cached("trained", key, lambda: train_now(recipe, base)), {}
    for step in (*recipe.marks, recipe.steps):
        tensors = {k.partition(":")[2]: x for k, x in kept.items() if k.startswith(f"{step}:")}
        by, full = [key, step], recipe.rank is None
        at[step] = Base(by, tensors) if full else Vector(by, to_tau(tensors))
    return Trained(at, kept["loss"])


def runs_of(recipe: Recipe, budget: Budget) -> list[Vectors]:
    """A LoRA of every run, times 1."""
    return [[(train(recipe._replace(seed=seed)).end, 1.0)] for seed in budget.runs]


def compare(rows: dict[str, list[Vectors]], budget: Budget, first: str) -> dict:
    """{row: {"1", "2" and "4" steps: `about` them, "against": {the same: `against` those of the
    row `first`}}} for rows of several training runs' vectors, and for "no LoRA".
    """
    prompts, rows = prompts_of(None, budget.names), rows | {"no LoRA": [[]] * len(budget.runs)}
    groups, teacher = names_of(prompts), pictures(prompts, budget.seeds, TEACHER)
    out = {label: {"against": {}} for label in rows}
    for n in (1, 2, 4):
        how = budget.seeds, Draw("lcm", n)
        each = [[pictures(prompts, *how, v) for v in runs] for runs in rows.values()]
        found = dict(zip(rows, map(over_runs, each)))
        for label, x in found.items():
            out[label][str(n)] = about(x, teacher, groups)
            out[label]["against"][str(n)] = against(x, found[first], teacher, groups)
    return out


MARGIN = 0.1  # of being right at 4 steps, and of how sharp


def learned(rows: dict) -> list:
    """[verdict, its number]: does the row `first` beat "no LoRA" in distance at one step?"""
    nothing = rows["no LoRA"]["against"]["1"]["distance"]
    return [decide(nothing, above=1.0), nothing]


def as_good(rows: dict, other: dict) -> list:
    """[verdict, the number that comes nearest to its bound], by a row's "against". At 4 steps less
    than MARGIN below in being right and in sharpness, and at 1 step it keeps half of what training
    brought in distance. Nothing is compared where training brought nothing: `learned`.
    """
    word, nothing = learned(rows)
    if word != "shown":
        return ["not shown", f"nothing compared: no LoRA ends {form(nothing)} times as far"]
    tests = {  # in words: an interval, where it is equal, its bound
        "right": (other["4"]["right"], 0.0, -MARGIN),
        "times as sharp": (other["4"]["sharpness"], 1.0, 1 - MARGIN),
        "times as far": (other["1"]["distance"], 1.0, (1 + nothing[0]) / 2),
    }
    # scaled to 1 where it is equal and 0 at its bound
    room = {k: sorted((v - b) / (equal - b) for v in x) for k, (x, equal, b) in tests.items()}
    word = together(decide([mean, low, high], above=0.0) for low, mean, high in room.values())
    x, _, bound = tests[what := min(room, key=room.get)]
    return [word, f"{form(x)} {what}, bound {bound:.2f}"]


def turned(other: dict) -> dict:
    """A row's "against" the first one, from the first one's side."""
    turn = {"right": lambda x: -x, "sharpness": lambda x: 1 / x, "distance": lambda x: 1 / x}
    return {
        n: {what: [turn[what](x[i]) for i in (0, 2, 1)] for what, x in found.items()}
        for n, found in other.items()
    }


def train_now(recipe: Recipe, base: Base | None = None) -> dict[str, Tensor]:
    """{"step:name": tensor} of what is trained, at the recipe's marks, and {"loss": (steps,)}."""
    data, text = training_data(recipe.data, recipe.drawings), shipped().text
    null_cond, unet = text.null_cond(recipe.batch), deepcopy(shipped().unet)
    if base is not None:
        unet.load_state_dict(base.weights)
    objective = objective_of(recipe)
    nets = make_networks(objective, unet, HALF, recipe.seed)
    if recipe.target_ema is not None:
        nets = averaged_target(nets, unet)
    parameters = [x for x in unet.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0, fused=True)
    source, kept, losses = art_batches(data, recipe.batch, recipe.seed), {}, []
    label = f"{recipe.kind} {recipe.data} rank {recipe.rank}"
    for step in tqdm(range(recipe.steps), desc=label, disable=None, leave=False):
        if step in recipe.marks:
            kept |= {f"{step}:{k}": x for k, x in trained_weights(unet).items()}
        for group in optimizer.param_groups:
            floor = 1.0 if recipe.constant else 0.0
            group["lr"] = learning_rate(recipe.lr, step, recipe.steps, warmup=20, floor=floor)
        z0, captions, _, generator = next(source)
        with as_asked(recipe):
            loss = loss_of(objective, nets, z0, text.encode(captions), null_cond, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if nets.target_unet is not None:
            lcm.update_ema(nets.target_unet, unet, recipe.target_ema)
    kept |= {f"{recipe.steps}:{k}": x for k, x in trained_weights(unet).items()}
    return kept | {"loss": torch.tensor(losses)}


def objective_of(recipe: Recipe) -> Objective:
    how = dict(w_range=recipe.w, k=recipe.k, psi_steps=recipe.psi_steps)
    return Objective(recipe.kind, recipe.rank, recipe.lora_alpha, **how)


def averaged_target(nets: Networks, unet: UNet) -> Networks:
    """A LoRA's networks with an average of the student as target, which LCM-LoRA does without."""
    average = deepcopy(unet).requires_grad_(False)
    return nets._replace(target=without_w(average, HALF), target_unet=average)


def as_asked(recipe: Recipe) -> AbstractContextManager:
    """Inside the block: what train.py has no flags for, changed where the formula stands."""

    def no_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
        """f = x0 everywhere: c_skip = 0, c_out = 1."""
        return torch.zeros_like(t, dtype=torch.float32), torch.ones_like(t, dtype=torch.float32)

    huber = F.mse_loss if recipe.distance == "l2" else lcm.huber
    scalings = lcm.boundary_scalings if recipe.c_skip else no_scalings
    return patch.multiple(lcm, huber=huber, boundary_scalings=scalings)


@functools.cache
def training_data(data: str, drawings: int) -> Cache:
    """Latents of drawings, one composition each, or of what the teacher draws in their place."""
    own, size, table = data in ("teacher", "half"), shipped().config.size, list(COLORS)
    art = taught("art" if own else data, drawings)

    def encode() -> dict[str, Tensor]:
        mean, std, _, color, _ = cache_art(shipped().vae, art, size, looks=1, seed=0)
        return {"mean": mean, "std": std, "color": torch.tensor([table.index(c) for c in color])}

    kept = cached("latents", ["art" if own else data, drawings], encode)
    mean, std, color = kept["mean"], kept["std"], [table[i] for i in kept["color"]]
    if own:
        z0 = drawn(said(art, color), (5,), SLOW)[:, 0]
        mine = slice(1, None, 2) if data == "half" else slice(None)
        mean[mine], std[mine] = z0[mine], 0.0
    return Cache(mean, std, art, color, size)


def trained_weights(unet: UNet) -> dict[str, Tensor]:
    """A copy of the tau, as `to_tau` reads it, or of all weights where there is none."""
    flat = {} if (tau := get_tau(unet)) else dict(unet.named_parameters())
    for path, (up, down, lora_alpha) in tau.items():
        flat |= {f"{path}/up": up, f"{path}/down": down, f"{path}/alpha": torch.tensor(lora_alpha)}
    return {name: x.detach().clone() for name, x in flat.items()}


def to_tau(flat: dict[str, Tensor]) -> Tau:
    paths = sorted({name.rpartition("/")[0] for name in flat})
    return {p: (flat[f"{p}/up"], flat[f"{p}/down"], flat[f"{p}/alpha"].item()) for p in paths}
