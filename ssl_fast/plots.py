"""The pictures of a run, written to out/plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_fast._extras import require
from ssl_fast.ops.two_views import MEAN_STD, PackedImages


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss and kNN accuracy against the step, from the rows of metrics.jsonl."""
    figure, axis = _figure((7, 4))
    loss, knn = ([(r["step"], r[key]) for r in rows if key in r] for key in ("loss", "knn"))
    if loss:
        axis.plot(*zip(*loss, strict=True), color="tab:blue", linewidth=1)
    axis.set(xlabel="step", ylabel="loss")
    axis.yaxis.label.set_color("tab:blue")
    if knn:
        right = axis.twinx()
        right.plot(*zip(*knn, strict=True), color="tab:orange", marker=".")
        right.set_ylabel("kNN accuracy", color="tab:orange")
    _save(figure, path)


def plot_pca(panels: dict[str, Tensor], labels: Tensor, path: Path, limit: int = 5000) -> None:
    """The first two principal components of features (N, F), one panel per title, coloured by label (N,)."""
    figure, axes = _figure((5 * len(panels), 4.5), columns=len(panels))
    for axis, (title, features) in zip([axes] if len(panels) == 1 else axes, panels.items(), strict=True):
        points, y = pca(features[:limit]).cpu().numpy(), labels[:limit].cpu().numpy()
        dots = axis.scatter(*points.T, c=y, s=6, cmap="tab10" if int(y.max()) < 10 else "viridis", linewidths=0)
        axis.set(title=title, xticks=[], yticks=[])
    if int(labels.min()) >= 0:
        figure.colorbar(dots, ax=axes, label="class")
    _save(figure, path)


def pca(features: Tensor) -> Tensor:
    """Projection (N, 2) of features (N, F) on their first two principal components, each with a fixed sign."""
    centred = features.float() - features.float().mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return centred @ axes.T


def plot_views(images: Tensor | PackedImages, view1: Tensor, view2: Tensor, path: Path, columns: int = 8) -> None:
    """The first images (uint8) of a batch above their two views (normalised floats)."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in MEAN_STD[view1.shape[1]])
    side, count = view1.shape[-1], min(columns, len(images))
    first = [F.interpolate(images[i][None].cpu().float() / 255, (side, side)) for i in range(count)]
    rows = [torch.cat(first)] + [(v[:count].cpu().float() * std + mean).clamp(0, 1) for v in (view1, view2)]
    gap = (side // 16 + 1,) * 4
    tiles = [F.pad(row, gap, value=1.0) for row in rows]  # (n, C, S, S) each
    mosaic = torch.cat([torch.cat(list(row), 2) for row in tiles], 1).permute(1, 2, 0)
    figure, axis = _figure((1.2 * len(rows[0]) + 0.8, 3.8))
    axis.imshow(mosaic.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    height = side + 2 * gap[0]
    axis.set_xticks([])
    axis.set_yticks([height * (i + 0.5) for i in range(3)], ["image", "view 1", "view 2"])
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
