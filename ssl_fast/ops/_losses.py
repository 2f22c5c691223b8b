"""What the contrastive losses share: checks, reductions, and the losses of rows from their negatives.

With d_i = log(sum of exp(s_ij / t) over the negatives j) - s_ip / t, the cross entropy of row i is softplus(d_i). It
and its relatives need no more than (N,) vectors once the log-sum-exps are there.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_fast._checks import as_float, check_flags, is_number
from ssl_fast._distributed import Ranks, check_strategy
from ssl_fast._extras import nearest
from ssl_fast._op import HALF_AND_FLOAT, autocast_dtype

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as ATen numbers them
_Maybe = TypeVar("_Maybe", Tensor, Tensor | None)
DTYPES = (*HALF_AND_FLOAT, torch.float64)


def accumulator(z: Tensor) -> torch.dtype:
    """The dtype of logits, sums and losses."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def positive(temperature: Tensor) -> Tensor:
    """NaN where a temperature is not above 0: it reaches every output, and no value need leave the device."""
    return torch.where(temperature > 0, temperature, torch.nan)


def to_rows(z: Tensor, normalize: bool) -> Tensor:
    """Rows in the dtype of sums, of unit length where normalize."""
    z = z.to(accumulator(z))
    return F.normalize(z, dim=-1) if normalize else z


def tangent(dz: Tensor, z: Tensor, x: Tensor) -> Tensor:
    """The gradient for x from that for z = F.normalize(x), where z is that in dz's dtype."""
    norm = x.to(dz.dtype).norm(dim=1, keepdim=True)
    along = (dz * z).sum(1, keepdim=True)
    return torch.where(norm < 1e-12, dz / 1e-12, (dz - along * z) / norm)


# ---- gradients


class _NotTwice(torch.autograd.Function):
    """A gradient whose own gradient is an error: what autograd would return for it is zero, silently."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "the gradient of a contrastive loss was differentiated: got create_graph=True and a second backward "
            "through it, allowed: first derivatives; use a dense expression of the loss for a gradient penalty"
        )


def differentiable_once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """A Function.backward that runs without a graph; under create_graph=True a second one through it raises."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        inputs = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        return tuple(None if g is None else _NotTwice.apply(g, *inputs) for g in gradients)

    return run


# ---- the loss of a row


def row_loss(
    d: Tensor,
    pos: Tensor,
    *,
    temperature: Tensor,
    negatives: int | Tensor,
    decoupled: bool = False,
    tau_plus: float = 0.0,
    label_smoothing: float = 0.0,
    negative_sum: Tensor | None = None,
) -> Tensor:
    """(N,) losses from d, (N,), and the similarities of the positives pos, (N,).

    Args:
        negatives: how many each row has; an int, or (N,).
        decoupled: leave the positive out of the denominator (Yeh et al. 2021, arXiv 2110.06848, equation 6): d itself.
        tau_plus: the probability that a negative is of the positive's class; the sum over the negatives is corrected
            for it (Chuang et al. 2020, arXiv 2007.00224, equation 8), at least to what rows opposite would give.
        label_smoothing: as in F.cross_entropy over the positive and the negatives.
        negative_sum: (N,), the sum of the similarities of the negatives, for label smoothing.
    """
    if tau_plus:
        # Filled in on the device: torch.as_tensor would copy a number there and wait, which no CUDA graph captures.
        n = negatives.to(d.dtype) if isinstance(negatives, Tensor) else d.new_full((), negatives)
        d = _debiased(d, pos, temperature, n, float(tau_plus))
    # A row that sees no negative has nothing to learn from: softplus says 0, and so does the decoupled form.
    loss = torch.where(d == -torch.inf, 0, d) if decoupled else torch.logaddexp(d, torch.zeros_like(d))
    if label_smoothing and negative_sum is not None:
        mean = (pos + negative_sum) / (negatives + 1)
        loss = loss + float(label_smoothing) * (pos - mean) / temperature
    return loss


