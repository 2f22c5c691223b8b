"""MoCo v1 (He et al. 2019, arXiv 1911.05722, Algorithm 1) and v2 (Chen et al. 2020, arXiv 2003.04297)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_fast._checks import as_float, check_callable, check_flags, is_number, whole
from ssl_fast._distributed import gather, rank_and_world, shared_permutation
from ssl_fast.accelerate import SWAPS
from ssl_fast.cached import CachedStep
from ssl_fast.ops.batch_norm import _Fused
from ssl_fast.ops.ema import EMA, _momentum
from ssl_fast.ops.info_nce import info_nce
from ssl_fast.queue import KeyQueue


class MoCo(nn.Module):
    """Queries of one view against the key of the other view and a queue of earlier keys.

    q = g(f(im_q)); k comes from a key encoder, whose weights are the moving average of those of f and g, at im_k. The
    loss is that of K + 1 classes, and the logits (N, K + 1) are never held. The key encoder moves before its forward
    pass, in place, runs without gradient and keeps nothing; its batch norms' running statistics are its own.

    Batch norm must not tell which key belongs to a query (section 3.3). Over several processes the keys' batch is
    shuffled between them; on one process, `bn_splits` gives each part of the batch statistics of its own, as so many
    devices would, and the keys' batch is shuffled. With neither it is not, and statistics are those of the batch.

    Args:
        base_encoder: as in facebookresearch/moco, a function that is called as base_encoder(num_classes=dim), such as
            torchvision.models.resnet50, and whose last nn.Linear becomes the head; or, with `features`, a module from
            images (N, C, H, W) to h (N, features), to which a linear head is added.
        dim: the width of q and k.
        K: the length of the queue; at least the images of a step, over all processes.
        m: the key encoder's momentum, in [0, 1].
        T: the temperature.
        mlp: v2's head, W2 relu(W1 h) with a hidden layer as wide as h, in the place of the linear one.
        features: the width of h, where base_encoder is a module.
        bn_splits: parts of the batch with statistics of their own, in both encoders; 8 in the authors' CIFAR notebook.

    Attributes:
        encoder: f, what a downstream task uses: h = model.encoder(images).
        head: g.
        key: the EMA whose `.module` is the key encoder.
        queue: the KeyQueue. All four are in the state dict.

    In eval mode the loss is computed, process by process, and neither the key encoder nor the queue moves. In training
    every process brings as many images. With DistributedDataParallel, broadcast_buffers=False spares sending the queue
    at each step: every process enqueues the same keys.

    Raises:
        ValueError, TypeError: naming the argument; from forward() for a batch that bn_splits does not divide or K does
            not hold, from load_state_dict() for a checkpoint of another K or dim, before anything is modified.

    Example:
        >>> model = MoCo(torchvision.models.resnet50, dim=128, K=65536, m=0.999, T=0.2, mlp=True)
        >>> model(im_q, im_k).backward()
    """

    def __init__(
        self,
        base_encoder: Callable[..., Any],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
        *,
        features: int | None = None,
        bn_splits: int = 1,
    ) -> None:
        super().__init__()
        dim, K, bn_splits = whole("dim", dim), whole("K", K), whole("bn_splits", bn_splits)
        if not is_number(T) or not 0 < as_float(T) < math.inf:
            raise ValueError(f"T: got {T!r}, allowed: a number above 0 and finite, such as 0.07 or 0.2")
        check_flags(mlp=mlp)
        _momentum("m", m, ())
        self.encoder, self.head = _encoder_and_head(base_encoder, dim, features)
        if mlp:
            width = self.head.in_features
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), self.head)
        if bn_splits > 1:
            _split_norms(self.encoder, bn_splits)
        self.key = EMA(self._query(), momentum=m, buffers="none")
        self.queue = KeyQueue(K, dim)
        self.T, self.bn_splits = float(T), bn_splits

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        """The loss, a scalar, of two views (N, C, H, W) of the same N images."""
        self._check(im_q, im_k)
        q = self.head(self.encoder(im_q))
        if self.training:
            self.key.update(self._query())
        images, back = self._shuffled(im_k, self.training and (rank_and_world()[1] > 1 or self.bn_splits > 1))
        k, keys = back(self.key(images))
        loss = info_nce(q, k, self.queue.keys, self.T)
        if self.training:
            self.queue.enqueue(keys)
        return loss

    def cached(self, im_q: Tensor, im_k: Tensor, step: CachedStep) -> Tensor:
        """The loss, detached, and the gradients of forward(), a micro-batch through either encoder at a time. The key
        encoder and the queue move once; where the step fails, the key encoder has moved, as in forward(). Batch norm
        sees a micro-batch, so the keys' batch is shuffled in any case."""
        self._check(im_q, im_k)
        if self.training:
            self.key.update(self._query())
        images, back = self._shuffled(im_k, self.training)
        keys = images.new_empty(0)

        def loss(q: Tensor, k: Tensor) -> Tensor:
            nonlocal keys
            k, keys = back(k)
            return info_nce(q, k, self.queue.keys, self.T)

        value = step([self._query(), self.key], (im_q, images), loss)
        if self.training:
            self.queue.enqueue(keys)
        return value

    @torch.no_grad()
    def _shuffled(self, images: Tensor, shuffle: bool) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """Images of all processes, as many as these, and what makes of their keys those of these images, of unit length
        (N, dim), and those of all processes' images in the order of the processes."""

        def unit(k: Tensor) -> Tensor:
            return F.normalize(k.to(self.queue.keys.dtype))  # under autocast too

        if not shuffle:
            return images, lambda k: (unit(k),) * 2
        rank, world = rank_and_world()
        everyone = gather(images)
        order = shared_permutation(len(everyone), images.device).view(world, -1)

        def back(k: Tensor) -> tuple[Tensor, Tensor]:
            keys = torch.empty(order.numel(), k.shape[1], dtype=self.queue.keys.dtype, device=k.device)
            keys[order.flatten().to(k.device)] = gather(unit(k))
            return keys.chunk(world)[rank], keys

        return everyone[order[rank]], back

    def _check(self, im_q: Tensor, im_k: Tensor) -> None:
        if not 0 < len(im_q) == len(im_k):
            raise ValueError(
                f"im_k: got {len(im_k)} images for {len(im_q)} in im_q, allowed: as many, and at least one"
            )
        if self.training:
            self.check_batch(len(im_k))

    def check_batch(self, images: int, micro_batch: int | str | None = None) -> None:
        """Raise where a batch of so many images on each process does not fit a step of training, in micro-batches."""
        if self.bn_splits > 1 and micro_batch is not None:
            parts = 0 if isinstance(micro_batch, str) else -(-images // micro_batch)
            if not parts or images % (parts * self.bn_splits):
                raise ValueError(
                    f"bn_splits: got {self.bn_splits} with micro_batch={micro_batch!r} of a batch of {images}, "
                    "allowed: a divisor of each micro-batch; set bn_splits=1: each has statistics of its own"
                )
        if images % self.bn_splits:
            raise ValueError(
                f"bn_splits: got {self.bn_splits} for a batch of {images}, allowed: a divisor of the batch; drop the "
                "last, incomplete batch"
            )
        world, K = rank_and_world()[1], len(self.queue.keys)
        if images * world > K:
            raise ValueError(
                f"K: got {K}, smaller than the {images * world} keys of a step, allowed: at least as many; raise K or "
                "lower the batch size"
            )

    def _query(self) -> nn.Sequential:
        return nn.Sequential(self.encoder, self.head)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self.queue.check_state(state_dict, prefix + "queue.")  # before the encoder is loaded
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"T={self.T}, bn_splits={self.bn_splits}"


def _encoder_and_head(base: Callable[..., Any], dim: int, features: int | None) -> tuple[nn.Module, Any]:
    """f, and a linear g from h to dim."""
    if isinstance(base, nn.Module):
        if features is None:
            raise ValueError(
                "features: got None with a module as base_encoder, allowed: the width of its output, a whole number; "
                "or pass a function of num_classes, such as torchvision.models.resnet50"
            )
        return base, nn.Linear(whole("features", features), dim)
    check_callable("base_encoder", base, "a function of num_classes, such as torchvision.models.resnet50, or a module")
    network = base(num_classes=dim)
    linear = [name for name, module in network.named_modules() if name and isinstance(module, nn.Linear)]
    head: Any = network.get_submodule(linear[-1]) if linear else None
    if head is None or head.out_features != dim:
        last = f"{linear[-1]!r} with {head.out_features} outputs" if linear else "no nn.Linear"
        raise ValueError(
            f"base_encoder: got {type(network).__name__}, whose last linear layer is {last}, allowed: one with "
            f"num_classes={dim} outputs; pass a module that returns h, with features="
        )
    if features is not None:
        raise ValueError(
            f"features: got {features} with a function as base_encoder, allowed: None, as its last linear layer is the "
            "head; pass a module for a head of its own"
        )
    network.set_submodule(linear[-1], nn.Identity())
    return network, head


def _split_norms(encoder: nn.Module, splits: int) -> None:
    """Give each of so many parts of a batch statistics of its own: torch's norms become ours, in place."""
    kind = nn.modules.batchnorm._BatchNorm
    norms: list[tuple[str, Any]] = [(n, module) for n, module in encoder.named_modules() if isinstance(module, kind)]
    for name, norm in norms:
        if type(norm) not in SWAPS and not isinstance(norm, _Fused) or isinstance(norm, nn.SyncBatchNorm):
            raise ValueError(
                f"bn_splits: got {splits} with {type(norm).__name__} at {name!r}, allowed: the batch norms of torch.nn "
                "and ssl_fast.nn; set bn_splits=1"
            )
    for _, norm in norms:
        norm.__class__ = SWAPS.get(type(norm), type(norm))
        norm.num_splits = splits


def moco_v1(
    encoder: nn.Module,
    features: int,
    dim: int = 128,
    K: int = 65536,
    m: float = 0.999,
    T: float = 0.07,
    mlp: bool = False,
    bn_splits: int = 8,
) -> MoCo:
    """MoCo around an encoder, with the settings of v1. The paper's batch of 256 lay on 8 devices, so bn_splits is 8."""
    return MoCo(encoder, dim, K, m, T, mlp, features=features, bn_splits=bn_splits)


moco_v2 = functools.partial(moco_v1, T=0.2, mlp=True)
