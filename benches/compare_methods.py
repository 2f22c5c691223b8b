"""SimCLR, MoCo v1 and MoCo v2 on the same images, encoder and epochs: kNN and linear probe of each, in one table.

    python -m benches.compare_methods                                     digits
    python -m benches.compare_methods data=fashion_mnist root=FOLDER      its idx files; default where Debian puts them

What changes from row to row: in MoCo what v2 adds to v1 (MoCo v2's table 1: MLP, aug+, cos), in SimCLR the batch size
(SimCLR's figure 9). Each run is one of `ssl_fast.train.train`, evaluated by `ssl_fast.evaluate.evaluate`. A row is
written to OUT/results.csv and OUT/results.md when it is done; those that are there are left out by the next call, and a
run that was broken off goes on. Data, images, epochs and seed each have an OUT of their own.

Keys: data=digits, root=none, out=out/compare, epochs=8 (digits: 60), images=10000 (of the training set), seed=0.
`--quick` takes 600 images for an epoch.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benches import machine, results
from ssl_fast.backbones import ConvNet
from ssl_fast.data import FASHION_FILES, ImageData, load_data
from ssl_fast.evaluate import evaluate, knn_on
from ssl_fast.methods import METHODS
from ssl_fast.run import seed_everything
from ssl_fast.train import train

WIDTH = 24  # of the ConvNet: 16.6 MFLOP an image of 28 pixels
BATCH = 256
COLUMNS = ("method", "MLP", "aug+", "cos", "T", "batch", "epochs", "images", "kNN", "linear", "seconds")

Settings = dict[str, Any]


def runs(data: ImageData) -> dict[str, Settings]:
    """By name: the arguments of `train` in which the runs differ."""
    few = len(data.train) < 10_000
    # The queue holds a few passes' worth at most: older keys than that come from another encoder. CIFAR-10's notebook
    # of facebookresearch/moco has K = 4096 and m = 0.99 for 50,000 images.
    moco: Settings = {"K": 1024 if few else 4096, "m": 0.99, "bn_splits": 8, "batch_size": BATCH}
    recipe = METHODS["moco_v2"]
    aug = {"augment": recipe.augment_digits if data.name == "digits" else recipe.augment_small}
    mlp, cos = {"mlp": True, "T": 0.2}, {"schedule": "cosine"}
    table: dict[str, Settings] = {"simclr": {"method": "simclr", "batch_size": BATCH}}
    table["moco_v1"] = {"method": "moco_v1", **moco}
    table["moco_v2"] = {"method": "moco_v2", **moco}
    table["moco_v1_mlp"] = {"method": "moco_v1", **moco, **mlp}
    table["moco_v1_aug"] = {"method": "moco_v1", **moco, **aug}
    table["moco_v1_mlp_aug"] = {"method": "moco_v1", **moco, **mlp, **aug}
    table["moco_v1_cos"] = {"method": "moco_v1", **moco, **cos}
    for batch in (64, 128, 512):
        table[f"simclr_{batch}"] = {"method": "simclr", "batch_size": batch}
    # LARS, SimCLR's optimizer at 4096 images, hardly moves in the few steps of a small run: SGD for every method.
    return {
        name: {"optimizer": "sgd", "lr": 0.06 * given["batch_size"] / 256, **given} for name, given in table.items()
    }


def described(given: Settings, epochs: int, images: int) -> results.Row:
    moco, v2 = given["method"] != "simclr", given["method"] == "moco_v2"
    yes = {True: "x", False: ""}
    return {
        "method": given["method"],
        "MLP": yes[not moco or v2 or "mlp" in given],
        "aug+": yes[v2 or "augment" in given],
        "cos": yes[not moco or v2 or "schedule" in given],
        "T": given.get("T", 0.2 if v2 else 0.07 if moco else 0.5),
        "batch": given["batch_size"],
        "epochs": epochs,
        "images": images,
    }


def encoder(channels: int, seed: int) -> ConvNet:
    seed_everything(seed)
    return ConvNet(channels, WIDTH)


def mflop(data: ImageData) -> float:
    """Of one image's forward pass; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ConvNet(data.channels, WIDTH)(torch.randn(1, data.channels, data.size, data.size))
    return counter.get_total_flops() / 1e6


