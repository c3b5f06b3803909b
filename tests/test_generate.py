"""generate.py: each sampler of the table is its own function; a picture depends on its seed."""

import pytest
import torch
from make_reference import toy_eps

from minilcm.generate import SAMPLERS, generate, noise, timesteps
from minilcm.lcm import lcm_grid, sample_lcm
from minilcm.schedule import add_noise
from minilcm.solver import dpmpp_grid, sample_ddim, sample_dpmpp_2m

SHAPE, SEEDS = (4, 8, 8), [3, 11]


def test_each_sampler_is_its_own_function(schedule):
    z_T, generators = noise(SEEDS, SHAPE)
    expected = {
        "lcm": sample_lcm(toy_eps, z_T, schedule, 4, generators),
        "ddim": sample_ddim(toy_eps, z_T, schedule, 25),
        "dpmpp": sample_dpmpp_2m(toy_eps, z_T, schedule, 20),
    }
    assert SAMPLERS.keys() == expected.keys(), "a new sampler needs its expected result here"
    for name, z0 in expected.items():
        assert torch.equal(generate(toy_eps, SEEDS, SHAPE, name), z0), (
            f"{name} with its default number of steps"
        )
    assert timesteps("lcm", 4, 0.5) == lcm_grid(4, 0.5) and timesteps("dpmpp", 3) == dpmpp_grid(3)
    assert timesteps("ddim", 4) == [999, 749, 499, 249]


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
    expected = sample_lcm(toy_eps, start, schedule, 2, generators, 0.4)
    assert torch.equal(
        generate(toy_eps, SEEDS, SHAPE, "lcm", 2, image=image, strength=0.4), expected
    )
    start = add_noise(image, z_T, 300, schedule)
    generators = noise(SEEDS, SHAPE)[1]
    expected = sample_lcm(toy_eps, start, schedule, [300, 20], generators, gamma=0.5)
    of_list = generate(toy_eps, SEEDS, SHAPE, "lcm", [300, 20], image=image, gamma=0.5)
    assert torch.equal(of_list, expected)
    with pytest.raises(ValueError, match="ddim takes no image; lcm does"):
        generate(toy_eps, SEEDS, SHAPE, "ddim", 2, image=image)
    with pytest.raises(ValueError, match="steps is 0; give 1 to 1000"):
        generate(toy_eps, SEEDS, SHAPE, "dpmpp", 0)
