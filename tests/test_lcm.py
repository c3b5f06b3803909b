"""LCM-LoRA's central facts. Most need no network: on Gaussian data all answers are known."""

import copy
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from make_reference import STEPS, TCD, draw, generators, toy_eps
from tiny import noise
from torch import nn

from minilcm import lcm
from minilcm.generate import timesteps
from minilcm.lcm import (
    boundary_scalings,
    f_theta,
    guidance_embedding,
    huber,
    lcd_loss,
    lcm_grid,
    sample_lcm,
    train_grid,
    update_ema,
)
from minilcm.lora import add_lora, get_tau, lora_off
from minilcm.model.unet import Cond, UNet, UNetConfig, emoji
from minilcm.schedule import add_noise, make_schedule, x0_from_eps
from minilcm.solver import ddim_step, guided_eps, sample_ddim, trailing_grid

# ---- the consistency function


def test_boundary_scalings_golden():
    """c_skip = .25 / (s^2 + .25), c_out = s / sqrt(s^2 + .25), s = 10 t, as diffusers has it.

    c_skip + c_out^2 = 1, which Consistency Models' own c_out (with a factor sigma_data) does not
    fulfil.
    """
    c_skip, c_out = boundary_scalings(torch.tensor([0, 1, 19, 259, 999]))
    assert c_skip.tolist() == pytest.approx(
        [1, 2.4938e-3, 6.9252e-6, 3.7269e-8, 2.5050e-9], rel=1e-4
    )
    assert (1 - c_out).tolist() == pytest.approx([1, 1.2477e-3, 3.46e-6, 0, 0], abs=1e-7)
    t = torch.arange(1000)
    c_skip, c_out = boundary_scalings(t)
    torch.testing.assert_close(c_skip + c_out**2, torch.ones(1000), rtol=0, atol=1e-6)
    s = 10 * t.double()
    torch.testing.assert_close(c_skip.double(), 0.25 / (s**2 + 0.25), rtol=1e-6, atol=0)
    torch.testing.assert_close(c_out.double(), s / (s**2 + 0.25).sqrt(), rtol=1e-6, atol=0)


def test_f_is_the_identity_at_0(schedule):
    """The boundary condition f(z, 0) = z holds bitwise for any network (2303.01469)."""
    z = noise(0)
    assert torch.equal(f_theta(z, 100 * noise(1), 0, schedule), z)
    at_0_and_5 = f_theta(z, 100 * noise(1), torch.tensor([0, 5]), schedule)
    assert torch.equal(at_0_and_5[0], z[0]) and not torch.equal(at_0_and_5[1], z[1])


def test_f_is_x0_on_the_training_grid(schedule):
    """Else f is c_skip z + c_out x0 (2310.04378 eq. 9), on the grid (t >= 19) x0 to 1e-5."""
    z, eps_hat = noise(0), noise(1)
    for t in (1, 19, 499, 999):
        x0 = x0_from_eps(z, eps_hat, t, schedule)
        c_skip, c_out = 0.25 / (100 * t**2 + 0.25), 10 * t / math.sqrt(100 * t**2 + 0.25)
        torch.testing.assert_close(
            f_theta(z, eps_hat, t, schedule), c_skip * z + c_out * x0, rtol=1e-6, atol=1e-6
        )
        if t >= 19:
            torch.testing.assert_close(f_theta(z, eps_hat, t, schedule), x0, rtol=1e-5, atol=5e-5)
    assert f_theta(z.bfloat16(), eps_hat.bfloat16(), 499, schedule).dtype == torch.float32


def test_guidance_embedding_golden():
    """w = 7.5 as diffusers embeds it: sines first, of 1000 w exp(-ln(10000) j / 127)."""
    e = guidance_embedding(torch.tensor([7.5, 0.0]))
    assert e.shape == (2, 256)
    golden = {0: -0.8512359, 1: 0.8421312, 127: 0.6816387, 128: -0.5247833, 255: 0.7316889}
    # float32 angles up to 7500
    assert {i: e[0, i].item() for i in golden} == pytest.approx(golden, abs=2e-4)
    assert e[1].tolist() == [0] * 128 + [1] * 128
    angle = 7500 * np.exp(-np.log(10000) * np.arange(128) / 127)
    np.testing.assert_allclose(
        e[0].numpy(), np.concatenate([np.sin(angle), np.cos(angle)]), atol=2e-3
    )


# ---- grids


def test_train_grid_golden():
    """19, 39, ..., 999: the official scripts' "DDIM solver" grid, with 999, without 0. int64."""
    assert train_grid().tolist() == list(range(19, 1000, 20))
    assert train_grid().dtype == torch.int64


GRIDS = {
    1: [999],
    2: [999, 499],
    3: [999, 679, 339],
    4: [999, 759, 499, 259],
    5: [999, 799, 599, 399, 199],
    6: [999, 839, 679, 499, 339, 179],
    8: [999, 879, 759, 639, 499, 379, 259, 139],
    10: list(range(999, 0, -100)),
    50: list(range(999, 0, -20)),
}


def test_lcm_grid_golden():
    """diffusers 0.42.1's LCMScheduler timesteps; strength shortens the grid, not the steps."""
    assert {steps: lcm_grid(steps) for steps in GRIDS} == GRIDS
    assert lcm_grid(4, 0.8) == [799, 599, 399, 199]
    assert lcm_grid(4, 0.5) == [499, 379, 259, 139]
    assert lcm_grid(4, 0.1) == [99, 79, 59, 39]
    assert lcm_grid(1, 0.02) == [19]


