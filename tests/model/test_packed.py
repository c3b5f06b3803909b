"""Packed weights compute what the layers computed."""

import pytest
import torch
from tiny import noise, tiny_unet, tiny_vae

from minilcm.model.packed import Packed, pack, pack_for_sampling
from minilcm.model.precision import autocast, default_dtype
from minilcm.model.unet import Cond


def outputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module]:
    """eps_hat before and after, at two sizes and batches that the weights were not packed for."""
    unet, cond, both = tiny_unet(), Cond(noise(1, (3, 7, 32))), []
    for packed in (False, True):
        if packed:
            pack(unet, dtype)
        with torch.no_grad(), autocast("cpu", dtype):
            parts = [unet(noise(0, (b, 4, 8, 4 * b)), 500, cond.rows(slice(0, b))) for b in (1, 3)]
        both.append(torch.cat([x.flatten() for x in parts]))
    return *both, unet


@pytest.mark.parametrize("dtype, far", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_packed_is_the_same(dtype, far):
    """Exact in float32, and in bfloat16 to its rounding; the borders are left in float32."""
    plain, packed, unet = outputs(dtype)
    assert (plain - packed).abs().max() < far * plain.abs().max()
    kinds = {path: type(layer) for path, layer in unet.named_modules()}
    assert kinds["input_blocks.0.0"] == kinds["out.2"] == torch.nn.Conv2d
    assert kinds["middle_block.1.proj_in"] == torch.nn.Conv2d  # 1x1, which would be slower
    can = hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    can = can and dtype in (torch.float32, default_dtype("cpu"))
    for path in ("middle_block.0.in_layers.2", "time_embed.0"):
        assert (kinds[path] == Packed) == can


def test_without_the_operators(monkeypatch):
    """PyTorch for Apple silicon has none: nothing changes."""
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    plain, packed, unet = outputs(torch.float32)
    assert torch.equal(plain, packed) and not any(isinstance(x, Packed) for x in unet.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_decoder_of_a_large_model(dtype):
    """In bfloat16 with the UNet, to its rounding; never in float16, in which SDXL's overflows."""
    unet, vae, z0 = tiny_unet(), tiny_vae(), noise(0, (1, 4, 6, 8))
    plain = vae.decode(z0)
    pack_for_sampling(unet, vae, dtype)
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert vae.decoder.conv_in.weight.dtype == stored
    far = (vae.decode(z0) - plain).abs().max() / plain.abs().max()
    assert far < (0.04 if dtype == torch.bfloat16 else 1e-5)
