"""How the emoji model is made: its training's formulas, and a recipe that train.py understands."""

import argparse
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import ROOT
from torch.nn import functional as F

import train
from minilcm.model.vae import VAE, VAEConfig
from weights.emoji.recipe import PARTS, command
from weights.emoji.train_clip import info_nce
from weights.emoji.train_judge import judge_loss
from weights.emoji.train_vae import edge_energy, grow, latent_loss, vae_loss


def test_a_folder_with_a_space_is_one_word():
    args = argparse.Namespace(out="my emoji", names=4, device="cpu")
    assert command(PARTS["styles"], args)[-3:] == ["my emoji/styles", "--names", "4"]


def test_edge_energy():
    """A ramp has none; a dot has |4| + 4 |-1| = 8 over the 49 pixels, wherever it is."""
    ramp = torch.linspace(0, 1, 9).expand(1, 3, 9, 9)
    torch.testing.assert_close(edge_energy(ramp), torch.zeros(1, 3, 1, 1), atol=1e-6, rtol=0)
    for y, x in ((4, 4), (3, 5), (2, 2)):
        dot = torch.zeros(1, 3, 9, 9)
        dot[..., y, x] = 1.0
        torch.testing.assert_close(edge_energy(dot), torch.full((1, 3, 1, 1), 8 / 49))
    assert edge_energy(torch.zeros(1, 3, 128, 128)).shape == (1, 3, 40, 40)


def test_vae_loss():
    """A picture that is a step of 1 between two columns, decoded as 0.5 everywhere: L1 0.5, edges
    1 in one of three columns; KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2.
    """
    m, s, pixels = 2.0, 0.5, torch.tensor([0.0, 0, 1, 1]).expand(1, 3, 4, 4)
    z = torch.full((1, 4, 2, 2), m), torch.full((1, 4, 2, 2), s)
    seen = []
    half = torch.full((1, 3, 4, 4), 0.5)
    vae = SimpleNamespace(moments=lambda x: z, decode=lambda z: seen.append(z) or half)
    loss, x, mean = vae_loss(vae, pixels, torch.full((1, 4, 2, 2), 3.0))
    kl = (m**2 + s**2 - 1 - math.log(s**2)) / 2
    assert loss.item() == pytest.approx(0.5 + 1 / 3 + 1e-4 * kl, abs=1e-7)
    assert x is half and mean is z[0] and (seen[0] == m + 3 * s).all()


def test_latent_loss():
    """The mean of 2 x 2 pixels, encoded by the small one, against the latents."""
    small = SimpleNamespace(encode_mean=lambda x: x[:, :1])
    pixels = torch.arange(4.0).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)  # mean 1.5
    assert latent_loss(small, pixels, torch.full((1, 1, 1, 1), 3.5)).item() == 4


def test_info_nce():
    """Images alike, texts at a right angle, scale 2: the rows' and the columns' losses differ."""
    images, texts = torch.tensor([[1.0, 0], [1, 0]]), torch.eye(2)
    rows = (math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2
    loss = info_nce(images, texts, torch.eye(2), torch.tensor(math.log(2.0)))
    assert loss.item() == pytest.approx((rows + math.log(2)) / 2, abs=1e-6)
    # all texts fit: each counts for a half
    loss = info_nce(images, texts, torch.ones(2, 2), torch.tensor(math.log(2.0)))
    assert loss.item() == pytest.approx((rows + math.log(2)) / 2, abs=1e-6)


def test_judge_loss():
    """A judge that does not know: log of the number of names, and of styles."""

    def judge(x):
        return torch.zeros(len(x), 7), torch.zeros(len(x), 3)

    loss = judge_loss(judge, torch.zeros(2, 3, 4, 4), torch.tensor([0, 6]), torch.tensor([2, 1]))
    assert loss.item() == pytest.approx(math.log(7) + math.log(3), abs=1e-6)


def test_grow_keeps_all_but_the_new_level():
    """Of f2 -> f4: what runs at a resolution of the small one has its weights, and its scale."""
    torch.manual_seed(0)
    small = VAE(VAEConfig(channels=(8, 16), res_blocks=1, groups=2, scale=0.3))
    large = VAE(VAEConfig(channels=(8, 8, 16), res_blocks=1, groups=2, scale=1.0))
    fresh = large.decoder.up[0]["block"][0].conv1.weight.clone()
    large = grow(large, small)
    assert large.cfg.scale == 0.3 and large.factor == 4
    assert torch.equal(large.decoder.up[0]["block"][0].conv1.weight, fresh)
    z0 = torch.randn(1, 4, 4, 4)
    for a, b in (
        (large.decoder.up[2], small.decoder.up[1]),
        (large.encoder.down[2], small.encoder.down[1]),
    ):
        assert all(
            torch.equal(x, b.state_dict()[key])
            for key, x in a.state_dict().items()
            if key in b.state_dict()
        )
    for vae in (large, small):  # the same up to the lowest level's end
        h = vae.decoder.conv_in(vae.post_quant_conv(z0))
        for block in vae.decoder.mid.values():
            h = block(h)
        for block in vae.decoder.up[-1]["block"]:
            h = block(h)
        if vae is large:
            first = F.silu(h)
    torch.testing.assert_close(F.silu(h), first)


def test_the_recipe_is_one_that_can_be_run(tmp_path):
    """Each part needs only parts above it; train.py takes its flags, --resume after a state."""
    args = argparse.Namespace(out=tmp_path, names=4, steps=10, device="cpu", batch=None, looks=None)
    done = []
    for name, part in PARTS.items():
        assert set(part.needs) <= set(done)
        done.append(name)
        line = command(part, args)
        if part.program == "train.py":
            parsed = train.parse(line[2:])
            assert parsed.out == tmp_path / name and not parsed.resume
            assert parsed.steps == max(1, round(10 * part.share))
            parsed.out.mkdir()
            (parsed.out / "state_000001.safetensors").touch()
            assert train.parse(command(part, args)[2:]).resume
        else:
            assert (ROOT / "weights/emoji" / f"{line[2].split('.')[-1]}.py").exists()
