"""Images by name or folder, and the order in which a run sees them."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_fast._extras import nearest, require
from ssl_fast.augment import seed_of
from ssl_fast.folder import ImageFiles, WholeImages, find_images
from ssl_fast.ops.two_views import PackedImages

NAMES = ("digits", "fashion_mnist", "cifar10", "stl10")
CACHE = Path(os.environ.get("SSL_FAST_DATA", "~/.cache/ssl_fast")).expanduser()
FASHION_FILES = [f"{s}-{kind}-ubyte" for s in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts the files


@dataclass
class Split:
    """Images, uint8 (N, C, H, W) in memory or files decoded on demand, and their labels (N,) where there are any."""

    images: Tensor | ImageFiles
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class ImageData:
    """What a run needs: `train` for the method, and labelled `bank` and `test` for kNN and probes, or None.

    `size` is the side of a view in pixels by default; `notes` tell how the splits were made.
    """

    name: str
    size: int
    channels: int
    train: Split
    bank: Split | None = None
    test: Split | None = None
    notes: list[str] = field(default_factory=list)


def load_data(data: str | Path, data_dir: str | Path | None = None, image_size: int | None = None) -> ImageData:
    """Load a data set.

    Args:
        data: "digits" (1,797 digits of 8x8 that scikit-learn ships; a fixed 360 of them for testing), "fashion_mnist",
            "cifar10", "stl10" (trains on its unlabelled images), or a folder: of images, with one subfolder per class
            or without labels, with `train` and `test` (or `val`) inside or not; or one that holds the files of
            Fashion-MNIST, CIFAR-10 or STL-10.
        data_dir: where the files of a named set are, or are downloaded to; default $SSL_FAST_DATA or ~/.cache/ssl_fast.
        image_size: the side of a view in pixels; default the images' own, 224 for folders.

    Raises:
        ValueError, FileNotFoundError: naming what is missing and where to put it.

    Example:
        >>> load_data("digits").train.images.shape  # (1437, 1, 8, 8), uint8
    """
    if image_size is not None and image_size < 4:
        raise ValueError(f"image_size: got {image_size}, allowed: at least 4 pixels")
    name, folder = str(data), Path(data).expanduser()
    if name == "digits":
        loaded = _digits()
    elif name in NAMES:
        loaded = _named(name, Path(data_dir).expanduser() if data_dir else None)
    elif folder.is_dir():
        named = _recognise(folder)
        return load_data(named, folder, image_size) if named else _folder(folder, image_size or 224)
    else:
        raise FileNotFoundError(
            f"data: {name!r} is neither a data set nor a folder; {nearest(name, list(NAMES))}"
            f"allowed: {', '.join(NAMES)}, or the path of a folder of images"
        )
    loaded.size = image_size or loaded.size
    return loaded


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Indices of the batches of an epoch: a permutation fixed by (seed, epoch), without the incomplete last batch."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed_of((seed, epoch))))
    return list(order[: n // batch_size * batch_size].split(batch_size))


def in_order(n: int, batch_size: int) -> list[Tensor]:
    """Indices of the batches that cover 0 .. n-1 in order."""
    return list(torch.arange(n).split(batch_size))


class Loader:
    """Batches of a split on a device: `for images, indices in loader(batches)`.

    In memory: indexed where they are, and kept on the device when they take less than 1 GiB. Files: decoded by
    `num_workers` processes ahead of the training, to squares, or `whole` and packed. Yields uint8 images, (B, C, H, W)
    or PackedImages, and the indices (B,) of the images delivered, which differ from those asked for where a file could
    not be read.
    """

    def __init__(self, split: Split, device: torch.device, num_workers: int = 0, whole: bool = False) -> None:
        self.device, self.images = device, split.images
        if isinstance(self.images, Tensor):
            if self.images.nbytes < 2**30:
                self.images = self.images.to(device)
            return
        self._batches: list[list[int]] = []
        self._loader = torch.utils.data.DataLoader(
            WholeImages(self.images) if whole else self.images,
            batch_sampler=self._batches,
            num_workers=num_workers,
            collate_fn=_pack if whole else None,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else each epoch would draw a seed from the run's global generator
        )

    def __call__(self, batches: list[Tensor]) -> Iterator[tuple[Any, Tensor]]:
        if isinstance(self.images, Tensor):
            for indices in batches:
                images = self.images[indices.to(self.images.device)]
                yield images.to(self.device, non_blocking=True), indices
            return
        self._batches[:] = [indices.tolist() for indices in batches]
        for images, indices in self._loader:
            self.images.report(indices)
            yield images.to(self.device, non_blocking=True), indices[:, 1]


def _pack(items: list[tuple[Tensor, Tensor]]) -> tuple[PackedImages, Tensor]:
    images, indices = zip(*items, strict=True)
    return PackedImages.of(images), torch.stack(indices)


def _start_worker(worker: int) -> None:
    """Ctrl-C reaches the whole process group: the training process answers it, and still needs its workers."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _digits() -> ImageData:
    digits = require("sklearn.datasets", "data=digits").load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[np.random.RandomState(0).permutation(len(labels))[:360]] = True
    train = Split(images[~test], labels[~test])
    return ImageData("digits", 8, 1, train, train, Split(images[test], labels[test]))


