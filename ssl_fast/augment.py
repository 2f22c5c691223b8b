"""Augmented views of images: what a method draws for each, and modules that make them (Chen et al. 2020, section 3,
appendix A; He et al. 2020; Zbontar et al. 2021). The arithmetic is that of ssl_fast/ops/two_views.py.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_fast._extras import nearest
from ssl_fast.ops.two_views import COLUMNS, MEAN_STD, ORDERS, PackedImages, sizes_of, two_views

TRIES = 10  # at a crop that its image holds, as in torchvision; then the largest in the middle that the ratios allow


@dataclass(frozen=True)
class Policy:
    """How a view is drawn; every parameter is drawn for each view of each image on its own.

    Distributions are those of torchvision's RandomResizedCrop, ColorJitter (in RandomApply), RandomGrayscale,
    GaussianBlur (in RandomApply) and RandomSolarize.

    Attributes:
        rotate: degrees to either side, before the crop.
        crop_area: smallest and largest share of the image's area that a crop keeps.
        crop_ratio: smallest and largest ratio of its width to its height.
        flip: probability of a horizontal flip.
        strength: s of the colour distortion: brightness and contrast within 0.8 s, in an order drawn too. Images of one
            channel have no saturation and no hue.
        saturation, hue: of the distortion, within saturation * s and hue * s.
        jitter: probability of the distortion.
        gray: probability of dropping the colours.
        blur: probability of a Gaussian blur over 10% of the view.
        sigma: of the blur, in pixels.
        solarize: probability of inverting what is at least half bright.
        second: of the second view and those after it; None: the same.

    Raises:
        ValueError: naming what no view could be drawn with.
    """

    rotate: float = 0.0
    crop_area: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    strength: float = 1.0
    saturation: float = 0.8
    hue: float = 0.2
    jitter: float = 0.8
    gray: float = 0.2
    blur: float = 0.5
    solarize: float = 0.0
    second: Policy | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "gray", "blur", "solarize"):
            _within(name, getattr(self, name), 0, 1)
        _within("rotate", self.rotate, 0, 180)
        for name, most in (("strength", math.inf), ("saturation", math.inf), ("hue", 0.5)):
            factor = 1 if name == "strength" else self.strength
            _within(name, getattr(self, name), 0, most / factor if factor else math.inf)
        for name, most in (("crop_area", 1.0), ("crop_ratio", math.inf), ("sigma", math.inf)):
            pair = getattr(self, name)
            if (
                not isinstance(pair, (tuple, list))
                or len(pair) != 2
                or not all(isinstance(number, numbers.Real) for number in pair)
                or not 0 < pair[0] <= pair[1] <= most
                or math.isinf(pair[1])
            ):
                raise ValueError(
                    f"{name}: got {pair}, allowed: two numbers above 0, the smaller first"
                    f"{f', up to {most}' if most < math.inf else ''}"
                )
        if self.second is not None and not isinstance(self.second, Policy):
            raise TypeError(f"second: got {self.second!r}, allowed: a Policy, or None for the same in both views")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, numbers.Real) or not low <= value <= high or value == math.inf:
        raise ValueError(f"{name}: got {value!r}, allowed: {low} to {high:g}")


_BARLOW = Policy(strength=0.5, saturation=0.4)  # section 2.2 and the authors' code: BYOL's, different for each view
_DIGITS = Policy(rotate=15.0, crop_area=(0.4, 1.0), flip=0.0, strength=0.5, gray=0.0)

POLICIES = {
    "simclr": Policy(),
    "simclr_small": Policy(strength=0.5, blur=0.0),  # appendix B.9, CIFAR-10
    "moco_v1": Policy(crop_area=(0.2, 1.0), strength=0.5, hue=0.8, jitter=1.0, blur=0.0),  # section 4
    "moco_v2": Policy(crop_area=(0.2, 1.0), strength=0.5),  # section 3, and the authors' code
    "barlow_twins": replace(_BARLOW, blur=1.0, second=replace(_BARLOW, blur=0.1, solarize=0.2)),
    "barlow_twins_small": replace(_BARLOW, blur=0.0, second=replace(_BARLOW, blur=0.0, solarize=0.2)),
    "digits": replace(_DIGITS, blur=0.0),
    "digits_blur": _DIGITS,
    "barlow_twins_digits": replace(_DIGITS, blur=0.0, second=replace(_DIGITS, solarize=0.2)),
}


def policy_named(name: str | Policy) -> Policy:
    """The policy of that name; a Policy is returned as it is."""
    if isinstance(name, Policy):
        return name
    if not isinstance(name, str):
        raise TypeError(f"augment: got {name!r}, allowed: a name of ssl_fast.augment.POLICIES or a Policy")
    if name not in POLICIES:
        allowed = ["auto", *POLICIES]
        raise ValueError(
            f"augment: got {name!r}, {nearest(name, allowed)}allowed: {', '.join(allowed)} or a ssl_fast.augment.Policy"
        )
    return POLICIES[name]


def sample_view_params(
    index: Tensor,
    height: int | Tensor,
    width: int | Tensor,
    policy: str | Policy,
    *,
    size: int,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> Tensor:
    """What is drawn for one view of each image: rows for `ssl_fast.functional.two_views`.

    A row depends on its own (seed, epoch, index, view), image size and policy alone: on no other image of the batch, no
    worker, rank or earlier draw. The numbers come from SplitMix64 (Steele, Lea & Flood 2014) as a function of a
    counter, computed on the CPU: the same to the bit for every device. The global generators are left alone.

    Args:
        index: (N,), integers: the number of each image in its data set.
        height, width: of the images, in pixels; one for all, or (N,).
        policy: what to draw, or a name of POLICIES; its `second` is the caller's business.
        size: pixels of a view's side, of which the blur's kernel takes 10%.
        seed, epoch, view: whole numbers from 0 to 2**32 - 1.

    Returns:
        (N, 15), fp32, on the CPU.

    Raises:
        ValueError: naming the argument; `crop_ratio` where no crop of an image has such a shape.

    Example:
        >>> params = sample_view_params(torch.arange(8), 32, 32, POLICIES["simclr_small"], size=32, epoch=3)
    """
    policy = policy_named(policy)
    if index.is_floating_point() or index.is_complex():
        raise TypeError(f"index: got {index.dtype}, allowed: integers, the images' numbers in their data set")
    rows = np.asarray(index.cpu(), dtype=np.int64).astype(np.uint64)
    heights, widths = (np.broadcast_to(np.asarray(side, np.float64), rows.shape) for side in (height, width))
    if (np.minimum(heights, widths) < 1).any():
        raise ValueError(
            f"height, width: got {heights.min():g}, {widths.min():g}, allowed: images of at least one pixel"
        )
    state = _mix(_mix(rows) + np.uint64(seed_of((seed, epoch, view))))
    *box, u = np.split(_uniform(state, 0, 4 + len(COLUMNS)), (1, 2, 3, 4), axis=1)
    names = ("top", "left", "height", "width")
    drawn = dict(zip(names, _crops(np.stack(box, 2), heights, widths, policy), strict=True))
    failed = np.flatnonzero(drawn["width"] == 0)
    if len(failed):
        more = _uniform(state[failed], 64, 4 * (TRIES - 1)).reshape(len(failed), TRIES - 1, 4)
        again = _crops(more, heights[failed], widths[failed], policy)
        again = np.where(again[3] == 0, _largest(heights[failed], widths[failed], policy), again)
        if (again[2:] < 1).any():
            worst = failed[np.flatnonzero((again[2:] < 1).any(0))[0]]
            raise ValueError(
                f"crop_ratio: got {policy.crop_ratio}, which no crop of an image of {heights[worst]:g} x "
                f"{widths[worst]:g} pixels has, allowed: ratios of width to height such as (3 / 4, 4 / 3)"
            )
        for name, values in zip(names, again, strict=True):
            drawn[name][failed] = values

    def chance(column: int, probability: float) -> Any:
        return u[:, column] < probability

    def between(column: int, low: float, high: float) -> Any:
        return low + (high - low) * u[:, column]

    s = policy.strength
    jitter = chance(0, policy.jitter)
    drawn["order"] = np.where(jitter, np.floor(len(ORDERS) * u[:, 1]), 0)
    around = {"brightness": 0.8 * s, "contrast": 0.8 * s, "saturation": policy.saturation * s}
    for column, (name, share) in enumerate(around.items(), 2):
        drawn[name] = np.where(jitter, between(column, max(0, 1 - share), 1 + share), 1)
    drawn["hue"] = np.where(jitter, between(5, -policy.hue * s, policy.hue * s), 0)
    drawn["flip"], drawn["gray"] = chance(6, policy.flip), chance(7, policy.gray)
    drawn["sigma"] = np.where(chance(8, policy.blur), between(9, *policy.sigma), 0)
    drawn["kernel"] = np.full(len(rows), max(3, size // 20 * 2 + 1) if size > 1 else 1)
    drawn["solarize"] = np.where(chance(10, policy.solarize), 0.5, 2)
    drawn["angle"] = between(11, -policy.rotate, policy.rotate)
    return torch.from_numpy(np.stack([drawn[name] for name in COLUMNS], 1).astype(np.float32))


def _mix(x: Any) -> Any:
    """A bijection of 64 bits that looks random, of an array of uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(state: Any, first: int, count: int) -> Any:
    """Draws number `first` and after of each state, (N, count), from 0 to below 1."""
    counter = np.arange(first, first + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(state[:, None] + counter) >> np.uint64(11)) * 2.0**-53


