"""Pictures, drawn by `minilcm.generate` from fixed seeds, and what is measured on them."""

import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minilcm.data.emoji import STYLES, compose
from minilcm.data.pictures import contact_sheet, save_png, to_images
from minilcm.generate import generate, noise
from minilcm.lcm import Network, guidance_embedding
from minilcm.merge import combine, merge_into
from minilcm.metrics import accuracy, picked, sharpness
from minilcm.model.precision import autocast
from minilcm.model.unet import Cond, UNet
from minilcm.objective import W_DIM, run
from minilcm.run.diagnostics import consistency_along_trajectory, guided, guided_trajectory

from .setup import HALF, SCHEDULE, Budget, Prompt, Vector, W, cached, place, shipped
from .styles import split_style


class Draw(NamedTuple):
    """How pictures are drawn."""

    sampler: str  # of minilcm.generate.SAMPLERS
    steps: int
    w: float = 0.0  # guidance while sampling; 0: off, one network evaluation a step, not two
    w_emb: float | None = None  # w as the input of a full LCM

    @property
    def evaluations(self) -> int:
        return self.steps * (2 if self.w else 1)


TEACHER, FOUR = Draw("ddim", 50, W), Draw("lcm", 4)
SOLVERS = {"ddim": "DDIM", "dpmpp": "DPM-Solver++"}

Vectors = Sequence[tuple[Vector, float]]  # tau_i and lambda_i, added up


class Base(NamedTuple):
    """Other weights of the UNet, and what they were made by."""

    key: object
    weights: dict[str, Tensor]


# ---- from prompts to latents


@contextmanager
def changed(unet: UNet, base: Base | None = None, vectors: Vectors = ()) -> Iterator[None]:
    """Inside the block the UNet has other weights plus sum_i lambda_i tau_i; then its own again."""
    before = {name: x.detach().clone() for name, x in unet.named_parameters()}
    try:
        if base is not None:
            unet.load_state_dict(base.weights)
        if vectors:
            merge_into(unet, combine([v.tau for v, _ in vectors], [lam for _, lam in vectors]))
        yield
    finally:
        unet.load_state_dict(before)


def network_of(unet: UNet, w_emb: float | None = None) -> Network:
    """(z_t, t, cond, w) -> eps_hat by the UNet's weights when called. w_emb: for a full LCM."""
    told = () if w_emb is None else (guidance_embedding(torch.tensor([w_emb]), W_DIM),)
    return lambda z_t, t, cond, w=None: run(unet, HALF, z_t, t, cond, *told)


def seeds_of(prompts: list[Prompt], seed: int) -> list[int]:
    """A seed for each picture: the same for every sampler."""
    return [100_003 * seed + i for i in range(len(prompts))]


def conds_of(prompts: list[Prompt]) -> tuple[Cond, Cond]:
    text = shipped().text
    return text.encode([p.text for p in prompts]), text.null_cond(len(prompts))


def made_by(
    prompts: list[Prompt], seeds: Sequence[int], draw: Draw, vectors: Vectors, base: Base | None
) -> list:
    """All that pictures depend on, besides what `cached` adds."""
    return [prompts, seeds, draw, [(v.key, lam) for v, lam in vectors], base and base.key]


def drawn(
    prompts: list[Prompt],
    seeds: Sequence[int],
    draw: Draw,
    vectors: Vectors = (),
    base: Base | None = None,
) -> Tensor:
    """z0 (prompts, seeds, 4, h, w), drawn 64 at a time."""

    def make() -> dict[str, Tensor]:
        unet, shape, z0 = shipped().unet, shipped().shape, []
        if draw.w_emb is not None:  # a full LCM has one layer more
            unet = UNet(replace(unet.cfg, w_dim=W_DIM)).requires_grad_(False)
        network = network_of(unet, draw.w_emb)
        with changed(unet, base, vectors):
            for i in range(0, len(prompts), 64):
                eps_fn = guided(network, *conds_of(prompts[i : i + 64]), draw.w)
                numbers = [seeds_of(prompts, seed)[i : i + 64] for seed in seeds]
                how = shape, draw.sampler, draw.steps
                z0.append(
                    torch.stack(
                        [generate(eps_fn, n, *how, schedule=SCHEDULE) for n in numbers], dim=1
                    )
                )
        return {"z0": torch.cat(z0)}

    return cached("drawn", made_by(prompts, seeds, draw, vectors, base), make)["z0"]


