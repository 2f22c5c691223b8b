"""EMA of ResNet-50's parameters, and of many tiny tensors, against PyTorch, timm, ema-pytorch and a copy of the bytes.

"ssl_fast EMA" and "timm ModelEmaV3" are the classes, with their walk over the module. In bf16 timm rounds
stochastically, as ours does when told to; otherwise ours keeps fp32 masters, 12 bytes a parameter instead of 6.

`python -m benches.bench_ema` prints the tables and writes the rows to benches/results.csv; `--quick` takes every shape
at a sixteenth of its width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ssl_fast
from benches import common
from benches.common import Provider, Table
from benches.machine import DEVICE
from benches.timing import Step
from ssl_fast.ops import ema

MOMENTUM = 0.999
MASTERS = "bfloat16, fp32 masters"
# Of the targets and the sources.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float32 <- bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    MASTERS: (torch.bfloat16, torch.bfloat16),
}
FLOOR = "copy of as many bytes"

Tensors = list[Tensor]
Update = Callable[[Tensors, Tensors], Any]


def cases(quick: bool) -> list[tuple[str, int, str]]:
    """The network, what its width is divided by, and the dtypes; "tiny" is where the time is Python's."""
    return [*(("resnet50", 16 if quick else 1, dtype) for dtype in DTYPES), ("tiny", 1, "float32")]


def resnet50_shapes(shrink: int = 1) -> Iterator[tuple[int, ...]]:
    """The 161 parameters of torchvision's resnet50, 25.6 million numbers, in order."""

    def conv_bn(out: int, into: int, size: int) -> Iterator[tuple[int, ...]]:
        yield from ((out, into, size, size), (out,), (out,))

    into = 64 // shrink
    yield from conv_bn(into, 3, 7)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage // shrink
        for block in range(blocks):
            yield from conv_bn(width, into, 1)
            yield from conv_bn(width, width, 3)
            yield from conv_bn(4 * width, width, 1)
            if block == 0:
                yield from conv_bn(4 * width, into, 1)
            into = 4 * width
    yield from ((1000, into), (1000,))


def naive(targets: Tensors, sources: Tensors) -> None:
    """MoCo's own loop (He et al. 2020)."""
    for t, s in zip(targets, sources, strict=True):
        t.data = t.data * MOMENTUM + s.data * (1.0 - MOMENTUM)


def mul_add(targets: Tensors, sources: Tensors) -> None:
    for t, s in zip(targets, sources, strict=True):
        t.mul_(MOMENTUM).add_(s, alpha=1 - MOMENTUM)


def foreach_lerp(targets: Tensors, sources: Tensors) -> None:
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


def ours(backend: str, rounding: str = "nearest") -> Update:
    def update(targets: Tensors, sources: Tensors) -> None:
        with ssl_fast.backend(backend):
            ssl_fast.ema_update_(targets, sources, MOMENTUM, rounding=rounding)

    return update


# ---- a provider gives, for targets and sources, one step and the tensors that it updates


def of_lists(update: Update, targets: Tensors, sources: Tensors) -> tuple[Step, Tensors]:
    return lambda: update(targets, sources), targets


def of_modules(average: Callable[[nn.Module], Any], targets: Tensors, sources: Tensors) -> tuple[Step, Tensors]:
    """A class that averages a module, its walk over the parameters included."""
    start, model = (nn.ParameterList(nn.Parameter(t) for t in side) for side in (targets, sources))
    averaged = average(start)
    return lambda: averaged.update(model), list(averaged.module.parameters())


def lightly_names(targets: Tensors, sources: Tensors) -> tuple[Step, Tensors]:
    """`update_momentum`, in lightly's order of arguments."""
    average, model = (nn.ParameterList(nn.Parameter(t) for t in side) for side in (targets, sources))
    return lambda: ssl_fast.update_momentum(model, average, MOMENTUM), list(average)


def of_ema_pytorch(EMA: Any, targets: Tensors, sources: Tensors) -> tuple[Step, Tensors]:
    """ema-pytorch's class in its faster way, with the same momentum at every step, past its first two, which copy."""
    average, model = (nn.ParameterList(nn.Parameter(t) for t in side) for side in (targets, sources))
    kept = {"beta": MOMENTUM, "min_value": MOMENTUM, "update_after_step": 0, "update_every": 1, "use_foreach": True}
    averaged = EMA(model, average, **kept)
    averaged.initted.fill_(True)
    averaged.step.fill_(2)
    return averaged.update, list(average)


