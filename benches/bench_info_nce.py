"""InfoNCE with a queue, CLIP and SupCon, forward and backward, against plain PyTorch, their peers and one product.

`python -m benches.bench_info_nce` prints the tables and writes the rows to benches/results.csv; `--quick` takes small
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
from benches.bench_nt_xent import DEVICE, FLOOR, dense_bf16_runs
from ssl_fast.functional import clip, info_nce, sup_con

TEMPERATURE = 0.07
# N rows, K columns, D. The floor is the product of all rows and columns.
SHAPES = {"info_nce": (256, 65536, 128), "clip": (4096, 4096, 512), "sup_con": (4096, 4096, 128)}
GPU_SHAPES = {"info_nce": (256, 65536, 128), "clip": (32768, 32768, 512), "sup_con": (16384, 16384, 128)}
QUICK = {"info_nce": (32, 512, 64), "clip": (128, 128, 64), "sup_con": (128, 128, 64)}

Loss = Callable[..., Tensor]


# ---- InfoNCE with a queue: q and k (N, D), the queue (K, D)


def moco(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """As MoCo writes it, its queue transposed and cloned at each step."""
    q, k = F.normalize(q), F.normalize(k)
    positive, negative = torch.einsum("nc,nc->n", q, k)[:, None], q @ queue.clone().detach()
    logits = torch.cat([positive, negative], 1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def queue_losses(queue: Tensor) -> dict[str, Loss]:
    transposed = queue.T.contiguous()
    found: dict[str, Loss] = {
        "ssl_fast": lambda q, k: info_nce(q, k, queue, TEMPERATURE),
        "mm + cat + cross_entropy": lambda q, k: moco(q, k, transposed),
    }
    try:
        from info_nce import info_nce as peer

        found["info-nce-pytorch"] = lambda q, k: peer(q, k, queue, TEMPERATURE)
    except ImportError as error:
        print(f"info-nce-pytorch is left out: {error}")
    try:
        from lightly.loss import NTXentLoss

        criterion = NTXentLoss(TEMPERATURE, memory_bank_size=tuple(queue.shape)).to(queue.device)
        criterion.memory_bank.bank = queue.float()
        found["lightly"] = criterion
    except ImportError as error:
        print(f"lightly is left out: {error}")
    return found


# ---- CLIP: images and texts (N, D), unit rows


def dense_clip(image: Tensor, text: Tensor) -> Tensor:
    """S once, its transpose for the other direction."""
    logits, labels = image @ text.T / TEMPERATURE, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def clip_losses() -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "ssl_fast": lambda image, text: clip(image, text, 1 / TEMPERATURE),
        "dense PyTorch": dense_clip,
    }
    try:
        from open_clip.loss import ClipLoss

        criterion = ClipLoss()
        found["open_clip"] = lambda image, text: criterion(image, text, torch.tensor(1 / TEMPERATURE))
    except ImportError as error:
        print(f"open_clip is left out: {error}")
    return found


# ---- SupCon: embeddings (N, D)


def labels_of(z: Tensor) -> Tensor:
    """40 rows a class."""
    return torch.arange(len(z), device=z.device) % (len(z) // 40)


def dense_sup_con(z: Tensor, _: Tensor) -> Tensor:
    z, labels = F.normalize(z), labels_of(z)
    eye = torch.eye(len(z), dtype=torch.bool, device=z.device)
    alike = (labels[:, None] == labels) & ~eye
    log_p = (z @ z.T / TEMPERATURE).masked_fill(eye, -torch.inf).log_softmax(1)
    return -(log_p.masked_fill(~alike, 0).sum(1) / alike.sum(1)).mean()


def sup_con_losses() -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "ssl_fast": lambda z, _: sup_con(z, labels_of(z), TEMPERATURE),
        "dense PyTorch": dense_sup_con,
    }
    try:
        from pytorch_metric_learning.losses import SupConLoss

        criterion = SupConLoss(TEMPERATURE)
        found["pytorch-metric-learning"] = lambda z, _: criterion(z, labels_of(z))
    except ImportError as error:
        print(f"pytorch-metric-learning is left out: {error}")
    return found


# ---- the tables


def inputs(op: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Two tensors (N, D), the first with a gradient, and for a queue (K, D)."""
    N, K, D = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(N, D, generator=generator)
    b = a + torch.randn(N, D, generator=generator)
    if op == "clip":
        a, b = F.normalize(a), F.normalize(b)
    queue = F.normalize(torch.randn(K if op == "info_nce" else 1, D, generator=generator))
    a, b, queue = (x.to(DEVICE, dtype) for x in (a, b, queue))
    return a.requires_grad_(), b.requires_grad_(op == "clip"), queue


