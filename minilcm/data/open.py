"""What is behind --data: shards, pictures, prompts, the emoji art; all give the same batches."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from ..files.checkpoint import Model
from ..files.identify import Config
from ..model.text import TextEncoder, with_sizes
from ..model.unet import Cond
from ..model.vae import VAE
from .batches import Batch, batches
from .emoji import art_batches, cache_art, is_art, read_art, split_art
from .folders import Picture, read_pictures, read_prompts
from .latents import (
    cache_latents,
    cache_text,
    digest,
    draw_latents,
    read_cond,
    say_what_is_cut_off,
)
from .pictures import buckets, picture_suffixes
from .shards import stream_batches


class Source(NamedTuple):
    """What is behind --data: shards, pictures or prompts."""

    path: Path
    shards: list[Path]
    pictures: list[Picture]
    prompts: list[str] = []

    def identity(self) -> str:
        """The same wherever the files lie: of names, sizes and captions, and how shards begin."""
        if self.prompts:
            return f"{len(self.prompts)} prompts, digest {digest(self.prompts)[:10]}"
        of_art = self.path.glob("held_out.txt")
        files = [*self.shards, *of_art] if self.shards else [x.file for x in self.pictures]
        sizes = [(file.name, file.stat().st_size) for file in files]
        said = [(x.caption, x.repeats) for x in self.pictures]
        for file in self.shards:  # tars have sizes in steps of 10 kB
            with open(file, "rb") as f:
                said.append(digest(f.read(1 << 16).hex()))
        return f"{len(files)} files, digest {digest(sizes, said)[:10]}"


class Reading(NamedTuple):
    """How pictures are cut, encoded and drawn in batches."""

    size: int  # width and height in pixels; SDXL's buckets have this area
    batch: int
    looks: int  # how often a picture is cut, or a drawing composed, and encoded
    workers: int  # processes that read shards
    seed: int
    drop: float  # share of captions replaced by "", by which the null condition is learned, too
    device: str
    process: int = 0
    world: int = 1


class Data(NamedTuple):
    """What is trained on."""

    prompts: list[str]  # eight captions, for the sheet
    # (seed, start) -> (z0 (b, 4, h, w), captions, size ids (b, 6), generator), ...
    batches: Callable[..., Iterator]
    cond_of: Callable[[list[str], Tensor], Cond]  # (captions, size ids)
    positions: list[int]  # of each worker in its shards
    idle: list[nn.Module]  # networks that are only needed again for sheets

    def on_device(self, device: str, null_cond: Cond, seed: int, start: int = 0) -> Iterator[Batch]:
        """Batches on the device, with their conditions."""
        for z0, captions, size_ids, generator in self.batches(seed, start):
            z0 = z0.pin_memory() if device == "cuda" else z0
            cond, null = self.cond_of(captions, size_ids), with_sizes(null_cond, size_ids)
            yield Batch(z0.to(device, non_blocking=True), cond, null, generator, captions)

    def free(self) -> None:
        """Idle networks leave the GPU."""
        for module in self.idle:
            module.cpu()


def find_data(path: Path) -> Source:
    """Find out what `path` is. Raises ValueError as `read_pictures`, or if it holds both kinds."""
    suffix = path.suffix.lower()
    if suffix in (".tar", ".txt"):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        if suffix == ".txt":
            return Source(path, [], [], read_prompts(path))
        return Source(path, [path], [])
    if not (shards := sorted(path.glob("*.tar"))):
        return Source(path, [], read_pictures(path))
    if beside := [f for f in path.glob("[!.]*") if f.suffix.lower() in picture_suffixes()]:
        both = f"{shards[0].name} and {beside[0].name}"
        raise ValueError(f"{path}: has shards and pictures, {both}; give them a folder each")
    return Source(path, shards, [])


def open_data(source: Source, model: Model, model_sha256: str, cache: Path, how: Reading) -> Data:
    """Pictures and art are encoded here and prompts drawn, into `cache`, shards while training."""
    (path, shards, pictures, prompts), (_, vae, text, config) = source, model
    if shards and is_art(shards[0]):
        return open_art(path, vae, text, config, how)
    if shards:
        return open_shards(shards, vae, text, how)
    if prompts:
        captions, rest = prompts, (how.size, how.looks, how.device)
        latents = draw_latents(model, model_sha256, prompts, cache, *rest)
    else:
        captions = [p.caption for p in pictures]
        targets = buckets(how.size) if config.unet.adm else [(how.size, how.size)]
        latents = cache_latents(vae, model_sha256, pictures, cache, targets, how.looks, how.device)
    texts = cache_text(text, model_sha256, captions, cache)

    def drawn(seed: int, start: int = 0) -> Iterator:
        return batches(latents, how.batch, seed, start, how.process, how.world, how.drop)

    def cond_of(captions: list[str], size_ids: Tensor) -> Cond:
        return read_cond(texts, captions, size_ids).to(how.device)

    return Data(eight(captions), drawn, cond_of, [], [vae, text])


def open_shards(shards: list[Path], vae: VAE, text: TextEncoder, how: Reading) -> Data:
    positions = [0] * how.workers

    def streamed(seed: int, start: int = 0) -> Iterator:
        at = positions if seed == how.seed else [0] * how.workers
        place = how.process, how.world, at, how.drop
        return stream_batches(vae, shards, how.size, how.batch, seed, start, *place)

    _, captions, size_ids, _ = next(streamed(-1))
    say_what_is_cut_off(size_ids.tolist())
    return Data(eight(captions), streamed, partial(encode, text), positions, [])


def open_art(path: Path, vae: VAE, text: TextEncoder, config: Config, how: Reading) -> Data:
    """The drawings that are not held out, of the names that the model knows."""
    art = read_art(path)
    if (path / "held_out.txt").exists():
        art, _ = split_art(art, path / "held_out.txt", list(config.names) or None)
    elif config.names:
        art = [a for a in art if a.name in config.names]
    if not art:
        raise ValueError(f"{path}: none of its drawings has a name that the model knows")
    cache = cache_art(vae, art, how.size, how.looks, how.seed, how.device)
    captions = [f"{a.name}, {a.style} style" if a.style else a.name for a in art]

    def drawn(seed: int, start: int = 0) -> Iterator:
        return art_batches(cache, how.batch, seed, start, how.process, how.world, how.drop)

    return Data(eight(captions), drawn, partial(encode, text), [], [vae])


def encode(text: TextEncoder, captions: list[str], size_ids: Tensor) -> Cond:
    return with_sizes(text.encode_captions(captions), size_ids)


def eight(captions: list[str]) -> list[str]:
    """Eight captions, spread evenly, some of them twice if there are fewer."""
    return (captions[:: max(1, len(captions) // 8)] * 8)[:8]