def foreach_masters(averages: Tensors, sources: Tensors) -> tuple[Step, Tensors]:
    """What ours does in one pass, by PyTorch's own functions."""
    masters = [t.float() for t in averages]

    def step() -> None:
        torch._foreach_lerp_(masters, [s.float() for s in sources], 1 - MOMENTUM)
        torch._foreach_copy_(averages, masters)

    return step, averages


def updates(dtype: str) -> dict[str, Callable[[Tensors, Tensors], tuple[Step, Tensors]]]:
    """By provider."""
    target, source = DTYPES[dtype]
    average = partial(of_modules, partial(ssl_fast.EMA, momentum=MOMENTUM))
    if dtype == MASTERS:
        return {"torch._foreach_lerp_, _foreach_copy_": foreach_masters, "ssl_fast EMA": average}
    found = {"naive loop": naive, "mul_ add_": mul_add}
    if target == source:
        found["torch._foreach_lerp_"] = foreach_lerp
    for backend in ("native", "triton", "reference"):
        interpreted = backend == "triton" and DEVICE == "cpu"
        if not interpreted and ema._update.reason(backend, DEVICE, target) is None:
            found[f"ssl_fast {backend}"] = ours(backend)
            if target.itemsize == 2:
                found[f"ssl_fast {backend}, stochastic"] = ours(backend, "stochastic")
    steps = {name: partial(of_lists, update) for name, update in found.items()}
    if target != source:
        return steps
    if target.itemsize == 2:
        rounded = partial(ssl_fast.EMA, momentum=MOMENTUM, rounding="stochastic")
        steps["ssl_fast EMA, stochastic"] = partial(of_modules, rounded)
    else:
        steps |= {"ssl_fast EMA": average, "ssl_fast update_momentum": lightly_names}
    with common.peer("timm"):
        from timm.utils import ModelEmaV3

        steps["timm ModelEmaV3"] = partial(of_modules, partial(ModelEmaV3, decay=MOMENTUM))
    with common.peer("ema-pytorch"):
        from ema_pytorch import EMA

        steps["ema-pytorch"] = partial(of_ema_pytorch, EMA)
    return steps


def setup(network: str, shrink: int, dtype: str) -> Table:
    shapes = [(8,)] * 1000 if network == "tiny" else list(resnet50_shapes(shrink))
    target, source = DTYPES[dtype]
    count = sum(math.prod(shape) for shape in shapes)
    # The target is read and written, the source read; with masters they are the target, and the average is written too.
    moved = count * (2 * target.itemsize + source.itemsize)
    if dtype == MASTERS:
        moved = count * (2 * 4 + target.itemsize + source.itemsize)

    def weights() -> tuple[Tensors, Tensors]:
        generator = torch.Generator().manual_seed(0)
        drawn = [[torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes] for _ in range(2)]
        return [t.to(target) for t in drawn[0]], [t.to(source) for t in drawn[1]]

    def build(update: Callable[..., tuple[Step, Tensors]]) -> Step:
        return torch.no_grad()(update(*weights())[0])

    def error(update: Callable[..., tuple[Step, Tensors]]) -> float:
        """Of all averages together."""
        targets, sources = weights()
        truth = torch.cat(
            [t.double().lerp(s.double(), 1 - MOMENTUM).flatten() for t, s in zip(targets, sources, strict=True)]
        )
        with torch.no_grad():
            step, updated = update(targets, sources)
            step()
        return common.relative_error([torch.cat([t.detach().flatten() for t in updated])], [truth])

    def copy_of_as_many() -> Step:
        half = torch.randn(moved // 8, device=DEVICE)
        kept = torch.empty_like(half)
        return lambda: kept.copy_(half)

    found = [Provider(FLOOR, copy_of_as_many, dtype, work=1.0)]
    for name, update in updates(dtype).items():
        found.append(Provider(name, partial(build, update), dtype, work=1.0, error=partial(error, update)))
    return Table("ema", f"{len(shapes)} tensors, {count} parameters", found, bytes=float(moved))


if __name__ == "__main__":
    common.main(__doc__, cases, setup, seconds=6.0, allocators=("default",))
