"""Augmented views of uint8 images: SimCLR's transformations (Chen et al. 2020, arXiv 2002.05709, appendix A), each as
in torchvision.transforms.v2.functional, from bytes to normalised floats in one operator.

What is drawn for a view is a row of COLUMNS, in fp32. The steps, in this order: a rotation about the image's centre;
the crop, resized with antialiased bilinear filtering; a horizontal flip; brightness, contrast, saturation and hue in
the order drawn; the colours dropped; a Gaussian blur; what is bright inverted; mean and standard deviation. Between
the steps pixels are floats from 0 to 1: rounding them to bytes each time, as a chain on uint8 images does, costs
precision and passes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_fast._op import HALF_AND_FLOAT, Op

# The crop in pixels of the image; degrees counter-clockwise; 1 to flip; which of the 24 orders of the four factors, in
# lexicographic order; the factors, which 1, 1, 1 and 0 switch off; 1 for grey; the blur's deviation in pixels of the
# view (0: none), and its odd kernel; from which value on a pixel is inverted (above 1: none).
COLUMNS = ("top", "left", "height", "width", "angle", "flip", "order", "brightness", "contrast", "saturation", "hue",
           "gray", "sigma", "kernel", "solarize")  # fmt: skip
NOTHING = dict(zip(COLUMNS, (0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 2), strict=True))
ORDERS = tuple(itertools.permutations(range(4)))
GRAY = (0.2989, 0.587, 0.114)  # the luma of ITU-R BT.601, as torchvision rounds it

# ImageNet's mean and standard deviation, and those of its grey values.
MEAN_STD = {1: ((0.449,), (0.226,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}


@dataclass(frozen=True)
class PackedImages:
    """Images of different sizes in one buffer, as decoding leaves them.

    Attributes:
        data: uint8, flat: the images one after the other or with gaps, each (H, W, C).
        table: (N, 3), int64, on the CPU: offset into the buffer, height and width of each.
        channels: 1 or 3.

    Example:
        >>> batch = PackedImages.of([decode(path) for path in paths])  # uint8 (C, H, W)
        >>> views = two_views(batch, params, 224)
    """

    data: Tensor
    table: Tensor
    channels: int = 3

    def __post_init__(self) -> None:
        if self.data.dtype != torch.uint8 or self.data.dim() != 1:
            raise TypeError(f"data: got {_described(self.data)}, allowed: a flat buffer of torch.uint8")
        if self.table.dtype != torch.int64 or self.table.dim() != 2 or self.table.shape[1] != 3 or self.table.is_cuda:
            raise TypeError(
                f"table: got {_described(self.table)}, allowed: torch.int64 (N, 3) on the CPU: offsets, heights, widths"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"channels: got {self.channels}, allowed: 1, 3")
        offset, height, width = self.table.unbind(1)
        most = 2**24  # whose product is far from overflow
        end = offset + height.clamp(0, most) * width.clamp(0, most) * self.channels
        wrong = (offset < 0) | (height < 1) | (width < 1) | (height > most) | (width > most) | (end > len(self.data))
        if wrong.any():
            i = int(wrong.nonzero()[0])
            at, rows, columns = self.table[i].tolist()
            raise ValueError(
                f"table: got an image of {rows} x {columns} pixels at {at} in row {i}, allowed: at least 1 x 1, of "
                f"{self.channels} channels, within the {len(self.data)} bytes of data"
            )

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> PackedImages:
        """Pack uint8 images (C, H, W), all of as many channels."""
        if not images:
            raise ValueError("images: got none, allowed: at least one, whose channels are those of all")
        for i, image in enumerate(images):
            if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != images[0].shape[0]:
                expected = f"torch.uint8 ({images[0].shape[0]}, H, W), as the first"
                raise TypeError(f"images: got {_described(image)} at {i}, allowed: {expected}")
        sizes = torch.tensor([image.shape[1:] for image in images])
        ends = sizes.prod(1).cumsum(0) * images[0].shape[0]
        offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
        data = torch.cat([image.permute(1, 2, 0).flatten() for image in images])
        return cls(data, torch.cat([offsets[:, None], sizes], 1), images[0].shape[0])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Tensor:
        """Image i, (C, H, W); not a copy."""
        at, height, width = self.table[i].tolist()
        return self.data[at : at + height * width * self.channels].view(height, width, self.channels).permute(2, 0, 1)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device, non_blocking: bool = False) -> PackedImages:
        """With the buffer on a device; the table stays."""
        return replace(self, data=self.data.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedImages:
        return replace(self, data=self.data.pin_memory())


def sizes_of(images: Tensor | PackedImages) -> tuple[Tensor, Tensor]:
    """Heights and widths of N images, (N,), int64, on the CPU."""
    if isinstance(images, PackedImages):
        return images.table[:, 1], images.table[:, 2]
    height, width = torch.tensor(images.shape[-2:])
    return height.expand(len(images)), width.expand(len(images))


# ---- reference: the definition, and the fallback on any device


def _reference(
    images: Tensor, table: Tensor | None, params: Tensor, channels: int, size: int, mean: Sequence[float],
    std: Sequence[float], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """View after view. Rows v * N + i of params and of the result belong to image i."""
    batch = images if table is None else PackedImages(images, table, channels)
    out = torch.empty((len(params), channels, size, size), dtype=dtype, device=images.device)
    out = out.contiguous(memory_format=torch.channels_last)
    centre, spread = (torch.tensor(v, dtype=torch.float64, device=images.device).view(-1, 1, 1) for v in (mean, std))
    for row, values in enumerate(params.tolist()):
        drawn = dict(zip(COLUMNS, values, strict=True))
        x = batch[row % len(batch)].to(torch.promote_types(dtype, torch.float32)) / 255
        out[row] = (_view(x, drawn, size) - centre) / spread
    return out


def _view(x: Tensor, drawn: dict[str, float], size: int) -> Tensor:
    """The view of one image (C, H, W) of floats from 0 to 1, before it is normalised."""
    if drawn["angle"]:
        x = _rotate(x, drawn["angle"])
    top, left, height, width = (int(drawn[name]) for name in COLUMNS[:4])
    box = x[None, :, top : top + height, left : left + width]
    x = F.interpolate(box, (size, size), mode="bilinear", antialias=True)[0]
    x = x.flip(-1) if drawn["flip"] else x
    for step in ORDERS[int(drawn["order"])]:
        x = ADJUST[step](x, drawn[COLUMNS[7 + step]])
    if drawn["gray"]:
        x = _gray(x).expand_as(x)
    if drawn["sigma"] > 0:
        x = _blur(x, drawn["sigma"], min(int(drawn["kernel"]) // 2, size - 1))
    return torch.where(x >= drawn["solarize"], 1 - x, x)


def _rotate(x: Tensor, angle: float) -> Tensor:
    """Bilinear, with zeros from outside."""
    sine, cosine, (height, width) = math.sin(math.radians(angle)), math.cos(math.radians(angle)), x.shape[1:]
    theta = [[cosine, -sine * height / width, 0], [sine * width / height, cosine, 0]]
    grid = F.affine_grid(torch.tensor([theta], dtype=x.dtype, device=x.device), [1, *x.shape], align_corners=False)
    return F.grid_sample(x[None], grid, align_corners=False)[0]


def _gray(x: Tensor) -> Tensor:
    """The luma of ITU-R 601, (1, H, W)."""
    return x if len(x) == 1 else sum(weight * plane for weight, plane in zip(GRAY, x, strict=True))[None]  # type: ignore[index]


def _blend(x: Tensor, other: Tensor, factor: float) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _brightness(x: Tensor, factor: float) -> Tensor:
    return (factor * x).clamp(0, 1)


def _contrast(x: Tensor, factor: float) -> Tensor:
    return _blend(x, _gray(x).mean(), factor)


def _saturation(x: Tensor, factor: float) -> Tensor:
    return x if len(x) == 1 else _blend(x, _gray(x), factor)


def _hue(x: Tensor, turns: float) -> Tensor:
    """The hue turned around the circle, with HSV's saturation and value kept."""
    if len(x) == 1 or turns == 0:
        return x
    (r, g, b), most = x, x.amax(0)
    spread = most - x.amin(0)
    safe = torch.where(spread == 0, 1, spread)
    hue = torch.where(most == g, (b - r) / safe + 2, (r - g) / safe + 4)
    hue = torch.where(most == r, (g - b) / safe, hue) + 6 * turns
    k = torch.stack([hue + 5, hue + 3, hue + 1]).remainder(6)
    return (most - spread * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


ADJUST = (_brightness, _contrast, _saturation, _hue)


def _blur(x: Tensor, sigma: float, radius: int) -> Tensor:
    """Separable, with the borders reflected."""
    weights = (-0.5 * (torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device) / sigma) ** 2).softmax(0)
    x = F.pad(x[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(x, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))[:, 0]


# ---- operator


def _fake(
    images: Tensor, table: Tensor | None, params: Tensor, channels: int, size: int, mean: Any, std: Any,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    shape = (params.shape[0], channels, size, size)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


_two_views = Op(
    "two_views(Tensor images, Tensor? table, Tensor params, int channels, int size, float[] mean, float[] std, "
    "ScalarType dtype) -> Tensor",
    _reference,
    fake=_fake,
    native={"cpu": (torch.float32,)},
    triton="ssl_fast.kernels.two_views:two_views",
    triton_dtypes=(torch.float32,),
    decides="params",
)


# ---- function


def two_views(
    images: Tensor | PackedImages,
    params: Tensor,
    size: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The views that the rows of `params` describe, normalised, of uint8 images.

    Equivalent to, for one row, with torchvision.transforms.v2.functional as F and x the image in floats from 0 to 1:
        x = F.resized_crop(F.rotate(x, angle, BILINEAR), top, left, height, width, size, antialias=True)
        then horizontal_flip, adjust_brightness / _contrast / _saturation / _hue in the order drawn, rgb_to_grayscale,
        gaussian_blur(kernel, sigma), solarize and normalize.

    Args:
        images: uint8 (N, C, H, W), contiguous or channels_last (other strides cost a copy), or `PackedImages`, whose
            sizes differ; C is 1 or 3. With one channel, saturation, hue and grey change nothing.
        params: (V, 15), fp32, on the images' device, V a multiple of N: columns as in ssl_fast.ops.two_views.COLUMNS;
            row v * N + i is view v of image i. `ssl_fast.augment.sample_view_params` draws them. On a CPU the values
            are checked; on a GPU a crop that leaves its image is moved into it.
        size: pixels of a view's side.
        mean, std: of each channel, of values from 0 to 1; default ImageNet's.
        dtype: of the views: torch.float32, bfloat16 or float16; arithmetic is fp32.

    Returns:
        (V, C, size, size), channels_last. There is no gradient.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example:
        >>> params = sample_view_params(torch.arange(len(images)), 32, 32, POLICIES["simclr_small"], size=32)
        >>> views = two_views(images, params, 32, dtype=torch.bfloat16)
    """
    packed = isinstance(images, PackedImages)
    if not packed:
        _check_images(images)
    channels = images.channels if isinstance(images, PackedImages) else images.shape[1]
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size: got {size!r}, allowed: a whole number of pixels from 1 up")
    if dtype not in HALF_AND_FLOAT:
        raise TypeError(f"dtype: got {dtype}, allowed: torch.float16, torch.bfloat16, torch.float32")
    _check_params(params, images, size)
    mean, std = (
        list(default) if own is None else own.flatten().tolist() if isinstance(own, Tensor) else
        [own] if isinstance(own, (int, float)) else list(own)
        for own, default in zip((mean, std), MEAN_STD[channels], strict=True)
    )  # fmt: skip
    for name, values in (("mean", mean), ("std", std)):
        if (
            len(values) != channels
            or not all(abs(v) < math.inf for v in values)
            or (name == "std" and min(values) <= 0)
        ):
            positive = ", above 0" if name == "std" else ""
            raise ValueError(f"{name}: got {values}, allowed: {channels} finite numbers{positive}, one a channel")
    if isinstance(images, PackedImages):
        return _two_views(images.data.contiguous(), images.table.contiguous(), params, channels, size, mean, std, dtype)
    if not images.is_contiguous() and not images.is_contiguous(memory_format=torch.channels_last):
        images = images.contiguous()
    return _two_views(images, None, params.contiguous(), channels, size, mean, std, dtype)


def _check_images(images: Any) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images: got {type(images).__name__}, allowed: a uint8 tensor (N, C, H, W) or PackedImages")
    if images.dtype != torch.uint8:
        raise TypeError(
            f"images: got {images.dtype}, allowed: torch.uint8 as decoded; the views are made from bytes, so leave out "
            "ToTensor() and any conversion to floats"
        )
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: got shape {tuple(images.shape)}, allowed: (N, C, H, W) with C of 1 or 3")
    if images.shape[2] < 1 or images.shape[3] < 1:
        raise ValueError(f"images: got shape {tuple(images.shape)}, allowed: at least 1 pixel high and wide")


def _check_params(params: Any, images: Tensor | PackedImages, size: int) -> None:
    if not isinstance(params, Tensor) or params.dtype != torch.float32:
        got = params.dtype if isinstance(params, Tensor) else type(params).__name__
        raise TypeError(f"params: got {got}, allowed: a tensor of torch.float32, as sample_view_params draws it")
    n = len(images)
    rows = params.shape[0] if params.dim() == 2 else 0
    if params.dim() != 2 or params.shape[1] != len(COLUMNS) or (rows % n if n else rows):
        raise ValueError(
            f"params: got shape {tuple(params.shape)}, allowed: (V, {len(COLUMNS)}) with V a multiple of the {n} images"
        )
    if params.device != images.device:
        raise ValueError(f"params: got device {params.device}, allowed: that of the images, {images.device}")
    if params.device.type != "cpu" or torch.compiler.is_compiling() or not rows:
        return
    if not params.isfinite().all():
        raise ValueError("params: got values that are not finite, allowed: finite numbers")
    heights, widths = (side.repeat(rows // n) for side in sizes_of(images))
    column = dict(zip(COLUMNS, params.unbind(1), strict=True))
    top, left, height, width = (column[name] for name in COLUMNS[:4])
    limits = (
        ("a crop within its image", (top < 0) | (left < 0) | (top + height > heights) | (left + width > widths)),
        ("a crop of at least 1 pixel", (height < 1) | (width < 1)),
        ("an order from 0 to 23", (column["order"] < 0) | (column["order"] > 23)),
        ("factors from 0 up", torch.stack([column[name] for name in COLUMNS[7:10]]).amin(0) < 0),
        ("a hue within -0.5 to 0.5", column["hue"].abs() > 0.5),
        ("a blur within the view: sigma from 0 up, kernel odd, below 2 size",
         (column["sigma"] < 0) | (column["kernel"] % 2 != 1) | (column["kernel"] > 2 * size - 1)),
    )  # fmt: skip
    for allowed, wrong in limits:
        if wrong.any():
            i = int(wrong.nonzero()[0])
            got = ", ".join(f"{name} {value:g}" for name, value in zip(COLUMNS, params[i].tolist(), strict=True))
            of = f"the image is {int(heights[i])} x {int(widths[i])} pixels, the view {size}"
            raise ValueError(f"params: row {i} has {got}; allowed: {allowed}; {of}")


def _described(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
