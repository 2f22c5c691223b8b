"""The modules and helpers that no op's bench has: each beside what it is a drop-in for.

The norms of `ssl_fast.nn` against those of torch.nn, forward and backward; the weights of a folded layer; a queue of
keys; and a training step in micro-batches, and with its stages computed again, where memory is what matters.

`python -m benches.bench_modules` prints the tables and writes the rows to benches/results.csv.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ssl_fast
import ssl_fast.nn as fast
from benches import common
from benches.common import Provider, Table
from benches.machine import DEVICE
from benches.timing import Step
from ssl_fast.functional import fuse_conv_bn_weights, fuse_linear_bn_weights

COPIES = 2.5  # x, y; dy, x, dx: what a norm's forward and backward pass cannot go below
NORMS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (fast.BatchNorm1d, (4096, 512)),
    "BatchNorm2d": (fast.BatchNorm2d, (64, 64, 28, 28)),
    "BatchNorm3d": (fast.BatchNorm3d, (8, 32, 8, 28, 28)),
    "SyncBatchNorm": (lambda width: ssl_fast.convert_sync_batchnorm(nn.BatchNorm2d(width)), (64, 64, 28, 28)),
    "InstanceNorm1d": (partial(fast.InstanceNorm1d, affine=True), (64, 64, 784)),
    "InstanceNorm2d": (partial(fast.InstanceNorm2d, affine=True), (64, 64, 28, 28)),
    "InstanceNorm3d": (partial(fast.InstanceNorm3d, affine=True), (8, 32, 8, 28, 28)),
    "LayerNorm": (fast.LayerNorm, (4096, 384)),
    "LayerNorm2d": (fast.LayerNorm2d, (64, 96, 28, 28)),
}
FOLDED = {"conv": (512, 512, 3, 3), "linear": (2048, 2048)}
QUEUE = (256, 65536, 128)  # keys, K, dim


def cases(quick: bool) -> list[tuple[Any, ...]]:
    """What to measure, and a number that the first dimension of its shape is divided by."""
    kinds = [("norm", name) for name in NORMS] + [("folded weights", name) for name in FOLDED]
    return [(*kind, 16 if quick else 1) for kind in [*kinds, ("key queue", ""), ("memory of a step", "")]]


# ---- norms


def theirs(name: str, channels: int) -> nn.Module:
    if name == "LayerNorm2d":
        from torchvision.models.convnext import LayerNorm2d

        return LayerNorm2d(channels)
    affine = {"affine": True} if name.startswith("Instance") else {}
    return getattr(nn, "BatchNorm2d" if name == "SyncBatchNorm" else name)(channels, **affine)


def norm(name: str, shrink: int) -> Table:
    ours, shape = NORMS[name]
    shape = (max(2, shape[0] // shrink), *shape[1:])
    width = shape[1]

    def x() -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def build(make: Callable[[int], nn.Module]) -> Step:
        module, given = make(width).to(DEVICE), x().requires_grad_()
        dy = torch.randn_like(given)

        def step() -> None:
            given.grad = None
            module.zero_grad()
            module(given).backward(dy)

        return step

    def error(make: Callable[[int], nn.Module]) -> float:
        module, plain = make(width).to(DEVICE), theirs(name, width).to(DEVICE).double()
        return common.relative_error([module(x())], [plain(x().double())])

    makes = {"torch": partial(theirs, name), "ssl_fast": ours}
    found = [Provider(p, partial(build, m), work=COPIES, error=partial(error, m)) for p, m in makes.items()]
    moved = 2 * 4.0 * math.prod(shape)
    return Table("modules", f"{name} {'x'.join(map(str, shape))}", [common.copy_of(x), *found], bytes=moved)


# ---- weights of folded layers, a queue, a step


def folded_weights(kind: str, shrink: int) -> Table:
    shape = (FOLDED[kind][0] // shrink, *FOLDED[kind][1:])
    ours = fuse_conv_bn_weights if kind == "conv" else fuse_linear_bn_weights
    plain = getattr(nn.utils.fusion, f"fuse_{kind}_bn_weights")

    def given(dtype: torch.dtype = torch.float32) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(shape, generator=generator)
        bias, mean, var, gamma, beta = (torch.rand(shape[0], generator=generator) for _ in range(5))
        tensors = [t.to(DEVICE, dtype) for t in (weight, bias, mean, var, gamma, beta)]
        return [*tensors[:4], 1e-5, *tensors[4:]]

    def build(fuse: Callable[..., Any]) -> Step:
        arguments = given()
        return lambda: fuse(*arguments)

    def error(fuse: Callable[..., Any]) -> float:
        return common.relative_error([fuse(*given())[0]], [plain(*given(torch.float64))[0]])

    found = [common.copy_of(lambda: given()[0])]
    for name, fuse in (("torch.nn.utils", plain), ("ssl_fast", ours)):
        found.append(Provider(name, partial(build, fuse), work=1.0, error=partial(error, fuse)))
    return Table("modules", f"folded weights, {kind} {'x'.join(map(str, shape))}", found)


def key_queue(shrink: int) -> Table:
    """A batch of keys into the queue, normalised."""
    N, K, D = QUEUE[0], QUEUE[1] // shrink, QUEUE[2]

    def original() -> Step:
        """As MoCo keeps it, transposed, its pointer fetched."""
        queue, keys = torch.randn(D, K, device=DEVICE), torch.randn(N, D, device=DEVICE)
        pointer = torch.zeros(1, dtype=torch.long, device=DEVICE)

        def step() -> None:
            start = int(pointer)
            queue[:, start : start + N] = F.normalize(keys).T
            pointer[0] = (start + N) % K

        return step

    def ours() -> Step:
        queue, keys = ssl_fast.KeyQueue(K, D).to(DEVICE), torch.randn(N, D, device=DEVICE)
        return lambda: queue.enqueue(keys)

    copied = common.copy_of(lambda: torch.randn(N, D, device=DEVICE))
    found = [Provider("original's", original, work=1.0), Provider("ssl_fast", ours, work=1.0)]
    return Table("modules", f"key queue, {N} keys, K={K} D={D}", [copied, *found])


def memory_of_a_step(shrink: int) -> Table:
    """SimCLR with a ResNet-18: the whole batch at once, in micro-batches, and with its stages computed again."""
    batch, size = 256 // shrink, 32

    def build(how: str) -> Step:
        import torchvision

        torch.manual_seed(0)
        encoder = torchvision.models.resnet18(num_classes=128).to(DEVICE)
        if how == "ssl_fast.checkpoint_stages":
            ssl_fast.checkpoint_stages(encoder)
        model = ssl_fast.SimCLR(encoder, 128, head="none").to(DEVICE)
        views = [torch.randn(batch, 3, size, size, device=DEVICE) for _ in range(2)]

        def step() -> None:
            model.zero_grad()
            if how == "ssl_fast.cached_step":
                ssl_fast.cached_step(model.encoder, views, model.loss, micro_batch=max(2, batch // 8))
            else:
                model(*views).backward()

        return step

    hows = ("whole batch", "ssl_fast.cached_step", "ssl_fast.checkpoint_stages")
    return Table("modules", f"step of resnet18 {batch}x3x{size}x{size}", [Provider(h, partial(build, h)) for h in hows])


def setup(kind: str, name: str, shrink: int) -> Table:
    if kind == "norm":
        return norm(name, shrink)
    if kind == "folded weights":
        return folded_weights(name, shrink)
    return key_queue(shrink) if kind == "key queue" else memory_of_a_step(shrink)


if __name__ == "__main__":
    common.main(__doc__, cases, setup, seconds=3.0)
