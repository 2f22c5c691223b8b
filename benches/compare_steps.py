"""Whole steps of SimCLR, whose views come from torchvision's transforms in a DataLoader, or from `ssl_fast.data.Loader`
and `TwoViews` as in `train`; all else is the same: images a second, and the share of the time in which a step waits for
its views.

`python -m benches.compare_steps` prints the tables and writes the rows to benches/results.csv. `--quick` takes few
images and leaves the tracked results as they are. A DataLoader's first steps, which its workers have got ahead with,
are not timed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor

from benches import machine, results, timing
from benches.bench_two_views import Loaded, torchvision_steps
from benches.machine import DEVICE
from ssl_fast.augment import POLICIES, TwoViews
from ssl_fast.backbones import build_encoder
from ssl_fast.data import Loader, Split, epoch_batches
from ssl_fast.methods import SimCLR
from ssl_fast.progress import Stopwatch

OURS = "ssl_fast"
# Name: encoder, policy, pixels of an image and of a view, images of a step on a CPU and on a GPU.
STEPS = {
    "ConvNet, 32 -> 32": ("convnet", "simclr_small", 32, 32, 256, 1024),
    "ResNet-18, 256 -> 224": ("resnet18", "simclr", 256, 224, 16, 256),
}
WORKERS = {"torchvision, in the step": 0, "torchvision, DataLoader of 2": 2}
AHEAD = 6  # steps that two workers and a queue of two batches each may have got ahead with, and two more


def batches_of(provider: str, images: Tensor, policy: str, size: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views, shuffled, without an end."""
    if provider == OURS:
        draw, loader = TwoViews(policy, size), Loader(Split(images), torch.device(DEVICE))
        for epoch in itertools.count():
            for own, indices in loader(epoch_batches(len(images), batch, 0, epoch)):
                view1, view2 = draw(own, indices, epoch)
                yield view1, view2
    data = Loaded(images, torchvision_steps(POLICIES[policy], size))
    shuffled = torch.utils.data.RandomSampler(data, replacement=True, num_samples=2**30)  # an epoch's end would stall
    loaded = torch.utils.data.DataLoader(
        data, batch, sampler=shuffled, num_workers=WORKERS[provider], pin_memory=DEVICE == "cuda"
    )
    for view1, view2 in loaded:
        yield view1.to(DEVICE, non_blocking=True), view2.to(DEVICE, non_blocking=True)


def run_steps(case: str, provider: str, batch: int, ahead: int, timed: int) -> dict[str, float]:
    """`images_per_s` and `data_wait` of so many steps, after the first `ahead`."""
    name, policy, pixels, size, *_ = STEPS[case]
    torch.manual_seed(0)
    encoder, features = build_encoder(name, size, 3, "auto")
    network = SimCLR(encoder, features).to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images = torch.randint(256, (4 * batch, 3, pixels, pixels), dtype=torch.uint8)
    watch = Stopwatch()
    steps = itertools.islice(batches_of(provider, images, policy, size, batch), ahead + timed)
    for step, views in enumerate(watch.waiting(steps), 1):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = network(*(view.contiguous(memory_format=torch.channels_last) for view in views))
        loss.backward()
        optimizer.step()
        watch.count(batch)
        if step in (ahead, ahead + timed):
            loss.item()  # a GPU has done what it was given
        if step == ahead:
            watch.restart()
    return watch.lap()


def steps_rows(case: str, quick: bool) -> list[results.Row]:
    """Runs in turn, each with workers of its own, which would take their time from another's."""
    *_, on_cpu, on_gpu = STEPS[case]
    batch = 8 if quick else on_gpu if DEVICE == "cuda" else on_cpu
    ahead, timed, rounds = (1, 2, 1) if quick else (AHEAD, 12, 3)
    laps: dict[str, list[dict[str, float]]] = {provider: [] for provider in (OURS, *WORKERS)}
    for _ in range(rounds):
        for provider, own in laps.items():
            own.append(run_steps(case, provider, batch, ahead, timed))
    rows = []
    for provider, own in laps.items():
        times = timing.summary([1e3 * batch / lap["images_per_s"] for lap in own])
        row = {"op": "two_views step", "shape": f"{case}, {batch} images", "provider": provider, "allocator": "default"}
        row |= {"dtype": "bfloat16 autocast" if DEVICE == "cuda" else "float32", "to": OURS, **times}
        row |= {"images/s": 1e3 * batch / times["ms"], "data_wait": median(lap["data_wait"] for lap in own)}
        row["ratio"] = row["ms"] / (rows[0]["ms"] if rows else row["ms"])
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, and the tracked results stay")
    quick = parser.parse_args().quick
    print(f"steps of SimCLR on {machine.device_name()}, {torch.get_num_threads()} threads")
    for case in STEPS:
        rows = steps_rows(case, quick)
        print(f"\n{rows[0]['shape']}")
        columns = ("provider", "ms", "ms_p20", "ms_p80", "ratio", "images/s", "data_wait")
        print(results.table(rows, columns), flush=True)
        results.save(rows, quick)


if __name__ == "__main__":
    main()
