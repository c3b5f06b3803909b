import math

import pytest
import torch
from make_reference import REFERENCE, about, filled
from safetensors.torch import load_file
from torch import nn

from minilcm.model.vae import VAE, VAEConfig

KINDS = {
    "f8": VAEConfig(channels=(16, 16, 32, 32), res_blocks=2, groups=8, scale=1.0),
    "f4": VAEConfig(channels=(16, 32, 32), res_blocks=1, groups=8, scale=1.0),
}


@pytest.fixture(scope="module")
def reference():
    return load_file(REFERENCE / "vae.safetensors")


def vae_of(kind, **changes):
    """The reference's VAE: weights drawn from its key names, so the key sets are compared too."""
    vae = VAE(VAEConfig(**vars(KINDS[kind]) | changes)).requires_grad_(False)
    vae.load_state_dict(filled(about(REFERENCE / "vae.safetensors")["keys"][kind]))
    return vae


@pytest.mark.parametrize("kind", KINDS)
def test_equals_diffusers(reference, kind):
    """Mean and std of q(z|x), a latent's pixels, as diffusers 0.42.1's AutoencoderKL; to 1e-5."""
    vae = vae_of(kind)
    mean, std = vae.moments(reference["pixels"])
    torch.testing.assert_close(mean, reference[f"{kind}/mean"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(std, reference[f"{kind}/std"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        vae.decode(reference[f"{kind}/z"]), reference[f"{kind}/decoded"], rtol=1e-5, atol=1e-5
    )
    assert vae.factor == int(kind[1])


def test_official_keys(official_keys):
    """Keys, shapes, 83,653,863 parameters of SD1.5's first_stage_model; f8, scale 0.18215."""
    with torch.device("meta"):
        vae = VAE()
    assert {key: list(x.shape) for key, x in vae.state_dict().items()} == official_keys["vae"]
    assert sum(x.numel() for x in vae.parameters()) == 83_653_863
    assert (vae.factor, vae.cfg.scale) == (8, 0.18215)
    norms = [m for m in vae.modules() if isinstance(m, nn.GroupNorm)]
    assert norms and all(norm.eps == 1e-6 and norm.num_groups == 32 for norm in norms)


def test_scale_is_applied_inside(reference):
    """z = scale * q(z|x) on the way in, z / scale on the way out (SD1.5: 0.18215)."""
    plain, scaled = vae_of("f4"), vae_of("f4", scale=0.18215)
    for a, b in zip(plain.moments(reference["pixels"]), scaled.moments(reference["pixels"])):
        torch.testing.assert_close(b, 0.18215 * a)
    z = reference["f4/z"]
    torch.testing.assert_close(
        scaled.decode(0.18215 * z), reference["f4/decoded"], rtol=1e-5, atol=1e-4
    )
    assert torch.equal(
        scaled.encode_mean(reference["pixels"]), scaled.moments(reference["pixels"])[0]
    )


def test_encode_draws_from_its_generator(reference):
    """encode is mean + std * n with the generator's next n: reproducible, new at the next call."""
    vae, g = vae_of("f4", scale=0.5), torch.Generator().manual_seed(7)
    first, second = vae.encode(reference["pixels"], g), vae.encode(reference["pixels"], g)
    mean, std = 0.5 * reference["f4/mean"], 0.5 * reference["f4/std"]
    g = torch.Generator().manual_seed(7)
    for z in (first, second):
        torch.testing.assert_close(
            z, mean + std * torch.randn(mean.shape, generator=g), rtol=1e-5, atol=1e-5
        )


def test_log_variance_is_clamped(reference):
    """log variance is held to [-30, 20], as in LDM: std cannot overflow."""
    vae = vae_of("f4")
    vae.quant_conv.weight.zero_()
    vae.quant_conv.bias[:4] = 0.25
    vae.quant_conv.bias[4:6] = 1000.0
    vae.quant_conv.bias[6:] = -1000.0
    mean, std = vae.moments(reference["pixels"])
    assert (mean == 0.25).all()
    assert std[0, :, 0, 0].tolist() == pytest.approx([math.exp(10)] * 2 + [math.exp(-15)] * 2)


def test_vae_on_cuda_in_float16(fake_cuda):
    """Dry run, float16 weights on cuda, CPU generator: latents and pixels are float32 on cuda."""
    vae = fake_cuda(lambda: VAE(KINDS["f8"]), torch.float16)
    z0 = vae.encode(torch.randn(2, 3, 32, 48, device="cuda"), torch.Generator())
    assert (z0.device.type, z0.dtype, z0.shape) == ("cuda", torch.float32, (2, 4, 4, 6))
    pixels = vae.decode(z0)
    assert (pixels.device.type, pixels.dtype, pixels.shape) == (
        "cuda",
        torch.float32,
        (2, 3, 32, 48),
    )


@pytest.mark.parametrize("h, w", [(8, 8), (20, 8), (21, 33), (5, 40)])
def test_tiles_are_a_partition_of_one(monkeypatch, h, w):
    """A decoder that looks at one latent only: blended tiles are the whole, at any size."""
    vae = vae_of("f4")
    calls = []

    def local(z0):
        calls.append(z0.shape[2:])
        return z0[:, :3].repeat_interleave(vae.factor, 2).repeat_interleave(vae.factor, 3).float()

    monkeypatch.setattr(vae, "decode", local)
    z0 = torch.randn(2, 4, h, w, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        vae.decode_tiled(z0, tile=8, overlap=2), local(z0), rtol=1e-5, atol=1e-5
    )
    assert all(max(shape) <= 8 for shape in calls[:-1])


def test_tiled_decode_is_close():
    """A real decoder: one tile is the whole bit for bit; overlapping tiles differ little."""
    vae, z0 = vae_of("f4"), torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(z0)
    torch.testing.assert_close(vae.decode_tiled(z0, 16, 4), whole, rtol=1e-6, atol=1e-6)
    assert (vae.decode_tiled(z0, 12, 8) - whole).abs().mean() < 0.5 * whole.std()


@pytest.mark.parametrize("n", [16, 20, 24, 33])
def test_neighbouring_tiles_share_the_overlap(monkeypatch, n):
    """Also where the tiles would cover the picture without any."""
    vae, rows = vae_of("f4"), []
    z0 = torch.arange(n).float().expand(1, 4, 8, n)

    def remember(z0):
        rows.append(z0[0, 0, 0].tolist())
        return torch.zeros(1, 3, z0.shape[2] * vae.factor, z0.shape[3] * vae.factor)

    monkeypatch.setattr(vae, "decode", remember)
    vae.decode_tiled(z0, tile=8, overlap=3)
    assert rows[0][0] == 0 and rows[-1][-1] == n - 1
    assert all(len({*a} & {*b}) >= 3 for a, b in zip(rows, rows[1:]))
