"""Where a network sits, and in which number format it computes and is stored."""

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import ResBlock, TransformerBlock

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_dtype(device: str | torch.device) -> torch.dtype:
    """The fastest safe dtype: a CPU without bfloat16 emulates it, 170 times slower than float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.float16
    # PyTorch for Apple silicon or a Jetson is built without oneDNN, and then has no such operator
    has_bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return torch.bfloat16 if kind == "cpu" and has_bfloat16() else torch.float32


def forward_dtype(device: str) -> torch.dtype:
    """Of the forward pass: bfloat16 where it is fast. Trained weights and loss are float32."""
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    if on_gpu and torch.cuda.get_device_capability(device) < (8, 0):  # emulates bfloat16
        return torch.float32
    return torch.bfloat16 if default_dtype(device) != torch.float32 else torch.float32


def autocast(device: str | torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Matrix products and convolutions in the block run in `dtype`; float32: no change."""
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32)


@contextmanager
def resident(module: nn.Module, device: str | torch.device) -> Iterator[nn.Module]:
    """The module on `device` for one block, then back on the CPU, so that networks take turns."""
    try:
        yield module.to(device)
    finally:
        if torch.device(device).type != "cpu":
            module.to("cpu")


def batch_that_fits(unet: nn.Module, shape: tuple[int, ...], passes: int, count: int) -> int:
    """Pictures at a time, of `count` with latents of `shape`: on a GPU what half of its free memory
    holds, at most 32, in batches as even as they can be; elsewhere 1. `passes`: rows for a picture.
    """
    weight = unet.out[2].weight
    if weight.device.type != "cuda":
        return 1
    # a row needs 15 to 27 times the first level's feature map; 32 is for what kernels take besides
    row = 32 * weight.element_size() * unet.cfg.channels[0] * shape[1] * shape[2]
    most = torch.cuda.mem_get_info()[0] // 2 // (passes * row)
    batches = math.ceil(count / min(32, max(1, most)))
    return math.ceil(count / batches)


def add_checkpointing(unet: nn.Module) -> None:
    """Gradient checkpointing (1604.06174): recompute blocks in the backward pass."""
    recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for block in unet.modules():
        if isinstance(block, ResBlock | TransformerBlock):
            block.forward = functools.partial(recompute, block.forward)


# ---- a frozen weight in float16 or int8, under wider arithmetic


def quantize(layer: nn.Linear | nn.Conv2d) -> None:
    """Store the weight in int8, in place: W = weight_scale * weight, a scale per output channel."""
    w = layer.weight.float()  # (out, in, ...)
    scale = w.abs().amax(tuple(range(1, w.ndim)), keepdim=True).clamp(min=1e-30) / 127
    layer.register_buffer("weight_scale", scale.bfloat16())  # (out, 1, ...); as it is multiplied
    w = (w / layer.weight_scale).round().clamp(-127, 127).to(torch.int8)
    layer.weight = nn.Parameter(w, requires_grad=False)


def is_narrow(layer: nn.Linear | nn.Conv2d, x: Tensor) -> bool:
    """Whether the frozen weight is int8, or float16 while x is float32."""
    half = x.dtype == torch.float32 and layer.weight.dtype == torch.float16
    return half or layer.weight.dtype == torch.int8


def widened(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """The layer's output, from a weight that is cast to x's dtype in the forward pass, and again in
    the backward pass.

    Autograd would keep a plain `weight.float()` until the backward pass, for all layers at once.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    how = () if isinstance(layer, nn.Linear) else (layer.stride, layer.padding)
    return Widened.apply(x, layer.weight, getattr(layer, "weight_scale", None), layer.bias, *how)


def wide(dtype: torch.dtype, weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight.to(dtype) if scale is None else weight.to(dtype) * scale.to(dtype)


class Widened(torch.autograd.Function):
    """W x + b, linear or a convolution, with a frozen W in float16 or int8, b and a wider x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, *how):
        ctx.save_for_backward(weight, scale)
        ctx.shape, ctx.how = x.shape, how  # stride and padding of a convolution
        bias = None if bias is None else bias.to(x.dtype)
        return (F.conv2d if how else F.linear)(x, wide(x.dtype, weight, scale), bias, *how)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, how = wide(grad.dtype, *ctx.saved_tensors), ctx.how
        grad_x = nn.grad.conv2d_input(ctx.shape, weight, grad, *how) if how else grad @ weight
        return grad_x, None, None, None, *(None for _ in how)
