"""What stands beside the training loop: the clock, the bar, and the answer to Ctrl-C."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ssl_fast._extras import require

log = logging.getLogger("ssl_fast")
T = TypeVar("T")


class Interruption:
    """Ctrl-C and SIGTERM set `.requested` in the block, so that a step is never left half done; a second one raises."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, signum: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> Interruption:
        main = threading.current_thread() is threading.main_thread()  # others may not set handlers
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM) if main}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


class Stopwatch:
    """Images a second, and the share of the time in which the training waited for its data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start, self._waited, self._images = time.perf_counter(), 0.0, 0

    def waiting(self, iterable: Iterable[T]) -> Iterator[T]:
        """Iterate, and count the time until each item is there as waiting."""
        iterator = iter(iterable)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield item

    def count(self, images: int) -> None:
        self._images += images

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the lap."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """`images_per_s` and `data_wait` (0 to 1) since the last lap."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        row = {"images_per_s": float(f"{self._images / seconds:.4g}"), "data_wait": round(self._waited / seconds, 4)}
        self.restart()
        return row


class Progress:
    """A bar on a terminal; elsewhere one plain line a minute."""

    def __init__(self, total: int, step: int, every: float = 60.0, *, shown: bool = True) -> None:
        self._visible = shown
        self._every, self._printed = every, time.monotonic()
        self._shown: dict[str, Any] = {}
        self._bar = None
        if shown and sys.stderr.isatty():
            self._bar = require("tqdm", "the progress bar").tqdm(
                total=total, initial=step, unit="step", dynamic_ncols=True
            )
        self._total = total

    def show(self, row: dict[str, Any], line: bool = False) -> None:
        """Show a row of metrics; as a line of the log too where `line`, or where a minute has passed without one."""
        if not self._visible:
            return
        self._shown |= row
        r = self._shown
        parts = [f"loss {r['loss']:.4f}"] if "loss" in r else []
        parts += [f"{r['images_per_s']:.0f} images/s, data wait {r['data_wait']:.0%}"] if "images_per_s" in r else []
        parts += [f"{name} {r[key]:.2%}" for key, name in (("knn", "kNN"), ("probe", "probe")) if key in r]
        parts += [f"std {r['std']:.4f}"] if "std" in r else []
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(r["step"] - self._bar.n)
        if line or (self._bar is None and time.monotonic() - self._printed >= self._every):
            self._printed = time.monotonic()
            log.info("epoch %.4g, step %d of %d: %s", r["epoch"], r["step"], self._total, ", ".join(parts))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Console(logging.Handler):
    """Log lines on stderr, above the bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        require("tqdm", "the log").tqdm.write(self.format(record), file=sys.stderr)


def counted(items: Iterable[T], total: int, title: str, every: float = 60.0) -> Iterator[T]:
    """Iterate with a bar on a terminal; elsewhere with one plain line a minute."""
    if sys.stderr.isatty():
        yield from require("tqdm", "the progress bar").tqdm(items, title, total, leave=False, dynamic_ncols=True)
        return
    printed = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - printed >= every:
            printed = time.monotonic()
            log.info("%s: %d of %d", title, done, total)
        yield item


@contextmanager
def console() -> Iterator[None]:
    """Show the log of the block on stderr, where nothing else takes it."""
    if log.hasHandlers():
        yield
        return
    handler, level = Console(), log.level
    handler.setLevel(logging.INFO)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
