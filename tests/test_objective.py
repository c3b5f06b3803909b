"""The networks of each objective: student, teacher, target; a dry run of each on a fake card."""

import math

import pytest
import torch
from tiny import CONFIG, TWO_TOWERS, tiny_text, tiny_unet

from minilcm.lcm import guidance_embedding, update_ema
from minilcm.lora import get_tau
from minilcm.model.unet import Cond, UNet
from minilcm.objective import Networks, Objective, learning_rate, loss_of, make_networks

F32 = torch.float32
Z_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T_ = torch.tensor([999, 19])
W = torch.tensor([2.0, 9.0])


def cond() -> Cond:
    return tiny_text().encode(["cat face", "rocket"])


def test_a_lora_is_one_unet_on_off_and_on():
    unet = tiny_unet()
    expected = unet(Z_T, T_, cond())
    nets = make_networks(Objective("lcm", 4), unet, F32)
    assert nets.net is unet and nets.target_unet is None
    for network in nets[:3]:
        assert torch.equal(network(Z_T, T_, cond(), W), expected)  # B = 0
    for up, _, _ in get_tau(unet).values():
        torch.nn.init.normal_(up, generator=torch.Generator().manual_seed(1))
    student, teacher, target = (network(Z_T, T_, cond(), W) for network in nets[:3])
    assert (
        torch.equal(teacher, expected)
        and torch.equal(student, target)
        and not torch.equal(student, teacher)
    )
    assert torch.equal(nets.student(Z_T, T_, cond(), W + 1), student)  # takes no notice of w


def test_a_full_lcm_is_three_unets():
    """They begin as one for any w; the student learns to look at w; only the target follows."""
    unet = tiny_unet()
    expected = unet(Z_T, T_, cond())
    nets = make_networks(Objective("lcm", None), unet, F32)
    for network in nets[:3]:
        assert torch.equal(network(Z_T, T_, cond(), W), expected)
    with torch.no_grad():
        for x in unet.parameters():
            x.add_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), alpha=0.01)
    student, teacher, target = (network(Z_T, T_, cond(), W) for network in nets[:3])
    assert (
        torch.equal(teacher, expected)
        and torch.equal(target, expected)
        and not torch.equal(student, expected)
    )
    assert not torch.equal(nets.student(Z_T, T_, cond(), W + 1), student)
    update_ema(nets.target_unet, unet)
    assert not torch.equal(nets.target(Z_T, T_, cond(), W), expected)
    assert torch.equal(nets.teacher(Z_T, T_, cond(), W), expected)


@pytest.mark.parametrize("kind", ["diffusion", "lcm"])
@pytest.mark.parametrize("rank", [4, None])
def test_ranks_share_what_is_drawn(kind, rank):
    """Rank 0 and rank 1 of two, with a picture each, have the losses of the two rows of one
    process: their mean is the loss of the whole batch. Noise drawn twice, or the other's row, gives
    another number.
    """
    torch.manual_seed(0)
    objective, unet = Objective(kind, rank, w_range=(2.0, 9.0)), tiny_unet()
    nets, z0 = make_networks(objective, unet, F32), torch.randn(2, 4, 8, 8)
    both, null = cond(), tiny_text().null_cond(1)

    def loss(rows: slice, r: int, world: int) -> float:
        part = Cond(both.context[rows])
        generator = torch.Generator().manual_seed(5)
        nulls = Cond(null.context.expand(len(part.context), -1, -1))
        return loss_of(objective, nets, z0[rows], part, nulls, generator, r, world).item()

    whole, first, second = loss(slice(0, 2), 0, 1), loss(slice(0, 1), 0, 2), loss(slice(1, 2), 1, 2)
    assert (first + second) / 2 == pytest.approx(whole, rel=1e-5) and first != pytest.approx(
        second, rel=1e-3
    )
    assert loss(slice(1, 2), 0, 2) != pytest.approx(second, rel=1e-4)


