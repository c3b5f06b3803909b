"""Will it fit? The memory of a training step, part by part, from shapes alone: before any weight is read.

The real step runs on fake tensors, which have shapes and no memory. They are said to lie on the CPU, since autograd's
backward asks for a real card; the shapes are the same.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..files.identify import Config
from ..model.precision import LiveBytes, size_of
from ..model.text import N_TOKENS, TextEncoder
from ..model.unet import Cond, UNet
from ..model.vae import VAE
from ..objective import Objective, loss_of, make_networks

RUNTIME = {"cuda": 0.5, "cpu": 0.9}  # GB, about: CUDA's own; Python, its libraries and the kernels they compile


@contextmanager
def norms_as_on_cuda() -> Iterator[None]:
    """Autocast runs normalisations in float32 on a card, but not on a CPU: the wide inputs are kept, and count."""

    def widened(norm):
        return lambda x, *args: norm(x.float(), *(a.float() if isinstance(a, Tensor) else a for a in args))

    with patch.object(F, "group_norm", widened(F.group_norm)), patch.object(F, "layer_norm", widened(F.layer_norm)):
        yield


def step_bytes(
    objective: Objective,
    config: Config,
    batch: int,
    size: int,
    device: str,
    half: torch.dtype,
    average: bool = False,
    accumulate: int = 1,
) -> tuple[dict[str, int], int]:
    """({part: bytes}, how many parameters are trained) of a step on `batch` pictures of `size` x `size` pixels."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet, vae = UNet(config.unet), VAE(config.vae)
        base = sum(x.numel() for x in unet.parameters())
        nets = make_networks(objective, unet, half)
        trained = [x for x in unet.parameters() if x.requires_grad]
        z0 = torch.randn(batch, 4, size // vae.factor, size // vae.factor)
        vector = torch.randn(batch, config.unet.adm) if config.unet.adm else None
        cond = Cond(torch.randn(batch, N_TOKENS, config.unet.context_dim), vector)
        with LiveBytes() as live, norms_as_on_cuda() if device == "cuda" else nullcontext():
            for _ in range(min(2, accumulate)):  # in the second batch all gradients are there from the start
                loss_of(objective, nets, z0, cond, cond, torch.Generator()).backward()
        gradients = size_of(x.grad for x in trained)
    full = objective.rank is None
    copies = size_of(nets.target_unet.parameters()) + base * half.itemsize if nets.target_unet else 0
    return {
        "UNet": size_of(x for x in unet.parameters() if full or not x.requires_grad),
        "teacher and target": copies,
        "LoRA": 0 if full else size_of(trained),
        "gradients": gradients,
        "Adam's moments": 2 * size_of(trained),
        "average": size_of(trained) if average else 0,
        "pictures to look at": (51 if objective.kind == "lcm" else 1) * 8 * 4 * z0[0].numel(),
        "activations": live.peak - gradients,
    }, sum(x.numel() for x in trained)


def vae_and_text_bytes(config: Config, size: int) -> tuple[int, int, int, int]:
    """(VAE, text encoders, activations of encoding a picture, of decoding it in tiles), in float32."""
    with FakeTensorMode(), torch.no_grad():
        vae, text = VAE(config.vae), TextEncoder(config.text)
        with LiveBytes() as encoding:
            mean, _ = vae.moments(torch.randn(1, 3, size, size))
        with LiveBytes() as decoding:
            vae.decode_tiled(mean, tile=64)
    return size_of(vae.parameters()), size_of(text.parameters()), encoding.peak, decoding.peak


def plan(
    objective: Objective,
    config: Config,
    batch: int,
    size: int,
    device: str,
    half: torch.dtype,
    average: bool = False,
    accumulate: int = 1,
    card: float = 0.0,
) -> None:
    """Print the bytes of a step by part, with the other choice of checkpointing, and whether `card` GB hold them."""
    step = config, batch, size, device, half, average, accumulate
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # fake tensors are slow: SDXL takes most of a minute
        job = pool.submit(step_bytes, objective._replace(checkpointing=not objective.checkpointing), *step)
        parts, count = step_bytes(objective, *step)
        vae, text, encoding, decoding = vae_and_text_bytes(config, size)
        other, _ = job.result()
    aside = vae + text if device == "cpu" else 0  # on a card they come and go
    rest = sum(parts.values()) - parts["activations"] + (aside or vae)
    stages = {
        "before: VAE, text encoders, encoding": vae + text + encoding,
        "a step of training": sum(parts.values()) + aside,
        "a sheet: VAE and decoding in place of activations": rest + decoding,
    }
    total = max(stages.values()) / 1e9

    print(
        f"{objective.kind}, {count:,} parameters to train, batch {batch} x {size}x{size}, {str(half)[6:]}, "
        f"checkpointing {'on' if objective.checkpointing else 'off'}"
    )
    for part, size_in_bytes in parts.items():
        if size_in_bytes:
            print(f"  {part:20} {size_in_bytes / 1e9:7.2f} GB")
    flag = f"--{'no-' * objective.checkpointing}checkpointing"
    print(f"  activations with {flag} would be {other['activations'] / 1e9:.2f} GB")
    for stage, size_in_bytes in stages.items():
        print(f"{stage}: {size_in_bytes / 1e9:.2f} GB")
    if device == "cuda":
        print(f"shards, encoded as they are read, keep VAE and text encoders there: {(vae + text) / 1e9:.2f} GB more")
    if card:
        room = card - total - RUNTIME[device]
        fits = f"fits, {room:.2f} GB are left" if room >= 0 else f"does not fit, {-room:.2f} GB are missing"
        print(f"in {card:g} GB, {RUNTIME[device]} for {'CUDA' if device == 'cuda' else 'Python'} itself: {fits}")
    print(f"total {total:.2f} GB")
