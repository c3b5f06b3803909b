"""LoRA layers: W' x = W x + (lora_alpha / r) B A x on a base that keeps its keys and weights."""

import copy

import pytest
import torch
from tiny import load_tau, random_tau, tiny_unet
from torch import nn

from minilcm.lora import ATTENTION, TARGETS, add_lora, get_tau, lora_layers, lora_off, target_paths
from minilcm.model.precision import quantize
from minilcm.model.unet import Cond, UNet, emoji, sd15, sdxl, ssd1b
from minilcm.run.plan import LiveBytes

RANK, LORA_ALPHA = 3, 7.5


def small_net() -> nn.ModuleDict:
    """The kinds of layer a UNet has: with and without bias, strided, padded, 1x1."""
    torch.manual_seed(0)
    layers = {
        "to_q": nn.Linear(5, 7, bias=False),
        "proj_in": nn.Linear(5, 7),
        "op": nn.Conv2d(4, 6, 3, stride=2, padding=1),
        "conv": nn.Conv2d(4, 6, 3, padding=1),
        "skip_connection": nn.Conv2d(4, 6, 1),
    }
    return nn.ModuleDict(layers).requires_grad_(False)


def inputs(layer: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, 5) if isinstance(layer, nn.Linear) else (2, 4, 9, 8)
    return torch.randn(shape, generator=generator).to(layer.weight.dtype)


def unet_inputs() -> tuple[torch.Tensor, torch.Tensor, Cond]:
    generator = torch.Generator().manual_seed(1)
    z_t, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 32)))
    return z_t, torch.tensor([999, 259]), Cond(context)


def adapted_unet(rank: int = RANK, lora_alpha: float = LORA_ALPHA) -> UNet:
    unet = tiny_unet()
    add_lora(unet, rank, lora_alpha, generator=torch.Generator().manual_seed(2))
    load_tau(unet, random_tau(tiny_unet(), 3, rank, lora_alpha))
    return unet


@pytest.mark.parametrize("path", ["to_q", "proj_in", "op", "conv", "skip_connection"])
def test_layer_equals_the_layer_with_the_summed_weight(path):
    """(W + s B A) x == W x + s B (A x), s = lora_alpha / r, summed here by entry in float64."""
    base = small_net().double()
    net = copy.deepcopy(base)
    add_lora(net, RANK, LORA_ALPHA)
    net.double()
    load_tau(net, random_tau(base, 3, RANK, LORA_ALPHA))

    up, down, lora_alpha = get_tau(net)[path]
    dw = torch.zeros_like(base[path].weight)
    for i in range(RANK):  # a 1x1 kernel B after A: dW[o, i, :, :] = s sum_r B[o, r] A[r, i, :, :]
        dw += LORA_ALPHA / RANK * up[:, i].reshape(-1, *[1] * (dw.ndim - 1)) * down[i]
    x = inputs(base[path])
    without = base[path](x)
    base[path].weight.add_(dw)
    assert lora_alpha == LORA_ALPHA
    torch.testing.assert_close(net[path](x), base[path](x), rtol=0, atol=1e-12)
    assert (net[path](x) - without).abs().max() > 0.1


def test_scale_multiplies_the_low_rank_term():
    """At scale 0.5 the output lies half way between the base's and that of scale 1."""
    net = small_net()
    base = copy.deepcopy(net)
    add_lora(net, RANK, LORA_ALPHA)
    load_tau(net, random_tau(base, 3, RANK, LORA_ALPHA))
    for path, layer in lora_layers(net).items():
        x = inputs(layer)
        whole = layer(x)
        layer.scale = 0.5
        torch.testing.assert_close(layer(x), (base[path](x) + whole) / 2, rtol=0, atol=1e-5)


def test_lora_alpha_defaults_to_the_rank():
    """Without lora_alpha the strength alpha / r is 1 (64/64 in the official recipe)."""
    net = small_net()
    add_lora(net, 4)
    assert {lora_alpha for _, _, lora_alpha in get_tau(net).values()} == {4.0}


