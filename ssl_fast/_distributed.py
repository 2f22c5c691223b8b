"""Rows of all the processes of torch.distributed; of one process where it is not in use."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(x: Tensor) -> Tensor:
    """(ranks * N, ...), the x of every rank in their order, without gradient; as many rows on each."""
    _, world = rank_and_world()
    if world == 1:
        return x.detach()
    parts = torch.empty((world, *x.shape), dtype=x.dtype, device=x.device)
    dist.all_gather(list(parts.unbind()), x.detach().contiguous())
    return parts.flatten(0, 1)


def shared_permutation(n: int, device: torch.device) -> Tensor:
    """A random order of n rows, the same on every rank."""
    order = torch.randperm(n, device=device)
    if rank_and_world()[1] > 1:
        dist.broadcast(order, 0)
    return order
