"""A training step of ResNet-50 before and after `accelerate`: time, peak memory, and both loss curves.

`python -m benches.bench_accelerate` prints the table and writes the rows to benches/results.csv, and the curves to
out/accelerate.csv; `--quick` takes a ResNet-18 on small images and writes nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ssl_fast
from benches import common

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = ("eager", "ssl_fast.accelerate")
STEPS = 30
CURVES = Path("out/accelerate.csv")


def model(name: str, accelerated: bool) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(num_classes=100).to(DEVICE, memory_format=torch.channels_last).train()
    if accelerated:
        ssl_fast.accelerate(network)
    return network


def trainer(name: str, dtype: str, accelerated: bool, batch: int, pixels: int) -> Callable[[], float]:
    """A step of SGD on the same random images, whose loss falls as the network learns them; returns the loss."""
    network = model(name, accelerated)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, pixels, pixels, generator=generator).to(DEVICE, memory_format=torch.channels_last)
    labels = torch.randint(100, (batch,), generator=generator).to(DEVICE)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)

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


def bench(name: str, dtype: str, batch: int, pixels: int, steps: int) -> list[common.Row]:
    """The two trainers in turn, step by step: every step is timed, and gives a point of the curve."""
    trainers = {p: trainer(name, dtype, p != "eager", batch, pixels) for p in PROVIDERS}
    curves: dict[str, list[float]] = {p: [] for p in PROVIDERS}
    timed = {p: (lambda p=p: curves[p].append(trainers[p]())) for p in PROVIDERS}
    times = common.interleave(timed, seconds=0, rounds=steps - 1, slow=1e9)
    rows = []
    for provider, own in times.items():
        off = max(abs(a - b) / b for a, b in zip(curves[provider], curves["eager"], strict=True))
        rows.append(
            {
                "op": "accelerate",
                "shape": f"{name} {batch}x3x{pixels}x{pixels} channels_last, training step",
                "dtype": dtype if dtype == "float32" else "bfloat16 autocast",
                "provider": provider,
                "error": off,
                "curve": curves[provider],
                **common.timing(own),
            }
        )
    for row in rows:
        row |= {"ratio": row["ms"] / rows[0]["ms"], "to": "eager"}
    return rows


def memory(provider: str, name: str, dtype: str, batch: int, pixels: int) -> float:
    """MB that the second step adds to the peak: the first has allocated what stays."""
    step = trainer(name, dtype, provider != "eager", batch, pixels)
    step()
    return common.extra_memory(step)


def case(dtype: str) -> tuple[str, int, int, int]:
    """Network, batch, pixels and steps."""
    if DEVICE == "cuda":
        return "resnet50", 128, 224, STEPS
    # Where a CPU has no instructions for it, torch's bf16 convolutions take 20 times as long as in fp32.
    slow = dtype == "bfloat16" and common.instruction_set() != "AMX-BF16"
    return ("resnet50", 4, 64, STEPS) if slow else ("resnet50", 16, 128, STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network, nothing written")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="this one alone")
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        what, *given = json.loads(arguments.worker)
        print(json.dumps({"bench": bench, "memory": memory}[what](*given)))
        return
    print(f"A training step on {common.device_name()}, {torch.get_num_threads()} threads")
    conditions, rows = common.conditions(), []
    for dtype in (arguments.dtype,) if arguments.dtype else ("float32", "bfloat16"):
        name, batch, pixels, steps = ("resnet18", 4, 32, 3) if arguments.quick else case(dtype)
        for allocator in ("default", "warm") if DEVICE == "cpu" else ("default",):

            def child(*given: object, allocator: str = allocator) -> object:
                return common.in_fresh_process(__spec__.name, ["--worker", json.dumps(given)], allocator)

            measured = child("bench", name, dtype, batch, pixels, steps)
            for row in measured:
                row["extra_mb"] = child("memory", row["provider"], name, dtype, batch, pixels)
                row |= {"allocator": allocator, **conditions}
            print(f"\n{measured[0]['shape']}, {dtype}, allocator {allocator}; error: largest difference of the losses")
            print(
                common.table(measured, ("provider", "ms", "ms_p20", "ms_p80", "ratio", "extra_mb", "error")), flush=True
            )
            rows += measured
            if not arguments.quick:
                common.save(rows)
                write_curves(rows)


def write_curves(rows: list[common.Row]) -> None:
    CURVES.parent.mkdir(parents=True, exist_ok=True)
    with CURVES.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["dtype", "allocator", "provider", "step", "loss"])
        for row in rows:
            for step, loss in enumerate(row["curve"]):
                writer.writerow([row["dtype"], row["allocator"], row["provider"], step, loss])


if __name__ == "__main__":
    main()
