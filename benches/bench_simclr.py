"""A whole step of SimCLR, and its parts, against the same step in plain PyTorch and with lightly's parts.

A step: two views of a batch of bytes, encoder and head, loss, backward pass, SGD, and the average of the weights that
is evaluated. Network, weights, batch and precision are the same for all; augmentation, loss and average are each
library's own, and ours has gone through `accelerate`. The encoder's part is its forward and backward pass.

`python -m benches.bench_simclr` prints the table and writes the rows to benches/results.csv; `--profile FOLDER`
profiles one step of ours instead, and leaves a trace for chrome://tracing or ui.perfetto.dev, and a picture of what
takes longest.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ssl_fast
from benches import common
from benches.bench_nt_xent import dense
from benches.common import DEVICE, Provider, Step, Table
from ssl_fast.augment import POLICIES, TwoViews
from ssl_fast.methods.simclr import projection_head

PARTS = ("data", "encoder", "loss", "optimizer", "ema")
TEMPERATURE, MOMENTUM = 0.1, 0.999
OURS, PLAIN = "ssl_fast", "plain PyTorch"
TOP = 12  # bars of a profile

Views = tuple[Tensor, Tensor]


def cases(quick: bool) -> list[tuple[str, int, int]]:
    """The network, pixels of a side and images."""
    if quick:
        return [("resnet18", 32, 8)]
    return [("resnet50", 224, 256)] if DEVICE == "cuda" else [("resnet18", 32, 256)]


# ---- the parts of each library


def two_views(policy: Callable[..., Tensor], images: Tensor) -> Views:
    """Image by image, as a DataLoader's worker does."""
    views = [torch.stack([policy(image) for image in images]).to(DEVICE) for _ in range(2)]
    return views[0], views[1]


def plain_policy(pixels: int) -> Callable[..., Tensor]:
    from torchvision.transforms import v2

    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    crop = v2.RandomResizedCrop(pixels, antialias=True)
    to_float = v2.ToDtype(torch.float32, scale=True)
    normalize = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return v2.Compose([crop, v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(p=0.2), to_float, normalize])


def lightly_views(pixels: int) -> Callable[[Tensor], Views]:
    from lightly.transforms import SimCLRTransform
    from torchvision.transforms.functional import to_pil_image

    transform = SimCLRTransform(pixels, cj_strength=0.5, gaussian_blur=0.0)

    def views(images: Tensor) -> Views:
        pairs = [transform(to_pil_image(image)) for image in images]
        return torch.stack([a for a, _ in pairs]).to(DEVICE), torch.stack([b for _, b in pairs]).to(DEVICE)

    return views


def our_views(pixels: int) -> Callable[[Tensor], Views]:
    draw = TwoViews(POLICIES["simclr_small"], pixels)
    return lambda images: draw(images.to(DEVICE), key=(0,))


@torch.no_grad()
def naive_average(model: nn.Module, average: nn.Module) -> None:
    for p, a in zip(model.parameters(), average.parameters(), strict=True):
        a.mul_(MOMENTUM).add_(p, alpha=1 - MOMENTUM)


def libraries(pixels: int) -> dict[str, Callable[[], tuple[Callable[[Tensor], Views], Any, Any]]]:
    """By provider: how it makes views, its loss, and its average of the weights, which takes (model, average)."""

    def theirs() -> tuple[Any, Any, Any]:
        from lightly.loss import NTXentLoss
        from lightly.models.utils import update_momentum

        return lightly_views(pixels), NTXentLoss(TEMPERATURE), partial(update_momentum, m=MOMENTUM)

    def ours() -> tuple[Any, Any, Any]:
        average = partial(ssl_fast.update_momentum, m=MOMENTUM)
        return our_views(pixels), ssl_fast.NTXentLoss(TEMPERATURE), average

    found = {PLAIN: lambda: (partial(two_views, plain_policy(pixels)), dense, naive_average), OURS: ours}
    with contextlib.suppress(ImportError):
        import lightly.loss  # noqa: F401

        found["lightly"] = theirs
    return found


# ---- the step and its parts


