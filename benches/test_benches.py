"""`pytest benches/`: every provider of every bench at its quick shapes, through pytest-benchmark.

`-k nt_xent` takes one op, `--device cpu` leaves a GPU alone, `--benchmark-json FILE` keeps the figures. They are not
interleaved: for rows of results.csv run `ssl-fast bench`, whose word on a provider that failed is a traceback here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benches import common, timing


def providers() -> Iterator[object]:
    for stem, module in common.setups().items():
        for case in module.cases(True):
            table = module.setup(*case)
            for provider in table.providers:
                name = "-".join((table.op, table.shape, provider.key)).replace(" ", "_")
                yield pytest.param(table, provider, id=f"{stem}-{name}" if stem != table.op else name)


@pytest.mark.parametrize("table, provider", [*providers()])
def test_bench(benchmark, table, provider):
    benchmark.group = f"{provider.op or table.op}, {table.shape}, {provider.dtype}"
    benchmark.pedantic(timing.waited(provider.build()), rounds=5, warmup_rounds=1)
