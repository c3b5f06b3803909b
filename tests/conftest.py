"""What several test files share: exact answers for Gaussian data, reference tensors, fake CUDA."""

import gzip
import json
from typing import NamedTuple

import pytest
import torch
from make_reference import REFERENCE
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minilcm.schedule import Schedule, make_schedule


def pytest_addoption(parser, pluginmanager):
    """Without pytest-xdist, take the flags of setup.cfg that are xdist's and run in one process."""
    if not pluginmanager.hasplugin("xdist"):
        parser.addoption("--numprocesses", help="ignored: pytest-xdist is not installed")
        parser.addoption("--dist", help="ignored: pytest-xdist is not installed")


class Gaussian(NamedTuple):
    """Data N(m, s^2) in every pixel: everything a network has to learn is known.

    V_t = alpha^2 s^2 + sigma^2 is the variance of z_t. z is (b, c, h, w), t an int or (b,).
    """

    schedule: Schedule
    m: float | Tensor = 0.7
    s: float = 0.5

    def at(self, z: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = self.schedule.at(t, z)
        return alpha, sigma, alpha**2 * self.s**2 + sigma**2

    def eps(self, z: Tensor, t: int | Tensor) -> Tensor:
        """E[eps | z_t], what the eps-loss converges to."""
        alpha, sigma, v = self.at(z, t)
        return sigma * (z - alpha * self.m) / v

    def x0(self, z: Tensor, t: int | Tensor) -> Tensor:
        """E[z0 | z_t], the denoiser."""
        alpha, _, v = self.at(z, t)
        return self.m + alpha * self.s**2 * (z - alpha * self.m) / v

    def ode(self, z: Tensor, t: int | Tensor, t_end: int | Tensor) -> Tensor:
        """The point at t_end on the ODE's trajectory through (z, t).

        On it (z_t - alpha m) / sqrt(V) is constant.
        """
        (alpha, _, v), (alpha_end, _, v_end) = self.at(z, t), self.at(z, t_end)
        return alpha_end * self.m + (z - alpha * self.m) * (v_end / v) ** 0.5

    def f(self, z: Tensor, t: int | Tensor) -> Tensor:
        """The exact consistency function: the trajectory's end, where alpha = 1 and V = s^2."""
        alpha, _, v = self.at(z, t)
        return self.m + self.s * (z - alpha * self.m) / v**0.5

    def eps_of_f(self, z: Tensor, t: int | Tensor) -> Tensor:
        """The eps_hat of a perfectly distilled network: the one whose x0 is f."""
        alpha, sigma = self.schedule.at(t, z)
        return (z - alpha * self.f(z, t)) / sigma


torch.set_num_threads(1)  # two processes share the cores


@pytest.fixture(scope="session")
def schedule() -> Schedule:
    return make_schedule()


@pytest.fixture(scope="session")
def schedule64(schedule) -> Schedule:
    """The same alpha_bar in float64, for identities that hold to the last digits."""
    alpha_bar = schedule.alpha_bar.double()
    return Schedule(alpha_bar, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


@pytest.fixture(scope="session")
def gaussian(schedule64) -> Gaussian:
    return Gaussian(schedule64)


@pytest.fixture(scope="session")
def samplers() -> dict[str, Tensor]:
    return load_file(REFERENCE / "samplers.safetensors")


@pytest.fixture(scope="session")
def official_keys() -> dict[str, dict[str, list[int]]]:
    """{sd15, sdxl, ssd1b: UNet; vae; clip_l: {key: shape}}; "about" says where they are from."""
    return json.loads(gzip.decompress((REFERENCE / "official_keys.json.gz").read_bytes()))


@pytest.fixture(scope="session")
def official_lora_keys() -> dict[str, dict]:
    """{family: {LDM module: diffusers module}; lcm_family: {key: shape} of its official LoRA}."""
    return json.loads(gzip.decompress((REFERENCE / "official_lora_keys.json.gz").read_bytes()))


@pytest.fixture
def fake_cuda():
    """Tensors have device, dtype and shape but no data; "cuda" exists; mixing devices is an error.

    Gives build(make, dtype): make() with weights of that dtype on cuda.
    """

    def build(make, dtype):
        torch.set_default_dtype(dtype)
        try:
            with torch.device("cuda"):
                return make().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)

    with FakeTensorMode():
        yield build
