"""Makes the tables of README and docs/kernels.md and their pictures from benches/results.csv, and the picture of
docs/norms.md: `python -m benches.plot`. A second run changes nothing."""

from __future__ import annotations

import argparse
import csv
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benches import common, results

README = results.ROOT / "README.md"
DOCS = results.ROOT / "docs"
KERNELS = DOCS / "kernels.md"
FLOORS = (common.COPY, common.PRODUCT, "copy of as many bytes", "copy of the weights", "matrix products")
OUT_OF_MEMORY = "out of memory"  # what stands where a row has no time
# Not what a user calls, or not the one that is chosen.
NOT_THE_PRODUCT = ("kernels", "forward alone", "reference", "stochastic")

Rows = list[dict[str, str]]

LOSSES = {
    "nt_xent": "NT-Xent", "info_nce": "InfoNCE, queue", "clip": "CLIP", "sup_con": "SupCon",
    "barlow_twins": "Barlow Twins",
}  # fmt: skip
NORMS = {"batch_norm": "", "layer_norm": "LN ", "instance_norm": "IN "}  # the shapes of batch norm name it
STEPS = {"ema": "EMA", "moco": "MoCo step", "accelerate": "training step", "two_views": "views"}
PARTS = ("data", "encoder", "loss", "optimizer", "ema")
# Steps of the floor's in one of an op, as its bench has it and docs/kernels.md derives it.
WORK = {"nt_xent": 2.0, "info_nce": 2.0, "clip": 3.0, "sup_con": 2.0, "barlow_twins": 1.0, "batch_norm": 3.5,
        "layer_norm": 2.5, "instance_norm": 2.5, "ema": 1.0, "lars": 2.5, "conv_bn refresh": 1.0,
        "two_views": 0.5, "knn": 1.0}  # fmt: skip
PLAIN = ("dense PyTorch", "mm + cat + cross_entropy", "eager", "mul_ add_", "torch.fx fuse", "torchvision",
         "scikit-learn, brute", "plain PyTorch")  # fmt: skip


def rows_of(*ops: str) -> Rows:
    """What results.csv has of these ops, in their order; of all without any."""
    with results.RESULTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not ops or row["op"] in ops]
    order = ops or sorted({row["op"] for row in rows})
    return sorted(rows, key=lambda row: order.index(row["op"]))


def norm_block() -> str:
    """Forward and backward of the norms, a line for each tensor and allocator."""

    def lines(here: Rows) -> list[results.Row]:
        found = []
        keys = ("op", "shape", "dtype", "allocator")
        for op, shape, dtype, allocator in dict.fromkeys(tuple(r[k] for k in keys) for r in here):
            own = {r["provider"]: r for r in here if tuple(r[k] for k in keys) == (op, shape, dtype, allocator)}
            found.append(
                {
                    "tensor": unbroken(NORMS[op] + shape),
                    "dtype": dtype,
                    "allocator": allocator,
                    "ssl_fast ms": quotient(own, "ssl_fast"),
                    "x faster than eager": quotient(own, "eager", "ssl_fast"),
                    "than torch.compile": quotient(own, "torch.compile", "ssl_fast"),
                    "kernels, copies of the tensor": quotient(own, "ssl_fast kernels", "copy_"),
                    "error": own.get("ssl_fast", {}).get("error", ""),
                    "error of eager": own.get("eager", {}).get("error", ""),
                }
            )
        return found

    return by_device(rows_of(*NORMS), lines)


