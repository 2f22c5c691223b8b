"""What the benches share: interleaved timing, the peak memory of a first call, and rows for results.csv."""

from __future__ import annotations

import csv
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from ssl_fast.info import cpu_name

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = ("op", "shape", "dtype", "provider", "allocator", "ms", "ms_p20", "ms_p80", "ratio", "to", "tflops",
           "gb_per_s", "extra_mb", "error", "device", "threads", "torch", "triton", "commit", "date")  # fmt: skip
# Half of what eager PyTorch takes on a CPU is page faults: glibc maps tensors over 32 MiB afresh at every call. "warm"
# keeps them in the heap, for every provider alike.
ALLOCATORS = {
    "default": {},
    "warm": {"MALLOC_MMAP_THRESHOLD_": "68719476736", "MALLOC_TRIM_THRESHOLD_": "68719476736"},
}

Row = dict[str, Any]


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_name()} ({instruction_set()})"


def instruction_set() -> str:
    """The best matrix instructions of this CPU, which decide what a row can reach."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    names = (("AMX-BF16", " amx_bf16"), ("AVX-512", " avx512f"), ("AVX2", " avx2"))
    return next((name for name, flag in names if flag in flags), "baseline")


def interleave(
    steps: Mapping[str, Callable[[], Any]], *, seconds: float = 8.0, rounds: int = 5, slow: float = 5.0
) -> dict[str, list[float]]:
    """Milliseconds of each step, measured in turn round by round, so that a drift of the machine meets all alike.

    One round warms up. At least `rounds` rounds are timed, and more while they fit into `seconds`. A step that takes
    more than `slow` seconds is left at its first time.
    """
    first = {name: _timed(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [t] if t > slow * 1e3 else [] for name, t in first.items()}
    quick = [name for name in steps if not times[name]]
    start, done = time.perf_counter(), 0
    while quick and (done < rounds or time.perf_counter() - start < seconds):
        for name in quick:
            times[name].append(_timed(steps[name]))
        done += 1
    return times


def _timed(step: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def timing(times: list[float]) -> Row:
    """Median, 20th and 80th percentile."""
    cuts = quantiles(times, n=10) if len(times) > 1 else times * 9
    return {"ms": cuts[4], "ms_p20": cuts[1], "ms_p80": cuts[7]}


def extra_memory(step: Callable[[], Any]) -> float:
    """MB by which one call raises the peak memory of this process; of the device's memory where there is a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1e3


def _status(field: str) -> int:
    """A field of /proc/self/status, in kB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1])


def in_fresh_process(module: str, arguments: Iterable[str], allocator: str = "default") -> Any:
    """Run `python -m module arguments` and return the JSON of its last line."""
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **ALLOCATORS[allocator]},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    return json.loads(result.stdout.splitlines()[-1])


def conditions() -> Row:
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
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except FileNotFoundError:
        return ""


def save(rows: list[Row], path: Path = RESULTS) -> None:
    """Replace the rows of these ops, shapes and devices in the table; the others stay."""
    fresh = [{column: _cell(row.get(column, "")) for column in COLUMNS} for row in rows]
    replaced = {(r["op"], r["shape"], r["device"]) for r in fresh}
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [r for r in csv.DictReader(file) if (r["op"], r["shape"], r["device"]) not in replaced]
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
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
