"""Functions in processes of their own, forked from one that has imported what would take each of them seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["pytest", "torch._dynamo", "sklearn.datasets", "matplotlib.pyplot", "torch.utils.tensorboard", "ssl_fast.train"]
)


def start(folder: Path, name: str, function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Run function(*args) on one thread in `folder`; what it prints goes to the file NAME.log there."""
    folder.mkdir(parents=True, exist_ok=True)
    process = _CONTEXT.Process(target=_run, args=(folder, name, function, args), name=f"{folder}/{name}")
    process.start()
    return process


def start_group(world: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[BaseProcess]:
    """Run function(rank, world, *args) in `folder` in so many processes of a gloo group."""
    return [start(folder, f"rank{rank}", _of_group, rank, world, function, args) for rank in range(world)]


def finish(processes: list[BaseProcess], timeout: float = 600) -> None:
    """Wait for all, and show what those that failed have printed."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    failed = [process for process in processes if process.exitcode != 0]
    said = [f"{p.name}: {p.exitcode}\n{Path(f'{p.name}.log').read_text()[-3000:]}" for p in failed]
    for process in failed:
        process.kill()
    assert not failed, "\n".join(said)


def _run(folder: Path, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.chdir(folder)
    log = os.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    torch.set_num_threads(1)
    try:
        function(*args)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _of_group(rank: int, world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{Path.cwd()}/store", rank=rank, world_size=world)
    function(rank, world, *args)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
