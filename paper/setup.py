"""What all sections share: how much of everything, the shipped model, its judge, prompts, a cache.

What takes long is kept under runs/paper/ (`cached`), so a stopped run goes on.
"""

import functools
import hashlib
import json
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from minilcm.data.emoji import COLORS, Art, article
from minilcm.files.checkpoint import load_judge, load_model
from minilcm.files.lora_file import read_tau
from minilcm.files.safetensors_file import read_tensors, sha256, write_tensors
from minilcm.lora import Tau
from minilcm.model.precision import default_dtype
from minilcm.schedule import make_schedule
from weights.emoji.styles import ART, REAL, split_style

HERE = Path(__file__).parent
EMOJI = HERE.parent / "weights/emoji"
MODEL, LORA, JUDGE = (EMOJI / f"{x}.safetensors" for x in ("model", "lcm_lora", "judge"))
CACHE = HERE.parent / "runs/paper"
SCHEDULE, HALF = make_schedule(), default_dtype("cpu")
W = 3.0  # the paper's w: the guidance distilled into the shipped LCM-LoRA, and the model's own
NAMES = 64  # that prompts ask for

# of what the section that is being measured uses
spent: dict[Path, float] = {}  # seconds that each kept part took, whenever it was made
spent_now: list[float] = []  # of those that this section made
used: dict[str, str] = {}  # {shipped file: content}
commits: set[str] = set()  # by which the kept parts were made


class Budget(NamedTuple):
    """How much of everything."""

    quick: bool
    names: int  # that prompts ask for, in two styles each
    runs: tuple[int, ...]  # seeds of training
    seeds: tuple[int, ...]  # of pictures, which no earlier run of the paper was judged on
    steps: int  # of the short recipe
    batch: int
    long: int  # steps of the one run that shows the curve over training
    style_steps: int
    tune_steps: int
    far_steps: int


FULL = Budget(False, NAMES, (0, 1, 2), (2, 3, 4), 160, 12, 960, 600, 400, 1200)
QUICK = Budget(True, 4, (0, 1), (2, 3), 2, 2, 4, 4, 4, 6)
TUNE = (9,)  # seeds of the pictures by which w and learning rates are chosen, and of nothing else


def place(kind: str, quick: bool) -> Path:
    """The folder of results or of figures; of a quick run both are beside what is kept."""
    folder = CACHE / "quick" if quick else HERE / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def git(*argv: str) -> str:
    return subprocess.run(["git", *argv], cwd=HERE, capture_output=True, text=True).stdout.strip()


COMMIT = git("rev-parse", "--short=7", "HEAD")


# ---- the model, and what it made before


@functools.cache
def shipped() -> SimpleNamespace:
    """The shipped model: its unet, vae, text, config and judge, and the shape of its latents."""
    model = load_model(MODEL)
    side = model.config.size // model.vae.factor
    return SimpleNamespace(**model._asdict(), judge=load_judge(JUDGE), shape=(4, side, side))


class Vector(NamedTuple):
    """A tau, and what it was made by."""

    key: object
    tau: Tau


def shipped_lora() -> Vector:
    used["lcm_lora"] = content_of(LORA)
    return Vector(content_of(LORA), read_tau(LORA))


@functools.cache
def content_of(path: Path) -> str:
    return sha256(path)[:16]


def cached(name: str, key, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """make(), or what it gave before for the same key, model, art, number format, and judge."""
    used.update(model=content_of(MODEL), judge=content_of(JUDGE))
    files = [MODEL] + [JUDGE] * (name in ("pictures", "held-out"))  # what it judges
    files += [EMOJI / "styles.py", EMOJI / "make_styles.py", ART / "held_out.txt"]
    files += [path for art in (ART, HERE / "art") for path in sorted(art.glob("*.tar"))]
    key = json.dumps([key, str(HALF), [content_of(path) for path in files]], sort_keys=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        start = time.perf_counter()
        tensors = {k: x.contiguous() for k, x in make().items()}
        spent_now.append(time.perf_counter() - start)
        about = {"key": key, "seconds": str(spent_now[-1]), "commit": COMMIT}
        write_tensors(path, tensors, about)
    tensors, about = read_tensors(path)
    spent[path] = float(about["seconds"])
    commits.add(about["commit"])
    return tensors


# ---- prompts


class Prompt(NamedTuple):
    text: str
    name: str
    style: str


def said(art: list[Art], colors: list[str]) -> list[Prompt]:
    asked = [f"{a.name}, {a.style} style, on {article(c)} background" for a, c in zip(art, colors)]
    return [Prompt(text, a.name, a.style) for text, a in zip(asked, art)]


def spread(things: list, n: int) -> list:
    """At most n, evenly taken from all over the list."""
    return [things[i * len(things) // n] for i in range(n)] if n < len(things) else list(things)


@functools.cache
def art_of(style: str | None) -> tuple[list[Art], list[Art]]:
    """(seen, held out) drawings of 64 names in a style, None: in the base's four; a real set's."""
    names = list(shipped().config.names)
    return split_style(style, names if style in REAL else spread(names, NAMES))


def taught(data: str, most: int) -> list[Art]:
    """Drawings to train on, spread evenly: the base's own, a style's, or of all real sets."""
    parts = REAL if data == "styles" else [None if data == "art" else data]
    return spread([a for style in parts for a in art_of(style)[0]], most)


@functools.cache
def prompts_of(style: str | None, names: int, each: int = 1) -> list[Prompt]:
    """For so many of 64 names, spread over all that the model knows, or that a real set draws: in a
    style that the base has not seen; None: in `each` of those that it saw the name in, at random.
    """
    rng, known = random.Random(0), shipped().config.names
    if style is None:
        seen = art_of(None)[0]
        picked = [rng.sample([a for a in seen if a.name == x], 2) for x in spread(known, NAMES)]
        art = [row[i] for i in range(each) for row in spread(picked, names)]
        return said(art, rng.choices(list(COLORS), k=len(art)))
    if style in REAL:
        known = [a.name for part in art_of(style) for a in part]
    art = [Art(name, (), style, None) for name in spread(spread(known, NAMES), names)]
    # not on black, where a black glyph is nothing
    return said(art, rng.choices([c for c in COLORS if c != "black"], k=len(art)))


def names_of(prompts: list[Prompt]) -> Tensor:
    """Which name each prompt asks for, as numbers (p,): what a bootstrap draws together."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(p.name for p in prompts))}
    return torch.tensor([numbers[p.name] for p in prompts])
