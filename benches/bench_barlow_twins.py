"""Barlow Twins' loss forward and backward against dense PyTorch, lightly, and matrix products into a kept output.

`python -m benches.bench_barlow_twins` prints the tables and writes the rows to benches/results.csv.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import ssl_fast
from benches import common, timing
from benches.common import Provider, Table
from benches.machine import DEVICE

SHAPES = [(256, 8192), (256, 16384), (2048, 1024), (1024, 8192)]
GPU_SHAPES = [(256, 8192), (2048, 8192), (2048, 16384), (8192, 8192), (4096, 2048)]
QUICK = [(64, 256), (256, 64)]


def cases(quick: bool) -> list[tuple[int, int]]:
    """N and D."""
    return QUICK if quick else GPU_SHAPES if DEVICE == "cuda" else SHAPES


def dense(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The paper's pseudocode."""
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    C = a.T @ b / len(z_a)
    n, m = C.shape
    off = C.flatten()[:-1].view(n - 1, m + 1)[:, 1:]
    return (1 - C.diagonal()).square().sum() + 5e-3 * off.square().sum()


def by_rows(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The same for few rows of many features: |C|^2 is the sum of (a_i . a_j) (b_i . b_j) / N^2."""
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    diagonal = (a * b).mean(0)
    squares = (a @ a.T * (b @ b.T)).sum() / len(a) ** 2
    return (1 - diagonal).square().sum() + 5e-3 * (squares - diagonal.square().sum())


def losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The providers, by name."""
    found = {"ssl_fast": ssl_fast.BarlowTwinsLoss(), "dense PyTorch": dense, "torch.compile": torch.compile(dense)}
    with common.peer("lightly"):
        from lightly.loss import BarlowTwinsLoss

        found["lightly"] = BarlowTwinsLoss()
    return found


def embeddings(N: int, D: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z_a = torch.randn(N, D, generator=generator)
    z_b = z_a + torch.randn(N, D, generator=generator)
    return z_a.to(DEVICE).requires_grad_(), z_b.to(DEVICE).requires_grad_()


def three_products(N: int, D: int) -> timing.Step:
    """What the shorter side asks for: C, or the triangles of two Grams, forward; a gradient for each view backward."""
    kept = torch.empty(min(N, D), min(N, D), device=DEVICE)
    z = torch.randn(max(N, D), min(N, D), device=DEVICE)
    return lambda: [torch.mm(z.T, z, out=kept) for _ in range(3)]


def provider(name: str, loss: Callable[[Tensor, Tensor], Tensor], N: int, D: int) -> Provider:
    def build() -> timing.Step:
        z_a, z_b = embeddings(N, D)

        def step() -> None:
            z_a.grad = z_b.grad = None
            loss(z_a, z_b).backward()

        return step

    def error() -> float:
        """Of the gradient for z_a."""
        z_a, z_b = embeddings(N, D)
        doubles = [x.detach().double().requires_grad_() for x in (z_a, z_b)]
        exact = dense if D <= 2 * N else by_rows
        truth = torch.autograd.grad(exact(*doubles), doubles[0])
        return common.relative_error(torch.autograd.grad(loss(z_a, z_b), z_a), truth)

    return Provider(name, build, work=1.0, error=error, compiled=name == "torch.compile")


def setup(N: int, D: int) -> Table:
    floor = Provider(common.PRODUCT, lambda: three_products(N, D), work=1.0)
    found = [provider(name, loss, N, D) for name, loss in losses().items()]
    return Table("barlow_twins", f"N={N} D={D}", [floor, *found], flop=6.0 * max(N, D) * min(N, D) ** 2)


if __name__ == "__main__":
    common.main(__doc__, cases, setup, allocators=("default",))
