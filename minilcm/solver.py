"""Solvers of the probability-flow ODE: DDIM (the teacher's step Psi, and a baseline) and
DPM-Solver++(2M) (a baseline).

A sampler is one function sample_xxx(eps_fn, z_T, schedule, grid) -> z0, and `grid` the descending
timesteps at which it asks the network; the first is where z_T is. Guidance, text and LoRA are
already inside eps_fn(z_t, t) -> eps_hat (or v); the sampler never sees them. All arithmetic around
the network is float32.
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
    null_cond. v is guided in the same way: at a fixed z_t eps_hat is affine in v, and the weights
    1 + w and -w add up to 1.
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


def lower_part(points: int, steps: int, strength: float) -> int:
    """How many of a grid's points are left at `strength`: all at 1, the lower half at 0.5.

    Raises ValueError unless `steps` steps fit.
    """
    if not 1 / points <= strength <= 1:
        raise ValueError(f"strength is {strength}; give {1 / points} to 1")
    length = int(points * strength)
    if not 1 <= steps <= length:
        raise ValueError(f"steps is {steps}; give 1 to {length}")
    return length


def trailing_grid(steps: int, strength: float = 1.0) -> list[int]:
    """Descending timesteps of DDIM and DPM-Solver++: 4 steps are 999 749 499 249.

    They begin at 999, the noisiest timestep ("trailing" in 2305.08891 table 2), which is fair to
    few steps; SD1.5's own config ("leading") begins 4 steps at 751. strength < 1 (image to image)
    keeps the lower part, and there are still `steps` steps.
    """
    top = lower_part(T, steps, strength)
    # numpy rounds half to even; arange can have one entry too many, for 61 steps as an example
    return [int(t) - 1 for t in np.round(np.arange(top, 0, -top / steps))[:steps]]


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
def sample_ddim(eps_fn: EpsFn, z_T: Tensor, schedule: Schedule, grid: list[int]) -> Tensor:
    """z0 (b, c, h, w) from z_T at the grid's first timestep by DDIM, each step to the next one, the
    last to 0. Equals diffusers' DDIMScheduler (set_alpha_to_one = False) where its steps of T //
    steps end at the next timestep, too.
    """
    z_t = z_T
    pairs = list(zip(grid, [*grid[1:], 0]))
    for t_start, t_end in tqdm(pairs, desc="ddim", disable=None, leave=False):
        x0, eps_hat = x0_and_eps(z_t, eps_fn(z_t, t_start), t_start, schedule)
        z_t = ddim_step(x0, eps_hat, t_end, schedule)
    return z_t


def dpmpp_2m_step(
    z_t: Tensor,
    x0: Tensor,
    x0_prev: Tensor | None,
    t_prev: int | None,
    t: int,
    t_end: int,
    schedule: Schedule,
) -> Tensor:
    """One step of DPM-Solver++(2M) from t to t_end. DPM-Solver++ (2211.01095) algorithm 2.

    x0 is the estimate at t, x0_prev the one at t_prev, a step before; without it the step is of
    first order. The paper's lambda = log(alpha / sigma) is half the logarithm of the SNR.
    """

    def half_logsnr(t: int) -> Tensor:
        alpha, sigma = schedule.at(t, z_t)
        return torch.log(alpha / sigma)

    sigma, (alpha_end, sigma_end) = schedule.at(t, z_t)[1], schedule.at(t_end, z_t)
    h = half_logsnr(t_end) - half_logsnr(t)
    d = x0
    if x0_prev is not None:
        r0 = (half_logsnr(t) - half_logsnr(t_prev)) / h
        # D = (1 + 1/(2 r0)) x0 - 1/(2 r0) x0_prev
        d = x0 + (x0 - x0_prev) / (2 * r0)
    # z_end = (sigma'/sigma) z - alpha' (e^{-h} - 1) D
    return (sigma_end / sigma) * z_t - alpha_end * torch.expm1(-h) * d


@torch.no_grad()
def sample_dpmpp_2m(eps_fn: EpsFn, z_T: Tensor, schedule: Schedule, grid: list[int]) -> Tensor:
    """z0 (b, c, h, w) from z_T at the grid's first timestep by DPM-Solver++(2M). Equals diffusers'
    DPMSolverMultistepScheduler with final_sigmas_type = "zero".

    The last step goes to sigma' = 0 and is of first order, so it returns x0 itself.
    """
    pairs = list(zip(grid, [*grid[1:], None]))
    z_t, x0_prev, t_prev = z_T, None, None
    for t, t_next in tqdm(pairs, desc="dpm++", disable=None, leave=False):
        x0, _ = x0_and_eps(z_t, eps_fn(z_t, t), t, schedule)
        if t_next is None:
            return x0
        z_t = dpmpp_2m_step(z_t, x0, x0_prev, t_prev, t, t_next, schedule)
        x0_prev, t_prev = x0, t
