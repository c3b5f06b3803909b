import math

import pytest
import torch
from gaussian import Gaussian
from make_reference import STEPS, draw, generators, toy_eps
from tiny import noise

from minilcm.lcm import lcm_grid, sample_lcm
from minilcm.model.unet import Cond
from minilcm.schedule import Schedule, make_schedule, x0_from_eps
from minilcm.solver import (
    ddim_step,
    dpmpp_2m_step,
    guided_eps,
    sample_ddim,
    sample_dpmpp_2m,
    trailing_grid,
)

# ---- grids


def test_trailing_grid_golden():
    """Timesteps of diffusers 0.42.1's DDIMScheduler and DPMSolverMultistepScheduler, "trailing"."""
    assert trailing_grid(1) == [999]
    assert trailing_grid(3) == [999, 666, 332]
    assert trailing_grid(4) == [999, 749, 499, 249]
    # 1000 - 62.5 i: numpy rounds halves to even
    assert trailing_grid(16)[:8] == [999, 937, 874, 811, 749, 687, 624, 561]
    assert trailing_grid(50) == list(range(999, 0, -20))
    assert trailing_grid(1000) == list(range(999, -1, -1))
    # strength shortens the way, not the steps
    assert trailing_grid(4, 0.5) == [499, 374, 249, 124]
    assert trailing_grid(1, 0.001) == [0]


EVERY = range(1, 1001)  # numbers of steps


def test_grids_of_every_number_of_steps():
    """As many timesteps as steps, descending from 999, none below 0."""
    for steps in EVERY:
        grid = trailing_grid(steps)
        assert len(grid) == steps and grid[0] == 999 and grid[-1] >= 0
        assert all(a > b for a, b in zip(grid, grid[1:]))


@pytest.mark.parametrize("steps, strength, most", [(0, 1, 1000), (-1, 1, 1000), (501, 0.5, 500)])
def test_the_grid_refuses_steps_that_it_has_not(steps, strength, most):
    with pytest.raises(ValueError, match=f"steps is {steps}; give 1 to {most}"):
        trailing_grid(steps, strength)
    with pytest.raises(ValueError, match="strength is 1.5; give 0.001 to 1"):
        trailing_grid(4, 1.5)


# ---- the DDIM step


def test_ddim_step_lands_on_the_line_of_x0_and_eps(schedule):
    """DDIM (2010.02502) eq. 12, eta = 0: alpha(t_end) x0 + sigma(t_end) eps, and at t_end = 0."""
    x0, eps = noise(0), noise(1)
    zeros = torch.zeros_like(x0)
    assert torch.equal(ddim_step(x0, zeros, 499, schedule), schedule.alpha[499] * x0)
    assert torch.equal(ddim_step(zeros, eps, 499, schedule), schedule.sigma[499] * eps)
    last = ddim_step(x0, eps, 0, schedule)
    torch.testing.assert_close(
        last, 0.99914998**0.5 * x0 + (1 - 0.99914998) ** 0.5 * eps, rtol=1e-5, atol=1e-5
    )
    mixed = ddim_step(x0, eps, torch.tensor([499, 19]), schedule)
    assert torch.equal(mixed[1], ddim_step(x0, eps, 19, schedule)[1])


def test_ddim_step_is_the_papers_psi(schedule64):
    """Psi = (a'/a) z - s' (s a'/(a s') - 1) eps - z, 2310.04378's DDIM, is ddim_step - z."""
    z, eps = noise(0).double(), noise(1).double()
    for t, t_end in ((999, 979), (519, 499), (39, 19), (19, 0)):
        (a, s), (a_end, s_end) = schedule64.at(t, z), schedule64.at(t_end, z)
        psi = a_end / a * z - s_end * (s * a_end / (a * s_end) - 1) * eps - z
        step = ddim_step((z - s * eps) / a, eps, t_end, schedule64)
        torch.testing.assert_close(step - z, psi, rtol=1e-12, atol=1e-12)


