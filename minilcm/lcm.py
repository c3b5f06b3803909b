"""Latent consistency models (LCM, 2310.04378): boundary, f, loss, grid, sampler.

A consistency function maps any point of a trajectory to its end: f(z_t, t) = z_0. It is distilled
from a teacher by asking that f be equal at two points of the teacher's trajectory, and it then
samples in one to eight steps. Student, teacher and target are callables (z_t, t, cond, w) ->
eps_hat, or v if `schedule.v`: nothing here runs a UNet, opens a file or changes a LoRA.

z_0 is the point at t = 0 of a trajectory, which still holds noise of sigma 0.029; z0 is a clean
latent from data, x0 the network's estimate of it. Two liberties of the official code: the decoder
gets z_0 as it is, and the sampler adds fresh noise to f's z_0 as if it were a clean z0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .model.unet import Cond
from .schedule import Schedule, T, add_more_noise, add_noise, x0_and_eps
from .solver import EpsFn, ddim_step, lower_part

# points of the training grid (num_ddim_timesteps in the official scripts, original_inference_steps
# in diffusers); sampling must use the same
GRID = 50
SIGMA_DATA, T_SCALE = 0.5, 10.0  # of the boundary condition, as in all released LCMs

Network = Callable[..., Tensor]  # (z_t, t, cond, w) -> eps_hat, or v if schedule.v


# ---- the consistency function


def boundary_scalings(t: int | Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) at the integer timestep t: (1, 0) at t = 0. Values from the official code.

    s = 10 t grows so fast that c_skip falls to 7e-6 at t = 19, the first point of the grid: f is x0
    everywhere but at t = 0. c_out has no factor sigma_data, which that of Consistency Models
    (2303.01469 appendix C) has; without it c_skip + c_out^2 = 1.
    """
    s = T_SCALE * torch.as_tensor(t, dtype=torch.float32)
    # c_skip = sigma_data^2 / (s^2 + sigma_data^2),  c_out = s / sqrt(s^2 + sigma_data^2)
    return SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2), s / (s**2 + SIGMA_DATA**2).sqrt()


def f_theta(z_t: Tensor, output: Tensor, t: int | Tensor, schedule: Schedule) -> Tensor:
    """f(z_t, t) = c_skip(t) z_t + c_out(t) x0(z_t, output, t), float32 (b, c, h, w). 2310.04378
    eq. 9 (tour/04).

    f is the identity at t = 0. t is an int or (b,).
    """
    t_column = torch.as_tensor(t, device=z_t.device).reshape(-1, *[1] * (z_t.ndim - 1))
    c_skip, c_out = boundary_scalings(t_column)
    return c_skip * z_t + c_out * x0_and_eps(z_t, output, t, schedule)[0]


