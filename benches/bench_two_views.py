"""Two augmented views of every image of a batch: torchvision's transforms v2 image by image, in this process and in a
DataLoader of two workers, kornia on the batch, and a copy of as many views.

`python -m benches.bench_two_views` prints the tables and writes the rows to benches/results.csv. The floor is the views
written once, half of what their copy moves; views a second are 2 N / time. The error is against the same views in fp64,
of the first images; the others draw views of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benches import common
from benches.common import Provider, Table
from benches.machine import DEVICE
from benches.timing import Step
from ssl_fast.augment import POLICIES, Policy, TwoViews, sample_view_params
from ssl_fast.ops.two_views import MEAN_STD, PackedImages, _reference, sizes_of, two_views

# Name: heights and widths of the images, side of a view, images of a batch on a CPU and on a GPU.
CASES = {
    "32 -> 32": ([(32, 32)], 32, 512, 4096),
    "256 -> 224": ([(256, 256)], 224, 32, 256),
    "ragged -> 224": ([(375, 500), (500, 333), (281, 500), (256, 256), (400, 400)], 224, 32, 256),
}
POLICY = {"no blur": "simclr_small", "blur": "moco_v2"}
JUDGED = 8  # images that the error is of


def cases(quick: bool) -> list[tuple[str, str, int]]:
    """The images and their views, whether views are blurred, and how many images."""
    if quick:
        return [("32 -> 32", "no blur", 64), ("ragged -> 224", "blur", 8)]
    return [(case, blur, CASES[case][3 if DEVICE == "cuda" else 2]) for case in CASES for blur in POLICY]


@lru_cache(1)
def images_of(case: str, n: int) -> Tensor | PackedImages:
    shapes = CASES[case][0]
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(256, (3, *shapes[i % len(shapes)]), dtype=torch.uint8, generator=generator) for i in range(n)
    ]
    batch = torch.stack(images) if len(shapes) == 1 else PackedImages.of(images)
    return batch.to(torch.device(DEVICE))


def torchvision_steps(policy: Policy, size: int, channels: int = 3) -> Callable[[Tensor], Tensor]:
    """A view of one image of bytes by torchvision's classes, drawn as the policy says; its `second` is the caller's."""
    from torchvision.transforms import InterpolationMode, v2

    s, kernel = policy.strength, max(3, size // 20 * 2 + 1)
    jitter = v2.ColorJitter(0.8 * s, 0.8 * s, policy.saturation * s, policy.hue * s)
    steps = [
        *([v2.RandomRotation(policy.rotate, InterpolationMode.BILINEAR)] if policy.rotate else []),
        v2.RandomResizedCrop(size, scale=policy.crop_area, ratio=policy.crop_ratio, antialias=True),
        v2.RandomHorizontalFlip(policy.flip),
        v2.RandomApply([jitter], policy.jitter),
        v2.RandomGrayscale(policy.gray),
        v2.RandomApply([v2.GaussianBlur(kernel, policy.sigma)], policy.blur),
        *([v2.RandomSolarize(128, policy.solarize)] if policy.solarize else []),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*MEAN_STD[channels]),
    ]
    return v2.Compose(steps)


class Loaded(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image, made where they are asked for."""

    def __init__(self, images: Tensor | PackedImages, steps: Callable[[Tensor], Tensor]) -> None:
        self.images, self.steps = images, steps

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.steps(self.images[i]), self.steps(self.images[i])


def loaded(data: Loaded, batch: int) -> Callable[[], Any]:
    """The next batch of two workers that never pause, whichever epoch it is of."""
    loader = torch.utils.data.DataLoader(data, batch, num_workers=2, persistent_workers=True)

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()
    return lambda: [next(batches) for _ in range(len(data) // batch)]


def kornia_steps(policy: Policy, size: int) -> nn.Module:
    import kornia.augmentation as K

    s, kernel = policy.strength, max(3, size // 20 * 2 + 1)
    steps = [
        K.RandomResizedCrop((size, size), scale=policy.crop_area, cropping_mode="resample"),
        K.RandomHorizontalFlip(policy.flip),
        K.ColorJitter(0.8 * s, 0.8 * s, policy.saturation * s, policy.hue * s, p=policy.jitter),
        K.RandomGrayscale(p=policy.gray),
        *([K.RandomGaussianBlur((kernel, kernel), policy.sigma, p=policy.blur)] if policy.blur else []),
        K.Normalize(*map(torch.tensor, MEAN_STD[3])),
    ]
    return nn.Sequential(*steps).to(DEVICE)


def setup(case: str, blur: str, n: int) -> Table:
    size, policy = CASES[case][1], POLICIES[POLICY[blur]]

    def ours(dtype: torch.dtype) -> Step:
        draw, images, index = TwoViews(policy, size, dtype=dtype), images_of(case, n), torch.arange(n)
        return lambda: draw(images, index)

    def error(dtype: torch.dtype) -> float:
        batch = images_of(case, n)
        images = batch[:JUDGED] if isinstance(batch, Tensor) else PackedImages.of([batch[i] for i in range(JUDGED)])
        params = sample_view_params(torch.arange(JUDGED), *sizes_of(images), policy, size=size).to(DEVICE)
        data, table = (images, None) if isinstance(images, Tensor) else (images.data, images.table)
        truth = _reference(data, table, params, 3, size, *MEAN_STD[3], torch.float64)
        return common.relative_error([two_views(images, params, size, dtype=dtype)], [truth])

    def data() -> Loaded:
        return Loaded(images_of(case, n).to(torch.device("cpu")), torchvision_steps(policy, size))

    def here() -> Step:
        made = data()
        return lambda: [torch.stack(views) for views in zip(*(made[i] for i in range(n)), strict=True)]

    def by_kornia() -> Step:
        batch, images = kornia_steps(policy, size), images_of(case, n)
        return lambda: batch((images.float() / 255).repeat(2, 1, 1, 1))

    found = [common.copy_of(lambda: torch.rand(2, n, 3, size, size, device=DEVICE))]
    for dtype, written in ((torch.float32, 0.5), (torch.bfloat16, 0.25)):
        name = str(dtype).removeprefix("torch.")
        found.append(Provider("ssl_fast", partial(ours, dtype), name, work=written, error=partial(error, dtype)))
    with common.peer("torchvision"):
        import torchvision.transforms.v2  # noqa: F401

        found.append(Provider("torchvision", here, work=0.5))
        loader = lambda: loaded(data(), min(32, n))  # noqa: E731
        found.append(Provider("torchvision, DataLoader of 2", loader, work=0.5, elsewhere=True))
    if len(CASES[case][0]) == 1:
        with common.peer("kornia"):
            import kornia.augmentation  # noqa: F401

            found.append(Provider("kornia", by_kornia, work=0.5))
    return Table("two_views", f"{case}, {blur}, {n} images", found, bytes=2.0 * 4 * 2 * n * 3 * size * size)


if __name__ == "__main__":
    common.main(__doc__, cases, setup, seconds=8.0, allocators=("default",))
