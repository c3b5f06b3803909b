"""LoRA layers: the layer they adapt, plus a low-rank term that can be switched off.

    W' x = W x + (lora_alpha / rank) B A x,    A = lora_down (r, in), B = lora_up (out, r).   LoRA (2106.09685) eq. 3

A LoRALinear *is* the nn.Linear: it shares the weight and keeps its key, so a UNet with LoRA still loads official
files, and its LoRA tensors are `path.lora_down.weight`, `path.lora_up.weight`. A tau is the dict {path: (up, down,
lora_alpha)}.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tau = dict[str, tuple[Tensor, Tensor, float]]

# The official LCM-LoRA's modules, by the ends of their LDM paths: all but conv_in, conv_out, embeddings and norms
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = (
    *ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "in_layers.2",  # conv1 of a ResBlock
    "out_layers.3",  # conv2
    "skip_connection",
    "emb_layers.1",  # time_emb_proj
    "op",  # downsampler
    "conv",  # upsampler
)


class WidenedLinear(torch.autograd.Function):
    """W x + b of a frozen W in float16 and an x in float32: W is widened where it is used, in both directions.

    Without it autograd would keep the wide W from the forward pass until the backward pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


class WidenedConv2d(torch.autograd.Function):
    """The same for a convolution."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple, padding: tuple) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.of = x.shape, stride, padding
        return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,), (shape, stride, padding) = ctx.saved_tensors, ctx.of
        return nn.grad.conv2d_input(shape, weight.to(grad.dtype), grad, stride, padding), None, None, None, None


def too_narrow(layer: nn.Module, x: Tensor) -> bool:
    """Whether the layer's frozen weight is stored in fewer bits than x, outside autocast, is computed in."""
    return x.dtype == torch.float32 and layer.weight.dtype == torch.float16


class LoRALinear(nn.Linear):
    """An nn.Linear with a low-rank term; `scale` multiplies it (0: off), on top of lora_alpha / rank."""

    def adapt(self, rank: int, lora_alpha: float) -> None:
        self.rank, self.lora_alpha, self.scale = rank, lora_alpha, 1.0
        self.lora_down = nn.Linear(self.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, self.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = WidenedLinear.apply(x, self.weight, self.bias) if too_narrow(self, x) else super().forward(x)
        if self.scale == 0:
            return y  # bitwise the base layer
        # W x + scale (lora_alpha / r) B A x
        return y + self.scale * self.lora_alpha / self.rank * self.lora_up(self.lora_down(x))


class LoRAConv2d(nn.Conv2d):
    """An nn.Conv2d with a low-rank term: A has the base's kernel, stride and padding, B is 1x1."""

    def adapt(self, rank: int, lora_alpha: float) -> None:
        self.rank, self.lora_alpha, self.scale = rank, lora_alpha, 1.0
        size = dict(kernel_size=self.kernel_size, stride=self.stride, padding=self.padding)
        self.lora_down = nn.Conv2d(self.in_channels, rank, bias=False, **size)
        self.lora_up = nn.Conv2d(rank, self.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if too_narrow(self, x):
            y = WidenedConv2d.apply(x, self.weight, self.bias, self.stride, self.padding)
        else:
            y = super().forward(x)
        if self.scale == 0:
            return y
        return y + self.scale * self.lora_alpha / self.rank * self.lora_up(self.lora_down(x))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear | LoRAConv2d]:
    """{path: layer} of all LoRA layers in the model."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear | LoRAConv2d)}


def target_paths(model: nn.Module, targets: tuple[str, ...] = TARGETS) -> list[str]:
    """Paths of the Linear and Conv2d layers whose path ends in one of `targets`."""
    return [
        path
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and any(path == end or path.endswith("." + end) for end in targets)
    ]


def check_rank(model: nn.Module, rank: int, targets: tuple[str, ...] = TARGETS) -> None:
    """Raises ValueError for a rank below 1, or above the largest that the smallest target's weight can have."""
    if rank < 1:
        raise ValueError(f"rank is {rank}; give 1 or more")
    widths = {path: min(model.get_submodule(path).weight.flatten(1).shape) for path in target_paths(model, targets)}
    path = min(widths, key=widths.get)
    if rank > widths[path]:
        raise ValueError(
            f"rank is {rank}, but the weight of {path} has {widths[path]} at most; give 1 to {widths[path]}"
        )


def add_lora(
    model: nn.Module,
    rank: int,
    lora_alpha: float | None = None,
    targets: tuple[str, ...] = TARGETS,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Freeze the model, adapt its target layers in place (same weights, same keys) and return its new parameters.

    A is drawn by `generator`, B is zero: the model's output does not change. Both are float32. lora_alpha None: rank.
    Raises ValueError for a rank that `check_rank` does not let pass.
    """
    check_rank(model, rank, targets)
    model.requires_grad_(False)
    parameters = []
    for path in target_paths(model, targets):
        layer = model.get_submodule(path)
        layer.__class__ = LoRALinear if isinstance(layer, nn.Linear) else LoRAConv2d
        with torch.device(layer.weight.device):
            layer.adapt(rank, float(rank if lora_alpha is None else lora_alpha))
        down, up = layer.lora_down.weight, layer.lora_up.weight
        # A ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's Kaiming-uniform with a = sqrt(5), drawn on the CPU
        bound = 1 / math.sqrt(down[0].numel())
        with torch.no_grad():
            down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=generator))
            up.zero_()
        parameters += [down, up]
    return parameters


@contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is its frozen base: the teacher."""
    layers = lora_layers(model).values()
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales):
            layer.scale = scale


def get_tau(model: nn.Module) -> Tau:
    """The model's LoRA as {path: (up, down, lora_alpha)}; the tensors are the live parameters."""
    return {path: (m.lora_up.weight, m.lora_down.weight, m.lora_alpha) for path, m in lora_layers(model).items()}


@torch.no_grad()
def load_tau(model: nn.Module, tau: Tau) -> None:
    """Copy tau into the model's LoRA layers. Raises ValueError unless paths, ranks and lora_alpha are the same."""
    layers = lora_layers(model)
    if set(layers) != set(tau):
        odd = sorted(set(layers) ^ set(tau))
        raise ValueError(f"{len(odd)} LoRA modules do not match, first: {odd[0]}")
    for path, (up, down, lora_alpha) in tau.items():
        layer = layers[path]
        if layer.lora_down.weight.shape != down.shape or layer.lora_alpha != lora_alpha:
            raise ValueError(
                f"{path}: rank {layer.rank} alpha {layer.lora_alpha}, file has {down.shape[0]}, {lora_alpha}"
            )
        layer.lora_up.weight.copy_(up), layer.lora_down.weight.copy_(down)