@pytest.mark.parametrize("strength", [1.0, 0.9, 0.8, 0.75, 0.6, 0.58, 0.5, 0.3, 0.29, 0.1, 0.02])
def test_lcm_grid_is_diffusers_rule(strength):
    """Every possible number of steps, against LCMScheduler.set_timesteps' rule written with numpy.

    Four pairs apart, all with strength < 1: there numpy's i * (length / steps) falls a last digit
    short of an integer.
    """
    grid = [20 * j - 1 for j in range(1, int(50 * strength) + 1)][::-1]
    for steps in range(1, len(grid) + 1):
        where = np.linspace(0, len(grid), steps, endpoint=False)
        if (len(grid), steps) in {(30, 22), (30, 26), (45, 33), (45, 39)}:
            assert (np.floor(where) != np.floor(where + 1e-9)).any()
            where += 1e-9
        assert lcm_grid(steps, strength) == [grid[i] for i in np.floor(where).astype(int)]


@pytest.mark.parametrize(
    "steps, strength, most",
    [(0, 1.0, 50), (-1, 1.0, 50), (51, 1.0, 50), (26, 0.5, 25), (6, 0.1, 5)],
)
def test_lcm_grid_refuses_bad_steps(steps, strength, most):
    """No step, or more than the grid has: one line with value and limit."""
    with pytest.raises(ValueError, match=f"steps is {steps}; give 1 to {most}"):
        lcm_grid(steps, strength)


@pytest.mark.parametrize("strength", [0.0, 0.019, 1.02, 1.5, -1.0, math.inf, math.nan])
def test_lcm_grid_refuses_bad_strengths(strength):
    with pytest.raises(ValueError, match=f"strength is {strength}; give 0.02 to 1"):
        lcm_grid(1, strength)


# ---- the distance and the average


def test_huber():
    """Mean of sqrt(d^2 + c^2) - c: d^2 / (2c) for small d, |d| - c for large; its gradient."""
    d = torch.tensor([0.0, 1e-5, -1e-5, 1e-3, 0.2, -3.0], dtype=torch.float64, requires_grad=True)
    each = torch.stack([huber(x, torch.zeros_like(x)) for x in d])
    assert each[0].item() == 0
    assert each[1].item() == pytest.approx(1e-10 / 2e-3, rel=1e-4) == each[2].item()
    assert each[3].item() == pytest.approx(1e-3 * (math.sqrt(2) - 1))
    assert each[4:].tolist() == pytest.approx([0.2 - 1e-3, 3 - 1e-3], rel=1e-4)
    loss = huber(d, torch.zeros_like(d))
    torch.testing.assert_close(loss, each.mean())
    loss.backward()
    torch.testing.assert_close(6 * d.grad, d.detach() / (d.detach() ** 2 + 1e-6).sqrt())
    assert huber(torch.tensor(0.0), torch.tensor(4.0), 3.0).item() == 2  # sqrt(16 + 9) - 3


def test_ema():
    """After n updates from a constant source: theta^- = theta + mu^n (theta^-_0 - theta)."""
    torch.manual_seed(0)
    target, student = nn.Linear(3, 2), nn.Linear(3, 2)
    start, goal = copy.deepcopy(target.state_dict()), copy.deepcopy(student.state_dict())
    for _ in range(7):
        update_ema(target, student, ema_rate=0.9)
    for key, x in target.state_dict().items():
        torch.testing.assert_close(x, goal[key] + 0.9**7 * (start[key] - goal[key]))
        assert torch.equal(student.state_dict()[key], goal[key])
    update_ema(target, student)  # 0.95
    torch.testing.assert_close(
        target.weight, goal["weight"] + 0.95 * 0.9**7 * (start["weight"] - goal["weight"])
    )
    assert all(x.requires_grad for x in target.parameters())


# ---- latent consistency distillation on Gaussian data

M, M_NULL, W = 0.7, -0.2, 7.5
M_W = M + W * (M - M_NULL)  # 7.45: what the guided teacher draws


def teacher_of(gaussian):
    """The exact network for data N(cond, s^2)."""
    return lambda z_t, t, cond, w: gaussian._replace(m=cond).eps(z_t, t)


