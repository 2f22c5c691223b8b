"""Instance norm in training: eager / torch.compile / ours / the operators alone, beside a copy of the same tensor.

`python -m benches.bench_instance_norm` prints the tables and writes the rows to benches/results.csv. The floor is what
no implementation goes below: x read and y written, dy and x read and dx written, 2.5 copies in all. Outputs are fresh
at each call; the warm allocator gives back the memory of the call before.
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
from ssl_fast.functional import instance_norm
from ssl_fast.ops import batch_norm as ops
from ssl_fast.ops._norms import IDENTITY

SHAPES = ["32x64x128x128", "2x32x64x64x64", "256x64x8x8"]  # a generator's, a U-Net's for volumes, many small images
QUICK = [("8x16x14x14", "float32", "contiguous", True), ("8x16x14x14", "bfloat16", "channels_last", False)]
PASSES = {"forward": 2, "backward": 3, "both": 5}  # over the activation


def cases(quick: bool) -> list[tuple[str, str, str, bool]]:
    """The shape, dtype and layout, and whether to compile, which takes most of a quick run."""
    if quick:
        return QUICK
    layouts, dtypes = ("contiguous", "channels_last"), ("float32", "bfloat16")
    return [(shape, dtype, layout, True) for shape in SHAPES for layout in layouts for dtype in dtypes]


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=weight, bias=bias)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return instance_norm(x, weight=weight, bias=bias)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Given:
    """x, weight, bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight, bias = (torch.rand(shape[1], generator=generator).to(DEVICE, dtype).requires_grad_() for _ in range(2))
    return [x.requires_grad_(), weight, bias]


def kernels(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Step]:
    """The operators by themselves."""
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    dy = torch.randn_like(x)

    def forward() -> tuple[Tensor, ...]:
        return ops.batch_norm_fwd(
            x, None, weight, bias, None, None, None, None, True, 0.1, 1e-5, len(x), IDENTITY, False
        )  # fmt: skip

    stats = forward()[1]

    def backward() -> tuple[Tensor, ...]:
        return ops.batch_norm_bwd(dy, x, None, None, weight, None, stats, None, True, IDENTITY, True, False)

    return {"forward": forward, "backward": backward, "both": lambda: (forward(), backward())}


def setup(sizes: str, dtype: str, layout: str, compiled: bool) -> Table:
    shape = tuple(map(int, sizes.split("x")))
    norms = {"eager": plain, **({"torch.compile": torch.compile(plain)} if compiled else {}), "ssl_fast": ours}
    given = lambda: inputs(shape, getattr(torch, dtype), layout)  # noqa: E731
    return norm_table("instance_norm", sizes, f"{layout} IN", dtype, given, norms, kernels, PASSES)


if __name__ == "__main__":
    common.main(__doc__, cases, setup, seconds=3.0)
