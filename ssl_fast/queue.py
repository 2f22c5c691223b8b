"""The queue of keys that MoCo (He et al. 2019, arXiv 1911.05722, Algorithm 1) takes its negatives from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_fast._checks import check_flags, whole
from ssl_fast._distributed import processes, share


class KeyQueue(nn.Module):
    """The last `size` keys, row-major, so that a loss reads them as they lie.

    Random unit rows until they are filled, the same on every process with gather_distributed. What is enqueued
    overwrites the oldest keys in place, wrapping at any batch size; the position stays on the device, and all is in the
    state dict.

    Args:
        size: how many keys.
        dim: their width.
        normalize: keep the keys as rows of unit length, as MoCo's are; False: as they are given.
        gather_distributed: enqueue the keys of all processes of torch.distributed, in their order.
        group: of these processes alone.

    Attributes:
        keys: (size, dim), without gradient.
        pointer: () int64, where the next key goes.
        fill: () int64, how many of the keys were enqueued.

    Raises:
        ValueError: from load_state_dict(), for a queue of another size or width, before any of it is loaded.

    Example:
        >>> loss = info_nce(q, k, queue.keys, temperature=0.07)  # k of any length: both normalise
        >>> queue.enqueue(k)
    """

    keys: Tensor
    pointer: Tensor
    fill: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        normalize: bool = True,
        gather_distributed: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        size, dim = whole("size", size), whole("dim", dim)
        check_flags(normalize=normalize, gather_distributed=gather_distributed)
        self.gather_distributed, self.group = gather_distributed or group is not None, group
        # The negatives of a loss over several processes are the same on each, whatever their seeds.
        same = torch.Generator().manual_seed(0) if self.gather_distributed else None
        keys = torch.randn(size, dim, generator=same, device="cpu" if same else None)
        self.register_buffer("keys", F.normalize(keys.to(torch.get_default_device())))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fill", torch.zeros((), dtype=torch.int64))
        self.normalize = normalize

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write keys (N, dim) over the oldest; of more than `size` the last ones stay."""
        size, dim = self.keys.shape
        if not isinstance(keys, Tensor) or keys.dim() != 2 or keys.shape[1] != dim or not keys.is_floating_point():
            got = f"shape {tuple(keys.shape)} of {keys.dtype}" if isinstance(keys, Tensor) else type(keys).__name__
            raise ValueError(f"keys: got {got}, allowed: a tensor (N, {dim}) of a floating-point dtype")
        ranks = share(keys, processes(self.gather_distributed, self.group, "gather"), "gather")
        keys = keys if ranks is None else ranks.gather(keys)
        last = keys[-size:]
        at = torch.arange(len(keys) - len(last), len(keys), device=self.keys.device)
        last = last.to(torch.promote_types(last.dtype, self.keys.dtype))
        last = (F.normalize(last) if self.normalize else last).to(self.keys)
        self.keys.index_copy_(0, (self.pointer + at) % size, last)
        self.pointer.add_(len(keys)).remainder_(size)
        self.fill.add_(len(keys)).clamp_(max=size)

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> None:
        """Raise where a state dict holds a queue of another size or width."""
        saved = state.get(prefix + "keys")
        if saved is not None and saved.shape != self.keys.shape:
            got, allowed = (" x ".join(map(str, t.shape)) for t in (saved, self.keys))
            raise ValueError(
                f"{prefix}keys: got a checkpoint of {got} (keys x width), allowed: those of this queue, {allowed}; "
                "build it with the size (K) and dim of the checkpoint"
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self.check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        chosen = ("" if self.normalize else ", normalize=False") + self.gather_distributed * ", gather_distributed=True"
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}{chosen}"
