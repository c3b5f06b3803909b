"""What train_vae, train_clip and train_judge have in common: flags, and pictures to learn from."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minilcm.data.emoji import Art, compositions


def flags(
    doc: str, file: str, steps: int, batch: int, looks: int, lr: float
) -> argparse.ArgumentParser:
    """The flags of all three; the numbers are defaults, `file` is what is written."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    add = parser.add_argument
    add("--out", type=Path, required=True, help=f"folder for {file}")
    add("--steps", type=int, default=steps)
    add("--batch", type=int, default=batch)
    made = f"compositions made of each drawing (default {looks})"
    add("--looks", type=int, default=looks, help=made)
    add("--lr", type=float, default=lr)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def pool_of(
    art: list[Art], size: int, looks: int, seed: int, device="cpu"
) -> tuple[Tensor, list[str]]:
    """All compositions, to draw batches from: pixels (m, 3, S, S) as uint8, and m colours."""
    pixels, colors = [], []
    for x, color in compositions(art, size, looks, seed, device):
        pixels.append(((x + 1) * 127.5).round().byte())
        colors += color
    return torch.cat(pixels), colors


def degrade(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, blur and noise pictures a little, as autoencoder and few steps do: (b, 3, H, W)."""
    b, draw = len(x), dict(generator=generator, device=x.device)
    u = torch.rand(b, 4, **draw)
    theta = torch.zeros(b, 2, 3, device=x.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 0.9 + 0.25 * u[:, 0]
    theta[:, :, 2] = (u[:, 1:3] - 0.5) * 0.2
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, "bilinear", "border", align_corners=False)
    small = F.interpolate(x, scale_factor=0.4, mode="bilinear", antialias=True)
    blurred = F.interpolate(small, x.shape[-2:], mode="bicubic")
    mix = u[:, 3, None, None, None]
    noise = torch.randn(x.shape, **draw) * 0.15 * torch.rand(b, 1, 1, 1, **draw)
    return x * (1 - mix) + blurred * mix + noise
