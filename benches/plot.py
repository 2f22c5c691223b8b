"""Makes the README's tables and its plot from benches/results.csv, and the picture of docs/norms.md:
`python -m benches.plot`."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

from benches import common

README = Path(__file__).parents[1] / "README.md"
PICTURE = Path(__file__).parents[1] / "docs/nt_xent.png"
AXES = Path(__file__).parents[1] / "docs/norm_axes.png"
OURS, DENSE = "ssl_fast", "dense PyTorch"

Rows = list[dict[str, str]]

LOSSES = {"nt_xent": "NT-Xent", "info_nce": "InfoNCE, queue", "clip": "CLIP", "sup_con": "SupCon"}
NORMS = {"batch_norm": "", "layer_norm": "LN ", "instance_norm": "IN "}  # the shapes of batch norm name it
STEPS = {"ema": "EMA", "moco": "MoCo step", "accelerate": "training step", "two_views": "views"}


def rows_of(*ops: str) -> Rows:
    """What results.csv has of these ops, in their order."""
    with common.RESULTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["op"] in ops]
    return sorted(rows, key=lambda row: ops.index(row["op"]))


def norm_block() -> str:
    """Forward and backward of the norms, a line for each tensor and allocator."""

    def lines(here: Rows) -> list[common.Row]:
        found = []
        keys = ("op", "shape", "dtype", "allocator")
        for op, shape, dtype, allocator in dict.fromkeys(tuple(r[k] for k in keys) for r in here):
            own = [r for r in here if tuple(r[k] for k in keys) == (op, shape, dtype, allocator)]
            ms = {r["provider"]: float(r["ms"]) for r in own}
            off = {r["provider"]: r["error"] for r in own}
            found.append(
                {
                    "tensor": unbroken(NORMS[op] + shape),
                    "dtype": dtype,
                    "allocator": allocator,
                    "ssl_fast ms": ms["ssl_fast"],
                    "x faster than eager": ms["eager"] / ms["ssl_fast"],
                    "than torch.compile": ms["torch.compile"] / ms["ssl_fast"],
                    "kernels, copies of the tensor": ms["ssl_fast kernels"] / ms["copy_"],
                    "error": off["ssl_fast"],
                    "error of eager": off["eager"],
                }
            )
        return found

    return by_device(rows_of(*NORMS), lines)


def loss_block() -> str:
    """Every provider of the default allocator, the rows we lose included."""

    def lines(here: Rows) -> list[common.Row]:
        return [
            {
                "loss": LOSSES[row["op"]],
                "shape": unbroken(row["shape"].replace("=", " ")),
                "inputs": row["dtype"],
                "provider": row["provider"],
                "ms": row["ms"],
                "x one product": row["ratio"],
                "peak extra MB": row["extra_mb"],
                "gradient error": row["error"],
            }
            for row in here
            if row["allocator"] == "default" and row["provider"] != "ssl_fast, forward alone"
        ]

    return by_device(rows_of(*LOSSES), lines)


def step_block() -> str:
    """The moving average, and whole training steps."""

    def lines(here: Rows) -> list[common.Row]:
        return [
            {
                "what": STEPS[row["op"]],
                "of": row["shape"].removesuffix(", training step"),
                "dtype": row["dtype"],
                "provider": row["provider"],
                "ms": row["ms"],
                "ratio": row["ratio"],
                "to": row["to"],
                "peak extra MB": row["extra_mb"],
            }
            for row in here
            if row["allocator"] == "default"
        ]

    return by_device(rows_of(*STEPS), lines)


def fold_block() -> str:
    """The forward pass of folded networks, a line for each, and what a refresh takes."""

    def forwards(here: Rows) -> list[common.Row]:
        found = []
        for shape in dict.fromkeys(r["shape"] for r in here):
            own = {r["provider"]: r for r in here if r["shape"] == shape}
            line: common.Row = {"network": unbroken(shape), "unfolded ms": own["unfolded"]["ms"]}
            columns = {
                "ssl_fast folded": "folded, of its time",
                "torch.fx fuse": "torch.fx",
                "torch.compile": "compiled",
                "ssl_fast folded, torch.compile": "folded, compiled",
                "inductor freezing": "inductor freezing",
            }
            line |= {title: own[provider]["ratio"] if provider in own else "" for provider, title in columns.items()}
            line |= {"error, folded": own["ssl_fast folded"]["error"], "error, unfolded": own["unfolded"]["error"]}
            found.append(line)
        return found

    def refreshes(here: Rows) -> list[common.Row]:
        return [
            {"refresh of": unbroken(r["shape"]), "provider": r["provider"], "ms": r["ms"], "x a copy": r["ratio"]}
            for r in here
        ]

    return "\n".join((by_device(rows_of("conv_bn"), forwards), by_device(rows_of("conv_bn refresh"), refreshes)))


def by_device(rows: Rows, lines: Callable[[Rows], list[common.Row]]) -> str:
    """A table for each device that rows come from."""
    blocks = []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in rows if row["device"] == device]
        about = max(here, key=lambda row: row["date"])
        head = f"{device}, {about['threads']} threads, torch {about['torch']}, {about['date']}:"
        table = lines(here)
        blocks.append(f"{head}\n\n{common.table(table, table[0])}\n")
    return "\n".join(blocks) or "Not measured yet; `make bench` prints it.\n"


def unbroken(text: str) -> str:
    return text.replace(" ", "\u00a0")


def updated(readme: str) -> str:
    """The README with the tables that benches/results.csv gives now."""
    blocks = {"losses": loss_block(), "norms": norm_block(), "folds": fold_block(), "steps": step_block()}
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"
    return readme


def draw(rows: Rows) -> None:
    """Time and peak memory of each provider by shape, one column a device."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    devices = list(dict.fromkeys(row["device"] for row in rows))
    figure, axes = plt.subplots(2, len(devices), figsize=(8 * len(devices), 6), squeeze=False, layout="constrained")
    for column, device in enumerate(devices):
        here = [r for r in rows if r["device"] == device and r["allocator"] == "default"]
        shapes = list(dict.fromkeys(row["shape"] for row in here))
        series = {(r["provider"], r["dtype"]): None for r in here if r["provider"] != "ssl_fast, forward alone"}
        for axis, field, label in zip(axes[:, column], ("ms", "extra_mb"), ("ms", "peak extra MB"), strict=True):
            width = 0.8 / len(series)
            for i, (provider, dtype) in enumerate(series):
                found = {r["shape"]: r[field] for r in here if (r["provider"], r["dtype"]) == (provider, dtype)}
                bars = [(j + i * width, float(found[s])) for j, s in enumerate(shapes) if found.get(s)]
                if bars:
                    axis.bar(*zip(*bars, strict=True), width, color=f"C{i}", label=f"{provider}, {dtype}")
            axis.set(yscale="log", ylabel=label)
            axis.set_xticks([j + 0.4 for j in range(len(shapes))], shapes)
            axis.grid(axis="y", alpha=0.3)
        axes[0, column].set_title(f"NT-Xent, forward and backward, on {device}", fontsize=10)
        axes[0, column].legend(fontsize=7, ncols=3, loc="upper left")
        axes[0, column].margins(y=0.4)
    figure.savefig(PICTURE, dpi=110)


