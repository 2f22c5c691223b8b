"""Images by name or folder, and the order in which a run sees them."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ssl_fast._checks import a_path, whole
from ssl_fast._extras import nearest, require
from ssl_fast.augment import seed_of
from ssl_fast.folder import ImageFiles, WholeImages, decode_jpegs, decodes_jpegs, find_images
from ssl_fast.ops.two_views import PackedImages

T = TypeVar("T")
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

    `size` is the side of a view in pixels by default; `notes` tell how the splits were made; `classes` are the names
    of a folder's classes, in the order of their labels.
    """

    name: str
    size: int
    channels: int
    train: Split
    bank: Split | None = None
    test: Split | None = None
    notes: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


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
    if image_size is not None:
        image_size = whole("image_size", image_size, 4, ", in pixels")
    name, folder = str(data), a_path("data", data, f"{', '.join(NAMES)}, or the path of a folder of images")
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


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items in their order, the next of which a thread prepares while the caller is busy with one.

    The thread ends with the iteration, wherever that stops, and what it raises is raised here.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "ssl_fast_ahead") as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]


class Loader:
    """Batches of a split on a device: `for images, indices in loader(batches)`.

    In memory: indexed where they are, and kept on the device when they take less than 1 GiB. Files: decoded by
    `num_workers` processes ahead of the training, to squares, or `whole` and packed; of whole images a GPU decodes the
    JPEGs itself where torchvision's nvJPEG works, and the processes only read them. Yields uint8 images, (B, C, H, W)
    or PackedImages, and the indices (B,) of the images delivered, which differ from those asked for where a file could
    not be read.

    For a GPU, a thread fetches the batch after the one in use: it reads or decodes where no process does, and copies on
    a stream of its own, which does not wait for the step before. On a CPU nothing but the processes works ahead: a
    thread would take its time from the cores that the step runs on, whose loops wait for the slowest of their own
    threads. For the same reason views are made between the steps there, by all cores; on a GPU they are launched while
    the step before still runs.
    """

    def __init__(self, split: Split, device: torch.device, num_workers: int = 0, whole: bool = False) -> None:
        self.device, self.images = device, split.images
        if isinstance(self.images, Tensor):
            if self.images.nbytes < 2**30:
                self.images = self.images.to(device)
            return
        self._nvjpeg = whole and decodes_jpegs(device)
        self._batches: list[list[int]] = []
        self._loader = torch.utils.data.DataLoader(
            WholeImages(self.images, self._nvjpeg) if whole else self.images,
            batch_sampler=self._batches,
            num_workers=num_workers,
            collate_fn=_flat if self._nvjpeg else _pack if whole else None,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else each epoch would draw a seed from the run's global generator
        )

    def __call__(self, batches: list[Tensor]) -> Iterator[tuple[Any, Tensor]]:
        loaded = self._loaded(batches)
        if not self._fetches_ahead():
            return ((images.to(self.device, non_blocking=True), indices) for images, indices in loaded)
        return self._received(ahead(self._sent(loaded)))

    def _fetches_ahead(self) -> bool:
        return self.device.type == "cuda" and not (isinstance(self.images, Tensor) and self.images.is_cuda)

    def _loaded(self, batches: list[Tensor]) -> Iterator[tuple[Any, Tensor]]:
        """Where they are read."""
        images = self.images
        if isinstance(images, Tensor):
            return ((images[indices.to(images.device)], indices) for indices in batches)
        self._batches[:] = [indices.tolist() for indices in batches]
        return map(self._decoded, iter(self._loader))  # the processes start here, in the caller's thread

    def _decoded(self, batch: Any) -> tuple[Any, Tensor]:
        assert isinstance(self.images, ImageFiles)
        images, indices = _pack(decode_jpegs(_items(batch), self.images, self.device)) if self._nvjpeg else batch
        self.images.report(indices)
        return images, indices[:, 1]

    def _sent(self, loaded: Iterator[tuple[Any, Tensor]]) -> Iterator[tuple[Any, Tensor, Any]]:
        """On the device, and what says that they are there."""
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        while True:
            with torch.cuda.stream(stream):
                batch = next(loaded, None)  # nvJPEG decodes on that stream
                if batch is None:
                    return
                images = batch[0].to(self.device, non_blocking=True)
            yield images, batch[1], stream and stream.record_event()

    def _received(self, sent: Iterator[tuple[Any, Tensor, Any]]) -> Iterator[tuple[Any, Tensor]]:
        for images, indices, there in sent:
            if there:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(there)
                images.data.record_stream(current)  # of a tensor, or the buffer of PackedImages
            yield images, indices


def _pack(items: list[tuple[Tensor, Tensor]]) -> tuple[PackedImages, Tensor]:
    images, indices = zip(*items, strict=True)
    return PackedImages.of(images), torch.stack(indices)


def _flat(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Images (3, H, W) and files in one buffer, for a process may hand over few tensors; `_items` takes it apart."""
    data, indices = zip(*items, strict=True)
    shapes = torch.tensor([(x.numel(), *(x.shape[1:] if x.dim() == 3 else (0, 0))) for x in data])
    return torch.cat([x.flatten() for x in data]), shapes, torch.stack(indices)


def _items(batch: tuple[Tensor, Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    data, shapes, indices = batch
    parts = zip(data.split(shapes[:, 0].tolist()), shapes[:, 1:].tolist(), strict=True)
    return list(zip((part.view(3, *shape) if shape[0] else part for part, shape in parts), indices, strict=True))


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
    return ImageData(str(root), size, 3, train, train if test else None, test, notes, classes)
