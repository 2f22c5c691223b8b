"""Batch, layer and instance norm, and none, in the same small network: loss, kNN, time and memory side by side.

    python -m benches.compare_norms                 writes the table of docs/norms.md
    python -m benches.compare_norms seeds=1 epochs=15

SimCLR on scikit-learn's digits with a linear head, so that no other norm is in the network: `ssl_fast.train.train` with
the same arguments for each. The norms are ours, but for layer norm of a whole image. All runs of a seed start from the
same weights and see the images in the same order. Every run that ends is a line of OUT/results.jsonl; those that are
there are left out by the next call, and a run that was broken off goes on. Behind the runs come the time of a step, a
forward and backward pass of the encoder on both views of a batch, a median, interleaved; and its memory, what the
forward keeps for the backward.

Keys: out=out/norms, epochs=30, seeds=3. `--quick` takes one of each. docs/norms.md is written with the epochs and seeds
above alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ssl_fast.nn as fast
from benches import machine, results, timing
from benches.compare_findings import cell
from benches.compare_methods import BATCH, WIDTH
from benches.compare_methods import encoder as with_batch_norm
from benches.plot import with_blocks
from ssl_fast.backbones import ConvNet
from ssl_fast.data import load_data
from ssl_fast.run import read_rows, write_atomically
from ssl_fast.train import train

PAGE = results.ROOT / "docs" / "norms.md"
COLUMNS = ("norm", "mean over", "layer", "loss", "kNN untrained", "kNN", "seconds", "ms a step", "MB kept")

Row = dict[str, Any]


class Norm(NamedTuple):
    axes: str  # of (N, C, H, W), those whose numbers share a mean
    layer: str
    build: Callable[[int], nn.Module]  # what follows a convolution of so many channels


# A weight and a bias a channel in each: the networks have equally many parameters.
NORMS = {
    "batch norm": Norm("N, H, W", "nn.BatchNorm2d", fast.BatchNorm2d),
    "layer norm of a pixel": Norm("C", "nn.LayerNorm2d", fast.LayerNorm2d),
    "layer norm of an image": Norm("C, H, W", "torch.nn.GroupNorm(1, C)", lambda channels: nn.GroupNorm(1, channels)),
    "instance norm": Norm("H, W", "nn.InstanceNorm2d", lambda channels: fast.InstanceNorm2d(channels, affine=True)),
    "none": Norm("", "", lambda channels: nn.Identity()),
}


def encoder(name: str, channels: int, seed: int) -> ConvNet:
    net = with_batch_norm(channels, seed)
    for block in net.blocks:
        block[1] = NORMS[name].build(block[1].num_features)
    return net


def trained(name: str, seed: int, out: Path, epochs: int) -> Row:
    """kNN before and after training, the mean loss of the last epoch, the seconds of all steps at the median's pace."""
    folder = out / f"{name.replace(' ', '_')}_seed_{seed}"
    train(folder, "digits", model=encoder(name, load_data("digits").channels, seed), epochs=epochs, batch_size=BATCH,
          head="linear", optimizer="sgd", lr=0.06, seed=seed, log_every=1, knn_every=epochs, probe_every=0,
          resume="auto")  # fmt: skip
    rows = read_rows(folder / "metrics.jsonl")
    untrained, *_, knn = (row["knn"] for row in rows if "knn" in row)
    steps = [row for row in rows if "loss" in row]
    loss = statistics.mean(row["loss"] for row in steps if row["epoch"] > epochs - 1)
    # The first steps of a process, and those beside other work, take longer.
    seconds = len(steps) * statistics.median(BATCH / row["images_per_s"] for row in steps)
    return {"norm": name, "seed": seed, "loss": loss, "untrained": untrained, "kNN": knn, "seconds": seconds}


def step_of(net: nn.Module, x: Tensor) -> timing.Step:
    def step() -> None:
        net.zero_grad()
        net(x).square().mean().backward()

    return step


def kept(net: nn.Module, x: Tensor) -> float:
    """MB that the forward pass keeps for the backward, beside the parameters."""
    own, saved = {p.data_ptr() for p in net.parameters()}, {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t  # held, so that no other comes to lie there
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    return sum(t.numel() * t.element_size() for pointer, t in saved.items() if pointer not in own) / 1e6


def measured(seconds: float) -> dict[str, Row]:
    """Time and memory of a step with each norm, in the memory format that `train` gives network and images."""
    data, form = load_data("digits"), torch.channels_last
    x = torch.randn(2 * BATCH, data.channels, data.size, data.size).to(memory_format=form)
    nets = {name: encoder(name, data.channels, 0).to(memory_format=form) for name in NORMS}
    memory = {name: kept(net, x) for name, net in nets.items()}
    times = timing.interleave({name: step_of(net, x) for name, net in nets.items()}, seconds=seconds)
    return {name: {"ms a step": timing.summary(times[name])["ms"], "MB kept": memory[name]} for name in NORMS}


def block(rows: list[Row], steps: dict[str, Row], title: str) -> str:
    """What docs/norms.md has from this command."""
    lines = []
    for name, norm in NORMS.items():
        of_norm = [row for row in rows if row["norm"] == name]
        figures = {key: [row[key] for row in of_norm] for key in ("loss", "untrained", "kNN", "seconds")}
        line = {"norm": name, "mean over": norm.axes, "layer": f"`{norm.layer}`" if norm.layer else ""}
        line |= {"kNN untrained": cell(figures["untrained"]), "kNN": cell(figures["kNN"])}
        lines.append(line | {key: cell(figures[key], 1) for key in ("loss", "seconds")} | steps[name])
    tests = len(load_data("digits").test or ())
    return f"""{title}

{results.table(lines, COLUMNS)}

Mean and standard deviation over seeds. kNN is weighted, in per cent of {tests} test images; one is {100 / tests:.2f}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument("--quick", action="store_true", help="one epoch, one seed, unless they are given")
    args = parser.parse_args()
    whole = {"epochs": "30", "seeds": "3"}
    given = whole | {"out": "out/norms"} | ({"epochs": "1", "seeds": "1"} if args.quick else {})
    for word in args.keys:
        key, equals, value = word.partition("=")
        if key not in given or not equals:
            parser.error(f"got {word!r}, allowed: {', '.join(f'{k}=...' for k in given)}")
        given[key] = value
    epochs, seeds = int(given["epochs"]), int(given["seeds"])

    data = load_data("digits")
    out = Path(given["out"]) / f"{epochs}_epochs"
    out.mkdir(parents=True, exist_ok=True)
    title = (
        f"scikit-learn's digits, {len(data.train)} training images, {len(data.test or ())} test images; SimCLR, "
        f"{epochs} epochs, ConvNet of width {WIDTH}; seeds {', '.join(map(str, range(seeds)))}; "
        f"{machine.device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{datetime.date.today().isoformat()}"
    )
    print(title, flush=True)
    path = out / "results.jsonl"
    rows = read_rows(path) if path.exists() else []
    for seed in range(seeds):
        for name in NORMS:
            if any((row["norm"], row["seed"]) == (name, seed) for row in rows):
                continue
            rows.append(trained(name, seed, out, epochs))
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
            print(rows[-1], flush=True)
    text = block([row for row in rows if row["seed"] < seeds], measured(1.0 if args.quick else 20.0), title)
    (out / "norms.md").write_text(text)
    if all(given[key] == value for key, value in whole.items()):
        PAGE.write_text(with_blocks(PAGE.read_text(), {"compared": lambda: text}))
    print("\n" + text)


if __name__ == "__main__":
    main()
