"""Folders of pictures with captions, as people have them: read, cut to size, encoded once, drawn in batches.

    read_pictures --> Picture --cache_latents--> Example --batches--> z0 (b, 4, h, w), captions, size ids (b, 6)

Size ids are SDXL's (2307.01952 section 2.2), heights before widths: of the original, crop (top, left), of the target.
"""

import csv
import hashlib
import io
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..files.safetensors_file import all_finite, read_header, read_tensors, write_tensors
from ..model.text import TextEncoder, add_size
from ..model.unet import Cond
from .pictures import decode

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Picture(NamedTuple):
    """A picture file and what it shows; its pixels are read when they are needed."""

    file: Path
    caption: str
    repeats: int = 1  # how often an epoch shows it


# ---- folders


def read_pictures(path: str | Path) -> list[Picture]:
    """The pictures of a folder, sorted. Three layouts, which may be mixed:

    cat.png beside cat.txt or cat.caption; metadata.jsonl or metadata.csv, there or in a subfolder, with file_name and
    text or caption (Hugging Face's imagefolder); subfolders 10_NAME, whose pictures come 10 times an epoch and have
    NAME as caption where a .txt is missing (kohya's). Raises ValueError: a caption or a picture is missing, or all.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a folder of pictures with .txt captions")
    listed: dict[Path, list[str]] = {}
    tables = sorted(p for p in path.rglob("metadata.*") if p.suffix in (".jsonl", ".csv"))
    for table in tables:
        for file, caption in read_table(table):
            listed.setdefault(file, []).append(caption)
    kohya = {folder: named for folder in path.iterdir() if folder.is_dir() and (named := read_repeats(folder))}
    files = set(listed)
    for folder in {path, *kohya, *(table.parent for table in tables)}:
        files |= {f for f in folder.iterdir() if f.suffix.lower() in PICTURES and not f.name.startswith(".")}
    pictures = []
    for file in sorted(files):
        repeats, name = kohya.get(file.parent, (1, None))
        pictures += [Picture(file, c, repeats) for c in listed.get(file) or [read_caption(file, name)]]
    if not pictures:
        raise ValueError(f"{path}: no pictures; put them there with .txt captions, a metadata.jsonl, or in 10_NAME/")
    return pictures


def read_table(table: Path) -> Iterator[tuple[Path, str]]:
    """(picture, caption) of each row of a metadata.jsonl or metadata.csv."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{table}: not UTF-8 with one picture a line ({error})") from None
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f'{table}: picture {n} has no "file_name"; write one')
        file = table.parent / row["file_name"]
        if not file.is_file():
            raise ValueError(
                f"{table}: picture {n} is {row['file_name']!r}, which is not there; add it or drop the line"
            )
        if not (captions := [row[key] for key in ("text", "caption") if isinstance(row.get(key), str)]):
            raise ValueError(f'{table}: {row["file_name"]!r} has no caption; write "text" or "caption"')
        yield file, " ".join(captions[0].split())


def read_repeats(folder: Path) -> tuple[int, str] | None:
    """kohya's folder name 10_sks dog -> (10, "sks dog"); None for any other name."""
    if not (match := re.fullmatch(r"([-+]?[0-9.]*[0-9])_(.*)", folder.name)):
        return None
    if not match[1].isdigit() or not 1 <= int(match[1]) <= 1000 or not match[2]:
        raise ValueError(f"{folder}: {match[1]} repeats; call it N_NAME with N from 1 to 1000, or without a number")
    return int(match[1]), match[2]


def read_caption(file: Path, name: str | None) -> str:
    """The text beside a picture, in one line, or else `name`."""
    for beside in (file.with_suffix(".txt"), file.with_suffix(".caption")):
        if beside.exists():
            try:
                return " ".join(beside.read_text(encoding="utf-8-sig").split())
            except (OSError, ValueError) as error:
                raise ValueError(f"{beside}: cannot be read ({error}); save it as UTF-8") from None
    if name is None:
        raise ValueError(f"{file}: no caption; put its text into {file.stem}.txt beside it")
    return name


# ---- pixels


