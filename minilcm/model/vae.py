"""The autoencoder between pixels (b, 3, H, W) in [-1, 1] and latents (b, 4, H/f, W/f).

LDM's AutoencoderKL under its official key names. f = 2^(levels - 1): all models here have four
levels (f8). The scale that gives latents unit variance (0.18215 in SD1.5) is applied here and
nowhere else.

    encoder.conv_in, down.i.{block.j, downsample.conv}, mid.{block_1, attn_1, block_2},
            norm_out, conv_out -> quant_conv
    post_quant_conv -> decoder.conv_in, mid..., up.i.{block.j, upsample.conv}, norm_out, conv_out
    decoder.up is numbered by resolution like encoder.down: the *last* entry runs first.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .layers import Upsample, attention


@dataclass(frozen=True)
class VAEConfig:
    channels: tuple[int, ...] = (128, 256, 512, 512)  # width of each level
    res_blocks: int = 2  # ResBlocks per level; the decoder has one more
    groups: int = 32  # of GroupNorm; with fewer than 4 channels in a group absolute colour is lost
    scale: float = 0.18215  # latents are multiplied by it in encode, divided in decode
    z_channels: int = 4


class ResnetBlock(nn.Module):
    """The ResBlock of layers.py without a time embedding, under LDM's names in an autoencoder."""

    def __init__(self, channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (b, c_out, h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over all pixels; the four projections are 1x1 convolutions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = x.shape[2]
        y = self.norm(x)
        projected = self.q(y), self.k(y), self.v(y)
        q, k, v = (rearrange(x, "b c h w -> b 1 (h w) c") for x in projected)
        y = attention(q, k, v)  # (b, 1, h*w, c)
        return x + self.proj_out(rearrange(y, "b 1 (h w) c -> b c h w", h=h))


class Down(nn.Module):
    """Halve h and w by a stride-2 convolution that pads only right and bottom, as LDM does."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (b, c, h/2, w/2)


def middle(channels: int, groups: int) -> nn.ModuleDict:
    block_1, attn_1 = ResnetBlock(channels, channels, groups), AttnBlock(channels, groups)
    block_2 = ResnetBlock(channels, channels, groups)
    return nn.ModuleDict({"block_1": block_1, "attn_1": attn_1, "block_2": block_2})


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(3, cfg.channels[0], 3, padding=1)
        self.down, c = nn.ModuleList(), cfg.channels[0]
        for level, width in enumerate(cfg.channels):
            stage = nn.ModuleDict({"block": nn.Sequential()})
            for _ in range(cfg.res_blocks):
                stage["block"].append(ResnetBlock(c, width, cfg.groups))
                c = width
            if level < len(cfg.channels) - 1:
                stage["downsample"] = Down(c)
            self.down.append(stage)
        self.mid = middle(c, cfg.groups)
        self.norm_out = nn.GroupNorm(cfg.groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (b, c, H, W)
        for stage in self.down:
            for part in stage.values():  # block, downsample
                h = part(h)
        for block in self.mid.values():
            h = block(h)  # (b, c, H/f, W/f)
        return self.conv_out(F.silu(self.norm_out(h)))  # (b, 2 z, H/f, W/f)


class Decoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        c = cfg.channels[-1]
        self.conv_in = nn.Conv2d(cfg.z_channels, c, 3, padding=1)
        self.mid = middle(c, cfg.groups)
        stages = []
        for level, width in reversed(list(enumerate(cfg.channels))):
            stage = nn.ModuleDict({"block": nn.Sequential()})
            for _ in range(cfg.res_blocks + 1):
                stage["block"].append(ResnetBlock(c, width, cfg.groups))
                c = width
            if level > 0:
                stage["upsample"] = Upsample(c)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = nn.GroupNorm(cfg.groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)  # (b, c, H/f, W/f)
        for block in self.mid.values():
            h = block(h)
        for stage in reversed(self.up):
            for part in stage.values():  # block, upsample
                h = part(h)
        return self.conv_out(F.silu(self.norm_out(h)))  # (b, 3, H, W)


class VAE(nn.Module):
    """z = E(x), x = D(z), with the scale inside. Latent Diffusion (2112.10752) section 3.1."""

    def __init__(self, cfg: VAEConfig = VAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.factor = 2 ** (len(cfg.channels) - 1)  # f: pixels per latent pixel
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * cfg.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled mean and std of q(z|x): (b, 3, H, W) in [-1, 1] -> 2 x (b, 4, H/f, W/f)."""
        x = pixels.to(self.quant_conv.weight.dtype)
        mean, log_var = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        return mean * self.cfg.scale, torch.exp(0.5 * log_var.clamp(-30, 20)) * self.cfg.scale

    def encode(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """A sample z0 ~ q(z|x), scaled: (b, 3, H, W) in [-1, 1] -> (b, 4, H/f, W/f)."""
        mean, std = self.moments(pixels)
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)

    def encode_mean(self, pixels: Tensor) -> Tensor:
        """The mean of q(z|x), scaled: (b, 3, H, W) in [-1, 1] -> (b, 4, H/f, W/f)."""
        return self.moments(pixels)[0]

    def decode(self, z0: Tensor) -> Tensor:
        """Scaled latents (b, 4, h, w) -> pixels (b, 3, f h, f w), float32, near [-1, 1]."""
        z = (z0 / self.cfg.scale).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(z)).float()

    def decode_tiled(self, z0: Tensor, tile: int = 128, overlap: int = 16) -> Tensor:
        """`decode` in tiles of `tile` latents a side, blended linearly over `overlap`: less memory.

        Close to `decode`, not equal: attention and GroupNorm see a tile instead of the picture.
        """
        b, _, h, w = z0.shape
        f = self.factor

        def spans(n: int) -> list[slice]:
            """Spread evenly along one axis, so that neighbours share at least `overlap`."""
            side, count = min(tile, n), max(1, math.ceil((n - overlap) / (tile - overlap)))
            starts = (i * (n - side) // max(1, count - 1) for i in range(count))
            return [slice(start, start + side) for start in starts]

        def ramp(n: int) -> Tensor:
            """Weight along one axis of a tile: near 0 at its edges, 1 from `overlap` on."""
            x = (torch.arange(n * f, device=z0.device) + 0.5) / (overlap * f)
            return torch.minimum(x, x.flip(0)).clamp(max=1)

        out = torch.zeros(b, 3, h * f, w * f, device=z0.device)
        total = torch.zeros(h * f, w * f, device=z0.device)
        weight = ramp(min(tile, h))[:, None] * ramp(min(tile, w))  # (f tile, f tile)
        for rows in spans(h):
            for columns in spans(w):
                where = tuple(slice(x.start * f, x.stop * f) for x in (rows, columns))
                out[(..., *where)] += weight * self.decode(z0[:, :, rows, columns])
                total[where] += weight
        return out / total
