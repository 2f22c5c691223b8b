"""The pictures of a run, written to out/plots."""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_fast._extras import require
from ssl_fast.ops.two_views import MEAN_STD, PackedImages

SAME, OTHER, PLAIN = (0.17, 0.63, 0.17), (0.84, 0.15, 0.16), (1.0, 1.0, 1.0)  # borders of neighbours


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss and accuracies, and the collapse meter and the learning rate, against the step of metrics.jsonl's rows."""
    figure, (left, right) = _figure((12, 4), columns=2)
    for axis, main, others in ((left, "loss", {"knn": "kNN", "probe": "linear probe"}), (right, "std", {"lr": "lr"})):
        curve = {key: [(row["step"], row[key]) for row in rows if key in row] for key in (main, *others)}
        if curve[main]:
            axis.plot(*zip(*curve[main], strict=True), color="tab:blue", linewidth=1)
        axis.set(xlabel="step")
        axis.set_ylabel({"loss": "loss", "std": "std of z / |z|"}[main], color="tab:blue")
        if any(curve[key] for key in others):
            twin = axis.twinx()
            for (key, name), colour in zip(others.items(), ("tab:orange", "tab:green"), strict=False):
                if curve[key]:
                    twin.plot(*zip(*curve[key], strict=True), color=colour, marker=".", markersize=4, label=name)
            twin.set_ylabel("accuracy" if "knn" in others else "learning rate")
            if len(others) > 1:
                twin.legend(frameon=False)
    _save(figure, path)


