"""NT-Xent over processes by gather and by ring: the memory that a training step adds on each, and its time.

`python -m benches.bench_ranks` prints the table and writes the rows to benches/results.csv; `--quick` takes small
shapes. The processes share this machine's cores: their times add up, as on a cluster they do not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from benches import machine, memory, results, timing
from ssl_fast.functional import nt_xent

STRATEGIES = ("gather", "ring")


def worker(rank: int, world: int, folder: str, N: int, D: int) -> None:
    """Memory and times of one process, as JSON in its last line."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    z1, z2 = (torch.randn(N, D, generator=torch.Generator().manual_seed(2 * rank + k)) for k in range(2))

    def step(strategy: str, rows: int = N) -> None:
        a, b = (z[:rows].detach().requires_grad_() for z in (z1, z2))
        nt_xent(a, b, 0.1, gather_distributed=True, strategy=strategy).backward()
        dist.barrier()

    found = {}
    for strategy in STRATEGIES:
        step(strategy, 8)
    for strategy in STRATEGIES[::-1]:  # freed memory that the heap keeps would hide what comes after
        found[strategy] = {"extra_mb": memory.extra_memory(lambda strategy=strategy: step(strategy))}
    times = timing.interleave({s: lambda s=s: step(s) for s in STRATEGIES}, seconds=0, rounds=3, slow=1e9)
    for strategy in STRATEGIES:
        found[strategy] |= timing.summary(times[strategy])
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def bench(world: int, N: int, D: int) -> list[results.Row]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benches.bench_ranks", "--worker"]
        arguments = [[str(rank), str(world), folder, str(N), str(D)] for rank in range(world)]
        root = Path(__file__).parents[1]
        started = [subprocess.Popen([*command, *a], stdout=subprocess.PIPE, text=True, cwd=root) for a in arguments]
        outputs = [process.communicate()[0] for process in started]
    found = json.loads(outputs[0].splitlines()[-1])
    rows = [
        {"op": "ranks", "shape": f"NT-Xent, {world} x N={N} D={D}", "dtype": "float32", "provider": s} | found[s]
        for s in STRATEGIES
    ]
    return [
        row | {"allocator": "default", "ratio": row["extra_mb"] / rows[0]["extra_mb"], "to": "gather"} for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    machine.DEVICE = "cpu"  # as the tensors that gloo sends, where there is a GPU too
    if arguments.worker:
        rank, world, folder, N, D = arguments.worker
        worker(int(rank), int(world), folder, int(N), int(D))
        return
    rows: list[results.Row] = []
    for world, N, D in [(2, 64, 32)] if arguments.quick else [(2, 1024, 1024), (4, 1024, 1024)]:
        rows += [row | {"threads": 1} for row in bench(world, N, D)]
    print(results.table(rows, ("shape", "provider", "extra_mb", "ratio", "ms", "ms_p20", "ms_p80")))
    results.save(rows, arguments.quick)


if __name__ == "__main__":
    main()
