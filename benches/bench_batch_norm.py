"""Batch norm with what follows it, against eager PyTorch, torch.compile and a copy of the same tensor.

`python -m benches.bench_batch_norm` prints the tables and writes the rows to benches/results.csv; `--quick` takes a
small shape and writes nothing. Images are BN+add+ReLU, the projector's rows BN+ReLU, in training. Outputs are fresh at
each call; under the default allocator their pages are too, while the warm one gives back the memory of the call before,
so that there the rows of the kernels alone are those of kept outputs.
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
from ssl_fast.functional import batch_norm
from ssl_fast.ops import batch_norm as ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# ResNet-50 at 224 pixels, its third stage at two batches (the smaller fits a cache), and SimCLR's projector.
SHAPES = [(64, 64, 56, 56), (64, 256, 56, 56), (64, 512, 28, 28), (64, 2048, 7, 7), (64, 256, 14, 14),
          (16, 256, 14, 14), (4096, 2048)]  # fmt: skip
QUICK = [(8, 64, 14, 14)]
FLOOR = "copy_"


def plain(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    y = F.batch_norm(x, mean, var, weight, bias, training=True)
    return F.relu(y if residual is None else y + residual)


def ours(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return batch_norm(x, mean, var, weight, bias, True, activation="relu", residual=residual)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    """x, residual, weight, bias, running statistics."""
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, residual = (
        torch.randn(shape, generator=generator).to(DEVICE, dtype, memory_format=memory_format).requires_grad_()
        for _ in range(2)
    )
    weight, bias = (torch.rand(shape[1], generator=generator).to(DEVICE).requires_grad_() for _ in range(2))
    return [x, residual if len(shape) == 4 else None, weight, bias, torch.zeros_like(weight), torch.ones_like(weight)]


def kernels(given: list[Tensor | None], dy: Tensor) -> dict[str, Callable[[], Any]]:
    """The operators by themselves."""
    x, residual, weight, bias, mean, var = (t if t is None else t.detach() for t in given)
    relu, keep = ops.RELU, residual is not None

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


def passes(fn: Callable[..., Tensor], given: list[Tensor | None], dy: Tensor) -> dict[str, Callable[[], Any]]:
    """What a training script runs: with autograd, gradients fresh."""
    leaves = [t for t in given if t is not None and t.requires_grad]
    kept = fn(*given[:4], *(t.clone() for t in given[4:]))  # eager's backward refuses statistics that moved on

    def backward(y: Tensor) -> None:
        for leaf in leaves:
            leaf.grad = None
        y.backward(dy, retain_graph=y is kept)

    return {"forward": lambda: fn(*given), "backward": lambda: backward(kept), "both": lambda: backward(fn(*given))}


def errors(fn: Callable[..., Tensor], given: list[Tensor | None], dy: Tensor) -> float:
    """The larger of the relative errors of y and dx against fp64."""

    def run(function: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        own = [t if t is None else t.detach().clone().to(dtype or t.dtype) for t in given]
        own[0].requires_grad_()
        y = function(*own)
        return [y, *torch.autograd.grad(y, own[0], dy.to(y.dtype))]

    truth, value = run(plain, torch.float64), run(fn, None)
    return max(((v.double() - t).norm() / t.norm()).item() for v, t in zip(value, truth, strict=True))


def bench(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seconds: float) -> list[common.Row]:
    """One interleaved run of every provider and pass."""
    given = inputs(shape, dtype, layout)
    x = given[0].detach()
    dy = torch.randn_like(x)
    kept = torch.empty_like(x)
    providers = {"eager": plain, "torch.compile": torch.compile(plain), "ssl_fast": ours}
    steps: dict[str, Callable[[], Any]] = {FLOOR: lambda: kept.copy_(x)}
    for name, fn in providers.items():
        steps |= {f"{name}/{kind}": step for kind, step in passes(fn, given, dy).items()}
    steps |= {f"ssl_fast kernels/{kind}": step for kind, step in kernels(given, dy).items()}
    off = {name: errors(fn, given, dy) for name, fn in providers.items()}
    rows, size = [], x.numel() * x.element_size()
    # Passes over the activation that nothing on the chip can save: x twice, residual, y; dy and x twice, dx, dresidual.
    residual = given[1] is not None
    floor = {"forward": 3 + residual, "backward": 5 + residual, "both": 8 + 2 * residual}
    for key, times in common.interleave(steps, seconds=seconds).items():
        provider, _, kind = key.partition("/")
        row = {
            "op": "batch_norm" if kind in ("", "both") else f"batch_norm {kind}",
            "shape": f"{'x'.join(map(str, shape))} {layout} {'BN+add+ReLU' if residual else 'BN+ReLU'}",
            "dtype": str(dtype).removeprefix("torch."),
            "provider": provider,
            "error": off.get(provider, "") if kind == "both" else "",
            **common.timing(times),
        }
        row["gb_per_s"] = floor.get(kind, 2) * size / row["ms"] / 1e6
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
    parser.add_argument("--quick", action="store_true", help="one small shape, nothing written")
    parser.add_argument("--shape", help="this shape alone, as 64x64x56x56")
    parser.add_argument("--worker", nargs=3, metavar=("SHAPE", "DTYPE", "LAYOUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        shape, dtype, layout = arguments.worker
        sizes = tuple(map(int, shape.split("x")))
        print(json.dumps(bench(sizes, getattr(torch, dtype), layout, seconds=0.5 if arguments.quick else 3.0)))
        return

    print(f"Batch norm in training on {common.device_name()}, {torch.get_num_threads()} threads")
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
    """The ratios people ask for, in one line."""
    ms = {r["provider"]: r["ms"] for r in rows if r["op"] == "batch_norm"}
    return (
        f"{ms['ssl_fast kernels'] / ms[FLOOR]:.2f} x {FLOOR}; {ms['eager'] / ms['ssl_fast']:.2f} x faster than eager, "
        f"{ms['torch.compile'] / ms['ssl_fast']:.2f} x than torch.compile"
    )


if __name__ == "__main__":
    main()
