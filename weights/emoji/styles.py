"""Sixteen styles the base has never seen: four real emoji sets, twelve made from its own art.

Each processed style maps a drawing (RGBA) to a drawing and keeps its transparency, so that it
stands on any background. The judge reads them all, and `paper/` asks what an LCM-LoRA does to eight
of them.
"""

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from minilcm.data.emoji import Art, read_art, split_art

from .make_styles import blueprint, papercut

ART = Path(__file__).parent / "art"  # of the base
SETS = Path(__file__).parents[2] / "paper/art"  # that the base has never seen


def recolour(image: Image.Image, f) -> Image.Image:
    """f on the colours (H, W, 3) in [0, 1], transparency kept."""
    rgb = np.asarray(image.convert("RGB"), np.float32) / 255
    out = Image.fromarray((f(rgb).clip(0, 1) * 255).round().astype(np.uint8))
    out.putalpha(image.getchannel("A"))
    return out


def move(image: Image.Image, x: np.ndarray, y: np.ndarray) -> Image.Image:
    """The drawing with its pixel at (x, y) moved to each place; x, y (H, W)."""
    rows, columns = (
        v.round().astype(int).clip(0, n - 1) for v, n in ((y, image.height), (x, image.width))
    )
    return Image.fromarray(np.asarray(image)[rows, columns])


def grid(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """x, y (H, W) of every pixel."""
    y, x = np.mgrid[: image.height, : image.width]
    return x.astype(np.float32), y.astype(np.float32)


def grey(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([0.299, 0.587, 0.114], np.float32)  # (H, W)


# ---- colour


def sepia(image: Image.Image) -> Image.Image:
    dark, light = np.array([0.25, 0.13, 0.05]), np.array([1.0, 0.9, 0.7])
    return recolour(image, lambda rgb: dark + grey(rgb)[..., None] * (light - dark))


def negative(image: Image.Image) -> Image.Image:
    return recolour(image, lambda rgb: 1 - rgb)


def swapped(image: Image.Image) -> Image.Image:
    """Red for green for blue."""
    return recolour(image, lambda rgb: rgb[..., [2, 0, 1]])


# ---- line


def outline(image: Image.Image) -> Image.Image:
    """Black lines where colour or outline changes, paper white inside."""
    lines = blueprint(image)
    return recolour(lines, lambda rgb: 1 - (rgb[..., :1].repeat(3, axis=2) - 23 / 255) * 255 / 232)


def stencil(image: Image.Image) -> Image.Image:
    """Two tones, the darker half of the drawing in ink."""
    inside = np.asarray(image.getchannel("A")) > 127
    level = np.median(grey(np.asarray(image.convert("RGB"), np.float32) / 255)[inside])
    paper, ink = np.array([0.98, 0.95, 0.88]), np.array([0.75, 0.1, 0.15])
    return recolour(image, lambda rgb: np.where((grey(rgb) < level)[..., None], ink, paper))


# ---- texture


def halftone(image: Image.Image) -> Image.Image:
    """Dark dots on a light ground, the larger the darker."""
    x, y = grid(image)
    pitch = image.width / 12
    far = np.hypot((x % pitch) / pitch - 0.5, (y % pitch) / pitch - 0.5)[..., None]

    def dots(rgb: np.ndarray) -> np.ndarray:
        radius = 0.65 * np.sqrt(1 - grey(rgb))[..., None]
        return np.where(far < radius, rgb * 0.5, 1 - 0.25 * (1 - rgb))

    return recolour(image, dots)


def hatch(image: Image.Image) -> Image.Image:
    """Diagonal dark lines over the colours."""
    x, y = grid(image)
    line = ((x + y) % (image.width / 8) < image.width / 20)[..., None]
    return recolour(image, lambda rgb: np.where(line, rgb * 0.35, rgb))


def mosaic(image: Image.Image) -> Image.Image:
    """Ten coarse squares across."""
    return image.resize((10, 10), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


# ---- shape


def slim(image: Image.Image) -> Image.Image:
    """Half as wide."""
    half = image.resize((image.width // 2, image.height), Image.Resampling.BICUBIC)
    return ImageOps.pad(half, image.size, color=(0, 0, 0, 0))


def swirl(image: Image.Image) -> Image.Image:
    """Turned around its centre, the middle by 115 degrees, the edge not at all."""
    x, y = grid(image)
    cx, cy = x - image.width / 2, y - image.height / 2
    angle = 2.0 * (1 - np.hypot(cx, cy) / (image.width / 2)).clip(0)
    turned = cx * np.cos(angle) - cy * np.sin(angle), cx * np.sin(angle) + cy * np.cos(angle)
    return move(image, image.width / 2 + turned[0], image.height / 2 + turned[1])


PROCESSED = {  # style: (kind of change, function)
    "sepia": ("colour", sepia),
    "negative": ("colour", negative),
    "swapped": ("colour", swapped),
    "outline": ("line", outline),
    "blueprint": ("line", blueprint),
    "stencil": ("line", stencil),
    "halftone": ("texture", halftone),
    "hatch": ("texture", hatch),
    "mosaic": ("texture", mosaic),
    "papercut": ("texture", papercut),
    "slim": ("shape", slim),
    "swirl": ("shape", swirl),
}
# style: kind of change
REAL = {"blob": "shape", "gradient": "texture", "glyph": "line", "monotone": "line"}
KINDS = {name: kind for name, (kind, _) in PROCESSED.items()} | REAL


@functools.cache
def plain_art() -> list[Art]:
    """All drawings in the base's four styles; reading them takes seconds."""
    return read_art(ART)


def split_style(style: str | None, names: list[str]) -> tuple[list[Art], list[Art]]:
    """(drawings to train on, drawings held out), Art whose style is its name; None: the base's.

    Processed styles hold out the pairs that the base never saw; of a real set every eighth drawing
    is held out.
    """
    if style in REAL:
        art = [a for a in read_art(SETS / f"{style}.tar") if a.name in names]
        return [a for i, a in enumerate(art) if i % 8], art[::8]
    both = split_art(plain_art(), ART / "held_out.txt", names)
    if style is None:
        return both
    change = PROCESSED[style][1]
    return tuple([a._replace(style=style, image=change(a.image)) for a in part] for part in both)