def test_ddim_is_invertible_for_constant_eps(schedule64):
    """If eps does not change along the way, a step up undoes a step down: a straight line."""
    z, eps = noise(0).double(), noise(1).double()
    (a, s), (a_end, s_end) = schedule64.at(700, z), schedule64.at(680, z)
    down = ddim_step((z - s * eps) / a, eps, 680, schedule64)
    up = ddim_step((down - s_end * eps) / a_end, eps, 700, schedule64)
    torch.testing.assert_close(up, z, rtol=0, atol=1e-14)


def test_ddim_inversion_error_of_gaussian_data(gaussian, schedule64):
    """Down and up again by DDIM, data N(m, s^2): what shrinks y - m, y = z / alpha.

    By s^2 (S - S')^2 / ((s^2 + S^2) (s^2 + S'^2)), S = sigma / alpha. Closed form;
    1.45e-4 for 700 -> 680 -> 700 with s = 0.5.
    """
    z = noise().double()
    down = ddim_step(gaussian.x0(z, 700), gaussian.eps(z, 700), 680, schedule64)
    up = ddim_step(gaussian.x0(down, 680), gaussian.eps(down, 680), 700, schedule64)
    (a, s), (a_end, s_end) = schedule64.at(700, z), schedule64.at(680, z)
    S, S_end, var = s / a, s_end / a_end, gaussian.s**2
    loss = var * (S - S_end) ** 2 / ((var + S**2) * (var + S_end**2))
    assert loss.item() == pytest.approx(1.45e-4, rel=5e-3)
    torch.testing.assert_close(
        up / a - gaussian.m, (1 - loss) * (z / a - gaussian.m), rtol=1e-12, atol=1e-13
    )


# ---- DDIM on Gaussian data, where its result is a product