def network_of(name: str, provider: str) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    encoder = getattr(torchvision.models, name)()
    width, encoder.fc = encoder.fc.in_features, nn.Identity()
    network = nn.Sequential(encoder, projection_head("nonlinear", width, 128))
    network = network.to(DEVICE, memory_format=torch.channels_last).train()
    if provider == OURS:
        ssl_fast.accelerate(network)
    return network


def steps_of(name: str, pixels: int, batch: int, provider: str) -> dict[str, Step]:
    """A whole step under "", and each part alone."""
    make_views, criterion, average = libraries(pixels)[provider]()
    network = network_of(name, provider)
    averaged = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images = torch.randint(256, (batch, 3, pixels, pixels), generator=torch.Generator().manual_seed(1)).byte()

    def embed(views: Views) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            return network(torch.cat(views).contiguous(memory_format=torch.channels_last))

    def whole() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(*embed(make_views(images)).float().chunk(2))
        loss.backward()
        optimizer.step()
        average(network, averaged)
        return loss.detach()

    views = make_views(images)
    dz = torch.randn(2 * batch, 128, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    z1, z2 = (z.clone().requires_grad_() for z in dz.chunk(2))
    for p in network.parameters():
        p.grad = torch.zeros_like(p)

    def encoder() -> None:
        z = embed(views)
        z.backward(dz.to(z.dtype))

    def loss() -> None:
        z1.grad = z2.grad = None
        criterion(z1, z2).backward()

    return {
        "": whole,
        "data": lambda: make_views(images),
        "encoder": encoder,
        "loss": loss,
        "optimizer": optimizer.step,
        "ema": lambda: average(network, averaged),
    }


def setup(name: str, pixels: int, batch: int) -> Table:
    def error(provider: str) -> float:
        """Of the loss of one batch of views, which are the same for all."""
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(2 * batch, 3, pixels, pixels, generator=generator).to(DEVICE)
        _, criterion, _ = libraries(pixels)[provider]()
        truth = dense(*network_of(name, PLAIN).double()(x.double()).chunk(2))
        return common.relative_error([criterion(*network_of(name, provider)(x).chunk(2))], [truth])

    dtype = "bfloat16 autocast" if DEVICE == "cuda" else "float32"
    found = []
    for part in ("", *PARTS):
        for provider in libraries(pixels):
            build = partial(lambda provider, part: steps_of(name, pixels, batch, provider)[part], provider, part)
            wrong = None if part else partial(error, provider)
            found.append(Provider(provider, build, dtype, op=f"simclr {part}".strip(), error=wrong))
    return Table("simclr", f"{name} {batch}x3x{pixels}x{pixels}", found)


def profile(folder: Path) -> None:
    """A trace of one step of ours, and what takes longest in it as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step = steps_of(*cases(False)[0], OURS)[""]
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if DEVICE == "cuda" else []
    with torch.profiler.profile(activities=activities) as recorded:
        step()
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / "simclr_trace.json"
    recorded.export_chrome_trace(str(trace))
    with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    trace.unlink()

    own = f"self_{'device' if DEVICE == 'cuda' else 'cpu'}_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: getattr(event, own))[-TOP:]
    total = sum(getattr(event, own) for event in recorded.key_averages())
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    bars = axis.barh([e.key[:60] for e in events], [getattr(e, own) / 1e3 for e in events])
    axis.bar_label(bars, [f"{getattr(e, own) / total:.0%}" for e in events], padding=3)
    name, pixels, batch = cases(False)[0]
    axis.set(xlabel="ms")
    figure.suptitle(f"a SimCLR step of {name}, {batch} images of {pixels} px, on {common.device_name()}", fontsize=10)
    figure.savefig(folder / "simclr_profile.png", dpi=110)
    print(f"{trace}.gz and {folder / 'simclr_profile.png'} written")


if __name__ == "__main__":
    if "--profile" in sys.argv[1:-1]:
        profile(Path(sys.argv[sys.argv.index("--profile") + 1]))
    else:
        common.main(__doc__, cases, setup, seconds=60.0, allocators=("default",))
