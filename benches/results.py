"""Rows, in benches/results.csv and on paper, and the conditions that they are of."""

from __future__ import annotations

import csv
import datetime
import functools
import hashlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benches import machine

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results.csv")
QUICK_RESULTS = ROOT / "out/bench/quick.csv"  # as ssl_fast/bench.py says
COLUMNS = ("op", "shape", "dtype", "provider", "allocator", "ms", "ms_p20", "ms_p80", "ms_warm_l2", "ms_call",
           "ratio", "to", "x_floor", "tflops", "gb_per_s", "data_wait", "extra_mb", "error", "device", "threads",
           "torch", "triton", "commit", "date")  # fmt: skip

Row = dict[str, Any]


@functools.cache
def conditions() -> Row:
    """Of every row of this process."""
    return {
        "device": machine.device_name(),
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


def table(rows: list[Row], columns: Iterable[str]) -> str:
    """Rows as a Markdown table."""
    columns = list(columns)
    cells = [columns, ["---"] * len(columns), *([_cell(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