def guidance_embedding(w: Tensor, dim: int = 256) -> Tensor:
    """Sines, then cosines, of 1000 w 10000^(-i / (dim/2 - 1)), for w (b,) -> (b, dim): only for a
    full LCM's `cond_proj`. The official scripts' get_guidance_scale_embedding.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=w.device) / (half - 1))
    angles = 1000 * w.float()[:, None] * freqs  # (b, half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (b, dim)


# ---- latent consistency distillation


def train_grid() -> Tensor:
    """The 50 timesteps a training pair can start from: 19, 39, ..., 999, int64 (50,).

    They are 20 apart whatever k is: `--k` moves only the pair's other end.
    """
    return torch.arange(T // GRID - 1, T, T // GRID)


def huber(a: Tensor, b: Tensor, huber_c: float = 1e-3) -> Tensor:
    """The distance d, which Algorithm 1 leaves open: pseudo-Huber of each value, with the official
    commands' c.
    """
    # mean of sqrt((a - b)^2 + c^2) - c
    return ((a - b).square() + huber_c**2).sqrt().sub(huber_c).mean()


def draw(
    shape: tuple[int, ...], generator: torch.Generator, w_range: tuple[float, float] = (7.5, 7.5)
) -> tuple[Tensor, Tensor, Tensor]:
    """What Algorithm 1 draws for latents of `shape` (b, c, h, w).

    n ~ U{0, ..., 49}, w ~ U[w_range], eps ~ N(0, 1), all on the CPU. n (b,) indexes the grid at the
    pair's noisier end: grid[n] = t_start, which the paper calls t_{n+k}. The paper draws from the
    whole schedule; a grid of 50, whose first skip ends at t = 0, is the official scripts'. An
    LCM-LoRA has no input for w: of a range it can only learn a mixture, so one value is its
    default.
    """
    n = torch.randint(0, GRID, shape[:1], generator=generator)
    w = torch.empty(shape[:1]).uniform_(*w_range, generator=generator)
    return n, w, torch.randn(shape, generator=generator)


def lcd_loss(
    student: Network,
    teacher: Network,
    target: Network,
    z0: Tensor,
    cond: Cond,
    null_cond: Cond,
    schedule: Schedule,
    n: Tensor,
    w: Tensor,
    eps: Tensor,
    k: int = T // GRID,
    psi_steps: int = 1,
    one_batch: bool = False,
) -> Tensor:
    """Latent consistency distillation, Algorithm 1 of 2310.04378 (tour/05): z0 (b, c, h, w) ->
    scalar.

    One skip of the guided teacher, from t_start (the paper's t_{n+k}) to t_start - k (its t_n),
    must not change f. For an LCM-LoRA the three networks are one UNet with its LoRA on, off, and on
    without gradient. n (b,), w (b,), eps (b, c, h, w): see `draw`.

    `k` is the length of a skip in timesteps. f is known only at t = 0, and each skip carries that k
    timesteps further up. So a large k needs fewer skips to reach t = 999; but a DDIM step of that
    length has a larger error. `psi_steps` shorter ones have a smaller error, for that many times
    the teacher's time. k is a multiple of 20, so that every skip ends on the grid, where the
    student is trained, or at t = 0, where f is known. With k < 19 none would end at t = 0, and then
    any constant f has a loss near 0.
    `one_batch`: the teacher gets cond and null_cond (b rows each) at once, 2b rows: more memory,
    faster on a GPU.
    """
    n, w, eps = (x.to(z0.device) for x in (n, w, eps))
    t_start = train_grid().to(z0.device)[n]

    # z_{t_{n+k}} ~ N(alpha z0, sigma^2)
    z_start = add_noise(z0, eps, t_start, schedule)
    # student: f_theta(z_{t_{n+k}}, w, c, t_{n+k}); only a full LCM reads w
    f_start = f_theta(z_start, student(z_start, t_start, cond, w), t_start, schedule)

    with torch.no_grad():
        # teacher: z_{t_n} = z + (1 + w) Psi(z, t_{n+k}, t_n, c) - w Psi(z, t_{n+k}, t_n, null). Psi
        # is affine in eps and (1 + w) - w = 1, so guiding eps, or v, gives exactly this z
        z_end, t = z_start, t_start
        for i in range(1, psi_steps + 1):  # Algorithm 1 has one step
            guided = guided_output(teacher, z_end, t, cond, null_cond, w, one_batch)
            x0, eps_w = x0_and_eps(z_end, guided, t, schedule)
            t = (t_start - i * k // psi_steps).clamp(min=0)  # a step from 0 to 0 changes nothing
            z_end = ddim_step(x0, eps_w, t, schedule)
        # target: f_{theta^-}(z_{t_n}, w, c, t_n), which is z_end where t = 0. For LCM-LoRA theta^-
        # is theta itself, as in the official LoRA scripts: one UNet in memory, no average to keep
        f_end = f_theta(z_end, target(z_end, t, cond, w), t, schedule)

    return huber(f_start, f_end)


def guided_output(
    net: Network, z_t: Tensor, t: Tensor, cond: Cond, null_cond: Cond, w: Tensor, one_batch: bool
) -> Tensor:
    """eps_cond + w (eps_cond - eps_null) of latents (b, c, h, w) for w (b,), float32."""
    if one_batch:
        both = torch.cat([z_t, z_t]), torch.cat([t, t]), cond.cat(null_cond), torch.cat([w, w])
        eps_cond, eps_null = net(*both).float().chunk(2)
    else:
        eps_cond, eps_null = (net(z_t, t, c, w).float() for c in (cond, null_cond))
    return eps_cond + w[:, None, None, None] * (eps_cond - eps_null)


@torch.no_grad()
def update_ema(target: nn.Module, student: nn.Module, ema_rate: float = 0.95) -> None:
    """Algorithm 1's last line, after each optimizer step: theta^- <- mu theta^- + (1 - mu) theta.

    mu is `ema_rate`, the official script's default. Only a full LCM has a separate target.
    """
    theta = dict(student.named_parameters())
    names, averages = zip(*target.named_parameters())
    torch._foreach_lerp_(list(averages), [theta[name] for name in names], 1 - ema_rate)


# ---- sampling


def lcm_grid(steps: int, strength: float = 1.0) -> list[int]:
    """Descending timesteps of the training grid: 4 steps are 999 759 499 259. diffusers' rule since
    its PR #5836.

    strength < 1 (image to image) keeps the lower part of the grid, and there are still `steps`
    steps.
    """
    length = lower_part(GRID, steps, strength)
    grid = train_grid().flip(0).tolist()[GRID - length :]
    return [grid[i * length // steps] for i in range(steps)]


@torch.no_grad()
def sample_lcm(
    eps_fn: EpsFn,
    z_T: Tensor,
    schedule: Schedule,
    grid: list[int],
    generators: list[torch.Generator],
    gamma: float | None = None,
) -> Tensor:
    """Multistep consistency sampling, 2310.04378 Algorithm 3: z_T (b, c, h, w) at the grid's first
    timestep -> z0.

    Jump to the origin, add fresh noise up to the next timestep, jump again (tour/09).
    `generators`: one CPU generator per image; draw z_T with it first, then pass it on. A single
    step draws nothing more.

    With `gamma` (TCD, 2402.19159 Algorithm 4) a DDIM step goes to s = (1 - gamma) t_next, and only
    the noise from s to t_next is fresh. gamma = 0 is DDIM; gamma = 1 differs from no gamma only in
    that a jump ends in z_0 = alpha_0 x0 + sigma_0 eps_hat, not in x0.
    """
    z_t = z_T
    pairs = list(zip(grid, [*grid[1:], None]))
    for t, t_next in tqdm(pairs, desc="lcm", disable=None, leave=False):
        output = eps_fn(z_t, t)
        if gamma is None:
            z_t = f_theta(z_t, output, t, schedule)
        else:
            # s = floor((1 - gamma) t'), in float32 as diffusers' TCDScheduler; 0 after the last t
            s = int((1 - gamma) * torch.tensor(t_next or 0))
            z_t = ddim_step(*x0_and_eps(z_t, output, t, schedule), s, schedule)
        if t_next is None:
            return z_t
        eps = torch.stack([torch.randn(z_T.shape[1:], generator=g) for g in generators])
        eps = eps.to(z_T.device)
        if gamma is None:
            z_t = add_noise(z_t, eps, t_next, schedule)
        else:
            z_t = add_more_noise(z_t, eps, s, t_next, schedule)
