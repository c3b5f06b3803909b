import math

import pytest
import torch
from make_reference import REFERENCE, about, filled
from safetensors.torch import load_file
from torch import nn

from minilcm.lcm import guidance_embedding
from minilcm.lora import add_lora, target_paths
from minilcm.model.layers import SpatialTransformer, timestep_embedding
from minilcm.model.precision import autocast
from minilcm.model.unet import Cond, UNet, UNetConfig, emoji, sd15, sdxl, ssd1b

FAMILIES = {"sd15": sd15, "sdxl": sdxl, "ssd1b": ssd1b}

# The five small UNets of make_reference.py, which tells diffusers block types and layer counts
COMMON = dict(channels=(32, 64, 64), context_dim=48, groups=8)
KINDS = {
    "sd": UNetConfig(
        **COMMON,
        down=((1, 1), (1, 1), (0, 0)),
        middle=1,
        up=((0, 0, 0), (1, 1, 1), (1, 1, 1)),
        heads=8,
    ),
    "sdxl": UNetConfig(
        **COMMON,
        down=((0, 0), (2, 2), (3, 3)),
        middle=3,
        up=((3, 3, 3), (2, 2, 2), (0, 0, 0)),
        head_dim=16,
        linear=True,
        adm=72,
    ),
    "ssd": UNetConfig(
        **COMMON,
        down=((0, 0), (1, 2), (2, 1)),
        middle=None,
        up=((2, 1, 2), (1, 2, 1), (0, 0, 0)),
        head_dim=16,
        linear=True,
        adm=72,
    ),
    "emoji": UNetConfig(
        **COMMON, down=((0,), (1,), (1,)), middle=1, up=((1, 1), (1, 1), (0, 0)), heads=4
    ),
    "tiny": UNetConfig(**COMMON, down=((1,),) * 3, middle=0, up=((1, 1),) * 3, heads=8),
}


@pytest.fixture(scope="module")
def reference():
    return load_file(REFERENCE / "unet.safetensors")


def unet_of(kind):
    """The reference's UNet: weights drawn from its key names, so the key sets are compared too."""
    unet = UNet(KINDS[kind]).requires_grad_(False)
    unet.load_state_dict(filled(about(REFERENCE / "unet.safetensors")["keys"][kind]))
    return unet


def cond_of(kind, reference):
    return Cond(reference["context"], reference["vector"] if KINDS[kind].adm else None)


# ---- against diffusers


