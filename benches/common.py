"""What the benches share: tables of providers, their floors, and the command line that measures them.

A bench of an op is a file with `cases(quick)`, which lists what to measure, and `setup(*case)`, which gives a `Table`
of providers; `main` and `pytest benches/` do the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import gzip
import importlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from benches import machine, memory, processes, results, timing
from benches.results import Row
from benches.timing import Step
from ssl_fast.bench import exit_on_signals

SHOWN = ("op", "dtype", "provider", "ms", "ms_p20", "ms_p80", "ms_call", "ratio", "x_floor", "extra_mb", "error")
BARS = 12  # of a profile
COPY, PRODUCT = "copy_", "mm(out=)"  # the two floors
SIDE = 4096 if machine.DEVICE == "cuda" else 1024  # of a product that runs at full speed
SQUARE = 2.0 * SIDE**3  # its flop
ABSENT: dict[str, Exception] = {}  # why a peer has no rows
LARGEST_PRODUCT = 1 << 30  # bytes of a floor's output: the floor is there for batches that no matrix of all pairs is


@dataclass
class Provider:
    """What a row measures.

    `build` gives the step to time; it allocates, so that setting up a table costs nothing. `op` and `dtype` replace
    those of the table. `work` is that of the step in units of the floor's step, the same for every provider of an op,
    whatever it executes; None where the two have no unit in common. `floor` names the provider that is the floor, the
    first of the table where it is empty. `error` gives the relative error against fp64.
    """

    name: str
    build: Callable[[], Step]
    dtype: str = "float32"
    op: str = ""
    work: float | None = None
    floor: str = ""
    error: Callable[[], float] | None = None
    compiled: bool = False  # its first call compiles: it is not timed, and its memory is that of a later one
    elsewhere: bool = False  # in processes of its own, whose memory nobody counts here

    @property
    def key(self) -> str:
        return ", ".join(filter(None, (self.name, self.op, self.dtype)))


@dataclass
class Table:
    """Providers that are measured in turn in one run; the first is what ratios are to. `flop` and `bytes` are those
    of the floors' steps, of the product and of the copy."""

    op: str
    shape: str
    providers: list[Provider] = field(default_factory=list)
    flop: float = 0.0
    bytes: float = 0.0


@contextlib.contextmanager
def peer(name: str) -> Iterator[None]:
    """What imports a peer. Where that fails, the others go on, and `main` says so."""
    try:
        yield
    except Exception as error:  # of one that goes with another torch, it may be any
        ABSENT[name] = error.with_traceback(None)


def copy_of(x: Callable[[], Tensor], dtype: str = "float32") -> Provider:
    """The floor of what moves bytes: a copy of a tensor into a kept one."""

    def build() -> Step:
        source = x().detach()
        kept = torch.empty_like(source)
        return lambda: kept.copy_(source)

    return Provider(COPY, build, dtype, work=1.0, floor=COPY)


def product_of(N: int, K: int, D: int, dtype: str = "float32") -> Provider:
    """The floor of what multiplies: (N, D) by (D, K) into a kept output; by blocks of rows where that is large."""

    def build() -> Step:
        kind = getattr(torch, dtype)
        x, y = (torch.randn(height, D, device=machine.DEVICE, dtype=kind) for height in (N, K))
        rows = min(N, LARGEST_PRODUCT // (K * kind.itemsize))
        kept = torch.empty(rows, K, device=machine.DEVICE, dtype=kind)
        return lambda: [torch.mm(block, y.T, out=kept[: len(block)]) for block in x.split(rows)]

    return Provider(PRODUCT, build, dtype, work=1.0, floor=PRODUCT)


def square_product(dtype: str = "float32") -> Provider:
    """The floor of whole networks and steps, whose work is their flop over SQUARE.

    In bf16 where the network is and the device has instructions for it; elsewhere fp32 is the faster.
    """
    fast = machine.DEVICE == "cuda" or machine.instruction_set() == "AMX-BF16"
    return product_of(SIDE, SIDE, SIDE, "bfloat16" if fast and dtype.startswith("bfloat16") else "float32")


def flop_of(make: Callable[[], nn.Module], *shape: int, backward: bool = False) -> float:
    """Of the convolutions and products of one pass through a network, on the meta device, where nothing is computed."""
    # The counter takes the weight's gradient of grouped convolutions for that of dense ones; each of the two gradients
    # has as many products as the pass forward.
    gradients = {torch.ops.aten.convolution_backward: _flop_of_gradients}
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=gradients) as counted:
        network, x = make().train(backward), torch.empty(shape)
        with torch.set_grad_enabled(backward):
            y = network(x)
        if backward:
            y.sum().backward()
    return float(counted.get_total_flops())