def subset(data: ImageData, images: int, folder: Path, test: int | None = None) -> Path:
    """The first images of Fashion-MNIST, and those for testing, as idx files: a data set that `train` takes."""
    folder.mkdir(exist_ok=True)
    assert data.test is not None
    parts = [t for split in (data.train, data.test) for t in (split.images, split.labels)]
    for name, part, count in zip(FASHION_FILES, parts, (images, images, test, test), strict=True):
        values = np.asarray(part)[:count].astype(np.uint8).reshape(-1, *([28, 28] if "images" in name else []))
        header = np.array(values.shape, ">i4").tobytes()
        (folder / name).write_bytes(bytes([0, 0, 8, values.ndim]) + header + values.tobytes())
    return folder


def read(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def write(rows: dict[str, Any], out: Path, title: str) -> None:
    """results.csv, and results.md in the order of the runs."""
    partial = out / "results.csv.partial"
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("run", *COLUMNS), extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"run": name, **row} for name, row in rows.items())
    partial.replace(out / "results.csv")
    (out / "results.md").write_text(f"{title}\n\n{results.table(list(rows.values()), COLUMNS)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument("--quick", action="store_true", help="600 images, one epoch")
    args = parser.parse_args()
    given = {"data": "digits", "root": None, "out": None, "epochs": None, "images": "10000", "seed": "0"}
    for word in args.keys:
        key, equals, value = word.partition("=")
        if key not in given or not equals:
            parser.error(f"got {word!r}, allowed: {', '.join(f'{k}=...' for k in given)}")
        given[key] = value
    if given["data"] not in ("digits", "fashion_mnist"):
        parser.error(f"data: got {given['data']!r}, allowed: digits, fashion_mnist")

    data = load_data(str(given["data"]), given["root"])
    digits, seed = data.name == "digits", int(given["seed"] or 0)
    epochs = 1 if args.quick else int(given["epochs"] or (60 if digits else 8))
    images = len(data.train) if digits else min(len(data.train), 600 if args.quick else int(given["images"] or 0))
    out = Path(given["out"] or "out/compare") / f"{data.name}_{images}_images_{epochs}_epochs_seed_{seed}"
    out.mkdir(parents=True, exist_ok=True)
    source = "digits" if digits else str(subset(data, images, out / f"{images}_images"))
    data = load_data(source)
    title = (
        f"{data.name}, {images} images, {epochs} epochs, ConvNet of width {WIDTH}, {mflop(data):.1f} MFLOP an image; "
        f"seed {seed}; {machine.device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(title, flush=True)

    done = read(out / "results.csv")
    rows: dict[str, Any] = {}
    for name, settings in {"random": {}, **runs(data)}.items():
        start = time.monotonic()
        if name in done:
            row: Any = done[name]
        elif name == "random":
            row = {"method": "random encoder", "images": images}
            row |= {"kNN": knn_on(encoder(data.channels, seed), data, torch.device("cpu"))["knn"]}
        else:
            folder = out / name
            train(folder, source, model=encoder(data.channels, seed), epochs=epochs, seed=seed, knn_every=0,
                  probe_every=0, resume=(folder / "args.yaml").exists(), **settings)  # fmt: skip
            scores = evaluate(folder, model=encoder(data.channels, seed))
            row = described(settings, epochs, images) | {"kNN": scores["knn"], "linear": scores["linear"]}
        if name not in done:
            row["seconds"] = round(time.monotonic() - start)
        rows[name] = row
        write({**rows, **{key: done[key] for key in done if key not in rows}}, out, title)
        print(results.table([row], COLUMNS).splitlines()[-1], flush=True)
    print("\n" + (out / "results.md").read_text())


if __name__ == "__main__":
    main()