def losses(op: str, dtype: torch.dtype, queue: Tensor) -> dict[str, Loss]:
    found = {"info_nce": lambda: queue_losses(queue), "clip": clip_losses, "sup_con": sup_con_losses}[op]()
    if dtype == torch.bfloat16:  # as a training step has it: ours on bf16 inputs, the plain one too where that is sane
        keep = ["ssl_fast", next(name for name in found if name != "ssl_fast")]
        found = {name: loss for name, loss in found.items() if name in keep[: 2 if dense_bf16_runs() else 1]}
    return found


def training_step(loss: Loss, a: Tensor, b: Tensor) -> Callable[[], None]:
    def step() -> None:
        a.grad = b.grad = None
        loss(a, b).backward()

    return step


def gradient(loss: Loss, a: Tensor, b: Tensor) -> Tensor:
    a = a.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(a, b.detach()), a)[0]


def bench(op: str, shape: tuple[int, int, int], seconds: float) -> list[common.Row]:
    """One interleaved run of every provider in fp32 and bf16 beside one fp32 product into a kept output."""
    N, K, D = shape
    plain = {"info_nce": "mm + cat + cross_entropy"}.get(op, "dense PyTorch")
    x, y, kept = torch.randn(N, D, device=DEVICE), torch.randn(K, D, device=DEVICE), torch.empty(N, K, device=DEVICE)
    steps: dict[str, Callable[[], Any]] = {FLOOR: lambda: torch.mm(x, y.T, out=kept)}
    labels, errors = {FLOOR: ("float32", FLOOR)}, {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        a, b, queue = inputs(op, shape, dtype)
        truth = gradient(losses(op, torch.float32, queue.double())[plain], a.double(), b.double())
        for provider, loss in losses(op, dtype, queue).items():
            key = f"{provider} {name}"
            errors[key] = ((gradient(loss, a, b).double() - truth).norm() / truth.norm()).item()
            steps[key], labels[key] = training_step(loss, a, b), (name, provider)
        del truth
    units = {"info_nce": 2.0, "clip": 4.0, "sup_con": 2.0}[op]  # what ours executes, in products
    rows = []
    for key, times in common.interleave(steps, seconds=seconds).items():
        row = {
            "op": op,
            "shape": f"N={N} D={D}" if op != "info_nce" else f"N={N} K={K} D={D}",
            "dtype": labels[key][0],
            "provider": labels[key][1],
            **common.timing(times),
            "error": errors.get(key, ""),
        }
        row["tflops"] = (1.0 if key == FLOOR else units) * 2 * N * K * D / row["ms"] / 1e9
        rows.append(row)
    for row in rows:
        row |= {"ratio": row["ms"] / rows[0]["ms"], "to": FLOOR}
    return rows


def memory(op: str, provider: str, dtype_name: str, shape: tuple[int, int, int]) -> float:
    """MB that the first forward and backward adds to the peak, in a process that has done nothing else."""
    dtype = getattr(torch, dtype_name)
    a, b, queue = inputs(op, shape, dtype)
    return common.extra_memory(training_step(losses(op, dtype, queue)[provider], a, b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="*", choices=[*SHAPES, []], help="these alone")
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing written")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shapes = QUICK if arguments.quick else GPU_SHAPES if DEVICE == "cuda" else SHAPES
    if arguments.worker:
        print(json.dumps(bench(arguments.worker, shapes[arguments.worker], 1.0 if arguments.quick else 8.0)))
        return
    if arguments.memory:
        op, provider, dtype = arguments.memory
        print(json.dumps(memory(op, provider, dtype, shapes[op])))
        return

    print(f"Contrastive losses, t={TEMPERATURE}, on {common.device_name()}, {torch.get_num_threads()} threads")
    conditions, rows, quick = common.conditions(), [], ["--quick"] if arguments.quick else []
    for op in arguments.op or shapes:
        for allocator in ("default", "warm") if DEVICE == "cpu" else ("default",):
            measured = common.in_fresh_process(__spec__.name, [*quick, "--worker", op], allocator)
            for row in measured:
                if row["provider"] != FLOOR and allocator == "default":
                    call = [*quick, "--memory", op, row["provider"], row["dtype"]]
                    row["extra_mb"] = common.in_fresh_process(__spec__.name, call)
                row |= {"allocator": allocator, **conditions}
            print(f"\n{op}, {measured[0]['shape']}, allocator {allocator}")
            columns = ("provider", "dtype", "ms", "ms_p20", "ms_p80", "ratio", "tflops", "extra_mb", "error")
            print(common.table(measured, columns))
            ours = next(r["ms"] for r in measured if r["provider"] == "ssl_fast" and r["dtype"] == "float32")
            others = [r for r in measured if r["dtype"] == "float32" and r["provider"] not in ("ssl_fast", FLOOR)]
            print(
                "fp32: " + ", ".join(f"{r['ms'] / ours:.2f} x faster than {r['provider']}" for r in others), flush=True
            )
            rows += measured
            if not arguments.quick:
                common.save(rows)  # after each table: what an interruption leaves is kept
    if not arguments.quick:
        print(f"\n{len(rows)} rows written to {common.RESULTS}")


if __name__ == "__main__":
    main()
