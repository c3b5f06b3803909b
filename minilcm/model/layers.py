"""The blocks a Stable Diffusion UNet is built from, under their official LDM names.

Attributes have the key names of the official files (`in_layers.2`, `ff.net.0.proj`): a number in a
key is a place in an nn.Sequential. Local names and comments are ours. Letters: b batch, c channels,
h w latent size, n tokens, d width of a token.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t (b,) -> (b, dim), cosines first: frequency i is exp(-ln(10000) i / (dim/2)).
    LDM's util.py.
    """
    half = dim // 2
    freqs = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    args = t.float()[:, None] * freqs  # (b, half)
    return torch.cat([args.cos(), args.sin()], dim=-1)  # (b, dim)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, each (b, heads, n, d)."""
    if q.device.type == "mps":  # PyTorch 2.8 there misreads other layouts (pytorch#163597)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, the time embedding added between them, and a skip (1x1 where the
    channels change).
    """

    def __init__(self, channels: int, out_channels: int, time_dim: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Identity(),  # dropout, numbering only
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        h = self.in_layers(x)  # (b, c_out, h, w)
        h = h + self.emb_layers(t_emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """Halve h and w by a stride-2 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # (b, c, h/2, w/2)


class Upsample(nn.Module):
    """Double h and w: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # (b, c, 2h, 2w)


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v. Queries come from x; keys and values from the context, or from x
    itself (attn1).
    """

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        # .1: dropout, numbering only
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Identity())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        # (b, n, d), (b, m, d), (b, m, d)
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (
            rearrange(y, "b n (heads d) -> b heads n d", heads=self.heads) for y in (q, k, v)
        )
        y = attention(q, k, v)
        return self.to_out(rearrange(y, "b heads n d -> b n (heads d)"))


class GEGLU(nn.Module):
    """One Linear for value and gate: value * gelu(gate)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # 2 x (b, n, inner)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        # .1: dropout, numbering only
        parts = GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        self.net = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention over the pixels, cross-attention to the prompt, feed-forward; each with norm
    and residual.
    """

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (
            nn.LayerNorm(width),
            nn.LayerNorm(width),
            nn.LayerNorm(width),
        )
        self.attn1 = CrossAttention(width, width, heads)
        self.attn2 = CrossAttention(width, context_dim, heads)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))  # (b, n, d)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks with the h*w pixels as tokens, between two projections, and a
    residual around it all.

    proj_in and proj_out are 1x1 convolutions in SD1.x (linear=False) and Linear in SDXL: the same
    product.
    """

    def __init__(
        self, channels: int, depth: int, context_dim: int, heads: int, linear: bool, groups: int
    ):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, heads) for _ in range(depth)
        )
        self.proj_out = (
            nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = x.shape[2]
        y = self.norm(x)  # (b, c, h, w)
        if self.linear:
            y = self.proj_in(rearrange(y, "b c h w -> b (h w) c"))
        else:
            y = rearrange(self.proj_in(y), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            y = block(y, context)  # (b, h*w, c)
        if self.linear:
            y = rearrange(self.proj_out(y), "b (h w) c -> b c h w", h=h)
        else:
            y = self.proj_out(rearrange(y, "b (h w) c -> b c h w", h=h))
        return x + y
