"""NT-Xent forward and backward against dense PyTorch, the peers, and one matrix product into a kept output.

`python -m benches.bench_nt_xent` prints the tables and writes the rows to benches/results.csv; `--quick` takes small
shapes and writes nothing.
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
from ssl_fast.functional import nt_xent
from ssl_fast.ops.nt_xent import nt_xent_fwd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPERATURE = 0.1
SHAPES = [(1024, 128), (4096, 128), (4096, 768)]
GPU_SHAPES = [(1024, 128), (4096, 128), (4096, 768), (16384, 128), (32768, 128), (32768, 768)]
QUICK = [(128, 128)]
PEER_SHAPE = (128, 128)  # pytorch-metric-learning takes O(N^3) memory
FLOOR = "mm(out=)"


def dense(
    z1: Tensor, z2: Tensor, temperature: float | Tensor, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    """The loss as anyone writes it: normalise, multiply, mask, cross entropy."""
    return F.cross_entropy(*dense_logits(z1, z2, temperature, normalize), reduction=reduction)


def dense_logits(z1: Tensor, z2: Tensor, temperature: float | Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
    z = torch.cat([z1, z2])
    z = F.normalize(z) if normalize else z
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return logits, torch.arange(len(z), device=z.device).roll(len(z1))


def peers() -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {}
    try:
        from lightly.loss import NTXentLoss

        found["lightly"] = NTXentLoss(TEMPERATURE)
    except ImportError as error:
        print(f"lightly is left out: {error}")
    try:
        from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

        found["pytorch-metric-learning"] = SelfSupervisedLoss(NTXentLoss(TEMPERATURE))
    except ImportError as error:
        print(f"pytorch-metric-learning is left out: {error}")
    return found


def dense_bf16_runs() -> bool:
    """Elsewhere PyTorch's bf16 product is a hundred times slower than its fp32 one: minutes for the larger shapes."""
    return DEVICE == "cuda" or common.instruction_set() == "AMX-BF16"


