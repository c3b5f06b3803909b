"""tau' = lambda1 tau_style + lambda2 tau_lcm: exact, lora_alpha != rank, and into weights."""

import itertools
import math

import pytest
import torch
from tiny import load_tau, random_tau, tiny_unet
from torch import nn

from minilcm.lora import Tau, add_lora
from minilcm.merge import (
    check_fit,
    combine,
    delta,
    delta_norms,
    distance,
    extract_module,
    merge_into,
)
from minilcm.model.unet import Cond

PATHS = ("to_q", "op")  # a Linear and a convolution
LAMBDAS = [0.8, 1.0, -0.3]


def small_net(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {"to_q": nn.Linear(5, 7), "op": nn.Conv2d(4, 6, 3, stride=2, padding=1)}
    ).requires_grad_(False)


def three_taus() -> list[Tau]:
    """A style, an LCM and a third LoRA: ranks 2, 4, 3, strengths all different, none of them 1."""
    net = small_net()
    return [
        random_tau(net, 1, 2, 5.0, size=1.0),
        random_tau(net, 2, 4, 0.5, size=1.0),
        random_tau(net, 3, 3, 8.0, size=1.0),
    ]


def exact_delta(up: torch.Tensor, down: torch.Tensor, lora_alpha: float) -> torch.Tensor:
    """dW[o, ...] = (lora_alpha / r) sum_r B[o, r] A[r, ...], entry by entry in float64."""
    rank = down.shape[0]
    terms = [
        up[:, r].double().reshape(-1, *[1] * (down.ndim - 1)) * down[r].double()
        for r in range(rank)
    ]
    return lora_alpha / rank * sum(terms)


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 5e-6) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("path", PATHS)
def test_delta(path):
    """`delta` has the weight's shape, is the entry-by-entry sum; float16 factors sum in float32."""
    up, down, lora_alpha = three_taus()[0][path]
    assert delta(up, down, lora_alpha).shape == small_net()[path].weight.shape
    close(delta(up, down, lora_alpha), exact_delta(up, down, lora_alpha))
    half = delta(up.half(), down.half(), lora_alpha)
    assert half.dtype == torch.float32
    close(half, exact_delta(up.half(), down.half(), lora_alpha))


def test_delta_is_what_the_layer_adds():
    """A convolution with weight `delta` does what lora_down (the base's stride), lora_up do."""
    up, down, lora_alpha = three_taus()[0]["op"]
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    two = lora_alpha / 2 * torch.conv2d(torch.conv2d(x, down, stride=2, padding=1), up)
    close(torch.conv2d(x, delta(up, down, lora_alpha), stride=2, padding=1), two, 2e-4)


@pytest.mark.parametrize("path", PATHS)
def test_combine_is_the_weighted_sum_of_deltas(path):
    """The mix's delta == sum lambda_i delta_i; its rank is the sum of ranks, as its lora_alpha."""
    taus = three_taus()
    mix = combine(taus, LAMBDAS)
    assert mix[path][1].shape[0] == mix[path][2] == 2 + 4 + 3
    close(delta(*mix[path]), sum(lam * exact_delta(*tau[path]) for lam, tau in zip(LAMBDAS, taus)))


@pytest.mark.parametrize("path", PATHS)
def test_combine_is_linear_and_has_no_order(path):
    """Linear in each lambda, the same for each of the six orders, and zero for lambdas of zero."""
    taus = three_taus()
    at = {lam: delta(*combine(taus, [lam, 0.7, 0.2])[path]) for lam in (0.0, 1.0, 2.5)}
    close(at[2.5], at[0.0] + 2.5 * (at[1.0] - at[0.0]), 2e-5)
    for order in itertools.permutations(range(3)):
        mixed = combine([taus[i] for i in order], [LAMBDAS[i] for i in order])
        close(delta(*mixed[path]), delta(*combine(taus, LAMBDAS)[path]))
    assert not delta(*combine(taus, [0, 0, 0])[path]).any()


def test_combine_keeps_modules_that_only_one_lora_has():
    """An attention-only style and a full LCM-LoRA: a module of one alone has its delta alone."""
    style, lcm, _ = three_taus()
    del style["op"]
    mix = combine([style, lcm], [0.8, 1.0])
    assert set(mix) == set(PATHS)
    close(delta(*mix["op"]), exact_delta(*lcm["op"]))
    assert combine([], []) == {}


