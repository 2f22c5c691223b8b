"""Nearest neighbours by cosine, tile by tile, and the weighted kNN classifier (Wu et al. 2018, arXiv 1805.01978)."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_fast._checks import is_number

KNN_T = 0.07
GROUP = 16  # similarities of which one maximum is compared: reading a tile once is most of what its selection costs


def knn_k(bank: int) -> int:
    """The k of every kNN figure: 200 for banks of at least 10,000 images, else 20."""
    return 200 if bank >= 10_000 else min(20, bank)


@torch.no_grad()
def nearest_neighbours(bank: Tensor, queries: Tensor, k: int = 20, block: int = 4096) -> tuple[Tensor, Tensor]:
    """The k rows of a bank with the largest cosine to each query, exactly, without the (Q, B) similarities.

    Tile after tile of them is one matrix product, of which only what exceeds a query's k-th best so far is looked at.
    Neither features are copied: beside the result, memory is O(block * (block + k + F)). The bank may lie on the host,
    as a memory-mapped file too.

    Equivalent to: (F.normalize(queries) @ F.normalize(bank).T).topk(k).

    Args:
        bank, queries: features (B, F) and (Q, F); computed in fp32, or in fp64 where they are.
        k: neighbours, at most B.
        block: rows of the bank in a tile, at least 32 k, with a quarter of `block` queries.

    Returns:
        Cosines (Q, k), the largest first, and rows of the bank (Q, k), int64, on the queries' device. Of equal
        cosines, any may come first.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> cosine, index = nearest_neighbours(h_train, h_test, k=5)
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        got = f"{tuple(bank.shape)} and {tuple(queries.shape)}"
        raise ValueError(f"bank, queries: got shapes {got}, allowed: (B, F) and (Q, F) of one encoder")
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or not 1 <= k <= len(bank):
        raise ValueError(f"k: got {k!r}, allowed: 1 to {len(bank)}, the images in the bank")
    dtype = torch.float64 if torch.float64 in (bank.dtype, queries.dtype) else torch.float32
    if not len(queries):
        return queries.new_empty(0, k, dtype=dtype), queries.new_empty(0, k, dtype=torch.long)
    rows = max(1, block // 4)
    block = -(-max(block, 2 * GROUP * k) // GROUP) * GROUP
    best = torch.full((len(queries), k), -torch.inf, dtype=dtype, device=queries.device)
    index = torch.zeros(len(queries), k, dtype=torch.long, device=queries.device)
    buffer = best.new_empty(min(rows, len(queries)), min(block, -(-len(bank) // GROUP) * GROUP))
    for start in range(0, len(bank), block):
        part = F.normalize(bank[start : start + block].to(queries.device, dtype))
        for x, top, at in zip(queries.split(rows), best.split(rows), index.split(rows), strict=True):
            tile = buffer[: len(x)]
            tile[:, len(part) :] = -torch.inf
            torch.mm(F.normalize(x.to(dtype)), part.T, out=tile[:, : len(part)])
            _merge(top, at, tile, start)
    return best, index


def _merge(best: Tensor, index: Tensor, tile: Tensor, start: int) -> None:
    """Let the similarities of a tile, to bank rows from `start` on, take their places among the best, in place."""
    n, k = best.shape
    groups = tile.unflatten(1, (GROUP, -1))
    largest, floor = groups.amax(1), best[:, -1:]
    hot = largest > floor
    if int(hot.sum()) > hot.numel() // 8:  # the first tile, or a bank whose best come last
        # k groups hold one each that is no less than the k-th largest of their maxima.
        within = largest.topk(min(k, largest.shape[1])).values[:, k - 1 :]
        floor = torch.cat([floor, within.nextafter(torch.full_like(within, -torch.inf))], 1).amax(1, keepdim=True)
        hot = largest > floor
    row, lane = hot.nonzero(as_tuple=True)
    values = groups[row, :, lane]
    which, group = (values > floor[row]).nonzero(as_tuple=True)
    row, column, values = row[which], lane[which] + group * groups.shape[2], values[which, group]
    count = torch.bincount(row, minlength=n)
    place = k + torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    width = k + int(count.amax())
    similar = F.pad(best, (0, width - k), value=-torch.inf)
    columns = F.pad(index, (0, width - k))
    similar[row, place], columns[row, place] = values, column + start
    best[:], kept = similar.topk(k)
    index[:] = columns.gather(1, kept)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = KNN_T,
    block: int = 4096,
) -> float:
    """Accuracy of the weighted kNN of Wu et al. 2018 (arXiv 1805.01978): each neighbour votes exp(cosine / t).

    In the memory of `nearest_neighbours`, whatever the sizes.

    Args:
        bank, queries: features (B, F) and (Q, F).
        bank_labels, query_labels: classes (B,) and (Q,), integers from 0.
        k: neighbours, at most B.
        temperature: t > 0.
        block: as in `nearest_neighbours`.

    Example:
        >>> knn_accuracy(h_train, y_train, h_test, y_test, k=200)
    """
    if not is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature!r}, allowed: a number above 0, such as {KNN_T}")
    for name, labels, features in (("bank_labels", bank_labels, bank), ("query_labels", query_labels, queries)):
        if labels.shape != (len(features),):
            raise ValueError(f"{name}: got shape {tuple(labels.shape)}, allowed: ({len(features)},), one of each row")
    best, index = nearest_neighbours(bank, queries, k, block)
    # exp((s - max) / t) in place of exp(s / t): the same vote without overflow at a small t.
    votes = torch.exp((best - best[:, :1]) / temperature)
    voted_for = bank_labels.to(index.device)[index]
    score = votes.new_zeros(len(queries), int(bank_labels.max()) + 1).scatter_add_(1, voted_for, votes)
    return int((score.argmax(1) == query_labels).sum()) / len(queries)
