"""What the benches share: one harness for their tables, interleaved timing, peak memory, and rows for results.csv.

A bench of an op is a file with `cases(quick)`, which lists what to measure, and `setup(*case)`, which gives a `Table`
of providers; `main` and `pytest benches/` do the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import datetime
import functools
import gc
import gzip
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ssl_fast.info import cpu_name
from ssl_fast.memory import free_memory, out_of_memory, resident_memory

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results.csv")
QUICK_RESULTS = ROOT / "out/bench/quick.csv"  # as ssl_fast/bench.py says
COLUMNS = ("op", "shape", "dtype", "provider", "allocator", "ms", "ms_p20", "ms_p80", "ms_warm_l2", "ms_call",
           "ratio", "to", "x_floor", "tflops", "gb_per_s", "data_wait", "extra_mb", "error", "device", "threads",
           "torch", "triton", "commit", "date")  # fmt: skip
SHOWN = ("op", "dtype", "provider", "ms", "ms_p20", "ms_p80", "ms_call", "ratio", "x_floor", "extra_mb", "error")
# Half of what eager PyTorch takes on a CPU is page faults: glibc maps tensors over 32 MiB afresh at every call. "warm"
# keeps them in the heap, for every provider alike.
ALLOCATORS = {
    "default": {},
    "warm": {"MALLOC_MMAP_THRESHOLD_": "68719476736", "MALLOC_TRIM_THRESHOLD_": "68719476736"},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AHEAD = 2_000_000  # cycles, a millisecond, that a GPU is busy for while Python launches a step
BARS = 12  # of a profile
COPY, PRODUCT = "copy_", "mm(out=)"  # the two floors
SIDE = 4096 if DEVICE == "cuda" else 1024  # of a product that runs at full speed
SQUARE = 2.0 * SIDE**3  # its flop
ABSENT: dict[str, Exception] = {}  # why a peer has no rows
LARGEST_PRODUCT = 1 << 30  # bytes of a floor's output: the floor is there for batches that no matrix of all pairs is

Row = dict[str, Any]
Step = Callable[[], Any]


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
        x, y = torch.randn(N, D, device=DEVICE, dtype=kind), torch.randn(K, D, device=DEVICE, dtype=kind)
        rows = min(N, LARGEST_PRODUCT // (K * kind.itemsize))
        kept = torch.empty(rows, K, device=DEVICE, dtype=kind)
        return lambda: [torch.mm(block, y.T, out=kept[: len(block)]) for block in x.split(rows)]

    return Provider(PRODUCT, build, dtype, work=1.0, floor=PRODUCT)


def square_product(dtype: str = "float32") -> Provider:
    """The floor of whole networks and steps, whose work is their flop over SQUARE.

    In bf16 where the network is and the device has instructions for it; elsewhere fp32 is the faster.
    """
    fast = DEVICE == "cuda" or instruction_set() == "AMX-BF16"
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

    on_gpu = DEVICE == "cuda"
    least = {"seconds": seconds / 3, "slow": 1.0} if on_gpu else {"seconds": seconds}  # a third for each way to time
    least = {"seconds": 0.3, "rounds": 3, "slow": 2.0} if quick else least
    failed: list[str] = []

    def guard(key: str) -> contextlib.AbstractContextManager[None]:
        return going_on(f"{table.op}, {table.shape}, allocator {allocator}, {key}", failed, Exception)

    def in_turn(cold: bool = False, idle: bool = False) -> dict[str, list[float]]:
        times = interleave(steps, cold=cold, idle=idle, guard=guard, **least)
        for key in steps.keys() - times.keys():
            del steps[key]
        return times

    if on_gpu:
        _take_workspaces()
    peaks: dict[str, float | None] = {}
    for p in table.providers:
        with guard(p.key):
            peaks[p.key] = _first_call(p)
    steps: dict[str, Step] = {}
    for p in table.providers:
        if peaks.get(p.key) is not None:
            with guard(p.key):
                step = p.build()
                if p.compiled:
                    waited(step)()
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
                    found["extra_mb"] = extra_memory(steps[p.key]) if p.compiled else peaks[p.key]
                if p.error is not None:
                    found["error"] = p.error()
                beside[p.key] = found
    ms = {key: timing(measured[key])["ms"] for key in beside}
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
        row |= timing(measured[p.key])
        row |= {f"ms_{how}": timing(times[p.key])["ms"] for how, times in (("warm_l2", warm), ("call", calls)) if times}
        row |= {"ratio": row["ms"] / ms[first.key]} if first.key in ms else {}
        if p.work is not None:
            floor = p.floor or first.name
            row |= {"x_floor": row["ms"] / floor_ms[floor] / p.work} if floor in floor_ms else {}
            row |= {"tflops": p.work * table.flop / row["ms"] / 1e9} if table.flop and floor != COPY else {}
            row |= {"gb_per_s": p.work * table.bytes / row["ms"] / 1e6} if table.bytes and floor != PRODUCT else {}
        row |= beside[p.key]
    return rows, failed


def _take_workspaces() -> None:
    """What cuBLAS keeps for each thread that multiplies, the backward's too: the memory of no provider."""
    x = torch.ones(16, 16, device=DEVICE, requires_grad=True)
    (x @ x).sum().backward()


