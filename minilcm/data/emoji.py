"""The project's own emoji art: drawings composed on coloured grounds, with captions made to fit.

    art (RGBA, name, keywords, style)  --compose-->  pixels (3, S, S) in [-1, 1] and a caption

Caption grammar: NAME[, STYLE style][, on a COLOR background]. Each bracket is left out 40 % of the
time: the picture has a style and a colour then too, but the caption does not tell.
"""

import io
import json
import random
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ..files.safetensors_file import what_instead
from .batches import batch_order
from .pictures import to_pixels

STYLES = ("noto", "twemoji", "fluent", "emojione")
SIDE = 128  # of the drawings, in pixels
COLORS = {  # light enough that no drawing drowns in its background
    "white": (255, 255, 255),
    "black": (32, 32, 38),
    "pink": (255, 175, 190),
    "orange": (255, 195, 120),
    "yellow": (255, 240, 145),
    "green": (165, 230, 165),
    "blue": (155, 200, 255),
    "purple": (205, 175, 245),
}


class Art(NamedTuple):
    """One drawing: what it shows and how."""

    name: str  # the icon's own name, with spaces
    words: tuple[str, ...]  # label and keywords that can stand for it or beside it
    style: str | None
    image: Image.Image  # RGBA


Composed = tuple[Tensor, list[str]]  # pixels (b, 3, S, S) and b colours


def read_tar(path: Path) -> list[Art]:
    """All drawings of a shard: NAME.png beside NAME.json {name, label, keywords, style}."""
    files: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                stem, _, suffix = member.name.rpartition(".")
                if member.isfile() and suffix in ("png", "json"):
                    files.setdefault(stem, {})[suffix] = tar.extractfile(member).read()
    except (OSError, tarfile.TarError):
        raise ValueError(f"{path}: not a .tar file, or cut off; copy or make it again") from None
    art = []
    for stem, parts in files.items():
        if "png" not in parts or "json" not in parts:
            what = f"{stem} needs both a .png and a .json"
            raise ValueError(f"{path}: {what}; was the shard cut off?")
        try:
            meta = json.loads(parts["json"])
            image = Image.open(io.BytesIO(parts["png"])).convert("RGBA")
            words = meta["label"], *meta["keywords"]
            given = meta["name"], *meta["keywords"]  # a label may be empty
            if not all(isinstance(x, str) for x in (*given, meta["label"])) or not all(given):
                raise ValueError("name, label and keywords are not text, or empty")
            art.append(Art(meta["name"], words, meta.get("style"), image))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {stem} has a broken picture or .json ({error!r})") from None
    return art


def read_labels(shard: Path) -> Iterator[dict]:
    """What each .json of a shard says, front to back; the pictures are skipped."""
    with tarfile.open(shard, "r|") as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".json"):
                yield json.load(tar.extractfile(member))


def is_art(shard: Path) -> bool:
    """Whether a tar is the emoji art, which has keywords and no captions."""
    try:
        first = next(read_labels(shard), None)
    except (OSError, ValueError, tarfile.TarError):
        with open(shard, "rb") as f:
            what = what_instead(f.read(200)) or ", or damaged; copy or make it again"
        raise ValueError(f"{shard}: not a .tar file{what}") from None
    return isinstance(first, dict) and {"name", "label", "keywords"} <= first.keys()


def read_art(path: str | Path) -> list[Art]:
    """The art of a .tar or of a folder of them. Raises ValueError when there is nothing to read."""
    path, give = Path(path), "give the emoji art's .tar shards or their folder"
    shards = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar"))
    if not (path.is_dir() or (path.is_file() and path.suffix == ".tar")):
        raise ValueError(f"{path}: no such folder or .tar file; {give}")
    art = [a for shard in shards for a in read_tar(shard)]
    if not art:
        raise ValueError(f"{path}: no drawings; {give}")
    return art


def split_art(
    art: list[Art], held_out: Path, names: list[str] | None = None
) -> tuple[list[Art], list[Art]]:
    """(seen, held out) by the committed list of "name<TAB>style" lines; only `names`, if given."""
    pairs = {tuple(line.split("\t")) for line in held_out.read_text().splitlines()}
    art = art if names is None else [a for a in art if a.name in set(names)]
    seen = [a for a in art if (a.name, a.style) not in pairs]
    return seen, [a for a in art if (a.name, a.style) in pairs]


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def naming(art: Art, rng: random.Random) -> str:
    """NAME, or its label, an article or a keyword with it: what a person might type."""
    label, *keywords = art.words or (art.name,)
    name = label.lower() if label and rng.random() < 0.15 else art.name
    kind = rng.random()
    if kind < 0.55:
        return name
    if kind < 0.75 or not keywords:
        return article(name)
    keyword = rng.choice(keywords)
    return rng.choice([f"{article(keyword)} of {name}", f"{keyword} {name}", f"{name} {keyword}"])


def caption(
    art: Art, color: str, rng: random.Random, drop: float = 0.1
) -> tuple[str, tuple[str | None, str | None, str | None]]:
    """A caption, and (name, style, color) as far as it tells them; a share `drop` is empty."""
    says_style, says_color = rng.random() >= 0.4, rng.random() >= 0.4
    if rng.random() < drop:  # for guidance
        return "", (None, None, None)
    if art.style is None:  # a picture with a text of its own: the caption is the caption
        return art.name, (art.name, None, None)
    style, color = art.style if says_style else None, color if says_color else None
    parts = [naming(art, rng)]
    parts += [f"{style} style"] if style else []
    parts += [f"on {article(color)} background"] if color else []
    return ", ".join(parts), (art.name, style, color)


