"""How large a batch of SimCLR fits into a given memory, at what pace, and what micro-batches do to live batch norm.

Four ways to take the same step, at batches from 256 to 16,384: plain PyTorch with the dense loss, our loss, our norms
beside it, and the cached step. Each run is a process of its own under a limit on its memory (on its data segment on a
CPU, on the allocator on a GPU), so that running out is a row of the table and not the end of it. On a CPU a ResNet of 8
layers at 32 pixels within 2 GiB, on a GPU a ResNet-50 at 224 pixels in bf16 within 24 GiB.

Then batch norm in training, whose statistics are those of a micro-batch: the cosine between the gradient of the cached
step and that of the whole batch, at the beginning and in a trained network, and the kNN accuracy on digits of whole
runs that differ in their micro-batch alone.

`python -m benches.bench_large_batch` prints the tables and writes the rows of the first two to benches/results.csv,
from where `python -m benches.plot` takes the first into docs/large_batches.md. They are written batch by batch:
`--resume` leaves out those that are there of this commit. `--quick` takes small sizes; `--part` one of steps, cosines,
knn.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benches import machine, processes, results
from ssl_fast import CachedStep, SimCLR, accelerate
from ssl_fast.augment import TwoViews
from ssl_fast.backbones import ConvNet
from ssl_fast.data import load_data
from ssl_fast.demo import dense_nt_xent
from ssl_fast.memory import out_of_memory, parse_memory, peak_memory, resident_memory
from ssl_fast.train import train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROVIDERS = ("plain PyTorch", "our loss", "our loss, accelerate", "cached step")
BATCHES = (256, 512, 1024, 2048, 4096, 8192, 16384)
MICRO = 256
LIMIT, PIXELS = ("24GiB", 224) if DEVICE.type == "cuda" else ("2GiB", 32)
COLUMNS = ("batch", "provider", "images/s", "peak MB", "ms")


# ---- the steps


class Dense(nn.Module):
    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return dense_nt_xent(z1, z2, 0.5)


def encoder(pixels: int) -> tuple[nn.Module, int]:
    import torchvision

    if pixels > 64:
        network = torchvision.models.resnet50()
        network.fc = nn.Identity()
        return network, 2048
    from torchvision.models.resnet import BasicBlock

    def block(inner: int, outer: int, stride: int) -> nn.Module:
        down = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        return BasicBlock(inner, outer, stride, down if stride > 1 else None)

    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    blocks = [block(16, 16, 1), block(16, 32, 2), block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 64


def run(provider: str, batch: int, pixels: int, limit: str, micro: int, seconds: float) -> dict[str, Any]:
    """Milliseconds a step and the peak in MB, in this process, which may not have more than the limit from here on."""
    torch.manual_seed(0)
    f, features = encoder(pixels)
    network = SimCLR(f, features, loss=Dense() if provider == "plain PyTorch" else None)
    network.to(DEVICE, memory_format=torch.channels_last)
    cached = provider == "cached step"
    if cached or "accelerate" in provider:
        accelerate(network)
    step = CachedStep(micro if cached else batch)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def train_on(views: list[Tensor]) -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            network.cached(*views, step)
        optimizer.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def images(count: int) -> list[Tensor]:
        """On the host for the cached step, which fetches a micro-batch at a time."""
        host = cached and DEVICE.type == "cuda"
        made = (torch.randn(count, 3, pixels, pixels, device="cpu" if host else DEVICE) for _ in range(2))
        views = [view.contiguous(memory_format=torch.channels_last) for view in made]
        return [view.pin_memory() for view in views] if host else views

    train_on(images(8))
    times: list[float] = []

    def work() -> None:
        views = images(batch)
        while not times or (sum(times) < 1e3 * seconds and len(times) < 5):
            start = time.perf_counter()
            train_on(views)
            times.append((time.perf_counter() - start) * 1e3)

    restrict(parse_memory(limit))
    try:
        peak = peak_memory(work, DEVICE)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return {}
    return {"ms": statistics.median(times), "extra_mb": peak / 1e6}


def restrict(limit: int) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
        return
    data = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmData:"))
    room = int(data.split()[1]) * 1024 + limit - resident_memory("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (room, room))


def found_apart(*given: Any) -> dict[str, Any]:
    """What `run` gives, in a process of its own; nothing where memory runs out."""
    try:
        return processes.apart(partial(run, *given), __spec__.name, ["--worker", json.dumps(given)])
    except ChildProcessError as error:
        if error.errno is None:
            raise
        return {}  # ended by a signal: memory ran out where no exception could be thrown


def steps(batches: tuple[int, ...], limit: str, micro: int, seconds: float, quick: bool, done: set[str]) -> list[str]:
    """Rows are saved batch by batch; shapes that are `done` are left out. Returns what failed, which has no rows."""
    failed: list[str] = []
    name = "ResNet-50" if PIXELS > 64 else "ResNet-8"
    largest = dict.fromkeys(PROVIDERS, 0)
    for batch in batches:
        shape, rows = f"{name} {PIXELS}px batch={batch} in {limit}", list[results.Row]()
        if shape in done:
            print(f"{shape}: measured before", flush=True)
            continue
        for provider in PROVIDERS:
            with processes.going_on(f"large_batch, {shape}, {provider}", failed):
                found = found_apart(provider, batch, PIXELS, limit, micro, seconds)
                row = {"op": "large_batch", "shape": shape, "provider": provider}
                row |= {"dtype": "bfloat16 autocast" if DEVICE.type == "cuda" else "float32", "allocator": "default"}
                row |= {"batch": batch, **found, "images/s": "out of memory", "peak MB": "", "to": PROVIDERS[0]}
                if found:
                    row |= {"images/s": f"{batch / found['ms'] * 1e3:.1f}", "peak MB": f"{found['extra_mb']:.0f}"}
                    largest[provider] = max(largest[provider], batch)
                rows.append(row)
                if "ms" in row and "ms" in rows[0] and rows[0]["provider"] == PROVIDERS[0]:
                    row["ratio"] = row["ms"] / rows[0]["ms"]
                print(results.table([row], COLUMNS).splitlines()[-1], flush=True)
        results.save(rows, quick)
    print(f"\nThe largest of these batches within {limit}:")
    for provider, batch in largest.items():
        print(f"  {provider:22}{batch}")
    return failed


def measured() -> set[str]:
    """The shapes that results.csv has of this commit and device, for every provider."""
    here = results.conditions()
    same = ("device", "threads", "torch", "commit")
    with results.RESULTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[k] == str(here[k]) for k in same)]
    found = Counter(row["shape"] for row in rows)
    return {shape for shape, providers in found.items() if providers == len(PROVIDERS)}


# ---- live batch norm


def digits_network() -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(ConvNet(1, 16), 64)


def gradient(network: SimCLR, views: tuple[Tensor, Tensor], micro_batch: int) -> Tensor:
    network = copy.deepcopy(network)
    network.cached(*views, CachedStep(micro_batch))
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def cosines(batch: int, sizes: tuple[int, ...], trained: int) -> list[results.Row]:
    """Of the gradient against that of the whole batch, for a random network and one after some steps."""
    data, draw = load_data("digits"), TwoViews("digits", 8, seed=1)
    network, rows = digits_network(), []
    optimizer = torch.optim.SGD(network.parameters(), lr=0.06 * batch / 256, momentum=0.9)
    for after in (0, trained):
        for step in range(after):
            optimizer.zero_grad()
            network(*draw(data.train.images[:batch], torch.arange(batch), 2 + step)).backward()
            optimizer.step()
        views = draw(data.train.images[:batch], torch.arange(batch), 0)
        whole = gradient(network, views, batch)
        other = gradient(network, draw(data.train.images[:batch], torch.arange(batch), 1), batch)
        row: results.Row = {"steps before": after, "other views": F.cosine_similarity(whole, other, dim=0).item()}
        for size in sizes:
            row[f"{size}"] = F.cosine_similarity(whole, gradient(network, views, size), dim=0).item()
            rows.append(
                {
                    "op": "live_batch_norm",
                    "shape": f"ConvNet 8px batch={batch}, gradient after {after} steps",
                    "provider": f"cached step, micro_batch={size}",
                    "dtype": "float32",
                    "error": 1 - row[f"{size}"],
                }
            )
        print(results.table([row], row).splitlines()[-1] if after else results.table([row], row), flush=True)
    return rows


def knn(batch: int, sizes: tuple[int | None, ...], epochs: int, seeds: int) -> None:
    """kNN accuracy on digits at the end of runs of `train`, mean and extremes over seeds."""
    for size in sizes:
        found = []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                torch.manual_seed(seed)
                found.append(
                    train(folder, "digits", model=ConvNet(1, 16), batch_size=batch, epochs=epochs, seed=seed,
                          micro_batch=size, knn_every=epochs, probe_every=0, optimizer="sgd",
                          lr=0.06 * batch / 256)["knn"]
                )  # fmt: skip
        name = "whole batch" if size is None else f"micro_batch {size}"
        print(
            f"  {name:18}{statistics.mean(found):8.2%}   ({min(found):.2%} to {max(found):.2%}, {seeds} seeds)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--resume", action="store_true", help="leave out batches that were measured at this commit")
    parser.add_argument("--part", choices=("steps", "cosines", "knn"), help="this one alone")
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(run(*json.loads(args.worker))))
        return
    parts, failed = (args.part,) if args.part else ("steps", "cosines", "knn"), list[str]()
    print(f"{machine.device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n", flush=True)
    if "steps" in parts:
        small: tuple[Any, ...] = ((64, 512), "1200MiB", 64, 0.0)
        batches, limit, micro, seconds = small if args.quick else (BATCHES, LIMIT, MICRO, 4.0)
        print(f"A step of SimCLR within {limit}; the cached step in micro-batches of {micro}: {', '.join(COLUMNS)}")
        done = measured() if args.resume else set()
        failed = steps(batches, limit, micro, seconds, args.quick, done)
    if "cosines" in parts:
        print("\nCosine with the whole batch's gradient, by micro-batch, batch norm live; ConvNet on digits")
        rows = cosines(128, (64, 16), 5) if args.quick else cosines(1024, (512, 256, 128, 64, 32, 16, 8), 100)
        results.save(rows, args.quick)
    if "knn" in parts:
        batch, epochs, seeds = (700, 2, 1) if args.quick else (700, 50, 2)
        print(f"\nkNN accuracy on digits after {epochs} epochs of batch {batch}, batch norm live", flush=True)
        knn(batch, (None, 100) if args.quick else (None, 100, 32, 8), epochs, seeds)
    if failed:
        sys.exit(f"without rows: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
