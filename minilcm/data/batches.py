"""Which examples a training step sees, and all of its randomness: a function of (seed, step).

A resumed run needs only its step, and a seed gives the same run on any number of processes.
"""

import random
from collections.abc import Iterator
from queue import Queue
from threading import Thread
from typing import NamedTuple

import torch
from torch import Tensor

from ..files.safetensors_file import read_tensors
from ..model.unet import Cond
from .latents import Example


class Batch(NamedTuple):
    """What a step learns from, on the device."""

    z0: Tensor  # (b, 4, h, w)
    cond: Cond
    null_cond: Cond
    generator: torch.Generator
    captions: list[str]


def batch_order(
    shapes: list[tuple[int, int]], batch: int, seed: int, start: int
) -> Iterator[tuple[list[int], random.Random, torch.Generator]]:
    """(indices of examples, rng, generator) of step start, start + 1, ...: all of its randomness.

    Examples of one shape form a bucket, and all examples of a batch are from one bucket. Every
    bucket is an endless sequence of its own permutations, cut into batches: what is left over from
    one epoch begins the next one's first batch, and nothing is dropped. An epoch takes the batches
    that begin in it, in random order of buckets.
    """
    # of each bucket
    members = [[i for i, x in enumerate(shapes) if x == shape] for shape in sorted(set(shapes))]

    def before(epoch: int) -> list[int]:
        """Batches of each bucket that begin before this epoch."""
        return [-(-epoch * len(m) // batch) for m in members]

    epoch = start * batch // len(shapes)
    while sum(before(epoch)) > start:  # each bucket rounds its batches up
        epoch -= 1
    while True:
        done, end = before(epoch), before(epoch + 1)
        first = sum(done)
        turns = [bucket for bucket in range(len(members)) for _ in range(done[bucket], end[bucket])]
        random.Random(f"{seed} epoch {epoch}").shuffle(turns)
        for step, bucket in enumerate(turns, first):
            places = range(done[bucket] * batch, (done[bucket] + 1) * batch)
            done[bucket] += 1
            if step < start:
                continue
            rng = random.Random(f"{seed} {step}")
            generator = torch.Generator().manual_seed(rng.getrandbits(62))
            index, m = [], len(members[bucket])
            for i in places:  # the i-th example of this bucket in the whole run
                if not index or i % m == 0:
                    # of a CPU generator's seed only the lower 32 bits count
                    mixed = seed * 1_000_003 + i // m + bucket * 10_000_019
                    permuted = torch.Generator().manual_seed(mixed % 2**64)
                    order = torch.randperm(m, generator=permuted)
                index.append(members[bucket][order[i % m]])
            yield index, rng, generator
        epoch += 1


def in_background(items: Iterator, ahead: int = 2) -> Iterator:
    """The same items, made early by a thread, at most `ahead` of them: a GPU need not wait."""
    made = Queue(ahead)

    def make() -> None:
        try:
            for item in items:
                made.put(item)
            made.put(None)
        except Exception as error:  # raised where the item is asked for
            made.put(error)

    Thread(target=make, daemon=True).start()
    while (item := made.get()) is not None:
        if isinstance(item, Exception):
            raise item
        yield item


def batches(
    cache: list[Example],
    batch: int,
    seed: int,
    start: int = 0,
    process: int = 0,
    world: int = 1,
    drop: float = 0.0,
) -> Iterator[tuple[Tensor, list[str], Tensor, torch.Generator]]:
    """(z0 (b, 4, h, w), captions, size ids (b, 6), generator) of step start, start + 1, ...

    Process p of `world` gets rows p b to (p + 1) b of the batch that one process with batch = world
    b would draw, noise included; so the generator is in the same state on all of them. A share
    `drop` of the captions is replaced by "", which classifier-free guidance needs.
    """
    rows = slice(process * batch, (process + 1) * batch)
    for index, rng, generator in batch_order([x.shape for x in cache], batch * world, seed, start):
        captions = ["" if rng.random() < drop else cache[i].caption for i in index][rows]
        examples = [cache[i] for i in index[rows]]
        tensors = [read_tensors(x.file)[0] for x in examples]
        mean, std = (torch.stack([x[name] for x in tensors]) for name in ("mean", "std"))
        noise = torch.randn(len(index), *mean.shape[1:], generator=generator)[rows]
        yield mean + std * noise, captions, torch.tensor([x.size_ids for x in examples]), generator