def _first_call(provider: Provider) -> float | None:
    """MB that the first call adds to the peak; None where it runs out of memory.

    On a CPU in a fork of this process, and within the memory that is free: the system would end a process that takes
    more, and not raise. This process must not have computed anything yet: a fork has none of OpenMP's threads.

    Raises:
        Failed: for any other error, in its words.
    """

    def first_call() -> float | str | None:
        if DEVICE == "cpu":
            limit = _data_segment() + free_memory(torch.device("cpu")) - resident_memory("VmRSS")
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            return extra_memory(waited(provider.build()))  # a GPU's error is its own, not the next provider's
        except Exception as error:
            return None if out_of_memory(error) else in_a_line(error)

    if provider.compiled or provider.elsewhere:
        return 0.0
    found: float | str | None
    if DEVICE == "cuda":
        found = first_call()
        gc.collect()  # what the frames of an error, or a cycle, still hold is the next provider's
        torch.cuda.empty_cache()
    else:
        try:
            found = forked(first_call)
        except ChildProcessError as error:
            if error.errno is None:  # what is no exception of the provider's, shown above
                raise
            found = None  # a signal: memory ran out where nothing could be thrown
    if isinstance(found, str):
        raise Failed(found)
    return found


def forked(work: Callable[[], Any]) -> Any:
    """The result of `work` in a fork of this process, which spares it the imports."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: send.send(work()))
    child.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        child.join()
        raise _ended(child.exitcode or 0) from None
    finally:
        child.join()


class Failed(Exception):
    """An error of a provider in a line, without its frames and what they hold."""


@contextlib.contextmanager
def going_on(case: object, failed: list[str], errors: type[Exception] = ChildProcessError) -> Iterator[None]:
    """A case that ends without a result is said, and is in `failed`; the other cases go on."""
    try:
        yield
    except errors as error:
        print(f"{case}: {in_a_line(error)}", file=sys.stderr, flush=True)
        failed.append(str(case))


def in_a_line(error: Exception) -> str:
    """What ended a case."""
    if isinstance(error, ChildProcessError):
        return f"signal {error.errno} ended it, as where memory runs out" if error.errno else "failed, as shown above"
    return str(error) if isinstance(error, Failed) else shorten(f"{type(error).__name__}: {error}", 300)


def _ended(status: int) -> ChildProcessError:
    """With an errno where a signal ended it, as the system does where memory ran out; else its error is shown above."""
    return ChildProcessError(*(() if status >= 0 else (-status, "ended by a signal")))


def _data_segment() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def interleave(
    steps: Mapping[str, Step],
    *,
    seconds: float = 8.0,
    rounds: int = 5,
    slow: float = 5.0,
    cold: bool = False,
    idle: bool = False,
    guard: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> dict[str, list[float]]:
    """Milliseconds of each step, measured in turn round by round, so that a drift of the machine meets all alike.

    One round warms up. At least `rounds` rounds are timed, and more while they fit into `seconds`. A step that takes
    more than `slow` seconds is left at its first time. On a GPU, `cold` empties its L2 cache in front of each step, and
    `idle` takes the time of a call from an idle one, launches included. A step whose error `guard(name)` keeps to
    itself has no times.
    """
    times: dict[str, list[float]] = {}
    for name, step in steps.items():
        with guard(name):
            first = _timed(step, cold, idle)
            times[name] = [first] if first > slow * 1e3 else []
    quick = [name for name in times if not times[name]]
    start, done = time.perf_counter(), 0
    while quick and (done < rounds or time.perf_counter() - start < seconds):
        for name in tuple(quick):
            with guard(name):
                times[name].append(_timed(steps[name], cold, idle))
                continue
            quick.remove(name)
            del times[name]
        done += 1
    return times


def _timed(step: Step, cold: bool, idle: bool) -> float:
    if cold and DEVICE == "cuda":
        _empty_l2()
    if idle and DEVICE == "cuda":
        torch.cuda.synchronize()
    if idle or DEVICE == "cpu":
        call = waited(step)
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    # Short kernels do not wait for their launches: those are queued while the GPU is busy. It is so for every provider,
    # so that none is held to its launches that another is spared.
    torch.cuda._sleep(AHEAD)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def _empty_l2() -> None:
    torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE).zero_()


def waited(step: Step) -> Step:
    """The step, which ends where the device is done."""

    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run if DEVICE == "cuda" else step


def timing(times: list[float]) -> Row:
    """Median, 20th and 80th percentile."""
    cuts = quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"ms": cuts[4], "ms_p20": cuts[1], "ms_p80": cuts[7]}


def extra_memory(step: Step) -> float:
    """MB by which one call raises the peak memory of this process, less the code that it reads in; of the device's
    memory where there is a GPU."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with contextlib.suppress(AttributeError, OSError):  # what glibc keeps of earlier calls would hide the peak
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, code = resident_memory("VmRSS"), resident_memory("RssFile")
    step()
    return max(0, resident_memory("VmHWM") - before - (resident_memory("RssFile") - code)) / 1e6


