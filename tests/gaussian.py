"""Data for which every answer is known: what a network has to learn, the ODE, its solution."""

from typing import NamedTuple

from torch import Tensor

from minilcm.schedule import Schedule


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
