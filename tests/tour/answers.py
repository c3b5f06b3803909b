"""Answers to the exercises of the tour."""

import math

import torch


def noisy(z0, eps, t, alpha_bar):
    alpha = alpha_bar[t].sqrt()[:, None, None, None]
    return alpha * z0 + (1 - alpha**2).sqrt() * eps


def as_strong(alpha_bar, times):
    return next(t for t, a in enumerate(alpha_bar) if 1 - a >= times**2 * a)


def scale_of(eps_cond, eps_null, guided):
    arrow = eps_cond - eps_null
    return ((guided - eps_null) * arrow).sum() / arrow.square().sum()


def one_step(z, eps_hat, t, t_end, alpha_bar):
    u, u_end = ((1 / alpha_bar[x] - 1).sqrt() for x in (t, t_end))
    return alpha_bar[t_end].sqrt() * (z / alpha_bar[t].sqrt() + (u_end - u) * eps_hat)


def mean_answer(z, alpha, sigma, answers):
    likely = torch.exp(-((z[:, None] - alpha * answers) ** 2) / (2 * sigma**2))
    return (likely * answers).sum(1) / likely.sum(1)


def width_after(ts, s, alpha_bar):
    noisy = 1.0
    for t, t_next in zip(ts, [*ts[1:], None]):
        a = alpha_bar[t]
        width = a.sqrt() * s * s / (a * s * s + 1 - a) * noisy
        if t_next is not None:
            noisy = (alpha_bar[t_next] * width**2 + 1 - alpha_bar[t_next]) ** 0.5
    return width


def answer(z, end, t, alpha_bar):
    c_skip = 0.25 / ((10 * t) ** 2 + 0.25)
    x0 = (end - c_skip * z) / (1 - c_skip) ** 0.5
    return (z - alpha_bar[t].sqrt() * x0) / (1 - alpha_bar[t]).sqrt()


def neighbour(z, t, t_end, m, s, alpha_bar):
    a, a_end = alpha_bar[t], alpha_bar[t_end]
    share = ((a_end * s * s + 1 - a_end) / (a * s * s + 1 - a)).sqrt()
    return a_end.sqrt() * m + share * (z - a.sqrt() * m)


def skips(t, k):
    return math.ceil(t / k)


def huber_slope(a, b, c):
    return (a - b) / ((a - b) ** 2 + c**2) ** 0.5


def change(up, down, lora_alpha):
    return lora_alpha / up.shape[1] * up @ down


def rank_needed(s, share):
    energy = (s**2).cumsum(0) / (s**2).sum()
    return int((energy < share - 1e-6).sum()) + 1


def gradients(x, up, down, of_y):
    return of_y.T @ x @ down.T, up.T @ of_y.T @ x


def largest_rank(base, each, gigabytes):
    return int((gigabytes * 1e9 - 2 * base) / (16 * each))


def cosine(up1, down1, up2, down2):
    def inner(up_a, down_a, up_b, down_b):  # tr((B A)^T B' A') = tr(B^T B' (A' A^T)), r x r
        return ((up_a.T @ up_b) @ (down_b @ down_a.T)).trace()

    one, two = (up1, down1), (up2, down2)
    return inner(*one, *two) / (inner(*one, *one) * inner(*two, *two)).sqrt()


def wrong_share(up1, down1, up2, down2):
    right = up1 @ down1 + up2 @ down2
    return ((up1 + up2) @ (down1 + down2) - right).norm() / right.norm()


def fresh_share(t_next, gamma, alpha_bar):
    kept = alpha_bar[t_next] / alpha_bar[int((1 - gamma) * t_next)]
    return (1 - kept) / (1 - alpha_bar[t_next])


def stop(t_next, share, alpha_bar):
    fresh = (1 - alpha_bar[t_next] / alpha_bar[: t_next + 1]) / (1 - alpha_bar[t_next])
    return int((fresh >= share).nonzero().max())


def file_bytes(shapes, rank):
    return 2 * sum(out * rank + rank * fan_in + 1 for out, fan_in in shapes)


def layer_of(key, paths):
    flat = key.removeprefix("lora_unet_").split(".")[0]
    return next((path for path in paths if path.replace(".", "_") == flat), None)
