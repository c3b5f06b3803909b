"""Arithmetic on taus: tau_mix = lambda1 tau_style + lambda2 tau_lcm, exactly, and into weights.

A tau, as 2311.05556 calls the weights of a LoRA, is {path: (up, down, lora_alpha)}. The report's
eq. 3 writes the sum tau'_LCM = lambda1 tau' + lambda2 tau_LCM. It makes sense because both taus
change the same weights, W + dW1 + dW2. That the sum does what both do is the report's observation,
and no theorem.

The deltas dW are added, not the factors: averaging B and A separately, as some tools do, adds the
cross terms B1 A2 + B2 A1, which are as large as the signal.
"""

import math
import re

import torch
from torch import Tensor, nn

from .lora import Tau


def factors(up: Tensor, down: Tensor, lora_alpha: float) -> tuple[Tensor, Tensor]:
    """(lora_alpha / r) B (out, r) and A (r, in k k), float32: matrices, also of a convolution."""
    return lora_alpha / len(down) * up.float().flatten(1), down.float().flatten(1)


def delta(up: Tensor, down: Tensor, lora_alpha: float) -> Tensor:
    """The change of the weight, float32, in the shape of the weight: (out, in) or (out, in, k, k).

    Linear: up (out, r), down (r, in). Conv: up (out, r, 1, 1), down (r, in, k, k).
    """
    # dW = (lora_alpha / r) B A
    B, A = factors(up, down, lora_alpha)
    return (B @ A).reshape(len(B), *down.shape[1:])


# ---- some files store a 1x1 convolution as a matrix: here both are one weight


def no_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(out, in) for (out, in, 1, 1): the same weight."""
    return tuple(shape[:2] if tuple(shape[2:]) == (1, 1) else shape)


def with_kernel(up: Tensor, down: Tensor, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The same up and down for a weight (out, in, *kernel): matrices for (), else kernels."""
    ones = (1,) * len(kernel)
    return up.reshape(*up.shape[:2], *ones), down.reshape(*down.shape[:2], *kernel)


def same_form(
    path: str, modules: list[tuple[Tensor, Tensor, float]]
) -> list[tuple[Tensor, Tensor, float]]:
    """The modules, all matrices or all kernels. Raises ValueError if they change weights of
    different shapes.
    """
    shapes = {no_kernel((up.shape[0], *down.shape[1:])) for up, down, _ in modules}
    if len(shapes) > 1:
        raise ValueError(f"{path}: LoRA of different models, shapes {sorted(shapes)}")
    kernel = max((down.shape[2:] for _, down, _ in modules), key=len)
    return [(*with_kernel(up, down, kernel), lora_alpha) for up, down, lora_alpha in modules]


# ---- sums