def photograph(image: Image.Image, size: int) -> Tensor:
    """A photograph or painting fills its frame: cropped, on white; (3, S, S) in [-1, 1]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    square = square.resize((size, size), Image.Resampling.BICUBIC)
    canvas = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square)
    return to_pixels(canvas.convert("RGB"))


def place(drawings: Tensor, colors: Tensor, size: int, scale: Tensor, shift: Tensor) -> Tensor:
    """RGBA drawings (b, 4, h, w) at `scale` (b,), moved by `shift` (b, 2), on RGB colors (b, 3)."""
    # a point p of the canvas shows the point (p - 2 shift) / scale of the drawing; both in [-1, 1]
    theta = torch.zeros(len(scale), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -2 * shift / scale[:, None]
    shape = [len(scale), 4, 2 * size, 2 * size]
    grid = F.affine_grid(theta.to(drawings.device), shape, align_corners=False)
    # colours weighed by how much of them there is, so that they blend as paint does
    rgb, alpha = drawings[:, :3] * drawings[:, 3:], drawings[:, 3:]
    placed = F.grid_sample(torch.cat([rgb, alpha], dim=1), grid, align_corners=False)
    placed = F.avg_pool2d(placed, 2)  # (b, 4, S, S)
    return (placed[:, :3] + (1 - placed[:, 3:]) * colors[:, :, None, None]) * 2 - 1


def compose(art: list[Art], size: int, rng: random.Random, device="cpu") -> Composed:
    """A training picture of each drawing, (b, 3, S, S) in [-1, 1], and the colours under them."""
    color = [rng.choice(list(COLORS)) if a.style else "white" for a in art]
    scale = torch.tensor([rng.uniform(0.75, 0.95) for _ in art])
    room = (1 - scale) / 4  # half of the way to the edge
    shift = torch.tensor([[rng.uniform(-1, 1), rng.uniform(-1, 1)] for _ in art]) * room[:, None]
    images = {id(a): a.image for a in art}  # many looks at one
    pad = partial(ImageOps.pad, size=(SIDE, SIDE), method=Image.Resampling.BICUBIC)
    squares = {key: np.asarray(pad(image)) for key, image in images.items()}
    drawings = torch.from_numpy(np.stack([squares[id(a)] for a in art])).to(device)  # (b, h, w, 4)
    drawings = rearrange(drawings, "b h w c -> b c h w") / 255
    grounds = torch.tensor([COLORS[c] for c in color], device=device) / 255  # (b, 3)
    pixels = place(drawings, grounds, size, scale, shift)
    for i, a in enumerate(art):
        if a.style is None:
            pixels[i] = photograph(a.image, size)
    return pixels, color


def compositions(
    art: list[Art], size: int, looks: int, seed: int, device="cpu", batch: int = 64
) -> Iterator[Composed]:
    """Each drawing composed `looks` times in a row, `batch` at a time: (pixels, colours)."""
    rng, todo = random.Random(seed), [a for a in art for _ in range(looks)]
    for i in tqdm(range(0, len(todo), batch), desc="drawings", disable=None):
        yield compose(todo[i : i + batch], size, rng, device)


class Cache(NamedTuple):
    """Latents of several compositions a drawing, by mean and std of q(z|x)."""

    mean: Tensor  # (m, 4, h, w)
    std: Tensor  # (m, 4, h, w)
    art: list[Art]  # of length m: what composition i shows
    color: list[str]  # of length m: what it stands on
    size: int  # height and width in pixels


@torch.no_grad()
def cache_art(vae, art: list[Art], size: int, looks: int, seed: int, device="cpu") -> Cache:
    """Compose each drawing `looks` times and encode it: m = looks * len(art)."""
    means, stds, colors = [], [], []
    for pixels, color in compositions(art, size, looks, seed, device):
        mean, std = vae.moments(pixels)
        means.append(mean.cpu()), stds.append(std.cpu())
        colors += color
    shown = [a for a in art for _ in range(looks)]
    return Cache(torch.cat(means), torch.cat(stds), shown, colors, size)


def art_batches(
    cache: Cache,
    batch: int,
    seed: int,
    start: int = 0,
    process: int = 0,
    world: int = 1,
    drop: float = 0.1,
) -> Iterator[tuple[Tensor, list[str], Tensor, torch.Generator]]:
    """(z0 (b, 4, h, w), captions, size ids (b, 6), generator) as `batches.batches` has them."""
    rows = slice(process * batch, (process + 1) * batch)
    size_ids = torch.tensor([[cache.size] * 2 + [0, 0] + [cache.size] * 2] * batch)  # (b, 6)
    for index, rng, generator in batch_order([(0, 0)] * len(cache.art), batch * world, seed, start):
        noise = torch.randn(len(index), *cache.mean.shape[1:], generator=generator)
        z0 = cache.mean[index[rows]] + cache.std[index[rows]] * noise[rows]  # (b, 4, h, w)
        captions = [caption(cache.art[i], cache.color[i], rng, drop)[0] for i in index]
        yield z0, captions[rows], size_ids, generator
