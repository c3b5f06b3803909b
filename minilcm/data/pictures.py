"""Pixels to pictures and files: one PNG an image with its recipe inside, and labelled contact sheets."""

import io
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..files.safetensors_file import atomic


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (b, 3, H, W) in [-1, 1], clamped -> b PIL images."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(x) for x in rearrange(levels, "b c h w -> b h w c").cpu().numpy()]


def decode(data: bytes) -> Image.Image:
    """A picture file's bytes as an RGB image, upright (EXIF), on white. Raises ValueError if it is no picture."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    except Exception as error:  # each of Pillow's decoders has its own
        raise ValueError(f"not a picture that can be read ({type(error).__name__})") from None
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def read_image(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A picture file as pixels (1, 3, H, W) in [-1, 1]: upright, on white, scaled and centre-cropped to (W, H).

    Raises ValueError if there is no such file or it is no picture.
    """
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file")
    try:
        image = decode(Path(path).read_bytes())
    except (OSError, ValueError):  # a folder, for one
        raise ValueError(f"{path}: not a picture that can be read") from None
    x = rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w").float() / 127.5 - 1
    zoom = max(size[0] / image.width, size[1] / image.height)
    h, w = max(size[1], round(image.height * zoom)), max(size[0], round(image.width * zoom))
    x = F.interpolate(x, (h, w), mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (h - size[1]) // 2, (w - size[0]) // 2
    return x[:, :, top : top + size[1], left : left + size[0]]


def save_png(path: str | Path, image: Image.Image, parameters: str) -> None:
    """Write a PNG with the text chunk `parameters` that A1111 introduced: first line the prompt. Atomic."""
    info = PngInfo()
    info.add_text("parameters", parameters)
    with atomic(path) as part:
        image.save(part, "PNG", pnginfo=info)


def contact_sheet(images: list[Image.Image], labels: list[str], columns: int) -> Image.Image:
    """All images in rows of `columns`, each above its label: its lines, wrapped to the image's width."""
    width, height = max(96, max(i.width for i in images)), max(i.height for i in images)
    font = ImageFont.load_default(11)
    letters = width // 6
    # an empty line stays one
    lines = [[y for x in s.split("\n") for y in textwrap.wrap(x, letters) or [""]] for s in labels]
    tall = 13 * max(map(len, lines)) + 6
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 8), rows * (height + tall + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, lines)):
        x, y = (i % columns) * (width + 8) + 4, (i // columns) * (height + tall + 8) + 4
        sheet.paste(image, (x + (width - image.width) // 2, y))
        for j, line in enumerate(text):
            draw.text((x, y + height + 2 + 13 * j), line, fill="black", font=font)
    return sheet


@torch.no_grad()
def draw_sheet(columns: dict[str, Tensor], prompts: list[str], to_pixels: Callable[[Tensor], Tensor]) -> Image.Image:
    """One row a prompt, one column a label, from {label: z0 (b, c, h, w)}; to_pixels: (1, c, h, w) -> (1, 3, H, W)."""
    pictures = [[to_images(to_pixels(z))[0] for z in z0.split(1)] for z0 in columns.values()]
    labels = [f"{label}\n{prompt}" for prompt in prompts for label in columns]
    return contact_sheet([picture for row in zip(*pictures) for picture in row], labels, len(columns))
