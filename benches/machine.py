"""The machine at hand: its device, and what it is called in rows."""

from __future__ import annotations

from pathlib import Path

import torch

from ssl_fast.info import cpu_name

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