def ddim_product(gaussian, z_T, times):
    """Closed form of a DDIM chain from t to t', on Gaussian data.

    y = z / alpha; every step multiplies y - m by (s^2 + S S') / (s^2 + S^2), S = sigma / alpha.
    """
    factor = 1.0
    for t, t_end in zip(times, times[1:]):
        (a, s), (a_end, s_end) = gaussian.schedule.at(t, z_T), gaussian.schedule.at(t_end, z_T)
        factor *= (gaussian.s**2 + s / a * s_end / a_end) / (gaussian.s**2 + (s / a) ** 2)
    return a_end * (
        gaussian.m + (z_T / gaussian.schedule.at(times[0], z_T)[0] - gaussian.m) * factor
    )


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 50])
def test_ddim_equals_its_product(gaussian, schedule, schedule64, steps):
    """Data N(m, s^2), the exact eps: sample_ddim is a product of closed-form factors, to 1e-13."""
    z_T = noise()
    times = [*range(999, 0, -1000 // steps), 0]
    expected = ddim_product(gaussian, z_T.double(), times)
    torch.testing.assert_close(
        sample_ddim(gaussian.eps, z_T, schedule, trailing_grid(steps)),
        expected.float(),
        rtol=0,
        atol=1e-5,
    )
    z = z_T.double()
    for t, t_end in zip(times, times[1:]):
        z = ddim_step(gaussian.x0(z, t), gaussian.eps(z, t), t_end, schedule64)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-13)


def test_ddim_product_of_the_training_grid(gaussian):
    """50 steps of 20 down to t = 0, s = 0.5: 0.0325786, worked out in float64 by other code."""
    unit = torch.ones(1, 1, 1, 1).double()
    a0, a999 = gaussian.schedule.alpha[0], gaussian.schedule.alpha[999]
    z0 = ddim_product(gaussian, (gaussian.m + unit) * a999, [*range(999, 0, -20), 0])
    assert (z0 / a0 - gaussian.m).item() == pytest.approx(0.0325786, abs=1e-7)


def test_trajectories_are_self_consistent(gaussian):
    """The Gaussian ODE map: t -> u -> 0 is t -> 0, f is constant along it, not the denoiser."""
    z = noise().double()
    at_499 = gaussian.ode(z, 999, 499)
    torch.testing.assert_close(
        gaussian.ode(at_499, 499, 0), gaussian.ode(z, 999, 0), rtol=0, atol=1e-13
    )
    torch.testing.assert_close(gaussian.f(at_499, 499), gaussian.f(z, 999), rtol=0, atol=1e-13)
    assert (gaussian.f(z, 999) - gaussian.x0(z, 999)).abs().mean() > 0.3


def test_ddim_follows_the_ode(gaussian, schedule):
    """1000 DDIM steps end within 0.01 of the exact ODE; 10 are more than 20 times as far off."""
    z_T = noise()
    exact = gaussian.ode(z_T.double(), 999, 0).float()
    error = {
        steps: (sample_ddim(gaussian.eps, z_T, schedule, trailing_grid(steps)) - exact).abs().max()
        for steps in (10, 1000)
    }
    assert error[1000] < 0.01
    assert error[10] > 20 * error[1000]


@pytest.mark.parametrize("kind", ["ddim", "dpmpp"])
def test_every_number_of_steps_ends_at_its_place(gaussian, schedule64, kind):
    """N steps on N(m, s^2) end within 2/N of the exact ODE, for every N from 1 to 1,000: all of
    them in one batch, row N - 1 with its own grid, and for some the sampler itself.
    """
    grids = [trailing_grid(steps) for steps in EVERY]
    t = torch.tensor([[*grid, *[0] * (1001 - len(grid))] for grid in grids])  # (1000, 1001)
    last = torch.tensor([len(grid) - 1 for grid in grids])  # (1000,)
    z_T = torch.ones(1000, 1, 1, 1).double()
    z, x0_last, z0 = z_T, None, torch.zeros_like(z_T)
    for i in range(1000):
        x0, is_last = gaussian.x0(z, t[:, i]), (last == i).reshape(-1, 1, 1, 1)
        if kind == "ddim":
            z = ddim_step(x0, gaussian.eps(z, t[:, i]), t[:, i + 1], schedule64)
            z0 = torch.where(is_last, z, z0)
        else:
            z0 = torch.where(is_last, x0, z0)
            z = dpmpp_2m_step(z, x0, x0_last, t[:, i - 1], t[:, i], t[:, i + 1], schedule64)
            x0_last = x0
    error = (z0 - gaussian.ode(z_T, 999, 0)).abs().flatten()
    assert (error * torch.tensor(EVERY)).max() < 2
    for steps in (1, 3, 61, 103, 501):
        sample = sample_ddim if kind == "ddim" else sample_dpmpp_2m
        one = sample(gaussian.eps, z_T[:1], schedule64, trailing_grid(steps))
        assert one.item() == pytest.approx(z0[steps - 1].item(), abs=1e-5)


# ---- order of convergence


def uniform_grid(steps):
    """Times 0..steps equally spaced in log(alpha/sigma), from sigma/alpha = 14.61 to 0.05."""
    S = torch.exp(torch.linspace(math.log(14.61), math.log(0.05), steps + 1, dtype=torch.float64))
    alpha = (1 + S**2) ** -0.5
    return Schedule(alpha**2, alpha, S * alpha)


def orders(gaussian, solve):
    """log2 of the ratios of errors against the exact ODE for N = 10, 20, ..., 320 steps."""
    z_T, error = noise().double(), []
    for steps in (10, 20, 40, 80, 160, 320):
        data = gaussian._replace(schedule=uniform_grid(steps))
        error.append((solve(data, z_T, steps) - data.ode(z_T, 0, steps)).abs().max().item())
    return [math.log2(a / b) for a, b in zip(error, error[1:])]


def test_ddim_is_of_first_order(gaussian):
    """Halving the step halves the error: orders 0.95 to 1.00, exact eps, equal log-SNR steps."""

    def solve(data, z, steps):
        for t in range(steps):
            z = ddim_step(data.x0(z, t), data.eps(z, t), t + 1, data.schedule)
        return z

    assert orders(gaussian, solve) == pytest.approx([0.95, 0.97, 0.99, 0.99, 1.00], abs=0.01)


def test_dpmpp_2m_is_of_second_order(gaussian):
    """DPM-Solver++(2M) quarters it: orders 1.61 to 2.00, set up as above (2211.01095)."""

    def solve(data, z, steps):
        x0_last = None
        for t in range(steps):
            x0 = data.x0(z, t)
            z = dpmpp_2m_step(z, x0, x0_last, t - 1, t, t + 1, data.schedule)
            x0_last = x0
        return z

    assert orders(gaussian, solve) == pytest.approx([1.61, 1.93, 1.98, 1.99, 2.00], abs=0.01)


def test_dpmpp_first_step_is_ddim(schedule64):
    """Without an earlier estimate DPM-Solver++ is DDIM (2211.01095), to rounding."""
    z, eps = noise(0).double(), noise(1).double()
    alpha, sigma = schedule64.at(999, z)
    x0 = (z - sigma * eps) / alpha
    step = dpmpp_2m_step(z, x0, None, None, 999, 749, schedule64)
    torch.testing.assert_close(step, ddim_step(x0, eps, 749, schedule64), rtol=0, atol=1e-12)


# ---- guidance


def gaussian_unet(gaussian, calls=None):
    """A UNet that knows the data: N(context, s^2) for each image."""

    def unet(z_t, t, cond):
        if calls is not None:
            calls.append((len(z_t), torch.as_tensor(t).shape, len(cond.context)))
        return gaussian._replace(m=cond.context.reshape(-1, 1, 1, 1)).eps(z_t, t)

    return unet


def mean_cond(m):
    return Cond(torch.tensor(m).reshape(-1, 1, 1))


@pytest.mark.parametrize("t", [19, 499, 999])
def test_guidance_moves_the_mean(gaussian, t):
    """Gaussians of one variance: N(.7, s^2) guided from N(-.2, s^2), w = 7.5, has eps of mean 7.45.

    m_w = m_c + w (m_c - m_null), and the ecosystem's guidance scale is 1 + w:
    m_null + 8.5 (m_c - m_null) is the same.
    """
    z_t = noise()
    eps_fn = guided_eps(
        gaussian_unet(gaussian), mean_cond([0.7, 0.7]), mean_cond([-0.2, -0.2]), 7.5
    )
    expected = gaussian._replace(m=-0.2 + 8.5 * 0.9).eps(z_t.double(), t).float()
    assert -0.2 + 8.5 * 0.9 == pytest.approx(7.45)
    torch.testing.assert_close(eps_fn(z_t, t), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(eps_fn(z_t, torch.tensor([t, t])), expected, rtol=0, atol=1e-5)


def test_guidance_keeps_images_apart(gaussian):
    """Each image of a batch is guided by its own condition and null, and each has its own t."""
    z_t, t = noise(), torch.tensor([499, 39])
    eps_fn = guided_eps(gaussian_unet(gaussian), mean_cond([0.7, 0.1]), mean_cond([-0.2, 0.3]), 2.0)
    for i, m in enumerate((0.7 + 2 * 0.9, 0.1 + 2 * -0.2)):
        expected = gaussian._replace(m=m).eps(z_t[i : i + 1].double(), int(t[i])).float()
        torch.testing.assert_close(eps_fn(z_t, t)[i : i + 1], expected, rtol=0, atol=1e-5)


def test_guidance_costs_one_call(gaussian):
    """w = 0: a batch of b without null; w > 0: one of 2b. Ho & Salimans (2207.12598) eq. 6."""
    calls, z_t = [], noise()
    unet = gaussian_unet(gaussian, calls)
    cond = mean_cond([0.7, 0.7])
    null_cond = mean_cond([0.0, 0.0])
    plain = guided_eps(unet, cond, None, 0.0)(z_t, 499)
    torch.testing.assert_close(plain, gaussian.eps(z_t.double(), 499).float(), rtol=0, atol=1e-5)
    guided_eps(unet, cond, null_cond, 1.0)(z_t, 499)
    assert calls == [(2, (), 2), (4, (4,), 4)]
    with pytest.raises(ValueError, match="w is 1.0: guidance needs null_cond"):
        guided_eps(unet, cond, None, 1.0)


def test_guidance_arithmetic_is_float32():
    """A bfloat16 network's two outputs are widened before they are subtracted."""
    z_t = noise().bfloat16()

    def unet(z, t, cond):
        return (z * cond.context[..., None]).bfloat16()

    out = guided_eps(unet, mean_cond([1.0, 1.0]), mean_cond([0.99, 0.99]), 7.5)(z_t, 5)
    eps_cond, eps_null = z_t.float(), (z_t * torch.tensor(0.99)).bfloat16().float()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, eps_cond + 7.5 * (eps_cond - eps_null), rtol=1e-6, atol=1e-6)


# ---- against diffusers


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "kind", ["ddim_trailing", "ddim_leading", "dpmpp_trailing", "dpmpp_linspace"]
)
def test_samplers_equal_diffusers(schedule, samplers, kind, steps):
    """z0 of diffusers 0.42.1's DDIM and DPM-Solver++ around a nonlinear network, to 1e-5, on its
    own grids; one of the two for each is ours.
    """
    name, spacing = kind.split("_")
    sample, seen = {"ddim": sample_ddim, "dpmpp": sample_dpmpp_2m}[name], []

    def eps_fn(z_t, t):
        seen.append(t)
        return toy_eps(z_t, t)

    grid = samplers[f"{kind}/{steps}/timesteps"].tolist()
    assert grid == trailing_grid(steps) or spacing != "trailing"
    z0 = sample(eps_fn, samplers["z_T"], schedule, grid)
    expected = samplers[f"{kind}/{steps}/z0"]
    assert seen == grid
    assert ((z0 - expected).norm() / expected.norm()).item() < 1e-5
    torch.testing.assert_close(z0, expected, rtol=1e-4, atol=1e-4)


