"""`ssl-fast bench`: the benches of a checkout, one after the other."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ssl_fast._extras import nearest

ROOT = Path(__file__).parents[1]
PART_OF = {"clip": "info_nce", "sup_con": "info_nce"}  # ops that share a bench with another


def bench(*ops: str, device: str | None = None, quick: bool = False) -> dict[str, Any]:
    """Measure ops against plain PyTorch and the libraries at hand, beside the floors of this machine.

    Each row of a table is the median of interleaved runs, with the 20th and 80th percentile, the ratio to the table's
    first row, the distance to the floor (a copy or a matrix product of the same run), the memory that a first call
    adds, and the error against fp64. A table's rows are kept as soon as it is done, so Ctrl-C loses one table at most.

    Args:
        ops: such as nt_xent or ema; none for all.
        device: cpu or cuda; none takes the GPU where there is one.
        quick: small shapes for a moment each, rows to out/bench/quick.csv; otherwise rows replace those of this machine
            in benches/results.csv.

    Raises:
        ValueError: for an op without a bench, or a device that is not there.
        FileNotFoundError: in an installed package, which has no benches.
        ChildProcessError: where a bench failed, or a provider in one; the others have run.

    Example:
        >>> from ssl_fast.bench import bench
        >>> bench("nt_xent", "ema", quick=True)
    """
    benches = stems()
    allowed = sorted([*benches, *PART_OF])
    for op in ops:
        if op not in allowed:
            raise ValueError(f"op: got {op!r}, {nearest(op, allowed)}allowed: {', '.join(allowed)}")
    check_device(device)
    names, failed, start = list(dict.fromkeys(ops)) or benches, [], time.monotonic()
    rows = ROOT / ("out/bench/quick.csv" if quick else "benches/results.csv")
    before = _lines(rows)
    for done, name in enumerate(names):
        bar = "#" * round(24 * done / len(names))
        print(f"\n[{bar:24}] {done + 1}/{len(names)} {name}, {time.monotonic() - start:.0f} s\n", flush=True)
        if _run(name, device, quick):
            failed.append(name)
    if failed:
        raise ChildProcessError(f"failed, as said above: {', '.join(failed)}; the rows of the others are in {rows}")
    return {"new rows": len(_lines(rows) - before), "in": str(rows), "seconds": round(time.monotonic() - start)}


def check_device(device: str | None) -> None:
    """Raise where there is no such device here; None takes what there is."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if device not in (None, *devices):
        raise ValueError(
            f"device: got {device!r}, allowed here: {', '.join(devices)}; `ssl-fast info` says what there is"
        )


def stems() -> list[str]:
    """The ops that have a bench of their own."""
    found = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benches").glob("bench_*.py"))
    if not found:
        raise FileNotFoundError(
            "the benches are part of the repository, not of the installed package: "
            "clone it and run `ssl-fast bench` or `make bench` there"
        )
    return found


def _run(name: str, device: str | None, quick: bool) -> int:
    """The exit status of a bench."""
    command = [sys.executable, "-m", f"benches.bench_{PART_OF.get(name, name)}", *(["--quick"] if quick else [])]
    command += ["--only", f'"{name}"'] if name in PART_OF else []
    # Threads that spin where they wait take a busy machine's cores from what they wait for: small shapes took minutes.
    env = {**({"OMP_WAIT_POLICY": "passive"} if quick else {}), **os.environ}
    env |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return run_group(command, env=env)


def run_group(command: list[str], seconds: float | None = None, **options: Any) -> int:
    """The exit status of a command, which ends with this process, and after so many seconds, with all that it started.

    Raises:
        subprocess.TimeoutExpired: after these seconds.
    """
    process: subprocess.Popen[Any] | None = None
    with exit_on_signals():
        try:
            with _signals_wait():
                process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)
            return process.wait(seconds)
        except BaseException:
            for signum in (signal.SIGTERM, signal.SIGKILL):
                if process is None:
                    break
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signum)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            raise


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit in the block, as Ctrl-C raises KeyboardInterrupt."""

    def leave(signum: int, frame: Any) -> None:
        sys.exit(128 + signum)

    main = threading.current_thread() is threading.main_thread()  # others may not set handlers
    taken = [
        s for s in (signal.SIGTERM, signal.SIGHUP) if main and signal.getsignal(s) is signal.SIG_DFL
    ]  # not nohup's
    for signum in taken:
        signal.signal(signum, leave)
    try:
        yield
    finally:
        for signum in taken:
            signal.signal(signum, signal.SIG_DFL)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that have a handler reach it when the block ends: within Popen, they would leave a process unknown."""
    arrived: list[int] = []
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    held = {signum: handler for signum, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        held = {}
    for signum in held:
        signal.signal(signum, lambda signum, frame: arrived.append(signum))
    try:
        yield
    finally:
        for signum, handler in held.items():
            signal.signal(signum, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def _lines(path: Path) -> set[tuple[str, ...]]:
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(line) for line in csv.reader(file)}
