"""`make demo`: SimCLR on the digits that scikit-learn ships, and what the loss saves in memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_fast.data import load_data
from ssl_fast.evaluate import encode, knn_accuracy, knn_k
from ssl_fast.functional import nt_xent
from ssl_fast.run import read_rows
from ssl_fast.train import train

N, D = 4096, 128


def demo(out: str | Path = "out/demo", epochs: int = 50) -> dict[str, Any]:
    """Train SimCLR on digits; compare the encoder before and after, and the memory of our loss and the dense one.

    Args:
        out: folder of the run; an earlier demo in it is replaced.
        epochs: passes over the 1,437 training images.

    Returns:
        A dict: kNN accuracy of `random` encoder, `trained` encoder and `pixels`; MB of `blockwise` and `dense` loss.

    Example:
        >>> demo()["trained"]
    """
    start = time.monotonic()
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 0.06, "knn_every": 5, "probe_every": 5, "log_every": 5}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model gains nothing from a second thread, and loses much on a busy machine
    try:
        last = train(out, "digits", model="convnet", epochs=epochs, overwrite=True, **settings)
    finally:
        torch.set_num_threads(threads)
    knn = [row["knn"] for row in read_rows(Path(out) / "metrics.jsonl") if "knn" in row]
    result = {"random": knn[0], "trained": knn[-1], "pixels": _knn_of_pixels()}
    result |= {name: _peak_in_fresh_process(name) for name in LOSSES}
    plots = Path(out) / "plots"
    print(f"""
kNN accuracy on 360 digits the training never saw (k = {last["knn_k"]}, t = {last["knn_t"]})
  raw pixels          {result["pixels"]:7.2%}
  random encoder      {result["random"]:7.2%}
  trained, no labels  {result["trained"]:7.2%}   ({epochs} epochs of SimCLR)

Peak memory that the loss and its gradients add, {N} pairs of {D} numbers, fp32, first call in a fresh process
  dense NT-Xent       {_megabytes(result["dense"])}
  ssl_fast            {_megabytes(result["blockwise"])}

Loss and kNN curve    {plots / "curves.png"}
PCA of the embedding  {plots / "pca.png"}
Augmented pairs       {plots / "views.png"}
Took {time.monotonic() - start:.0f} s. Next: ssl-fast train out=out/mine data=FOLDER_OF_IMAGES model=resnet18""")
    return result


def _knn_of_pixels() -> float:
    data = load_data("digits")
    assert data.bank is not None and data.test is not None
    cpu = torch.device("cpu")
    bank, test = (encode(torch.nn.Flatten(), split, data.size, cpu) for split in (data.bank, data.test))
    return knn_accuracy(*bank, *test, k=knn_k(len(data.bank)))


def dense_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent as it is usually written: all similarities of 2N rows at once."""
    z = F.normalize(torch.cat([z1, z2]))
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)))


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"blockwise": nt_xent, "dense": dense_nt_xent}


def _peak_in_fresh_process(loss: str) -> float | None:
    """MB by which the loss raises the peak memory of a process, or None where the system does not say (not Linux)."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "ssl_fast.demo", loss]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_growth(loss: Callable[[Tensor, Tensor, float], Tensor]) -> float:
    z1, z2 = (torch.randn(N, D).requires_grad_() for _ in range(2))
    tiny = torch.randn(2, D, requires_grad=True)
    loss(tiny, tiny, 0.5).backward()  # loads the library and starts the threads
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
    before = _status("VmRSS")
    loss(z1, z2, 0.5).backward()
    return (_status("VmHWM") - before) / 1e3


def _status(field: str) -> int:
    """A field of /proc/self/status, in kB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1])


def _megabytes(value: float | None) -> str:
    return "not measured on this system" if value is None else f"{value:7.1f} MB"


if __name__ == "__main__":
    print(_peak_growth(LOSSES[sys.argv[1]]))