@torch.no_grad()
def add_delta_(
    weight: Tensor, up: Tensor, down: Tensor, lora_alpha: float, block: int | None = None
) -> None:
    """W <- W + (lora_alpha / r) B A in place, summed in float32 and rounded once to W's dtype.

    `block`: how many values of a large weight are added at a time, so that they fit the processor's
    cache. Raises ValueError if the sum is beyond the dtype's largest number.
    """
    most = torch.finfo(weight.dtype).max
    B, A = factors(up, down, lora_alpha)
    n = len(weight) if block is None else max(1, block // weight[0].numel())
    for i in range(0, len(weight), n):
        # of a contiguous float32 weight this is the weight itself, else a copy
        wide = weight[i : i + n].float().contiguous()
        # one matrix product that starts from W: (n, in k k) + (n, r) (r, in k k)
        wide.flatten(1).addmm_(B[i : i + n], A)
        low, high = wide.aminmax()
        if not -most <= low <= high <= most:
            kind = str(weight.dtype)[6:]
            raise ValueError(f"the sum is beyond {kind}'s largest number, {most:.5g}; lower lambda")
        weight[i : i + n] = wide


def combine(taus: list[Tau], lambdas: list[float]) -> Tau:
    """sum_i lambda_i tau_i as one tau; exact, because factors are concatenated and ranks add up
    (tour/08).

    B = [lambda_1 s_1 B_1, lambda_2 s_2 B_2, ...], A = [A_1; A_2; ...], lora_alpha = rank,
    s_i = lora_alpha_i / r_i. Raises ValueError if the taus' shapes differ at a path, or the lists'
    lengths.
    """
    if len(taus) != len(lambdas):
        raise ValueError(f"{len(taus)} LoRA but {len(lambdas)} lambdas; give one for each")
    scaled = [
        {path: (up, down, lam * lora_alpha) for path, (up, down, lora_alpha) in tau.items()}
        for tau, lam in zip(taus, lambdas)
    ]
    mix: Tau = {}
    for path in dict.fromkeys(path for tau in scaled for path in tau):
        parts = same_form(path, [tau[path] for tau in scaled if path in tau])
        # lambda_i s_i B_i
        up = torch.cat([alpha / len(down) * up.float() for up, down, alpha in parts], dim=1)
        down = torch.cat([down.float() for _, down, _ in parts])
        mix[path] = (up, down, float(len(down)))
    return mix


def distance(a: Tau, b: Tau) -> float:
    """||a - b||_F / ||b||_F over all modules of both: infinite if b is zero and a is not. Raises
    ValueError if their shapes differ at a path.
    """
    far = size = 0.0
    for path in a.keys() | b.keys():
        modules = same_form(path, [tau[path] for tau in (a, b) if path in tau])
        deltas = [delta(*module) for module in modules]
        of_a = deltas[0] if path in a else torch.zeros_like(deltas[0])
        of_b = deltas[-1] if path in b else torch.zeros_like(deltas[0])
        far += float((of_a - of_b).square().sum())
        size += float(of_b.square().sum())
    return (far / size) ** 0.5 if size else math.inf if far else 0.0


@torch.no_grad()
def delta_norms(tau: Tau) -> dict[str, float]:
    """{block: ||dW||_F over all its modules}: input_blocks.i, middle_block, output_blocks.i, then
    layers of text encoders; no dW is formed.
    """
    squares = {}
    for path, (up, down, lora_alpha) in tau.items():
        block = re.match(r"(?:in|out)put_blocks\.\d+|te\d\.encoder\.layers\.\d+|\w+", path)[0]
        B, A = (x.double() for x in factors(up, down, lora_alpha))  # B with its lora_alpha / r
        # ||B A||_F^2 = tr((B^T B)(A A^T)); both products are symmetric
        squares[block] = squares.get(block, 0.0) + ((B.T @ B) * (A @ A.T)).sum()
    in_order = sorted(
        squares, key=lambda block: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", block)]
    )
    return {block: squares[block].clamp(min=0).sqrt().item() for block in in_order}


# ---- into weights


def weights_of(model: nn.Module | dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(model.named_parameters()) if isinstance(model, nn.Module) else model


def check_fit(model: nn.Module | dict[str, Tensor], tau: Tau, name: str = "LoRA") -> None:
    """Raises ValueError, one line beginning with `name`, unless the model has every path of tau, in
    its shape.

    `model`: a UNet, or {path + ".weight": weight}, as `text.lora_weights` and
    `checkpoint.weight_shapes` give it.
    """
    weights = weights_of(model)
    absent = [path for path in tau if f"{path}.weight" not in weights]
    if absent:
        count = f"{len(absent)} of {len(tau)} modules"
        raise ValueError(
            f"{name}: made for another model: {count} are not here, first: {absent[0]}"
        )
    for path, (up, down, _) in tau.items():
        here, there = tuple(weights[f"{path}.weight"].shape), (up.shape[0], *down.shape[1:])
        if no_kernel(here) != no_kernel(there):
            raise ValueError(
                f"{name}: made for another model: {path} is {here} here, {there} in the LoRA"
            )


@torch.no_grad()
def merge_into(model: nn.Module | dict[str, Tensor], tau: Tau, scale: float = 1.0) -> None:
    """W <- W + scale dW for every path of tau, summed in float32 and rounded once to the weight's
    dtype.

    Merge again with new - old to change a LoRA's scale, and with minus its scale to remove it:
    exact to float32 rounding for float32 weights. Raises ValueError if the model lacks a path or
    its shape differs, and nothing has changed then; or if a sum is beyond the weight's dtype: then
    that layer and those before it may have changed.
    """
    check_fit(model, tau)
    weights = weights_of(model)
    for path, (up, down, lora_alpha) in tau.items():
        weight = weights[f"{path}.weight"]
        try:
            add_delta_(weight, up.to(weight.device), down.to(weight.device), scale * lora_alpha)
        except ValueError as error:
            raise ValueError(f"LoRA: {path}: {error}") from None


# ---- rank


def factorise(up: Tensor, down: Tensor, lora_alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V^T) of the delta as a matrix (out, in k k), without forming it: two QRs and an SVD of
    r x r.

    B = Q_B R_B and A^T = Q_A R_A, so B A = Q_B (R_B R_A^T) Q_A^T: the SVD of the middle is that of
    the delta.
    """
    B, A = factors(up, down, lora_alpha)  # B with its lora_alpha / r
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T


def reduce_rank(
    tau: Tau, rank: int | None = None, energy: float | None = None
) -> tuple[Tau, dict[str, float]]:
    """The best tau of a lower rank (Eckart-Young); {path: what it loses, ||dW - dW'|| / ||dW||}.

    Give one of `rank`, at most this rank in each module, and `energy`, the lowest rank that keeps
    this share of the sum of squared singular values. Exact up to float32, in Frobenius norms;
    B = U sqrt(S), A = sqrt(S) V^T, lora_alpha = rank.
    """
    small, residual = {}, {}
    for path, (up, down, lora_alpha) in tau.items():
        u, s, vt = factorise(up, down, lora_alpha)
        # tail[i] = sum_{j >= i} s_j^2: lost at rank i
        tail = s.double().square().flip(0).cumsum(0).flip(0)
        r = rank if energy is None else int((tail > (1 - energy) * tail[0]).sum())
        r = max(1, min(r, len(s)))
        lost = tail[r].item() if r < len(s) else 0.0
        residual[path] = (lost / tail[0].item()) ** 0.5 if tail[0] > 0 else 0.0
        root = s[:r].sqrt()
        new_up = (u[:, :r] * root).reshape(up.shape[0], r, *up.shape[2:])
        new_down = (root[:, None] * vt[:r]).reshape(r, *down.shape[1:])
        small[path] = new_up, new_down, float(r)
    return small, residual


def extract_module(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(up, down, lora_alpha) of this rank, close to the best, of a difference of weights (out, in)
    or (out, in, k, k); randomised SVD (Halko et al. 2011), seed 0.
    """
    matrix = difference.float().flatten(1)  # (out, in k k)
    r = min(rank, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=min(r + 16, *matrix.shape), niter=4)
    root = s[:r].sqrt()
    ones = (1,) * (difference.ndim - 2)
    up = (u[:, :r] * root).reshape(-1, r, *ones)
    return up, (root[:, None] * v[:, :r].T).reshape(r, *difference.shape[1:]), float(r)
