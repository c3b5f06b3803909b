"""Distillation where the answer is known: a real loop with lcd_loss finds it; planted bugs do not.

Data are numbers from N(M, S^2) for the prompt and N(M_NULL, S^2) for the null prompt, so the
teacher is exact. The answer is f_n = f_{n-1} o DDIM_n with f_{-1} = id, DDIM_n being the guided
teacher's step from grid point n. Each f_n is affine: a network with an affine map for each grid
index can be the answer, and nothing else brings it there than the loss. All indices learn at once,
each from the one before it.
"""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minilcm.lcm import draw, f_theta, lcd_loss, train_grid
from minilcm.lora import add_lora, get_tau, lora_off
from minilcm.schedule import make_schedule

M, M_NULL, S, W = 0.7, 0.5, 0.5, 7.5
SCHEDULE = make_schedule()
CLOSE, FAR = 1e-3, 0.05  # the answer itself is about 2


class AffineNet(nn.Module):
    """eps_hat of x0 = u[n] (z_t - alpha m) + v[n] m, n the grid index of t; cond is the number m.

    As made it is the exact network of N(m, S^2). u and v are the columns of a Linear (50, 2).
    """

    def __init__(self):
        super().__init__()
        self.proj_in = nn.Linear(2, 50, bias=False)
        alpha, sigma = SCHEDULE.alpha[train_grid()], SCHEDULE.sigma[train_grid()]
        # E[z0 | z_t] = m + alpha S^2 / V (z_t - alpha m), V = alpha^2 S^2 + sigma^2
        u = alpha * S**2 / (alpha**2 * S**2 + sigma**2)
        self.proj_in.weight.data = torch.stack([u, torch.ones(50)], dim=1)

    def forward(self, z_t: Tensor, t: Tensor, m: float) -> Tensor:
        n = ((t - 19) // 20).clamp(min=0)  # at t = 0 f does not look at eps_hat
        centred = z_t.flatten(1) - m * SCHEDULE.alpha[t, None]  # (b, 1)
        x0 = self.proj_in(torch.cat([centred, torch.full_like(centred, m)], dim=1))  # (b, 50)
        # (b, 1, 1, 1)
        alpha, sigma = SCHEDULE.at(t, z_t)
        return (z_t - alpha * x0.gather(1, n[:, None])[:, :, None, None]) / sigma


def train(networks, parameters, steps, lr, k=20, w=W, guard=contextlib.nullcontext) -> None:
    """The loop of train.py, on batches of 500 numbers; lcd_loss is called inside guard().

    For 1e-3 it takes amsgrad, since near the answer the Huber gradient shrinks and Adam's division
    by its recent size undoes that, and a squared cosine: the last digits come up the grid, index by
    index, at a small learning rate.
    """
    optimizer = torch.optim.AdamW(
        parameters, betas=(0.9, 0.99), weight_decay=0.0, amsgrad=True, fused=True
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1, (step + 1) / 100) * (0.5 * (1 + math.cos(math.pi * step / steps))) ** 2
            )
        generator = torch.Generator().manual_seed(step)
        z0 = M + S * torch.randn((500, 1, 1, 1), generator=generator)
        with guard():
            loss = lcd_loss(
                *networks, z0, M, M_NULL, SCHEDULE, *draw((500, 1, 1, 1), generator, (w, w)), k=k
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def fixed_point(k: int) -> tuple[np.ndarray, np.ndarray]:
    """p and q (50,) of the answer f_n(z) = p_n + q_n z, from the formulas alone and in float64."""
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    known = {0: (0.0, 1.0)}
    for t in range(19, 1000, 20):
        t_end = max(t - k, 0)
        (a, s), (a_end, s_end) = (
            (alpha_bar[i] ** 0.5, (1 - alpha_bar[i]) ** 0.5) for i in (t, t_end)
        )
        # guided noise (both have one V): eps = sigma (z - alpha m_w) / V, m_w = m + w (m - m_null)
        m_w, slope = M + W * (M - M_NULL), s / (a**2 * S**2 + s**2)
        # DDIM_n(z) = alpha' (z - sigma eps) / alpha + sigma' eps = A z + B
        A = a_end / a * (1 - s * slope) + s_end * slope
        B = (a_end / a * s - s_end) * slope * a * m_w
        p, q = known[t_end]
        known[t] = p + q * B, q * A
    p, q = np.array([known[t] for t in range(19, 1000, 20)]).T
    return p, q


def distance(net: AffineNet, k: int = 20) -> float:
    """The largest difference between the 50 p and q of the network's f and those of the answer."""
    t = train_grid()
    with torch.no_grad():
        at_0, at_1 = (
            f_theta(z, net(z, t, M), t, SCHEDULE).double().flatten().numpy()
            for z in (torch.zeros(50, 1, 1, 1), torch.ones(50, 1, 1, 1))
        )
    p, q = fixed_point(k)
    return max(np.abs(at_0 - p).max(), np.abs(at_1 - at_0 - q).max())


def callable_of(net: AffineNet):
    return lambda z_t, t, cond, w: net(z_t, t, cond)


def test_the_answer_is_fifty_ddim_steps():
    """The last f: alpha_0 (m_w + (z / alpha_999 - m_w) F), F = prod (S^2 + x x') / (S^2 + x^2).

    F = 0.0325786 for S = 0.5, and m_w = 2.2. The network that training starts from is far from
    that.
    """
    p, q = fixed_point(20)
    alpha = make_schedule().alpha.double()
    assert q[-1] == pytest.approx(alpha[0].item() / alpha[999].item() * 0.0325786, rel=1e-5)
    assert p[-1] == pytest.approx(alpha[0].item() * 2.2 * (1 - 0.0325786), rel=1e-5)
    assert distance(AffineNet()) > 1


# ---- all weights trained, 50 skips of k = 20; the teacher is a network of its own


def distil(guard=contextlib.nullcontext) -> float:
    """Distance from the answer after training."""
    net = AffineNet()
    student, teacher = callable_of(net), callable_of(copy.deepcopy(net).requires_grad_(False))
    train((student, teacher, student), list(net.parameters()), 4000, 7e-3, guard=guard)
    return distance(net)


def test_training_reaches_the_fixed_point():
    """The loop of train.py leads all 50 affine maps to the recursion, to 1e-3."""
    assert distil() < CLOSE


def test_a_target_with_gradient_does_not(monkeypatch):
    """Planted bug: no stop-gradient. The loss has the same zero; its gradient hardly leads there.

    Each f_n is drawn to f_{n-1} from the one side and to f_{n+1} from the other, and |d| draws as
    hard from near as from far: what the boundary says does not come up the grid in the steps that
    suffice otherwise.
    """

    @contextlib.contextmanager
    def with_gradient():
        with monkeypatch.context() as patch:
            patch.setattr(torch, "no_grad", contextlib.nullcontext)
            yield

    assert not distil(with_gradient) < FAR


# ---- an LCM-LoRA, in skips of k = 200; teacher and target are one network, LoRA off and on


def distil_lora(three=lambda student, teacher: (student, teacher, student), w=W) -> float:
    """The same for a LoRA; three(student, teacher), as train.py makes them, are its networks."""
    net = AffineNet()
    before = net.proj_in.weight.clone()
    # can be any change of the weight
    parameters = add_lora(net, rank=2, generator=torch.Generator().manual_seed(0))
    student = callable_of(net)

    def teacher(z_t, t, cond, w):
        with lora_off(net):
            return net(z_t, t, cond)

    train(three(student, teacher), parameters, 1500, 4e-3, k=200, w=w)
    assert torch.equal(net.proj_in.weight, before) and list(get_tau(net)) == ["proj_in"]
    return distance(net, k=200)


def test_a_lora_reaches_the_fixed_point():
    """add_lora, lora_off and lcd_loss as in train.py lead to the recursion, k = 200, to 1e-3."""
    assert distil_lora() < CLOSE


def test_a_teacher_with_its_lora_on_does_not():
    """Planted bug: lora_off forgotten."""
    assert not distil_lora(lambda student, teacher: (student, student, student)) < FAR


def test_a_target_with_its_lora_off_does_not():
    """Planted bug: the target is the teacher; f_n learns one guided step and the denoiser."""
    assert not distil_lora(lambda student, teacher: (student, teacher, teacher)) < FAR


def test_w_off_by_one_does_not():
    """Planted bug: the ecosystem's guidance, 1 + w, taken for w."""
    assert not distil_lora(w=W + 1) < FAR
