"""A whole step of SimCLR, and its parts, against the same step in plain PyTorch and with lightly's parts.

A step: two views of a batch of bytes, encoder and head, loss, backward pass, SGD, and the average of the weights that
is evaluated. Network, weights, batch and precision are the same for all; augmentation, loss and average are each
library's own, and ours has gone through `accelerate`. The encoder's part is its forward and backward pass.

The floor of a step is the flop of the encoder and head, forward and backward, and of the loss's two products, at the
pace of a square product of the same run; those two are floors of their parts as well. That of the other parts is their
bytes at the pace of a copy: the views written, 20 bytes a parameter of SGD with momentum, 12 of the average.

`python -m benches.bench_simclr` prints the table and writes the rows to benches/results.csv; `--profile FOLDER` leaves
a trace and a picture of one step of ours instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import ssl_fast
from benches import common
from benches.bench_nt_xent import dense
from benches.bench_two_views import torchvision_steps
from benches.common import Provider, Table
from benches.machine import DEVICE
from benches.timing import Step
from ssl_fast.augment import POLICIES, TwoViews
from ssl_fast.methods.simclr import projection_head

PARTS = ("data", "encoder", "loss", "optimizer", "ema")
TEMPERATURE, MOMENTUM = 0.1, 0.999
OURS, PLAIN = "ssl_fast", "plain PyTorch"

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
    return lambda images: draw(images.to(DEVICE), torch.arange(len(images)))


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

    def plain() -> tuple[Any, Any, Any]:
        return partial(two_views, torchvision_steps(POLICIES["simclr_small"], pixels)), dense, naive_average

    found = {PLAIN: plain, OURS: ours}
    with common.peer("lightly"):
        import lightly.loss  # noqa: F401

        found["lightly"] = theirs
    return found


# ---- the step and its parts


def untrained(name: str) -> nn.Sequential:
    import torchvision

    encoder = getattr(torchvision.models, name)()
    width, encoder.fc = encoder.fc.in_features, nn.Identity()
    return nn.Sequential(encoder, projection_head("nonlinear", width, 128))


def network_of(name: str, provider: str) -> nn.Module:
    torch.manual_seed(0)
    network = untrained(name).to(DEVICE, memory_format=torch.channels_last).train()
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


@cache
def work_of(name: str, pixels: int, batch: int) -> tuple[int, dict[str, float]]:
    """The network's parameters; and by part, "" being the whole step, the flop or the bytes that it needs."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in untrained(name).parameters())
    encoder = common.flop_of(lambda: untrained(name), 2 * batch, 3, pixels, pixels, backward=True)
    loss = 2 * 2.0 * (2 * batch) ** 2 * 128
    moved = {"data": 4.0 * 2 * batch * 3 * pixels**2, "optimizer": 20.0 * parameters, "ema": 12.0 * parameters}
    return parameters, {"": encoder + loss, "encoder": encoder, "loss": loss, **moved}


def setup(name: str, pixels: int, batch: int) -> Table:
    @torch.no_grad()  # whose graph in fp64 takes more memory than any step
    def error(provider: str) -> float:
        """Of the loss of one batch of views, which are the same for all."""
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(2 * batch, 3, pixels, pixels, generator=generator).to(DEVICE)
        _, criterion, _ = libraries(pixels)[provider]()
        truth = dense(*network_of(name, PLAIN).double()(x.double()).chunk(2))
        return common.relative_error([criterion(*network_of(name, provider)(x).chunk(2))], [truth])

    dtype = "bfloat16 autocast" if DEVICE == "cuda" else "float32"
    parameters, works = work_of(name, pixels, batch)
    copied = 8.0 * parameters
    found = []
    for part in ("", *PARTS):
        floor, unit = (common.PRODUCT, common.SQUARE) if part in ("", "encoder", "loss") else (common.COPY, copied)
        of_part = partial(Provider, dtype=dtype, op=f"simclr {part}".strip(), work=works[part] / unit, floor=floor)
        for provider in libraries(pixels):
            build = partial(lambda provider, part: steps_of(name, pixels, batch, provider)[part], provider, part)
            wrong = None if part else partial(error, provider)
            found.append(of_part(provider, build, error=wrong))
    floors = [common.square_product(dtype), common.copy_of(lambda: torch.randn(parameters, device=DEVICE))]
    shape = f"{name} {batch}x3x{pixels}x{pixels}"
    return Table("simclr", shape, [*found, *floors], flop=common.SQUARE, bytes=copied)


if __name__ == "__main__":
    common.main(__doc__, cases, setup, seconds=60.0, allocators=("default",))
