"""generate.py: each sampler of the table is its own function; a picture depends on its seed."""

import math

import pytest
import torch
from make_reference import toy_eps

from minilcm.generate import SAMPLERS, generate, noise, timesteps
from minilcm.lcm import lcm_grid, sample_lcm
from minilcm.schedule import add_noise
from minilcm.solver import sample_ddim, sample_dpmpp_2m, trailing_grid

SHAPE, SEEDS = (4, 8, 8), [3, 11]


def test_each_sampler_is_its_own_function(schedule):
    z_T, generators = noise(SEEDS, SHAPE)
    expected = {
        "lcm": sample_lcm(toy_eps, z_T, schedule, lcm_grid(4), generators),
        "ddim": sample_ddim(toy_eps, z_T, schedule, trailing_grid(25)),
        "dpmpp": sample_dpmpp_2m(toy_eps, z_T, schedule, trailing_grid(20)),
    }
    assert SAMPLERS.keys() == expected.keys(), "a new sampler needs its expected result here"
    for name, z0 in expected.items():
        assert torch.equal(generate(toy_eps, SEEDS, SHAPE, name), z0), (
            f"{name} with its default number of steps"
        )


def test_noise_is_each_seeds_own():
    """PyTorch's own draw of that seed, and the generator stands behind it."""
    z_T, generators = noise(SEEDS, SHAPE)
    for x, g, seed in zip(z_T, generators, SEEDS):
        own = torch.Generator().manual_seed(seed)
        assert torch.equal(x, torch.randn(SHAPE, generator=own))
        assert torch.equal(torch.randn(2, generator=g), torch.randn(2, generator=own))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_depends_on_its_seed_alone(sampler):
    both = generate(toy_eps, SEEDS, SHAPE, sampler, 3)
    for seed, z0 in zip(SEEDS, both):
        assert torch.equal(generate(toy_eps, [seed], SHAPE, sampler, 3)[0], z0)
    pixels = generate(toy_eps, SEEDS, SHAPE, sampler, 3, decode=lambda z0: 2 * z0[:, :3])
    assert torch.equal(pixels, 2 * both[:, :3])


def test_an_image_is_noised_to_the_first_timestep(schedule):
    image = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    z_T, generators = noise(SEEDS, SHAPE)
    start = add_noise(image, z_T, lcm_grid(2, 0.4)[0], schedule)
    expected = sample_lcm(toy_eps, start, schedule, lcm_grid(2, 0.4), generators)
    assert torch.equal(
        generate(toy_eps, SEEDS, SHAPE, "lcm", 2, image=image, strength=0.4), expected
    )
    start = add_noise(image, z_T, 300, schedule)
    generators = noise(SEEDS, SHAPE)[1]
    expected = sample_lcm(toy_eps, start, schedule, [300, 20], generators, 0.5)
    of_list = generate(toy_eps, SEEDS, SHAPE, "lcm", [300, 20], image=image, gamma=0.5)
    assert torch.equal(of_list, expected)
    for sampler, sample in (("ddim", sample_ddim), ("dpmpp", sample_dpmpp_2m)):
        start = add_noise(image, z_T, 399, schedule)
        expected = sample(toy_eps, start, schedule, [399, 199])
        drawn = generate(toy_eps, SEEDS, SHAPE, sampler, 2, image=image, strength=0.4)
        assert torch.equal(drawn, expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_asks_the_network_where_its_grid_says(sampler):
    """So many steps, the lower part of them, or the timesteps given, which may be on no grid."""
    seen = []

    def eps_fn(z_t, t):
        seen.append(t)
        return toy_eps(z_t, t)

    for steps, strength in ((3, 1.0), (3, 0.5), ([800, 3, 0], 1.0)):
        seen.clear()
        image = torch.zeros(1, *SHAPE) if strength < 1 else None
        generate(eps_fn, SEEDS, SHAPE, sampler, steps, image=image, strength=strength)
        assert seen == timesteps(sampler, steps, strength)
        assert seen == steps or len(seen) == steps and max(seen) <= 1000 * strength - 1


def test_what_means_nothing_is_refused():
    """Without an image noise would begin at a low t; timesteps say themselves where to begin; an
    image of another size would be stretched over the noise.
    """
    with pytest.raises(ValueError, match="strength is 0.5, but there is no image to redraw"):
        generate(toy_eps, SEEDS, SHAPE, steps=4, strength=0.5)
    for image in (torch.zeros(1, *SHAPE[:2], 1), torch.zeros(len(SEEDS) + 1, *SHAPE)):
        with pytest.raises(ValueError, match="image has shape .*; give latents of"):
            generate(toy_eps, SEEDS, SHAPE, steps=4, image=image, strength=0.5)
    for gamma in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="gamma is .*; give a number from 0 to 1"):
            generate(toy_eps, SEEDS, SHAPE, gamma=gamma)
    with pytest.raises(ValueError, match="timesteps say where to begin; leave out strength"):
        generate(toy_eps, SEEDS, SHAPE, steps=[99], image=torch.zeros(1, *SHAPE), strength=0.5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gamma_changes_what_a_sampler_draws_or_is_refused(sampler):
    if SAMPLERS[sampler].stochastic:
        less, more = (generate(toy_eps, SEEDS, SHAPE, sampler, 3, gamma=x) for x in (0.2, 0.8))
        assert not torch.equal(less, more)
    else:
        with pytest.raises(ValueError, match=f"{sampler} draws no noise between steps, so it"):
            generate(toy_eps, SEEDS, SHAPE, sampler, 3, gamma=0.2)


@pytest.mark.parametrize("wrong", [[], [1000], [-1], [499, 999], [999, 999], [999, 0, -1]])
def test_timesteps_descend_from_999_to_0(wrong):
    with pytest.raises(ValueError, match=r"timesteps are \[.*\]; give them descending, each 0 to"):
        timesteps("ddim", wrong)


def test_steps_are_checked_before_any_call():
    with pytest.raises(ValueError, match="steps is 0; give 1 to 1000"):
        generate(None, SEEDS, SHAPE, "dpmpp", 0)
