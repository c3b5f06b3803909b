"""A tiny decoder in place of the VAE's: TAESD and TAESDXL (madebyollin/taesd), 1.2 M parameters.

It was distilled from the decoder of SD1.x or of SDXL, and reads the same scaled latents in a
seventeenth of the arithmetic; fine detail is less exact. Key names are places in one nn.Sequential:

    1         conv 4 -> 64
    3-5       Blocks
    7         conv after doubling h and w
    8-10, 12  the same at twice the size
    13-15, 17 the same again
    18, 19    Block, conv 64 -> 3
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64


def conv(c_in: int, c_out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)


class Clamp(nn.Module):
    """Bounds the latents smoothly, to (-3, 3)."""

    def forward(self, z: Tensor) -> Tensor:
        return 3 * torch.tanh(z / 3)


class Block(nn.Module):
    """Three convolutions with a residual, and no norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(
            conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)  # (b, 64, h, w)


class TinyDecoder(nn.Sequential):
    def __init__(self):
        stages = []
        for _ in range(3):
            blocks = Block(), Block(), Block()
            stages += [*blocks, nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]
        super().__init__(Clamp(), conv(4, WIDTH), nn.ReLU(), *stages, Block(), conv(WIDTH, 3))

    def decode(self, z0: Tensor) -> Tensor:
        """Scaled latents (b, 4, h, w) -> pixels (b, 3, 8 h, 8 w), float32, near [-1, 1]."""
        return 2 * self(z0.to(self[1].weight.dtype)).float() - 1

    def decode_tiled(self, z0: Tensor, tile: int = 0) -> Tensor:
        """There is no attention, whose memory would need tiles."""
        return self.decode(z0)
