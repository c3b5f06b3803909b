"""Check your answers to the chapters' exercises against the package.

    python -m tour.check answers.py

Each function of the file that has an exercise's name is called on small inputs.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minilcm.files.lora_keys import split_key
from minilcm.lcm import f_theta, huber
from minilcm.lora import LoRALinear
from minilcm.merge import delta, reduce_rank
from minilcm.schedule import add_more_noise, add_noise, make_schedule, x0_from_eps
from minilcm.solver import ddim_step

SCHEDULE = make_schedule()
TABLE = SCHEDULE.alpha_bar


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the package's answers that are more than a line


def mean_answer(z, alpha, sigma, answers):
    return torch.softmax(-((z[:, None] - alpha * answers) ** 2) / (2 * sigma**2), dim=1) @ answers


def width_after(ts, s, alpha_bar):
    variance = 1.0  # of the noise that the first jump starts from
    for i, t in enumerate(ts):
        a, b = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
        variance = a**2 * variance + b**2 if i else variance
        variance = variance * (a * s**2 / (a**2 * s**2 + b**2)) ** 2
    return variance**0.5


def answer(z, end, t, alpha_bar):
    at_0, at_1 = (f_theta(z, torch.full_like(z, eps), t, SCHEDULE) for eps in (0.0, 1.0))
    return (end - at_0) / (at_1 - at_0)  # f is a straight line in eps_hat


def neighbour(z, t, t_end, m, s, alpha_bar):
    width = (SCHEDULE.alpha**2 * s**2 + SCHEDULE.sigma**2).sqrt()
    return SCHEDULE.alpha[t_end] * m + width[t_end] / width[t] * (z - SCHEDULE.alpha[t] * m)


@torch.enable_grad()
def huber_slope(a, b, c):
    a = a.clone().requires_grad_()
    return torch.autograd.grad(huber(a, b, c), a)[0] * a.numel()


@torch.enable_grad()
def gradients(x, up, down, of_y):
    layer = LoRALinear(x.shape[1], len(up), bias=False)
    layer.adapt(len(down), len(down))
    layer.lora_up.weight.data, layer.lora_down.weight.data = up, down
    return torch.autograd.grad(layer(x), [layer.lora_up.weight, layer.lora_down.weight], of_y)


def fresh_from(s, t_next):
    """The share of the noise at t_next, in squares, that is fresh after going down to s."""
    fresh = add_more_noise(torch.zeros(()), torch.ones(()), s, t_next, SCHEDULE)
    return (fresh / SCHEDULE.sigma[t_next]) ** 2


# ---- the exercises, two a chapter: the package's answer, inputs, what of an answer is compared

X, Y, T3 = draw(3, 4, 8, 8), draw(3, 4, 8, 8, seed=1), torch.tensor([19, 499, 999])
B, A, D, C = draw(6, 2), draw(2, 5), draw(6, 3, seed=1), draw(3, 5, seed=1)
S = torch.tensor([3.0, 2, 1, 0.5])
PATHS = ["input_blocks.1.1.proj_in", "middle_block.1.proj_in", "middle_block.1.proj_out"]
EXERCISES = {
    "noisy": (lambda z0, eps, t, _: add_noise(z0, eps, t, SCHEDULE), [(X, Y, T3, TABLE)]),
    "as_strong": (
        lambda _, times: int((SCHEDULE.sigma >= times * SCHEDULE.alpha).nonzero()[0]),
        [(TABLE, times) for times in (0.1, 1.0, 4.0)],
    ),
    "scale_of": (
        lambda eps, null, guided: ((guided - eps) / (eps - null)).median() + 1,
        [(X, Y, X + w * (X - Y)) for w in (0.0, 6.5)],
    ),
    "one_step": (
        lambda z, eps, t, t_end, _: ddim_step(
            x0_from_eps(z, eps, t, SCHEDULE), eps, t_end, SCHEDULE
        ),
        [(X, Y, 499, 259, TABLE)],
    ),
    "mean_answer": (mean_answer, [(draw(9), a, (1 - a**2) ** 0.5, S) for a in (0.9, 0.1)]),
    "width_after": (
        width_after,
        [(ts, s, TABLE) for ts in ([999], [999, 759, 499, 259]) for s in (0.5, 1.0)],
    ),
    "answer": (answer, [(X, Y, t, TABLE) for t in (1, 19, 499)]),
    "neighbour": (neighbour, [(X, 999, t, 0.7, s, TABLE) for t in (979, 19) for s in (0.5, 1.0)]),
    "skips": (
        lambda t, k: len(range(t, 0, -k)),
        [(19, 20), (999, 20), (499, 100), (59, 100)],
    ),
    "huber_slope": (huber_slope, [(X, Y, 1e-3), (X, Y, 2.0)]),
    "change": (delta, [(B, A, 2.0), (D, C, 8.0)]),
    "rank_needed": (
        lambda s, share: len(
            reduce_rank({"x": (s.diag(), torch.eye(4), 4)}, energy=share)[0]["x"][1]
        ),
        [(S, share) for share in (0.5, 0.9, 0.99, 1.0)],
    ),
    "gradients": (gradients, [(draw(4, 5), up, A, draw(4, 6)) for up in (B, 0 * B)]),
    "largest_rank": (
        lambda base, each, gb: int((gb * 1e9 - 2 * base) // (16 * each)),
        [(2_567_463_684, 3_074_245, 12), (859_520_964, 1_050_816, 4)],
    ),
    "cosine": (
        lambda b1, a1, b2, a2: F.cosine_similarity((b1 @ a1).flatten(), (b2 @ a2).flatten(), dim=0),
        [(B, A, D, C), (B, A, B, A)],
    ),
    "wrong_share": (
        lambda b1, a1, b2, a2: (b1 @ a2 + b2 @ a1).norm() / (b1 @ a1 + b2 @ a2).norm(),
        [(B, A, B + 1, -A), (B, A, B, A)],
    ),
    "fresh_share": (
        lambda t_next, gamma, _: fresh_from(int((1 - gamma) * t_next), t_next),
        [(t, g, TABLE) for t in (759, 259) for g in (0.0, 0.3, 1.0)],
    ),
    "stop": (
        lambda t, share, _: max(s for s in range(t + 1) if fresh_from(s, t) >= share),
        [(t, share, TABLE) for t in (759, 259) for share in (0.25, 0.5, 0.9)],
    ),
    "file_bytes": (
        lambda shapes, r: sum(2 * (r * (out + fan_in) + 1) for out, fan_in in shapes),
        [([(320, 320), (1280, 320)], 64), ([(320, 768)], 8)],
    ),
    "layer_of": (
        lambda key, paths: {p.replace(".", "_"): p for p in paths}.get(split_key(key)[1]),
        [(f"lora_unet_{x}.lora_up.weight", PATHS) for x in ("middle_block_1_proj_in", "out_0_q")],
    ),
}
NUMBERS = {name: f"{i // 2 + 1}{'ab'[i % 2]}" for i, name in enumerate(EXERCISES)}


def same(a, b) -> bool:
    if b is None or isinstance(b, str):
        return a == b
    if isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def verdict(name: str, answer: Callable) -> str:
    right, inputs, *view = EXERCISES[name]
    (view,), number = view or [lambda out: out], NUMBERS[name]
    for args in inputs:
        try:
            if not same(view(answer(*args)), view(right(*args))):
                told = ", ".join(str(x) for x in args if not isinstance(x, Tensor))
                return f"{number} {name}: differs from the package" + f" for {told}" * bool(told)
        except Exception as error:  # whatever a reader's code may raise
            return f"{number} {name}: {type(error).__name__}: {error}"
    return f"{number} {name}: right"


@torch.no_grad()
def main(path: str = "") -> None:
    if not Path(path).is_file():
        told = f"{path}: no such file" if path else "no file"
        sys.exit(f"{told}; give the one with your answers: python -m tour.check answers.py")
    try:
        theirs = runpy.run_path(path)
    except Exception as error:  # whatever a reader's code may raise
        sys.exit(f"{path}: {type(error).__name__}: {error}")
    lines = [verdict(name, theirs[name]) for name in EXERCISES if name in theirs]
    print("\n".join(lines) or f"{path}: no function has the name of an exercise")
    sys.exit(any(not line.endswith(": right") for line in lines))


if __name__ == "__main__":
    main(*sys.argv[1:2])
