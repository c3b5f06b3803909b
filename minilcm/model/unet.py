"""Stable Diffusion's UNet, eps_theta or v_theta(z_t, t, c), all families, official LDM key names.

                    SD1.5                                 SDXL (SSD-1B: less, see `ssd1b`)
time_embed          t -> 320 -> 1280                      the same
label_emb           -                                     pooled text, sizes 2816 -> 1280, added
input_blocks.0      conv_in                               conv_in
input_blocks.1-2    ResBlock .0, transformer .1           ResBlock, width 320
input_blocks.3      Downsample .0                         Downsample
input_blocks.4-5    ResBlock, transformer, width 640      ResBlock, transformer x 2, width 640
input_blocks.6      Downsample                            Downsample
input_blocks.7-8    ResBlock, transformer, width 1280     ResBlock, transformer x 10, width 1280
input_blocks.9      Downsample                            -
input_blocks.10-11  ResBlock, width 1280                  -
middle_block        ResBlock .0, transformer .1,          ResBlock, transformer x 10, ResBlock
                    ResBlock .2
output_blocks.i     ResBlock on cat(h, skip) .0, transformer .1, and Upsample (last) at the end of
                    each level but the last
out                 GroupNorm .0, SiLU .1, conv .2        the same
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .layers import Downsample, ResBlock, SpatialTransformer, Upsample, timestep_embedding


class Cond(NamedTuple):
    """What the UNet gets besides z_t and t: the encoded prompt."""

    context: Tensor  # (b, n, d): one row a token, read by cross-attention
    vector: Tensor | None = None  # (b, adm): SDXL's pooled text and size ids

    def cat(self, other: "Cond") -> "Cond":
        """Both, concatenated along b."""
        return Cond(*(None if x is None else torch.cat([x, y]) for x, y in zip(self, other)))

    def rows(self, rows: slice | list[int]) -> "Cond":
        """Some of the b rows."""
        return Cond(*(None if x is None else x[rows] for x in self))

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "Cond":
        return Cond(*(None if x is None else x.to(device=device, dtype=dtype) for x in self))


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet. Depths are transformer blocks after a ResBlock; levels in running order."""

    channels: tuple[int, ...]  # width of each level
    down: tuple[tuple[int, ...], ...]  # depths on the way down, one tuple a level
    middle: int | None  # depth in the middle; None: a lone ResBlock (SSD-1B); 0: nothing (tiny-sd)
    up: tuple[tuple[int, ...], ...]  # depths on the way up, lowest resolution first
    context_dim: int
    heads: int | None = None  # the same number of heads everywhere (SD1.x), or ...
    head_dim: int | None = None  # ... the same width of a head everywhere (SDXL)
    linear: bool = False  # proj_in and proj_out as Linear, not as 1x1 convolution
    adm: int | None = None  # length of Cond.vector
    w_dim: int | None = None  # width of the guidance embedding, which only a full LCM has
    groups: int = 32  # of GroupNorm
    v: bool = False  # the output is v = alpha eps - sigma z0, not eps_hat
    zero_snr: bool = False  # trained with zero terminal SNR: at t = 999 z_t is pure noise