def _debiased(d: Tensor, pos: Tensor, temperature: Tensor, n: Tensor, tau_plus: float) -> Tensor:
    """log(max((e^d - n tau) / (1 - tau), n exp((-1 - s_p) / t))), without overflow."""
    least = n.log() - (1 + pos) / temperature
    # By the share that is taken away as well, which rounds to all of it just above the bound. NaN stays: it is above.
    above = ~((d <= (n * tau_plus).log()) | (n * tau_plus * torch.exp(-d) >= 1))
    safe = torch.where(above, d, d.detach().clamp(min=0) + (n * tau_plus).log().clamp(min=0) + 1)
    corrected = safe + torch.log1p(-n * tau_plus * torch.exp(-safe)) - math.log1p(-tau_plus)
    return torch.where(above, torch.maximum(corrected, least), least)


def reduce(loss: Tensor, reduction: str, weight: Tensor | None = None, ranks: Ranks | None = None) -> Tensor:
    """The mean is the weighted one where there are weights. Over ranks, the mean of what each of them returns is that
    of all rows, and so is the mean of their sums."""
    if weight is not None:
        weight = weight.to(loss.dtype)
        loss = loss * weight
    if reduction == "none":
        return loss
    if ranks is None:
        if reduction == "sum":
            return loss.sum()
        return loss.mean() if weight is None else loss.sum() / weight.sum()
    summed = loss.sum() * ranks.world
    if reduction == "sum":
        return summed
    return summed / (ranks.total if weight is None else ranks.sum(weight.sum()))


def total(x: Tensor, ranks: Ranks | None) -> Tensor:
    """The sum of x over ranks."""
    return x if ranks is None else ranks.sum(x)


# ---- checks: the message names the argument, its value, what is allowed and what to do


def check_embeddings(
    name1: str, z1: Tensor, name2: str, z2: Tensor, *, alike: bool = True, empty: bool = False
) -> tuple[Tensor, Tensor]:
    """Two (N, D) tensors of one dtype and device, cast as autocast would; `alike`: of one N too, which may be 0 where
    `empty`."""
    for name, z in ((name1, z1), (name2, z2)):
        if not isinstance(z, Tensor):
            raise TypeError(f"{name}: got {type(z).__name__}, allowed: a torch.Tensor of shape (N, D)")
    shape = z1.shape
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"{name1}: got shape {tuple(shape)}, allowed: (N, D) with D >= 1; flatten other dimensions")
    if shape[0] == 0 and not empty:
        raise ValueError(f"{name1}: got an empty batch (N=0), allowed: N >= 1; skip the step or drop the last batch")
    if z2.shape != shape and (alike or z2.dim() != 2 or z2.shape[1] != shape[1] or z2.shape[0] == 0):
        allowed = f"(K, {shape[1]}), K >= 1"
        if alike:
            allowed = f"the shape of {name1}, {tuple(shape)} (row i of each: one image)"
        raise ValueError(f"{name2}: got shape {tuple(z2.shape)}, allowed: {allowed}")
    if z1.device != z2.device:
        raise ValueError(f"{name2}: got device {z2.device}, allowed: the device of {name1}, {z1.device}")
    for name, z in ((name1, z1), (name2, z2)):
        if z.dtype not in DTYPES:
            raise TypeError(
                f"{name}: got {z.dtype}, allowed: float16, bfloat16, float32, float64; cast it with .float()"
            )
    low = autocast_dtype(z1)
    cast1, cast2 = z1, z2
    if low is not None:
        cast1, cast2 = (z if z.dtype == torch.float64 else z.to(low) for z in (z1, z2))
    if cast1.dtype != cast2.dtype:
        raise TypeError(f"{name2}: got {z2.dtype}, allowed: the dtype of {name1}, {z1.dtype}; cast one of them")
    return apart(cast1, cast2)


def apart(a: _Maybe, b: _Maybe) -> tuple[_Maybe, _Maybe]:
    """b as a tensor of its own where it is a: torch.compile takes no tensor twice into an autograd.Function."""
    return a, b.view_as(b) if b is a and b is not None else b


# Below the first exp2's scale, log2(e) / t, is no longer finite in fp32; above the other t itself.
_LEAST_TEMPERATURE, _LARGEST_TEMPERATURE = 1e-37, 3e38