def apart(work: Callable[[], Any], module: str, arguments: Iterable[str], allocator: str = "default") -> Any:
    """The result of `work`, or of `python -m module arguments`, which do the same, in a process of its own.

    A fork is spared the imports, but has the allocator of this process, and no use of its CUDA.
    """
    if allocator == "default" and DEVICE == "cpu":
        return forked(work)
    return in_fresh_process(module, arguments, allocator)


def in_fresh_process(module: str, arguments: Iterable[str], allocator: str = "default") -> Any:
    """Run `python -m module arguments` and return the JSON of its last line."""
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **ALLOCATORS[allocator]},
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    if result.returncode:
        raise _ended(result.returncode)
    return json.loads(result.stdout.splitlines()[-1])


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
    parser.add_argument("--quick", action="store_true", help=f"small cases, rows to {QUICK_RESULTS.relative_to(ROOT)}")
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
    print(f"{(about or '').splitlines()[0]}\n{device_name()}, {torch.get_num_threads()} threads", flush=True)
    for case in cases(arguments.quick):
        given = json.dumps(case)
        if arguments.only not in given:
            continue
        for allocator in ("default",) if arguments.quick or DEVICE == "cuda" else allocators:
            table = setup(*case)  # what it imports is there for the next case
            for name in ABSENT.keys() - absent:
                print(f"{name} has no rows: {in_a_line(ABSENT[name])}", file=sys.stderr, flush=True)
            absent |= ABSENT.keys()
            if arguments.resume and saved(table, allocator, arguments.quick):
                continue
            work = functools.partial(measure, table, seconds, allocator, arguments.quick)
            with going_on(f"{table.op}, {table.shape}, allocator {allocator}", failed):
                measured, lacking = apart(work, module, [*quick, "--worker", allocator, given], allocator)
                failed += lacking
                show(measured)
                rows += measured
                save(rows, arguments.quick)  # after each table: what an interruption leaves is kept
    failed += [name for name, error in ABSENT.items() if not isinstance(error, ImportError)]
    if failed:
        sys.exit(f"without rows: {'; '.join(failed)}")


