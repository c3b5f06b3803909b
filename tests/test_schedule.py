import pytest
import torch
from gaussian import Gaussian

from minilcm.schedule import (
    Schedule,
    T,
    add_more_noise,
    add_noise,
    diffusion_loss,
    make_schedule,
    min_snr_weight,
    x0_and_eps,
    x0_from_eps,
)


@pytest.mark.parametrize(
    "t, alpha_bar, alpha, sigma, sigma_hat",
    [
        (0, 0.99914998, 0.999575, 0.029155, 0.029168),
        (19, 0.98224396, 0.991082, 0.133252, 0.134451),
        (99, 0.89546245, 0.946289, 0.323323, 0.341674),
        (259, 0.65897524, 0.811773, 0.583973, 0.719380),
        (499, 0.27766943, 0.526944, 0.849900, 1.612887),
        (759, 0.05221289, 0.228501, 0.973544, 4.260559),
        (999, 0.00466010, 0.068265, 0.997667, 14.614647),
    ],
)
def test_tables_golden(schedule, t, alpha_bar, alpha, sigma, sigma_hat):
    """alpha_bar, alpha, sigma, sigma/alpha at seven timesteps: diffusers 0.42.1, scaled_linear."""
    assert schedule.alpha_bar[t].item() == pytest.approx(alpha_bar, abs=1e-7)
    assert schedule.alpha[t].item() == pytest.approx(alpha, abs=1e-6)
    assert schedule.sigma[t].item() == pytest.approx(sigma, abs=1e-6)
    assert (schedule.sigma[t] / schedule.alpha[t]).item() == pytest.approx(sigma_hat, rel=2e-5)


def test_tables_whole(schedule):
    """float32, alpha_bar falling, alpha^2 + sigma^2 = 1, within 5e-7 of the float64 formula."""
    assert all(table.shape == (T,) and table.dtype == torch.float32 for table in schedule[:3])
    assert (schedule.alpha_bar.diff() < 0).all()
    torch.testing.assert_close(
        schedule.alpha**2 + schedule.sigma**2, torch.ones(T), rtol=0, atol=5e-7
    )
    beta = torch.tensor(
        [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2 for t in range(T)]
    ).double()
    torch.testing.assert_close(
        schedule.alpha_bar.double(), (1 - beta).cumprod(0), rtol=0, atol=5e-7
    )
    assert all(torch.equal(a, b) for a, b in zip(schedule[:3], make_schedule()[:3]))


def test_add_noise_takes_each_image_to_its_own_t(schedule):
    """DDPM (2006.11239) eq. 4: data alone times alpha, noise alone times sigma; t int or (b,)."""
    zeros, ones = torch.zeros(3, 4, 2, 2), torch.ones(3, 4, 2, 2)
    t = torch.tensor([0, 499, 999])
    for when in (259, t):
        alpha = schedule.alpha[when].reshape(-1, 1, 1, 1).expand(3, 4, 2, 2)
        sigma = schedule.sigma[when].reshape(-1, 1, 1, 1).expand(3, 4, 2, 2)
        assert torch.equal(add_noise(ones, zeros, when, schedule), alpha)
        assert torch.equal(add_noise(zeros, ones, when, schedule), sigma)
    assert add_noise(ones, ones, t, schedule)[1, 0, 0, 0].item() == pytest.approx(
        0.526944 + 0.849900, abs=2e-6
    )


def test_more_noise_is_what_a_noisy_latent_lacks(schedule):
    """z_0 -> z_s -> z_t: the signal is alpha_t z0 and the variances add up to sigma_t^2."""
    zeros, ones = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    for s, t in ((0, 0), (0, 19), (259, 499), (699, 999), (500, 500)):
        alpha, sigma = schedule.at(t, ones)
        signal = add_more_noise(add_noise(ones, zeros, s, schedule), zeros, s, t, schedule)
        first = add_more_noise(add_noise(zeros, ones, s, schedule), zeros, s, t, schedule)
        second = add_more_noise(zeros, ones, s, t, schedule)
        torch.testing.assert_close(signal, alpha.expand_as(ones))
        torch.testing.assert_close(first**2 + second**2, (sigma**2).expand_as(ones))


