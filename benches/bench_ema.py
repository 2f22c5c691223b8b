"""EMA of ResNet-50's parameters, and of many tiny tensors, against plain PyTorch, timm, and a copy of as many bytes.

"ssl_fast EMA" and "timm ModelEmaV3" are the classes, with their walk over the module. In bf16 timm rounds
stochastically, as ours does when told to; otherwise ours keeps fp32 masters, 12 bytes a parameter instead of 6.

`python -m benches.bench_ema` prints the tables and writes the rows to benches/results.csv; `--quick` takes every shape
at a sixteenth of its width and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ssl_fast
from benches import common
from ssl_fast.ops import ema

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOMENTUM = 0.999
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
MASTERS = "bfloat16, fp32 masters"
TINY: list[tuple[int, ...]] = [(8,)] * 1000  # where the time is that of Python and the dispatcher
FLOOR = "copy of as many bytes"


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


def naive(targets: list[Tensor], sources: list[Tensor]) -> None:
    """MoCo's own loop (He et al. 2020)."""
    for t, s in zip(targets, sources, strict=True):
        t.data = t.data * MOMENTUM + s.data * (1.0 - MOMENTUM)


def mul_add(targets: list[Tensor], sources: list[Tensor]) -> None:
    for t, s in zip(targets, sources, strict=True):
        t.mul_(MOMENTUM).add_(s, alpha=1 - MOMENTUM)


def foreach_lerp(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


def ours(backend: str, rounding: str = "nearest") -> Callable[[list[Tensor], list[Tensor]], None]:
    def update(targets: list[Tensor], sources: list[Tensor]) -> None:
        with ssl_fast.backend(backend):
            ema.ema_update_(targets, sources, MOMENTUM, rounding=rounding)

    return update


def replayed(update: Callable[[], None]) -> Callable[[], None]:
    """The update as a CUDA graph: the kernel without the time that Python takes to launch it."""
    update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    return graph.replay


def of_modules(average: Callable[[nn.Module], Any], targets: list[Tensor], sources: list[Tensor]) -> Callable[[], None]:
    """One step of a class that averages a module, its walk over the parameters included."""
    start, model = (nn.ParameterList(nn.Parameter(t) for t in side) for side in (targets, sources))
    averaged = average(start)
    return lambda: averaged.update(model)


def providers(target: torch.dtype, source: torch.dtype) -> dict[str, Callable[[list[Tensor], list[Tensor]], Any]]:
    """By name: a function of the weights that gives one step."""
    found = {"naive loop": naive, "mul_ add_": mul_add}
    if target == source:
        found["torch._foreach_lerp_"] = foreach_lerp
    for backend in ("native", "triton", "reference"):
        interpreted = backend == "triton" and DEVICE == "cpu"
        if not interpreted and ema._update.reason(backend, DEVICE, target) is None:
            found[f"ssl_fast {backend}"] = ours(backend)
            if target.itemsize == 2:
                found[f"ssl_fast {backend}, stochastic"] = ours(backend, "stochastic")
    steps = {name: partial(partial, update) for name, update in found.items()}
    if target == source:
        rounding = "nearest" if target.itemsize > 2 else "stochastic"
        average = partial(ssl_fast.EMA, momentum=MOMENTUM, rounding=rounding)
        steps["ssl_fast EMA" if rounding == "nearest" else "ssl_fast EMA, stochastic"] = partial(of_modules, average)
        with contextlib.suppress(ImportError):
            from timm.utils import ModelEmaV3

            steps["timm ModelEmaV3"] = partial(of_modules, partial(ModelEmaV3, decay=MOMENTUM))
    return steps


def foreach_masters(averages: list[Tensor], sources: list[Tensor]) -> Callable[[], None]:
    """What ours does in one pass, by PyTorch's own functions."""
    masters = [t.float() for t in averages]

    def step() -> None:
        torch._foreach_lerp_(masters, [s.float() for s in sources], 1 - MOMENTUM)
        torch._foreach_copy_(averages, masters)

    return step


def master_providers() -> dict[str, Callable[[list[Tensor], list[Tensor]], Any]]:
    return {
        "torch._foreach_lerp_, _foreach_copy_": foreach_masters,
        "ssl_fast EMA": partial(of_modules, partial(ssl_fast.EMA, momentum=MOMENTUM)),
    }


def bench(
    shapes: list[tuple[int, ...]], target: torch.dtype, source: torch.dtype, masters: bool, seconds: float
) -> list[common.Row]:
    """One interleaved run of every provider, each on weights of its own, beside the copy."""
    generator = torch.Generator().manual_seed(0)

    def weights(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]

    count = sum(math.prod(shape) for shape in shapes)
    # The target is read and written, the source read; with masters they are the target, and the average is written too.
    moved = count * (2 * 4 + target.itemsize + source.itemsize if masters else 2 * target.itemsize + source.itemsize)
    half = torch.randn(moved // 8, device=DEVICE)
    kept = torch.empty_like(half)
    steps: dict[str, Callable[[], Any]] = {FLOOR: lambda: kept.copy_(half)}
    shared = weights(source)
    for name, step in (master_providers() if masters else providers(target, source)).items():
        steps[name] = step(weights(target), shared)
        if DEVICE == "cuda" and name in ("ssl_fast native", "ssl_fast EMA"):
            steps[f"{name}, CUDA graph"] = replayed(steps[name])

    with torch.no_grad():
        measured = common.interleave(steps, seconds=seconds, rounds=11)
    dtype = MASTERS if masters else " <- ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in (target, source)))
    rows = []
    for name, times in measured.items():
        row = {"op": "ema", "shape": f"{len(shapes)} tensors, {count} parameters", "dtype": dtype, "provider": name}
        row |= {"allocator": "default", **common.timing(times)}
        rows.append(row | {"gb_per_s": moved / row["ms"] / 1e6})
    return [row | {"ratio": row["ms"] / rows[0]["ms"], "to": FLOOR} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small tensors, nothing written")
    quick = parser.parse_args().quick
    print(f"EMA, momentum {MOMENTUM}, on {common.device_name()}, {torch.get_num_threads()} threads")
    conditions, rows = common.conditions(), []
    network = list(resnet50_shapes(16 if quick else 1))
    cases = [(network, *dtypes, False) for dtypes in DTYPES]
    cases += [(network, torch.bfloat16, torch.bfloat16, True), (TINY, *DTYPES[0], False)]
    for shapes, target, source, masters in cases:
        measured = bench(shapes, target, source, masters, 0.3 if quick else 6.0)
        print(f"\n{measured[0]['shape']}, {measured[0]['dtype']}")
        print(common.table(measured, ("provider", "ms", "ms_p20", "ms_p80", "gb_per_s", "ratio")))
        rows += [row | conditions for row in measured]
    if not quick:
        common.save(rows)
        print(f"\n{len(rows)} rows written to {common.RESULTS}")


if __name__ == "__main__":
    main()