def _flop_of_gradients(dy: Any, x: Any, w: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    transposed, wanted = rest[4], rest[7]
    return sum(wanted[:2]) * conv_flop_count(x, w, dy, transposed)


def relative_error(values: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """The largest, in the norm of whole tensors."""
    return max(((v.double() - t).norm() / t.norm()).item() for v, t in zip(values, truths, strict=True))


# ---- measuring


def measure(
    table: Table, seconds: float, allocator: str = "default", quick: bool = False
) -> tuple[list[Row], list[str]]:
    """The rows of a table, all of one run, and which providers failed: those have none, and are said. A provider that
    memory does not suffice for has a row without a time.

    On a GPU ms is its own time, from a cold L2 cache; ms_call is that of a call on an idle one, launches included,
    until its result is there.
    """
    import torch._dynamo  # noqa: F401, which an optimizer's first step would import, and be timed and weighed with

    on_gpu = machine.DEVICE == "cuda"
    least = {"seconds": seconds / 3, "slow": 1.0} if on_gpu else {"seconds": seconds}  # a third for each way to time
    least = {"seconds": 0.3, "rounds": 3, "slow": 2.0} if quick else least
    failed: list[str] = []

    def guard(key: str) -> contextlib.AbstractContextManager[None]:
        return processes.going_on(f"{table.op}, {table.shape}, allocator {allocator}, {key}", failed, Exception)

    def in_turn(cold: bool = False, idle: bool = False) -> dict[str, list[float]]:
        times = timing.interleave(steps, cold=cold, idle=idle, guard=guard, **least)
        for key in steps.keys() - times.keys():
            del steps[key]
        return times

    if on_gpu:
        memory.take_workspaces()
    peaks: dict[str, float | None] = {}
    for p in table.providers:
        with guard(p.key):
            peaks[p.key] = 0.0 if p.compiled or p.elsewhere else memory.first_call(p.build)
    steps: dict[str, Step] = {}
    for p in table.providers:
        if peaks.get(p.key) is not None:
            with guard(p.key):
                step = p.build()
                if p.compiled:
                    timing.waited(step)()
                steps[p.key] = step
    measured = in_turn(cold=True)
    warm = in_turn() if on_gpu else {}
    calls = in_turn(cold=True, idle=True) if on_gpu else {}
    first = table.providers[0]
    floors = {p.floor or first.name for p in table.providers if p.work is not None}
    beside: dict[str, Row] = {}  # memory and error, by the key of a provider that has not failed
    for p in table.providers:
        if p.key in steps:
            with guard(p.key):
                found: Row = {}
                if allocator == "default" and p.name not in floors and not p.elsewhere:
                    found["extra_mb"] = memory.extra_memory(steps[p.key]) if p.compiled else peaks[p.key]
                if p.error is not None:
                    found["error"] = p.error()
                beside[p.key] = found
    ms = {key: timing.summary(measured[key])["ms"] for key in beside}
    floor_ms = {p.name: ms[p.key] for p in table.providers if p.name in floors and p.key in ms}
    rows: list[Row] = []
    for p in table.providers:
        row: Row = {"op": p.op or table.op, "shape": table.shape, "dtype": p.dtype, "provider": p.name}
        row |= {"allocator": allocator, "to": first.name}
        if p.key not in ms:
            if p.key in peaks and peaks[p.key] is None:
                rows.append(row)
            continue
        rows.append(row)
        row |= timing.summary(measured[p.key])
        others = {"ms_warm_l2": warm, "ms_call": calls}
        row |= {column: timing.summary(times[p.key])["ms"] for column, times in others.items() if times}
        row |= {"ratio": row["ms"] / ms[first.key]} if first.key in ms else {}
        if p.work is not None:
            floor = p.floor or first.name
            row |= {"x_floor": row["ms"] / floor_ms[floor] / p.work} if floor in floor_ms else {}
            row |= {"tflops": p.work * table.flop / row["ms"] / 1e9} if table.flop and floor != COPY else {}
            row |= {"gb_per_s": p.work * table.bytes / row["ms"] / 1e6} if table.bytes and floor != PRODUCT else {}
        row |= beside[p.key]
    return rows, failed


# ---- a bench as a program


def main(
    about: str | None,
    cases: Callable[[bool], Iterable[Sequence[Any]]],
    setup: Callable[..., Table],
    *,
    seconds: float = 5.0,
    allocators: Sequence[str] = ("default", "warm"),
) -> None:
    """The command line of a bench: each case is measured in a process of its own, shown, and saved at once.

    `--quick` takes the small cases for a moment each and leaves the tracked results as they are; `--resume` goes on
    where a run at this commit was interrupted; `--profile` profiles the first step of ours of the first case instead.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help=f"small cases, rows to {results.QUICK_RESULTS.relative_to(results.ROOT)}"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases that hold this text, such as 64x64x56x56")
    parser.add_argument("--resume", action="store_true", help="only cases without rows of this commit")
    parser.add_argument(
        "--profile", metavar="FOLDER", type=Path, help="leave a trace and a picture of ours there instead"
    )
    parser.add_argument("--worker", nargs=2, metavar=("ALLOCATOR", "JSON"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    if arguments.worker:
        allocator, case = arguments.worker[0], json.loads(arguments.worker[1])
        print(json.dumps(measure(setup(*case), seconds, allocator, arguments.quick)))
        return
    if arguments.profile:
        profile(setup(*next(iter(cases(arguments.quick)))), arguments.profile)
        return
    import torch._dynamo  # noqa: F401, as measure does: once here, for every fork

    quick = ["--quick"] if arguments.quick else []
    module = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
    rows: list[Row] = []
    failed: list[str] = []
    absent: set[str] = set()
    print(f"{(about or '').splitlines()[0]}\n{machine.device_name()}, {torch.get_num_threads()} threads", flush=True)
    with exit_on_signals():
        for case in cases(arguments.quick):
            given = json.dumps(case)
            if arguments.only not in given:
                continue
            for allocator in ("default",) if arguments.quick or machine.DEVICE == "cuda" else allocators:
                table = setup(*case)  # what it imports is there for the next case
                for name in ABSENT.keys() - absent:
                    print(f"{name} has no rows: {processes.in_a_line(ABSENT[name])}", file=sys.stderr, flush=True)
                absent |= ABSENT.keys()
                if arguments.resume and saved(table, allocator, arguments.quick):
                    continue
                work = functools.partial(measure, table, seconds, allocator, arguments.quick)
                with processes.going_on(f"{table.op}, {table.shape}, allocator {allocator}", failed):
                    measured, lacking = processes.apart(work, module, [*quick, "--worker", allocator, given], allocator)
                    failed += lacking
                    show(measured)
                    rows += measured
                    results.save(rows, arguments.quick)  # after each table: what an interruption leaves is kept
    failed += [name for name, error in ABSENT.items() if not isinstance(error, ImportError)]
    if failed:
        sys.exit(f"without rows: {'; '.join(failed)}")


def saved(table: Table, allocator: str, quick: bool = False, path: Path | None = None) -> bool:
    """Whether there are rows of all of a table's providers, measured under the conditions of this process."""
    path = path or (results.QUICK_RESULTS if quick else results.RESULTS)
    same = ("op", "shape", "dtype", "provider", "allocator", "device", "threads", "torch", "commit")
    here = results.conditions() | {"shape": table.shape, "allocator": allocator}
    with path.open(newline="") if path.exists() else io.StringIO() as file:
        there = {tuple(row[k] for k in same) for row in csv.DictReader(file)}
    own = (here | {"op": p.op or table.op, "dtype": p.dtype, "provider": p.name} for p in table.providers)
    return there.issuperset(tuple(str(row[k]) for k in same) for row in own)


def profile(measured: Table, folder: Path) -> None:
    """A trace of one step of the table's first provider of ours, for chrome://tracing or ui.perfetto.dev, and a picture
    of what takes longest in it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step = timing.waited(next(p for p in measured.providers if p.name.startswith("ssl_fast")).build())
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if machine.DEVICE == "cuda" else []
    with torch.profiler.profile(activities=activities) as recorded:
        step()
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{measured.op}_trace.json"
    recorded.export_chrome_trace(str(trace))
    with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    trace.unlink()

    own = f"self_{'device' if machine.DEVICE == 'cuda' else 'cpu'}_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: getattr(event, own))[-BARS:]
    total = sum(getattr(event, own) for event in recorded.key_averages())
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    bars = axis.barh([e.key[:60] for e in events], [getattr(e, own) / 1e3 for e in events])
    axis.bar_label(bars, [f"{getattr(e, own) / total:.0%}" for e in events], padding=3)
    axis.margins(x=0.1)  # where the longest bar's label stands
    axis.set(xlabel="ms")
    figure.suptitle(f"a step of {measured.op}, {measured.shape}, on {machine.device_name()}", fontsize=10)
    figure.savefig(folder / f"{measured.op}_profile.png", dpi=110)
    print(f"{trace}.gz and {folder / f'{measured.op}_profile.png'} written")


def show(rows: list[Row]) -> None:
    """A table with the columns that something stands in."""
    if not rows:
        return
    print(f"\n{rows[0]['op']}, {rows[0]['shape']}, allocator {rows[0].get('allocator', 'default')}")
    print(results.table(rows, [c for c in SHOWN if any(row.get(c, "") != "" for row in rows)]), flush=True)


def setups() -> dict[str, Any]:
    """The modules of the benches that have a `setup`, by the stem of their op."""
    files = sorted(Path(__file__).parent.glob("bench_*.py"))
    modules = {file.stem.removeprefix("bench_"): importlib.import_module(f"benches.{file.stem}") for file in files}
    return {stem: module for stem, module in modules.items() if hasattr(module, "setup")}
