"""How the emoji model is made: its training's formulas, and a recipe that train.py understands."""

import argparse

import torch
from tiny import ROOT
from torch.nn import functional as F

import train
from minilcm.model.vae import VAE, VAEConfig
from weights.emoji.recipe import PARTS, command
from weights.emoji.train_vae import edge_energy, grow


def test_edge_energy():
    """A ramp has none; a dot has |4| + 4 |-1| = 8 over the 49 pixels, wherever it is."""
    ramp = torch.linspace(0, 1, 9).expand(1, 3, 9, 9)
    torch.testing.assert_close(edge_energy(ramp), torch.zeros(1, 3, 1, 1), atol=1e-6, rtol=0)
    for y, x in ((4, 4), (3, 5), (2, 2)):
        dot = torch.zeros(1, 3, 9, 9)
        dot[..., y, x] = 1.0
        torch.testing.assert_close(edge_energy(dot), torch.full((1, 3, 1, 1), 8 / 49))
    assert edge_energy(torch.zeros(1, 3, 128, 128)).shape == (1, 3, 40, 40)


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
