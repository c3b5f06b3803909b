"""Pictures, drawn by `minilcm.generate` from fixed seeds, and what is measured on them."""

import random
import timeit
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minilcm.data.emoji import STYLES, compose
from minilcm.data.pictures import contact_sheet, save_png, to_images
from minilcm.generate import generate
from minilcm.merge import combine, merge_into
from minilcm.metrics import interval, picked, sharpness
from minilcm.model.precision import autocast
from minilcm.model.unet import Cond, UNet
from minilcm.objective import without_w
from minilcm.run.diagnostics import guided

from .setup import HALF, SCHEDULE, Prompt, Vector, W, art_of, cached, place, shipped


class Draw(NamedTuple):
    """How pictures are drawn."""

    sampler: str  # of minilcm.generate.SAMPLERS
    steps: int
    w: float = 0.0  # guidance while sampling; 0: off, one network evaluation a step, not two
    gamma: float | None = None  # of lcm: how much of the noise between steps is fresh; None: all

    @property
    def evaluations(self) -> int:
        return self.steps * (2 if self.w else 1)


TEACHER, SLOW, FOUR = Draw("ddim", 50, W), Draw("ddim", 25, W), Draw("lcm", 4)
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


def conds_of(prompts: list[Prompt]) -> tuple[Cond, Cond]:
    text = shipped().text
    return text.encode([p.text for p in prompts]), text.null_cond(len(prompts))


def made_by(prompts, seeds, draw: Draw, vectors: Vectors = (), base: Base | None = None) -> list:
    """All that pictures depend on, besides what `cached` adds."""
    return [prompts, seeds, draw, [(v.key, lam) for v, lam in vectors], base and base.key]


def drawn(prompts: list[Prompt], seeds, draw: Draw, vectors: Vectors = (), base=None) -> Tensor:
    """z0 (prompts, seeds, 4, h, w), drawn 64 at a time; by another `Base`, if one is given."""

    def make() -> dict[str, Tensor]:
        unet, z0 = shipped().unet, []
        way = dict(steps=draw.steps, schedule=SCHEDULE, gamma=draw.gamma)
        with changed(unet, base, vectors):
            for i in range(0, len(prompts), 64):
                part = prompts[i : i + 64]
                eps_fn = guided(without_w(unet, HALF), *conds_of(part), draw.w)
                # a seed for each picture: the same for every sampler
                numbers = [[100_003 * seed + i + j for j in range(len(part))] for seed in seeds]
                each = [generate(eps_fn, n, shipped().shape, draw.sampler, **way) for n in numbers]
                z0.append(torch.stack(each, dim=1))
        return {"z0": torch.cat(z0)}

    return cached("drawn", made_by(prompts, seeds, draw, vectors, base), make)["z0"]


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
def measure(z0: Tensor, names: list[str], styles: list[str]) -> dict[str, Tensor]:
    """Of latents (b, 4, h, w), each (b, ...): has it the name that was asked for; is it "right",
    that name in the asked style, if that is one of the base's four; how sharp; what the judge sees.
    """
    judge, pixels = shipped().judge, decode(z0)
    features = torch.cat([judge.features(part) for part in pixels.split(64)])
    named, looks = judge.name(features), judge.style(features)
    name = torch.tensor([a == b for a, b in zip(picked(named, judge.names), names)])
    style = picked(looks, judge.styles, list(STYLES))
    style = torch.tensor([a == b or b not in STYLES for a, b in zip(style, styles)])
    found = {"name": name.float(), "right": (name & style).float(), "sharpness": sharpness(pixels)}
    return found | {"features": features, "styles": looks}


Found = dict[str, Tensor]  # of `pictures`, or of several runs of it: (runs, prompts, seeds, ...)


def pictures(prompts: list[Prompt], seeds: Sequence[int], *how) -> Found:
    """What `measure` finds in `drawn` pictures, and their z0: each (prompts, seeds, ...)."""
    z0, asked = drawn(prompts, seeds, *how), ([p.name for p in prompts], [p.style for p in prompts])

    def make() -> Found:
        return over_runs([measure(z, *asked) for z in z0.unbind(dim=1)], dim=1)

    return {"z0": z0} | cached("pictures", made_by(prompts, seeds, *how), make)


def over_runs(found: Sequence[Found], dim: int = 0) -> Found:
    """The same pictures by several training runs: (runs, prompts, seeds, ...)."""
    return {k: torch.stack([x[k] for x in found], dim) for k in found[0]}


@torch.no_grad()
def seconds_of(prompts: list[Prompt]) -> tuple[float, float]:
    """Of an evaluation, and of decoding, a picture at a time on this processor; medians of nine."""
    network, z = without_w(shipped().unet, HALF), torch.randn(1, *shipped().shape)
    cond, t = conds_of(prompts[:1])[0], torch.tensor([499])
    both = (lambda: network(z, t, cond)), (lambda: decode(z))
    return tuple(median(timeit.repeat(one, number=1, repeat=9)) for one in both)


def about(x: Found, teacher: Found, groups: Tensor) -> dict[str, list[float]]:
    """How often right; how sharp, of the teacher's; how far from the teacher's end, in RMS."""
    return {
        "right": interval(x["right"], groups=groups),
        "sharpness": interval(x["sharpness"], teacher["sharpness"], True, groups),
        "distance": interval(rms(x["z0"], teacher["z0"]), groups=groups),
    }


def against(x: Found, y: Found, teacher: Found, groups: Tensor) -> dict[str, list[float]]:
    """How much oftener right than y; how sharp, and how far from the teacher's end, of y's."""
    far = [rms(each["z0"], teacher["z0"]) for each in (x, y)]
    return {
        "right": interval(x["right"], y["right"], groups=groups),
        "sharpness": interval(x["sharpness"], y["sharpness"], True, groups),
        "distance": interval(*far, True, groups),
    }


def held_out_art(style: str | None) -> Found:
    """What `measure` finds in held-out drawings, (b, ...): of a style, or None: the base's four."""

    def make() -> dict[str, Tensor]:
        art = art_of(style)[1]
        pixels, _ = compose(art, shipped().config.size, random.Random(2))
        z0 = torch.cat([shipped().vae.encode_mean(x) for x in pixels.split(32)])
        return measure(z0, [a.name for a in art], [a.style for a in art])

    return cached("held-out", style, make)


def in_style(found: Found, styles: Collection[str]) -> Tensor:
    """Does each picture look more like one of `styles` than like the base's four? (...) of 0, 1."""
    logits = found["styles"]  # (..., s)
    looks = picked(logits.flatten(0, -2), shipped().judge.styles, [*styles, *STYLES])
    return torch.tensor([float(look in styles) for look in looks]).reshape(logits.shape[:-1])


def save_sheet(name: str, shown: list[tuple[str, Tensor]], columns: int, quick: bool) -> None:
    """figures/NAME.png: labelled latents (4, h, w), in 64 colours for a fifth of the bytes."""
    labels, z0 = zip(*shown)
    pixels = F.interpolate(decode(torch.stack(z0)), 96, mode="bicubic", antialias=True)
    sheet = contact_sheet(to_images(pixels), list(labels), columns)
    path = place("figures", quick) / f"{name}.png"
    save_png(path, sheet.quantize(64), f"python -m paper {name.partition('-')[0]}")