def sd15() -> UNetConfig:
    return UNetConfig(
        channels=(320, 640, 1280, 1280),
        down=((1, 1), (1, 1), (1, 1), (0, 0)),
        middle=1,
        up=((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
        context_dim=768,
        heads=8,
    )


def sd2() -> UNetConfig:
    return replace(sd15(), context_dim=1024, heads=None, head_dim=64, linear=True)


def small_sd() -> UNetConfig:
    """segmind/small-sd, as BK-SDM-Base (2305.15798): a ResBlock fewer at each level."""
    return replace(sd15(), down=((1,), (1,), (1,), (0,)), up=((0, 0), (1, 1), (1, 1), (1, 1)))


def tiny_sd() -> UNetConfig:
    """segmind/tiny-sd, as BK-SDM-Tiny: also without the lowest level and the middle."""
    return replace(sd15(), channels=(320, 640, 1280), down=((1,),) * 3, middle=0, up=((1, 1),) * 3)


def sdxl() -> UNetConfig:
    return UNetConfig(
        channels=(320, 640, 1280),
        down=((0, 0), (2, 2), (10, 10)),
        middle=10,
        up=((10, 10, 10), (2, 2, 2), (0, 0, 0)),
        context_dim=2048,
        head_dim=64,
        linear=True,
        adm=2816,
    )


def ssd1b() -> UNetConfig:
    up = (4, 4, 10), (2, 1, 1), (0, 0, 0)
    return replace(sdxl(), down=((0, 0), (2, 2), (4, 4)), middle=None, up=up)


def vega() -> UNetConfig:
    return replace(ssd1b(), down=((0, 0), (1, 1), (2, 2)), up=((2, 2, 2), (1, 1, 1), (0, 0, 0)))


def emoji() -> UNetConfig:
    """Stable Diffusion 1 in miniature: 10.9 M parameters for 4x16x16 latents."""
    return UNetConfig(
        channels=(64, 128, 192),
        down=((0,), (1,), (1,)),
        middle=1,
        up=((1, 1), (1, 1), (0, 0)),
        context_dim=128,
        heads=4,
        groups=16,
    )


class Block(nn.Sequential):
    """The parts of one numbered block; each takes what it needs of (x, t_emb, context)."""

    def forward(self, x: Tensor, t_emb: Tensor, context: Tensor) -> Tensor:
        for part in self:
            if isinstance(part, ResBlock):
                x = part(x, t_emb)
            elif isinstance(part, SpatialTransformer):
                x = part(x, context)
            else:
                x = part(x)
        return x  # (b, c, h, w)


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) in float32, whatever autocast says and its weights are stored in."""
    weights = {name: weight.float() for name, weight in layer.named_parameters()}
    with torch.autocast(x.device.type, enabled=False):
        return functional_call(layer, weights, x.float())


class UNet(nn.Module):
    """eps_theta. Latent Diffusion (2112.10752) section 3.2-3.3; SDXL (2307.01952) section 2.1."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        width, time_dim = cfg.channels[0], 4 * cfg.channels[0]

        def embed(d_in: int) -> nn.Module:
            first, second = nn.Linear(d_in, time_dim), nn.Linear(time_dim, time_dim)
            return nn.Sequential(first, nn.SiLU(), second)

        self.time_embed = embed(width)
        if cfg.adm:
            self.label_emb = nn.Sequential(embed(cfg.adm))
        if cfg.w_dim:  # of a full LCM, whose files have diffusers' name for it
            cond_proj = nn.Linear(cfg.w_dim, width, bias=False)
            self.time_embedding = nn.ModuleDict({"cond_proj": cond_proj})

        def res(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, time_dim, cfg.groups)

        def transformer(c: int, depth: int) -> list[nn.Module]:
            heads = cfg.heads or c // cfg.head_dim
            sizes = c, depth, cfg.context_dim, heads, cfg.linear, cfg.groups
            return [SpatialTransformer(*sizes)] if depth else []

        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(4, width, 3, padding=1))])
        c, skips = width, [width]
        for level, depths in enumerate(cfg.down):
            for depth in depths:
                before, c = c, cfg.channels[level]
                self.input_blocks.append(Block(res(before, c), *transformer(c, depth)))
                skips.append(c)
            if level < len(cfg.down) - 1:
                self.input_blocks.append(Block(Downsample(c)))
                skips.append(c)

        self.middle_block = Block() if cfg.middle == 0 else Block(res(c, c))
        if cfg.middle:
            self.middle_block.extend([*transformer(c, cfg.middle), res(c, c)])

        self.output_blocks = nn.ModuleList()
        for level, depths in enumerate(cfg.up):
            for i, depth in enumerate(depths):
                before, c = c + skips.pop(), cfg.channels[-1 - level]
                parts = [res(before, c), *transformer(c, depth)]
                if i == len(depths) - 1 and level < len(cfg.up) - 1:
                    parts.append(Upsample(c))
                self.output_blocks.append(Block(*parts))

        norm, conv_out = nn.GroupNorm(cfg.groups, c), nn.Conv2d(c, 4, 3, padding=1)
        self.out = nn.Sequential(norm, nn.SiLU(), conv_out)

    def forward(
        self, z_t: Tensor, t: int | Tensor, cond: Cond, w_emb: Tensor | None = None
    ) -> Tensor:
        """eps_hat, or v, float32 (b, 4, h, w), of z_t of that shape at t, an int or (b,).

        cond has b rows. A full LCM also takes w_emb (b, w_dim), its `lcm.guidance_embedding(w)`.
        """
        dtype = self.out[2].weight.dtype
        context = cond.context.to(dtype)  # (b, n, d)
        t = torch.as_tensor(t, device=z_t.device).expand(len(z_t))  # (b,)
        t_sin = timestep_embedding(t, self.cfg.channels[0]).to(dtype)  # (b, width)
        if w_emb is not None:
            t_sin = t_sin + self.time_embedding["cond_proj"](w_emb.to(dtype))
        t_emb = self.time_embed(t_sin)  # (b, 4 width)
        if self.cfg.adm:
            t_emb = t_emb + self.label_emb(cond.vector.to(dtype))

        # x0 = (z_t - sigma eps_hat) / alpha has 14.6 times the error of eps_hat at t = 999, so the
        # first convolution sees all bits of z_t, and the last norm and convolution lose none
        x = in_float32(self.input_blocks[0][0], z_t).to(dtype)  # (b, c, h, w)
        skips = [x]
        for block in self.input_blocks[1:]:
            x = block(x, t_emb, context)
            skips.append(x)
        x = self.middle_block(x, t_emb, context)  # (b, c, h, w), each halved levels - 1 times
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), t_emb, context)
        return in_float32(self.out, x)  # (b, 4, h, w)
