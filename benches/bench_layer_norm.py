"""Layer norm over tokens and over the channels of images, against eager PyTorch, torch.compile and a copy.

`python -m benches.bench_layer_norm` prints the tables and writes the rows to benches/results.csv. Apex, Liger and quack
take part where they are installed and there is a GPU. Outputs are fresh at each call; under the default allocator their
pages are too, while the warm one gives back the memory of the call before, so that there the rows of the kernels alone
are those of kept outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benches import common
from benches.common import Table
from benches.machine import DEVICE
from benches.norms import Given, Norm, norm_table
from benches.timing import Step
from ssl_fast.functional import layer_norm
from ssl_fast.ops import layer_norm as ops
from ssl_fast.ops._norms import IDENTITY

# ViT-B and ViT-S at 64 images of 224 pixels, one image of ViT-L, and ConvNeXt-T's first stage.
SHAPES = [(12608, 768), (12608, 384), (197, 1024), (64, 96, 56, 56)]
QUICK = [("197x384", "float32", "rows", True), ("4x96x14x14", "bfloat16", "contiguous", False)]
# Passes over the activation that nothing on the chip can save: x, y; dy, x, dx.
PASSES = {"forward": 2, "backward": 3, "both": 5}


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


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Images as timm's and torchvision's LayerNorm2d take them."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if x.dim() == 2:
        return F.layer_norm(x, weight.shape, weight, bias, 1e-6)
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-6).permute(0, 3, 1, 2)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight.shape, weight, bias, 1e-6, dim=1 if x.dim() == 4 else -1)


def peers() -> dict[str, Norm]:
    """Of tokens, on a GPU."""
    found: dict[str, Norm] = {}
    if DEVICE == "cuda":
        with common.peer("apex"):
            from apex.normalization.fused_layer_norm import fused_layer_norm_affine

            found["apex"] = lambda x, weight, bias: fused_layer_norm_affine(
                x, weight.to(x.dtype), bias.to(x.dtype), weight.shape, 1e-6
            )
        with common.peer("Liger"):
            from liger_kernel.transformers.functional import liger_layer_norm

            found["Liger"] = lambda x, weight, bias: liger_layer_norm(x, weight.to(x.dtype), bias.to(x.dtype), 1e-6)
        with common.peer("quack"):
            from quack.layernorm import layernorm_fwd

            found["quack"] = lambda x, weight, bias: layernorm_fwd(x, weight, bias, 1e-6)
    return found


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Given:
    """x, weight, bias; the parameters in fp32 for every x."""
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(shape, generator=generator).to(DEVICE, dtype, memory_format=memory_format).requires_grad_()
    return [x, *(torch.rand(shape[1], generator=generator).to(DEVICE).requires_grad_() for _ in range(2))]


def kernels(*given: Tensor) -> dict[str, Step]:
    """The operators by themselves."""
    x, weight, bias = (t.detach() for t in given)
    dy = torch.randn_like(x)
    width, channels = weight.numel(), x.dim() == 4

    def forward() -> tuple[Tensor, ...]:
        return ops.layer_norm_fwd(x, None, weight, bias, width, channels, 1e-6, IDENTITY)

    stats = forward()[1]

    def backward() -> tuple[Tensor, ...]:
        flags = (True, False, True)
        return ops.layer_norm_bwd(dy, x, None, weight, None, stats, width, channels, IDENTITY, *flags)

    def both() -> None:
        forward()
        backward()

    return {"forward": forward, "backward": backward, "both": both}


def setup(sizes: str, dtype: str, layout: str, compiled: bool) -> Table:
    shape = tuple(map(int, sizes.split("x")))
    norms = {"eager": plain, **({"torch.compile": torch.compile(plain)} if compiled else {}), "ssl_fast": ours}
    norms |= peers() if len(shape) == 2 else {}
    given = lambda: inputs(shape, getattr(torch, dtype), layout)  # noqa: E731
    return norm_table("layer_norm", sizes, layout, dtype, given, norms, kernels, PASSES)


if __name__ == "__main__":
    common.main(__doc__, cases, setup, seconds=3.0)
