"""A folder of image files as a data set: finding, decoding, and going on where a file cannot be read."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_fast._extras import nearest, require

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
TRIES = 100  # files in a row that may be unreadable before the folder is taken to be broken
ORIENTATION, END = 0x0112, b"\xff\xd9"  # of a JPEG: the tag of its EXIF data, and its last bytes
log = logging.getLogger("ssl_fast")


def find_images(root: Path, classes: list[str] | None = None) -> tuple[list[Path], Tensor | None, list[str]]:
    """The image files under a folder in sorted order, their labels, and the names of the classes.

    Two or more subfolders with images, and no image beside them, are classes; all else is without labels (None, []).

    Args:
        root: the folder.
        classes: the classes that the subfolders must be among, in the order of their labels.

    Raises:
        ValueError: where there is no image, or a class that `classes` lacks.
    """
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and p.name[0] != ".")
    if not files:
        raise ValueError(
            f"data: no images in {root}; allowed: {', '.join(sorted(SUFFIXES))}, in the folder or in subfolders"
        )
    owners = [path.relative_to(root).parts[0] for path in files]
    found = sorted(set(owners))
    if any(path.parent == root for path in files) or (len(found) < 2 and not classes):
        return files, None, []
    if classes and (unknown := [name for name in found if name not in classes]):
        raise ValueError(
            f"data: class {unknown[0]!r} of {root} is not among the training classes; {nearest(unknown[0], classes)}"
            f"allowed: {', '.join(classes)}"
        )
    classes = classes or found
    number = {name: i for i, name in enumerate(classes)}
    return files, torch.tensor([number[owner] for owner in owners]), classes


class ImageFiles(torch.utils.data.Dataset):
    """Images as uint8 (3, size, size): the shorter side resized to `size`, then the centre.

    An item is (image, (index asked for, index delivered)): a file that cannot be decoded is replaced by the next one
    that can, the same in every run, and `report` warns of it once.
    """

    def __init__(self, files: list[Path], size: int) -> None:
        self.files, self.size = files, size
        self._reported: set[int] = set()
        self._ops = require("PIL.ImageOps", "decoding images")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.get(index)

    def get(self, index: int, whole: bool = False) -> tuple[Tensor, Tensor]:
        """An item; `whole` as in WholeImages."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        for offset in range(min(len(self), TRIES)):
            used = (index + offset) % len(self)
            try:
                return self._decode(self.files[used], whole), torch.tensor([index, used])
            except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more for damaged files
                reason = error
        raise ValueError(
            f"data: {offset + 1} files in a row cannot be decoded, the last {self.files[used]}: {reason}; "
            "remove the files that are not images"
        )

    def _decode(self, path: Path, whole: bool) -> Tensor:
        with require("PIL.Image", "decoding images").open(path) as image:
            image.draft("RGB", (self.size, self.size))  # a JPEG decodes at 1/2, 1/4 or 1/8 where that is large enough
            image = self._ops.exif_transpose(image).convert("RGB")
            if not whole:
                image = self._ops.fit(image, (self.size, self.size))
            elif (factor := min(image.size) // self.size) > 1:
                image = image.reduce(factor)
        width, height = image.size
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)

    def jpeg(self, index: int) -> Tensor | None:
        """The bytes of a whole JPEG that lies as it is to be seen; None for any other file."""
        try:
            data = self.files[index].read_bytes()
            with require("PIL.Image", "decoding images").open(io.BytesIO(data)) as image:
                upright = image.getexif().get(ORIENTATION, 1) == 1
                if image.format != "JPEG" or image.mode not in ("L", "RGB") or not upright or data[-2:] != END:
                    return None
        except Exception:  # `get` finds out, and takes another
            return None
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def reduced(self, image: Tensor) -> Tensor:
        """A decoded image (3, H, W) averaged as `_decode` does, which averages by 1/2, 1/4 or 1/8 first."""
        for scale in (8, 4, 2):
            if min(image.shape[1:]) >= scale * self.size:
                image = _averaged(image, scale)
                break
        factor = min(image.shape[1:]) // self.size
        return _averaged(image, factor) if factor > 1 else image

    def report(self, indices: Tensor) -> None:
        """Warn of each file that was replaced in a batch of (asked, delivered) indices, once in the run."""
        for asked, used in indices[indices[:, 0] != indices[:, 1]].tolist():
            if asked not in self._reported:
                self._reported.add(asked)
                log.warning("cannot decode %s; %s takes its place", self.files[asked], self.files[used].name)

    def check(self) -> None:
        """Decode a few images now, so that a folder of broken files fails before the training."""
        for index in range(0, len(self), max(1, len(self) // 8)):
            self.report(self[index][1].unsqueeze(0))


def _averaged(image: Tensor, factor: int) -> Tensor:
    """Over squares of pixels, cut off at the right and the bottom."""
    return F.avg_pool2d(image.float(), factor, ceil_mode=True, count_include_pad=False).round().byte()


class WholeImages(torch.utils.data.Dataset):
    """Those images as uint8 (3, H, W), each in its own shape, for crops; averaged over whole pixels to a shorter side
    below twice ImageFiles' where it is longer.

    With `jpegs`, files that `decode_jpegs` takes stay as they are, in bytes.
    """

    def __init__(self, images: ImageFiles, jpegs: bool = False) -> None:
        self.images, self.jpegs = images, jpegs

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        data = self.images.jpeg(index) if self.jpegs else None
        return self.images.get(index, whole=True) if data is None else (data, torch.tensor([index, index]))


def decodes_jpegs(device: torch.device) -> bool:
    """Whether this is a GPU on which torchvision decodes JPEGs."""
    if device.type != "cuda":
        return False
    try:
        file = io.BytesIO()
        require("PIL.Image", "decoding images").new("RGB", (8, 8)).save(file, "JPEG")
        return _decode_on(device, [torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)])[0].shape[0] == 3
    except Exception as error:  # built without it, without a driver for it, or removed from torchvision
        log.debug("JPEGs are decoded on the CPU: %s", error)
        return False


def _decode_on(device: torch.device, files: list[Tensor]) -> list[Tensor]:
    torchvision_io = require("torchvision.io", "decoding images on a GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision names a package that follows it
        return torchvision_io.decode_jpeg(files, torchvision_io.ImageReadMode.RGB, device=device)


def decode_jpegs(
    items: list[tuple[Tensor, Tensor]], images: ImageFiles, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """WholeImages' items on a device: the JPEGs among them decoded there in one call, in the sizes that Pillow's have.

    A batch with a file that the device cannot decode is decoded by Pillow, which replaces that file.
    """
    files = [data for data, _ in items if data.dim() == 1]
    try:
        decoded = iter(_decode_on(device, files) if files else [])
    except RuntimeError as error:
        log.debug("a batch of JPEGs is decoded on the CPU: %s", error)
        items = [images.get(int(indices[0]), whole=True) if x.dim() == 1 else (x, indices) for x, indices in items]
        decoded = iter(())
    return [
        (images.reduced(next(decoded)) if data.dim() == 1 else data.to(device, non_blocking=True), indices)
        for data, indices in items
    ]
