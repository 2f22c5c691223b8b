"""Nearest neighbours by cosine: ours and scikit-learn's brute force, against the products of all similarities.

`python -m benches.bench_knn` prints the tables and writes the rows to benches/results.csv. The floor is the matrix
products alone, tile by tile into one kept buffer: what no exact search goes below. The error is the largest difference,
in fp64 cosine, between a neighbour and fp64's of the same rank: two that are equal in fp32 may change places. Features
are those of 1,000 clusters, whose members lie together in the bank, as in a folder of classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benches import common
from benches.common import Provider, Table
from benches.machine import DEVICE
from benches.timing import Step
from ssl_fast.knn import nearest_neighbours

FLOOR = "matrix products"
TILE = 4096  # of the bank
JUDGED = 200  # queries that the error is of


def cases(quick: bool) -> list[tuple[int, int, int, int]]:
    """Features of the bank, queries, their width, and k."""
    return [(10_000, 200, 512, 20)] if quick else [(100_000, 2_000, 512, k) for k in (20, 200)]


@lru_cache(1)
def features(bank: int, queries: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, width, generator=generator)
    rows = [torch.arange(bank) * 1000 // bank, torch.randint(1000, (queries,), generator=generator)]
    made = [centres[at] + 2 * torch.randn(len(at), width, generator=generator) for at in rows]
    return made[0].to(DEVICE), made[1].to(DEVICE)


def product(bank: Tensor, queries: Tensor, k: int) -> None:
    """Nothing but the products, normalised tile by tile as ours are."""
    buffer = bank.new_empty(1024, TILE)
    for part in bank.split(TILE):
        part = F.normalize(part)
        for x in queries.split(1024):
            torch.mm(F.normalize(x), part.T, out=buffer[: len(x), : len(part)])


def ours(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    return nearest_neighbours(bank, queries, k)[1]


def scikit_learn(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(bank.cpu().numpy())
    return torch.from_numpy(search.kneighbors(queries.cpu().numpy(), return_distance=False)).to(DEVICE)


def setup(bank: int, queries: int, width: int, k: int) -> Table:
    def build(search: Callable[[Tensor, Tensor, int], Any]) -> Step:
        given = features(bank, queries, width)
        return lambda: search(*given, k)

    def error(search: Callable[[Tensor, Tensor, int], Tensor]) -> float:
        keys, some = features(bank, queries, width)
        some = some[:: max(1, len(some) // JUDGED)]
        unit = F.normalize(some.double())
        exact = torch.cat([unit @ F.normalize(part.double()).T for part in keys.split(TILE)], 1)
        return float((exact.gather(1, search(keys, some, k)) - exact.topk(k).values).abs().max())

    searches = {"ssl_fast": ours}
    with common.peer("scikit-learn"):
        import sklearn.neighbors  # noqa: F401

        searches["scikit-learn, brute"] = scikit_learn
    found = [Provider(FLOOR, partial(build, product), work=1.0)]
    found += [Provider(n, partial(build, s), work=1.0, error=partial(error, s)) for n, s in searches.items()]
    return Table("knn", f"B {bank} Q {queries} F {width} k {k}", found, flop=2.0 * bank * queries * width)


if __name__ == "__main__":
    common.main(__doc__, cases, setup, seconds=5.0, allocators=("default",))