def test_off_is_the_base_bitwise():
    """Under lora_off, and at scale 0, the UNet is one that never had a LoRA, bit for bit."""
    base, unet = tiny_unet()(*unet_inputs()), adapted_unet()
    live = unet(*unet_inputs())
    with lora_off(unet):
        assert torch.equal(unet(*unet_inputs()), base)
    assert torch.equal(unet(*unet_inputs()), live)
    assert (live - base).abs().max() > 0.01
    for layer in lora_layers(unet).values():
        layer.scale = 0.0
    assert torch.equal(unet(*unet_inputs()), base)


def test_a_fresh_lora_changes_nothing():
    """B = 0 at the start, so student == teacher bitwise at step 0, although A is not zero."""
    unet, base = tiny_unet(), tiny_unet()(*unet_inputs())
    add_lora(unet, RANK, LORA_ALPHA)
    assert all(not up.any() and down.all() for up, down, _ in get_tau(unet).values())
    assert torch.equal(unet(*unet_inputs()), base)


def test_down_is_kaiming_uniform_and_drawn_by_the_generator():
    """A ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), kaiming_uniform_(a=sqrt(5)); by generator."""
    draws = []
    for seed, global_seed in ((5, 0), (5, 1), (6, 0)):
        net = nn.ModuleDict({"to_q": nn.Linear(64, 32), "op": nn.Conv2d(16, 32, 3)})
        torch.manual_seed(global_seed)
        add_lora(net, 32, generator=torch.Generator().manual_seed(seed))
        draws.append([down for _, down, _ in get_tau(net).values()])
    for down, fan_in in zip(draws[0], (64, 16 * 9)):
        bound = fan_in**-0.5
        assert 0.97 * bound < down.abs().max() <= bound
        assert abs(down.std() / (bound / 3**0.5) - 1) < 0.05
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1]))
    assert not any(torch.equal(a, b) for a, b in zip(draws[0], draws[2]))


def test_base_keeps_its_keys_and_storage():
    """A base file loads strictly before add_lora; after it every base key is on the same memory."""
    unet = tiny_unet(seed=1)
    unet.load_state_dict(tiny_unet().state_dict(), strict=True)
    before = {key: (value.data_ptr(), value.clone()) for key, value in unet.state_dict().items()}
    add_lora(unet, RANK, LORA_ALPHA)
    after = unet.state_dict()
    assert {key for key in after if "lora_" not in key} == set(before)
    assert all(
        after[key].data_ptr() == pointer and torch.equal(after[key], x)
        for key, (pointer, x) in before.items()
    )
    lora = {key for key in after if "lora_" in key}
    assert lora == {
        f"{p}.{end}.weight" for p in target_paths(tiny_unet()) for end in ("lora_up", "lora_down")
    }


def test_only_the_lora_gets_gradients():
    """add_lora returns the LoRA's parameters, no others; they get gradients, the base none."""
    unet = tiny_unet().requires_grad_(True)
    parameters = add_lora(unet, RANK, LORA_ALPHA)
    assert {id(p) for p in parameters} == {id(p) for p in unet.parameters() if p.requires_grad}
    assert len(parameters) == 2 * len(target_paths(unet)) and all(
        p.dtype == torch.float32 for p in parameters
    )
    load_tau(unet, random_tau(tiny_unet(), 3, RANK, LORA_ALPHA))
    unet(*unet_inputs()).square().sum().backward()
    for name, p in unet.named_parameters():
        assert (p.grad is not None and p.grad.any()) if "lora_" in name else p.grad is None, name


def test_first_gradient_is_on_up_only():
    """With B = 0 the gradient of A is zero and that of B is not: training starts at B."""
    unet = tiny_unet()
    add_lora(unet, RANK, LORA_ALPHA)
    unet(*unet_inputs()).square().sum().backward()
    assert all(up.grad.any() and not down.grad.any() for up, down, _ in get_tau(unet).values())


