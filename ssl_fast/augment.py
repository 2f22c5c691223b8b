"""The two augmented views of SimCLR (Chen et al. 2020, section 3, appendix A) and of MoCo, in batches on any device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_fast._extras import nearest, require

# ImageNet's mean and standard deviation, and those of its grey values.
MEAN_STD = {1: ((0.449,), (0.226,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}


BLOCK = 1024  # images augmented at once: the steps hold several copies of what they work on


@dataclass(frozen=True)
class Policy:
    """How a view is drawn; every parameter is drawn for each view of each image on its own.

    Attributes:
        rotate: degrees to either side, before the crop.
        crop_area: smallest and largest share of the image's area that a crop keeps; its aspect ratio is 3/4 to 4/3.
        flip: probability of a horizontal flip.
        strength: s of the colour distortion: brightness and contrast within 0.8 s, in an order drawn per batch. Images
            of one channel have no saturation and no hue.
        saturation, hue: of the distortion, within saturation * s and hue * s.
        jitter: probability of the distortion.
        gray: probability of dropping the colours.
        blur: probability of a Gaussian blur over 10% of the image, sigma 0.1 to 2 pixels.
        solarize: probability of inverting what is brighter than half.
        second: of the second view; None: the same.
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
    if name not in POLICIES:
        allowed = ["auto", *POLICIES]
        raise ValueError(
            f"augment: got {name!r}, {nearest(name, allowed)}allowed: {', '.join(allowed)} or a ssl_fast.augment.Policy"
        )
    return POLICIES[name]


class TwoViews(nn.Module):
    """Two views of each image of a uint8 batch, as normalised floats.

    Args:
        policy: what to draw.
        size: pixels of a view's side.
        channels: 1 or 3.

    Example:
        >>> view1, view2 = TwoViews(POLICIES["simclr"], size=224)(images, key=(seed, epoch, step))
    """

    def __init__(self, policy: Policy, size: int, channels: int = 3) -> None:
        super().__init__()
        self.shape = (channels, size, size)
        self.steps = _steps(policy, size, channels)
        self.second = None if policy.second is None else _steps(policy.second, size, channels)

    @torch.no_grad()
    def forward(self, images: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Views (N, C, size, size), fp32, channels_last, of uint8 images (N, C, H, W).

        The parameters depend on the key alone (seed, epoch, step), never on what was drawn before; they are drawn on
        the CPU, the same for every device. The global generators are left as they were.
        """
        if len(images) > BLOCK:
            shape, last = (len(images), *self.shape), torch.channels_last
            views = [torch.empty(shape, device=images.device, memory_format=last) for _ in range(2)]
            for i, block in enumerate(images.split(BLOCK)):
                for view, drawn in zip(views, self(block, (*key, i)), strict=True):
                    view.split(BLOCK)[i].copy_(drawn)
            return views[0], views[1]
        x = images.float().div_(255)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(key))
            x = self.steps(x.repeat(2, 1, 1, 1)) if self.second is None else torch.cat([self.steps(x), self.second(x)])
        view1, view2 = normalise(x).chunk(2)
        return view1, view2


def _steps(policy: Policy, size: int, channels: int) -> nn.Sequential:
    K = require("kornia.augmentation", "the augmentations")
    colour, s = channels == 3, policy.strength
    kernel = max(3, size // 20 * 2 + 1)
    jitter = (0.8 * s, 0.8 * s, policy.saturation * s * colour, policy.hue * s * colour)
    steps = [
        K.RandomRotation(policy.rotate, p=1.0) if policy.rotate else None,
        # Resampling by an affine grid: on a GPU slicing would fetch each image's box to the host.
        K.RandomResizedCrop((size, size), scale=policy.crop_area, cropping_mode="resample"),
        K.RandomHorizontalFlip(policy.flip) if policy.flip else None,
        K.ColorJitter(*jitter, p=policy.jitter) if s else None,
        K.RandomGrayscale(p=policy.gray) if policy.gray and colour else None,
        K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=policy.blur) if policy.blur else None,
        K.RandomSolarize(0.0, 0.0, p=policy.solarize) if policy.solarize else None,
    ]
    return nn.Sequential(*(step for step in steps if step is not None))


def seed_of(key: tuple[int, ...]) -> int:
    """A 64-bit seed from a tuple of non-negative integers, well mixed: neighbours share nothing."""
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