def draw_axes() -> None:
    """Which numbers of an activation share a mean and a variance: one set of them coloured in each cube."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    everything, one = slice(None), slice(0, 1)
    sets = {
        "batch norm\na channel": (everything, one, everything),
        "layer norm, of a token or pixel\nLayerNorm, LayerNorm2d": (one, everything, one),
        "layer norm, of an image\nGroupNorm(1)": (one, everything, everything),
        "instance norm\na channel of an image": (one, one, everything),
    }
    images, channels, positions = 4, 5, 6
    figure = plt.figure(figsize=(13, 3.9))
    for column, (title, (n, c, p)) in enumerate(sets.items()):
        axis = figure.add_subplot(1, len(sets), column + 1, projection="3d")
        colours = np.full((images, channels, positions), "#f2f2f2", dtype=object)
        colours[n, c, p] = "#3b7dd8"
        # The corner that the sets have in common is the one in front.
        axis.voxels(np.ones(colours.shape, bool), facecolors=colours, edgecolor="#8a8a8a", linewidth=0.4)
        axis.view_init(elev=24, azim=-128)
        axis.set_aspect("equal")
        axis.set(xticks=[], yticks=[], zticks=[], xlabel="images N", ylabel="channels C", zlabel="positions H, W")
        for label in (axis.xaxis, axis.yaxis, axis.zaxis):
            label.labelpad = -12
        axis.set_title(title, fontsize=11)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.86, wspace=0.02)
    figure.savefig(AXES, dpi=110)
    plt.close(figure)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    README.write_text(updated(README.read_text()))
    draw(rows_of("nt_xent"))
    draw_axes()


if __name__ == "__main__":
    main()
