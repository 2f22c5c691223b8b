"""What the benches of the norms share: a table of their passes with autograd, and of the operators alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from benches import common
from benches.common import Provider, Table
from benches.timing import Step

Given = list[Tensor | None]  # x first; what has no gradient is a running statistic
Norm = Callable[..., Tensor]


def passes(fn: Norm, given: Given) -> dict[str, Step]:
    """What a training script runs: with autograd, gradients fresh, outputs too."""
    leaves = [t for t in given if t is not None and t.requires_grad]
    # Eager's backward refuses statistics that moved on.
    kept = fn(*(t if t is None or t.requires_grad else t.clone() for t in given))
    dy = torch.randn_like(kept)
    if not kept.requires_grad:
        return {"forward": lambda: fn(*given)}

    def backward(y: Tensor) -> None:
        for leaf in leaves:
            leaf.grad = None
        y.backward(dy, retain_graph=y is kept)

    return {"forward": lambda: fn(*given), "backward": lambda: backward(kept), "both": lambda: backward(fn(*given))}


def error(fn: Norm, plain: Norm, given: Given) -> float:
    """The larger of the relative errors of y and dx."""

    def run(function: Norm, dtype: torch.dtype | None) -> list[Tensor]:
        # Each with a gradient where the steps have one: what was compiled for them serves here too.
        own = [
            t if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in given
        ]
        y = function(*own)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return [y, *(torch.autograd.grad(y, own[0], dy) if y.requires_grad else ())]

    values = run(fn, None)
    return common.relative_error(values, run(plain, torch.float64)[: len(values)])


def norm_table(
    op: str,
    sizes: str,
    kind: str,
    dtype: str,
    inputs: Callable[[], Given],
    norms: Mapping[str, Norm],
    kernels: Callable[..., dict[str, Step]],
    counts: Mapping[str, int],
) -> Table:
    """Every norm forward, backward and both, then the operators alone, beside a copy of x, which has these sizes.

    `norms` has "eager" among it; `kernels(*inputs)` gives the operators by pass; `counts` are the passes over the
    activation that nothing on the chip can save, of which a copy has two.
    """
    found = [common.copy_of(lambda: inputs()[0], dtype)]  # type: ignore[arg-type, return-value]
    for name, fn in [*norms.items(), ("ssl_fast kernels", None)]:
        for way, count in counts.items():
            if fn is None:
                build = partial(lambda way: kernels(*inputs())[way], way)
            elif name == "quack" and way != "forward":  # whose backward is not in autograd
                continue
            else:
                build = partial(lambda fn, way: passes(fn, inputs())[way], fn, way)
            whole = way == "both"
            found.append(
                Provider(
                    name,
                    build,
                    dtype,
                    op=op if whole else f"{op} {way}",
                    work=count / 2,
                    error=partial(lambda fn: error(fn, norms["eager"], inputs()), fn) if whole and fn else None,
                    compiled=name == "torch.compile",
                )
            )
    moved = 2.0 * math.prod(map(int, sizes.split("x"))) * getattr(torch, dtype).itemsize
    return Table(op, f"{sizes} {kind}", found, bytes=moved)