@pytest.mark.parametrize("strength", [0.8, 0.5])
def test_add_noise_equals_diffusers(schedule, samplers, strength):
    """The start of image-to-image equals LCMScheduler.add_noise of diffusers 0.42.1, to 1e-6."""
    t = int(samplers[f"lcm_s{strength}/4/timesteps"][0])
    z_start = add_noise(samplers["img2img/z_init"], samplers["img2img/noise"], t, schedule)
    torch.testing.assert_close(
        z_start, samplers[f"lcm_s{strength}/4/z_start"], rtol=1e-6, atol=1e-6
    )


def test_at_shapes(schedule):
    """A scalar for an int, (b, 1, ...) for a (b,) tensor, whatever the rank of `like`."""
    assert [x.shape for x in schedule.at(5, torch.zeros(2, 4, 8, 8))] == [(), ()]
    assert [x.shape for x in schedule.at(torch.tensor([5, 7]), torch.zeros(2, 4, 8, 8))] == [
        (2, 1, 1, 1)
    ] * 2
    assert [x.shape for x in schedule.at(torch.tensor([5, 7]), torch.zeros(2, 3))] == [(2, 1)] * 2


@pytest.mark.parametrize("t", [0, 19, 499, 999])
def test_x0_and_eps_of_gaussian_data(schedule, gaussian, t):
    """Data N(m, s^2): x0_from_eps turns E[eps | z_t] into E[z0 | z_t]."""
    z_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(t))
    exact_eps, exact_x0 = gaussian.eps(z_t.double(), t), gaussian.x0(z_t.double(), t)
    x0 = x0_from_eps(z_t, exact_eps, t, schedule)
    # float32 error, times up to 14.6
    torch.testing.assert_close(x0.double(), exact_x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("t", [0, 19, 499, 998, 999])
def test_v_of_gaussian_data(t, zero_snr):
    """Data N(m, s^2): E[v | z_t] = alpha E[eps | z_t] - sigma E[z0 | z_t] stands for both, also
    where z_t is noise alone.
    """
    schedule = make_schedule(v=True, zero_snr=zero_snr)
    gaussian = Gaussian(Schedule(*(table.double() for table in schedule[:3])))
    z_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(t)).double()
    exact_eps, exact_x0 = gaussian.eps(z_t, t), gaussian.x0(z_t, t)
    v = schedule.alpha[t] * exact_eps - schedule.sigma[t] * exact_x0
    x0, eps_hat = x0_and_eps(z_t, v, t, schedule)
    torch.testing.assert_close(x0.double(), exact_x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(eps_hat.double(), exact_eps, rtol=0, atol=1e-6)
    assert x0.dtype == eps_hat.dtype == torch.float32


def test_zero_terminal_snr(schedule):
    """2305.08891 algorithm 1: alpha is 0 at 999, what it was at 0, and an affine map in between;
    at 999 v is -z0, bitwise.
    """
    zero = make_schedule(v=True, zero_snr=True)
    assert zero.alpha[999] == 0 and zero.sigma[999] == 1 and zero.v
    torch.testing.assert_close(zero.alpha[0], schedule.alpha[0])
    a, b = schedule.alpha.double(), zero.alpha.double()
    torch.testing.assert_close((a - a[-1]) / (a[0] - a[-1]), b / b[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(zero.alpha**2 + zero.sigma**2, torch.ones(T), rtol=0, atol=5e-7)
    z_t, v = torch.randn(2, 1, 4, 8, 8)
    x0, eps_hat = x0_and_eps(z_t, v, 999, zero)
    assert torch.equal(x0, -v) and torch.equal(eps_hat, z_t)


def test_loss_of_v(schedule):
    """Min-SNR's weight for eps is, in an error of v, the paper's for v, at t = 999 of a schedule
    with zero terminal SNR as well: min(SNR, gamma) / (SNR + 1).
    """
    for zero_snr in (False, True):
        schedule = make_schedule(v=True, zero_snr=zero_snr)
        z0, eps, t = *torch.randn(2, 4, 4, 8, 8), torch.tensor([0, 300, 998, 999])
        alpha, sigma = schedule.at(t, z0)
        off = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1, 1)
        v = alpha * eps - sigma * z0 + off
        loss = diffusion_loss(lambda z_t, t: v, z0, t, eps, schedule)
        snr = (alpha / sigma) ** 2
        expected = (snr.clamp(max=5) / (snr + 1) * off**2).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)


def test_x0_and_eps_undo_add_noise(schedule):
    """From z_t = alpha z0 + sigma eps, eps gives z0, each image at its own t."""
    g = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 4, 8, 8, generator=g)
    t = torch.tensor([0, 259, 759, 999])
    z_t = add_noise(z0, eps, t, schedule)
    torch.testing.assert_close(x0_from_eps(z_t, eps, t, schedule), z0, rtol=0, atol=1e-5)


