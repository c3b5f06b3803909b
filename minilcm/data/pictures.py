"""Pictures to pixels and back: files read, cut to size, written as PNG, and contact sheets."""

import io
import itertools
import math
import os
import random
import re
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..files.safetensors_file import atomic, what_instead

Target = tuple[int, int]  # (h, w) in pixels, to which a picture is cut


def picture_suffixes() -> set[str]:
    """ ".png", ".jpg" and the suffixes of all other kinds of pictures that this Pillow opens."""
    kinds = Image.registered_extensions()
    images = {kind for kind in Image.OPEN if Image.MIME.get(kind, "").startswith("image/")}
    return {suffix for suffix, kind in kinds.items() if kind in images}


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (b, 3, H, W) in [-1, 1], clamped -> b PIL images."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(x) for x in rearrange(levels, "b c h w -> b h w c").cpu().numpy()]


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image -> pixels (3, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w").float() / 127.5 - 1


def open_picture(data: bytes) -> Image.Image:
    """A picture file's bytes as an RGB image, upright (EXIF), on white; else ValueError."""
    try:
        image = Image.open(io.BytesIO(data))
        kind, image = image.format, ImageOps.exif_transpose(image)
        # grey of 16 bits: Pillow's convert would make white of all above 255
        if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
            levels = np.asarray(image.convert("I")) / 257  # 65,535 is white
            image = Image.fromarray(levels.round().astype(np.uint8))
        image = image if image.mode in ("I", "F") else image.convert("RGBA")
    except Exception as error:  # each of Pillow's decoders has its own
        unknown = isinstance(error, UnidentifiedImageError)
        said = "no kind that Pillow knows" if unknown else " ".join(str(error).split())[:100]
        what = what_instead(data[:200]) or f" ({said})"
        raise ValueError(f"not a readable picture{what}") from None
    if image.mode != "RGBA":
        what = "32-bit integers" if image.mode == "I" else "floats"
        raise ValueError(f"{kind} of {what}: which value is white is not told; save it as .png")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def read_image(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A picture file as pixels (1, 3, H, W) in [-1, 1]: upright, on white, cut to `size` (W, H)."""
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file")
    try:
        image = open_picture(Path(path).read_bytes())
    except OSError:  # a folder, for one
        raise ValueError(f"{path}: not a readable picture") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    ratio = image.width * size[1] / (image.height * size[0])
    if min(ratio, 1 / ratio) < 0.9:
        shape = f"{image.width}x{image.height}"
        print(f"{path}: {shape}, of which the middle is used, in the shape of {size[0]}x{size[1]}")
    return to_pixels(ImageOps.fit(image, size, Image.Resampling.BICUBIC))[None]


# ---- cut to size


def buckets(size: int, multiple: int = 64) -> list[Target]:
    """Targets (h, w) of 90 to 100 % of size^2 pixels, in multiples, with aspect 1:2 to 2:1.

    buckets(1024) is SDXL's own list in that range (2307.01952 appendix I) and 704 x 1344.
    """
    if size < 1 or size % multiple:
        raise ValueError(f"size is {size}; give a multiple of {multiple}")
    sides = range(multiple, 2 * size, multiple)
    all_sides = [(h, w) for h in sides for w in sides if h <= 2 * w and w <= 2 * h]
    return [(h, w) for h, w in all_sides if 0.9 * size**2 < h * w <= size**2]


def nearest(image: Image.Image, targets: list[Target]) -> Target:
    """The target (h, w) whose aspect ratio is nearest to the image's."""
    return min(targets, key=lambda t: abs(math.log(t[1] * image.height / (t[0] * image.width))))


def crop(image: Image.Image, target: Target, rng: random.Random) -> tuple[Tensor, list[int]]:
    """The image scaled to cover `target` and cut at random: pixels (3, h, w), and six size ids."""
    (h, w), (H, W) = target, (image.height, image.width)
    zoom = max(h / H, w / W)
    tall, wide = max(h, round(zoom * H)), max(w, round(zoom * W))  # of the scaled image
    top, left = rng.randint(0, tall - h), rng.randint(0, wide - w)
    # the cut, in the original
    box = left * W / wide, top * H / tall, (left + w) * W / wide, (top + h) * H / tall
    return to_pixels(image.resize((w, h), Image.Resampling.BICUBIC, box)), [H, W, top, left, h, w]


# ---- written


def save_png(path: str | Path, image: Image.Image, parameters: str, command: str = "") -> None:
    """Write a PNG, atomically, with A1111's text chunk `parameters` and the chunk `command`."""
    info = PngInfo()
    for key, text in {"parameters": parameters, "command": command}.items():
        if text:  # which may name a file whose name is not UTF-8
            info.add_text(key, text.encode(errors="backslashreplace").decode())
    with atomic(path) as part:
        image.save(part, "PNG", pnginfo=info)


def is_png(out: str | Path) -> bool:
    return str(out).lower().endswith(".png")


def make_place(out: str | Path) -> None:
    """Make the folder `out`, or that of the file, before the work: a wrong path costs none. Raises
    ValueError for a PNG that exists, or a folder that cannot be written to.
    """
    out = Path(out)
    if is_png(out) and out.exists():
        raise ValueError(f"{out}: exists, and is kept; give another name")
    folder = out.parent if is_png(out) else out
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}: no permission to write there; give another folder")


def save_new_png(path: Path, image: Image.Image, parameters: str, command: str = "") -> None:
    """`save_png` under a name that is free. Raises FileExistsError if it is not."""
    open(path, "x").close()  # the name is ours from here on, whoever else writes here
    try:
        save_png(path, image, parameters, command)
    except BaseException:
        path.unlink()
        raise


def save_numbered(
    folder: Path, name: str, image: Image.Image, parameters: str, command: str = ""
) -> Path:
    """`save_new_png` as NUMBER_name.png, one above the highest number that is in the folder."""
    numbers = [re.match(r"([0-9]+)_.*\.png$", path.name) for path in folder.iterdir()]
    first = max((int(m[1]) + 1 for m in numbers if m), default=0)
    for number in itertools.count(first):
        path = folder / f"{number:04d}_{name}.png"
        with suppress(FileExistsError):  # by another run, a moment ago
            save_new_png(path, image, parameters, command)
            return path


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines at most `width` pixels wide, as long as they can be; line breaks are kept."""
    for letters in range(max(1, width // 2), 0, -1):
        # [""]: an empty line stays one
        lines = [y for x in text.split("\n") for y in textwrap.wrap(x, letters) or [""]]
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines


def contact_sheet(images: list[Image.Image], labels: list[str], columns: int) -> Image.Image:
    """All images in rows of `columns`, each above its label, wrapped to the image's width."""
    width, height = max(96, max(i.width for i in images)), max(i.height for i in images)
    font = ImageFont.load_default(11)
    lines = [wrap(label, font, width) for label in labels]
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
def draw_sheet(
    columns: dict[str, Tensor], prompts: list[str], decode: Callable[[Tensor], Tensor]
) -> Image.Image:
    """A row per prompt, a column per label of {label: z0 (b, c, h, w)}, decoded one at a time."""
    pictures = [[to_images(decode(z))[0] for z in z0.split(1)] for z0 in columns.values()]
    labels = [f"{label}\n{prompt}" for prompt in prompts for label in columns]
    by_row = [picture for row in zip(*pictures) for picture in row]
    return contact_sheet(by_row, labels, len(columns))
