"""What all sections of the paper share: the model, prompts, pictures and what is measured on them, trained parts.

Everything that takes long is kept under runs/paper/ by the content of its recipe (`cached`), so a stopped run goes on.
"""

import functools
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

HERE = Path(__file__).parent
EMOJI = HERE.parent / "weights/emoji"
sys.path[:0] = [str(HERE.parent), str(HERE), str(EMOJI)]
import evaluate  # noqa: E402
from evaluate import HALF, SCHEDULE, decode, interval  # noqa: E402, F401 (the other files take them from here)
from styles import REAL, split_style  # noqa: E402

from minilcm import lcm  # noqa: E402
from minilcm.data.emoji import COLORS, Art, Cache, art_batches, article, cache_art, read_art, split_art  # noqa: E402
from minilcm.data.pictures import to_images  # noqa: E402
from minilcm.files.checkpoint import load_model  # noqa: E402
from minilcm.files.lora_file import read_tau  # noqa: E402
from minilcm.files.safetensors_file import read_tensors, sha256, write_tensors  # noqa: E402
from minilcm.lora import TARGETS, Tau, get_tau, lora_layers  # noqa: E402
from minilcm.merge import combine, merge_into  # noqa: E402
from minilcm.metrics import clip_score, load_judge, prompt_accuracy  # noqa: E402
from minilcm.model.unet import UNet  # noqa: E402
from minilcm.objective import W_DIM, Objective, loss_of, make_networks, run  # noqa: E402

CACHE = HERE.parent / "runs/paper"
spent: dict[Path, float] = {}  # seconds that each part took that this process has used, whenever it was made
spent_now: list[float] = []  # of those made by this process
W = 3.0  # of the paper's formula: the guidance that the shipped LCM-LoRA has distilled in, and the model's own

CONTENT = {
    "living": "cactus, sunflower, evergreen tree, mushroom, penguin, cat face, dog face, frog, tropical fish, octopus, "
    "snail, butterfly, lady beetle",
    "food": "pizza, red apple, banana, strawberry, carrot, hamburger, soft ice cream, doughnut, birthday cake, "
    "hot beverage, cherries, watermelon, grapes, pineapple, lemon",
    "tools and toys": "umbrella, guitar, soccer ball, basketball, balloon, wrapped gift, key, scissors, light bulb, "
    "alarm clock, crown, t shirt, trophy, camera, television, mobile phone, hammer, bomb, bell, drum, gem stone, "
    "locked",
    "places and signs": "rocket, sailboat, automobile, bicycle, airplane, house, fire, rainbow, star, "
    "snowman without snow, red heart, ghost, skull, robot",
}
CATEGORY = {name: category for category, names in CONTENT.items() for name in names.split(", ")}


# ---- the model


class Lab(NamedTuple):
    """The shipped model and its judge."""

    unet: UNet
    vae: nn.Module
    text: nn.Module
    judge: nn.Module
    names: list[str]
    side: int  # of the square latents


@functools.cache
def open_lab() -> Lab:
    unet, vae, text, config = load_model(EMOJI / "model.safetensors")
    side = config.size // vae.factor
    return Lab(unet, vae, text, load_judge(EMOJI / "judge.safetensors"), list(config.names), side)


@functools.cache
def content_of(path: Path) -> str:
    return sha256(path)[:16]


