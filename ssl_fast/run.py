"""The folder of a run: arguments, metrics, log, TensorBoard events and checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_fast._checks import a_path, check_flags
from ssl_fast._extras import require
from ssl_fast.progress import Console

log = logging.getLogger("ssl_fast")

# What may differ between a run and its continuation: where it runs, not what it computes.
FREE = ("data_dir", "device", "num_workers", "memory")


class Run:
    """Everything of a run lies in `out`:

        args.yaml  metrics.jsonl  train.log  checkpoints/last.pt  plots/  report.html  events.out.tfevents.*

    The constructor only checks: nothing is written before `open`, and nothing at all where `writes` is False, by the
    other processes of a run. An argument that a run was saved without has its value in `defaults`.
    """

    def __init__(
        self,
        out: str | Path,
        config: dict[str, Any],
        resume: bool | str,
        overwrite: bool,
        defaults: dict[str, Any],
        writes: bool = True,
    ) -> None:
        self.out = a_path("out", out, "the path of a folder for the run, such as out/simclr")
        check_flags(overwrite=overwrite)
        if not isinstance(resume, bool) and resume != "auto":
            raise ValueError(f"resume: got {resume!r}, allowed: True, False, 'auto'")
        self.writes = writes
        self.config, self.overwrite = config, overwrite
        self.resume = resume is True or (resume == "auto" and self._is_run())
        self.last = self.out / "checkpoints" / "last.pt"
        self.metrics = self.out / "metrics.jsonl"
        self.plots = self.out / "plots"
        self.saved: dict[str, Any] | None = None
        if resume and overwrite:
            raise ValueError("resume and overwrite: got both, allowed: one of them")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out: {self.out} is a file, allowed: a folder")
        if self.resume:
            self._check_resume(defaults)
        elif overwrite and self.out.exists() and any(self.out.iterdir()) and not self._is_run():
            raise FileExistsError(
                f"out: {self.out} is not empty and holds no run to overwrite, allowed: an empty folder or that of a "
                "run; choose another folder"
            )
        elif self.out.exists() and any(self.out.iterdir()) and not overwrite:
            raise FileExistsError(
                f"out: {self.out} is not empty; add resume=true to continue its run, "
                "overwrite=true to start anew there, or choose another folder"
            )

    def _is_run(self) -> bool:
        try:
            read_args(self.out)
        except (FileNotFoundError, ValueError):
            return False
        return True

    def _check_resume(self, defaults: dict[str, Any]) -> None:
        before = read_args(self.out)
        if self.last.exists():
            self.saved = read_checkpoint(self.last)
            before = self.saved["args"]
        before = {key: value for key, value in defaults.items() if key in self.config} | before
        changed = [
            f"{key}: was {before.get(key)!r}, now {self.config.get(key)!r}"
            for key in dict.fromkeys([*before, *self.config])
            if key not in FREE and before.get(key) != self.config.get(key)
        ]
        if changed:
            raise ValueError(
                f"resume: {self.out} was started with other arguments ({'; '.join(changed)}); "
                "give the same ones, or start another run in a new folder"
            )

    def open(self) -> None:
        """Create the folder, or cut it back to the checkpoint, and start logging into it."""
        if not self.writes:
            return
        self.last.parent.mkdir(parents=True, exist_ok=True)
        if self.overwrite:
            self._clear()
        step = self.saved["step"] if self.saved else 0
        if self.resume and self.metrics.exists():  # drop what the broken run did after its last checkpoint
            write_atomically(
                self.metrics, "".join(json.dumps(row) + "\n" for row in read_rows(self.metrics) if row["step"] <= step)
            )
            if not self.saved:
                self.metrics.unlink()
        write_atomically(self.out / "args.yaml", require("yaml", "args.yaml").safe_dump(self.config, sort_keys=False))
        self._handlers: list[logging.Handler] = [logging.FileHandler(self.out / "train.log")]
        self._handlers[0].setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        if not log.hasHandlers():
            self._handlers.append(Console())
            self._handlers[1].setLevel(logging.INFO)
        for handler in self._handlers:
            log.addHandler(handler)
        log.setLevel(logging.DEBUG)
        self._file = self.metrics.open("a")
        self._board = self._tensorboard(step)

    def _clear(self) -> None:
        """Remove what a run writes, and nothing else that may lie in the folder."""
        checkpoints = ["checkpoints/last.pt", "checkpoints/epoch_[0-9][0-9][0-9][0-9].pt"]
        pictures = ("curves", "fractions", "pca", "umap", "neighbours", "views", "filters")
        shown = ["evaluations.jsonl", "report.html", *(f"plots/{name}.png" for name in pictures)]
        files = ["args.yaml", "metrics.jsonl", "train.log", "events.out.tfevents.*", *checkpoints, *shown]
        for path in [path for pattern in files for path in self.out.glob(pattern)]:
            path.unlink()

    def _tensorboard(self, step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info('no TensorBoard events: tensorboard is not installed (pip install "ssl_fast[train]")')
            return None
        return SummaryWriter(str(self.out), purge_step=step + 1 if self.saved else None)

    def close(self) -> None:
        """Flush and release everything; safe to call after an error."""
        for handler in self.__dict__.pop("_handlers", []):
            log.removeHandler(handler)
            handler.close()
        if "_file" in self.__dict__:
            self._file.close()
        if self.__dict__.get("_board"):
            self._board.close()

    def record(self, row: dict[str, Any]) -> None:
        """Append a row, which has a `step`, to metrics.jsonl and its numbers to TensorBoard."""
        if not self.writes:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for key, value in row.items():
            if self._board and key not in ("step", "epoch"):
                self._board.add_scalar(key, value, row["step"])

    def save(self, state: dict[str, Any], copy: str | None = None) -> None:
        """Write checkpoints/last.pt, and a copy under another name where one is given."""
        if not self.writes:
            return
        os.fsync(self._file.fileno())  # the metrics up to this step are on disk before a checkpoint says so
        if copy:
            write_atomically(self.last.with_name(copy), state)
        write_atomically(self.last, state)


def read_args(out: Path) -> dict[str, Any]:
    """The arguments of the run in a folder."""
    path = out / "args.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"out: {out} holds no run to resume; leave out resume=true to start one there")
    yaml = require("yaml", "args.yaml")
    try:
        args = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"out: {path} cannot be read ({error}); restore it, or start a run in a new folder") from None
    if not isinstance(args, dict) or not {"data", "method", "model", "augment"} <= args.keys():
        raise ValueError(
            f"out: {path} is not that of a run; choose the folder of one, or a new one without resume=true"
        )
    return args


def write_atomically(path: Path, content: str | bytes | dict[str, Any]) -> None:
    """Write text, bytes, or a dict by torch.save, beside `path` and rename it: a reader finds old or new, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        content = content.encode() if isinstance(content, str) else content
        file.write(content) if isinstance(content, bytes) else torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a line that a crash cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of `train`, on the CPU; only tensors and plain values are unpickled.

    Raises:
        FileNotFoundError, ValueError: where the file is missing or is not such a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: {path} does not exist; a run writes out/checkpoints/last.pt")
    cause: Exception | None = None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(saved, dict) and {"args", "step", "model"} <= set(saved):
            return saved
        holds = ", ".join(map(str, list(saved)[:4])) or "nothing" if isinstance(saved, dict) else type(saved).__name__
        reason = f"it holds {holds}, not args, step and model"
    except pickle.UnpicklingError as error:  # PyTorch would have it loaded all the same, and run what code it holds
        cause, reason = error, "it is not of tensors and plain values"
    except Exception as error:
        cause, reason = error, f"it cannot be read: {type(error).__name__} {_first_sentence(error)}".rstrip()
    raise ValueError(
        f"checkpoint: {path} is not a checkpoint of ssl_fast.train ({reason}), allowed: checkpoints/last.pt of a run; "
        "where that is damaged, give an earlier one (keep_every), or train again with overwrite=true"
    ) from cause


def _first_sentence(error: Exception) -> str:
    """What follows it is a page of PyTorch's inner workings."""
    return str(error).partition("\n")[0].partition(". ")[0]


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()  # which "meta" has not
    except Exception as error:  # of many types: a module that is missing, an assertion, a RuntimeError
        reason = _first_sentence(error)
        raise ValueError(f"device: got {name!r}, allowed: auto, cpu, cuda, cuda:N ({reason})") from error
    return device


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global generators, in types that a safe load accepts."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    random.setstate(state["python"])
    numpy = state["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": np.array(numpy["state"]["key"], np.uint32)}})
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