def plot_fractions(evaluations: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the share of the labels: mean and spread of each protocol in the rows of evaluations.jsonl.

    Of evaluations that differ in their figures alone, the last is drawn.
    """
    curves: dict[str, dict[float, list[float]]] = {}
    for row in evaluations:
        for protocol in ("knn", "linear", "finetune", "transfer"):
            if protocol in row:
                frozen = f" of what follows {row['freeze']}" if protocol == "transfer" else ""
                weights = ", random weights" if row.get("initial") == "random" else ""
                curve = curves.setdefault(f"{protocol}{frozen} on {Path(row['data']).name}{weights}", {})
                curve[row.get("label_fraction", 1.0)] = row.get(f"{protocol}_seeds", [row[protocol]])
    figure, axis = _figure((7, 4))
    for name, curve in curves.items():
        points = [(x, statistics.mean(y), statistics.stdev(y) if len(y) > 1 else 0) for x, y in sorted(curve.items())]
        axis.errorbar(*zip(*points, strict=True), marker="o", capsize=3, label=name)
    axis.set(xscale="log", xlabel="share of the labels", ylabel="accuracy")
    axis.legend(frameon=False)
    _save(figure, path)


def plot_points(panels: dict[str, Tensor], labels: Tensor, path: Path) -> None:
    """Points (N, 2), one panel per title, coloured by label (N,); one colour where labels are -1."""
    figure, axes = _figure((5 * len(panels), 4.5), columns=len(panels))
    y, known = labels.cpu().numpy(), int(labels.min()) >= 0
    colour = {"c": y, "cmap": "tab10" if int(y.max()) < 10 else "viridis"} if known else {"color": "tab:blue"}
    for axis, (title, points) in zip([axes] if len(panels) == 1 else axes, panels.items(), strict=True):
        dots = axis.scatter(*points.cpu().numpy().T, s=6, linewidths=0, **colour)
        axis.set(title=title, xticks=[], yticks=[])
    if known:
        figure.colorbar(dots, ax=axes, label="class")
    _save(figure, path)


def pca(features: Tensor) -> Tensor:
    """Projection (N, 2) of features (N, F) on their first two principal components, each with a fixed sign."""
    centred = features.cpu().float() - features.cpu().float().mean(0)
    centred = F.pad(centred, (0, max(0, 2 - centred.shape[1])))  # a single feature has one component
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        _, _, axes = torch.svd_lowrank(centred, q=min(8, *centred.shape), niter=8)  # seconds less than all of them
    axes = axes[:, :2]
    return centred @ (axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign())


def umap(features: Tensor) -> Tensor:
    """UMAP's map (N, 2) of features (N, F) by cosine distance, with a fixed seed.

    Raises:
        ImportError: where umap-learn is not installed.
    """
    module = require("umap", "the UMAP picture", extra="umap")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed means one thread
        mapped = module.UMAP(n_neighbors=min(15, len(features) - 1), metric="cosine", random_state=0)
        return torch.from_numpy(mapped.fit_transform(features.cpu().numpy()))


def plot_views(images: Tensor | PackedImages, view1: Tensor, view2: Tensor, path: Path, columns: int = 8) -> None:
    """The first images (uint8) of a batch above their two views (normalised floats)."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in MEAN_STD[view1.shape[1]])
    count = min(columns, len(images))
    first = [F.interpolate(images[i][None].cpu().float() / 255, view1.shape[-2:]) for i in range(count)]
    rows = [torch.cat(first), *(view[:count].cpu().float() * std + mean for view in (view1, view2))]
    _plot_tiles(rows, path, names=["image", "view 1", "view 2"])


def neighbours(h: Tensor, queries: int = 8, k: int = 8) -> Tensor:
    """Rows (queries, 1 + k) of features h (N, F): one spread over them, then the k others nearest to it by cosine."""
    n, unit = len(h), F.normalize(h.cpu().float())
    asked = torch.linspace(0, n - 1, min(queries, n)).long()
    cosine = unit[asked] @ unit.T
    cosine[torch.arange(len(asked)), asked] = -torch.inf
    return torch.cat([asked[:, None], cosine.topk(min(k, n - 1)).indices], 1)


def plot_neighbours(images: Tensor, labels: Tensor, path: Path) -> None:
    """Images (Q, 1 + k, C, H, W), uint8, each row one and its neighbours.

    A neighbour's border is green where its label (Q, 1 + k) is the first's, and red where it is not; white where the
    labels are -1.
    """
    tiles = list((images.float() / 255).expand(-1, -1, 3, -1, -1))
    borders = [
        [PLAIN, *(PLAIN if label < 0 else SAME if label == row[0] else OTHER for label in row[1:])]
        for row in labels.tolist()
    ]
    _plot_tiles(tiles, path, borders=borders)


def plot_filters(weight: Tensor, path: Path, columns: int = 16, limit: int = 128) -> None:
    """The kernels (O, C, h, w) of a convolution on C = 1 or 3 channels, grey at 0, each to its own scale."""
    kernels = weight.detach()[:limit].cpu().float()
    largest = kernels.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    tiles = list((kernels / (2 * largest) + 0.5).split(columns))
    tiles[-1] = F.pad(tiles[-1], (0, 0, 0, 0, 0, 0, 0, len(tiles[0]) - len(tiles[-1])), value=1.0)
    _plot_tiles(tiles, path, inches=0.5)


def _plot_tiles(
    rows: list[Tensor],
    path: Path,
    names: list[str] | None = None,
    borders: list[list[tuple[float, float, float]]] | None = None,
    inches: float = 0.9,
) -> None:
    """Rows of images (n, C, H, W) in [0, 1] as one, with a name beside each row or a border around each image."""
    height, width = rows[0].shape[-2:]
    gap = min(height, width) // 16 + (2 if borders else 1)
    lines = []
    for i, row in enumerate(rows):
        tiles = F.pad(row.clamp(0, 1), (gap,) * 4, value=1.0)
        for tile, colour in zip(tiles, borders[i] if borders else [], strict=bool(borders)):
            rim = torch.tensor(colour).view(3, 1, 1).expand_as(tile).clone()
            rim[:, gap:-gap, gap:-gap] = tile[:, gap:-gap, gap:-gap]
            tile.copy_(F.pad(rim[:, 1:-1, 1:-1], (1,) * 4, value=1.0))
        lines.append(torch.cat(list(tiles), 2))
    mosaic = torch.cat(lines, 1).permute(1, 2, 0)
    figure, axis = _figure((inches * len(rows[0]) + 0.8 * bool(names), inches * len(rows) * height / width + 0.2))
    axis.imshow(mosaic.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([(height + 2 * gap) * (i + 0.5) for i in range(len(rows))] if names else [], names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    _save(figure, path)


def _figure(size: tuple[float, float], columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes without pyplot, whose global state a library has no business in."""
    figure = require("matplotlib.figure", "the plots").Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, columns)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
