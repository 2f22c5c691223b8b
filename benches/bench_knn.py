"""Nearest neighbours by cosine: ours and scikit-learn's brute force.

    python -m benches.bench_knn                    2,000 queries over 100,000 x 512 features, k = 20 and 200
    python -m benches.bench_knn --queries 10000    as many
    python -m benches.bench_knn --quick            a tenth of both, nothing written

The ratio is to the matrix products of the similarities alone, tile by tile into one kept buffer: what no exact search
goes below. Peak extra MB is that of the first call of a fresh process. The error is the largest difference, in fp64
cosine, between a neighbour and scikit-learn's of the same rank: two that are equal in fp32 may change places. Features
are those of 1,000 clusters, whose members lie together in the bank, as in a folder of classes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benches import common
from ssl_fast.knn import nearest_neighbours

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COLUMNS = ("shape", "provider", "ms", "ratio", "extra_mb", "same", "error")


def features(bank: int, queries: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, width, generator=generator)
    rows = [torch.arange(bank) * 1000 // bank, torch.randint(1000, (queries,), generator=generator)]
    made = [centres[at] + 2 * torch.randn(len(at), width, generator=generator) for at in rows]
    return made[0].to(DEVICE), made[1].to(DEVICE)


def product(bank: Tensor, queries: Tensor, k: int) -> None:
    """The floor: nothing but the products, normalised tile by tile as ours are."""
    buffer = bank.new_empty(1024, 4096)
    for part in bank.split(4096):
        part = F.normalize(part)
        for x in queries.split(1024):
            torch.mm(F.normalize(x), part.T, out=buffer[: len(x), : len(part)])


def ours(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    return nearest_neighbours(bank, queries, k)[1]


def sklearn(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(bank.cpu().numpy())
    return torch.from_numpy(search.kneighbors(queries.cpu().numpy(), return_distance=False)).to(DEVICE)


PROVIDERS: dict[str, Callable[[Tensor, Tensor, int], Any]] = {
    "matrix products": product,
    "ssl_fast": ours,
    "scikit-learn, brute": sklearn,
}


def disagreement(bank: Tensor, queries: Tensor, found: Tensor, expected: Tensor) -> common.Row:
    """The share of each query's neighbours that are the same, and by how much the others differ in cosine."""
    same = torch.stack([torch.isin(a, b).float().mean() for a, b in zip(found, expected, strict=True)]).mean()
    error = 0.0
    for x, a, b in zip(queries.split(100), found.split(100), expected.split(100), strict=True):
        cosine = [F.cosine_similarity(x.double()[:, None], bank.double()[i], dim=2) for i in (a, b)]
        error = max(error, float((cosine[0] - cosine[1]).abs().max()))
    return {"same": float(same), "error": error}


def rows(bank_size: int, query_count: int, width: int, k: int) -> list[common.Row]:
    bank, queries = features(bank_size, query_count, width)
    shape = f"B {bank_size} Q {query_count} F {width} k {k}"
    results: dict[str, Any] = {}

    def keeping(name: str) -> Callable[[], None]:
        return lambda: results.__setitem__(name, PROVIDERS[name](bank, queries, k))

    times = common.interleave({name: keeping(name) for name in PROVIDERS}, seconds=1.0, rounds=2, slow=60.0)
    floor = common.timing(times["matrix products"])["ms"]
    made = []
    for name in PROVIDERS:
        row = {"op": "knn", "shape": shape, "dtype": "float32", "provider": name, "allocator": "default"}
        row |= common.timing(times[name]) | {"to": "matrix products"} | common.conditions()
        row["ratio"] = row["ms"] / floor
        worker = ["--worker", json.dumps([name, bank_size, query_count, width, k])]
        row["extra_mb"] = common.in_fresh_process(__spec__.name, worker)
        if name == "ssl_fast":
            some = torch.arange(0, query_count, max(1, query_count // 1000), device=DEVICE)
            pair = (results[n][some] for n in ("ssl_fast", "scikit-learn, brute"))
            row |= disagreement(bank, queries[some], *pair)
        made.append(row)
        print(common.table([row], COLUMNS).splitlines()[-1], flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of both, nothing written")
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, bank, queries, width, k = json.loads(args.worker)
        bank, queries = features(bank, queries, width)
        PROVIDERS[name](bank[:500], queries[:10], min(k, 20))  # loads libraries, starts threads
        print(common.extra_memory(lambda: PROVIDERS[name](bank, queries, k)))
        return
    print(f"{common.device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(", ".join(COLUMNS), flush=True)
    sizes = (10_000, args.queries // 10) if args.quick else (100_000, args.queries)
    made = [row for k in (20, 200) for row in rows(*sizes, 512, k)]
    print("\n" + common.table(made, COLUMNS))
    if not args.quick:
        common.save(made)


if __name__ == "__main__":
    main()
