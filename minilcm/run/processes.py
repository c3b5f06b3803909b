"""Many processes, one run: DDP to train a LoRA, FSDP2 to train all weights.

    torchrun --nproc_per_node 8 train.py ...

`process` is what torchrun calls RANK, `world` the number of processes. Each runs the same code on
its own rows of the batch. DDP keeps the frozen base on every process and averages the LoRA's
gradients; FSDP2 (`shard`) gives each process a share of every weight, its gradient and its moments.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.layers import ResBlock, SpatialTransformer


def start_processes(device: str) -> tuple[int, int]:
    """Join the process group; (process, world) as torchrun set them, (0, 1) without torchrun."""
    if "RANK" not in os.environ:
        return 0, 1
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def shard(unet: nn.Module) -> nn.Module:
    """FSDP2, in place: a block's weights are whole only while it runs, else shared out."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(unet.parameters()).device.type, (dist.get_world_size(),))
    for block in unet.modules():
        if isinstance(block, ResBlock | SpatialTransformer):
            fully_shard(block, mesh=mesh)
    # also what belongs to no block. A target UNet has no backward pass to reshard it, so reshard
    # after the forward pass
    fully_shard(unet, mesh=mesh, reshard_after_forward=True)
    return unet


def whole(x: Tensor) -> Tensor:
    """The whole of a sharded tensor (all processes must ask); other tensors as they are."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def share_of(x: Tensor, like: Tensor) -> Tensor:
    """The inverse: this process's share of x, sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)


def mean_over_processes(*numbers: float) -> list[float]:
    """The mean of each number over all processes; all get the same, so they decide alike."""
    if not dist.is_initialized():
        return list(numbers)
    x = torch.tensor(numbers, dtype=torch.float64)
    x = x.float().cuda() if dist.get_backend() == "nccl" else x
    dist.all_reduce(x)
    return (x / dist.get_world_size()).tolist()


def gather(x: object) -> list:
    """[x of process 0, x of process 1, ...], for something small."""
    if not dist.is_initialized():
        return [x]
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, x)
    return out


@contextmanager
def sync_gradients(net: nn.Module, last: bool) -> Iterator[None]:
    """Of the batches that are accumulated, only the last averages gradients over the processes."""
    if hasattr(net, "set_requires_gradient_sync"):  # FSDP2
        net.set_requires_gradient_sync(last)
    with net.no_sync() if hasattr(net, "no_sync") and not last else nullcontext():  # DDP
        yield