def _recognise(folder: Path) -> str | None:
    if _find_fashion([folder]):
        return "fashion_mnist"
    marks = {
        "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        "stl10": ("stl10_binary", "stl10_binary.tar.gz"),
    }
    return next((name for name, files in marks.items() if any((folder / f).exists() for f in files)), None)


def _named(name: str, data_dir: Path | None) -> ImageData:
    if name == "fashion_mnist":
        found = _find_fashion([data_dir] if data_dir else [CACHE, DEBIAN_FASHION])
        if found is None:
            _torchvision("FashionMNIST", data_dir or CACHE, train=True)
            found = _find_fashion([data_dir or CACHE])
        train_x, train_y, test_x, test_y = (_read_idx(path) for path in found or ())
        train, test = Split(train_x.unsqueeze(1), train_y.long()), Split(test_x.unsqueeze(1), test_y.long())
        return ImageData(name, 28, 1, train, train, test)
    if name == "cifar10":
        train, test = (_split(_torchvision("CIFAR10", data_dir or CACHE, train=t)) for t in (True, False))
        return ImageData(name, 32, 3, train, train, test)
    unlabelled, bank, test = (
        _split(_torchvision("STL10", data_dir or CACHE, split=s)) for s in ("unlabeled", "train", "test")
    )
    return ImageData(name, 96, 3, Split(unlabelled.images), bank, test)


def _torchvision(kind: str, root: Path, **split: Any) -> Any:
    """A torchvision data set from files that are there, or downloaded; the error says where to put which files."""
    dataset = getattr(require("torchvision.datasets", f"data={kind.lower()}"), kind)
    try:
        return dataset(str(root), download=False, **split)
    except RuntimeError:
        pass  # torchvision's way to say that the files are not there
    try:
        root.mkdir(parents=True, exist_ok=True)
        return dataset(str(root), download=True, **split)
    except Exception as error:
        files = {
            "FashionMNIST": f"the four files {', '.join(f + '.gz' for f in FASHION_FILES)} "
            "(on Debian and Ubuntu: apt-get install dataset-fashion-mnist)",
            "CIFAR10": "cifar-10-python.tar.gz, or the folder cifar-10-batches-py",
            "STL10": "stl10_binary.tar.gz, or the folder stl10_binary",
        }[kind]
        raise FileNotFoundError(
            f"{kind} is not in {root} and could not be downloaded ({error}). "
            f"Put {files} into a folder and pass it as data_dir"
        ) from error


def _split(dataset: Any) -> Split:
    """CIFAR-10 keeps (N, H, W, C) and `targets`, STL-10 (N, C, H, W) and `labels`."""
    images = torch.as_tensor(np.asarray(dataset.data))
    if images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2).contiguous()
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return Split(images, torch.as_tensor(np.asarray(labels)).long())


def _find_fashion(folders: list[Path]) -> list[Path] | None:
    """The four idx files, compressed or not: flat in a folder, or where torchvision puts them."""
    for folder in folders:
        for place in (folder, folder / "FashionMNIST" / "raw"):
            found = [next((p for p in (place / f, place / f"{f}.gz") if p.exists()), None) for f in FASHION_FILES]
            if all(found):
                return [path for path in found if path]
    return None


def _read_idx(path: Path) -> Tensor:
    """An idx file: two zero bytes, the type (8: uint8), the number of dimensions, their big-endian sizes, the data."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            raw = file.read()
        except (OSError, EOFError) as error:
            raise ValueError(f"data: {path} is damaged ({error}); copy it again") from error
    shape = tuple(np.frombuffer(raw, ">i4", raw[3], 4)) if len(raw) > 4 and raw[:3] == b"\0\0\x08" else ()
    if not shape or len(raw) != 4 + 4 * len(shape) + int(np.prod(shape)):
        raise ValueError(f"data: {path} is not a whole idx file of bytes; copy it again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())


def _folder(root: Path, size: int) -> ImageData:
    parts = {p.name: p for p in root.iterdir() if p.is_dir()}
    test_root = next((parts[n] for n in ("test", "val", "valid") if n in parts), None) if "train" in parts else None
    files, labels, classes = find_images(parts["train"] if test_root else root)
    stored = round(size * 8 / 7)  # 256 for 224
    everything, notes = ImageFiles(files, stored), [f"{len(files)} images of {len(classes) or 'no'} classes in {root}"]
    train = Split(everything, labels)
    test = None
    if labels is not None and test_root:
        test_files, test_labels, _ = find_images(test_root, classes)
        test = Split(ImageFiles(test_files, stored), test_labels)
        notes.append(f"kNN: {len(test_files)} images of {test_root}")
    elif labels is not None and len(files) >= 10:
        held = torch.arange(len(files)) % 10 == 9
        train, test = (
            Split(ImageFiles([files[i] for i in mask.nonzero().flatten()], stored), labels[mask])
            for mask in (~held, held)
        )
        notes.append(
            f"kNN: every tenth image, {len(test)} in all, is kept out of the training; "
            "a folder test/ beside train/ takes its place"
        )
    for split in (train, test):
        if split and isinstance(split.images, ImageFiles):
            split.images.check()
    return ImageData(str(root), size, 3, train, train if test else None, test, notes)
