"""Interleaved timing: of the CPU, or by the GPU's own clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from statistics import quantiles
from typing import Any

import torch

from benches import machine

AHEAD = 2_000_000  # cycles, a millisecond, that a GPU is busy for while Python launches a step

Step = Callable[[], Any]


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
    if cold and machine.DEVICE == "cuda":
        _empty_l2()
    if idle and machine.DEVICE == "cuda":
        torch.cuda.synchronize()
    if idle or machine.DEVICE == "cpu":
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
    torch.empty(256 << 20, dtype=torch.uint8, device=machine.DEVICE).zero_()


def waited(step: Step) -> Step:
    """The step, which ends where the device is done."""

    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run if machine.DEVICE == "cuda" else step


def summary(times: list[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile."""
    cuts = quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"ms": cuts[4], "ms_p20": cuts[1], "ms_p80": cuts[7]}
