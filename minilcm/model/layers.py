"""The blocks a Stable Diffusion UNet is built from, under their official LDM names.

Attributes have the key names of the official files (`in_layers.2`, `ff.net.0.proj`): a number in a
key is a place in an nn.Sequential. Local names and comments are ours. Letters: b batch, c channels,
h w latent size, n tokens of the picture, m of the context, d width of a token, in `attention` of a
head.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t (b,) -> (b, dim), cosines first; frequencies exp(-ln(10000) i / (dim/2))."""
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(10000) * i / half)
    args = t.float()[:, None] * freqs  # (b, half)
    return torch.cat([args.cos(), args.sin()], dim=-1)  # (b, dim)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q (b, heads, n, d), k and v (b, heads, m, d)."""
    if q.device.type == "mps":  # PyTorch 2.8 there misreads other layouts (pytorch#163597)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding added between them, and a skip."""

    def __init__(self, channels: int, out_channels: int, time_dim: int, groups: int):
        super().__init__()
        norm, conv = nn.GroupNorm(groups, channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(norm, nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out_channels))
        norm = nn.GroupNorm(groups, out_channels)
        conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        dropout = nn.Identity()  # numbering only
        self.out_layers = nn.Sequential(norm, nn.SiLU(), dropout, conv)
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

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
    """softmax(q k^T / sqrt(d)) v; q from x, k and v from the context, or from x itself (attn1)."""

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
        projected = self.to_q(x), self.to_k(context), self.to_v(context)
        split = "b n (heads d) -> b heads n d"
        y = attention(*(rearrange(y, split, heads=self.heads) for y in projected))
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
    """Attention among the pixels, then to the prompt, feed-forward; norm and residual at each."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = CrossAttention(width, width, heads)
        self.attn2 = CrossAttention(width, context_dim, heads)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))  # (b, n, d)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks, whose tokens are the h*w pixels, between two projections."""

    def __init__(
        self, channels: int, depth: int, context_dim: int, heads: int, linear: bool, groups: int
    ):
        super().__init__()
        self.linear = linear
        project, sizes = (nn.Linear, ()) if linear else (nn.Conv2d, (1,))  # the same product
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = project(channels, channels, *sizes)
        blocks = (TransformerBlock(channels, context_dim, heads) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = project(channels, channels, *sizes)

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