def profile(measured: Table, folder: Path) -> None:
    """A trace of one step of the table's first provider of ours, for chrome://tracing or ui.perfetto.dev, and a picture
    of what takes longest in it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step = waited(next(p for p in measured.providers if p.name.startswith("ssl_fast")).build())
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if DEVICE == "cuda" else []
    with torch.profiler.profile(activities=activities) as recorded:
        step()
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{measured.op}_trace.json"
    recorded.export_chrome_trace(str(trace))
    with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    trace.unlink()

    own = f"self_{'device' if DEVICE == 'cuda' else 'cpu'}_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: getattr(event, own))[-BARS:]
    total = sum(getattr(event, own) for event in recorded.key_averages())
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    bars = axis.barh([e.key[:60] for e in events], [getattr(e, own) / 1e3 for e in events])
    axis.bar_label(bars, [f"{getattr(e, own) / total:.0%}" for e in events], padding=3)
    axis.margins(x=0.1)  # where the longest bar's label stands
    axis.set(xlabel="ms")
    figure.suptitle(f"a step of {measured.op}, {measured.shape}, on {device_name()}", fontsize=10)
    figure.savefig(folder / f"{measured.op}_profile.png", dpi=110)
    print(f"{trace}.gz and {folder / f'{measured.op}_profile.png'} written")


def show(rows: list[Row]) -> None:
    """A table with the columns that something stands in."""
    if not rows:
        return
    print(f"\n{rows[0]['op']}, {rows[0]['shape']}, allocator {rows[0].get('allocator', 'default')}")
    print(table(rows, [c for c in SHOWN if any(row.get(c, "") != "" for row in rows)]), flush=True)


def setups() -> dict[str, Any]:
    """The modules of the benches that have a `setup`, by the stem of their op."""
    files = sorted(Path(__file__).parent.glob("bench_*.py"))
    modules = {file.stem.removeprefix("bench_"): importlib.import_module(f"benches.{file.stem}") for file in files}
    return {stem: module for stem, module in modules.items() if hasattr(module, "setup")}


# ---- rows


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"{cpu_name()} ({instruction_set()})"


def instruction_set() -> str:
    """The best matrix instructions of this CPU, which decide what a row can reach."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    names = (("AMX-BF16", " amx_bf16"), ("AVX-512", " avx512f"), ("AVX2", " avx2"))
    return next((name for name, flag in names if flag in flags), "baseline")


@functools.cache
def conditions() -> Row:
    """Of every row of this process."""
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _commit() -> str:
    """Of a tree in which a tracked file differs, other than the rows, the pages that show them, and tests, with what it
    holds, so that two such trees are not taken for one. SSL_FAST_COMMIT names that of a copy without git."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except FileNotFoundError:
            return ""

    others = (f":!{path}" for path in (RESULTS.relative_to(ROOT), "*.md", "docs", "tests"))
    head = git("rev-parse", "--short", "HEAD") or os.environ.get("SSL_FAST_COMMIT", "")
    if head and not git("diff", "--name-only", "HEAD", "--", ".", *others):
        return head
    return f"{head or 'unknown'}-dirty-{digest('ssl_fast', 'kernels', 'csrc', 'benches')}"


def digest(*folders: str) -> str:
    """Of the sources in these folders."""
    found = hashlib.sha1()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h"):
                found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:8]


def saved(table: Table, allocator: str, quick: bool = False, path: Path | None = None) -> bool:
    """Whether there are rows of all of a table's providers, measured under the conditions of this process."""
    path = path or (QUICK_RESULTS if quick else RESULTS)
    same = ("op", "shape", "dtype", "provider", "allocator", "device", "threads", "torch", "commit")
    here = conditions() | {"shape": table.shape, "allocator": allocator}
    with path.open(newline="") if path.exists() else io.StringIO() as file:
        there = {tuple(row[k] for k in same) for row in csv.DictReader(file)}
    own = (here | {"op": p.op or table.op, "dtype": p.dtype, "provider": p.name} for p in table.providers)
    return there.issuperset(tuple(str(row[k]) for k in same) for row in own)


def save(rows: list[Row], quick: bool = False, path: Path | None = None) -> None:
    """Replace what the table has of these ops, shapes, dtypes and allocators on this device; the other rows stay."""
    path = path or (QUICK_RESULTS if quick else RESULTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    here = conditions()
    fresh = [{column: _cell((here | row).get(column, "")) for column in COLUMNS} for row in rows]
    same = ("op", "shape", "dtype", "allocator", "device")
    replaced = {tuple(r[k] for k in same) for r in fresh}
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [r for r in csv.DictReader(file) if tuple(r[k] for k in same) not in replaced]
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)  # a row from before a column was added has nothing there
        writer.writeheader()
        writer.writerows(kept + fresh)
    partial.replace(path)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[Row], columns: Iterable[str]) -> str:
    """Rows as a Markdown table."""
    columns = list(columns)
    cells = [columns, ["---"] * len(columns), *([_cell(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells)
