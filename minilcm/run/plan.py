"""Will it fit? The memory of a training step, part by part, before any weight is read.

The real step runs on fake tensors, which have a shape but no memory. They are declared to be on the
CPU, because autograd's backward pass asks for a real GPU; the shapes are the same.
"""

import sys
import weakref
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import get_context
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..files.identify import Config
from ..model.text import N_TOKENS, TextEncoder
from ..model.unet import Cond, UNet
from ..model.vae import VAE
from ..objective import Objective, loss_of, make_networks

# GB, about: the CUDA context; Python, its libraries and the kernels they compile
RUNTIME = {"cuda": 0.5, "cpu": 0.9}


class Step(NamedTuple):
    """What the memory of a training step depends on, besides objective and model."""

    batch: int
    size: int  # width and height of the pictures in pixels
    device: str
    dtype: torch.dtype  # of the forward pass
    average: bool = False  # whether an average of the weights is kept
    accumulate: int = 1  # batches a step


# ---- counting bytes


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside the block that are still alive: `now`, and at the `peak`.

    It sees every operation below autograd, so temporaries and what the graph saves both count;
    views share their storage and count once. Works on real tensors and on fake ones.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, int] = {}  # {storage: bytes}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = (filter(torch.is_tensor, tree_leaves(x)) for x in ((args, kwargs), out))
        old = {x.untyped_storage()._cdata for x in given}
        for x in made:
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
    """The most memory this process has held so far, on the GPU or in main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # which Windows lacks
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def size_of(tensors) -> int:
    """Bytes of an iterable of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


# ---- the plan


def norms_as_on_cuda() -> AbstractContextManager:
    """CUDA's autocast, not the CPU's, normalises in float32 and keeps the widened inputs."""

    def widened(norm):
        return lambda *args: norm(*(a.float() if isinstance(a, Tensor) else a for a in args))

    norms = {"group_norm": widened(F.group_norm), "layer_norm": widened(F.layer_norm)}
    return patch.multiple(F, **norms)


def step_bytes(objective: Objective, config: Config, step: Step) -> tuple[dict[str, int], int]:
    """({part: bytes}, number of trained parameters) of a training step."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet, vae = UNet(config.unet), VAE(config.vae)
        base = sum(x.numel() for x in unet.parameters())
        nets = make_networks(objective, unet, step.dtype)
        trained = [x for x in unet.parameters() if x.requires_grad]
        side = step.size // vae.factor
        z0 = torch.randn(step.batch, 4, side, side)
        vector = torch.randn(step.batch, config.unet.adm) if config.unet.adm else None
        cond = Cond(torch.randn(step.batch, N_TOKENS, config.unet.context_dim), vector)
        with LiveBytes() as live, norms_as_on_cuda() if step.device == "cuda" else nullcontext():
            for _ in range(min(2, step.accumulate)):  # in the second all gradients are there
                loss_of(objective, nets, z0, cond, cond, torch.Generator()).backward()
        gradients = size_of(x.grad for x in trained)
    full, copies = objective.rank is None, 0
    if nets.target_unet:
        copies = size_of(nets.target_unet.parameters()) + base * step.dtype.itemsize
    return {
        "UNet": size_of(x for x in unet.parameters() if full or not x.requires_grad),
        "teacher and target": copies,
        "LoRA": 0 if full else size_of(trained),
        "gradients": gradients,
        "Adam's moments": 2 * size_of(trained),
        "average": size_of(trained) if step.average else 0,
        "pictures to look at": (51 if objective.kind == "lcm" else 1) * 8 * 4 * z0[0].numel(),
        "activations": live.peak - gradients,
    }, sum(x.numel() for x in trained)


def vae_and_text_bytes(config: Config, size: int) -> tuple[int, int, int, int]:
    """Bytes in float32 of VAE, text encoders, encoding a picture and decoding it in tiles."""
    with FakeTensorMode(), torch.no_grad():
        vae, text = VAE(config.vae), TextEncoder(config.text)
        with LiveBytes() as encoding:
            mean, _ = vae.moments(torch.randn(1, 3, size, size))
        with LiveBytes() as decoding:
            vae.decode_tiled(mean, tile=64)
    return size_of(vae.parameters()), size_of(text.parameters()), encoding.peak, decoding.peak


def plan(objective: Objective, config: Config, step: Step, capacity: float = 0.0) -> None:
    """Print the bytes of a step, part by part, and whether `capacity` GB suffice."""
    opposite = objective._replace(checkpointing=not objective.checkpointing)
    # in two processes: fake tensors are slow, and SDXL takes most of a minute
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        job = pool.submit(step_bytes, opposite, config, step)
        parts, count = step_bytes(objective, config, step)
        vae, text, encoding, decoding = vae_and_text_bytes(config, step.size)
        other, _ = job.result()
    on_cpu = vae + text if step.device == "cpu" else 0  # on a GPU they come and go
    without_activations = sum(parts.values()) - parts["activations"] + (on_cpu or vae)
    stages = {
        "before training: VAE, text encoders, encoding": vae + text + encoding,
        "a training step": sum(parts.values()) + on_cpu,
        "drawing a sheet: VAE and decoding in place of activations": without_activations + decoding,
    }
    total = max(stages.values()) / 1e9

    batch, dtype = f"batch {step.batch} x {step.size}x{step.size}", str(step.dtype)[6:]
    how = f"{batch}, {dtype}, checkpointing {'on' if objective.checkpointing else 'off'}"
    print(f"{objective.kind}, {count:,} parameters to train, {how}")
    for part, size_in_bytes in parts.items():
        if size_in_bytes:
            print(f"  {part:20} {size_in_bytes / 1e9:7.2f} GB")
    flag = f"--{'no-' * objective.checkpointing}checkpointing"
    print(f"  activations with {flag} would be {other['activations'] / 1e9:.2f} GB")
    for stage, size_in_bytes in stages.items():
        print(f"{stage}: {size_in_bytes / 1e9:.2f} GB")
    if step.device == "cuda":
        more = f"{(vae + text) / 1e9:.2f} GB more"
        print(f".tar shards are encoded while training, with VAE and text on the GPU: {more}")
    if capacity:
        full = objective.rank is None
        left = capacity - total - RUNTIME[step.device]
        fits = "fits, {:.2f} GB are left" if left >= 0 else "{:.2f} GB are missing"
        more = "--rank N in place of --full" if full else "--quantize, a lower --rank"
        fits = fits.format(abs(left)) + f"; try --batch 1 with --accumulate, {more}" * (left < 0)
        runtime = "CUDA" if step.device == "cuda" else "Python"
        print(f"in {capacity:g} GB, {RUNTIME[step.device]} for {runtime} itself: {fits}")
    print(f"total {total:.2f} GB")
