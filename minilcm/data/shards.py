"""Captioned pictures from webdataset tar shards, streamed from front to back, never unpacked."""

import json
import random
import re
import signal
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..model.vae import VAE
from .folders import decoded, one_line
from .pictures import Target, crop, nearest, open_picture, picture_suffixes


class Sample(NamedTuple):
    """A picture from a shard; a stream with skip = position continues after it."""

    pixels: Tensor  # (3, h, w) in [-1, 1]
    caption: str
    size_ids: Tensor  # (6,)
    position: int


def members(shard: Path) -> Iterator[tuple[str, str, bytes]]:
    """(name, suffix, bytes) of each file in a tar, front to back, up to where it is damaged."""
    try:
        with tarfile.open(shard, "r|") as tar:
            for member in tar:
                match = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]+)", member.name)
                if member.isfile() and match:
                    yield match[1], match[2].lower(), tar.extractfile(member).read()
        with open(shard, "rb") as f:  # tarfile stops silently at a damaged or truncated header
            f.seek(tar.offset)
            if f.read(512).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except (OSError, tarfile.TarError) as error:
        print(f"{shard}: damaged, the rest is skipped ({' '.join(str(error).split())})")


def read_shard(shard: Path) -> Iterator[tuple[str, bytes, str]]:
    """(name, picture's bytes, caption) of each sample whose adjacent files hold both."""
    kinds = picture_suffixes()
    for name, group in groupby(members(shard), key=lambda member: member[0]):
        parts = {suffix: data for _, suffix, data in group}
        try:
            picture = next(data for suffix, data in parts.items() if f".{suffix}" in kinds)
            if "txt" in parts:
                caption = decoded(parts["txt"])
            else:
                meta = json.loads(decoded(parts["json"]))
                caption = meta.get("caption") or meta["text"]
            yield name, picture, one_line(caption)
        except (StopIteration, ValueError, KeyError, AttributeError):
            print(f"{shard}: {name} skipped, it needs a picture and a caption in .txt or .json")


def shuffled(samples: Iterator, buffer: int, rng: random.Random) -> Iterator:
    """Each sample once, drawn at random from a buffer of `buffer` samples."""
    held = []
    for sample in samples:
        held.append(sample)
        if len(held) > buffer:
            i = rng.randrange(len(held))
            held[i], held[-1] = held[-1], held[i]
            yield held.pop()
    rng.shuffle(held)
    yield from held


def check_shards(shards: list[Path], readers: int) -> None:
    if len(shards) < readers:
        count = f"{len(shards)} shards for {readers} readers"
        raise ValueError(f"{count}; give each reader one, or fewer workers")
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise ValueError(f"{missing[0]}: no such file")


def stream(
    shards: list[Path],
    targets: list[Target],
    process: int = 0,
    world: int = 1,
    worker: int = 0,
    workers: int = 1,
    seed: int = 0,
    skip: int = 0,
    buffer: int = 1000,
) -> Iterator[Sample]:
    """Endless samples of webdataset .tar shards: NAME.jpg beside NAME.txt or NAME.json.

    Each of world * workers readers has its own shards and sees each sample once per epoch. A
    sample's position counts the samples up to it, so `skip` passes over them without decoding, and
    over whole epochs without reading. What is damaged is reported and skipped. Raises ValueError if
    a shard is missing, there are too few, or none has a picture.
    """
    check_shards(shards, world * workers)
    mine = sorted(shards)[process * workers + worker :: world * workers]
    position = epoch = 0
    while True:
        begin, good = position, position < skip
        rng = random.Random(f"{seed} {process} {worker} {epoch}")
        order = rng.sample(mine, len(mine))
        samples = ((shard, *sample) for shard in order for sample in read_shard(shard))
        for shard, name, data, caption in shuffled(samples, buffer, rng):
            position += 1
            if position <= skip:
                continue
            try:
                image = open_picture(data)
            except ValueError as error:
                print(f"{shard}: {name} skipped, {error}")
                continue
            good = True
            place = random.Random(f"{seed} {process} {worker} {position}")
            pixels, size_ids = crop(image, nearest(image, targets), place)
            yield Sample(pixels, caption, torch.tensor(size_ids), position)
        if not good or position == begin:
            raise ValueError(f"{mine[0]} and {len(mine) - 1} more: no sample can be read")
        epoch += 1
        if position < skip:
            whole = (skip - position) // (position - begin)
            position, epoch = position + whole * (position - begin), epoch + whole


class Shards(IterableDataset):
    """`stream` as DataLoader needs it: its worker i reads the part of (first + i) % workers.

    DataLoader begins with worker 0; in a resumed run it is the turn of `first`.
    """

    def __init__(self, stream: Callable[..., Iterator[Sample]], skip: list[int], first: int):
        self.stream, self.skip, self.first = stream, skip, first

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker = (self.first + info.id) % info.num_workers
        return self.stream(worker=worker, workers=info.num_workers, skip=self.skip[worker])


def in_one_line(loader: DataLoader) -> Iterator[list[Sample]]:
    """The batches; an error of a reader in one line, without the traceback that DataLoader adds."""
    try:
        yield from loader
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


def ignore_ctrl_c(worker: int) -> None:
    """The main process finishes its step, saves, and stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@torch.no_grad()
def stream_batches(
    vae: VAE,
    shards: list[Path],
    size: int,
    batch: int,
    seed: int,
    start: int,
    process: int,
    world: int,
    positions: list[int],
    drop: float = 0.0,
) -> Iterator[tuple[Tensor, list[str], Tensor, torch.Generator]]:
    """(z0 (b, 4, h, w), captions, size ids (b, 6), generator) like `batches.batches`, from shards.

    `positions` holds the position of each worker, 0 at first, and is updated when one of its
    batches is taken; a call with the saved positions continues at `start`. Workers take turns,
    batch by batch. Pictures are squares of `size`, cut at random. A share `drop` of the captions is
    replaced by "". Raises ValueError as `stream` does.
    """
    check_shards(shards, world * len(positions))
    workers, device = len(positions), next(vae.parameters()).device
    own = partial(stream, shards, [(size, size)], process, world, seed=seed)
    data = Shards(own, list(positions), start % workers)
    how = dict(collate_fn=list, worker_init_fn=ignore_ctrl_c)
    loader = DataLoader(data, batch, num_workers=workers, **how)
    rows = slice(process * batch, (process + 1) * batch)
    for step, samples in enumerate(in_one_line(loader), start):
        pixels, captions, size_ids, position = zip(*samples)
        rng = random.Random(f"{seed} {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        dropped = [rng.random() < drop for _ in range(world * batch)][rows]
        captions = ["" if gone else caption for gone, caption in zip(dropped, captions)]
        moments = [vae.moments(x[None].to(device)) for x in pixels]  # one at a time: less memory
        mean, std = (torch.cat(x) for x in zip(*moments))  # (b, 4, h, w) each
        noise = torch.randn(world * batch, *mean.shape[1:], generator=generator)[rows]
        positions[step % workers] = position[-1]
        yield mean + std * noise.to(device), captions, torch.stack(size_ids), generator