def _crops(u: Any, heights: Any, widths: Any, policy: Policy) -> Any:
    """(4, N): top, left, height and width of the first of each image's tries (N, tries, 4) that it holds, or zeros."""
    heights, widths = heights[:, None], widths[:, None]
    low, high = policy.crop_area
    area = heights * widths * (low + (high - low) * u[..., 0])
    low, high = np.log(policy.crop_ratio)
    ratio = np.exp(low + (high - low) * u[..., 1])
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= widths) & (height > 0) & (height <= heights)
    top, left = np.floor(u[..., 2] * (heights - height + 1)), np.floor(u[..., 3] * (widths - width + 1))
    first = fits.argmax(1)[:, None]
    return np.stack([np.take_along_axis(x * fits, first, 1)[:, 0] for x in (top, left, height, width)])


def _largest(heights: Any, widths: Any, policy: Policy) -> Any:
    low, high = policy.crop_ratio
    width, height = np.minimum(widths, np.rint(heights * high)), np.minimum(heights, np.rint(widths / low))
    return np.stack([(heights - height) // 2, (widths - width) // 2, height, width])


class TwoViews(nn.Module):
    """Views of each image of a uint8 batch as normalised floats; or of one image, as a data set's `transform`.

    Args:
        policy: what to draw: a name of POLICIES, a Policy, or a list with one for each view.
        size: pixels of a view's side; a list gives each view its own, for multi-crop.
        views: how many, where neither is a list.
        seed: of the draws.
        mean, std: of each channel; default ImageNet's.
        dtype: of the views: torch.float32, bfloat16 or float16.

    Example:
        >>> view1, view2 = TwoViews("simclr", 224)(images, indices, epoch)  # uint8 (N, C, H, W), or PackedImages
        >>> local = replace(POLICIES["simclr"], crop_area=(0.05, 0.14))
        >>> multi_crop = TwoViews([POLICIES["simclr"]] * 2 + [local] * 6, [224] * 2 + [96] * 6)
        >>> data = ImageFolder("images", transform=TwoViews("moco_v2", 224))  # in your own DataLoader
    """

    def __init__(
        self,
        policy: str | Policy | Sequence[str | Policy] = "simclr",
        size: int | Sequence[int] = 224,
        *,
        views: int = 2,
        seed: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        many = {len(x) for x in (policy, size) if isinstance(x, Sequence) and not isinstance(x, str)}
        if len(many) > 1:
            raise ValueError(f"size: got {size}, allowed: one for all, or one for each of the policies")
        count = many.pop() if many else views
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"views: got {count!r}, allowed: a whole number from 1 up")
        if isinstance(policy, str) or not isinstance(policy, Sequence):
            first = policy_named(policy)
            self.policies = [first] + [first.second or first] * (count - 1)
        else:
            self.policies = [policy_named(each) for each in policy]
        self.sizes = list(size) if isinstance(size, Sequence) else [size] * count
        if not all(isinstance(each, int) and each > 0 and each is not True for each in self.sizes):
            raise ValueError(f"size: got {size!r}, allowed: whole numbers from 1 up, pixels of a view's side")
        self.seed, self.mean, self.std, self.dtype = seed, mean, std, dtype

    @torch.no_grad()
    def forward(self, images: Any, index: Any = None, epoch: int = 0) -> tuple[Tensor, ...] | list[Tensor]:
        """The views of a batch, each (N, C, size, size), channels_last, on the images' device.

        images: uint8 (N, C, H, W), or PackedImages. A single image, uint8 (C, H, W) or of Pillow, gives a list of (C,
        size, size).
        index: (N,), the images' numbers in their data set; of a single image one number. With (seed, epoch) they decide
        what is drawn, whatever else is in the batch; without them, numbers are drawn from torch's global generator,
        which a DataLoader seeds in each of its workers.
        """
        if not isinstance(images, PackedImages) and (not isinstance(images, Tensor) or images.dim() == 3):
            own = None if index is None else torch.as_tensor(index).view(-1)
            return [view[0] for view in self(_as_tensor(images)[None], own, epoch)]
        index = torch.randint(2**62, (len(images),)) if index is None else torch.as_tensor(index)
        if index.shape != (len(images),):
            raise ValueError(f"index: got shape {tuple(index.shape)}, allowed: ({len(images)},), one for each image")
        height, width = sizes_of(images)
        views: dict[int, Tensor] = {}
        for size in dict.fromkeys(self.sizes):
            numbers = [number for number, own in enumerate(self.sizes) if own == size]
            params = [
                sample_view_params(index, height, width, self.policies[number], size=size, seed=self.seed, epoch=epoch,
                                   view=number)
                for number in numbers
            ]  # fmt: skip
            on_device = torch.cat(params).to(images.device, non_blocking=True)
            made = two_views(images, on_device, size, mean=self.mean, std=self.std, dtype=self.dtype)
            views |= dict(zip(numbers, made.chunk(len(numbers)), strict=True))
        return tuple(views[number] for number in range(len(self.sizes)))


def _as_tensor(image: Any) -> Tensor:
    """An image of Pillow as uint8 (C, H, W); grey ones keep their one channel."""
    if isinstance(image, Tensor):
        return image
    if not hasattr(image, "convert"):
        raise TypeError(
            f"images: got {type(image).__name__}, allowed: a uint8 tensor (N, C, H, W) or (C, H, W), PackedImages, or "
            "an image of Pillow"
        )
    pixels = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)


def seed_of(key: tuple[int, ...]) -> int:
    """A 64-bit seed from a tuple of integers from 0 to 2**32 - 1, well mixed: neighbours share nothing."""
    if not all(
        isinstance(number, numbers.Integral) and 0 <= number < 2**32 for number in key
    ):  # a longer one would take the place of its neighbour
        raise ValueError(f"seed: got {key} with what it is combined with, allowed: whole numbers from 0 to 2**32 - 1")
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def normalise(x: Tensor) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel; x in [0, 1], (N, C, H, W)."""
    mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in MEAN_STD[x.shape[1]])
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def plain_view(images: Tensor, size: int) -> Tensor:
    """The view for evaluation, (N, C, size, size): uint8 images (N, C, H, W) resized with antialiasing, normalised."""
    x = images.float().div_(255)
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return normalise(x)
