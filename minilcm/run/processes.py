"""Many processes, one run: torchrun's ranks, DDP where a LoRA is trained, FSDP2 where all weights are.

    torchrun --nproc_per_node 8 train.py ...

Every rank runs the same code on its own rows of the batch. DDP keeps the frozen base on each rank and averages the
gradients of the LoRA; FSDP2 gives each rank a share of every weight, its gradient and its moments.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..model.layers import ResBlock, SpatialTransformer


def start_ranks(device: str) -> tuple[int, int]:
    """(rank, world) as torchrun set them, and the process group; (0, 1) without torchrun."""
    if "RANK" not in os.environ:
        return 0, 1
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def shard(unet: nn.Module, device: str) -> None:
    """FSDP2: the weights of a block are whole only while it runs; each rank keeps 1 / world of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in unet.modules():
        if isinstance(block, ResBlock | SpatialTransformer):
            fully_shard(block, mesh=mesh)
    # also what belongs to no block: a target has no backward pass, after which it would be cut again
    fully_shard(unet, mesh=mesh, reshard_after_forward=True)


def whole(x: Tensor) -> Tensor:
    """All of a tensor of which each rank has a share; every rank must ask. Other tensors as they are."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def share_of(x: Tensor, like: Tensor) -> Tensor:
    """The inverse: this rank's share of x, cut as `like` is."""
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)


def mean_over_ranks(*numbers: float) -> list[float]:
    """The mean of each number over all ranks: the same on every rank, so all can decide alike."""
    if not dist.is_initialized():
        return list(numbers)
    x = torch.tensor(numbers, dtype=torch.float64)
    x = x.float().cuda() if dist.get_backend() == "nccl" else x
    dist.all_reduce(x)
    return (x / dist.get_world_size()).tolist()


def from_all_ranks(x) -> list:
    """[x of rank 0, x of rank 1, ...] of something small."""
    if not dist.is_initialized():
        return [x]
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, x)
    return out


@contextmanager
def sync_gradients(net: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are averaged over the ranks in the last of the batches that are accumulated only."""
    if hasattr(net, "set_requires_gradient_sync"):  # FSDP2
        net.set_requires_gradient_sync(last)
    with net.no_sync() if isinstance(net, DistributedDataParallel) and not last else nullcontext():
        yield