def teacher_path(prompts: list[Prompt], seed: int, base: Base | None = None) -> Tensor:
    """The teacher's trajectory: 50 guided steps of the base, no LoRA: (51, prompts, 4, h, w)."""
    model = shipped()
    z_T, _ = noise(seeds_of(prompts, seed), model.shape)
    with changed(model.unet, base):
        return guided_trajectory(network_of(model.unet), z_T, *conds_of(prompts), SCHEDULE, W)


def errors_along(
    path: Tensor, prompts: list[Prompt], vectors: Vectors, base: Base | None = None
) -> tuple[dict[int, float], dict[int, float]]:
    """{grid index: RMS of f to its neighbour's}, {grid index: RMS of f to `teacher_path`'s end}."""
    unet = shipped().unet
    with changed(unet, base, vectors):
        return consistency_along_trajectory(
            network_of(unet), path, conds_of(prompts)[0], SCHEDULE, W
        )


def rms(x: Tensor, y: Tensor) -> Tensor:
    """Distance of latents (..., 4, h, w) -> (...)."""
    return (x - y).square().mean(dim=(-3, -2, -1)).sqrt()


# ---- from latents to what is seen


@torch.no_grad()
def decode(z0: Tensor) -> Tensor:
    """(b, 4, h, w) -> pixels (b, 3, H, W) in [-1, 1], 32 at a time."""
    with autocast("cpu", HALF):
        return torch.cat([shipped().vae.decode(z).float() for z in z0.split(32)]).clamp(-1, 1)


@torch.no_grad()
def measure(z0: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Of latents (b, 4, h, w): name shown?, sharpness (b,), the judge's features, style logits."""
    judge, pixels = shipped().judge, decode(z0)
    features = torch.cat([judge.features(part) for part in pixels.split(64)])
    right = accuracy(judge, pixels, names)[0].float()
    return {
        "right": right,
        "sharpness": sharpness(pixels),
        "features": features,
        "styles": judge.style(features),
    }


def pictures(
    prompts: list[Prompt],
    seeds: Sequence[int],
    draw: Draw,
    vectors: Vectors = (),
    base: Base | None = None,
) -> dict[str, Tensor]:
    """What `measure` finds in `drawn` pictures, and their z0: each (prompts, seeds, ...)."""
    z0 = drawn(prompts, seeds, draw, vectors, base)

    def make() -> dict[str, Tensor]:
        found = [measure(z, [p.name for p in prompts]) for z in z0.unbind(dim=1)]
        return {k: torch.stack([d[k] for d in found], dim=1) for k in found[0]}

    return {"z0": z0} | cached("pictures", made_by(prompts, seeds, draw, vectors, base), make)


def held_out_art(style: str | None, looks: int) -> dict[str, Tensor]:
    """What `measure` finds in held-out drawings, (b, ...): of a style, or None: the base's four."""

    def make() -> dict[str, Tensor]:
        names, rng = shipped().names, random.Random(2)
        art = split_style(style, names)[1] * looks
        pixels, _ = compose(art, shipped().config.size, rng)
        z0 = torch.cat([shipped().vae.encode_mean(x) for x in pixels.split(32)])
        return measure(z0, [a.name for a in art])

    return cached("held-out", [style, looks], make)


def in_style(found: dict[str, Tensor], styles: Collection[str]) -> Tensor:
    """Does each picture look more like one of `styles` than like the base's four? (...) of 0, 1."""
    logits = found["styles"]  # (..., s)
    looks = picked(logits.flatten(0, -2), shipped().judge.styles, [*styles, *STYLES])
    return torch.tensor([float(look in styles) for look in looks]).reshape(logits.shape[:-1])


def save_sheet(claim: str, rows: dict[str, Tensor], names: list[str], budget: Budget) -> None:
    """A labelled row of pictures, at least 96 pixels wide, for each of some latents (columns, 4, h,
    w); the other columns have `names`. In 256 colours, which is a third of the bytes.
    """
    images, labels = [], []
    for label, z0 in rows.items():
        pixels = decode(z0)
        side = max(96, pixels.shape[-1])
        images += to_images(F.interpolate(pixels, (side, side), mode="bicubic"))
        labels += [label, *names[1 : len(z0)]]
    path = (
        place("figures", budget.quick)
        / f"{claim}-pictures{f'-seed{budget.seed}' if budget.seed else ''}.png"
    )
    sheet = contact_sheet(images, labels, min(len(z0) for z0 in rows.values()))
    save_png(path, sheet.quantize(256), f"python -m paper {claim}")
