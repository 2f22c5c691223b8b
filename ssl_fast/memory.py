"""How much memory there is, and how much a piece of work takes at its peak: of the GPU, or of this process on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssl_fast._distributed import rank_and_world

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
SHARE_OF_FREE = 0.9  # what is left goes to fragments and to what nobody counted
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, v2 and v1
USED = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")
CACHE = (  # pages of files, counted as used and given back on demand
    ("/sys/fs/cgroup/memory.stat", "inactive_file"),
    ("/sys/fs/cgroup/memory/memory.stat", "total_inactive_file"),
)


def parse_memory(value: str | int) -> int:
    """Bytes of "20GiB", "512 MB" or a whole number of bytes.

    Raises:
        ValueError: for what is none of these, or not above 0.

    Example:
        >>> parse_memory("20GiB")  # 21474836480
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
    if not match or match[2] not in UNITS or not (number := int(float(match[1]) * UNITS[match[2]])):
        raise ValueError(f"memory: got {value!r}, allowed: a size above 0 with its unit, such as 20GiB or 800MB")
    return number


def format_memory(number: float) -> str:
    """In GiB, or in MiB below one."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def free_memory(device: torch.device) -> int:
    """Bytes that this process may take in all, what it has already included: a share of what is free now, of which the
    processes of a run on one machine's CPUs take equal parts."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        taken = torch.cuda.memory_allocated(device)
        return taken + int((free + torch.cuda.memory_reserved(device) - taken) * SHARE_OF_FREE)
    free = _field("/proc/meminfo", "MemAvailable")
    for limit, used, (path, field) in zip(LIMITS, USED, CACHE, strict=True):
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
            with contextlib.suppress(OSError, ValueError):  # the limit stands without it
                left += int(dict(line.split() for line in Path(path).read_text().splitlines()).get(field, 0))
            free = min(free, left)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", rank_and_world()[1]))
    return resident_memory("VmRSS") + int(free * SHARE_OF_FREE) // processes


def resident_memory(field: str) -> int:
    """Bytes of this process in RAM: "VmRSS" now, "VmHWM" at the peak."""
    return _field("/proc/self/status", field)


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that are taken at the peak while `work` runs, those already taken included.

    Raises:
        RuntimeError: where the system does not count them (a CPU without Linux's /proc).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(AttributeError, OSError):  # glibc keeps what was freed, which would count as taken
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
    except OSError as error:
        raise RuntimeError(f"this system does not count the peak memory of a process ({error})") from error
    work()
    return resident_memory("VmHWM")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on a CPU."""
    ran_out = ("out of memory", "can't allocate memory", "not enough memory")
    of_onednn = ("could not create a primitive", "could not execute a primitive")  # the whole message
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and (any(words in str(error) for words in ran_out) or str(error) in of_onednn)
    )


def _field(path: str, field: str) -> int:
    line = next(x for x in Path(path).read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024
