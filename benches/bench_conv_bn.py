"""Eval forward of ResNets and MobileNetV3: as it is, folded, folded and compiled, by torch.fx's fuse, and by inductor's
freezing; and what refresh() takes beside a fold and a copy of the weights.

The floor of a forward pass is its convolutions' and products' flop, which folding leaves as they are, at the pace of a
square product of the same run; that of a refresh is the copy.

`python -m benches.bench_conv_bn` prints the tables and writes the rows to benches/results.csv. On a CPU images of 64
pixels are taken. Compiling takes most of the time: what is compiled is kept under out/bench, `--resume` goes on after
an interruption. `--quick` takes ResNet-18, batch 1 and nothing compiled.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ssl_fast
from benches import common, results
from benches.common import Provider, Table
from benches.fold_models import calibrated
from benches.machine import DEVICE
from benches.timing import Step

SIZE = 224 if DEVICE == "cuda" else 64
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NETWORKS = ("resnet18", "resnet50", "mobilenet_v3_large")
COPY = "copy of the weights"


def cases(quick: bool) -> list[tuple[Any, ...]]:
    """A refresh of a network; or a forward pass of it: dtype, layout, batch, and whether to compile it."""
    if quick:
        return [("resnet18",), ("resnet18", "float32", "channels_last", 1, False)]
    forwards = itertools.product(NETWORKS, ("float32", "bfloat16"), FORMATS, (1, 64), (True,))
    return [*((name,) for name in NETWORKS), *forwards]


def network(name: str) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).to(DEVICE)
    return calibrated(model, torch.randn(8, 3, SIZE, SIZE, device=DEVICE))


@functools.cache
def flop_of_an_image(name: str) -> float:
    import torchvision

    return common.flop_of(lambda: torchvision.models.get_model(name, weights=None), 1, 3, SIZE, SIZE)


def fused(model: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


# ---- the forward pass

FORWARDS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "unfolded": lambda model: model,
    "ssl_fast folded": ssl_fast.fold_conv_bn,
    "torch.fx fuse": fused,
    "torch.compile": torch.compile,
    "ssl_fast folded, torch.compile": lambda model: torch.compile(ssl_fast.fold_conv_bn(model)),
    # The weights as constants, which inductor folds; stale once they change.
    "inductor freezing": lambda model: torch.compile(model, options={"freezing": True}),
}


def forward(name: str, dtype: str, layout: str, batch: int, compiled: bool) -> Table:
    kind = getattr(torch, dtype)

    @functools.cache
    def made(provider: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        model = network(name).to(kind, memory_format=FORMATS[layout])
        x = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
        return FORWARDS[provider](model), x.to(DEVICE, kind, memory_format=FORMATS[layout])

    @torch.no_grad()
    def build(provider: str) -> Step:
        run, x = made(provider)
        return torch.no_grad()(lambda: run(x))

    @functools.cache
    def truth() -> Tensor:
        return network(name).double()(made("unfolded")[1][:4].double())

    @torch.no_grad()
    def error(provider: str) -> float:
        """Of the outputs of four images."""
        run, x = made(provider)
        return common.relative_error([run(x)[:4]], [truth()])

    found, work = [], batch * flop_of_an_image(name) / common.SQUARE
    for provider in FORWARDS:
        slow = provider.endswith(("torch.compile", "freezing"))
        if compiled or not slow:
            run, wrong = (lambda p=provider: build(p)), (lambda p=provider: error(p))
            found.append(Provider(provider, run, dtype, "", work, common.PRODUCT, error=wrong, compiled=slow))
    shape = f"{name} {batch}x3x{SIZE}x{SIZE} {layout} {dtype}"
    return Table("conv_bn", shape, [*found, common.square_product(dtype)], flop=common.SQUARE)


# ---- the refresh


def refresh(name: str) -> Table:
    """One refresh after every weight has changed, against a fold from the start and a copy of all weights."""

    def copied() -> Step:
        folded = ssl_fast.fold_conv_bn(network(name))
        flat = torch.cat([t.flatten() for t in (*folded.parameters(), *folded.buffers())])
        kept = torch.empty_like(flat)
        return lambda: kept.copy_(flat)

    def refreshed(force: bool) -> Step:
        folded = ssl_fast.fold_conv_bn(network(name))
        return lambda: folded.refresh(force=force)

    def anew(fold: Callable[[nn.Module], nn.Module]) -> Step:
        model = network(name)
        return torch.no_grad()(lambda: fold(model))

    found = [
        Provider(COPY, copied, work=1.0),
        Provider("refresh", lambda: refreshed(True), work=1.0),
        Provider("refresh, nothing changed", lambda: refreshed(False), work=1.0),
        Provider("fold_conv_bn", lambda: anew(ssl_fast.fold_conv_bn), work=1.0),
        Provider("torch.fx fuse", lambda: anew(fused), work=1.0),
    ]
    return Table("conv_bn refresh", name, found)


def setup(name: str, *of_a_forward: Any) -> Table:
    return forward(name, *of_a_forward) if of_a_forward else refresh(name)


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(results.ROOT / "out/bench/inductor"))
    common.main(__doc__, cases, setup, seconds=3.0, allocators=("default",))
