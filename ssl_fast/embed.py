"""`embed`: the features of a folder of images as a file, which a second call goes on with."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_fast._checks import a_path, check_flags, whole
from ssl_fast._extras import require
from ssl_fast.augment import plain_view
from ssl_fast.data import ImageData, Loader, Split
from ssl_fast.features import as_channels, folded, load_encoder, saved_at
from ssl_fast.fold import eval_mode
from ssl_fast.folder import ImageFiles, find_images
from ssl_fast.progress import counted
from ssl_fast.run import pick_device, read_checkpoint, write_atomically

log = logging.getLogger("ssl_fast")
FORMATS = (".npy", ".safetensors")
HEADER = 128  # bytes of an .npy header of two dimensions, a multiple of 64


@torch.no_grad()
def embed(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    model: nn.Module | None = None,
    device: str = "auto",
    batch_size: int = 256,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the features h of a folder of images to a file, and their names, and classes where known, to a .csv.

    Interrupted or killed, the same call goes on from the last batch that is on disk, and ends with the same file. Until
    the end there is no file `out`. An image that cannot be decoded is left out, with a warning.

    Args:
        checkpoint: a checkpoint, or the folder `out` of a run, whose checkpoints/last.pt is taken.
        data: a folder of images; its subfolders are classes as in `train`.
        out: FILE.npy, an fp32 array (N, F); or FILE.safetensors, with `features` (N, F) and, where there are classes,
            `labels` (N,). FILE.csv has a line for each row: file, below `data`, and class.
        model: the nn.Module that was trained, for runs whose model had no name.
        device: "auto", "cpu", "cuda" or "cuda:1".
        batch_size: images a forward pass.
        num_workers: processes that decode images.
        overwrite: replace `out`.

    Returns:
        A dict: `out`, `names` (the .csv), `images`, `features` (their width), `unreadable`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: naming the argument, before anything is written.

    Example:
        >>> embed("out/simclr", "photos", "photos.npy")
        >>> h = numpy.load("photos.npy", mmap_mode="r")
    """
    target = a_path("out", out, f"the path of a file ending in {' or '.join(FORMATS)}")
    root = a_path("data", data, "the path of a folder of images")
    names = target.with_suffix(".csv")
    partial, journal = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "json"))
    if target.suffix not in FORMATS:
        raise ValueError(f"out: got {str(out)!r}, allowed: a file ending in {' or '.join(FORMATS)}")
    for path in (target, names):
        if path.exists() and not overwrite and not (path is names and journal.exists()):
            raise FileExistsError(f"out: {path} exists; add overwrite=true to replace it, or choose another file")
    if not root.is_dir():
        raise FileNotFoundError(f"data: got {str(data)!r}, allowed: a folder of images; give its path")
    if parts := [n for n in ("test", "val", "valid") if (root / n).is_dir() and (root / "train").is_dir()]:
        raise ValueError(f"data: {root} holds train and {parts[0]}, allowed: one of them; give {root / 'train'}")
    batch_size, num_workers = whole("batch_size", batch_size), whole("num_workers", num_workers, 0)
    check_flags(overwrite=overwrite)
    if target.suffix == ".safetensors":
        require("safetensors.torch", f"out={target.name}")
    saved, chosen = read_checkpoint(saved_at(checkpoint)), pick_device(device)
    files, labels, classes = find_images(root)
    size, channels = saved["image_size"], saved["channels"]
    source = load_encoder(saved, model)
    what = _digest(source, [(str(path.relative_to(root)), *_stamp(path)) for path in files], size)
    split = Split(ImageFiles(files, round(size * 8 / 7)), labels)
    encoder = folded(source.to(chosen), ImageData(str(root), size, channels, split), chosen)

    target.parent.mkdir(parents=True, exist_ok=True)
    state = _resumed(partial, journal, what)
    batches = list(torch.arange(state["done"], len(files)).split(batch_size)) if state["done"] < len(files) else []
    if state["done"]:
        log.info("going on after %d of %d images", state["done"], len(files))
    with partial.open("r+b" if partial.exists() else "w+b") as file, eval_mode(encoder):
        file.truncate(HEADER + 4 * state["rows"] * state["width"])  # what was written after the journal
        file.seek(0, os.SEEK_END)
        if file.tell() < HEADER:
            file.write(bytes(HEADER - file.tell()))
        for asked, (images, used) in zip(
            batches, counted(Loader(split, chosen, num_workers)(batches), len(batches), "batches"), strict=True
        ):
            read = asked == used  # the loader puts another image in the place of one that it cannot decode
            h = encoder(plain_view(as_channels(images, channels), size)).float()[read.to(chosen)]
            file.write(h.cpu().contiguous().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
            state["unreadable"] += asked[~read].tolist()
            state |= {"done": state["done"] + len(asked), "rows": state["rows"] + len(h), "width": h.shape[1]}
            write_atomically(journal, json.dumps(state))
        file.seek(0)
        file.write(_header(state["rows"], state["width"]))
    lost = set(state["unreadable"])
    kept = [i for i in range(len(files)) if i not in lost]
    if lost:
        log.warning("%d images that cannot be decoded are left out", len(lost))
    write_atomically(names, _csv(root, [files[i] for i in kept], labels if labels is None else labels[kept], classes))
    if target.suffix == ".safetensors":
        _to_safetensors(partial, target, None if labels is None else labels[kept], classes)
        partial.unlink()
    else:
        os.replace(partial, target)
    journal.unlink()
    found = {"images": state["rows"], "features": state["width"], "unreadable": len(lost)}
    return {"out": str(target), "names": str(names), **found}


def _resumed(partial: Path, journal: Path, what: str) -> dict[str, Any]:
    """The journal of a broken call for the same weights and images, or that of a new one."""
    try:
        state = json.loads(journal.read_text())
        if state["what"] == what and partial.stat().st_size >= HEADER + 4 * state["rows"] * state["width"]:
            return state
        log.info("the weights or the images are not those of the broken call: starting anew")
    except (OSError, ValueError, KeyError):
        pass  # nothing to go on with
    partial.unlink(missing_ok=True)
    return {"what": what, "done": 0, "rows": 0, "width": 0, "unreadable": []}


def _digest(encoder: nn.Module, files: list[tuple[str, int, int]], size: int) -> str:
    """What decides on every figure: the weights, and the images by name, length and time of change."""
    digest = hashlib.sha256(json.dumps([size, files]).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _header(rows: int, width: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})
    assert buffer.tell() == HEADER
    return buffer.getvalue()


def _csv(root: Path, files: list[Path], labels: Tensor | None, classes: list[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["file"] if labels is None else ["file", "class"])
    for i, path in enumerate(files):
        writer.writerow([path.relative_to(root), *([] if labels is None else [classes[int(labels[i])]])])
    return buffer.getvalue()


def _to_safetensors(partial: Path, target: Path, labels: Tensor | None, classes: list[str]) -> None:
    features = torch.from_numpy(np.load(partial, mmap_mode="c"))
    tensors = {"features": features} | ({} if labels is None else {"labels": labels})
    temporary = target.with_name(f".{target.name}.tmp")
    require("safetensors.torch", "embed").save_file(tensors, temporary, {"classes": json.dumps(classes)})
    os.replace(temporary, target)
