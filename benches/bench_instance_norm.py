"""Instance norm in training: eager / torch.compile / ours / the operators alone, beside a copy of the same tensor.

`python -m benches.bench_instance_norm` prints the tables and writes the rows to benches/results.csv; `--quick` takes a
small shape and writes nothing; `--shape 32x64x128x128` takes that shape alone. The floor is what no implementation goes
below: x read and y written, dy and x read and dx written, 2.5 copies in all. Outputs are fresh at each call; the warm
allocator gives back the memory of the call before.
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
from ssl_fast.functional import instance_norm
from ssl_fast.ops import batch_norm as ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(32, 64, 128, 128), (2, 32, 64, 64, 64)]  # a generator's, a U-Net's for volumes
QUICK = [(8, 16, 14, 14)]
FLOOR = "copy_"
PASSES = {"forward": 2, "backward": 3, "both": 5}  # over the activation


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=weight, bias=bias)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return instance_norm(x, weight=weight, bias=bias)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, dy."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    if layout == "channels_last":
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    weight, bias = (torch.rand(shape[1], generator=generator).to(DEVICE, dtype).requires_grad_() for _ in range(2))
    return x.requires_grad_(), weight, bias, dy


def kernels(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> dict[str, Callable[[], Any]]:
    """The operators by themselves."""
    x, weight, bias = x.detach(), weight.detach(), bias.detach()

    def forward() -> tuple[Tensor, ...]:
        return ops.batch_norm_fwd(
            x, None, weight, bias, None, None, None, None, True, 0.1, 1e-5, len(x), ops.IDENTITY, False
        )  # fmt: skip

    stats = forward()[1]

    def backward() -> tuple[Tensor, ...]:
        return ops.batch_norm_bwd(dy, x, None, None, weight, None, stats, None, True, ops.IDENTITY, True, False)

    return {"forward": forward, "backward": backward, "both": lambda: (forward(), backward())}


def passes(fn: Callable[..., Tensor], leaves: tuple[Tensor, ...], dy: Tensor) -> dict[str, Callable[[], Any]]:
    """What a training script runs: with autograd, gradients fresh."""
    kept = fn(*leaves)

    def backward(y: Tensor) -> None:
        for leaf in leaves:
            leaf.grad = None
        y.backward(dy, retain_graph=y is kept)

    return {"forward": lambda: fn(*leaves), "backward": lambda: backward(kept), "both": lambda: backward(fn(*leaves))}


def errors(fn: Callable[..., Tensor], leaves: tuple[Tensor, ...], dy: Tensor) -> float:
    """The larger of the relative errors of y and dx against fp64."""

    def run(function: Callable[..., Tensor], own: list[Tensor]) -> list[Tensor]:
        own[0].requires_grad_()
        y = function(*own)
        return [y, *torch.autograd.grad(y, own[0], dy.to(y.dtype))]

    truth = run(plain, [t.detach().double() for t in leaves])
    value = run(fn, [t.detach().clone() for t in leaves])
    return max(((v.double() - t).norm() / t.norm()).item() for v, t in zip(value, truth, strict=True))


def bench(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seconds: float) -> list[common.Row]:
    """One interleaved run of every provider and pass."""
    *leaves, dy = inputs(shape, dtype, layout)
    given, kept = (leaves[0], leaves[1], leaves[2]), torch.empty_like(leaves[0])
    providers = {"eager": plain, "torch.compile": torch.compile(plain), "ssl_fast": ours}
    steps: dict[str, Callable[[], Any]] = {FLOOR: lambda: kept.copy_(leaves[0].detach())}
    for name, fn in providers.items():
        steps |= {f"{name}/{kind}": step for kind, step in passes(fn, given, dy).items()}
    steps |= {f"ssl_fast kernels/{kind}": step for kind, step in kernels(*given, dy).items()}
    off = {name: errors(fn, given, dy) for name, fn in providers.items()}
    rows, size = [], dy.numel() * dy.element_size()
    for key, times in common.interleave(steps, seconds=seconds).items():
        provider, _, kind = key.partition("/")
        row = {
            "op": "instance_norm" if kind in ("", "both") else f"instance_norm {kind}",
            "shape": f"{'x'.join(map(str, shape))} {layout} IN",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape, nothing written")
    parser.add_argument("--shape", help="this shape alone, as 32x64x128x128")
    parser.add_argument("--worker", nargs=3, metavar=("SHAPE", "DTYPE", "LAYOUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        shape, dtype, layout = arguments.worker
        sizes = tuple(map(int, shape.split("x")))
        print(json.dumps(bench(sizes, getattr(torch, dtype), layout, seconds=0.5 if arguments.quick else 3.0)))
        return

    print(f"Instance norm in training on {common.device_name()}, {torch.get_num_threads()} threads")
    conditions, rows = common.conditions(), []
    shapes = ["x".join(map(str, shape)) for shape in (QUICK if arguments.quick else SHAPES)]
    for shape in [arguments.shape] if arguments.shape else shapes:
        for layout in ("contiguous", "channels_last"):
            for dtype in ("float32", "bfloat16"):
                for allocator in ("default", "warm") if DEVICE == "cpu" else ("default",):
                    call = ["--worker", shape, dtype, layout, *(["--quick"] if arguments.quick else [])]
                    measured = common.in_fresh_process(__spec__.name, call, allocator)
                    for row in measured:
                        row |= {"allocator": allocator, **conditions}
                    print(f"\n{measured[0]['shape']}, {dtype}, allocator {allocator}")
                    columns = ("op", "provider", "ms", "ms_p20", "ms_p80", "ratio", "gb_per_s", "error")
                    print(common.table(measured, columns))
                    print(verdict(measured), flush=True)
                    rows += measured
                    if not arguments.quick:
                        common.save(rows)  # after each table: what an interruption leaves is kept
    if not arguments.quick:
        print(f"\n{len(rows)} rows written to {common.RESULTS}")


def verdict(rows: list[common.Row]) -> str:
    """The ratios people ask for, in one line."""
    ms = {r["provider"]: r["ms"] for r in rows if r["op"] == "instance_norm"}
    return (
        f"{ms['ssl_fast kernels'] / ms[FLOOR] / 2.5:.2f} x the floor; {ms['eager'] / ms['ssl_fast']:.2f} x faster than "
        f"eager, {ms['torch.compile'] / ms['ssl_fast']:.2f} x than torch.compile"
    )


if __name__ == "__main__":
    main()