def test_estimates_are_float32(schedule):
    """A half-precision output is widened before the division by alpha: not rounded once more."""
    z_t, eps_hat = torch.randn(2, 4, 8, 8).bfloat16(), torch.randn(2, 4, 8, 8).bfloat16()
    t = torch.tensor([999, 500])
    for when in (999, t):
        out = x0_from_eps(z_t, eps_hat, when, schedule)
        assert out.dtype == torch.float32
        assert torch.equal(out, x0_from_eps(z_t.float(), eps_hat.float(), when, schedule))


def test_min_snr_weight(schedule):
    """Min-SNR (2303.09556) eq. 8: 1 where SNR < gamma, else gamma / SNR; SNR(0) = 1175."""
    t = torch.arange(T)
    snr = schedule.alpha_bar.double() / (1 - schedule.alpha_bar.double())
    expected = torch.where(snr > 5, 5 / snr, torch.ones_like(snr))
    torch.testing.assert_close(min_snr_weight(t, schedule).double(), expected, rtol=1e-4, atol=0)
    assert min_snr_weight(torch.tensor([0]), schedule).item() == pytest.approx(5 / 1175.4, rel=1e-3)
    assert min_snr_weight(torch.tensor([999]), schedule).item() == 1
    assert min_snr_weight(torch.tensor([0]), schedule, snr_gamma=2.0).item() == pytest.approx(
        2 / 1175.4, rel=1e-3
    )


def test_diffusion_loss_arithmetic(schedule):
    """Errors of 1, 2, 3 in three images' eps: the mean of 1, 4, 9, weighted by image; none: 0."""
    z0, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 200, 900])
    eps, off = torch.randn(3, 4, 8, 8), torch.tensor([1.0, 2.0, 3.0])
    seen = []

    def eps_fn(z_t, t):
        seen.append(z_t)
        return eps + off.reshape(3, 1, 1, 1)

    weight = min_snr_weight(t, schedule)
    loss = diffusion_loss(eps_fn, z0, t, eps, schedule)
    torch.testing.assert_close(loss, (weight * off**2).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        diffusion_loss(eps_fn, z0, t, eps, schedule, snr_gamma=None), torch.tensor(14 / 3)
    )
    assert torch.equal(seen[0], add_noise(z0, eps, t, schedule))
    assert diffusion_loss(lambda z_t, t: eps, z0, t, eps, schedule).item() == 0


def test_diffusion_loss_of_the_perfect_network(schedule, gaussian):
    """E[eps | z_t] for N(m, s^2): the loss is what's left, alpha^2 s^2 / V; 2 % off is worse."""
    g = torch.Generator().manual_seed(0)
    z0 = gaussian.m + gaussian.s * torch.randn(4, 4, 128, 128, generator=g)
    eps, t = torch.randn(z0.shape, generator=g), torch.full((4,), 259)
    loss = diffusion_loss(gaussian.eps, z0, t, eps, schedule, snr_gamma=None)
    alpha, _, v = gaussian.at(z0, 259)
    assert loss.item() == pytest.approx((alpha**2 * gaussian.s**2 / v).item(), rel=0.01)
    assert loss < diffusion_loss(
        lambda z, t: 1.02 * gaussian.eps(z, t), z0, t, eps, schedule, snr_gamma=None
    )


def test_diffusion_loss_on_cuda(fake_cuda):
    """Dry run, all but the schedule on cuda: the loss is float32 there, weighted or not."""
    z0, eps = torch.randn(2, 3, 4, 8, 8, device="cuda")
    t = torch.arange(3, device="cuda")
    for gamma in (5.0, None):
        loss = diffusion_loss(lambda z_t, t: z_t.half(), z0, t, eps, make_schedule(), gamma)
        assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())
