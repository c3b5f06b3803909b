"""Pictures and captions encoded once, for later runs too; or pictures that the model draws."""

import hashlib
import json
import random
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..files.checkpoint import Model
from ..files.safetensors_file import all_finite, read_header, read_tensors, write_tensors
from ..generate import generate
from ..model.precision import autocast, forward_dtype, resident
from ..model.text import TextEncoder, add_size
from ..model.unet import Cond
from ..model.vae import VAE
from ..schedule import make_schedule
from ..solver import guided_eps
from .folders import Picture
from .pictures import Target, crop, nearest, open_picture


class Example(NamedTuple):
    """An encoded picture: mean and std of q(z|x), so that every step draws a fresh latent."""

    file: Path  # safetensors: mean and std, (4, h, w) each
    caption: str
    size_ids: list[int]  # SDXL's: original (h, w), crop (top, left), target (h, w)
    shape: tuple[int, int]  # (h, w) of the latent


def digest(*what) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


@torch.no_grad()
def cache_latents(
    vae: VAE,
    vae_id: str,
    pictures: list[Picture],
    folder: Path,
    targets: list[Target],
    looks: int = 1,
    device: str | torch.device = "cpu",
) -> list[Example]:
    """Each picture cut to the nearest of `targets` (h, w) and encoded, `looks` times; -> an epoch.

    `vae_id` identifies the VAE, for example by its file's sha256. A look is kept as a file in
    `folder`, named by a hash of the picture's bytes, targets, look and `vae_id`; if that file
    exists, nothing is encoded. Prints which pictures are unreadable, and skipped, and whether much
    is cut off. Raises ValueError if none is readable, or a latent is not finite.
    """
    examples, skipped = [], 0
    for picture in tqdm(pictures, desc="latents", disable=None):
        try:
            data = picture.file.read_bytes()
            content = hashlib.sha256(data).hexdigest()
            names = [digest(content, targets, look, vae_id) for look in range(looks)]
            files = [folder / f"{name}.safetensors" for name in names]
            image = None if all(file.exists() for file in files) else open_picture(data)
        except (OSError, ValueError) as error:
            print(f"{picture.file}: skipped, {error}")
            skipped += 1
            continue
        for file in files:
            if not file.exists():
                pixels, size_ids = crop(image, nearest(image, targets), random.Random(file.stem))
                mean, std = vae.moments(pixels[None].to(device))  # (1, 4, h, w) each
                if not all_finite(mean + std):
                    what = "latent is not finite; SDXL's VAE needs float32"
                    raise ValueError(f"{picture.file}: {what}")
                folder.mkdir(parents=True, exist_ok=True)
                ids = {"size_ids": json.dumps(size_ids)}
                write_tensors(file, {"mean": mean[0], "std": std[0]}, ids)
            header, metadata = read_header(file)
            shape = header["mean"].shape[1:]
            example = Example(file, picture.caption, json.loads(metadata["size_ids"]), shape)
            examples += [example] * picture.repeats
    if skipped:
        print(f"{skipped} of {len(pictures)} pictures skipped")
    if not examples:
        raise ValueError(f"none of {len(pictures)} pictures can be read, first: {pictures[0].file}")
    say_what_is_cut_off([example.size_ids for example in examples])
    return examples


@torch.no_grad()
def draw_latents(
    model: Model,
    model_id: str,
    prompts: list[str],
    folder: Path,
    size: int,
    looks: int = 1,
    device: str = "cpu",
) -> list[Example]:
    """Each prompt drawn `looks` times by the model itself, with its own guidance, in 25 DDIM steps;
    -> an epoch. A teacher whose training pictures are not to be had is distilled on these.

    Files as in `cache_latents`, with std 0. A drawing's seed and its file's name are a hash of
    prompt, look, size and model, so a drawing that exists is not drawn again. Raises ValueError if
    one is not finite.
    """
    unet, text, square = model.unet, model.text, (size, size)
    side, w = size // model.vae.factor, model.config.guidance - 1
    null_cond, schedule = text.null_cond(1, square), make_schedule(unet.cfg.v, unet.cfg.zero_snr)
    # in mixed precision, as in training; a large model's float16 as it is
    is_wide = next(unet.parameters()).dtype == torch.float32
    half = forward_dtype(device) if is_wide else torch.float32
    ids, examples = [*square, 0, 0, *square], []
    with resident(unet, device):
        for prompt, look in tqdm(list(product(prompts, range(looks))), "drawings", disable=None):
            name = digest(prompt, look, size, w, unet.cfg.v, unet.cfg.zero_snr, model_id)
            file, seed = folder / f"{name}.safetensors", int(name[:16], 16)
            if not file.exists():
                # one at a time: a batch rounds differently
                eps_fn = guided_eps(unet, text.encode([prompt], square), null_cond, w)
                how = dict(steps=25, device=device, schedule=schedule)
                with autocast(device, half):
                    z0 = generate(eps_fn, [seed], (4, side, side), "ddim", **how)[0]
                if not all_finite(z0):
                    raise ValueError(f"{prompt!r}: what the model draws is not finite")
                folder.mkdir(parents=True, exist_ok=True)
                write_tensors(file, {"mean": z0, "std": torch.zeros_like(z0)}, {"caption": prompt})
            examples.append(Example(file, prompt, ids, (side, side)))
    return examples


def say_what_is_cut_off(size_ids: list[list[int]]) -> None:
    """A line, if a fifth or more of some picture is outside its cut, as of a portrait's square."""
    zooms = [sorted((h / H, w / W)) for H, W, _, _, h, w in size_ids]  # smaller, larger
    outside = [1 - low / high for low, high in zooms]
    if max(outside) >= 0.2:
        n, most = sum(x >= 0.2 for x in outside), round(100 * max(outside))
        what = f"{n} of {len(outside)} cuts leave out up to {most} % of their picture"
        print(f"{what}, at random sides; crop it yourself to choose what is seen")


@torch.no_grad()
def cache_text(
    text: TextEncoder, text_id: str, captions: list[str], folder: Path
) -> dict[str, Path]:
    """{caption: file} of each caption and of "", named by a hash of the caption and `text_id`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {caption: digest(caption or None, text_id) for caption in ["", *captions]}
    files = {caption: folder / f"{name}.safetensors" for caption, name in names.items()}
    for caption, file in tqdm(files.items(), desc="captions", disable=None):
        if not file.exists():
            context, vector = text.encode_captions([caption])
            # the size ids, at the end of the vector, belong to the picture
            pooled = {} if vector is None else {"pooled": vector[0, : -6 * 256]}
            write_tensors(file, {"context": context[0]} | pooled, {"caption": caption})
    return files


def read_cond(files: dict[str, Path], captions: list[str], size_ids: Tensor) -> Cond:
    """The Cond of b captions from the files of `cache_text`; for SDXL with size ids (b, 6)."""
    tensors = [read_tensors(files[caption])[0] for caption in captions]
    context = torch.stack([x["context"] for x in tensors])  # (b, n, d)
    if "pooled" not in tensors[0]:
        return Cond(context)
    return Cond(context, add_size(torch.stack([x["pooled"] for x in tensors]), size_ids))
