"""The queue of keys that MoCo (He et al. 2019, arXiv 1911.05722, Algorithm 1) takes its negatives from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeyQueue(nn.Module):
    """The last `size` keys, row-major, so that a loss reads them as they lie.

    Random unit rows until they are filled. What is enqueued overwrites the oldest keys in place, wrapping at any batch
    size; the position stays on the device, and both are in the state dict.

    Args:
        size: how many keys.
        dim: their width.

    Attributes:
        keys: (size, dim), without gradient.
        pointer: () int64, where the next key goes.

    Example:
        >>> loss = info_nce(q, k, queue.keys, temperature=0.07)
        >>> queue.enqueue(k)
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: got {value!r}, allowed: a whole number >= 1")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim)))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write keys (N, dim) over the oldest; of more than `size` the last ones stay."""
        size, dim = self.keys.shape
        if keys.dim() != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys: got shape {tuple(keys.shape)}, allowed: (N, {dim})")
        last = keys[-size:]
        at = torch.arange(len(keys) - len(last), len(keys), device=self.keys.device)
        self.keys.index_copy_(0, (self.pointer + at) % size, last.to(self.keys))
        self.pointer.add_(len(keys)).remainder_(size)

    def extra_repr(self) -> str:
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}"
