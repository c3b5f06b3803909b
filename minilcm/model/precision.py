"""Where a network sits, in which number format, and how many bytes a training step will take."""

import functools
import resource
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from .layers import ResBlock, TransformerBlock


def default_dtype(device: str | torch.device) -> torch.dtype:
    """The fastest safe dtype: float16 on CUDA; on a CPU bfloat16 if it has the instructions, else float32.

    A CPU without them emulates bfloat16 and float16, some 170 times slower than float32.
    """
    if torch.device(device).type == "cuda":
        return torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


@contextmanager
def resident(module: nn.Module, device: str | torch.device) -> Iterator[nn.Module]:
    """The module on `device` for one block, then back on the CPU: of three networks, only one is on the card."""
    try:
        yield module.to(device)
    finally:
        if torch.device(device).type != "cpu":
            module.to("cpu")


def add_checkpointing(unet: nn.Module) -> None:
    """Gradient checkpointing (1604.06174): keep only the inputs of each ResBlock and transformer block.

    The backward pass computes the inside once more: about a third more work, a fraction of the activations. Without
    gradients, as for teacher and target, nothing changes.
    """
    for block in unet.modules():
        if isinstance(block, ResBlock | TransformerBlock):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def tensors_in(x) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results: torch's own tree_leaves takes several times as long."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for part in x:
            yield from tensors_in(part)


class LiveBytes(TorchDispatchMode):
    """Inside the block: bytes of the tensors that were made in it and are alive, `now` and at the `peak`.

    Sees every operation below autograd, so temporaries and what the graph keeps count; views share their storage. On
    real tensors and on fake ones, which have shapes and no memory (FakeTensorMode).
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, int] = {}  # {storage: bytes}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in tensors_in((args, *(kwargs or {}).values()))}
        for x in tensors_in(out):
            storage = x.untyped_storage()
            if storage._cdata not in old and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, storage: int) -> None:
        self.now -= self.alive.pop(storage)


def peak_bytes(device: str) -> int:
    """The most that this process has held so far, on the card or in main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size_of(tensors) -> int:
    """Bytes of an iterable of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)
