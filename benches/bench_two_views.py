"""Two augmented views of every image of a batch: torchvision's transforms v2 image by image, in this process and in a
DataLoader of two workers, kornia on the batch, and a copy of the views, the floor of any way to make them.

`python -m benches.bench_two_views` prints the tables and writes the rows to benches/results.csv. `--quick` takes fewer
images and writes nothing. The ratio is to ours; views a second are 2 N / time. Memory is what one call adds, in a fresh
process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benches import common
from ssl_fast.augment import POLICIES, Policy, TwoViews
from ssl_fast.ops.two_views import MEAN_STD, PackedImages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Name: heights and widths of the images, side of a view, images of a batch on a CPU and on a GPU.
CASES = {
    "32 -> 32": ([(32, 32)], 32, 512, 4096),
    "256 -> 224": ([(256, 256)], 224, 32, 256),
    "ragged -> 224": ([(375, 500), (500, 333), (281, 500), (256, 256), (400, 400)], 224, 32, 256),
}
POLICY = {"no blur": "simclr_small", "blur": "moco_v2"}
OURS = "ssl_fast"


def images_of(case: str, quick: bool) -> Tensor | PackedImages:
    shapes, _, on_cpu, on_gpu = CASES[case]
    n = (on_gpu if DEVICE == "cuda" else on_cpu) // (4 if quick else 1)
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(256, (3, *shapes[i % len(shapes)]), dtype=torch.uint8, generator=generator) for i in range(n)
    ]
    batch = torch.stack(images) if len(shapes) == 1 else PackedImages.of(images)
    return batch.to(torch.device(DEVICE))


def torchvision_steps(policy: Policy, size: int) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    s, kernel = policy.strength, max(3, size // 20 * 2 + 1)
    jitter = v2.ColorJitter(0.8 * s, 0.8 * s, policy.saturation * s, policy.hue * s)
    steps = [
        v2.RandomResizedCrop(size, scale=policy.crop_area, antialias=True),
        v2.RandomHorizontalFlip(policy.flip),
        v2.RandomApply([jitter], policy.jitter),
        v2.RandomGrayscale(policy.gray),
        v2.RandomApply([v2.GaussianBlur(kernel, policy.sigma)], policy.blur),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*MEAN_STD[3]),
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


def providers(case: str, blur: str, quick: bool) -> dict[str, Callable[[], Any]]:
    size, policy = CASES[case][1], POLICIES[POLICY[blur]]
    images = images_of(case, quick)
    index = torch.arange(len(images))
    plain, half = TwoViews(policy, size), TwoViews(policy, size, dtype=torch.bfloat16)
    steps, made = torchvision_steps(policy, size), torch.empty(2, len(images), 3, size, size, device=DEVICE)
    kept = torch.empty_like(made)
    on_host = images.to(torch.device("cpu"))
    data = Loaded(on_host, steps)
    found: dict[str, Callable[[], Any]] = {
        OURS: lambda: plain(images, index),
        "ssl_fast, bf16": lambda: half(images, index),
        "torchvision": lambda: [torch.stack(views) for views in zip(*(data[i] for i in range(len(data))), strict=True)],
        "torchvision, DataLoader of 2": loaded(data, min(32, len(data))),
        "copy of the views": lambda: kept.copy_(made),
    }
    if isinstance(images, Tensor):
        batch = kornia_steps(policy, size)
        found["kornia"] = lambda: batch((images.float() / 255).repeat(2, 1, 1, 1))
    return found


def rows_of(case: str, blur: str, quick: bool) -> list[common.Row]:
    steps = providers(case, blur, quick)
    measured = {name: common.timing(t) for name, t in common.interleave(steps, seconds=2.0 if quick else 8.0).items()}
    rows = []
    n = len(images_of(case, quick))
    for provider, times in measured.items():
        row = {"op": "two_views", "shape": f"{case}, {blur}, {n} images", "provider": provider, "allocator": "default"}
        row |= {"dtype": "bfloat16" if "bf16" in provider else "float32", "to": OURS, **times}
        row["ratio"], row["views/s"] = times["ms"] / measured[OURS]["ms"], 2e3 * n / times["ms"]
        if "DataLoader" not in provider and "copy" not in provider:  # whose memory is that of its workers; or kept
            arguments = ["--memory", provider, case, blur, *["--quick"] * quick]
            row["extra_mb"] = common.in_fresh_process("benches.bench_two_views", arguments)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the images, and nothing written")
    parser.add_argument("--memory", nargs=3, metavar=("PROVIDER", "CASE", "BLUR"), help="for this bench's own use")
    given = parser.parse_args()
    if given.memory:
        provider, case, blur = given.memory
        step = providers(case, blur, given.quick)[provider]
        print(common.extra_memory(step))
        return
    print(f"two views of every image on {common.device_name()}, {torch.get_num_threads()} threads")
    conditions = common.conditions()
    for case in CASES:
        for blur in POLICY:
            rows = rows_of(case, blur, given.quick)
            print(f"\n{rows[0]['shape']}")
            columns = ("provider", "ms", "ms_p20", "ms_p80", "ratio", "views/s", "extra_mb")
            print(common.table(rows, columns), flush=True)
            if not given.quick:
                common.save([row | conditions for row in rows])


if __name__ == "__main__":
    sys.exit(main())
