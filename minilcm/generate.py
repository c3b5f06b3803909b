"""From seeds to pictures, by any sampler.

    seeds --noise--> z_T --sampler--> z0 --decode--> pixels

A new sampler is a function, the function of its timesteps, and a line in SAMPLERS: the choices of
`--sampler`, the default of `--steps` and its range follow from that.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .lcm import GRID, lcm_grid, sample_lcm
from .schedule import Schedule, T, add_noise, make_schedule
from .solver import EpsFn, sample_ddim, sample_dpmpp_2m, trailing_grid

Decode = Callable[[Tensor], Tensor]  # z0 (b, 4, h, w) -> pixels (b, 3, H, W)


class Sampler(NamedTuple):
    """A way from noise to z0, as the command line offers it."""

    sample: Callable[..., Tensor]  # (eps_fn, z_T, schedule, grid) -> z0
    grid: Callable[[int, float], list[int]]  # (steps, strength) -> descending timesteps
    default_steps: int
    most_steps: int
    needs_lcm_lora: bool  # to be sharp; guidance is then in the weights, and off while sampling
    # draws noise between steps: takes generators=, and gamma=, from 0, no fresh noise, to 1
    stochastic: bool = False


SAMPLERS = {
    "lcm": Sampler(sample_lcm, lcm_grid, 4, GRID, needs_lcm_lora=True, stochastic=True),
    "ddim": Sampler(sample_ddim, trailing_grid, 25, T, needs_lcm_lora=False),
    "dpmpp": Sampler(sample_dpmpp_2m, trailing_grid, 20, T, needs_lcm_lora=False),
}


def noise(
    seeds: Sequence[int], shape: tuple[int, ...], device: str | torch.device = "cpu"
) -> tuple[Tensor, list[torch.Generator]]:
    """z_T (b, *shape) and the CPU generators that drew it, one for each seed: a picture's noise
    depends on its seed only, not on batch or device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device), generators


def timesteps(sampler: str, steps: int | list[int], strength: float = 1.0) -> list[int]:
    """Where the sampler evaluates the network, descending: so many steps, or the timesteps given.

    Raises ValueError for steps, timesteps or a strength out of range, or a strength beside
    timesteps.
    """
    if not isinstance(steps, int):
        if strength != 1:
            raise ValueError("timesteps say where to begin; leave out strength")
        if steps != sorted(set(steps) & set(range(T)), reverse=True) or not steps:
            raise ValueError(f"timesteps are {steps}; give them descending, each 0 to {T - 1}")
        return steps
    try:
        return SAMPLERS[sampler].grid(steps, strength)
    except ValueError as error:
        raise ValueError(f"{sampler}: {error}") from None


@torch.no_grad()
def generate(
    eps_fn: EpsFn,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    sampler: str = "lcm",
    steps: int | list[int] | None = None,
    decode: Decode | None = None,
    image: Tensor | None = None,
    strength: float = 1.0,
    device: str | torch.device = "cpu",
    schedule: Schedule | None = None,
    gamma: float | None = None,
) -> Tensor:
    """A picture per seed: pixels (b, 3, H, W) by `decode`, or without it z0 (b, 4, h, w).

    `shape` is (4, h, w). eps_fn(z_t, t) -> eps_hat (or v, by `schedule`) has text, guidance and
    LoRA in it, for the b rows. `image`: latents of that shape, one or b of them, to start from,
    redrawn by `strength`, at most 1. `steps` may be a list of timesteps. `gamma`: see `sample_lcm`.
    Raises ValueError as `timesteps`, and for an image, a strength or a gamma that does not fit.
    """
    if strength != 1 and image is None:
        raise ValueError(f"strength is {strength}, but there is no image to redraw")
    if image is not None and image.shape not in ((1, *shape), (len(seeds), *shape)):
        want = f"latents of {tuple(shape)}, one or {len(seeds)} of them"
        raise ValueError(f"image has shape {tuple(image.shape)}; give {want}")
    if gamma is not None and not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}; give a number from 0 to 1")
    way, schedule = SAMPLERS[sampler], schedule or make_schedule()
    grid = timesteps(sampler, way.default_steps if steps is None else steps, strength)
    z_T, generators = noise(seeds, shape, device)
    if gamma is not None and not way.stochastic:
        raise ValueError(f"{sampler} draws no noise between steps, so it takes no gamma; lcm does")
    if image is not None:
        z_T = add_noise(image.to(device), z_T, grid[0], schedule)
    more = dict(generators=generators, gamma=gamma) if way.stochastic else {}
    z0 = way.sample(eps_fn, z_T, schedule, grid, **more)
    return z0 if decode is None else decode(z0)
