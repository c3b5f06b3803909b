"""Pictures with captions out of webdataset tar shards, read from front to back as they lie: nothing is unpacked."""

import json
import random
import re
import signal
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .folders import PICTURES, crop, nearest
from .pictures import decode


class Sample(NamedTuple):
    """A picture of a shard; a stream with skip = position goes on after it."""

    pixels: Tensor  # (3, h, w) in [-1, 1]
    caption: str
    size_ids: Tensor  # (6,)
    position: int


def members(shard: Path) -> Iterator[tuple[str, str, bytes]]:
    """(name, suffix, bytes) of each file in a tar, read from front to back up to where it is damaged."""
    try:
        with tarfile.open(shard, "r|") as tar:
            for member in tar:
                match = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]+)", member.name)
                if member.isfile() and match:
                    yield match[1], match[2].lower(), tar.extractfile(member).read()
        with open(shard, "rb") as f:  # tarfile ends without a word at a header that is damaged or cut off
            f.seek(tar.offset)
            if f.read(512).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except (OSError, tarfile.TarError) as error:
        print(f"{shard}: damaged, the rest is skipped ({' '.join(str(error).split())})")


def read_shard(shard: Path) -> Iterator[tuple[str, bytes, str]]:
    """(name, picture's bytes, caption) of each sample of a webdataset shard: files of one name lie together.

    A sample without a picture or a caption is named and left out.
    """
    for name, group in groupby(members(shard), key=lambda member: member[0]):
        parts = {suffix: data for _, suffix, data in group}
        try:
            picture = next(parts[x[1:]] for x in PICTURES if x[1:] in parts)
            meta = {} if "txt" in parts else json.loads(parts["json"])
            caption = parts["txt"].decode() if "txt" in parts else meta.get("caption") or meta["text"]
            yield name, picture, " ".join(caption.split())
        except (StopIteration, ValueError, KeyError, AttributeError):
            print(f"{shard}: {name} skipped, it needs a picture and a caption in .txt or .json")


def shuffled(samples: Iterator, buffer: int, rng: random.Random) -> Iterator:
    """Each sample once, at random out of the `buffer` that are held at a time."""
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
        raise ValueError(f"{len(shards)} shards for {readers} readers; give each reader one, or fewer workers")
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise ValueError(f"{missing[0]}: no such file")


def stream(
    shards: list[Path],
    targets: list[tuple[int, int]],
    rank: int = 0,
    world: int = 1,
    worker: int = 0,
    workers: int = 1,
    seed: int = 0,
    skip: int = 0,
    buffer: int = 1000,
) -> Iterator[Sample]:
    """Samples of webdataset .tar shards, without end: NAME.jpg beside NAME.txt, or NAME.json with caption.

    Each of world * workers readers has shards of its own and sees each sample once an epoch. A sample's position counts
    what was taken before it, so `skip` reads over them without decoding, and over whole epochs without reading. What
    is damaged is named and left out. Raises ValueError: a shard is missing, there are too few, or none has a picture.
    """
    check_shards(shards, world * workers)
    mine = sorted(shards)[rank * workers + worker :: world * workers]
    position = epoch = 0
    while True:
        begin, good = position, position < skip
        rng = random.Random(f"{seed} {rank} {worker} {epoch}")
        samples = ((shard, *sample) for shard in rng.sample(mine, len(mine)) for sample in read_shard(shard))
        for shard, name, data, caption in shuffled(samples, buffer, rng):
            position += 1
            if position <= skip:
                continue
            try:
                image = decode(data)
            except ValueError as error:
                print(f"{shard}: {name} skipped, {error}")
                continue
            good = True
            pixels, size_ids = crop(image, nearest(image, targets), random.Random(f"{seed} {rank} {worker} {position}"))
            yield Sample(pixels, caption, torch.tensor(size_ids), position)
        if not good or position == begin:
            raise ValueError(f"{mine[0]} and {len(mine) - 1} more: not one sample can be read")
        epoch += 1
        if position < skip:
            whole = (skip - position) // (position - begin)
            position, epoch = position + whole * (position - begin), epoch + whole


class Shards(IterableDataset):
    """`stream` for torch.utils.data.DataLoader, whose worker i takes the part of worker (first + i) % workers."""

    def __init__(self, shards: list[Path], targets, rank: int, world: int, seed: int, skip: list[int], first: int):
        self.shards, self.targets, self.rank, self.world = shards, targets, rank, world
        self.seed, self.skip, self.first = seed, skip, first

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker = (self.first + info.id) % info.num_workers
        at, readers = self.skip[worker], info.num_workers
        return stream(self.shards, self.targets, self.rank, self.world, worker, readers, self.seed, at)


def columns(samples: list[Sample]) -> Sample:
    """b samples as one, with a list of b in each place."""
    return Sample(*(list(column) for column in zip(*samples)))


def in_one_line(loader: DataLoader) -> Iterator[Sample]:
    """The batches; a reader's error without the traceback that DataLoader puts before it."""
    try:
        yield from loader
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


def leave_ctrl_c(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its step, saves, and ends the workers


@torch.no_grad()
def stream_batches(
    vae,
    shards: list[Path],
    size: int,
    batch: int,
    seed: int,
    start: int,
    rank: int,
    world: int,
    positions: list[int],
    drop: float = 0.0,
) -> Iterator[tuple[Tensor, list[str], Tensor, torch.Generator]]:
    """(z0 (b, 4, h, w), captions, size ids (b, 6), generator) as `data.batches` gives, out of shards, encoded as read.

    `positions`: of each reading process, 0 at first, moved on when a batch of it is taken; with those of then, a later
    call goes on at `start`. The processes take turns, batch by batch. Pictures are squares of `size`, cut anywhere. A
    share `drop` of the captions is "". Raises ValueError as `stream` does.
    """
    check_shards(shards, world * len(positions))
    workers, device = len(positions), next(vae.parameters()).device
    data = Shards(shards, [(size, size)], rank, world, seed, list(positions), start % workers)
    loader = DataLoader(data, batch, num_workers=workers, collate_fn=columns, worker_init_fn=leave_ctrl_c)
    for step, samples in enumerate(in_one_line(loader), start):
        rng = random.Random(f"{seed} {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        dropped = [rng.random() < drop for _ in range(world * batch)][rank * batch : (rank + 1) * batch]
        captions = ["" if gone else caption for gone, caption in zip(dropped, samples.caption)]
        moments = [vae.moments(pixels[None].to(device)) for pixels in samples.pixels]  # one at a time: less memory
        mean, std = (torch.cat(x) for x in zip(*moments))  # (b, 4, h, w) each
        noise = torch.randn(world * batch, *mean.shape[1:], generator=generator)[rank * batch : (rank + 1) * batch]
        positions[step % workers] = samples.position[-1]
        yield mean + std * noise.to(device), captions, torch.stack(samples.size_ids), generator
