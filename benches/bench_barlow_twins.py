"""Barlow Twins' loss forward and backward against dense PyTorch, lightly, and matrix products into a kept output.

`python -m benches.bench_barlow_twins` prints the tables and writes the rows to benches/results.csv; `--quick` takes
small shapes and writes nothing.
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
from ssl_fast.functional import barlow_twins

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(256, 8192), (256, 16384), (2048, 1024), (1024, 8192)]
GPU_SHAPES = [(256, 8192), (2048, 8192), (2048, 16384), (8192, 8192), (4096, 2048)]
QUICK = [(64, 256), (256, 64)]
FLOOR = "mm(out=)"


def dense(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The paper's pseudocode."""
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    C = a.T @ b / len(z_a)
    n, m = C.shape
    off = C.flatten()[:-1].view(n - 1, m + 1)[:, 1:]
    return (1 - C.diagonal()).square().sum() + 5e-3 * off.square().sum()


def losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The providers, by name."""
    found = {"ssl_fast": barlow_twins, "dense PyTorch": dense}
    try:
        from lightly.loss import BarlowTwinsLoss

        found["lightly"] = BarlowTwinsLoss()
    except ImportError as error:
        print(f"lightly is left out: {error}")
    return found


def embeddings(N: int, D: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z_a = torch.randn(N, D, generator=generator)
    z_b = z_a + torch.randn(N, D, generator=generator)
    return z_a.to(DEVICE).requires_grad_(), z_b.to(DEVICE).requires_grad_()


def training_step(loss: Callable[..., Tensor], z_a: Tensor, z_b: Tensor) -> Callable[[], None]:
    def step() -> None:
        z_a.grad = z_b.grad = None
        loss(z_a, z_b).backward()

    return step


def error(loss: Callable[..., Tensor], truth: Tensor, N: int, D: int) -> float:
    """Of the gradient for z_a, relative to fp64's."""
    z_a, z_b = embeddings(N, D)
    value = torch.autograd.grad(loss(z_a, z_b), z_a)[0]
    return ((value.double() - truth).norm() / truth.norm()).item()


def bench_shape(N: int, D: int, seconds: float) -> list[common.Row]:
    """One interleaved run of every provider beside the products that the shorter side asks for: C, or two Grams, once
    forward, and thrice backward."""
    kept = torch.empty(min(N, D), min(N, D), device=DEVICE)
    z = torch.randn(max(N, D), min(N, D), device=DEVICE)
    steps: dict[str, Callable[[], Any]] = {FLOOR: lambda: [torch.mm(z.T, z, out=kept) for _ in range(4)]}
    z_a, z_b = embeddings(N, D)
    steps |= {name: training_step(loss, z_a, z_b) for name, loss in losses().items()}
    double = [x.detach().double().requires_grad_() for x in (z_a, z_b)]
    truth = torch.autograd.grad((dense if N * D <= 1 << 21 else barlow_twins)(*double), double[0])[0]
    rows = []
    for name, times in common.interleave(steps, seconds=seconds, rounds=3, slow=8.0).items():
        row = {"op": "barlow_twins", "shape": f"N={N} D={D}", "dtype": "float32", "provider": name}
        row |= {"allocator": "default", **common.timing(times)}
        if name != FLOOR:
            row["error"] = error(losses()[name], truth, N, D)
            row["extra_mb"] = common.in_fresh_process("benches.bench_barlow_twins", ["--memory", name, str(N), str(D)])
        rows.append(row)
    return [row | {"ratio": row["ms"] / rows[0]["ms"], "to": FLOOR} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing written")
    parser.add_argument("--memory", nargs=3, metavar=("PROVIDER", "N", "D"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        name, N, D = arguments.memory
        step = training_step(losses()[name], *embeddings(int(N), int(D)))
        print(json.dumps(common.extra_memory(step)))
        return
    print(f"Barlow Twins on {common.device_name()}, {torch.get_num_threads()} threads")
    conditions = common.conditions()
    for N, D in QUICK if arguments.quick else GPU_SHAPES if DEVICE == "cuda" else SHAPES:
        measured = bench_shape(N, D, 0.3 if arguments.quick else 4.0)
        print(f"\n{measured[0]['shape']}")
        print(common.table(measured, ("provider", "ms", "ms_p20", "ms_p80", "ratio", "extra_mb", "error")))
        if not arguments.quick:
            common.save([row | conditions for row in measured])


if __name__ == "__main__":
    main()