def cached(name: str, key, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """make(), or what it gave before for the same key, model, judge, art and number format."""
    files = [EMOJI / "model.safetensors", EMOJI / "judge.safetensors", HERE / "styles.py", EMOJI / "make_styles.py"]
    files += [EMOJI / "art/held_out.txt"]
    files += [*sorted((EMOJI / "art").glob("*.tar")), *sorted((HERE / "art").glob("*.tar"))]
    key = json.dumps([key, str(HALF), [content_of(path) for path in files]], sort_keys=True)
    path = CACHE / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        tensors = {k: x.contiguous() for k, x in make().items()}
        spent_now.append(time.perf_counter() - start)
        write_tensors(path, tensors, {"key": key, "seconds": str(spent_now[-1])})
    tensors, about = read_tensors(path)
    spent[path] = float(about["seconds"])
    return tensors


class Vector(NamedTuple):
    """A tau, and what it was made by."""

    key: object
    tau: Tau


def shipped(name: str) -> Vector:
    path = EMOJI / f"{name}.safetensors"
    return Vector(content_of(path), read_tau(path))


def to_vector(key, tensors: dict[str, Tensor]) -> Vector:
    """The tau that `from_tau` took apart."""
    paths = sorted({k.rpartition("/")[0] for k in tensors})
    return Vector(key, {p: (tensors[f"{p}/up"], tensors[f"{p}/down"], tensors[f"{p}/alpha"].item()) for p in paths})


def from_tau(tau: Tau) -> dict[str, Tensor]:
    parts = {path: {"up": up, "down": down, "alpha": torch.tensor(alpha)} for path, (up, down, alpha) in tau.items()}
    return {f"{path}/{k}": x.detach().clone() for path, three in parts.items() for k, x in three.items()}


@contextmanager
def changed(unet: UNet, base: dict[str, Tensor] | None, vectors: list[tuple[Vector, float]]) -> Iterator[None]:
    """Inside the block the UNet has other weights, and sum_i lambda_i tau_i in them; after it, its own, bit for bit."""
    before = {name: x.detach().clone() for name, x in unet.named_parameters()}
    try:
        if base is not None:
            unet.load_state_dict(base)
        if vectors:
            merge_into(unet, combine([v.tau for v, _ in vectors], [lam for _, lam in vectors]))
        yield
    finally:
        unet.load_state_dict(before)


# ---- prompts


class Prompt(NamedTuple):
    text: str
    name: str
    style: str | None = None
    color: str | None = None
    held_out: bool = False


def said(art: list[Art], rng: random.Random, held_out: bool, colors=tuple(COLORS)) -> list[Prompt]:
    drawn = [rng.choice(colors) for _ in art]
    return [Prompt(f"{a.name}, {a.style} style, on {article(c)} background", a.name, a.style, c, held_out)
        for a, c in zip(art, drawn)]  # fmt: skip


@functools.cache
def prompts_of(kind: str, most: int | None = None) -> list[Prompt]:
    """all: each (name, style) pair with a colour, held-out ones four times. bare: the names. Any of its style: `said`
    prompts of a style of paper/styles.py. `most`: only so many, spread evenly.
    """
    lab, rng = open_lab(), random.Random(0)
    if kind == "all":
        seen, held_out = split_art(read_art(EMOJI / "art"), EMOJI / "art/held_out.txt", lab.names)
        prompts = said(seen, rng, False) + said(held_out * 4, rng, True)
    elif kind == "bare":
        prompts = [Prompt(name, name) for name in lab.names]
    else:  # not on black, where a black glyph is nothing
        art = [Art(name, (), kind, None) for name in lab.names]
        prompts = said(art, rng, False, tuple(c for c in COLORS if c != "black"))
    n = len(prompts) if most is None else min(most, len(prompts))
    return [prompts[i * len(prompts) // n] for i in range(n)]


# ---- pictures


class Draw(NamedTuple):
    """How pictures are drawn."""

    sampler: str  # lcm, ddim or dpmpp
    steps: int
    w: float = 0.0  # guidance while sampling: 0 is off, and a step is one network evaluation instead of two
    w_emb: float | None = None  # w as the input of a full LCM

    @property
    def evaluations(self) -> int:
        return self.steps * (2 if self.w else 1)


def noise(prompts: int, seed: int, side: int) -> tuple[Tensor, list[torch.Generator]]:
    """z_T (b, 4, h, w) and each picture's generator: the same for every sampler."""
    return evaluate.noise([100_003 * seed + i for i in range(prompts)], side)


@torch.no_grad()
def measure(lab: Lab, z0: Tensor, prompts: list[Prompt]) -> dict[str, Tensor]:
    """Of each picture (b,): does it show its name, cosine with its prompt, sharpness; and features of the judge."""
    pixels = decode(lab.vae, z0)
    return {
        "right": prompt_accuracy(lab.judge, lab.text, pixels, [p.name for p in prompts], lab.names).float(),
        "score": clip_score(lab.judge, lab.text, pixels, [p.text for p in prompts]),
        "sharpness": sharpness(pixels),
        "features": lab.judge.image_features(pixels),
    }


def sharpness(pixels: Tensor) -> Tensor:
    """Mean absolute Laplacian of grey levels; pixels (b, 3, H, W) in [-1, 1] -> (b,)."""
    laplace = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(pixels.mean(dim=1, keepdim=True), laplace).abs().mean(dim=(1, 2, 3))


Vectors = list[tuple[Vector, float]]  # tau_i and lambda_i, added up
Base = tuple[object, dict[str, Tensor]] | None  # what a fine-tuned UNet was made by, and its weights


def made_by(prompts: list[Prompt], seeds: tuple[int, ...], draw: Draw, vectors: Vectors, base: Base) -> list:
    """All that pictures depend on, besides what `cached` adds."""
    return [prompts, seeds, draw, [(v.key, lam) for v, lam in vectors], base and base[0]]


def drawn(
    prompts: list[Prompt], seeds: tuple[int, ...], draw: Draw, vectors: Vectors = (), base: Base = None
) -> Tensor:
    """z0 (prompts, seeds, 4, h, w)."""
    lab = open_lab()

    def make() -> dict[str, Tensor]:
        unet, texts, w_emb, z0 = lab.unet, [p.text for p in prompts], (), []
        if draw.w_emb is not None:  # a full LCM has one layer more
            unet = UNet(replace(unet.cfg, w_dim=W_DIM)).requires_grad_(False)
            w_emb = (lcm.guidance_embedding(torch.tensor([draw.w_emb])),)
        with changed(unet, base and base[1], list(vectors)):
            for seed in seeds:
                z_T, generators = noise(len(prompts), seed, lab.side)
                z0.append(evaluate.latents(unet, lab.text, texts, z_T, generators, *draw[:3], *w_emb))
        return {"z0": torch.stack(z0, dim=1)}

    return cached("drawn", made_by(prompts, seeds, draw, vectors, base), make)["z0"]


def pictures(
    prompts: list[Prompt], seeds: tuple[int, ...], draw: Draw, vectors: Vectors = (), base: Base = None
) -> dict[str, Tensor]:
    """What `measure` finds in `drawn` pictures, and their z0, each of shape (prompts, seeds, ...)."""
    lab, z0 = open_lab(), drawn(prompts, seeds, draw, vectors, base)

    def make() -> dict[str, Tensor]:
        found = [measure(lab, z, prompts) for z in z0.unbind(dim=1)]
        return {k: torch.stack([d[k] for d in found], dim=1) for k in found[0]}

    return {"z0": z0} | cached("pictures", made_by(prompts, seeds, draw, vectors, base), make)


def bound(unet: UNet) -> lcm.Network:
    """(z_t, t, cond, w) -> eps_hat of a UNet with whatever weights it has when it is called."""
    return lambda z_t, t, cond, w=None: run(unet, HALF, z_t, t, cond)


@torch.no_grad()
def decoded_images(z0: Tensor) -> list:
    """Latents (b, 4, h, w) -> b pictures, enlarged."""
    pixels = decode(open_lab().vae, z0)
    return to_images(F.interpolate(pixels, scale_factor=1.5, mode="bicubic"))


def rms(x: Tensor, y: Tensor) -> Tensor:
    """Distance of latents (..., 4, h, w) -> (...)."""
    return (x - y).square().mean(dim=(-3, -2, -1)).sqrt()


def frechet(x: Tensor, y: Tensor) -> float:
    """Frechet distance of two clouds of features (n, e) in float64: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)).

    FID (1706.08500) with the small CLIP's image tower in place of Inception.
    """
    x, y = x.double(), y.double()
    cx, cy = torch.cov(x.T), torch.cov(y.T)
    # tr (C C')^(1/2) is the sum of square roots of the eigenvalues of C C'
    root = torch.linalg.eigvals(cx @ cy).real.clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + cx.trace() + cy.trace() - 2 * root).item()


# ---- intervals


def pairs(prompts: list[Prompt]) -> Tensor:
    """Which (name, style) each prompt asks for, as numbers (p,): one asked for four times is still one."""
    asked = [(p.name, p.style) for p in prompts]
    return torch.tensor([list(dict.fromkeys(asked)).index(pair) for pair in asked])


def wilson(k: int, n: int) -> list[float]:
    """[share, low, high] of k in n, 95 %; not nothing for none in n. Wilson (1927)."""
    z2 = 1.96**2
    middle, half = (k + z2 / 2) / (n + z2), 1.96 / (n + z2) * (k * (n - k) / n + z2 / 4) ** 0.5
    return [k / n, middle - half, middle + half]


# ---- training


class Recipe(NamedTuple):
    """One training run; the defaults are the sections' short LCM-LoRA."""

    kind: str = "lcm"
    rank: int | None = 32  # None: all weights
    steps: int = 300
    batch: int = 12
    lr: float = 1e-3
    data: str = "art"  # or a style
    base: object = None  # what the UNet was made by, if it is not the shipped one
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


@functools.cache
def training_data(data: str, looks: int) -> Cache:
    lab = open_lab()
    if data == "art":
        art, _ = split_art(read_art(EMOJI / "art"), EMOJI / "art/held_out.txt", lab.names)
    elif data == "styles":  # all styles that are sets of their own
        art = [a for style in REAL for a in split_style(style, lab.names)[0]]
    else:
        art, _ = split_style(data, lab.names)
    if looks == 1:  # --quick
        art = art[::4]
    return cache_art(lab.vae, art, 4 * lab.side, looks, seed=0)


@contextmanager
def as_asked(recipe: Recipe) -> Iterator[None]:
    """What train.py has no flags for, changed where the formula stands."""
    l2 = patch.object(lcm, "huber", F.mse_loss) if recipe.distance == "l2" else nullcontext()
    none = lambda t: (torch.zeros_like(t, dtype=torch.float32), torch.ones_like(t, dtype=torch.float32))  # noqa: E731
    skip = nullcontext() if recipe.c_skip else patch.object(lcm, "boundary_scalings", none)
    with l2, skip:
        yield


class Trained(NamedTuple):
    at: dict[int, Vector | dict[str, Tensor]]  # {step: tau, or all weights of the UNet}, at the recipe's marks and end
    loss: Tensor  # (steps,)

    @property
    def end(self) -> Vector | dict[str, Tensor]:
        return self.at[max(self.at)]


def train(recipe: Recipe, weights: dict[str, Tensor] | None = None) -> Trained:
    """What the recipe makes. `weights`: of its base, if that is not the shipped one."""
    out = cached("trained", recipe, lambda: train_now(recipe, weights))
    steps = sorted({int(k.partition(":")[0]) for k in out if k[0].isdigit()})
    at = {s: {k.partition(":")[2]: x for k, x in out.items() if k.startswith(f"{s}:")} for s in steps}
    made = {s: (to_vector([recipe, s], x) if recipe.rank is not None else x) for s, x in at.items()}
    return Trained(made, out["loss"])


def train_now(recipe: Recipe, weights: dict[str, Tensor] | None) -> dict[str, Tensor]:
    lab, data = open_lab(), training_data(recipe.data, recipe.looks)
    unet = deepcopy(lab.unet)
    if weights is not None:
        unet.load_state_dict(weights)
    objective = Objective(recipe.kind, recipe.rank, recipe.lora_alpha, recipe.targets, recipe.w, recipe.k)
    nets = make_networks(objective, unet, HALF, recipe.seed)
    target_unet = nets.target_unet
    if recipe.target_ema is not None:
        target_unet = deepcopy(unet)
        nets = nets._replace(target=lambda z_t, t, cond, w: run(target_unet, HALF, z_t, t, cond))
    parameters = [x for x in unet.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0, fused=True)
    null, out, losses = lab.text.null_cond(recipe.batch), {}, []

    def keep(step: int) -> None:
        kept = from_tau(get_tau(unet)) if lora_layers(unet) else {k: x.detach() for k, x in unet.named_parameters()}
        out.update({f"{step}:{k}": x.clone() for k, x in kept.items()})

    source = art_batches(data, recipe.batch, recipe.seed)
    what = f"{recipe.kind} {recipe.data} rank {recipe.rank}"
    for step in tqdm(range(recipe.steps), desc=what, disable=None, leave=False):
        if step in recipe.marks:
            keep(step)
        for group in optimizer.param_groups:  # warm-up, then cosine; as train.py but for a shorter warm-up
            cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
            group["lr"] = recipe.lr * min(1, (step + 1) / 50) * cosine
        z0, captions, _, generator = next(source)
        with as_asked(recipe):
            loss = loss_of(objective, nets, z0, lab.text.encode(captions), null, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
        if target_unet is not None:
            lcm.update_ema(target_unet, unet, recipe.target_ema or 0.95)
    keep(recipe.steps)
    return out | {"loss": torch.tensor(losses)}