def test_combine_then_merge_is_merge_after_merge():
    """W + dW_mix == (W + lambda_1 dW_1) + lambda_2 dW_2."""
    once, twice = small_net(), small_net()
    style, lcm, _ = three_taus()
    merge_into(once, combine([style, lcm], [0.8, 1.0]))
    merge_into(twice, style, 0.8)
    merge_into(twice, lcm, 1.0)
    for path in PATHS:
        close(once[path].weight, twice[path].weight)
        assert torch.equal(once[path].bias, small_net()[path].bias)


@pytest.mark.parametrize("path", PATHS)
def test_combine_is_not_the_average_of_the_factors(path):
    """Adding sqrt(lambda s) B and sqrt(lambda s) A of two LoRA, as peft's "linear" does, gives the
    sum plus cross terms sqrt(l1 s1 l2 s2) (B1 A2 + B2 A1), as large as the signal for random
    factors. `combine` is free of them.
    """
    net = small_net()
    one = random_tau(net, 1, 3, 4.0, size=1.0)[path]
    two = random_tau(net, 2, 3, 2.0, size=1.0)[path]
    l1, l2 = 0.8, 1.0
    c1, c2 = (l1 * one[2] / 3) ** 0.5, (l2 * two[2] / 3) ** 0.5
    averaged = exact_delta(c1 * one[0] + c2 * two[0], c1 * one[1] + c2 * two[1], 3.0)
    exact = l1 * exact_delta(*one) + l2 * exact_delta(*two)
    cross = c1 * c2 * (exact_delta(one[0], two[1], 3.0) + exact_delta(two[0], one[1], 3.0))
    close(averaged, exact + cross, 1e-5)
    assert 0.5 < cross.norm() / exact.norm() < 2
    close(delta(*combine([{path: one}, {path: two}], [l1, l2])[path]), exact)


def test_each_lora_keeps_its_own_scale():
    """Merged one by one, a style goes from 0.7 to 0.2 beside an LCM-LoRA at 1, and out again."""
    net, style, lcm = small_net(), *(random_tau(small_net(), seed, 2, 5.0) for seed in (1, 2))
    merge_into(net, style, 0.7)
    assert all((net[path].weight - small_net()[path].weight).abs().max() > 0.1 for path in PATHS)
    merge_into(net, lcm)
    merge_into(net, style, 0.2 - 0.7)
    mixed = small_net()
    merge_into(mixed, combine([style, lcm], [0.2, 1.0]))
    for path in PATHS:
        close(net[path].weight, mixed[path].weight, 1e-6)
    merge_into(net, style, -0.2)
    merge_into(net, lcm, -1.0)
    for path in PATHS:
        close(net[path].weight, small_net()[path].weight, 1e-6)


def test_merged_unet_equals_live_lora_layers():
    """The whole UNet: LoRA layers and merged weights give one output, alone and mixed."""
    generator = torch.Generator().manual_seed(0)
    z_t, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 32)))
    tau = random_tau(tiny_unet(), 1, 2, 3.0, size=0.1)
    live, merged, base = tiny_unet(), tiny_unet(), tiny_unet()
    add_lora(live, 2, 3.0)
    load_tau(live, tau)
    merge_into(merged, tau)
    with torch.no_grad():
        out = [unet(z_t, 499, Cond(context)) for unet in (live, merged, base)]
        close(out[0], out[1], 1e-4)
        assert (out[0] - out[2]).abs().max() > 0.05
        style = random_tau(tiny_unet(), 2, 4, 1.0, size=0.1)
        merge_into(live, style, 0.5)  # into the base weight below the LoRA layer
        merge_into(base, combine([tau, style], [1.0, 0.5]))
        close(live(z_t, 499, Cond(context)), base(z_t, 499, Cond(context)), 1e-4)


def test_a_lora_of_another_model_is_refused_and_changes_nothing():
    """One line with LoRA, first module, both shapes; no weight has changed, even one that fits."""
    net, tau = small_net(), three_taus()[0]
    other = {"to_q": tau["to_q"], "op": (tau["op"][0], torch.zeros(2, 4, 1, 1), 5.0)}
    with pytest.raises(
        ValueError,
        match=r"^style.st: made for another model: op is \(6, 4, 3, 3\) here, \(6, 4, 1, 1\) in",
    ):
        check_fit(net, other, "style.st")
    with pytest.raises(ValueError, match=r"^LoRA: made for another model: op is"):
        merge_into(net, other)
    with pytest.raises(
        ValueError, match=r"made for another model: 1 of 3 modules are not here, first: to_k"
    ):
        merge_into(net, {**tau, "to_k": tau["to_q"]})
    assert all(torch.equal(net[path].weight, small_net()[path].weight) for path in PATHS)
    with pytest.raises(ValueError, match="2 LoRA but 1 lambdas"):
        combine([tau, tau], [1.0])
    with pytest.raises(ValueError, match=r"op: LoRA of different models"):
        combine([tau, other], [1.0, 1.0])


