"""Layer norm over tokens and over the channels of images, against eager PyTorch, torch.compile and a copy.

`python -m benches.bench_layer_norm` prints the tables and writes the rows to benches/results.csv; `--quick` takes a
small shape and writes nothing. Liger and quack take part where they are installed and there is a GPU. Outputs are fresh
at each call; under the default allocator their pages are too, while the warm one gives back the memory of the call
before, so that there the rows of the kernels alone are those of kept outputs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benches import common
from ssl_fast.functional import layer_norm
from ssl_fast.ops import layer_norm as ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# ViT-B and ViT-S at 64 images of 224 pixels, one image of ViT-L, and ConvNeXt-T's first stage.
SHAPES = [(12608, 768), (12608, 384), (197, 1024), (64, 96, 56, 56)]
QUICK = [(197, 384), (4, 96, 14, 14)]
FLOOR = "copy_"
# Passes over the activation that nothing on the chip can save: x, y; dy, x, dx.
PASSES = {"forward": 2, "backward": 3, "both": 5}


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Images as timm's and torchvision's LayerNorm2d take them."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if x.dim() == 2:
        return F.layer_norm(x, weight.shape, weight, bias, 1e-6)
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-6).permute(0, 3, 1, 2)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight.shape, weight, bias, 1e-6, dim=1 if x.dim() == 4 else -1)


def peers() -> dict[str, Callable[..., Tensor]]:
    """Of tokens, on a GPU."""
    found: dict[str, Callable[..., Tensor]] = {}
    if DEVICE == "cuda":
        try:
            from liger_kernel.transformers.functional import liger_layer_norm

            found["Liger"] = lambda x, weight, bias: liger_layer_norm(x, weight.to(x.dtype), bias.to(x.dtype), 1e-6)
        except ImportError:
            pass
        try:
            from quack.layernorm import layernorm_fwd

            found["quack"] = lambda x, weight, bias: layernorm_fwd(x, weight, bias, 1e-6)
        except ImportError:
            pass
    return found


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> list[Tensor]:
    """x, weight, bias; the parameters in fp32 for every x."""
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(shape, generator=generator).to(DEVICE, dtype, memory_format=memory_format).requires_grad_()
    return [x, *(torch.rand(shape[1], generator=generator).to(DEVICE).requires_grad_() for _ in range(2))]


def kernels(given: list[Tensor], dy: Tensor) -> dict[str, Callable[[], Any]]:
    """The operators by themselves."""
    x, weight, bias = (t.detach() for t in given)
    width, channels = weight.numel(), x.dim() == 4

    def forward() -> tuple[Tensor, ...]:
        return ops.layer_norm_fwd(x, None, weight, bias, width, channels, 1e-6, ops.IDENTITY)

    stats = forward()[1]

    def backward() -> tuple[Tensor, ...]:
        flags = (True, False, True)
        return ops.layer_norm_bwd(dy, x, None, weight, None, stats, width, channels, ops.IDENTITY, *flags)

    def both() -> None:
        forward()
        backward()

    return {"forward": forward, "backward": backward, "both": both}


def passes(fn: Callable[..., Tensor], given: list[Tensor], dy: Tensor) -> dict[str, Callable[[], Any]]:
    """What a training script runs: with autograd, gradients fresh."""
    kept = fn(*given)
    if not kept.requires_grad:  # quack's forward has no autograd
        return {"forward": lambda: fn(*given)}

    def backward(y: Tensor) -> None:
        for leaf in given:
            leaf.grad = None
        y.backward(dy, retain_graph=y is kept)

    return {"forward": lambda: fn(*given), "backward": lambda: backward(kept), "both": lambda: backward(fn(*given))}


def errors(fn: Callable[..., Tensor], given: list[Tensor], dy: Tensor) -> float:
    """The larger of the relative errors of y and dx against fp64."""

    def run(function: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        own = [t.detach().clone().to(dtype or t.dtype) for t in given]
        own[0].requires_grad_()
        y = function(*own)
        return [y, *(torch.autograd.grad(y, own[0], dy.to(y.dtype)) if y.requires_grad else ())]

    truth, value = run(plain, torch.float64), run(fn, None)
    return max(((v.double() - t).norm() / t.norm()).item() for v, t in zip(value, truth, strict=False))


def bench(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seconds: float) -> list[common.Row]:
    """One interleaved run of every provider and pass."""
    given = inputs(shape, dtype, layout)
    x = given[0].detach()
    dy = torch.randn_like(x)
    kept = torch.empty_like(x)
    providers = {"eager": plain, "torch.compile": torch.compile(plain), "ssl_fast": ours}
    providers |= peers() if x.dim() == 2 else {}
    steps: dict[str, Callable[[], Any]] = {FLOOR: lambda: kept.copy_(x)}
    for name, fn in providers.items():
        steps |= {f"{name}/{kind}": step for kind, step in passes(fn, given, dy).items()}
    steps |= {f"ssl_fast kernels/{kind}": step for kind, step in kernels(given, dy).items()}
    off = {name: errors(fn, given, dy) for name, fn in providers.items()}
    rows, size = [], x.numel() * x.element_size()
    for key, times in common.interleave(steps, seconds=seconds).items():
        provider, _, kind = key.partition("/")
        row = {
            "op": "layer_norm" if kind in ("", "both") else f"layer_norm {kind}",
            "shape": f"{'x'.join(map(str, shape))} {layout}",
            "dtype": str(dtype).removeprefix("torch."),
            "provider": provider,
            "error": off.get(provider, "") if kind == "both" else "",
            **common.timing(times),
        }
        row["gb_per_s"] = PASSES.get(kind, 2) * size / row["ms"] / 1e6
        rows.append(row)
    for row in rows:
        row |= {"ratio": row["ms"] / rows[0]["ms"], "to": FLOOR}
    return rows


def cases(shapes: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], str, str]]:
    return [
        (shape, dtype, layout)
        for shape in shapes
        for layout in (("channels_last", "contiguous") if len(shape) == 4 else ("rows",))
        for dtype in ("float32", "bfloat16")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small shapes, nothing written")
    parser.add_argument("--shape", help="this shape alone, as 12608x768")
    parser.add_argument("--worker", nargs=3, metavar=("SHAPE", "DTYPE", "LAYOUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        shape, dtype, layout = arguments.worker
        sizes = tuple(map(int, shape.split("x")))
        print(json.dumps(bench(sizes, getattr(torch, dtype), layout, seconds=0.5 if arguments.quick else 3.0)))
        return

    print(f"Layer norm in training on {common.device_name()}, {torch.get_num_threads()} threads")
    conditions, rows = common.conditions(), []
    shapes = QUICK if arguments.quick else SHAPES
    if arguments.shape:
        shapes = [tuple(map(int, arguments.shape.split("x")))]
    for shape, dtype, layout in cases(shapes):
        for allocator in ("default", "warm") if DEVICE == "cpu" else ("default",):
            call = ["--worker", "x".join(map(str, shape)), dtype, layout, *(["--quick"] if arguments.quick else [])]
            measured = common.in_fresh_process(__spec__.name, call, allocator)
            for row in measured:
                row |= {"allocator": allocator, **conditions}
            print(f"\n{measured[0]['shape']}, {dtype}, allocator {allocator}")
            print(common.table(measured, ("op", "provider", "ms", "ms_p20", "ms_p80", "ratio", "gb_per_s", "error")))
            print(verdict(measured), flush=True)
            rows += measured
            if not arguments.quick:
                common.save(rows)  # after each table: what an interruption leaves is kept
    if not arguments.quick:
        print(f"\n{len(rows)} rows written to {common.RESULTS}")


def verdict(rows: list[common.Row]) -> str:
    """The ratios people ask for, in one line; the floor is that of 5 passes, where a copy has 2."""
    ms = {r["provider"]: r["ms"] for r in rows if r["op"] == "layer_norm"}
    copies = ms["ssl_fast kernels"] / ms[FLOOR]
    return (
        f"{copies:.2f} x {FLOOR}, {copies / (PASSES['both'] / 2):.2f} x the floor of {PASSES['both']} passes; "
        f"{ms['eager'] / ms['ssl_fast']:.2f} x faster than eager, "
        f"{ms['torch.compile'] / ms['ssl_fast']:.2f} x than torch.compile"
    )


if __name__ == "__main__":
    main()
