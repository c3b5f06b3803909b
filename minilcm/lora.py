"""LoRA layers: the layer they adapt, plus a low-rank term that can be switched off.

    W' x = W x + (lora_alpha / rank) B A x,    A = lora_down (r, in), B = lora_up (out, r)

LoRA (2106.09685) eq. 3, and 4.1 for alpha / rank; 2311.05556 eq. 1 without it.

A LoRALinear *is* the nn.Linear: it shares the weight and keeps its key, so the UNet's own keys stay
the official ones, and the LoRA adds `path.lora_down.weight` and `path.lora_up.weight`. Load the
checkpoint first, then call `add_lora`. A tau is the dict {path: (up, down, lora_alpha)}.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .model.precision import is_narrow, widened

Tau = dict[str, tuple[Tensor, Tensor, float]]


class LoRALinear(nn.Linear):
    """An nn.Linear plus a low-rank term times lora_alpha / rank; off if `scale` is 0 (tour/06)."""

    def adapt(self, rank: int, lora_alpha: float) -> None:
        self.rank, self.lora_alpha, self.scale = rank, lora_alpha, 1.0
        self.lora_down = nn.Linear(self.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, self.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # W x; widened where W is kept in float16 or int8 to save memory
        y = widened(self, x) if is_narrow(self, x) else super().forward(x)
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
        y = widened(self, x) if is_narrow(self, x) else super().forward(x)
        if self.scale == 0:
            return y
        return y + self.scale * self.lora_alpha / self.rank * self.lora_up(self.lora_down(x))


# ---- which layers are adapted

# The official LCM-LoRA's modules, by the ends of their LDM paths: all but conv_in, conv_out,
# embeddings and norms
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


def lora_layers(model: nn.Module) -> dict[str, LoRALinear | LoRAConv2d]:
    """{path: layer} of all LoRA layers in the model."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear | LoRAConv2d)}


def target_paths(model: nn.Module, targets: tuple[str, ...] = TARGETS) -> list[str]:
    """Paths of the Linear and Conv2d layers whose path ends in one of `targets`."""
    return [
        path
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
        and any(path == end or path.endswith("." + end) for end in targets)
    ]


def check_rank(model: nn.Module, rank: int, targets: tuple[str, ...] = TARGETS) -> None:
    """Raises ValueError for a rank below 1 or above the smallest target's full rank."""
    if rank < 1:
        raise ValueError(f"rank is {rank}; give 1 or more")
    full_rank = {
        path: min(model.get_submodule(path).weight.flatten(1).shape)
        for path in target_paths(model, targets)
    }
    path = min(full_rank, key=full_rank.get)
    if rank > full_rank[path]:
        most = full_rank[path]
        raise ValueError(
            f"rank is {rank}, but a LoRA of {path} can have at most {most}; give 1 to {most}"
        )


def check_tau(model: nn.Module, tau: Tau, rank: int, targets: tuple[str, ...], name: str) -> None:
    """Raises ValueError unless tau has the layers, shapes and rank that `add_lora` would make."""
    paths = target_paths(model, targets)
    if odd := set(paths) ^ set(tau):
        counts = f"{len(tau)} layers, this run {len(paths)}"
        raise ValueError(f"{name}: it adapts {counts}; first difference: {min(odd)}")
    for path, (up, down, _) in tau.items():
        weight = model.get_submodule(path).weight
        if (len(up), down[0].numel()) != (len(weight), weight[0].numel()):
            raise ValueError(f"{name}: made for another model: {path} has another shape")
        if len(down) != rank:
            has = f"{path} has rank {len(down)}, this run {rank}"
            raise ValueError(f"{name}: {has}; give --rank {len(down)}")


def add_lora(
    model: nn.Module,
    rank: int,
    lora_alpha: float | None = None,
    targets: tuple[str, ...] = TARGETS,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Freeze the model, adapt its target layers in place (same weights, same keys) and return the
    new parameters.

    A is drawn by `generator`, B is zero, so the model's output does not change yet. Both are
    float32. lora_alpha defaults to the rank. Raises ValueError for a rank that `check_rank`
    refuses, or if a target has a LoRA, which this would replace.
    """
    check_rank(model, rank, targets)
    if there := lora_layers(model).keys() & target_paths(model, targets):
        raise ValueError(f"{min(there)} has a LoRA already; sum two by merge.combine")
    model.requires_grad_(False)
    parameters = []
    for path in target_paths(model, targets):
        layer = model.get_submodule(path)
        # The layer becomes a LoRA layer by changing its class: a new module around it would rename
        # its keys (`path.base.weight`), and a replacement would have to copy weight, hooks and
        # settings.
        layer.__class__ = LoRALinear if isinstance(layer, nn.Linear) else LoRAConv2d
        with torch.device(layer.weight.device):
            layer.adapt(rank, float(rank if lora_alpha is None else lora_alpha))
        down, up = layer.lora_down.weight, layer.lora_up.weight
        # A ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's Kaiming-uniform with a = sqrt(5), drawn on
        # the CPU
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
    return {
        path: (m.lora_up.weight, m.lora_down.weight, m.lora_alpha)
        for path, m in lora_layers(model).items()
    }


def set_tau(model: nn.Module, tau: Tau) -> None:
    """Copy tau, {path: (up, down, lora_alpha)}, into the layers that `add_lora` adapted, as a start
    for training. Whether it fits is `check_tau`'s question.
    """
    layers = lora_layers(model)
    for path, (up, down, lora_alpha) in tau.items():
        layer = layers[path]
        layer.lora_alpha = lora_alpha
        with torch.no_grad():
            layer.lora_up.weight.copy_(up.view_as(layer.lora_up.weight))
            layer.lora_down.weight.copy_(down.view_as(layer.lora_down.weight))
