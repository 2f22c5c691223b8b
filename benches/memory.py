"""The memory that a step takes beyond what is there: of the GPU, or of this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from collections.abc import Callable
from pathlib import Path

import torch

from benches import machine
from benches.processes import Failed, forked, in_a_line
from benches.timing import Step, waited
from ssl_fast.memory import free_memory, out_of_memory, resident_memory


def extra_memory(step: Step) -> float:
    """MB by which one call raises the peak memory of this process, less the code that it reads in; of the device's
    memory where there is a GPU."""
    if machine.DEVICE == "cuda":
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


def first_call(build: Callable[[], Step]) -> float | None:
    """MB that the first call adds to the peak; None where it runs out of memory.

    On a CPU in a fork of this process, and within the memory that is free: the system would end a process that takes
    more, and not raise. This process must not have computed anything yet: a fork has none of OpenMP's threads.

    Raises:
        Failed: for any other error, in its words.
    """

    def peak() -> float | str | None:
        if machine.DEVICE == "cpu":
            limit = _data_segment() + free_memory(torch.device("cpu")) - resident_memory("VmRSS")
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            return extra_memory(waited(build()))  # a GPU's error is its own, not the next provider's
        except Exception as error:
            return None if out_of_memory(error) else in_a_line(error)

    found: float | str | None
    if machine.DEVICE == "cuda":
        found = peak()
        gc.collect()  # what the frames of an error, or a cycle, still hold is the next provider's
        torch.cuda.empty_cache()
    else:
        try:
            found = forked(peak)
        except ChildProcessError as error:
            if error.errno is None:  # what is no exception of the provider's, shown above
                raise
            found = None  # a signal: memory ran out where nothing could be thrown
    if isinstance(found, str):
        raise Failed(found)
    return found


def _data_segment() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def take_workspaces() -> None:
    """What cuBLAS keeps for each thread that multiplies, the backward's too: the memory of no provider."""
    x = torch.ones(16, 16, device=machine.DEVICE, requires_grad=True)
    (x @ x).sum().backward()