def buckets(size: int, multiple: int = 64) -> list[tuple[int, int]]:
    """Targets (h, w) of about size^2 pixels: multiples of `multiple`, 90 to 100 % of the area, aspect 1:2 to 2:1.

    buckets(1024) is SDXL's own list in that range (2307.01952 appendix I), and 704 x 1344 lying down, too.
    """
    if size < 1 or size % multiple:
        raise ValueError(f"size is {size}; give a multiple of {multiple}")
    sides = range(multiple, 2 * size, multiple)
    return [(h, w) for h in sides for w in sides if 0.9 * size**2 < h * w <= size**2 and h <= 2 * w and w <= 2 * h]


def nearest(image: Image.Image, targets: list[tuple[int, int]]) -> tuple[int, int]:
    """The target (h, w) whose aspect is the image's most nearly, as a ratio."""
    return min(targets, key=lambda t: abs(math.log(t[1] * image.height / (t[0] * image.width))))


def crop(image: Image.Image, target: tuple[int, int], rng: random.Random) -> tuple[Tensor, list[int]]:
    """Scaled to cover `target` (h, w) and cut to it anywhere: pixels (3, h, w) in [-1, 1], and the six size ids."""
    (h, w), (H, W) = target, (image.height, image.width)
    zoom = max(h / H, w / W)
    tall, wide = max(h, round(zoom * H)), max(w, round(zoom * W))  # as large as the scaled picture would be
    top, left = rng.randint(0, tall - h), rng.randint(0, wide - w)
    box = (left * W / wide, top * H / tall, (left + w) * W / wide, (top + h) * H / tall)  # the cut, in the original
    pixels = torch.from_numpy(np.array(image.resize((w, h), Image.Resampling.BICUBIC, box))).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1, [H, W, top, left, h, w]


# ---- encoded once


class Example(NamedTuple):
    """A picture as encoded: q(z|x) as mean and std, so that a fresh latent is drawn each time."""

    file: Path  # safetensors: mean and std, (4, h, w) each
    caption: str
    size_ids: list[int]
    shape: tuple[int, int]  # (h, w) of the latent


def digest(*what) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


@torch.no_grad()
def cache_latents(
    vae,
    vae_id: str,
    pictures: list[Picture],
    folder: Path,
    targets: list[tuple[int, int]],
    looks: int = 1,
    device="cpu",
) -> list[Example]:
    """Each picture cut to the nearest of `targets` (h, w) and encoded, `looks` times at other places; -> an epoch.

    targets = buckets(1024), or [(512, 512)] for squares; `vae_id` names the VAE, as the sha256 of its file does. A look
    is a file in `folder` named by the hash of the picture's bytes, targets, look and `vae_id`, and not encoded again if
    it is there. What is no picture is named and left out. Raises ValueError when none is left, or a latent is not
    finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    examples, skipped = [], 0
    for picture in tqdm(pictures, desc="latents", disable=None):
        try:
            data = picture.file.read_bytes()
            content = hashlib.sha256(data).hexdigest()
            files = [folder / f"{digest(content, targets, look, vae_id)}.safetensors" for look in range(looks)]
            image = None if all(file.exists() for file in files) else decode(data)
        except (OSError, ValueError) as error:
            print(f"{picture.file}: skipped, {error}")
            skipped += 1
            continue
        for file in files:
            if not file.exists():
                pixels, size_ids = crop(image, nearest(image, targets), random.Random(file.stem))
                mean, std = vae.moments(pixels[None].to(device))  # (1, 4, h, w) each
                if not all_finite(mean + std):
                    raise ValueError(
                        f"{picture.file}: latent is not finite; SDXL's VAE overflows in float16, use float32"
                    )
                write_tensors(file, {"mean": mean[0], "std": std[0]}, {"size_ids": json.dumps(size_ids)})
            header, metadata = read_header(file)
            shape = header["mean"].shape[1:]
            examples += [Example(file, picture.caption, json.loads(metadata["size_ids"]), shape)] * picture.repeats
    if skipped:
        print(f"{skipped} of {len(pictures)} pictures skipped")
    if not examples:
        raise ValueError(f"{len(pictures)} pictures, and none can be read; first: {pictures[0].file}")
    return examples


@torch.no_grad()
def cache_text(text: TextEncoder, text_id: str, captions: list[str], folder: Path) -> dict[str, Path]:
    """Each caption, and "" as null condition, in a file named by the hash of it and `text_id`; -> {caption: file}."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {c: folder / f"{digest(c or None, text_id)}.safetensors" for c in dict.fromkeys(["", *captions])}
    for caption, file in tqdm(files.items(), desc="captions", disable=None):
        if not file.exists():
            context, vector = text.encode_captions([caption])
            pooled = {} if vector is None else {"pooled": vector[0, : -6 * 256]}  # sizes are the picture's
            write_tensors(file, {"context": context[0]} | pooled, {"caption": caption})
    return files


