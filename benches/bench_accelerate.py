"""A training step of ResNet-50, ViT-S/16 and ConvNeXt-T before and after `accelerate`: time, peak memory, and both loss
curves beside fp64's.

Batch norm magnifies rounding: after a step or two fp32 curves differ in their second digit, whoever computes them. So
each is held against the same run in fp64: the error is the mean relative distance of its losses from those.

The floor is the network's flop, forward and backward, at the pace of a square product of the same run.

`python -m benches.bench_accelerate` prints the table and writes the rows to benches/results.csv, and the curves to
accelerate_MODEL.csv in out, or in `--out FOLDER`; `--quick` takes few small images of the first model. `--only
resnet50` takes one model, `--only float32` one dtype, and `--resume` goes on after an interruption.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ssl_fast
from benches import common, machine, processes, results, timing
from benches.memory import extra_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = ("eager", "ssl_fast.accelerate")
STEPS = 30
MODELS = {"resnet50": "resnet50", "vit_s_16": "vit_small_patch16_224", "convnext_t": "convnext_tiny"}  # timm's names


def untrained(name: str, pixels: int) -> nn.Module:
    import timm

    size = {"img_size": pixels} if name.startswith("vit") else {}
    return timm.create_model(MODELS[name], num_classes=100, **size)


def model(name: str, pixels: int, accelerated: bool) -> nn.Module:
    torch.manual_seed(0)
    network = untrained(name, pixels).to(DEVICE, memory_format=torch.channels_last).train()
    return ssl_fast.accelerate(network).model if accelerated else network


def trainer(name: str, dtype: str, accelerated: bool, batch: int, pixels: int) -> Callable[[], float]:
    """A step of SGD on the same random images, whose loss falls as the network learns them; returns the loss."""
    network = model(name, pixels, accelerated)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, pixels, pixels, generator=generator).to(DEVICE, memory_format=torch.channels_last)
    labels = torch.randint(100, (batch,), generator=generator).to(DEVICE)
    if dtype == "float64":
        network, images = network.double(), images.double()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.002, momentum=0.9)

    def loss_of(images: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            return F.cross_entropy(network(images), labels)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(images)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def truth(name: str, batch: int, pixels: int, steps: int) -> list[float]:
    """The losses in fp64."""
    step = trainer(name, "float64", False, batch, pixels)
    return [step() for _ in range(steps)]


def bench(name: str, dtype: str, batch: int, pixels: int, steps: int, exact: list[float]) -> list[results.Row]:
    """The two trainers in turn, step by step: every step is timed, and gives a point of the curve."""
    trainers = {p: trainer(name, dtype, p != "eager", batch, pixels) for p in PROVIDERS}
    curves: dict[str, list[float]] = {p: [] for p in PROVIDERS}
    timed = {p: (lambda p=p: curves[p].append(trainers[p]())) for p in PROVIDERS}
    product = common.square_product(dtype)
    times = timing.interleave({**timed, product.name: product.build()}, seconds=0, rounds=steps - 1, slow=1e9)
    flop = common.flop_of(partial(untrained, name, pixels), batch, 3, pixels, pixels, backward=True)
    at_full_pace = timing.summary(times[product.name])["ms"] * flop / common.SQUARE
    rows: list[results.Row] = []
    table = table_of(name, dtype, batch, pixels)
    for provider in PROVIDERS:
        row = {"op": table.op, "shape": table.shape, "dtype": table.providers[0].dtype, "provider": provider}
        row |= {"curve": curves[provider], **timing.summary(times[provider])}
        row["error"] = statistics.mean(abs(a - b) / b for a, b in zip(curves[provider], exact, strict=True))
        row |= {"ratio": row["ms"] / (rows or [row])[0]["ms"], "to": PROVIDERS[0]}
        row |= {"x_floor": row["ms"] / at_full_pace, "tflops": flop / row["ms"] / 1e9}
        rows.append(row)
    return rows


def memory(provider: str, name: str, dtype: str, batch: int, pixels: int) -> float:
    """MB that the second step adds to the peak: the first has allocated what stays."""
    step = trainer(name, dtype, provider != "eager", batch, pixels)
    step()
    return extra_memory(step)


def table_of(name: str, dtype: str, batch: int, pixels: int) -> common.Table:
    """Whose rows a case gives; they are not built by it."""
    shape = f"{name} {batch}x3x{pixels}x{pixels} channels_last, training step"
    label = dtype if dtype == "float32" else "bfloat16 autocast"
    return common.Table("accelerate", shape, [common.Provider(p, int, label) for p in PROVIDERS])


def child(allocator: str, what: str, *given: Any) -> Any:
    import timm  # noqa: F401, once, for every fork

    worker = ["--worker", json.dumps([what, *given])]
    return processes.apart(lambda: WORKS[what](*given), __spec__.name, worker, allocator)


WORKS: dict[str, Callable[..., Any]] = {"bench": bench, "memory": memory, "truth": truth}


def cases(quick: bool) -> list[tuple[str, str, int, int]]:
    """The model, the dtype, batch and pixels."""
    if quick:
        return [("resnet50", "float32", 2, 32)]

    def size(name: str, dtype: str) -> tuple[int, int]:
        if DEVICE == "cuda":
            return 128, 224
        # Where a CPU has no instructions for it, torch's bf16 convolutions and products take 20 times fp32's time.
        if dtype == "bfloat16" and machine.instruction_set() != "AMX-BF16":
            return 4, 64
        return (16, 128) if name == "resnet50" else (8, 224)

    return [(name, dtype, *size(name, dtype)) for name in MODELS for dtype in ("float32", "bfloat16")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases that hold this text, such as resnet50")
    parser.add_argument("--resume", action="store_true", help="only cases without rows of this commit")
    parser.add_argument("--out", default="out", metavar="FOLDER", type=Path, help="where the curves go")
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        what, *given = json.loads(arguments.worker)
        print(json.dumps(WORKS[what](*given)))
        return
    print(f"A training step on {machine.device_name()}, {torch.get_num_threads()} threads")
    steps, failed = 3 if arguments.quick else STEPS, list[str]()
    for name, dtype, batch, pixels in cases(arguments.quick):
        table, exact = table_of(name, dtype, batch, pixels), None
        if arguments.only not in json.dumps([name, dtype, batch, pixels]):
            continue
        for allocator in ("default", "warm") if DEVICE == "cpu" and not arguments.quick else ("default",):
            if arguments.resume and common.saved(table, allocator, arguments.quick):
                continue
            with processes.going_on(f"{table.shape}, {dtype}, allocator {allocator}", failed):
                exact = exact or child("default", "truth", name, batch, pixels, steps)
                measured = child(allocator, "bench", name, dtype, batch, pixels, steps, exact)
                for row in measured:
                    row["extra_mb"] = child(allocator, "memory", row["provider"], name, dtype, batch, pixels)
                    row["allocator"] = allocator
                print(f"\n{table.shape}, {dtype}, allocator {allocator}; error: of the losses, against fp64")
                columns = ("provider", "ms", "ms_p20", "ms_p80", "ratio", "x_floor", "extra_mb", "error")
                print(results.table(measured, columns), flush=True)
                results.save(measured, arguments.quick)
                if not arguments.quick:
                    write_curves(arguments.out, name, measured)
    if failed:
        sys.exit(f"without rows: {'; '.join(failed)}")


def write_curves(folder: Path, name: str, rows: list[results.Row]) -> None:
    """In the place of those of the same dtype and allocator."""
    path = folder / f"accelerate_{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    head, fresh = ["dtype", "allocator", "provider", "step", "loss"], {(r["dtype"], r["allocator"]) for r in rows}
    with path.open(newline="") if path.exists() else io.StringIO() as file:
        kept = [line for line in csv.reader(file) if line != head and tuple(line[:2]) not in fresh]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([head, *kept])
        for row in rows:
            for step, loss in enumerate(row["curve"]):
                writer.writerow([row["dtype"], row["allocator"], row["provider"], step, loss])


if __name__ == "__main__":
    main()