def check_temperature(temperature: float | Tensor, z: Tensor) -> Tensor:
    """As a tensor () on z's device, in the dtype of sums."""
    dtype = accumulator(z)
    if isinstance(temperature, float) and _LEAST_TEMPERATURE < temperature < _LARGEST_TEMPERATURE:
        return torch.scalar_tensor(temperature, dtype=dtype, device=z.device)
    check_temperature_alone(temperature, z)
    if isinstance(temperature, Tensor):
        return temperature.reshape(()).to(z.device, dtype)
    return torch.scalar_tensor(float(temperature), dtype=dtype, device=z.device)


def check_temperature_alone(temperature: Any, z: Tensor | None = None) -> None:
    """What a module can check before it sees embeddings."""
    allowed = "a float above 0 and finite, in fp32 too, such as 0.1 or 0.5"
    check_number("temperature", temperature, allowed, z)
    if isinstance(temperature, Tensor) or _LEAST_TEMPERATURE < as_float(temperature) < _LARGEST_TEMPERATURE:
        return
    raise ValueError(f"temperature: got {temperature!r}, allowed: {allowed}")


def check_number(name: str, value: object, allowed: str, z: Tensor | None = None) -> None:
    """A number, or a tensor of one, whose value is not looked at, but can be on z's device."""
    if not isinstance(value, Tensor):
        if not is_number(value):
            raise TypeError(f"{name}: got {value!r}, allowed: {allowed}, or a tensor of one element")
    elif value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(
            f"{name}: got {value.dtype} of shape {tuple(value.shape)}, allowed: {allowed}, or a real tensor of one "
            "element"
        )
    elif z is not None and value.is_meta and not z.is_meta:
        raise ValueError(f"{name}: got device meta, which holds no value, allowed: that of the embeddings, {z.device}")


def check_options(
    reduction: str = "mean",
    *,
    label_smoothing: float = 0.0,
    tau_plus: float = 0.0,
    group_ids: object = None,
    **flags: object,
) -> None:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, allowed: 'mean', 'sum', 'none'")
    check_flags(**flags)
    if not is_number(label_smoothing) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing!r}, allowed: a number from 0 to 1")
    if not is_number(tau_plus) or not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus: got {tau_plus!r}, allowed: at least 0 and below 1, such as 0.1 for ten classes")
    if label_smoothing and group_ids is not None:
        raise ValueError(
            "label_smoothing: got a value above 0 with group_ids, allowed: one of the two; masked negatives have no "
            "probability to smooth"
        )


# Those of options that do not depend on a batch.
_CHECKED = (
    "reduction", "label_smoothing", "tau_plus", "decoupled", "normalize", "return_lse", "in_batch", "gather_distributed"
)  # fmt: skip


def check_module(module: nn.Module, function: Callable[..., Any], options: dict[str, Any], *given: str) -> None:
    """What a module can check of the options that it hands on to a function at each call: that they are arguments of
    the module or keywords of the function, but those `given` otherwise, and their values."""
    own = [p.name for p in inspect.signature(type(module)).parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    allowed = [name for name in dict.fromkeys([*own, *keywords]) if name not in given]
    for name in options:
        if name not in allowed:
            raise TypeError(
                f"{name}: got an option that {type(module).__name__} does not have, {nearest(name, allowed)}allowed: "
                f"{', '.join(allowed)}"
            )
    check_strategy(options.get("strategy", "gather"))
    values = {name: options[name] for name in _CHECKED if name in options}
    if values.get("in_batch", True) is None:  # as the other negatives have it
        del values["in_batch"]
    check_options(**values)


def check_per_row(
    name: str, values: Tensor | None, count: int, device: torch.device, *, integer: bool
) -> Tensor | None:
    """None, or (count,) on a device; integers come back as int64."""
    if values is None:
        return None
    allowed = f"a tensor of {'integers' if integer else 'numbers'}, one for each row, of shape ({count},)"
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: got {type(values).__name__}, allowed: {allowed}; take torch.as_tensor(...)")
    inexact = integer and values.is_floating_point()
    if values.shape != (count,) or values.is_complex() or inexact:
        step = "; cast whole numbers with .long()" if inexact else ""
        raise ValueError(f"{name}: got {values.dtype} {tuple(values.shape)}, allowed: {allowed}{step}")
    if values.device != device:
        raise ValueError(f"{name}: got device {values.device}, allowed: that of the embeddings, {device}")
    return values.long() if integer else values