def test_bfloat16_weights_are_summed_in_float32_and_rounded_once():
    """W(bfloat16) + dW(float32) -> bfloat16 is the float64 sum rounded once; dW is not rounded."""
    net, tau = small_net().bfloat16(), three_taus()[0]
    before = {path: net[path].weight.clone() for path in PATHS}
    merge_into(net, tau)
    for path in PATHS:
        dw = delta(*tau[path])
        assert net[path].weight.dtype == torch.bfloat16
        assert torch.equal(net[path].weight, (before[path].double() + dw.double()).bfloat16())
        assert not torch.equal(net[path].weight, before[path] + dw.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_weight_in_any_layout_gets_its_delta(dtype):
    """channels_last, where a flattened weight is a copy: nothing may be added to that instead."""
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(s, generator=generator) for s in ((6, 2, 1, 1), (2, 4, 3, 3)))
    weight = torch.randn(6, 4, 3, 3, generator=generator).to(dtype)
    merged = {"x.weight": weight.clone().to(memory_format=torch.channels_last)}
    merge_into(merged, {"x": (up, down, 4.0)})
    assert torch.equal(merged["x.weight"], (weight.float() + delta(up, down, 4.0)).to(dtype))


def test_a_1x1_kernel_is_a_matrix():
    """combine, distance and merging take either form at a path, in any order; 3x3 is another
    model.
    """
    g = torch.Generator().manual_seed(0)
    up, down = torch.randn(4, 2, generator=g), torch.randn(2, 5, generator=g)
    matrix = {"x": (up, down, 1.0)}
    kernel = {"x": (up[:, :, None, None], down[:, :, None, None], 1.0)}
    for a, b in ((matrix, kernel), (kernel, matrix)):
        assert distance(a, b) == 0
        mix = combine([a, b], [2.0, -0.5])
        torch.testing.assert_close(
            delta(*mix["x"]).flatten(1), 1.5 * delta(*matrix["x"]), rtol=1e-5, atol=1e-5
        )
    for shape in ((4, 5), (4, 5, 1, 1)):
        weights = {"x.weight": torch.zeros(shape)}
        merge_into(weights, matrix)
        merge_into(weights, kernel, -1.0)
        assert weights["x.weight"].abs().max() < 1e-6
    other = {"x": (up[:, :, None, None], torch.ones(2, 5, 3, 3), 1.0)}
    for call in (lambda: combine([matrix, other], [1, 1]), lambda: distance(other, kernel)):
        with pytest.raises(ValueError, match="x: LoRA of different models, shapes"):
            call()
    assert distance(matrix, {}) == math.inf and distance({}, matrix) == 1 and distance({}, {}) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sum_beyond_the_dtype(dtype):
    """The largest number is reached, and one beyond it refused by path and dtype."""
    most = torch.finfo(dtype).max
    weights = {"x.weight": torch.full((2, 2), most, dtype=dtype)}
    merge_into(weights, {"x": (torch.zeros(2, 1), torch.ones(1, 2), 1.0)})
    assert weights["x.weight"].eq(most).all()
    with pytest.raises(ValueError, match=f"LoRA: x: the sum is beyond {str(dtype)[6:]}'s largest"):
        merge_into(weights, {"x": (torch.full((2, 1), most / 8), torch.ones(1, 2), 1.0)})


# ---- norms and ranks


def test_norm_of_a_block_is_that_of_all_its_modules():
    """sqrt(sum ||dW||_F^2) over the modules of each block."""
    unet = tiny_unet()
    tau = random_tau(unet, 1, 4, 6.0)
    squares = {}
    for path, three in tau.items():
        block = ".".join(path.split(".")[: 1 if path.startswith("middle") else 2])
        squares[block] = squares.get(block, 0.0) + delta(*three).double().square().sum().item()
    assert delta_norms(tau) == pytest.approx({k: x**0.5 for k, x in squares.items()}, rel=1e-5)


def test_an_extracted_module_is_the_best_of_its_rank():
    """Eckart-Young: what is lost are the smaller singular values; to 0.3 %, of a flat spectrum."""
    x = torch.randn(96, 80, generator=torch.Generator().manual_seed(0))
    lost = (x - delta(*extract_module(x, 8))).norm()
    assert lost < 1.003 * torch.linalg.svdvals(x)[8:].norm()