def test_gradients_really_clip():
    """add_lora returns a list, which an optimizer cannot use up (an official script's bug)."""
    unet = tiny_unet()
    parameters = add_lora(unet, RANK, LORA_ALPHA)
    torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    (1e4 * unet(*unet_inputs()).square().sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    assert norm > 100
    assert torch.stack(
        [p.grad.norm() for p in parameters if p.grad is not None]
    ).norm().item() == pytest.approx(1, abs=1e-4)


def test_tau_round_trip():
    """get_tau of one UNet loaded into another: the same output bitwise; tensors are copied."""
    one, other = adapted_unet(), tiny_unet()
    add_lora(other, RANK, LORA_ALPHA)
    load_tau(other, get_tau(one))
    assert torch.equal(one(*unet_inputs()), other(*unet_inputs()))
    assert all(
        torch.equal(a, b)
        for p in get_tau(one)
        for a, b in zip(get_tau(one)[p][:2], get_tau(other)[p][:2])
    )
    get_tau(one)["input_blocks.1.0.in_layers.2"][0].data.zero_()
    assert get_tau(other)["input_blocks.1.0.in_layers.2"][0].any()


def test_lora_off_nests_and_restores():
    """Each layer's own scale is back when the block ends, also an inner one or by an exception."""
    net = small_net()
    add_lora(net, RANK)
    layers = list(lora_layers(net).values())
    for i, layer in enumerate(layers):
        layer.scale = 0.5 + i
    with pytest.raises(KeyError), lora_off(net):
        with lora_off(net):
            assert all(layer.scale == 0 for layer in layers)
        assert all(layer.scale == 0 for layer in layers)
        raise KeyError
    assert [layer.scale for layer in layers] == [0.5, 1.5, 2.5, 3.5, 4.5]


def test_wrong_arguments_are_refused():
    """ValueError with the values: rank below 1; a tau of other modules, rank or lora_alpha."""
    with pytest.raises(ValueError, match="rank is 0"):
        add_lora(tiny_unet(), 0)
    unet = adapted_unet()
    before = {path: up.clone() for path, (up, _, _) in get_tau(unet).items()}
    tau = random_tau(tiny_unet(), 4, RANK, LORA_ALPHA)
    last = list(tau)[-1]
    with pytest.raises(ValueError, match=f"1 LoRA modules do not match, first: {last}"):
        load_tau(unet, {path: x for path, x in tau.items() if path != last})
    with pytest.raises(ValueError, match="rank 3 alpha 7.5, file has 2, 7.5"):
        load_tau(unet, random_tau(tiny_unet(), 4, 2, LORA_ALPHA))
    with pytest.raises(ValueError, match="rank 3 alpha 7.5, file has 3, 3"):
        load_tau(unet, random_tau(tiny_unet(), 4, RANK, 3.0))
    assert all(torch.equal(up, before[path]) for path, (up, _, _) in get_tau(unet).items())


def test_a_second_lora_does_not_replace_the_first():
    """add_lora on a layer that has one is refused and changes nothing; on others it is not."""
    unet = tiny_unet()
    parameters = add_lora(unet, 2, targets=("to_q",))
    with pytest.raises(ValueError, match="to_q has a LoRA already"):
        add_lora(unet, 4)
    assert all(p.requires_grad for p in parameters) and get_tau(unet).keys() == set(
        target_paths(unet, ("to_q",))
    )
    add_lora(unet, 4, targets=("to_k",))


@pytest.mark.parametrize("family, count", [(emoji, None), (sd15, 278), (ssd1b, 423), (sdxl, 788)])
def test_targets_are_the_official_lcm_loras(family, count):
    """As many modules as the released LCM-LoRAs; not conv_in, out, embeddings or norms."""
    with torch.device("meta"):
        unet = UNet(family())
    paths = target_paths(unet)
    assert count is None or len(paths) == count
    adaptable = {path for path, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    left = {"input_blocks.0.0", "out.2", "time_embed.0", "time_embed.2"}
    left |= {"label_emb.0.0", "label_emb.0.2"} if family().adm else set()
    assert adaptable - set(paths) == left and len(paths) == len(set(paths))


def test_attention_only():
    """The attention targets are q, k, v and out of both attentions of every block, nothing else."""
    ends = {path.split("transformer_blocks.")[1] for path in target_paths(tiny_unet(), ATTENTION)}
    assert ends == {
        f"0.attn{i}.{end}" for i in (1, 2) for end in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert set(ATTENTION) < set(TARGETS)


def test_official_parameter_counts():
    """Rank 64, all targets: SD1.5 67,252,224, SSD-1B 104,902,656, SDXL 196,751,360 (from peft)."""
    for family, expected in ((sd15, 67_252_224), (ssd1b, 104_902_656), (sdxl, 196_751_360)):
        with torch.device("meta"):
            unet = UNet(family())
        shapes = {path: unet.get_submodule(path).weight.shape for path in target_paths(unet)}
        assert (
            sum(
                64 * (out + fan_in.numel())
                for out, *rest in shapes.values()
                for fan_in in [torch.Size(rest)]
            )
            == expected
        )


@pytest.mark.parametrize("path", ["to_q", "proj_in", "op", "conv", "skip_connection"])
def test_a_narrow_base_computes_what_a_wide_one_does(path):
    """A frozen float16 weight, a float32 input: output and gradients as if widened beforehand."""
    base = small_net().half()
    net = copy.deepcopy(base).float()
    layers = []
    for each in (base, net):
        add_lora(each, RANK, LORA_ALPHA)
        load_tau(each, random_tau(small_net(), 3, RANK, LORA_ALPHA))
        layers.append(each[path])
    narrow, wide = layers
    assert narrow.weight.dtype == torch.float16 and narrow.lora_up.weight.dtype == torch.float32
    x, y = (inputs(wide).requires_grad_() for _ in range(2))
    out, expected = narrow(x), wide(y)
    assert torch.equal(out, expected) and out.dtype == torch.float32
    out.square().sum().backward(), expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for a, b in zip((narrow.lora_up, narrow.lora_down), (wide.lora_up, wide.lora_down)):
        torch.testing.assert_close(a.weight.grad, b.weight.grad)
    assert narrow.weight.grad is None
    narrow.scale = 0.0
    assert torch.equal(
        narrow(x),
        nn.Linear.forward(wide, y) if wide.weight.ndim == 2 else nn.Conv2d.forward(wide, y),
    )


@pytest.mark.parametrize("path", ["to_q", "proj_in", "op", "conv", "skip_connection"])
@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16])
def test_an_int8_base_computes_what_its_weights_say(path, half):
    """No weight is off by more than half a 127th of its row's largest; output and gradients, in
    autocast too, are those of a layer that has these weights.
    """
    net = small_net()
    add_lora(net, RANK, LORA_ALPHA)
    load_tau(net, random_tau(small_net(), 3, RANK, LORA_ALPHA))
    layer, wide = net[path], copy.deepcopy(net[path])
    quantize(layer)
    with torch.no_grad():
        weight = layer.weight.float() * layer.weight_scale.float()
        most = 0.502 / 127 * wide.weight.flatten(1).abs().amax(1)  # half, and bfloat16's rounding
        assert ((weight - wide.weight).flatten(1).abs().amax(1) <= most).all()
        wide.weight.copy_(weight)
    x, y = (inputs(wide).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", half, enabled=half != torch.float32):
        out, expected = layer(x), wide(y)
    assert out.dtype == expected.dtype == half and layer.weight.dtype == torch.int8
    torch.testing.assert_close(out, expected)
    out.float().square().sum().backward(), expected.float().square().sum().backward()
    exact = 1e-6 if half == torch.float32 else 5e-3
    for a, b in ((x, y), (layer.lora_down.weight, wide.lora_down.weight)):
        assert (a.grad - b.grad).norm() <= exact * b.grad.norm()


@pytest.mark.parametrize("int8", [False, True])
def test_a_narrow_base_keeps_no_wide_weight(int8):
    """A weight far larger than input and output: after forward, less is alive than W widened. In
    autocast an int8 weight is widened to bfloat16 only.
    """
    net = nn.ModuleDict({"to_q": nn.Linear(512, 512), "conv": nn.Conv2d(128, 128, 3, padding=1)})
    add_lora(net if int8 else net.half(), 2)
    for layer in net.values() if int8 else ():
        quantize(layer)
    for layer, shape in ((net["to_q"], (1, 4, 512)), (net["conv"], (1, 128, 4, 4))):
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16, enabled=int8):
            out = layer(torch.randn(shape, requires_grad=True))
        assert live.now < 0.1 * 4 * layer.weight.numel() < live.peak
        assert live.peak < 5 * layer.weight.numel() or not int8
        out.sum().backward()