def test_dpmpp_ends_on_its_estimate(gaussian, schedule):
    """At sigma' = 0 the last step returns its x0 (diffusers' final_sigmas_type "zero")."""
    z_T = noise()
    one = sample_dpmpp_2m(gaussian.eps, z_T, schedule, [999])
    assert torch.equal(one, x0_from_eps(z_T, gaussian.eps(z_T, 999), 999, schedule))


def test_samplers_keep_no_graph(schedule):
    """A network with trainable parameters is sampled without a graph."""
    scale = torch.ones(1, requires_grad=True)
    for sample in (sample_ddim, sample_dpmpp_2m):
        assert not sample(lambda z, t: scale * z, noise(), schedule, [999, 499]).requires_grad


@pytest.mark.parametrize("kind", ["v", "v_zero_snr"])
@pytest.mark.parametrize("steps", [1, 4])
def test_v_equals_diffusers(samplers, kind, steps):
    """z0 of diffusers 0.42.1's DDIM and LCM schedulers where the network's output is v, without and
    with zero terminal SNR, to 1e-5.
    """
    schedule, rng = make_schedule(v=True, zero_snr=kind == "v_zero_snr"), generators()
    for name, z0 in (
        ("ddim", sample_ddim(toy_eps, samplers["z_T"], schedule, trailing_grid(steps))),
        ("lcm", sample_lcm(toy_eps, draw(rng), schedule, lcm_grid(steps), rng)),
    ):
        expected = samplers[f"{name}_{kind}/{steps}/z0"]
        torch.testing.assert_close(z0, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "sample, steps, far", [(sample_ddim, 1000, 0.01), (sample_dpmpp_2m, 500, 0.01)]
)
def test_v_solves_the_same_ode(sample, steps, far, zero_snr):
    """Gaussian data: by v as by eps, and from pure noise at t = 999 to the trajectory's end."""
    schedule = make_schedule(v=True, zero_snr=zero_snr)
    gaussian = Gaussian(Schedule(*(table.double() for table in schedule[:3])))

    def v_fn(z_t, t):
        alpha, sigma = schedule.at(t, z_t)
        return alpha * gaussian.eps(z_t, t) - sigma * gaussian.x0(z_t, t)

    z_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z0 = sample(v_fn, z_T, schedule, trailing_grid(steps))
    end = gaussian.f if sample == sample_dpmpp_2m else lambda z, t: gaussian.ode(z, t, 0)
    assert (z0 - end(z_T, 999)).abs().max() < far
    if not zero_snr:
        by_eps = sample(gaussian.eps, z_T, make_schedule(), trailing_grid(steps))
        torch.testing.assert_close(z0, by_eps, rtol=0, atol=1e-4)
