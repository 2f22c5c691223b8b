"""LARS (SimCLR, Chen et al. 2020, arXiv 2002.05709, section 2.2 and appendix B) and the learning-rate schedules."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ssl_fast._checks import is_number

# Learning rate of a batch of 256 images, scaled linearly with the batch; momentum or betas; weight decay.
# lars: SimCLR, appendix B. sgd: MoCo, section 4. adamw: the usual linear rule of masked and self-distilled ViTs.
DEFAULTS: dict[str, dict[str, float]] = {
    "lars": {"lr": 0.3, "weight_decay": 1e-6},
    "sgd": {"lr": 0.03, "weight_decay": 1e-4},
    "adamw": {"lr": 5e-4, "weight_decay": 0.05},
}


class LARS(torch.optim.Optimizer):
    """SGD with layer-wise adaptive rates (You et al. 2017, arXiv 1708.03888), in the form SimCLR trains with.

    For a tensor w with gradient g:

        u = g + weight_decay * w
        trust = eta * |w| / |u|     (1 where either norm is 0, and in groups with adapt=False)
        v = momentum * v + lr * trust * u
        w = w - v

    The learning rate is inside the momentum buffer, so a change of lr acts on new gradients alone. Biases and the
    parameters of normalisation layers belong in a group with adapt=False and weight_decay=0: `parameter_groups`.

    Args:
        params: parameters or groups; a group may carry its own lr, weight_decay and adapt.
        lr: the rate before the trust ratio; SimCLR takes 0.3 * batch / 256.
        momentum: in [0, 1).
        weight_decay: L2 penalty, >= 0.
        eta: the trust coefficient.

    Raises:
        ValueError: naming the argument that is out of range.

    Example:
        >>> optimizer = LARS(parameter_groups(model, weight_decay=1e-6), lr=0.3 * 4096 / 256)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eta", eta)):
            if not (is_number(value) or isinstance(value, Tensor)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: got {value!r}, allowed: a finite number >= 0")
        if not is_number(momentum) or not 0 <= momentum < 1:
            raise ValueError(f"momentum: got {momentum!r}, allowed: a number in [0, 1)")
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": True}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, without a host synchronisation; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in _runs([p for p in group["params"] if p.grad is not None]):
                buffers, gradients = [], [p.grad for p in params if p.grad is not None]
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    buffers.append(state["momentum_buffer"])
                updates = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
                if group["adapt"]:
                    torch._foreach_mul_(updates, _trust_ratios(params, updates, group["eta"]))  # type: ignore[arg-type]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, updates, alpha=group["lr"])
                torch._foreach_sub_(params, buffers)
        return loss


def _runs(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """On GPUs all tensors, in few launches; on a CPU so many as a cache holds from their norms to their update."""
    run: list[Tensor] = []
    numbers = 0
    for p in params:
        numbers += p.numel()
        if run and not p.is_cuda and numbers > 1 << 18:
            yield run
            run, numbers = [], p.numel()
        run.append(p)
    if run:
        yield run


def _trust_ratios(params: list[Tensor], updates: list[Tensor], eta: float) -> list[Tensor]:
    w = torch.stack(torch._foreach_norm(params))
    u = torch.stack(torch._foreach_norm(updates))
    return list(torch.where((w > 0) & (u > 0), eta * w / u, 1.0).unbind())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and filters; and what neither decays nor adapts (biases, normalisation: one dimension).

    Example:
        >>> torch.optim.SGD(parameter_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9)
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module,
    name: str,
    batch_size: int,
    lr: float | None = None,
    weight_decay: float | None = None,
    bias_lr: float = 1.0,
) -> torch.optim.Optimizer:
    """The optimizer called "lars", "sgd" (momentum 0.9) or "adamw" over `parameter_groups(model)`.

    Where lr is None it is the default of a batch of 256, scaled linearly: 0.3 (lars, the paper's), 0.03 (sgd) or
    5e-4 (adamw) times batch_size / 256. Where weight_decay is None: 1e-6, 1e-4, 0.05. Biases and normalisation learn
    at bias_lr times lr.
    """
    if name not in DEFAULTS:
        raise ValueError(f"optimizer: got {name!r}, allowed: {', '.join(DEFAULTS)}")
    lr = DEFAULTS[name]["lr"] * batch_size / 256 if lr is None else lr
    groups = parameter_groups(model, DEFAULTS[name]["weight_decay"] if weight_decay is None else weight_decay)
    for group in groups:
        group["lr"] = lr if group["adapt"] else lr * bias_lr
    if name == "lars":
        return LARS(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9) if name == "sgd" else torch.optim.AdamW(groups, lr=lr)


def warmup_cosine(step: int, total: int, warmup: int = 0, last: float = 0.0) -> float:
    """The factor on the learning rate of step 0, 1, ..., total - 1: linear warm-up, then half a cosine towards `last`.

        (step + 1) / warmup                                                  step < warmup
        last + (1 - last) (1 + cos(pi (step - warmup) / (total - warmup))) / 2    otherwise; no restarts

    A function of the step alone, so that a resumed run has no schedule to restore.

    Example:
        >>> [warmup_cosine(step, total=4, warmup=2) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return (step + 1) / warmup
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmup_steps(step: int, total: int, warmup: int = 0) -> float:
    """The factor of MoCo v1 (section 4: 0.1 at epochs 120 and 160 of 200): linear warm-up, then 1, 0.1 from 60% of all
    steps on, and 0.01 from 80% on.

    Example:
        >>> [warmup_steps(step, total=5) for step in range(5)]
        [1.0, 1.0, 1.0, 0.1, 0.01]
    """
    if step < warmup:
        return (step + 1) / warmup
    return (1.0, 0.1, 0.01)[(5 * step >= 3 * total) + (5 * step >= 4 * total)]


SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "cosine": warmup_cosine,
    "cosine_0.001": functools.partial(warmup_cosine, last=0.001),  # Barlow Twins, section 2.2
    "step": warmup_steps,
}
