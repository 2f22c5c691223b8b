"""A step of LARS on ResNet-50's parameters, against its equation in plain PyTorch, lightly's and timm's, and a copy.

lightly and timm estimate |g + d w| by |g| + d |w|, which a weight decay of 1e-6 leaves alike. The floor reads weights,
gradients and momentum once and writes weights and momentum, 20 bytes a parameter: as if a cache held each tensor from
its norms to its update.

`python -m benches.bench_optim` prints the tables and writes the rows to benches/results.csv; `--quick` takes every
shape at a sixteenth of its width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benches import common
from benches.bench_ema import resnet50_shapes
from benches.common import Provider, Table
from benches.machine import DEVICE
from benches.timing import Step
from ssl_fast.optim import LARS, parameter_groups

LR, MOMENTUM, DECAY, ETA = 0.3, 0.9, 1e-6, 1e-3
Optimizer = Callable[[list[dict[str, Any]]], Any]


class PlainLARS:
    """The equation, tensor by tensor."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.groups = groups
        self.moments = {p: torch.zeros_like(p) for group in groups for p in group["params"]}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            for p in group["params"]:
                u, v = p.grad.add(p, alpha=group["weight_decay"]), self.moments[p]
                if group["adapt"]:
                    w_norm, u_norm = p.norm(), u.norm()
                    u.mul_(torch.where((w_norm > 0) & (u_norm > 0), ETA * w_norm / u_norm, 1.0))
                v.mul_(MOMENTUM).add_(u, alpha=LR)
                p.sub_(v)


def optimizers() -> dict[str, Optimizer]:
    """By provider; each takes groups, in which weight decay and adaptation go together."""
    found: dict[str, Optimizer] = {"plain PyTorch": PlainLARS, "ssl_fast": partial(LARS, lr=LR, eta=ETA)}
    with common.peer("lightly"):
        from lightly.utils.lars import LARS as of_lightly

        found["lightly"] = partial(of_lightly, lr=LR, momentum=MOMENTUM, trust_coefficient=ETA)
    with common.peer("timm"):
        from timm.optim.lars import Lars

        found["timm"] = partial(Lars, lr=LR, momentum=MOMENTUM, trust_coeff=ETA)
    return found


def cases(quick: bool) -> list[tuple[int]]:
    """What the network's width is divided by."""
    return [(16 if quick else 1,)]


def setup(shrink: int) -> Table:
    shapes = list(resnet50_shapes(shrink))
    count = sum(map(math.prod, shapes))

    def made(of: Optimizer, dtype: torch.dtype = torch.float32) -> tuple[Step, list[Tensor]]:
        generator = torch.Generator().manual_seed(0)

        def drawn(shape: tuple[int, ...]) -> Tensor:
            return (torch.randn(shape, generator=generator) / 50).to(DEVICE, dtype)

        network = nn.ParameterList(nn.Parameter(drawn(shape)) for shape in shapes)
        for p in network:
            p.grad = drawn(p.shape)
        return of(parameter_groups(network, DECAY)).step, [p.detach() for p in network]

    def error(of: Optimizer) -> float:
        """Of all that two steps change of the weights."""
        moved = []
        for each, dtype in ((of, torch.float32), (PlainLARS, torch.float64)):
            step, weights = made(each, dtype)
            before = torch.cat([w.flatten() for w in weights])
            step()
            step()
            moved.append(torch.cat([w.flatten() for w in weights]).double() - before.double())
        return common.relative_error(moved[:1], moved[1:])

    found = [common.copy_of(lambda: torch.randn(count, device=DEVICE))]
    for name, of in optimizers().items():
        found.append(Provider(name, lambda of=of: made(of)[0], work=2.5, error=partial(error, of)))
    return Table("lars", f"{len(shapes)} tensors, {count} parameters", found, bytes=8.0 * count)


if __name__ == "__main__":
    common.main(__doc__, cases, setup, seconds=5.0)
