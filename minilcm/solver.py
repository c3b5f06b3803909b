"""Solvers of the probability-flow ODE: DDIM (the teacher's step Psi, and a baseline) and
DPM-Solver++(2M) (a baseline).

A sampler is one function sample_xxx(eps_fn, z_T, schedule, steps) -> z0. Guidance, text and LoRA
are already inside eps_fn(z_t, t) -> eps_hat; the sampler never sees them. All arithmetic around the
network is float32.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .model.unet import Cond
from .schedule import Schedule, T, x0_and_eps

# (z_t, t) -> eps_hat, or v if schedule.v
EpsFn = Callable[[Tensor, int | Tensor], Tensor]


def guided_eps(unet: Callable[..., Tensor], cond: Cond, null_cond: Cond | None, w: float) -> EpsFn:
    """eps_fn with classifier-free guidance, eps_cond + w (eps_cond - eps_null), from one batch of
    2b; w = 0 is off (tour/02).

    w as in 2310.04378 section 4.2 and Ho & Salimans (2207.12598) eq. 6; other programs' "guidance
    scale" is 1 + w. cond and null_cond have b rows; for a negative prompt give its Cond as
    null_cond. v is guided in the same way, since it is affine in eps at a fixed z_t.
    """
    if w == 0:
        return lambda z_t, t: unet(z_t, t, cond).float()
    if null_cond is None:
        raise ValueError(f"w is {w}: guidance needs null_cond, for example text.null_cond(b)")
    both = cond.cat(null_cond)  # 2b rows

    def eps_fn(z_t: Tensor, t: int | Tensor) -> Tensor:
        t = torch.as_tensor(t, device=z_t.device).expand(len(z_t))
        eps_cond, eps_null = unet(torch.cat([z_t, z_t]), torch.cat([t, t]), both).float().chunk(2)
        return eps_cond + w * (eps_cond - eps_null)

    return eps_fn


def check_steps(steps: int, most: int = T) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"steps is {steps}; give 1 to {most}")


def ddim_grid(steps: int, spacing: str = "trailing") -> list[tuple[int, int]]:
    """Pairs (t_start, t_end), descending, each t_end the next t_start, the last one 0.

    trailing starts at 999, the noisiest timestep (2305.08891 table 2), and is the fair baseline for
    few steps. leading is what SD1.5's own config says: 4 steps start at 751. diffusers' t_end is
    t_start - T // steps, which misses the next t_start where `steps` does not divide T.
    """
    check_steps(steps)
    r = T // steps
    if spacing == "leading":
        first = 0 if steps == T else 1  # diffusers' steps_offset, where there is room for it
        starts = [r * i + first for i in reversed(range(steps))]
    elif spacing == "trailing":
        # numpy rounds half to even; arange can have one entry too many, for 61 steps as an example
        starts = [int(t) - 1 for t in np.round(np.arange(T, 0, -T / steps))[:steps]]
    else:
        raise ValueError(f"spacing is {spacing!r}; choose trailing or leading")
    return list(zip(starts, [*starts[1:], 0]))


def ddim_step(x0: Tensor, eps_hat: Tensor, t_end: int | Tensor, schedule: Schedule) -> Tensor:
    """The point at t_end on the trajectory that x0 and eps_hat describe. DDIM (2010.02502) eq. 12
    with eta = 0 (tour/02).

    The Psi of 2310.04378 is this minus z_start. At t_end = 0 alpha_bar is 0.99915, not 1
    (diffusers' set_alpha_to_one = False).
    """
    alpha, sigma = schedule.at(t_end, x0)
    # z_end = alpha' x0 + sigma' eps_hat
    return alpha * x0 + sigma * eps_hat


@torch.no_grad()
def sample_ddim(
    eps_fn: EpsFn, z_T: Tensor, schedule: Schedule, steps: int, spacing: str = "trailing"
) -> Tensor:
    """z0 (b, c, h, w) from noise z_T by `steps` DDIM steps. Equals diffusers' DDIMScheduler with
    SD's settings where `steps` divides 1,000.
    """
    z_t = z_T
    for t_start, t_end in tqdm(ddim_grid(steps, spacing), desc="ddim", disable=None, leave=False):
        x0, eps_hat = x0_and_eps(z_t, eps_fn(z_t, t_start), t_start, schedule)
        z_t = ddim_step(x0, eps_hat, t_end, schedule)
    return z_t


def dpmpp_2m_step(
    z_t: Tensor,
    x0: Tensor,
    x0_last: Tensor | None,
    t_last: int | None,
    t: int,
    t_end: int,
    schedule: Schedule,
) -> Tensor:
    """One step of DPM-Solver++(2M) from t to t_end. DPM-Solver++ (2211.01095) algorithm 2.

    x0 is the estimate at t, x0_last the one at t_last; without x0_last the step is of first order.
    The paper's lambda = log(alpha / sigma) is half the logarithm of the SNR.
    """

    def half_logsnr(t: int) -> Tensor:
        alpha, sigma = schedule.at(t, z_t)
        return torch.log(alpha / sigma)

    sigma, (alpha_end, sigma_end) = schedule.at(t, z_t)[1], schedule.at(t_end, z_t)
    h = half_logsnr(t_end) - half_logsnr(t)
    d = x0
    if x0_last is not None:
        r0 = (half_logsnr(t) - half_logsnr(t_last)) / h
        # D = (1 + 1/(2 r0)) x0 - 1/(2 r0) x0_last
        d = x0 + (x0 - x0_last) / (2 * r0)
    # z_end = (sigma'/sigma) z - alpha' (e^{-h} - 1) D
    return (sigma_end / sigma) * z_t - alpha_end * torch.expm1(-h) * d


def dpmpp_grid(steps: int, spacing: str = "trailing") -> list[int]:
    """Timesteps of DPM-Solver++, descending: trailing as for DDIM; linspace is diffusers' default
    for SD1.5.
    """
    if spacing == "linspace":
        check_steps(steps)
        ts = np.round(np.linspace(0, T - 1, steps + 1))[1:]
        return sorted({int(t) for t in ts}, reverse=True)  # a set: 1,000 steps have 500 twice
    if spacing != "trailing":
        raise ValueError(f"spacing is {spacing!r}; choose trailing or linspace")
    return [t for t, _ in ddim_grid(steps)]


@torch.no_grad()
def sample_dpmpp_2m(
    eps_fn: EpsFn, z_T: Tensor, schedule: Schedule, steps: int, spacing: str = "trailing"
) -> Tensor:
    """z0 (b, c, h, w) from noise z_T by DPM-Solver++(2M). Equals diffusers'
    DPMSolverMultistepScheduler with final_sigmas_type = "zero".

    The last step goes to sigma' = 0 and is of first order, so it returns x0 itself.
    """
    grid = dpmpp_grid(steps, spacing)
    pairs = list(zip(grid, [*grid[1:], None]))
    z_t, x0_last, t_last = z_T, None, None
    for t, t_next in tqdm(pairs, desc="dpm++", disable=None, leave=False):
        x0, _ = x0_and_eps(z_t, eps_fn(z_t, t), t, schedule)
        if t_next is None:
            return x0
        z_t = dpmpp_2m_step(z_t, x0, x0_last, t_last, t, t_next, schedule)
        x0_last, t_last = x0, t
