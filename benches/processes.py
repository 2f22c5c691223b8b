"""Processes of their own: for another allocator, a peak of memory, or a case that may end its process."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

from benches import machine

# Half of what eager PyTorch takes on a CPU is page faults: glibc maps tensors over 32 MiB afresh at every call. "warm"
# keeps them in the heap, for every provider alike.
ALLOCATORS = {
    "default": {},
    "warm": {"MALLOC_MMAP_THRESHOLD_": "68719476736", "MALLOC_TRIM_THRESHOLD_": "68719476736"},
}


def apart(work: Callable[[], Any], module: str, arguments: Iterable[str], allocator: str = "default") -> Any:
    """The result of `work`, or of `python -m module arguments`, which do the same, in a process of its own.

    A fork is spared the imports, but has the allocator of this process, and no use of its CUDA.
    """
    if allocator == "default" and machine.DEVICE == "cpu":
        return forked(work)
    return in_fresh_process(module, arguments, allocator)


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
    except BaseException:
        child.terminate()
        raise
    finally:
        child.join()


def in_fresh_process(module: str, arguments: Iterable[str], allocator: str = "default") -> Any:
    """Run `python -m module arguments` and return the JSON of its last line."""
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **ALLOCATORS[allocator]},
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if result.returncode:
        raise _ended(result.returncode)
    return json.loads(result.stdout.splitlines()[-1])


def _ended(status: int) -> ChildProcessError:
    """With an errno where a signal ended it, as the system does where memory ran out; else its error is shown above."""
    return ChildProcessError(*(() if status >= 0 else (-status, "ended by a signal")))


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