@pytest.mark.parametrize("config", [CONFIG, TWO_TOWERS], ids=["one tower", "two towers"])
@pytest.mark.parametrize("kind", ["diffusion", "lcm"])
@pytest.mark.parametrize("rank, int8", [(4, False), (4, True), (None, False)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_cuda(fake_cuda, monkeypatch, config, kind, rank, int8, checkpointing):
    """Dry run, bfloat16 on cuda: noise and grid are the CPU's, devices and dtypes do not mix."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    unet = fake_cuda(lambda: UNet(config.unet), F32)
    objective = Objective(kind, rank, checkpointing=checkpointing, quantized=int8)
    nets = make_networks(objective, unet, torch.bfloat16)
    trained = [x for x in unet.parameters() if x.requires_grad]
    assert {(x.device.type, x.dtype) for x in trained} == {("cuda", F32)}
    vector = torch.randn(2, config.unet.adm, device="cuda") if config.unet.adm else None
    both = Cond(torch.randn(2, 77, config.unet.context_dim, device="cuda"), vector)
    z0 = torch.randn(2, 4, 8, 8, device="cuda")
    loss = loss_of(objective, nets, z0, both, both, torch.Generator())
    assert (loss.device.type, loss.dtype, loss.shape, loss.requires_grad) == ("cuda", F32, (), True)


def spied(schedule, eps_hat) -> tuple[Networks, dict[str, list]]:
    """Networks that say eps_hat(z_t, t), and what each was called with: [(z_t, t, w)]."""
    seen = {name: [] for name in ("student", "teacher", "target")}

    def network(name):
        def call(z_t, t, cond, w=None):
            seen[name].append((z_t, t, w))
            return eps_hat(z_t, t)

        return call

    return Networks(*map(network, seen), net=None, schedule=schedule), seen


@pytest.mark.parametrize("k, psi_steps", [(1, 1), (20, 1), (100, 1), (300, 3)])
def test_k_is_the_length_of_the_skip(schedule, k, psi_steps):
    """The target is asked k timesteps below the student, not below 0, and the teacher on the way
    there in equal steps: --k and --psi-steps reach the loss.
    """
    nets, seen = spied(schedule, lambda z_t, t: z_t)
    none = Cond(torch.zeros(64, 1, 1))
    loss_of(
        Objective("lcm", 4, k=k, psi_steps=psi_steps),
        nets,
        torch.randn(64, 4, 2, 2),
        none,
        none,
        torch.Generator().manual_seed(0),
    )
    ((_, t_start, w),), ((_, t_end, _),) = seen["student"], seen["target"]
    assert torch.equal(t_end, (t_start - k).clamp(min=0)), "the pair is (t, t - k)"
    asked = [t[:64] for _, t, _ in seen["teacher"]]  # with cond and null_cond in one batch
    way = [(t_start - k * i // psi_steps).clamp(min=0) for i in range(psi_steps)]
    assert len(asked) == psi_steps and all(map(torch.equal, asked, way))
    assert set(t_start.tolist()) <= set(range(19, 1000, 20)) and torch.equal(
        w, torch.full((64,), 7.5)
    )


def test_diffusion_draws_every_timestep_and_weighs_by_min_snr(schedule):
    """t ~ U{0, ..., 999}; a network that says 0 has loss min(SNR, 5) / SNR times eps^2."""
    nets, seen = spied(schedule, lambda z_t, t: torch.zeros_like(z_t))
    z0 = torch.zeros(2000, 4, 1, 1)  # so z_t = sigma eps
    loss = loss_of(
        Objective("diffusion", None), nets, z0, Cond(z0), Cond(z0), torch.Generator().manual_seed(0)
    )
    ((z_t, t, _),) = seen["student"]
    assert (
        t.min() < 10 and t.max() > 990 and t.float().mean().item() == pytest.approx(499.5, abs=25)
    )
    alpha, sigma = schedule.alpha[t].double(), schedule.sigma[t].double()
    snr = (alpha / sigma) ** 2
    eps_squared = (z_t.double().flatten(1) / sigma[:, None]).square().mean(dim=1)
    expected = (snr.clamp(max=5) / snr * eps_squared).mean().item()
    assert (
        loss.item() == pytest.approx(expected, rel=1e-4)
        and expected < 0.95 * eps_squared.mean().item()
    )


def test_student_and_target_of_a_full_lcm_embed_the_same_w():
    """With equal weights they are one function of w: the UNet's, given w's own embedding."""
    unet = tiny_unet()
    nets = make_networks(Objective("lcm", None), unet, F32)
    torch.nn.init.normal_(
        unet.time_embedding["cond_proj"].weight, generator=torch.Generator().manual_seed(1)
    )
    nets.target_unet.load_state_dict(unet.state_dict())
    expected = unet(Z_T, T_, cond(), guidance_embedding(W))
    assert torch.equal(nets.student(Z_T, T_, cond(), W), expected), (
        "the student's w is not the one given"
    )
    assert torch.equal(nets.target(Z_T, T_, cond(), W), expected), (
        "the target's w is not the one given"
    )
    assert not torch.equal(nets.student(Z_T, T_, cond(), W + 1), expected)


def test_learning_rate_ends_at_its_floor():
    assert [learning_rate(2.0, step, 10**6, warmup=4) for step in (0, 1, 3)] == pytest.approx(
        [0.5, 1.0, 2.0]
    )
    assert learning_rate(2.0, 5000, 10000) == pytest.approx(1.0)
    assert learning_rate(2.0, 10**6, 10**6) == pytest.approx(0)
    assert learning_rate(2.0, 10**6, 10**6, floor=0.01) == pytest.approx(0.02)


@pytest.mark.parametrize("steps, warmup", [(50, 5), (300, 30), (1000, 100), (16000, 100)])
def test_warm_up_takes_a_tenth_of_a_short_run(steps, warmup):
    """lr = min(1, (step + 1) / warmup) (1 + cos(pi step / steps)) / 2: a run of 50 steps, too, gets
    near its peak, 1, in the end of its warm-up.
    """
    for step in (0, warmup - 1, warmup, steps - 1):
        rising = min(1, (step + 1) / warmup)
        expected = rising * (1 + math.cos(math.pi * step / steps)) / 2
        assert learning_rate(1.0, step, steps) == pytest.approx(expected)
    assert max(learning_rate(1.0, step, steps) for step in range(steps)) > 0.97
    assert learning_rate(1.0, 0, 1) == 1