def embeddings(N: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(N, D, generator=generator)
    z2 = z1 + torch.randn(N, D, generator=generator)
    return z1.to(DEVICE, dtype).requires_grad_(), z2.to(DEVICE, dtype).requires_grad_()


def training_step(loss: Callable[..., Tensor], z1: Tensor, z2: Tensor) -> Callable[[], None]:
    def step() -> None:
        z1.grad = z2.grad = None
        loss(z1, z2).backward()

    return step


def ours(z1: Tensor, z2: Tensor) -> Tensor:
    return nt_xent(z1, z2, TEMPERATURE)


def dense_bf16(z1: Tensor, z2: Tensor) -> Tensor:
    with torch.autocast(DEVICE, torch.bfloat16):
        return dense(z1, z2, TEMPERATURE)


def losses(dtype: torch.dtype, shape: tuple[int, int]) -> dict[str, Callable[..., Tensor]]:
    """The providers of one table, by name."""
    found: dict[str, Callable[..., Tensor]] = {"ssl_fast": ours}
    if dtype == torch.float32:
        found["dense PyTorch"] = lambda z1, z2: dense(z1, z2, TEMPERATURE)
        found |= {k: v for k, v in peers().items() if k == "lightly" or shape == PEER_SHAPE}
    elif dense_bf16_runs() or shape[0] * shape[1] <= 1024 * 128:
        found["dense PyTorch, autocast"] = dense_bf16
    return found


def gradient_error(loss: Callable[..., Tensor], z1: Tensor, z2: Tensor) -> float | str:
    """Relative error of dloss/dz1 against fp64; only where the fp64 matrix is small."""
    if len(z1) > 4096:
        return ""
    a, b = (z.detach().double().requires_grad_() for z in (z1, z2))
    truth = torch.autograd.grad(dense(a, b, TEMPERATURE), a)[0]
    z = z1.detach().clone().requires_grad_()
    value = torch.autograd.grad(loss(z, z2.detach()), z)[0]
    return ((value.double() - truth).norm() / truth.norm()).item()


def bench_shape(N: int, D: int, seconds: float) -> list[common.Row]:
    """One interleaved run of every provider in fp32 and bf16 beside one fp32 product z z^T into a kept output."""
    M, rows = 2 * N, []
    steps: dict[str, Callable[[], Any]] = {}
    labels: dict[str, tuple[str, str]] = {}
    kept = torch.empty(M, M, device=DEVICE)
    zz = torch.randn(M, D, device=DEVICE)
    steps[FLOOR] = lambda: torch.mm(zz, zz.T, out=kept)
    labels[FLOOR] = ("float32", FLOOR)
    errors: dict[str, float | str] = {FLOOR: ""}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        z1, z2 = embeddings(N, D, dtype)
        for provider, loss in losses(dtype, (N, D)).items():
            key = f"{provider} {name}"
            steps[key] = training_step(loss, z1, z2)
            labels[key] = (name, provider)
            errors[key] = gradient_error(loss, z1, z2)
    z1, z2 = embeddings(N, D, torch.float32)
    t = torch.tensor(TEMPERATURE, device=DEVICE)
    steps["forward"] = lambda: nt_xent_fwd(z1.detach(), z2.detach(), t, True, 1)
    labels["forward"] = ("float32", "ssl_fast, forward alone")
    for key, times in common.interleave(steps, seconds=seconds).items():
        dtype_name, provider = labels[key]
        row = {
            "op": "nt_xent",
            "shape": f"N={N} D={D}",
            "dtype": dtype_name,
            "provider": provider,
            **common.timing(times),
        }
        # 2.5 U for a loss, U for the product; a figure for each provider alike, whatever it executes.
        units = {FLOOR: 1.0, "forward": 0.5}.get(key, 2.5)
        row |= {"tflops": units * 2 * M * M * D / row["ms"] / 1e9, "error": errors.get(key, "")}
        rows.append(row)
    for row in rows:
        row |= {"ratio": row["ms"] / rows[0]["ms"], "to": FLOOR}
    return rows


def memory(provider: str, dtype_name: str, N: int, D: int) -> float:
    """MB that the first forward and backward adds to the peak, in a process that has done nothing else."""
    dtype = getattr(torch, dtype_name)
    z1, z2 = embeddings(N, D, dtype)
    return common.extra_memory(training_step(losses(dtype, (N, D))[provider], z1, z2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape, nothing written")
    parser.add_argument("--shape", nargs=2, type=int, metavar=("N", "D"), help="this shape alone")
    parser.add_argument("--worker", nargs=2, type=int, metavar=("N", "D"), help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=4, metavar=("PROVIDER", "DTYPE", "N", "D"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(bench_shape(*arguments.worker, seconds=1.0 if arguments.quick else 8.0)))
        return
    if arguments.memory:
        provider, dtype, N, D = arguments.memory
        print(json.dumps(memory(provider, dtype, int(N), int(D))))
        return

    print(f"NT-Xent forward+backward, t={TEMPERATURE}, on {common.device_name()}, {torch.get_num_threads()} threads")
    conditions, rows = common.conditions(), []
    shapes = QUICK if arguments.quick else [PEER_SHAPE, *(GPU_SHAPES if DEVICE == "cuda" else SHAPES)]
    if arguments.shape:
        shapes = [tuple(arguments.shape)]
    allocators = ("default", "warm") if DEVICE == "cpu" else ("default",)
    for N, D in shapes:
        for allocator in allocators:
            flags = ["--quick"] if arguments.quick else []
            measured = common.in_fresh_process(__spec__.name, [*flags, "--worker", str(N), str(D)], allocator)
            for row in measured:
                if row["provider"] not in (FLOOR, "ssl_fast, forward alone") and allocator == "default":
                    call = ["--memory", row["provider"], row["dtype"], str(N), str(D)]
                    row["extra_mb"] = common.in_fresh_process(__spec__.name, call)
                row |= {"allocator": allocator, **conditions}
            print(f"\nN={N} D={D}, allocator {allocator}")
            print(
                common.table(
                    measured, ("provider", "dtype", "ms", "ms_p20", "ms_p80", "ratio", "tflops", "extra_mb", "error")
                )
            )
            rows += measured
            print(verdict(measured), flush=True)
            if not arguments.quick:
                common.save(rows)  # after each table: what an interruption leaves is kept
    if not arguments.quick:
        print(f"\n{len(rows)} rows written to {common.RESULTS}")


def verdict(rows: list[common.Row]) -> str:
    """The ratios people ask for, in one line."""
    ms = {(r["provider"], r["dtype"]): r["ms"] for r in rows}
    fp32, bf16, plain = ms["ssl_fast", "float32"], ms["ssl_fast", "bfloat16"], ms["dense PyTorch", "float32"]
    return (
        f"fp32: {fp32 / ms[FLOOR, 'float32']:.2f} x {FLOOR}, {plain / fp32:.1f} x faster than dense; "
        f"bf16: {plain / bf16:.1f} x faster than dense fp32, {fp32 / bf16:.2f} x faster than our fp32"
    )


if __name__ == "__main__":
    main()
