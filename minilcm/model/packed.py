"""Weights in the memory layout that oneDNN multiplies in: for sampling on a processor.

oneDNN reorders a layer's weight at every call; for SD1.5 that is an eighth of an evaluation at
512x512, and a quarter at 256x256. Here it is done once. The operators are those of PyTorch's own
compiler; they have no backward.
"""

import torch
from torch import Tensor, nn

from .precision import default_dtype


class Packed(nn.Module):
    """A convolution or linear layer that computes in `dtype` from a reordered weight."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, dtype: torch.dtype):
        super().__init__()
        ops, weight = torch.ops.mkldnn, layer.weight.detach().to(dtype)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        if isinstance(layer, nn.Conv2d):
            self.how = [*map(list, (layer.padding, layer.stride, layer.dilation)), layer.groups]
            self.weight = ops._reorder_convolution_weight(weight, *self.how)
            self.run = ops._convolution_pointwise
        else:
            self.how, self.run = [], ops._linear_pointwise
            self.weight = ops._reorder_linear_weight(weight)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.to(self.dtype), self.weight, self.bias, *self.how, "none", [], "")


def pack(unet: nn.Module, dtype: torch.dtype) -> None:
    """Replace the UNet's layers, in place, but for 1x1 kernels, LoRA layers, and the first and last
    convolution, which stay in float32. A packed weight is no parameter any more. Nothing changes
    where PyTorch has no such operators, as on Apple silicon, or not for this dtype on this CPU.
    """
    known = hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    if not known or dtype not in (torch.float32, default_dtype("cpu")):
        return
    for path, layer in list(unet.named_modules()):
        border = path in ("input_blocks.0.0", "out.2")
        # oneDNN's layout for a packed 1x1 kernel is up to 60 times slower than a plain one
        one = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
        if type(layer) in (nn.Conv2d, nn.Linear) and not border and not one:
            unet.set_submodule(path, Packed(layer, dtype))


def pack_for_sampling(unet: nn.Module, vae: nn.Module, dtype: torch.dtype) -> None:
    """For a large model on a CPU, in place: the UNet's weights packed; the VAE channels last, in
    bfloat16 if the UNet is, else in float32, as SDXL's decoder overflows in float16.
    """
    pack(unet, dtype)
    vae.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    vae.to(memory_format=torch.channels_last)