def affine_student(schedule, p, q):
    """The network with f(z, 20 n + 19) = p[n] + q[n] z: enough to be perfect on Gaussian data."""

    def student(z_t, t, cond, w):
        n = torch.as_tensor((t - 19) // 20).clamp(min=0)  # at t = 0 f does not look at eps_hat
        shape = (-1, *[1] * (z_t.ndim - 1))
        f = p[n].reshape(shape) + q[n].reshape(shape) * z_t
        c_skip, c_out = (c.reshape(shape) for c in boundary_scalings(t))
        alpha, sigma = schedule.at(t, z_t)
        return (z_t - alpha * (f - c_skip * z_t) / c_out.clamp(min=1e-6)) / sigma

    return student


def fixed_point(gaussian, m):
    """p and q (50,) with f_n(z) = f_{n-1}(A z + b), DDIM's step for N(m, s^2); f_{-1}: identity."""
    p, q, ps, qs = 0.0, 1.0, [], []
    for t in range(19, 1000, 20):
        t_end, s = max(t - 20, 0), gaussian.s
        (alpha, sigma), (alpha_end, sigma_end) = (
            (table.alpha[i].item(), table.sigma[i].item())
            for table in [gaussian.schedule]
            for i in (t, t_end)
        )
        A = (alpha_end * alpha * s**2 + sigma_end * sigma) / (alpha**2 * s**2 + sigma**2)
        b = (alpha_end - A * alpha) * m  # the trajectory of the mean, alpha m, stays one
        p, q = p + q * b, q * A
        ps.append(p), qs.append(q)
    return torch.tensor(ps, dtype=torch.float64), torch.tensor(qs, dtype=torch.float64)


def drawn_loss(
    student, teacher, target, z0, cond, null_cond, schedule, seed, w_range=(W, W), n=None, **flags
):
    """lcd_loss with n, w and eps as `draw` draws them by this seed; or with these n."""
    drawn, w, eps = lcm.draw(tuple(z0.shape), torch.Generator().manual_seed(seed), w_range)
    n = drawn if n is None else n
    return lcd_loss(student, teacher, target, z0, cond, null_cond, schedule, n, w, eps, **flags)


def gaussian_loss(gaussian, schedule, student, n, w=W, seed=0, target=None, shape=(4, 8, 8)):
    """lcd_loss with the guided Gaussian teacher at the grid indices n, on data N(M, s^2)."""
    z0 = M + gaussian.s * noise(seed, (len(n), *shape))
    networks = student, teacher_of(gaussian), target or student
    return drawn_loss(*networks, z0, M, M_NULL, schedule, seed + 1, (w, w), n)


def test_lcd_loss_vanishes_at_the_fixed_point(gaussian, schedule):
    """f_n = f_{n-1} o DDIM_n is the zero of the loss at all 50 indices; nothing near it is.

    A wrong w, t_end, boundary or guidance direction in the loss would put the zero elsewhere.
    """
    p, q = fixed_point(gaussian, M_W)
    every = torch.arange(50)
    assert gaussian_loss(gaussian, schedule, affine_student(schedule, p, q), every) < 1e-6
    for off_p, off_q in ((0.02, 0), (-0.02, 0), (0, 0.02), (0, -0.02)):
        for n in (0, 25, 49):
            p_off, q_off = p.clone(), q.clone()
            p_off[n] += off_p
            q_off[n] += off_q
            assert (
                gaussian_loss(
                    gaussian, schedule, affine_student(schedule, p_off, q_off), torch.tensor([n])
                )
                > 5e-3
            )
    # no guidance; w - 1; w taken for the scale
    for m in (M, M + (W - 1) * (M - M_NULL), M_NULL + W * (M - M_NULL)):
        wrong = affine_student(schedule, *fixed_point(gaussian, m))
        assert gaussian_loss(gaussian, schedule, wrong, every) > 5e-3


def test_one_step_equals_fifty_of_the_teacher(gaussian, schedule):
    """At the fixed point one LCM step is 50 of guided DDIM: alpha_0 (m_w + (z/alpha_999 - m_w) F).

    F = prod (s^2 + S S') / (s^2 + S^2) = 0.0325786. So an LCM ends at alpha_bar_0 and cannot beat
    its teacher, whose distance to the exact ODE here is 0.03.
    """
    p, q = fixed_point(gaussian, M_W)
    z_T, student = noise(), affine_student(schedule, p, q)
    one = sample_lcm(lambda z, t: student(z, t, None, None), z_T, schedule, [999], generators())
    closed = schedule.alpha[0] * (
        M_W + (z_T.double() / gaussian.schedule.alpha[999] - M_W) * 0.0325786
    )
    torch.testing.assert_close(one.double(), closed, rtol=0, atol=1e-4)

    def unet(z, t, cond):
        return gaussian._replace(m=cond.context[:, :, None, None]).eps(z, t)

    cond, null_cond = Cond(torch.full((2, 1), M)), Cond(torch.full((2, 1), M_NULL))
    fifty = sample_ddim(guided_eps(unet, cond, null_cond, W), z_T, schedule, trailing_grid(50))
    torch.testing.assert_close(one, fifty, rtol=0, atol=1e-4)
    exact = gaussian._replace(m=M_W).ode(z_T.double(), 999, 0)
    assert 0.01 < (one - exact).square().mean().sqrt() < 0.1


def test_distillation_finds_the_fixed_point(gaussian, schedule):
    """Minimising lcd_loss by index, from t = 19 up, leads p and q to the recursion, to 1e-5."""
    p_exact, q_exact = fixed_point(gaussian, M + 1.0 * (M - M_NULL))
    p, q = torch.zeros(50), torch.ones(50)
    for n in range(50):
        theta = torch.tensor([p[n - 1], q[n - 1]] if n else [0.0, 1.0], requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [theta], max_iter=60, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )
        target, at_n = affine_student(schedule, p.clone(), q.clone()), torch.full((4,), n)

        def closure():
            optimizer.zero_grad()
            student = affine_student(schedule, *theta.expand(50, 2).T)
            loss = gaussian_loss(
                gaussian, schedule, student, at_n, w=1.0, seed=n, target=target, shape=(1, 4, 4)
            )
            loss.backward()
            return loss

        optimizer.step(closure)
        p[n], q[n] = theta.detach()
    torch.testing.assert_close(p.double(), p_exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(q.double(), q_exact, rtol=0, atol=1e-5)


def test_index_0_is_anchored_to_the_teacher(gaussian, schedule):
    """At n = 0 the skip ends at t = 0, where f is the identity: the target is z_end itself."""
    seen = {}

    def record(name, network):
        def call(z_t, t, cond, w):
            seen[name] = z_t, t
            return network(z_t, t)

        return call

    student = record("student", toy_eps)
    teacher = record("teacher", gaussian.eps)
    target = record("target", toy_eps)
    z0, n = noise(), torch.zeros(2, dtype=torch.int64)
    args = z0, None, None, schedule
    loss = drawn_loss(student, teacher, target, *args, 0, n=n)
    (z_start, t_start), (z_end, t_end) = seen["student"], seen["target"]
    assert t_start.tolist() == [19, 19] and t_end.tolist() == [0, 0]
    x0, eps = gaussian.x0(z_start.double(), 19), gaussian.eps(z_start.double(), 19)
    torch.testing.assert_close(z_end, ddim_step(x0, eps, 0, schedule).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(loss, huber(f_theta(z_start, toy_eps(z_start, 19), 19, schedule), z_end))

    def wild(z_t, t, cond, w):
        return 1e3 + z_t

    assert torch.equal(loss, drawn_loss(student, teacher, wild, *args, 0, n=n))


def test_lcd_loss_calls(schedule):
    """One student call at (z_start, c), two of the teacher (c, null), one of the target (z_end, c).

    In this order (2310.04378 Algorithm 1; student first), all with the same w ~ U[w_range]; n
    covers the grid.
    """
    calls = []

    def network(name):
        def call(z_t, t, cond, w):
            calls.append((name, cond, z_t, t, w, torch.is_grad_enabled()))
            return toy_eps(z_t, t)

        return call

    z0 = noise(0, (400, 1, 2, 2))
    drawn_loss(
        network("student"),
        network("teacher"),
        network("target"),
        z0,
        "c",
        "null",
        schedule,
        0,
        (3.0, 12.0),
    )
    assert [call[:2] for call in calls] == [
        ("student", "c"),
        ("teacher", "c"),
        ("teacher", "null"),
        ("target", "c"),
    ]
    assert [call[5] for call in calls] == [True, False, False, False]
    t_start, t_end, w = calls[0][3], calls[3][3], calls[0][4]
    assert set(t_start.tolist()) == set(range(19, 1000, 20))
    assert torch.equal(t_end, (t_start - 20).clamp(min=0))
    assert all(torch.equal(call[4], w) for call in calls)
    assert w.min() >= 3 and w.max() <= 12 and w.mean().item() == pytest.approx(7.5, abs=0.5)
    for call in calls[1:3]:
        assert torch.equal(call[2], calls[0][2]) and torch.equal(call[3], t_start)


def test_a_longer_skip(schedule):
    """k = 60 from t = 499: the target looks at t = 439, the guided teacher's one DDIM step."""
    seen = []

    def target(z_t, t, cond, w):
        seen.append((z_t, t))
        return toy_eps(z_t, t)

    z0, n, student = noise(), torch.tensor([24, 1]), lambda z_t, t, cond, w: toy_eps(z_t, t)
    starts = []

    def teacher(z_t, t, cond, w):
        starts.append((z_t, t))
        return toy_eps(z_t, t)

    drawn_loss(student, teacher, target, z0, None, None, schedule, 0, n=n, k=60)
    (z_start, t_start), (z_end, t_end) = starts[0], seen[0]
    assert t_start.tolist() == [499, 39] and t_end.tolist() == [439, 0]
    eps = toy_eps(z_start, t_start)
    x0 = x0_from_eps(z_start, eps, t_start, schedule)
    expected = ddim_step(x0, eps, t_end, schedule)
    torch.testing.assert_close(z_end, expected)


@pytest.mark.parametrize("one_batch", [False, True])
def test_a_skip_of_several_ddim_steps(gaussian, schedule, one_batch):
    """k = 60 by three steps of Psi is three skips of 20, also where t = 0 cuts the skip short."""
    exact = affine_student(schedule, *fixed_point(gaussian, M_W))
    z0, n = M + gaussian.s * noise(0, (50, 4, 8, 8)), torch.arange(50)

    def teacher(z_t, t, cond, w):
        return gaussian._replace(m=cond.context).eps(z_t, t)

    m, m_null = (Cond(torch.full((50, 1, 1, 1), x)) for x in (M, M_NULL))
    args = exact, teacher, exact, z0, m, m_null, schedule, 1
    by_three = drawn_loss(*args, n=n, k=60, psi_steps=3, one_batch=one_batch)
    assert by_three < 1e-5
    assert drawn_loss(*args, n=n, k=60, one_batch=one_batch) > 100 * by_three


@pytest.mark.parametrize("one_batch", [False, True])
def test_distilling_v(schedule, one_batch):
    """Networks that say the same by v have the same loss: the teacher's step needs eps_hat, which
    raw v is not (luosiallen/latent-consistency-model#65).
    """

    def by_v(network):
        def v_of(z_t, t, cond, w):
            eps_hat = network(z_t, t, cond, w)
            alpha, sigma = schedule.at(t, z_t)
            return alpha * eps_hat - sigma * x0_from_eps(z_t, eps_hat, t, schedule)

        return v_of

    nets = [lambda z_t, t, cond, w, i=i: (1 + 0.1 * i) * toy_eps(z_t, t) for i in range(3)]
    n, w, eps = torch.tensor([0, 49]), torch.tensor([7.5, 2.0]), noise(1)
    rest = Cond(torch.zeros(2, 1, 1)), Cond(torch.ones(2, 1, 1))
    by_eps = lcd_loss(*nets, noise(), *rest, schedule, n, w, eps, one_batch=one_batch)
    of_v = schedule._replace(v=True)
    loss = lcd_loss(*map(by_v, nets), noise(), *rest, of_v, n, w, eps, one_batch=one_batch)
    torch.testing.assert_close(loss, by_eps, rtol=1e-4, atol=0)
    zero = make_schedule(v=True, zero_snr=True)
    loss = lcd_loss(*nets, noise(), *rest, zero, n, w, eps, one_batch=one_batch)
    assert loss.isfinite()


def test_gradient_flows_through_the_student_only(schedule):
    """Target and teacher are constants: the student's gradient is huber(f_start, a number)'s.

    The target is the student's own parameter here, as it is for LCM-LoRA; nothing outside lcd_loss
    stops its gradient.
    """
    scale = torch.tensor(0.9, requires_grad=True)
    teacher_scale = torch.tensor(1.1, requires_grad=True)
    seen = []

    def student(z_t, t, cond, w):
        seen.append((z_t, t))
        return scale * toy_eps(z_t, t)

    def teacher(z_t, t, cond, w):
        return teacher_scale * toy_eps(z_t, t)

    n = torch.tensor([5, 30])
    drawn_loss(student, teacher, student, noise(), None, None, schedule, 0, n=n).backward()
    (z_start, t_start), (z_end, t_end) = seen
    free = torch.tensor(0.9, requires_grad=True)
    f_end = f_theta(z_end, 0.9 * toy_eps(z_end, t_end), t_end, schedule)
    huber(f_theta(z_start, free * toy_eps(z_start, t_start), t_start, schedule), f_end).backward()
    torch.testing.assert_close(scale.grad, free.grad, rtol=1e-5, atol=0)
    assert scale.grad.abs() > 0.01 and teacher_scale.grad is None


# ---- latent consistency distillation of a UNet by LoRA

SMALL = UNetConfig(
    channels=(16, 32),
    down=((0,), (1,)),
    middle=1,
    up=((1, 1), (0, 0)),
    context_dim=8,
    heads=2,
    groups=8,
)
RANK, LORA_ALPHA = 3, 5.0


def small_unets():
    """(base, adapted, tau): a small random UNet in float64, and a copy with a LoRA not zero."""
    torch.manual_seed(0)
    base = UNet(SMALL).double().requires_grad_(False)
    adapted = copy.deepcopy(base)
    parameters = add_lora(adapted, RANK, LORA_ALPHA, generator=torch.Generator().manual_seed(1))
    for x in parameters:
        x.data = x.data.double()
    for up, down, _ in get_tau(adapted).values():
        up.data.normal_(0, 0.1)
    return base, adapted, get_tau(adapted)


def by_hand(base, tau, z0, cond, null_cond, n, w, eps):
    """(loss, {path: (up, down) with gradients}): 2310.04378's Algorithm 1, float64, two UNets.

    The student's weights are merged, W + lora_alpha / rank B A; the teacher is `base`. Shares
    nothing with minilcm.lcm.
    """
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = torch.cumprod(1 - beta, 0).double()

    def coefficients(t):
        return (x.reshape(-1, 1, 1, 1) for x in (alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()))

    leaves = {
        path: (up.detach().clone(), down.detach().clone()) for path, (up, down, _) in tau.items()
    }
    weights = dict(base.named_parameters())
    for path, (up, down) in leaves.items():
        up.requires_grad_(True), down.requires_grad_(True)
        delta = torch.einsum("or,ri...->oi...", up.flatten(1), down)
        weights[f"{path}.weight"] = base.get_submodule(path).weight + LORA_ALPHA / RANK * delta

    def f(z, t):
        eps_hat = torch.func.functional_call(base, weights, (z, t, cond))
        (alpha, sigma), s = coefficients(t), 10 * t.double().reshape(-1, 1, 1, 1)
        return 0.25 / (s**2 + 0.25) * z + s / (s**2 + 0.25).sqrt() * (z - sigma * eps_hat) / alpha

    def psi(z, t, t_end, c):  # the DDIM increment
        (alpha, sigma), (alpha_end, sigma_end) = coefficients(t), coefficients(t_end)
        eps_hat = base(z, t, c)
        return (
            alpha_end / alpha * z
            - sigma_end * (sigma * alpha_end / (alpha * sigma_end) - 1) * eps_hat
            - z
        )

    t_start = 20 * n + 19
    t_end = torch.where(n == 0, torch.zeros_like(n), t_start - 20)
    alpha, sigma = coefficients(t_start)
    z_start = alpha * z0 + sigma * eps
    w = w.double().reshape(-1, 1, 1, 1)
    z_end = (
        z_start
        + (1 + w) * psi(z_start, t_start, t_end, cond)
        - w * psi(z_start, t_start, t_end, null_cond)
    )
    f_end = f(z_end, t_end).detach()
    loss = (((f(z_start, t_start) - f_end) ** 2 + 0.001**2).sqrt() - 0.001).mean()
    loss.backward()
    return loss.detach(), {path: (up.grad, down.grad) for path, (up, down) in leaves.items()}


def lora_networks(unet):
    """Student and teacher as train.py makes them: one UNet with LoRA on and off."""

    def student(z_t, t, cond, w):
        return unet(z_t, t, cond)

    def teacher(z_t, t, cond, w):
        with lora_off(unet):
            return unet(z_t, t, cond)

    return student, teacher


def conds(b, dim=8):
    return Cond(noise(10, (b, 3, dim))), Cond(noise(11, (1, 3, dim)).expand(b, -1, -1))


def test_lcd_loss_equals_algorithm_1_by_hand(schedule):
    """Loss (1e-6) and LoRA gradients (1e-4 of norm) equal a two-UNet Algorithm 1 in float64.

    Same draws: n, then w, then eps, from one generator. lora_alpha / rank is 5/3, so a lost
    lora_alpha shows.
    """
    base, unet, tau = small_unets()
    student, teacher = lora_networks(unet)
    z0, (cond, null_cond) = noise(2, (6, 4, 8, 8)), conds(6)
    loss = drawn_loss(student, teacher, student, z0, cond, null_cond, schedule, 3, (3.0, 12.0))
    loss.backward()

    g = torch.Generator().manual_seed(3)
    n = torch.randint(0, 50, (6,), generator=g)
    w = torch.empty(6).uniform_(3.0, 12.0, generator=g)
    eps = torch.randn(6, 4, 8, 8, generator=g)
    expected, gradients = by_hand(base, tau, z0, cond, null_cond, n, w, eps)
    assert expected > 0.01
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for path, (up, down, _) in tau.items():
        for ours, theirs in zip((up.grad, down.grad), gradients[path]):
            assert theirs.norm() > 0 and (ours - theirs).norm() < 1e-4 * theirs.norm(), path
    assert {name for name, x in unet.named_parameters() if x.grad is not None} == {
        f"{path}.{part}.weight" for path in tau for part in ("lora_up", "lora_down")
    }


@pytest.mark.parametrize("n", [0, 1, 49])
def test_lcd_loss_equals_algorithm_1_at_the_ends_of_the_grid(schedule, n):
    """The same at the first two and the last grid index, with the paper's fixed w = 7.5."""
    base, unet, tau = small_unets()
    student, teacher = lora_networks(unet)
    z0, (cond, null_cond) = noise(2, (2, 4, 8, 8)), conds(2)
    index, w, eps = torch.tensor([n, n]), torch.tensor([7.5, 7.5]), noise(3, (2, 4, 8, 8))
    loss = lcd_loss(student, teacher, student, z0, cond, null_cond, schedule, index, w, eps)
    expected, _ = by_hand(base, tau, z0, cond, null_cond, index, w, eps)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)


def test_student_begins_as_its_teacher(schedule):
    """With B = 0, as add_lora leaves it, on and off are bitwise the same; B gets a gradient."""
    torch.manual_seed(0)
    unet = UNet(SMALL)
    add_lora(unet, RANK, LORA_ALPHA, generator=torch.Generator().manual_seed(1))
    student, teacher = lora_networks(unet)
    z0, (cond, null_cond) = noise(2), conds(2)
    assert torch.equal(student(z0, 499, cond, None), teacher(z0, 499, cond, None))
    args = z0, cond, null_cond, schedule
    loss = drawn_loss(student, teacher, student, *args, 3)
    assert torch.equal(loss, drawn_loss(teacher, teacher, teacher, *args, 3))
    loss.backward()
    assert all(
        up.grad.norm() > 0 and down.grad.norm() == 0 for up, down, _ in get_tau(unet).values()
    )


# ---- sampling


@pytest.mark.parametrize("steps", STEPS)
def test_sample_lcm_equals_diffusers(schedule, samplers, steps):
    """z0, timesteps of diffusers 0.42.1's LCMScheduler around a nonlinear network, to 1e-5."""
    rng, seen = generators(), []
    z_T = draw(rng)
    assert torch.equal(z_T, samplers["z_T"])

    def eps_fn(z_t, t):
        seen.append(t)
        return toy_eps(z_t, t)

    z0 = sample_lcm(eps_fn, z_T, schedule, lcm_grid(steps), rng)
    expected = samplers[f"lcm/{steps}/z0"]
    assert seen == samplers[f"lcm/{steps}/timesteps"].tolist()
    assert ((z0 - expected).norm() / expected.norm()).item() < 1e-5
    torch.testing.assert_close(z0, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.8, 0.5])
def test_image_to_image_equals_diffusers(schedule, samplers, strength):
    """From z_init noised to the first timestep, strength < 1: LCMScheduler again, to 1e-5."""
    rng, key = generators(), f"lcm_s{strength}/4"
    z_start = add_noise(samplers["img2img/z_init"], draw(rng), lcm_grid(4, strength)[0], schedule)
    assert lcm_grid(4, strength) == samplers[f"{key}/timesteps"].tolist()
    z0 = sample_lcm(toy_eps, z_start, schedule, lcm_grid(4, strength), rng)
    expected = samplers[f"{key}/z0"]
    assert ((z0 - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("gamma, steps", TCD)
@pytest.mark.parametrize("v", [False, True])
def test_gamma_equals_diffusers(schedule, samplers, gamma, steps, v):
    """diffusers 0.42.1's TCDScheduler, whose eta is gamma, from steps or from timesteps, to 1e-5.

    toy_eps is taken for eps_hat, then for v.
    """
    rng, key = generators(), f"tcd{'_v' * v}/{gamma}/{steps}"
    grid = samplers[f"{key}/timesteps"].tolist()
    assert grid == timesteps("lcm", steps)
    z0 = sample_lcm(toy_eps, draw(rng), schedule._replace(v=v), grid, rng, gamma)
    expected = samplers[f"{key}/z0"]
    assert ((z0 - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_gamma_on_gaussian_data(gaussian, schedule, gamma):
    """Around the exact denoiser of N(m, s^2) each step is affine, so mean and std are known.

    z_s - alpha_s m = A (z_t - alpha m), A = (alpha_s alpha s^2 + sigma_s sigma) / V; then the noise
    from s on. For gamma = 0 the picture itself is known; else Monte Carlo, to 4 std errors.
    """
    g = torch.Generator().manual_seed(0)
    z_T = torch.randn((1, 4, 256, 256), generator=g)
    z0 = sample_lcm(gaussian.eps, z_T, schedule, GRIDS[4], [g], gamma)
    bar, m, s = gaussian.schedule.alpha_bar.tolist(), gaussian.m, gaussian.s
    offset, slope, variance = -(bar[999] ** 0.5) * m, 1.0, 1.0  # of z_T - alpha m
    for t, t_next in zip(GRIDS[4], [*GRIDS[4][1:], 0]):
        t_s = math.floor((1 - gamma) * t_next)
        A = ((bar[t_s] * bar[t]) ** 0.5 * s**2 + ((1 - bar[t_s]) * (1 - bar[t])) ** 0.5) / (
            bar[t] * s**2 + 1 - bar[t]
        )
        ratio = bar[t_next] / bar[t_s]
        offset, slope = offset * A * ratio**0.5, slope * A * ratio**0.5
        variance = variance * A**2 * ratio + 1 - ratio
    mean = bar[0] ** 0.5 * m + offset
    if gamma == 0:
        torch.testing.assert_close(z0, mean + slope * z_T, rtol=0, atol=1e-4)
    assert z0.mean().item() == pytest.approx(mean, abs=4 * (variance / z0.numel()) ** 0.5)
    assert z0.std().item() == pytest.approx(variance**0.5, rel=4 * (2 * z0.numel()) ** -0.5)


def test_multistep_sampling_of_gaussian_data(gaussian, schedule):
    """The exact f in one step: N(0, 1) to mean m - s alpha m / sqrt(V), std s / sqrt(V) at t = 999.

    For m = .7, s = .5: .67607, .50088. Each further step keeps N(m, s^2); successive z0 correlate
    by alpha s / sqrt(V) at the timestep between: .1166 at 759, .2961 at 499, .5707 at 259. Monte
    Carlo of 262144 pixels, to 4 std errors.
    """
    g = torch.Generator().manual_seed(0)
    z_T, points = torch.randn((1, 4, 256, 256), generator=g), []

    def eps_fn(z_t, t):
        points.append(gaussian.f(z_t, t))
        return gaussian.eps_of_f(z_t, t)

    z0 = sample_lcm(eps_fn, z_T, schedule, GRIDS[4], [g])
    torch.testing.assert_close(z0, points[-1], rtol=0, atol=1e-4)  # no noise after the last step
    assert points[0].mean().item() == pytest.approx(0.67607, abs=4e-3)
    assert points[0].std().item() == pytest.approx(0.50088, abs=3e-3)
    for x in points[1:]:
        assert x.mean().item() == pytest.approx(gaussian.m, abs=0.01)
        assert x.std().item() == pytest.approx(gaussian.s, abs=3e-3)
    pairs = [
        torch.stack([x.flatten(), y.flatten()]).corrcoef()[0, 1].item()
        for x, y in zip(points, points[1:])
    ]
    assert pairs == pytest.approx([0.1166, 0.2961, 0.5707], abs=8e-3)


def test_noise_is_fresh_at_every_step(schedule):
    """Between steps each image gets its own generator's next draw; after the last, none."""
    rng, points = generators(), []
    z_T = draw(rng)

    def eps_fn(z_t, t):
        points.append((z_t, t, f_theta(z_t, toy_eps(z_t, t), t, schedule)))
        return toy_eps(z_t, t)

    z0 = sample_lcm(eps_fn, z_T, schedule, GRIDS[4], rng)
    replay = generators()
    assert torch.equal(draw(replay), z_T)
    for (_, _, before), (z_t, t, _) in zip(points, points[1:]):
        assert torch.equal(z_t, add_noise(before, draw(replay), t, schedule))
    assert torch.equal(z0, points[-1][2])
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(rng, replay))


def test_one_step_draws_nothing(schedule):
    """steps = 1 leaves the generators as the initial latent left them."""
    rng = generators()
    z_T = draw(rng)
    before = [g.get_state() for g in rng]
    z0 = sample_lcm(toy_eps, z_T, schedule, [999], rng)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(rng, before))
    assert torch.equal(z0, f_theta(z_T, toy_eps(z_T, 999), 999, schedule))


def test_picture_does_not_depend_on_its_batch(schedule):
    """An image sampled alone is the image sampled beside another, given its own generator."""
    rng = generators()
    both = sample_lcm(toy_eps, draw(rng), schedule, GRIDS[4], rng)
    for i in range(2):
        alone = [generators()[i]]
        z0 = sample_lcm(toy_eps, draw(alone), schedule, GRIDS[4], alone)
        torch.testing.assert_close(z0[0], both[i], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps, std", [(1, 0.0171), (2, 0.1414), (4, 0.2388), (8, 0.2837)])
def test_lcm_sampler_blurs_without_distillation(gaussian, schedule, steps, std):
    """LCM around the denoiser, not f: data of std 0.5 comes out at .0171 to .2837 for 1 to 8 steps.

    Closed recursion v_f = (alpha s^2 / V)^2 v_z, v_z' = alpha'^2 v_f + sigma'^2 from v_z = 1, and
    Monte Carlo.
    """
    data, variance, grid = gaussian._replace(m=0.0), 1.0, lcm_grid(steps)
    for i, t in enumerate(grid):
        alpha, sigma, v = (x.item() for x in data.at(torch.zeros(1), t))
        variance = (alpha * data.s**2 / v) ** 2 * (
            variance if i == 0 else alpha**2 * variance + sigma**2
        )
    assert math.sqrt(variance) == pytest.approx(std, abs=6e-5)
    g = torch.Generator().manual_seed(steps)
    z0 = sample_lcm(
        data.eps, torch.randn((1, 4, 128, 128), generator=g), schedule, lcm_grid(steps), [g]
    )
    assert z0.std().item() == pytest.approx(std, rel=0.012)


# ---- devices and formats


def test_sample_lcm_on_cuda_in_float16(fake_cuda):
    """Dry run of the sampler, emoji UNet in float16 on cuda, tables and generators on the CPU."""
    unet, schedule = fake_cuda(lambda: UNet(emoji()), torch.float16), make_schedule()
    rng = [torch.Generator(), torch.Generator()]
    z_T = torch.randn(2, 4, 16, 16, device="cuda")
    cond = Cond(torch.randn(2, 77, 128, device="cuda", dtype=torch.float16))
    for w in (0.0, 1.5):
        z0 = sample_lcm(guided_eps(unet, cond, cond, w), z_T, schedule, GRIDS[4], rng)
        assert (z0.device.type, z0.dtype, z0.shape) == ("cuda", torch.float32, (2, 4, 16, 16))


def test_distillation_on_cuda(fake_cuda):
    """Dry run of the loss, emoji UNet and a LoRA on cuda, tables and generator on the CPU."""
    unet, schedule = fake_cuda(lambda: UNet(emoji()), torch.float32), make_schedule()
    add_lora(unet, 4, 2.0)
    student, teacher = lora_networks(unet)
    z0 = torch.randn(2, 4, 16, 16, device="cuda")
    cond = Cond(torch.randn(2, 77, 128, device="cuda"))
    loss = drawn_loss(student, teacher, student, z0, cond, cond, schedule, 0, (3.0, 12.0))
    assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())
    assert loss.requires_grad  # the backward pass itself needs a real device


def test_teacher_in_one_batch_or_two(gaussian, schedule):
    """`together`: the teacher's cond and null as one batch of 2b: the same loss, a call less."""
    mean, null = torch.full((6, 1, 1), 1.5), torch.full((6, 1, 1), -0.5)  # one row an image
    z0, calls = noise(0, (6, 4, 8, 8)), []

    class Rows(NamedTuple):
        rows: torch.Tensor

        def cat(self, other):
            return Rows(torch.cat([self.rows, other.rows]))

    def network(z_t, t, cond, w):
        calls.append(len(z_t))
        return z_t * 0.5 + cond.rows.reshape(-1, 1, 1, 1) * t.reshape(-1, 1, 1, 1) / 1000

    losses = []
    for one_batch in (False, True):
        args = z0, Rows(mean), Rows(null), schedule, 0, (3.0, 12.0)
        losses.append(drawn_loss(network, network, network, *args, one_batch=one_batch))
    assert torch.equal(*losses) and losses[0] > 0
    assert calls == [6, 6, 6, 6, 6, 12, 6]


@pytest.mark.parametrize("one_batch", [False, True])
def test_the_teacher_is_widened_before_it_is_guided(schedule, one_batch):
    """eps_cond + w (eps_cond - eps_null) of a bfloat16 teacher is computed in float32: in bfloat16
    the difference, w times enlarged, would be rounded to 8 bits.
    """
    g = torch.Generator().manual_seed(0)
    z0, eps = torch.randn((2, 4, 8, 8), generator=g), torch.randn((2, 4, 8, 8), generator=g)
    n, w = torch.tensor([10, 40]), torch.tensor([7.5, 3.0])
    cond, null_cond = Cond(torch.full((2, 1, 1), 0.3)), Cond(torch.zeros(2, 1, 1))

    def loss(dtype):
        def teacher(z_t, t, cond, w):
            return (toy_eps(z_t, t) + cond.context.reshape(-1, 1, 1, 1)).bfloat16().to(dtype)

        def network(z_t, t, cond, w):
            return toy_eps(z_t, t)

        args = network, teacher, network, z0, cond, null_cond, schedule, n, w, eps
        return lcd_loss(*args, one_batch=one_batch)

    assert torch.equal(loss(torch.bfloat16), loss(torch.float32))
