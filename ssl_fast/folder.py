"""A folder of image files as a data set: finding, decoding, and going on where a file cannot be read."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from ssl_fast._extras import nearest, require

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
TRIES = 100  # files in a row that may be unreadable before the folder is taken to be broken
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


class WholeImages(torch.utils.data.Dataset):
    """Those images as uint8 (3, H, W), each in its own shape, for crops; averaged over whole pixels to a shorter side
    below twice ImageFiles' where it is longer."""

    def __init__(self, images: ImageFiles) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images.get(index, whole=True)
