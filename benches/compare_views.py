"""SimCLR with the package's views and with torchvision's transforms: kNN after training, over several seeds.

    python -m benches.compare_views                        Fashion-MNIST; writes docs/views.md
    python -m benches.compare_views data=digits epochs=30

Both draw by the same policy: `ssl_fast.augment.TwoViews`, or `torchvision.transforms.v2` image by image on bytes. All
else is the same: `ssl_fast.train.train`, the initial weights of a seed, the order of the images. Every run that ends is
a line of OUT/results.jsonl; those that are there are left out by the next call, and a run that was broken off starts
again.

Keys: data=fashion_mnist, root=none (where Debian puts its idx files), out=out/views, images=10000 (the first of the
training set), epochs=8, seeds=3, augment=simclr. `--quick` takes 600 images, an epoch and two seeds. docs/views.md is
written with the data, images, epochs, seeds and augmentation above alone.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benches import machine, results
from benches.bench_two_views import torchvision_steps
from benches.compare_findings import cell
from benches.compare_methods import BATCH, WIDTH, encoder, subset
from ssl_fast.augment import Policy
from ssl_fast.data import load_data
from ssl_fast.ops.two_views import PackedImages
from ssl_fast.run import read_rows, write_atomically

PAGE = results.ROOT / "docs" / "views.md"
OURS, THEIRS = "ssl_fast", "torchvision"
training = importlib.import_module("ssl_fast.train")

Row = dict[str, Any]


class TorchvisionViews:
    """In the place of TwoViews: what is drawn comes from torch's global generator, which the seed of the run sets."""

    def __init__(self, policy: Policy, size: int, seed: int) -> None:
        self.policies, self.size, self.seed = (policy, policy.second or policy), size, seed

    def __call__(self, images: Tensor | PackedImages, index: Tensor, epoch: int) -> tuple[Tensor, ...]:
        channels = images[0].shape[0]
        chains = [torchvision_steps(policy, self.size, channels) for policy in self.policies]
        views = (torch.stack([chain(images[i]) for i in range(len(images))]) for chain in chains)
        return tuple(view.contiguous(memory_format=torch.channels_last) for view in views)


def trained(views: str, seed: int, source: str, out: Path, epochs: int, augment: str) -> Row:
    """kNN before and after training with these views."""
    data, start = load_data(source), time.monotonic()
    folder = out / f"{views}_seed_{seed}"
    with mock.patch.object(training, "TwoViews", TorchvisionViews if views == THEIRS else training.TwoViews):
        training.train(folder, source, model=encoder(data.channels, seed), epochs=epochs, seed=seed, augment=augment,
                       batch_size=min(BATCH, len(data.train) // 2), optimizer="sgd", lr=0.06, knn_every=epochs,
                       probe_every=0, overwrite=True)  # fmt: skip
    seconds = time.monotonic() - start
    before, *_, after = (row["knn"] for row in read_rows(folder / "metrics.jsonl") if "knn" in row)
    return {"views": views, "seed": seed, "random": before, "kNN": after, "seconds": seconds}


def page(rows: list[Row], title: str) -> str:
    """docs/views.md."""
    found = {views: [row for row in rows if row["views"] == views] for views in (THEIRS, OURS)}
    values = {views: [row["kNN"] for row in own] for views, own in found.items()}
    seeds = [f"seed {row['seed']}" for row in found[OURS]]
    lines = [
        {"views": views, **{seed: cell([value]) for seed, value in zip(seeds, own, strict=True)}, "mean": cell(own)}
        for views, own in values.items()
    ]
    difference = statistics.mean(values[OURS]) - statistics.mean(values[THEIRS])
    spread = max(max(own) - min(own) for own in values.values())
    says = "no larger than what" if abs(difference) <= spread else "LARGER than what"
    minutes, cores = sum(row["seconds"] for row in rows) / 60, torch.get_num_threads()
    return f"""# What is learned from the package's views, and from torchvision's

    python -m benches.compare_views      {minutes:.0f} minutes on {cores} cores

This page is written by that command. SimCLR with views by `ssl_fast.augment.TwoViews`, or by
`torchvision.transforms.v2` image by image on bytes, drawn by the same policy; the weights at the start and the order of
the images are those of the seed. Weighted kNN of the test images in per cent; of all seeds mean and standard deviation.
These images have one channel, of which saturation, hue and greyness change nothing: that colours are torchvision's is
shown by the tests, pixel by pixel, not here.

{title}

{results.table(lines, ("views", *seeds, "mean"))}

The random encoders have {cell([row["random"] for row in found[OURS]])}. The means differ by {100 * difference:+.2f};
the seeds of a row by up to {100 * spread:.2f}: the difference is {says} seeds alone make.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument("--quick", action="store_true", help="600 images, one epoch, two seeds")
    args = parser.parse_args()
    whole = {"data": "fashion_mnist", "images": "10000", "epochs": "8", "seeds": "3", "augment": "simclr"}
    given = whole | {"root": None, "out": "out/views"}
    for word in args.keys:
        key, equals, value = word.partition("=")
        if key not in given or not equals:
            parser.error(f"got {word!r}, allowed: {', '.join(f'{k}=...' for k in given)}")
        given[key] = value
    if given["data"] not in ("digits", "fashion_mnist"):
        parser.error(f"data: got {given['data']!r}, allowed: digits, fashion_mnist")
    given |= {"images": "600", "epochs": "1", "seeds": "2"} if args.quick else {}
    epochs, seeds, augment = int(given["epochs"] or 0), int(given["seeds"] or 0), str(given["augment"])

    data = load_data(str(given["data"]), given["root"])
    digits = data.name == "digits"
    images = len(data.train) if digits else min(len(data.train), int(given["images"] or 0))
    out = Path(given["out"] or "") / f"{data.name}_{images}_images_{epochs}_epochs_{augment}"
    out.mkdir(parents=True, exist_ok=True)
    source = "digits" if digits else str(subset(data, images, out / "data", 400 if args.quick else None))
    tests = len(load_data(source).test or ())
    title = (
        f"{data.name}, {images} training images, {tests} test images; augment={augment}, {epochs} epochs, ConvNet of "
        f"width {WIDTH}; {machine.device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{datetime.date.today().isoformat()}"
    )
    print(title, flush=True)
    path = out / "results.jsonl"
    rows = read_rows(path) if path.exists() else []
    for seed in range(seeds):
        for views in (THEIRS, OURS):
            if any((row["views"], row["seed"]) == (views, seed) for row in rows):
                continue
            rows.append(trained(views, seed, source, out, epochs, augment))
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
            print(rows[-1], flush=True)
    text = page([row for row in rows if row["seed"] < seeds], title)
    (out / "views.md").write_text(text)
    if all(given[key] == value for key, value in whole.items()):
        PAGE.write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
