"""Batch, layer and instance norm, and none, in the same small network: loss, kNN, time and memory side by side.

    python -m benches.compare_norms [epochs=30] [seed=0] [out=out/compare_norms]

SimCLR on scikit-learn's digits with a linear head, so that no other norm is in the network: `ssl_fast.train.train` with
the same arguments for each row. A step's time is of a forward and backward pass of the encoder on 512 images, a
median, interleaved; its memory what the forward keeps for the backward. OUT/results.md has the table. `--quick` trains
for one epoch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import ssl_fast.nn as fast
from benches import common
from ssl_fast.backbones import ConvNet
from ssl_fast.data import load_data
from ssl_fast.run import seed_everything
from ssl_fast.train import train

WIDTH, IMAGES = 24, 512
# What follows each convolution, for so many channels, and the axes of (N, C, H, W) that share a mean.
NORMS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "batch norm": ("N, H, W", fast.BatchNorm2d),
    "layer norm": ("C, H, W", lambda channels: nn.GroupNorm(1, channels)),
    "instance norm": ("H, W", lambda channels: fast.InstanceNorm2d(channels, affine=True)),
    "none": ("", lambda channels: nn.Identity()),
}
COLUMNS = ("norm", "mean over", "loss", "kNN", "seconds", "ms a step", "MB kept")


def encoder(norm: Callable[[int], nn.Module], channels: int, seed: int) -> ConvNet:
    seed_everything(seed)
    net = ConvNet(channels, WIDTH)
    for block in net.blocks:
        block[1] = norm(block[1].num_features)
    return net


def step_of(net: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        net.zero_grad()
        net(x).square().mean().backward()

    return step


def kept(net: nn.Module, x: torch.Tensor) -> float:
    """MB that the forward pass keeps for the backward, beside the parameters."""
    own, saved = {p.data_ptr() for p in net.parameters()}, {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.data_ptr()] = t  # held, so that no other comes to lie there
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    return sum(t.numel() * t.element_size() for pointer, t in saved.items() if pointer not in own) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument("--quick", action="store_true", help="one epoch")
    args = parser.parse_args()
    given = {"epochs": "1" if args.quick else "30", "seed": "0", "out": "out/compare_norms"}
    for word in args.keys:
        key, equals, value = word.partition("=")
        if key not in given or not equals:
            parser.error(f"got {word!r}, allowed: {', '.join(f'{k}=...' for k in given)}")
        given[key] = value
    epochs, seed, out = int(given["epochs"]), int(given["seed"]), Path(given["out"])

    data = load_data("digits")
    x = torch.randn(IMAGES, data.channels, data.size, data.size)
    steps = {name: step_of(encoder(norm, data.channels, seed), x) for name, (_, norm) in NORMS.items()}
    memory = {name: kept(encoder(norm, data.channels, seed), x) for name, (_, norm) in NORMS.items()}
    times = common.interleave(steps, seconds=5)
    rows = []
    for name, (axes, norm) in NORMS.items():
        start = time.monotonic()
        net, folder = encoder(norm, data.channels, seed), out / name.replace(" ", "_")
        result = train(folder, "digits", model=net, epochs=epochs, head="linear", optimizer="sgd", lr=0.06, seed=seed,
                       log_every=5, knn_every=epochs, probe_every=0, overwrite=True)  # fmt: skip
        row = {"norm": name, "mean over": axes, "loss": result["loss"], "kNN": result["knn"]}
        row |= {
            "seconds": time.monotonic() - start,
            "ms a step": common.timing(times[name])["ms"],
            "MB kept": memory[name],
        }
        rows.append(row)
        print(common.table([row], COLUMNS).splitlines()[-1], flush=True)
    title = (
        f"SimCLR on digits, {epochs} epochs, ConvNet of width {WIDTH}; seed {seed}; {common.device_name()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    text = f"{title}\n\n{common.table(rows, COLUMNS)}\n"
    (out / "results.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
