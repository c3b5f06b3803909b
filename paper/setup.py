"""What all questions share: how much of everything, the shipped model, its judge, prompts, a cache.

Everything that takes long is kept under runs/paper/ by the content of its recipe (`cached`), so a
stopped run goes on.
"""

import functools
import hashlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minilcm.data.emoji import COLORS, Art, article
from minilcm.files.checkpoint import load_judge, load_model
from minilcm.files.identify import Config
from minilcm.files.lora_file import read_tau
from minilcm.files.safetensors_file import read_tensors, sha256, write_tensors
from minilcm.lora import Tau
from minilcm.metrics import Judge
from minilcm.model.precision import default_dtype
from minilcm.model.text import TextEncoder
from minilcm.model.unet import UNet
from minilcm.model.vae import VAE
from minilcm.schedule import make_schedule

from .styles import ART, KINDS, split_style

HERE = Path(__file__).parent
EMOJI = HERE.parent / "weights/emoji"
MODEL, LORA, JUDGE = (EMOJI / f"{x}.safetensors" for x in ("model", "lcm_lora", "judge"))
CACHE = HERE.parent / "runs/paper"
SCHEDULE, HALF = make_schedule(), default_dtype("cpu")
W = 3.0  # the paper's w: the guidance distilled into the shipped LCM-LoRA, and the model's own
NAMES = 64  # the first of the model's: of the prompts, and of all that is trained here

# seconds that each kept part took that this section used, whenever it was made
spent: dict[Path, float] = {}
spent_now: list[float] = []  # of those made by this section


# ---- how much


class Budget(NamedTuple):
    """How much of everything."""

    quick: bool
    seeds: tuple[int, ...]  # of pictures
    seed: int  # of training
    prompts: int | None  # None: all
    few: int  # prompts where many settings are compared
    steps: int  # of a short training
    style_steps: int
    tune_steps: int
    looks: int  # compositions of each drawing to train on
    styles: tuple[str, ...]
    grid: tuple[float, ...]  # lambdas


def budget_of(quick: bool, seed: int) -> Budget:
    if quick:
        return Budget(True, (2 * seed,), seed, 8, 6, 4, 6, 8, 1, ("sepia", "outline"), (0.0, 1.0))
    grid = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    return Budget(
        False, (2 * seed, 2 * seed + 1), seed, None, 100, 300, 300, 800, 4, tuple(KINDS), grid
    )


def place(kind: str, quick: bool) -> Path:
    """The folder of results or of figures; of a quick run both are beside what is kept."""
    folder = CACHE / "quick" if quick else HERE / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- the model, and what it made before


class Shipped(NamedTuple):
    """The shipped model and its judge."""

    unet: UNet
    vae: VAE
    text: TextEncoder
    config: Config
    judge: Judge
    names: list[str]
    shape: tuple[int, int, int]  # of a picture's latents


@functools.cache
def shipped() -> Shipped:
    model = load_model(MODEL)
    side = model.config.size // model.vae.factor
    return Shipped(*model, load_judge(JUDGE), list(model.config.names)[:NAMES], (4, side, side))


class Vector(NamedTuple):
    """A tau, and what it was made by."""

    key: object
    tau: Tau


def shipped_lora() -> Vector:
    """The LCM-LoRA that the results are about."""
    return Vector(content_of(LORA), read_tau(LORA))


@functools.cache
def content_of(path: Path) -> str:
    return sha256(path)[:16]


def cached(name: str, key, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """make(), or what it gave before for the same key, model, judge, art and number format."""
    files = [MODEL, JUDGE, HERE / "styles.py", EMOJI / "make_styles.py", ART / "held_out.txt"]
    files += [path for art in (ART, HERE / "art") for path in sorted(art.glob("*.tar"))]
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


# ---- prompts


class Prompt(NamedTuple):
    text: str
    name: str
    style: str | None = None
    held_out: bool = False


def said(art: list[Art], rng: random.Random, held_out=False, colors=tuple(COLORS)) -> list[Prompt]:
    texts = [f"{a.name}, {a.style} style, on {article(rng.choice(colors))} background" for a in art]
    return [Prompt(text, a.name, a.style, held_out) for text, a in zip(texts, art)]


@functools.cache
def prompts_of(kind: str, most: int | None = None) -> list[Prompt]:
    """all: each (name, style) pair with a colour, held-out ones four times. bare: the names. Any
    other: `said` prompts in a style of paper/styles.py. `most`: only so many, spread evenly.
    """
    names, rng = shipped().names, random.Random(0)
    if kind == "all":
        seen, held_out = split_style(None, names)
        prompts = said(seen, rng) + said(held_out * 4, rng, held_out=True)
    elif kind == "bare":
        prompts = [Prompt(name, name) for name in names]
    else:  # not on black, where a black glyph is nothing
        art = [Art(name, (), kind, None) for name in names]
        prompts = said(art, rng, colors=tuple(c for c in COLORS if c != "black"))
    n = len(prompts) if most is None else min(most, len(prompts))
    return [prompts[i * len(prompts) // n] for i in range(n)]


def pairs(prompts: list[Prompt]) -> Tensor:
    """Which (name, style) each prompt asks for, as numbers (p,): the same one, the same number."""
    asked = [(p.name, p.style) for p in prompts]
    numbers = {pair: i for i, pair in enumerate(dict.fromkeys(asked))}
    return torch.tensor([numbers[pair] for pair in asked])
