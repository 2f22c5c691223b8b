"""Batch norm with what follows it, against eager PyTorch, torch.compile and a copy of the same tensor.

`python -m benches.bench_batch_norm` prints the tables and writes the rows to benches/results.csv. Images are
BN+add+ReLU, the projector's rows BN+ReLU, in training. Outputs are fresh at each call; under the default allocator
their pages are too, while the warm one gives back the memory of the call before, so that there the rows of the kernels
alone are those of kept outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benches import common
from benches.common import Table
from benches.machine import DEVICE
from benches.norms import Given, norm_table
from benches.timing import Step
from ssl_fast.functional import batch_norm
from ssl_fast.ops import batch_norm as ops
from ssl_fast.ops._norms import RELU

# ResNet-50 at 224 pixels, its third stage at two batches (the smaller fits a cache), the last stage of ResNet-18 for
# CIFAR-10, and SimCLR's projector.
SHAPES = [(64, 64, 56, 56), (64, 256, 56, 56), (64, 512, 28, 28), (64, 2048, 7, 7), (64, 256, 14, 14),
          (16, 256, 14, 14), (256, 512, 4, 4), (4096, 2048)]  # fmt: skip
QUICK = [("8x64x14x14", "float32", "channels_last", True), ("8x64x14x14", "bfloat16", "contiguous", False)]


def cases(quick: bool) -> list[tuple[str, str, str, bool]]:
    """The shape, dtype and layout, and whether to compile, which takes most of a quick run."""
    if quick:
        return QUICK
    return [
        ("x".join(map(str, shape)), dtype, layout, True)
        for shape in SHAPES
        for layout in (("channels_last", "contiguous") if len(shape) == 4 else ("rows",))
        for dtype in ("float32", "bfloat16")
    ]


def plain(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    y = F.batch_norm(x, mean, var, weight, bias, training=True)
    return F.relu(y if residual is None else y + residual)


def ours(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return batch_norm(x, mean, var, weight, bias, True, activation="relu", residual=residual)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Given:
    """x, residual, weight, bias, running statistics."""
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, residual = (
        torch.randn(shape, generator=generator).to(DEVICE, dtype, memory_format=memory_format).requires_grad_()
        for _ in range(2)
    )
    weight, bias = (torch.rand(shape[1], generator=generator).to(DEVICE).requires_grad_() for _ in range(2))
    return [x, residual if len(shape) == 4 else None, weight, bias, torch.zeros_like(weight), torch.ones_like(weight)]


def kernels(*given: Tensor | None) -> dict[str, Step]:
    """The operators by themselves."""
    x, residual, weight, bias, mean, var = (t if t is None else t.detach() for t in given)
    dy = torch.randn_like(x)
    relu, keep = RELU, residual is not None

    def forward() -> tuple[Tensor, ...]:
        return ops.batch_norm_fwd(
            x, residual, weight, bias, mean, var, None, None, True, 0.1, 1e-5, 1, relu, keep
        )  # fmt: skip

    _, stats, mask = forward()
    saved = (x, None, mask if keep else None, weight, bias, stats)

    def backward() -> tuple[Tensor, ...]:
        return ops.batch_norm_bwd(dy, *saved, None, True, relu, True, keep)

    def both() -> None:
        forward()
        backward()

    return {"forward": forward, "backward": backward, "both": both}


def setup(sizes: str, dtype: str, layout: str, compiled: bool) -> Table:
    shape = tuple(map(int, sizes.split("x")))
    residual = len(shape) == 4
    # x, residual, y; dy, x, dx, dresidual: once each, where a cache keeps what the second sweep reads again.
    counts = {"forward": 2 + residual, "backward": 3 + residual, "both": 5 + 2 * residual}
    norms = {"eager": plain, **({"torch.compile": torch.compile(plain)} if compiled else {}), "ssl_fast": ours}
    kind = f"{layout} {'BN+add+ReLU' if residual else 'BN+ReLU'}"
    given = lambda: inputs(shape, getattr(torch, dtype), layout)  # noqa: E731
    return norm_table("batch_norm", sizes, kind, dtype, given, norms, kernels, counts)


if __name__ == "__main__":
    common.main(__doc__, cases, setup, seconds=3.0)