def read_cond(files: dict[str, Path], captions: list[str], size_ids: Tensor) -> Cond:
    """Cond of b captions out of `cache_text`, for SDXL with their pictures' size ids (b, 6)."""
    tensors = [read_tensors(files[caption])[0] for caption in captions]
    context = torch.stack([x["context"] for x in tensors])  # (b, n, d)
    if "pooled" not in tensors[0]:
        return Cond(context)
    return Cond(context, add_size(torch.stack([x["pooled"] for x in tensors]), size_ids))


# ---- drawn in batches


def plan(
    shapes: list[tuple[int, int]], batch: int, seed: int, start: int
) -> Iterator[tuple[list[int], random.Random, torch.Generator]]:
    """(examples, rng, generator) of step start, start + 1, ...: what is in its batch, and all its randomness.

    Examples of one shape are a bucket, and a batch is of one bucket. A bucket is an endless line of permutations of
    itself, cut into batches: what one epoch leaves over begins the next one's first batch, nothing is dropped. An
    epoch takes the batches that begin in it, in random order of buckets. Everything is a function of (seed, step).
    """
    members = [[i for i, shape in enumerate(shapes) if shape == bucket] for bucket in sorted(set(shapes))]

    def before(epoch: int) -> list[int]:
        """Batches of each bucket that begin before this epoch."""
        return [-(-epoch * len(m) // batch) for m in members]

    epoch = start * batch // len(shapes)  # or an earlier one: e m / batch is rounded up in each bucket
    while sum(before(epoch)) > start:
        epoch -= 1
    while True:
        done, end = before(epoch), before(epoch + 1)
        first = sum(done)
        turns = [k for k in range(len(members)) for _ in range(done[k], end[k])]
        random.Random(f"{seed} epoch {epoch}").shuffle(turns)
        for step, k in enumerate(turns, first):
            line = range(done[k] * batch, (done[k] + 1) * batch)
            done[k] += 1
            if step < start:
                continue
            rng = random.Random(f"{seed} {step}")
            generator = torch.Generator().manual_seed(rng.getrandbits(62))
            index, m = [], len(members[k])
            for i in line:  # the i-th example of this bucket in the whole run
                if not index or i % m == 0:
                    permuted = torch.Generator().manual_seed(seed * 1_000_003 + i // m + (k << 40))
                    order = torch.randperm(m, generator=permuted)
                index.append(members[k][order[i % m]])
            yield index, rng, generator
        epoch += 1


def batches(
    cache: list[Example], batch: int, seed: int, start: int = 0, rank: int = 0, world: int = 1, drop: float = 0.0
) -> Iterator[tuple[Tensor, list[str], Tensor, torch.Generator]]:
    """(z0 (b, 4, h, w), captions, size ids (b, 6), generator) for step = start, start + 1, ...; order: see `plan`.

    Everything random of a step comes from (seed, step): a resumed run needs its step number only. Rank r of `world`
    gets rows r b to (r + 1) b of the batch that one process with batch = world b would draw, noise and all; the
    generator, then, is the same on all ranks. A share `drop` of the captions is "", for classifier-free guidance.
    """
    rows = slice(rank * batch, (rank + 1) * batch)
    for index, rng, generator in plan([x.shape for x in cache], batch * world, seed, start):
        captions = ["" if rng.random() < drop else cache[i].caption for i in index][rows]
        examples = [cache[i] for i in index[rows]]
        tensors = [read_tensors(x.file)[0] for x in examples]
        mean, std = (torch.stack([x[name] for x in tensors]) for name in ("mean", "std"))
        noise = torch.randn(len(index), *mean.shape[1:], generator=generator)[rows]
        yield mean + std * noise, captions, torch.tensor([x.size_ids for x in examples]), generator
