"""The noise schedule: how much of z_t is data and how much is noise.

    z_t = alpha(t) z0 + sigma(t) eps
    alpha(t) = sqrt(alpha_bar_t),  sigma(t) = sqrt(1 - alpha_bar_t)

z0 is a clean latent, eps ~ N(0, 1) the noise that hides it, t = 0 ... 999; x0 and eps_hat are the
network's estimates of the two. One schedule serves SD1.x, SD2.x, SDXL and the emoji model. The
signal-to-noise ratio, SNR, is (alpha/sigma)^2. At t = 999 alpha is 0.068, not 0, except with zero
terminal SNR. And t = 0 is already slightly noisy: sigma is 0.029, and no entry has alpha_bar = 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

T = 1000  # length of the schedule


class Schedule(NamedTuple):
    """float32 tables over the integer timesteps t = 0..999, each of shape (T,)."""

    alpha_bar: Tensor  # cumulative product of 1 - beta
    alpha: Tensor  # sqrt(alpha_bar)
    sigma: Tensor  # sqrt(1 - alpha_bar), always in [0, 1]
    v: bool = False  # the network's output is v = alpha eps - sigma z0, not eps_hat: `x0_and_eps`

    def at(self, t: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha(t), sigma(t)) shaped to multiply `like` (b, ...).

        A scalar for an int t, (b, 1, 1, ...) for t of shape (b,).
        """
        t = torch.as_tensor(t, device=self.alpha.device)
        shape = (-1, *[1] * (like.ndim - 1)) if t.ndim else ()
        alpha, sigma = (x[t].reshape(shape).to(like.device) for x in (self.alpha, self.sigma))
        return alpha, sigma

    def to(self, device: str | torch.device) -> "Schedule":
        return Schedule(*(table.to(device) for table in self[:3]), self.v)


def make_schedule(v: bool = False, zero_snr: bool = False) -> Schedule:
    """Stable Diffusion's "scaled linear" schedule: Rombach et al. 2022, the official configs
    (tour/01).

    betas = linspace(sqrt(0.00085), sqrt(0.012), 1000)^2. float32 as in diffusers, and so in the
    official LCM scripts; Stable Diffusion's own code computes it in float64, and alpha_bar differs
    by 4.7e-7. With `zero_snr` alpha is shifted and scaled to be 0 at t = 999, pure noise, and
    unchanged at t = 0 (2305.08891 algorithm 1). A network that predicts eps cannot start from pure
    noise: x0 = (z_t - sigma eps_hat) / alpha.
    """
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float32) ** 2
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    if zero_snr:
        alpha = alpha_bar.sqrt()
        alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return Schedule(alpha_bar, alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), v)


def add_noise(z0: Tensor, eps: Tensor, t: int | Tensor, schedule: Schedule) -> Tensor:
    """DDPM (2006.11239) eq. 4: z_t of z0 (b, c, h, w) and noise eps like it; t an int or (b,)."""
    alpha, sigma = schedule.at(t, z0)
    return alpha * z0 + sigma * eps


def add_more_noise(z_s: Tensor, eps: Tensor, s: int, t: int, schedule: Schedule) -> Tensor:
    """z_t of a z_s (b, c, h, w) that is noisy already, s <= t. DDPM (2006.11239) eq. 4 from s on.

    z_s brings noise of variance (alpha_t / alpha_s)^2 sigma_s^2 along; what it lacks of sigma_t^2
    is 1 - alpha_bar_t / alpha_bar_s.
    """
    # z_t = (alpha_t / alpha_s) z_s + sqrt(1 - alpha_bar_t / alpha_bar_s) eps
    ratio = schedule.at(t, z_s)[0] / schedule.at(s, z_s)[0]
    return ratio * z_s + (1 - ratio**2).sqrt() * eps


def x0_from_eps(z_t: Tensor, eps_hat: Tensor, t: int | Tensor, schedule: Schedule) -> Tensor:
    """The network's estimate of z0. In float32: dividing by alpha makes an error of eps_hat 14.6
    times as large at t = 999.
    """
    alpha, sigma = schedule.at(t, z_t)
    # x0 = (z_t - sigma eps_hat) / alpha
    return (z_t.float() - sigma * eps_hat.float()) / alpha


def x0_and_eps(
    z_t: Tensor, output: Tensor, t: int | Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """(x0, eps_hat) that the network's output stands for, float32; only here is it interpreted.

    It is eps_hat, or v = alpha eps - sigma z0 of Progressive Distillation (2202.00512) section 4.
    From v, x0 needs no division by alpha, so it exists even where alpha is 0.
    """
    if not schedule.v:
        return x0_from_eps(z_t, output, t, schedule), output.float()
    alpha, sigma = schedule.at(t, z_t)
    z_t, v = z_t.float(), output.float()
    # x0 = alpha z_t - sigma v,  eps_hat = alpha v + sigma z_t
    return alpha * z_t - sigma * v, alpha * v + sigma * z_t


def min_snr_weight(t: Tensor, schedule: Schedule, snr_gamma: float = 5.0) -> Tensor:
    """Min-SNR (2303.09556) eq. 8: weight min(SNR, gamma) / SNR of the eps-loss at t (b,)."""
    alpha, sigma = schedule.at(t, t)
    snr = (alpha / sigma) ** 2  # (b,)
    return (snr_gamma / snr).clamp(max=1)  # 1 where SNR is 0


def diffusion_loss(
    eps_fn: Callable[[Tensor, Tensor], Tensor],
    z0: Tensor,
    t: Tensor,
    eps: Tensor,
    schedule: Schedule,
    snr_gamma: float | None = 5.0,
) -> Tensor:
    """Mean squared error of eps_fn's eps_hat against the noise drawn, weighted by Min-SNR.
    `snr_gamma` None: not weighted, DDPM (2006.11239) eq. 14.

    z0, eps (b, c, h, w); t (b,) int64; -> scalar. For v, eps_hat - eps = alpha (v_hat - v), so the
    error of v has the weight min(SNR, gamma) / (SNR + 1), as in Min-SNR, or SNR / (SNR + 1) without
    gamma. Both are 0 where SNR is: with zero terminal SNR, t = 999 is not trained.
    """
    z_t = add_noise(z0, eps, t, schedule)  # (b, c, h, w)
    _, eps_hat = x0_and_eps(z_t, eps_fn(z_t, t), t, schedule)
    # L = E w(t) ||eps_hat - eps||^2
    error = (eps_hat - eps).square().flatten(1).mean(dim=1)  # (b,)
    if snr_gamma is not None:
        error = error * min_snr_weight(t, schedule, snr_gamma)
    return error.mean()