def loss_block() -> str:
    """Every provider of the default allocator, the rows we lose included."""

    def lines(here: Rows) -> list[results.Row]:
        return [
            {
                "loss": LOSSES[row["op"]],
                "shape": unbroken(row["shape"].replace("=", " ")),
                "inputs": row["dtype"],
                "provider": row["provider"],
                "ms": row["ms"] or OUT_OF_MEMORY,
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

    def lines(here: Rows) -> list[results.Row]:
        return [
            {
                "what": STEPS[row["op"]],
                "of": row["shape"].removesuffix(", training step"),
                "dtype": row["dtype"],
                "provider": row["provider"],
                "ms": row["ms"] or OUT_OF_MEMORY,
                "images/s": images_a_second(row),
                "ratio": row["ratio"],
                "to": row["to"],
                "peak extra MB": row["extra_mb"],
            }
            for row in here
            if row["allocator"] == "default" and (row["provider"] not in FLOORS or row["to"] in FLOORS)
        ]

    return by_device(rows_of(*STEPS), lines)


def fold_block() -> str:
    """The forward pass of folded networks, a line for each, and what a refresh takes."""

    def forwards(here: Rows) -> list[results.Row]:
        found = []
        for shape in dict.fromkeys(r["shape"] for r in here):
            own = {r["provider"]: r for r in here if r["shape"] == shape}
            line: results.Row = {"network": unbroken(shape), "unfolded ms": quotient(own, "unfolded")}
            columns = {
                "ssl_fast folded": "folded, of its time",
                "torch.fx fuse": "torch.fx",
                "torch.compile": "compiled",
                "ssl_fast folded, torch.compile": "folded, compiled",
                "inductor freezing": "inductor freezing",
            }
            for provider, title in columns.items():
                row = own.get(provider, {"ms": "", "ratio": ""})
                line[title] = row["ratio"] if row["ms"] or provider not in own else OUT_OF_MEMORY
            errors = {"error, folded": "ssl_fast folded", "error, unfolded": "unfolded"}
            line |= {title: own.get(provider, {}).get("error", "") for title, provider in errors.items()}
            found.append(line)
        return found

    def refreshes(here: Rows) -> list[results.Row]:
        return [
            {
                "refresh of": unbroken(r["shape"]),
                "provider": r["provider"],
                "ms": r["ms"] or OUT_OF_MEMORY,
                "x a copy": r["ratio"],
            }
            for r in here
        ]

    return "\n".join((by_device(rows_of("conv_bn"), forwards), by_device(rows_of("conv_bn refresh"), refreshes)))


def lost_block() -> str:
    """Where ours is not the fastest: a line for each table, with the one that is."""

    def lines(here: Rows) -> list[results.Row]:
        keys = ("op", "shape", "dtype", "allocator")
        tables: dict[tuple[str, ...], Rows] = {}
        for row in here:
            tables.setdefault(tuple(row[k] for k in keys), []).append(row)
        found = []
        for key, rows in tables.items():
            rows = [r for r in rows if r["provider"] not in FLOORS]
            rows = [r for r in rows if not any(word in r["provider"] for word in NOT_THE_PRODUCT)]
            ours = [time(r) for r in rows if r["provider"].startswith("ssl_fast")]
            if ours and time(best := min(rows, key=time)) < min(ours):
                line: results.Row = dict(zip(keys, map(unbroken, key), strict=True))
                line |= {"faster": best["provider"], "ms": best["ms"], "ours, ms": min(ours)}
                found.append(line)
        return found

    return by_device([row for row in rows_of() if row["ms"]], lines)


def time(row: dict[str, str]) -> float:
    return float(row["ms"])


def quotient(own: dict[str, dict[str, str]], provider: str, other: str = "") -> float | str:
    """The time of a provider, or over that of another; nothing where one has no row, as where it failed."""
    rows = [own.get(name) for name in (provider, other) if name]
    if not all(rows):
        return ""
    times = [time(row) for row in rows if row and row["ms"]]
    return OUT_OF_MEMORY if len(times) < len(rows) else times[0] / (times[1] if other else 1.0)


def images_a_second(row: dict[str, str]) -> float | str:
    """Of a shape that says how many images a step has."""
    found = re.search(r"(\d+)x3x|N (\d+) K|(\d+) images", row["shape"])
    return int(next(filter(None, found.groups()))) / time(row) * 1e3 if found and row["ms"] else ""


def simclr_block() -> str:
    """The picture, and images a second of the whole step."""

    def lines(here: Rows) -> list[results.Row]:
        return [
            {
                "network, images": unbroken(row["shape"]),
                "precision": row["dtype"],
                "provider": row["provider"],
                "images/s": images_a_second(row),
                "ms": row["ms"] or OUT_OF_MEMORY,
                "x plain PyTorch": row["ratio"],
                "peak extra MB": row["extra_mb"],
                "error of the loss": row["error"],
            }
            for row in here
        ]

    rows = [row for row in rows_of("simclr") if row["provider"] not in FLOORS]
    picture = "![a SimCLR step by its parts](docs/simclr.svg)\n\n" if rows else ""
    return picture + by_device(rows, lines)


def data_block() -> str:
    """Whole steps by who makes the views, and how long a step waits for them."""

    def lines(here: Rows) -> list[results.Row]:
        return [
            {
                "step of SimCLR": row["shape"],
                "views by": row["provider"],
                "images/s": images_a_second(row),
                "waiting for views": f"{float(row['data_wait']):.1%}" if row["ms"] else "",
                "ms": row["ms"] or OUT_OF_MEMORY,
                "x ours": row["ratio"],
            }
            for row in here
        ]

    return by_device(rows_of("two_views step"), lines)


def by_device(rows: Rows, lines: Callable[[Rows], list[results.Row]]) -> str:
    """A table for each device that rows come from."""
    blocks = []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in rows if row["device"] == device]
        threads, torches, dates = (sorted({row[key] for row in here}) for key in ("threads", "torch", "date"))
        days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        head = f"{device}, {' or '.join(threads)} threads, torch {' or '.join(torches)}, {days}:"
        table = lines(here) or [{"": "none"}]
        blocks.append(f"{head}\n\n{results.table(table, table[0])}\n")
    return "\n".join(blocks) or "Not measured yet; `make bench` prints it.\n"


def unbroken(text: str) -> str:
    return text.replace(" ", "\u00a0")


def place_block() -> str:
    """How far from its floor each op is in fp32, forward and backward: the largest shape, allocator warm where it was
    measured."""

    def lines(here: Rows) -> list[results.Row]:
        found: list[results.Row] = []
        for op, work in WORK.items():
            rows = [r for r in here if r["op"] == op and r["dtype"] == "float32" and r["ms"]]
            rows = [r for r in rows if r["allocator"] == "warm"] or rows
            floors = [r for r in rows if r["provider"] in FLOORS]
            if not floors:
                found.append({"op": op, "shape": "not measured yet"})
                continue
            floor = max(floors, key=time)
            own = [r for r in rows if r["shape"] == floor["shape"] and r["provider"] not in FLOORS]
            own = [r for r in own if not any(word in r["provider"] for word in (*NOT_THE_PRODUCT, "nothing changed"))]
            line: results.Row = {"op": op, "shape": unbroken(floor["shape"]), "allocator": floor["allocator"]}
            line["floor, ms"] = time(floor) * work
            kinds = {"ours": ("ssl_fast", "refresh"), "plain": PLAIN, "torch.compile": ("torch.compile",)}
            for kind, names in kinds.items():
                times = [time(r) for r in own if r["provider"].startswith(names)]
                line[f"{kind}, floors"] = min(times) / time(floor) / work if times else ""
            found.append(line)
        return found

    return by_device(rows_of(*WORK), lines)


def copies_block(op: str) -> str:
    """The operators of a norm in copies of the tensor, and how much longer eager takes; the allocator warm."""
    ours, passes = "ssl_fast kernels", {"forward": f"{op} forward", "backward": f"{op} backward", "both": op}

    def lines(here: Rows) -> list[results.Row]:
        found: list[results.Row] = []
        for shape, dtype in dict.fromkeys((r["shape"], r["dtype"]) for r in here):
            own = {f"{r['op']}, {r['provider']}": r for r in here if (r["shape"], r["dtype"]) == (shape, dtype)}
            line: results.Row = {"tensor": unbroken(shape), "dtype": dtype}
            line |= {k: quotient(own, f"{name}, {ours}", f"{op}, {common.COPY}") for k, name in passes.items()}
            line["eager / kernels"] = quotient(own, f"{op}, eager", f"{op}, {ours}")
            line["eager / ssl_fast"] = quotient(own, f"{op}, eager", f"{op}, ssl_fast")
            found.append(line)
        return found

    return by_device([r for r in rows_of(*passes.values()) if r["allocator"] == "warm"], lines)


def kernel_page(page: str) -> str:
    """docs/kernels.md with the tables that benches/results.csv gives now."""
    norms = {op: functools.partial(copies_block, op) for op in ("instance_norm", "layer_norm")}
    return with_blocks(page, {"places": place_block, **norms})


def large_block() -> str:
    """Images a second and the peak of each way to take a step, by batch."""

    def lines(here: Rows) -> list[results.Row]:
        found: dict[str, results.Row] = {}
        for row in here:
            step = found.setdefault(row["shape"], {"network, batch": unbroken(row["shape"])})
            pace = row["ms"] and int(row["shape"].split("batch=")[1].split()[0]) / time(row) * 1e3
            step[row["provider"]] = f"{pace:.0f}/s, {float(row['extra_mb']):.0f} MB" if pace else OUT_OF_MEMORY
        return list(found.values())

    return by_device(rows_of("large_batch"), lines)


def updated(readme: str) -> str:
    """The README with the tables that benches/results.csv gives now."""
    blocks = {"losses": loss_block, "norms": norm_block, "folds": fold_block, "steps": step_block}
    return with_blocks(readme, {**blocks, "simclr": simclr_block, "data": data_block, "lost": lost_block})


def with_blocks(text: str, blocks: dict[str, Callable[[], str]]) -> str:
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{block()}\n{end}{rest.split(end)[1]}"
    return text


# ---- pictures


def canvas(*grid: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes, (rows, columns) of them, that come out the same to the byte at every run."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "ssl_fast", "svg.fonttype": "none"}
    import matplotlib.pyplot as plt

    return plt.subplots(*grid, figsize=size, squeeze=False, layout="constrained")


def write(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def devices(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["device"] for row in rows))


def draw_nt_xent(rows: Rows, path: Path) -> None:
    """Time and peak memory against the batch at D = 128, fp32, a column a device; a line that ran out of memory ends
    in a cross."""
    rows = [r for r in rows if r["shape"].endswith(" D=128") and r["dtype"] == "float32"]
    rows = [r for r in rows if r["allocator"] == "default" and "alone" not in r["provider"]]
    figure, axes = canvas(2, len(devices(rows)), size=(7 * len(devices(rows)), 6))
    for column, device in enumerate(devices(rows)):
        here = [r for r in rows if r["device"] == device]
        for axis, field, label in zip(axes[:, column], ("ms", "extra_mb"), ("ms", "peak extra MB"), strict=True):
            for i, provider in enumerate(dict.fromkeys(r["provider"] for r in here)):
                own = sorted((int(r["shape"].split()[0][2:]), r) for r in here if r["provider"] == provider)
                points = [(N, float(r[field])) for N, r in own if r[field]]
                if not points:
                    continue
                axis.plot(*zip(*points, strict=True), "o-", color=f"C{i}", label=provider, markersize=4)
                if any(not r["ms"] for _, r in own):
                    axis.plot(*points[-1], "x", color=f"C{i}", markersize=12)
            axis.set(xscale="log", yscale="log", ylabel=label)
            axis.set_xticks(sizes := sorted({int(r["shape"].split()[0][2:]) for r in here}), sizes, minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0, column].set_title(f"NT-Xent, D = 128, fp32, forward and backward, on {device}")
        axes[0, column].legend()
        axes[1, column].set_xlabel("pairs N; a cross: the next batch ran out of memory")
    write(figure, path)


# What our kernels do to a number, forward and backward, as docs/kernels.md counts it; and the passes over it, read or
# written. Without a residual no mask is kept, and the backward finds the sign again.
FLOP_OF_A_NUMBER = {"batch_norm": 20, "BN+ReLU": 23, "layer_norm": 29, "instance_norm": 16, "ema": 3}
PASSES = {"batch_norm": 7, "BN+ReLU": 5, "layer_norm": 5, "instance_norm": 5, "ema": 3}


def roof_point(row: dict[str, str]) -> tuple[float, float]:
    """Flop a byte, and TFLOP/s, of what an op needs, whatever a provider executes or moves (docs/kernels.md)."""
    if row["op"] in PASSES:
        kind = "BN+ReLU" if "BN+ReLU" in row["shape"] else row["op"]
        width = 2 if row["dtype"].startswith("bfloat16") else 4
        intensity = FLOP_OF_A_NUMBER[kind] / PASSES[kind] / width
        return intensity, intensity * float(row["gb_per_s"]) / 1e3
    size = {k: int(v) for k, v in re.findall(r"(\w)=(\d+)", row["shape"])}
    N, D = size["N"] * (2 if row["op"] == "nt_xent" else 1), size["D"]
    K = size.get("K", N)
    flop = {"nt_xent": 2, "info_nce": 2, "clip": 3, "sup_con": 2}[row["op"]] * 2 * N * K * D
    moved = 4 * D * (2 * N + (K if row["op"] == "info_nce" else 2 * K if row["op"] == "clip" else 0))
    return flop / moved, flop / time(row) / 1e9


def draw_roofline(rows: Rows, path: Path) -> None:
    """Ours and plain PyTorch's forward and backward passes in fp32 under the two roofs: the largest shape of each op,
    with the better of the allocators; of devices that have rows of both."""
    rows = [r for r in rows if r["dtype"] == "float32" and r["ms"]]
    copied = {r["device"] for r in rows if r["provider"] in FLOORS and r["gb_per_s"]}
    multiplied = {r["device"] for r in rows if r["provider"] == common.PRODUCT and r["tflops"]}
    rows = [r for r in rows if r["device"] in copied & multiplied]
    figure, axes = canvas(1, len(devices(rows)), size=(7 * len(devices(rows)), 4.5))
    kinds = {"ssl_fast": "o", "ssl_fast EMA": "o", "dense PyTorch": "x", "eager": "x", "mul_ add_": "x"}
    kinds["mm + cat + cross_entropy"] = "x"
    for axis, device in zip(axes[0], devices(rows), strict=True):
        here = [r for r in rows if r["device"] == device]
        copies = [float(r["gb_per_s"]) for r in here if r["provider"] in FLOORS and r["gb_per_s"]]
        products = [float(r["tflops"]) for r in here if r["provider"] == common.PRODUCT and r["tflops"]]
        speed, peak = sorted(copies)[len(copies) // 2] / 1e3, max(products)
        xs = [0.1, peak / speed, 3e4]
        axis.plot(xs, [min(x * speed, peak) for x in xs], color="black", linewidth=1)
        axis.annotate(f"copy, median {speed * 1e3:.0f} GB/s", (0.1, speed), va="bottom")
        axis.annotate(f"product, best {peak:.2f} TFLOP/s", (xs[2], peak), ha="right", va="bottom")
        here = [r for r in here if r["provider"] in kinds]
        for i, op in enumerate(dict.fromkeys(r["op"] for r in here)):
            largest = max((r for r in here if r["op"] == op), key=time)["shape"]
            own = [r for r in here if (r["op"], r["shape"]) == (op, largest)]
            for provider in dict.fromkeys(r["provider"] for r in own):
                row = min((r for r in own if r["provider"] == provider), key=time)
                label = op if kinds[provider] == "o" else None
                axis.plot(*roof_point(row), kinds[provider], color=f"C{i}", label=label)
        axis.set(xscale="log", yscale="log", xlabel="flop a byte", ylabel="TFLOP/s", title=device)
        axis.grid(alpha=0.3)
        axis.legend(title="o ssl_fast, x plain", loc="upper left", bbox_to_anchor=(1, 1))
    write(figure, path)


def draw_simclr(rows: Rows, path: Path) -> None:
    """The parts of a step that memory sufficed for, a bar a provider, a column a device."""
    figure, axes = canvas(1, len(devices(rows)), size=(7 * len(devices(rows)), 3))
    for axis, device in zip(axes[0], devices(rows), strict=True):
        here = [r for r in rows if r["device"] == device and r["provider"] not in FLOORS and r["ms"]]
        providers = list(dict.fromkeys(r["provider"] for r in here))
        left = dict.fromkeys(providers, 0.0)
        for part in PARTS:
            ms = {r["provider"]: time(r) for r in here if r["op"] == f"simclr {part}"}
            axis.barh(providers, [ms.get(p, 0.0) for p in providers], left=list(left.values()), label=part)
            left = {p: left[p] + ms.get(p, 0.0) for p in providers}
        whole = {r["provider"]: time(r) for r in here if r["op"] == "simclr"}
        axis.plot([whole.get(p, math.nan) for p in providers], providers, "k|", markersize=18, label="whole step")
        axis.invert_yaxis()
        axis.set(xlabel="ms", title=f"{here[0]['shape']}, {here[0]['dtype']}, on {device}")
        axis.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    write(figure, path)


def draw_axes(path: Path) -> None:
    """Which numbers of an activation share a mean and a variance: one set of them coloured in each cube."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    everything, one = slice(None), slice(0, 1)
    sets = {
        "batch norm\nover N, H, W: BatchNorm2d": (everything, one, everything),
        "layer norm of a token or pixel\nover C: LayerNorm, LayerNorm2d": (one, everything, one),
        "layer norm of an image\nover C, H, W: GroupNorm(1, C)": (one, everything, everything),
        "instance norm\nover H, W: InstanceNorm2d": (one, one, everything),
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
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(folder: Path) -> list[Path]:
    """Every picture whose rows are there."""
    drawn = []
    pictures: dict[str, tuple[Callable[[Rows, Path], None], tuple[str, ...]]] = {
        "nt_xent.svg": (draw_nt_xent, ("nt_xent",)),
        "roofline.svg": (draw_roofline, ("nt_xent", "info_nce", "clip", "sup_con", *NORMS, "ema")),
        "simclr.svg": (draw_simclr, ("simclr", *(f"simclr {part}" for part in PARTS))),
    }
    for name, (picture, ops) in pictures.items():
        if rows := rows_of(*ops):
            picture(rows, folder / name)
            drawn.append(folder / name)
    draw_axes(folder / "norm_axes.png")
    return [*drawn, folder / "norm_axes.png"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    README.write_text(updated(README.read_text()))
    KERNELS.write_text(kernel_page(KERNELS.read_text()))
    large = DOCS / "large_batches.md"
    large.write_text(with_blocks(large.read_text(), {"large": large_block}))
    draw(DOCS)


if __name__ == "__main__":
    main()
