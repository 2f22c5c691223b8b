"""NT-Xent forward and backward against dense PyTorch, the peers, and one matrix product into a kept output.

`python -m benches.bench_nt_xent` prints the tables and writes the rows to benches/results.csv.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ssl_fast
from benches import common, machine, timing
from benches.common import Provider, Table
from benches.machine import DEVICE
from ssl_fast.ops.nt_xent import nt_xent_fwd

TEMPERATURE = 0.1
PEER_SHAPE = (128, 128)  # pytorch-metric-learning takes O(N^3) memory
SHAPES = [PEER_SHAPE, (256, 128), (1024, 128), (4096, 128), (16384, 128), (32768, 128), (4096, 768)]
GPU_SHAPES = [*SHAPES, (65536, 128), (131072, 128), (32768, 768)]
WORK = 2.0  # products of a forward and backward pass: half of one, half of one, one (docs/kernels.md)

Loss = Callable[..., Tensor]


def cases(quick: bool) -> list[tuple[int, int]]:
    """N and D."""
    return [PEER_SHAPE] if quick else GPU_SHAPES if DEVICE == "cuda" else SHAPES


def dense(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = TEMPERATURE, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    """The loss as anyone writes it: normalise, multiply, mask, cross entropy."""
    return F.cross_entropy(*dense_logits(z1, z2, temperature, normalize), reduction=reduction)


def dense_logits(z1: Tensor, z2: Tensor, temperature: float | Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
    z = torch.cat([z1, z2])
    z = F.normalize(z) if normalize else z
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return logits, torch.arange(len(z), device=z.device).roll(len(z1))


def dense_bf16(z1: Tensor, z2: Tensor) -> Tensor:
    with torch.autocast(DEVICE, torch.bfloat16):
        return dense(z1, z2)


def dense_bf16_runs() -> bool:
    """Elsewhere PyTorch's bf16 product is a hundred times slower than its fp32 one: minutes for the larger shapes."""
    return DEVICE == "cuda" or machine.instruction_set() == "AMX-BF16"


def losses(N: int, D: int) -> dict[str, Loss]:
    """Of fp32 inputs, by provider."""
    found: dict[str, Loss] = {"ssl_fast": ssl_fast.NTXentLoss(TEMPERATURE), "dense PyTorch": dense}
    if N <= 4096:  # beyond, what it takes is not asked for beforehand
        found["torch.compile"] = torch.compile(dense)
    with common.peer("lightly"):
        from lightly.loss import NTXentLoss

        found["lightly"] = NTXentLoss(TEMPERATURE)
    if (N, D) == PEER_SHAPE:
        with common.peer("pytorch-metric-learning"):
            from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

            found["pytorch-metric-learning"] = SelfSupervisedLoss(NTXentLoss(TEMPERATURE))
    return found


def embeddings(N: int, D: int, dtype: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(N, D, generator=generator)
    z2 = z1 + torch.randn(N, D, generator=generator)
    z1, z2 = (z.to(DEVICE, getattr(torch, dtype)) for z in (z1, z2))
    return z1.requires_grad_(), z2.requires_grad_()


def provider(name: str, loss: Loss, dtype: str, N: int, D: int) -> Provider:
    def build() -> timing.Step:
        z1, z2 = embeddings(N, D, dtype)

        def step() -> None:
            z1.grad = z2.grad = None
            loss(z1, z2).backward()

        return step

    def error() -> float:
        """Of dloss/dz1."""
        z1, z2 = embeddings(N, D, dtype)
        return common.relative_error(torch.autograd.grad(loss(z1, z2), z1), [truth(N, D, dtype)])

    soon = DEVICE == "cuda" or N <= 16384  # beyond, a CPU takes minutes for each
    return Provider(name, build, dtype, work=WORK, error=error if soon else None, compiled=name == "torch.compile")


@functools.cache
def truth(N: int, D: int, dtype: str) -> Tensor:
    """dloss/dz1 in fp64, the dense loss by blocks of rows, which the backward computes again."""
    z1, z2 = (z.detach().double().requires_grad_() for z in embeddings(N, D, dtype))

    def losses_of(z: Tensor, rows: Tensor) -> Tensor:
        logits = (z[rows] @ z.T / TEMPERATURE).index_put((rows - rows[0], rows), z.new_tensor(-torch.inf))
        return F.cross_entropy(logits, (rows + N) % (2 * N), reduction="sum")

    z = F.normalize(torch.cat([z1, z2]))
    blocks = torch.arange(2 * N, device=DEVICE).split(1024)
    loss = sum(checkpoint(losses_of, z, rows, use_reentrant=False) for rows in blocks) / (2 * N)
    return torch.autograd.grad(loss, z1)[0]


def forward_alone(N: int, D: int) -> timing.Step:
    z1, z2 = (z.detach() for z in embeddings(N, D, "float32"))
    t = torch.tensor(TEMPERATURE, device=DEVICE)
    return lambda: nt_xent_fwd(z1, z2, t, True, 1)


def setup(N: int, D: int) -> Table:
    M = 2 * N
    found = [common.product_of(M, M, D)]
    found += [provider(name, loss, "float32", N, D) for name, loss in losses(N, D).items()]
    found.append(provider("ssl_fast", ssl_fast.NTXentLoss(TEMPERATURE), "bfloat16", N, D))
    if dense_bf16_runs() or N * D <= 1024 * 128:
        found.append(provider("dense PyTorch, autocast", dense_bf16, "bfloat16", N, D))
    found.append(Provider("ssl_fast, forward alone", lambda: forward_alone(N, D), work=0.5))
    return Table("nt_xent", f"N={N} D={D}", found, flop=2.0 * M * M * D)


if __name__ == "__main__":
    common.main(__doc__, cases, setup, seconds=8.0)
