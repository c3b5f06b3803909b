"""How the emoji model is made: its training's formulas, and a recipe that train.py understands."""

import argparse

import pytest
import torch
from tiny import ROOT
from torch.nn import functional as F

import train
from minilcm.model.vae import VAE, VAEConfig
from weights.emoji.recipe import PARTS, command
from weights.emoji.train_vae import against, grow, hinge


def test_hinge():
    """No loss beyond the margin of 1 on the right side; 1 each at 0; linear on the wrong side."""
    assert hinge(torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -7.0])) == 0
    assert hinge(torch.zeros(3), torch.zeros(3)) == 2
    assert hinge(torch.tensor([-2.0]), torch.tensor([3.0])) == 3 + 4


@pytest.mark.parametrize("weight", [0.2, 3.0])
def test_adversarial_gradient_has_weight_times_the_others_size(weight):
    """At `last`: grad = g1 + weight |g1| / |g2| g2, whatever the two losses' own scales."""
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    one = (last * torch.tensor([3.0, 4.0])).sum()
    other = 100 * (last * torch.tensor([4.0, -3.0])).sum()
    (gradient,) = torch.autograd.grad(against(one, other, last, weight), last)
    expected = torch.tensor([3.0, 4.0]) + weight * torch.tensor([4.0, -3.0])
    torch.testing.assert_close(gradient, expected)


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