@pytest.mark.parametrize("kind", KINDS)
def test_eps_hat_equals_diffusers(reference, kind):
    """eps_hat of diffusers 0.42.1's UNet2DConditionModel, same weights, t = 37 and 801; to 1e-5."""
    eps_hat = unet_of(kind)(reference["z_t"], reference["t"], cond_of(kind, reference))
    torch.testing.assert_close(eps_hat, reference[f"{kind}/eps_hat"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_batch_and_t(reference, kind):
    """An image alone is the image in its batch, and t may be an int; to 1e-5."""
    unet, cond = unet_of(kind), cond_of(kind, reference)
    for i, t in enumerate((37, 801)):
        row = Cond(*(None if x is None else x[i : i + 1] for x in cond))
        alone = unet(reference["z_t"][i : i + 1], t, row)
        torch.testing.assert_close(
            alone, reference[f"{kind}/eps_hat"][i : i + 1], rtol=1e-5, atol=1e-5
        )


def test_other_sizes(reference):
    """Latents need not be square, as long as both sides halve evenly at every level."""
    z_t = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    assert unet_of("emoji")(z_t, 5, cond_of("emoji", reference)).shape == z_t.shape


# ---- against the official files


@pytest.mark.parametrize(
    "family, parameters, tensors",
    [("sd15", 859_520_964, 686), ("sdxl", 2_567_463_684, 1680), ("ssd1b", 1_331_334_404, 944)],
)
def test_official_keys(official_keys, family, parameters, tensors):
    """Keys, shapes, parameter counts of the three official UNets, on the meta device."""
    with torch.device("meta"):
        unet = UNet(FAMILIES[family]())
    assert {key: list(x.shape) for key, x in unet.state_dict().items()} == official_keys[family]
    assert len(official_keys[family]) == tensors
    assert sum(x.numel() for x in unet.parameters()) == parameters


@pytest.mark.parametrize(
    "family, modules, trainable",
    [("sd15", 278, 67_252_224), ("sdxl", 788, 196_751_360), ("ssd1b", 423, 104_902_656)],
)
def test_lora_counts(family, modules, trainable):
    """Modules and rank-64 parameters of the released LCM-LoRAs (2311.05556 table 1)."""
    with torch.device("meta"):
        unet = UNet(FAMILIES[family]())
    assert len(target_paths(unet)) == modules
    parameters = add_lora(unet, 64)
    assert len(parameters) == 2 * modules
    assert sum(x.numel() for x in parameters) == trainable
    assert sum(x.numel() for x in unet.parameters() if x.requires_grad) == trainable


def test_emoji_size():
    """The shipped model: 10.9 M parameters, 4x16x16 latents come back as such."""
    unet = UNet(emoji())
    assert sum(x.numel() for x in unet.parameters()) == pytest.approx(10.9e6, rel=0.005)
    assert unet(torch.zeros(1, 4, 16, 16), 5, Cond(torch.zeros(1, 77, 128))).shape == (1, 4, 16, 16)


@pytest.mark.parametrize("make", [sd15, sdxl, ssd1b, emoji])
def test_norm_eps(make):
    """GroupNorm eps is 1e-6 before a transformer, else 1e-5; LayerNorm 1e-5, as CompVis has it."""
    with torch.device("meta"):
        unet = UNet(make())
    before_transformer = {m.norm for m in unet.modules() if isinstance(m, SpatialTransformer)}
    norms = [m for m in unet.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
    assert before_transformer and len(norms) > len(before_transformer)
    for norm in norms:
        assert norm.eps == (1e-6 if norm in before_transformer else 1e-5)
        assert isinstance(norm, nn.LayerNorm) or norm.num_groups == make().groups


def test_heads():
    """SD1.5 has 8 heads everywhere, of width 40, 80, 160; SDXL has 10 and 20, of width 64."""
    for make, expected in (
        (sd15, {320: 8, 640: 8, 1280: 8}),
        (sdxl, {640: 10, 1280: 20}),
        (ssd1b, {640: 10, 1280: 20}),
    ):
        with torch.device("meta"):
            unet = UNet(make())
        attentions = [m for m in unet.modules() if hasattr(m, "to_q")]
        assert {(m.to_q.in_features, m.heads) for m in attentions} == set(expected.items())


# ---- parts


def test_timestep_embedding():
    """LDM's util.py: cosines first, frequency i is 10000^(-i / half); at t = 0 ones then zeros."""
    e = timestep_embedding(torch.tensor([0, 801]), 8)
    angles = [801 * 10000 ** (-i / 4) for i in range(4)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert e[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert e[1].tolist() == pytest.approx(expected, abs=1e-4)
    assert timestep_embedding(torch.tensor([3]), 320).shape == (1, 320)


def test_guidance_embedding_enters_before_the_time_mlp():
    """A full LCM adds cond_proj(w_emb), no bias, to t's sinusoids, as diffusers; 0: no change."""
    torch.manual_seed(0)
    unet = UNet(
        UNetConfig(
            **COMMON,
            down=((0,), (1,), (1,)),
            middle=1,
            up=((1, 1), (1, 1), (0, 0)),
            heads=4,
            w_dim=256,
        )
    )
    proj = unet.state_dict()["time_embedding.cond_proj.weight"]
    assert proj.shape == (32, 256) and "time_embedding.cond_proj.bias" not in unet.state_dict()
    seen = []
    unet.time_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    z_t, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([37, 801]), Cond(torch.randn(2, 7, 48))
    w_emb = guidance_embedding(torch.tensor([7.5, 2.0]))
    plain, with_w = unet(z_t, t, cond), unet(z_t, t, cond, w_emb)
    torch.testing.assert_close(seen[1], seen[0] + w_emb @ proj.T)
    torch.testing.assert_close(seen[0], timestep_embedding(t, 32))
    assert not torch.allclose(plain, with_w)
    assert torch.equal(unet(z_t, t, cond, torch.zeros(2, 256)), plain)


def test_cond():
    """cat stacks rows of both parts, to converts both; a missing vector stays missing."""
    a = Cond(torch.zeros(1, 7, 48), torch.zeros(1, 72))
    b = Cond(torch.ones(2, 7, 48), torch.ones(2, 72))
    both = a.cat(b)
    assert both.context.shape == (3, 7, 48) and both.vector[:, 0].tolist() == [0, 1, 1]
    assert Cond(a.context).cat(Cond(b.context)).vector is None
    assert [x.dtype for x in both.to(dtype=torch.bfloat16)] == [torch.bfloat16] * 2
    assert Cond(a.context).to(dtype=torch.bfloat16).vector is None


# ---- devices and formats


@pytest.mark.parametrize("kind", KINDS)
def test_unet_on_cuda_in_float16(fake_cuda, kind):
    """Dry run, float16 weights, float32 inputs on cuda: eps_hat is float32; t int or tensor."""
    unet = fake_cuda(lambda: UNet(KINDS[kind]), torch.float16)
    cond = Cond(
        torch.randn(2, 7, 48, device="cuda"),
        torch.randn(2, 72, device="cuda") if KINDS[kind].adm else None,
    )
    z_t, t = torch.randn(2, 4, 8, 8, device="cuda"), torch.tensor([37, 801])
    for when in (37, t, t.to("cuda")):
        eps_hat = unet(z_t, when, cond)
        assert (eps_hat.device.type, eps_hat.dtype, eps_hat.shape) == (
            "cuda",
            torch.float32,
            (2, 4, 8, 8),
        )


def test_unet_in_bfloat16(reference):
    """Weights in bfloat16 give an eps_hat near the float32 one, from float32 inputs."""
    eps_hat = unet_of("sdxl").bfloat16()(
        reference["z_t"], reference["t"], cond_of("sdxl", reference)
    )
    expected = reference["sdxl/eps_hat"]
    assert (eps_hat - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_first_and_last_layers_are_float32(reference, stored):
    """In bfloat16, stored or by autocast, z_t is not rounded before it is used and eps_hat is not
    rounded after: at t = 999 x0 has 14.6 times eps_hat's error.
    """
    unet, z_t = unet_of("sd").to(stored), reference["z_t"]

    def eps_hat(z_t: torch.Tensor) -> torch.Tensor:
        with autocast("cpu", torch.bfloat16), torch.no_grad():
            return unet(z_t, reference["t"], cond_of("sd", reference))

    assert eps_hat(z_t).dtype == torch.float32
    assert not torch.equal(eps_hat(z_t), eps_hat(z_t).bfloat16().float())
    assert not torch.equal(eps_hat(z_t), eps_hat(z_t.bfloat16().float()))
