"""Where a network sits, and in which number format."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def default_dtype(device: str | torch.device) -> torch.dtype:
    """The fastest safe dtype: float16 on CUDA; on a CPU bfloat16 if it has the instructions, else float32.

    A CPU without them emulates bfloat16 and float16, some 170 times slower than float32.
    """
    if torch.device(device).type == "cuda":
        return torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


@contextmanager
def resident(module: nn.Module, device: str | torch.device) -> Iterator[nn.Module]:
    """The module on `device` for one block, then back on the CPU: of three networks, only one is on the card."""
    try:
        yield module.to(device)
    finally:
        if torch.device(device).type != "cpu":
            module.to("cpu")
