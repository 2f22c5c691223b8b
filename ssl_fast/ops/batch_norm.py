"""Batch normalisation (Ioffe & Szegedy 2015, arXiv 1502.03167) with what follows it, the addition of a residual and an
activation, in one operator each way:

    u = weight * (x - mean) / sqrt(var + eps) + bias + residual        y = activation(u)

over every dimension but that of the channels, 1. The backward recomputes u where it can, and keeps x alone; with a
residual it keeps x and a bit an element, the sign of u.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_fast._checks import is_number
from ssl_fast._op import HALF_AND_FLOAT, Op, records, transforming
from ssl_fast.ops._norms import (
    BY_SIGN,
    IDENTITY,
    NEGATIVE_SLOPE,
    RELU,
    accumulator,
    activate,
    channels_innermost,
    check_activation,
    check_eps,
    check_input,
    check_parameter,
    check_residual,
    dense,
    derivative,
    like,
    parameter,
    shaped,
)

EACH_IMAGE = 0  # as num_splits of an operator: however many images there are, which a traced graph must not fix


# ---- the layout that every backend shares


def mask_shape(x: Tensor) -> tuple[int, int]:
    """Rows of memory, and bytes of mask for each. Bit k of byte b belongs to element 8 b + k of its row."""
    N, C = x.shape[:2]
    L = math.prod(x.shape[2:])
    rows, length = (N * L, C) if channels_innermost(x) else (N * C, L)
    return rows, (length + 7) // 8


# ---- reference


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """(S, C) shaped to broadcast against _splits(x)."""
    S, C = values.shape
    return values.view(S, 1, C, *(1,) * (x.dim() - 2))


def _splits(x: Tensor, count: int) -> Tensor:
    """(N, C, ...) as (count, N / count, C, ...), in the dtype of sums."""
    x = x.to(accumulator(x))
    if count == EACH_IMAGE:
        return x.unsqueeze(1)
    return x.unsqueeze(0) if count == 1 else x.unflatten(0, (count, x.shape[0] // count))


def _whole(xs: Tensor, count: int) -> Tensor:
    """What _splits made, as one batch. Neither fixes the size of a traced batch, unless there are parts."""
    if count == EACH_IMAGE:
        return xs.squeeze(1)
    return xs.squeeze(0) if count == 1 else xs.flatten(0, 1)


def statistics_of(x: Tensor, num_splits: int) -> int:
    """How many sets of statistics x has in training. Without images one, which is 0."""
    return x.shape[0] or 1 if num_splits == EACH_IMAGE else num_splits


def _reduced(x: Tensor) -> list[int]:
    return [1, *range(3, x.dim())]


def _moments(x: Tensor, num_splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, what its rounding left out, and the biased variance, (S, C) each; 0 where there is nothing."""
    xs = _splits(x, num_splits)
    if x.numel() == 0:
        zeros = xs.new_zeros(statistics_of(x, num_splits), x.shape[1])
        return zeros, zeros, zeros
    mean = xs.mean(_reduced(xs), keepdim=True)
    centred = xs - mean
    low, var = centred.mean(_reduced(xs)), centred.square().mean(_reduced(xs))
    exact = mean.flatten(0, 2).view_as(low)
    mean = exact + low
    return mean, low - (mean - exact), var - low.square()


def _update_running(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    """Running statistics follow the mean of the splits' own; the variance is the unbiased one."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if x.numel() == 0 or (running_mean is None and running_var is None):
        return
    weight = momentum if momentum is not None else 1 / num_batches_tracked  # type: ignore[operator]
    count = x.numel() // (mean.numel() or 1)
    if running_mean is not None:
        running_mean.lerp_(mean.mean(0), weight)
    if running_var is not None:
        running_var.lerp_(var.mean(0) * (count / (count - 1) if count > 1 else math.nan), weight)


def _pre_activation(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    num_splits: int,
) -> Tensor:
    """u, in the shape of _splits(x). x - mean is exact where the two are near, so nothing is lost to a large mean."""
    mean, low, invstd = stats
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    shift = -low * scale if bias is None else bias.to(invstd.dtype) - low * scale
    u = (_splits(x, num_splits) - _channels(mean, x)) * _channels(scale, x) + _channels(shift, x)
    return u if residual is None else u + _splits(residual, num_splits)


def _pack(positive: Tensor, x: Tensor) -> Tensor:
    """Booleans of x's shape as the mask."""
    rows, width = mask_shape(x)
    rowwise = positive.movedim(1, -1) if channels_innermost(x) else positive
    flat = rowwise.reshape(rows, x.numel() // rows if rows else 0)
    bits = F.pad(flat.to(torch.uint8), (0, 8 * width - flat.shape[1])).view(rows, width, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8).flatten()


def _unpack(mask: Tensor, x: Tensor) -> Tensor:
    rows, width = mask_shape(x)
    bits = (mask.view(rows, width, 1) >> torch.arange(8, dtype=torch.uint8, device=x.device)) & 1
    length = x.numel() // rows if rows else 0
    flat = bits.view(rows, 8 * width)[:, :length].bool()
    if channels_innermost(x):
        return flat.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    return flat.view(x.shape)


def _statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_splits: int,
) -> Tensor:
    """(3, S, C): mean, what its rounding left out, 1 / sqrt(var + eps); of the batch, or the running ones."""
    if not training:
        mean, var = running_mean[None], running_var[None]  # type: ignore[index]
        return torch.stack([mean, torch.zeros_like(mean), (var + eps).rsqrt()])
    mean, low, var = _moments(x, num_splits)
    _update_running(x, mean, var, running_mean, running_var, num_batches_tracked, momentum)
    return torch.stack([mean, low, (var + eps).rsqrt()])


def _fwd_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    stats: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_splits: int,
    activation: int,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    own = x.new_empty(0)
    if stats is not None:
        num_splits = stats.shape[1]
    else:
        num_splits = num_splits if training else 1
        stats = own = _statistics(
            x, running_mean, running_var, num_batches_tracked, training, momentum, eps, num_splits
        )  # fmt: skip
    u = _whole(_pre_activation(x, residual, weight, bias, stats, num_splits), num_splits)
    mask = _pack(~(u <= 0), x) if keep_mask else x.new_empty(0, dtype=torch.uint8)
    y = like(activate(u, activation).to(x.dtype), x)
    return y.clone() if y._is_view() else y, own, mask  # which may be written over, as F.relu(inplace=True) does


def _inplace_reference(x: Tensor, *arguments: Any) -> None:
    x.copy_(_fwd_reference(x, *(*arguments, False))[0])


def _stats_reference(x: Tensor, num_splits: int) -> Tensor:
    return torch.stack(_moments(x, num_splits))


def _dz_and_xhat(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """The gradient for u, and (x - mean) * invstd, in the shape of _splits(x)."""
    mean, low, invstd = stats
    dz = _splits(dy, len(mean))
    if activation in BY_SIGN:
        positive = (
            ~(_pre_activation(x, None, weight, bias, stats, len(mean)) <= 0)
            if mask is None
            else _unpack(mask, x).unflatten(0, dz.shape[:2])
        )
        dz = torch.where(positive, dz, 0 if activation == RELU else dz * NEGATIVE_SLOPE)
    elif activation:
        dz = dz * derivative(_pre_activation(x, residual, weight, bias, stats, len(mean)), activation)
    xhat = ((_splits(x, len(mean)) - _channels(mean, x)) - _channels(low, x)) * _channels(invstd, x)
    return dz, xhat


def _sums_reference(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    activation: int,
) -> Tensor:
    dz, xhat = _dz_and_xhat(dy, x, residual, mask, weight, bias, stats, activation)
    return torch.stack([dz.sum(_reduced(dz)), (dz * xhat).sum(_reduced(dz))])


def _bwd_reference(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    means: Tensor | None,
    training: bool,
    activation: int,
    need_dx: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiable itself, as stats is; see _BatchNorm.backward."""
    dz, xhat = _dz_and_xhat(dy, x, residual, mask, weight, bias, stats, activation)
    none = stats.new_empty(0)
    dx = dresidual = dy.new_empty(0)
    dweight = dbias = none
    if means is None:
        sums = torch.stack([dz.sum(_reduced(dz)), (dz * xhat).sum(_reduced(dz))])
        dbias, dweight = sums.sum(1)
        means = sums / max(x.numel() // (stats[0].numel() or 1), 1)
    if need_dresidual:
        dresidual = like(dz.flatten(0, 1).to(dy.dtype), x)
    if need_dx:
        if training:
            dz = dz - _channels(means[0], x) - xhat * _channels(means[1], x)
        scale = stats[2] if weight is None else stats[2] * weight.to(stats.dtype)
        dx = like((dz * _channels(scale, x)).flatten(0, 1).to(dy.dtype), x)
    return dx, dresidual, dweight, dbias


# ---- shapes


def _fwd_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    stats, training, num_splits, keep_mask = arguments[6], arguments[7], arguments[10], arguments[12]
    own = (0,) if stats is not None else (3, statistics_of(x, num_splits) if training else 1, x.shape[1])
    mask = math.prod(mask_shape(x)) if keep_mask else 0
    return torch.empty_like(x), x.new_empty(own, dtype=accumulator(x)), x.new_empty(mask, dtype=torch.uint8)


def _bwd_fake(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    means, need_dx, need_dresidual = arguments[5], arguments[8], arguments[9]
    dx, dresidual = (torch.empty_like(x) if need else x.new_empty(0) for need in (need_dx, need_dresidual))
    dweight, dbias = (x.new_empty(x.shape[1] if means is None else 0, dtype=accumulator(x)) for _ in range(2))
    return dx, dresidual, dweight, dbias


# ---- operators

_FORWARD = (
    "Tensor? residual, Tensor? weight, Tensor? bias, Tensor(b!)? running_mean, Tensor(c!)? running_var, "
    "Tensor(d!)? num_batches_tracked, Tensor? stats, bool training, float? momentum, float eps, int num_splits, "
    "int activation"
)
_BACKWARD = (
    "Tensor dy, Tensor x, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, Tensor stats"
)  # fmt: skip

# y, the (3, S, C) statistics unless they were given, and the mask. num_splits of 0: S is the number of images.
batch_norm_fwd = Op(
    f"batch_norm_fwd(Tensor x, {_FORWARD}, bool keep_mask) -> (Tensor, Tensor, Tensor)",
    _fwd_reference,
    fake=_fwd_fake,
    native={"cpu": HALF_AND_FLOAT, "cuda": (torch.bfloat16,)},
    triton="ssl_fast.kernels.batch_norm:batch_norm_fwd",
    decides="x",
)
# The same, over x.
batch_norm_inplace = Op(
    f"batch_norm_(Tensor(a!) x, {_FORWARD}) -> ()",
    _inplace_reference,
    fake=lambda *_: None,
    native={"cpu": HALF_AND_FLOAT, "cuda": (torch.bfloat16,)},
    triton="ssl_fast.kernels.batch_norm:batch_norm_",
    decides="x",
)
# Mean, what its rounding left out, biased variance, (3, S, C): what ranks merge.
batch_norm_stats = Op(
    "batch_norm_stats(Tensor x, int num_splits) -> Tensor",
    _stats_reference,
    fake=lambda x, num_splits: x.new_empty((3, statistics_of(x, num_splits), x.shape[1]), dtype=accumulator(x)),
    native={"cpu": HALF_AND_FLOAT, "cuda": (torch.bfloat16,)},
    triton="ssl_fast.kernels.batch_norm:batch_norm_stats",
    decides="x",
)
# Sums of the gradient for u, and of it times (x - mean) * invstd, (2, S, C).
batch_norm_sums = Op(
    f"batch_norm_sums({_BACKWARD}, int activation) -> Tensor",
    _sums_reference,
    fake=lambda dy, x, residual, mask, weight, bias, stats, activation: stats.new_empty((2, *stats.shape[1:])),
    native={"cpu": HALF_AND_FLOAT, "cuda": (torch.bfloat16,)},
    triton="ssl_fast.kernels.batch_norm:batch_norm_sums",
    decides="x",
)
# dx, dresidual, dweight, dbias. `means`: the sums of all ranks over their count, where ranks share statistics.
batch_norm_bwd = Op(
    f"batch_norm_bwd({_BACKWARD}, Tensor? means, bool training, int activation, bool need_dx, bool need_dresidual) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_reference,
    fake=_bwd_fake,
    native={"cpu": HALF_AND_FLOAT, "cuda": (torch.bfloat16,)},
    triton="ssl_fast.kernels.batch_norm:batch_norm_bwd",
    decides="x",
)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
        num_splits: int,
        activation: int,
    ) -> Tensor:
        ctx.backend, forward = batch_norm_fwd.chosen(x)
        ctx.training, ctx.eps, ctx.activation = training, eps, activation
        ctx.bias_dtype = None if bias is None else bias.dtype
        keep_mask = residual is not None and activation in BY_SIGN
        y, stats, mask = forward(
            x, residual, weight, bias, running_mean, running_var, num_batches_tracked, None, training, momentum, eps,
            num_splits, activation, keep_mask,
        )  # fmt: skip
        ctx.save_for_backward(
            x,
            residual if activation not in (IDENTITY, *BY_SIGN) else None,
            mask if keep_mask else None,
            weight,
            bias if activation != IDENTITY else None,
            stats,
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, residual, mask, weight, bias, stats = ctx.saved_tensors
        need_dx, need_dresidual, need_dweight, need_dbias = ctx.needs_input_grad[:4]
        through = need_dresidual and ctx.activation != IDENTITY
        rest = (None, ctx.training, ctx.activation, need_dx, through)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            if ctx.training:
                mean, low, var = _moments(x, stats.shape[1])
                stats = torch.stack([mean, low, (var + ctx.eps).rsqrt()])
            gradients = _bwd_reference(dy, x, residual, mask, weight, bias, stats, *rest)
        else:
            saved = (x, residual, mask, weight, bias, stats)
            gradients = batch_norm_bwd(like(dy, x), *saved, *rest, backend=ctx.backend)
        dx, dresidual, dweight, dbias = gradients
        return (
            dx if need_dx else None,
            (dresidual if through else dy) if need_dresidual else None,
            shaped(dweight, weight.shape, weight.dtype) if need_dweight else None,
            shaped(dbias, dbias.shape, ctx.bias_dtype) if need_dbias else None,
            *(None,) * 8,
        )


# ---- function


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    num_splits: int = 1,
    num_batches_tracked: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Batch normalisation, then the residual, then the activation (Ioffe & Szegedy 2015, arXiv 1502.03167), fused.

    Equivalent to, for activation="relu":
        F.relu(F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps) + residual)
    Statistics are fp32 whatever x is (fp64 for fp64), and exact for a mean that is large beside the deviation. The
    backward keeps x, and with a residual one bit an element; under no_grad nothing is kept. Differentiable twice;
    torch.func's transforms and forward-mode differentiation go through plain torch operations.

    Args:
        x: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); fp16, bf16, fp32 or fp64; contiguous or channels_last,
            which the result keeps; other strides cost a copy.
        running_mean, running_var: (C,), used where not training; in training they are updated in place if given, by
            momentum, or by 1 / num_batches_tracked where momentum is None. Best kept in fp32 for every x.
        weight, bias: (C,), each optional.
        activation: None, "relu", "leaky_relu" (slope 0.01), "silu" or "gelu" (exact).
        residual: of x's shape and dtype, added before the activation. For "silu" and "gelu" the backward keeps it.
        num_splits: in training, give each of so many equal parts of the batch, in order, statistics of its own, as
            if they came one after the other; running statistics move once, towards the mean of theirs.
        num_batches_tracked: an int64 scalar, increased by 1 in training.
        inplace: write the result over x, where no gradient is recorded (a momentum encoder).

    Returns:
        Of x's shape, dtype and memory format.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before anything is modified.

    Example:
        >>> y = batch_norm(conv(x), running_mean, running_var, w, b, training=True, activation="relu", residual=x)
    """
    code = check(x, running_mean, running_var, weight, bias, training, eps, activation, residual)
    if training:
        running = running_mean is not None or running_var is not None
        check_momentum(momentum, num_batches_tracked, running, x)
        if not isinstance(num_splits, int) or num_splits < 1 or x.shape[0] % num_splits:
            raise ValueError(f"num_splits: got {num_splits!r}, allowed: a divisor of the batch, {x.shape[0]}")
        if x.numel() == x.shape[1] * num_splits:
            raise ValueError(
                f"x: got shape {tuple(x.shape)} with num_splits={num_splits}, allowed: more than one value per channel "
                "and split when training; use a larger batch or eval()"
            )
    return normalised(x, running_mean, running_var, weight, bias, training, momentum, eps, code, residual, num_splits,
                      num_batches_tracked, inplace)  # fmt: skip


def normalised(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    residual: Tensor | None,
    num_splits: int,
    num_batches_tracked: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """batch_norm of what has been checked; with EACH_IMAGE as num_splits, an instance norm."""
    if residual is not None and residual.dtype != x.dtype:  # type promotion needs a tensor of its own
        y = normalised(x, running_mean, running_var, weight, bias, training, momentum, eps, IDENTITY, None, num_splits,
                       num_batches_tracked)  # fmt: skip
        return activate(y + residual, activation)
    recorded = records(x, residual, weight, bias)
    if inplace and recorded:
        raise ValueError("inplace: got True where a gradient is recorded, allowed: True under torch.no_grad() alone")
    if inplace and any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError("x: got an expanded tensor, allowed with inplace=True: one whose elements are each its own")
    there, x = x, dense(x)
    if residual is not None:
        residual = like(residual.view_as(residual) if residual is x else residual, x)  # compile wants them distinct
    wide = accumulator(x)
    running = [
        t if t is None or (t.dtype == wide and t.is_contiguous()) else t.to(wide, copy=True).contiguous()
        for t in (running_mean, running_var)
    ]
    arguments = (residual, weight, bias, *running, num_batches_tracked)
    options = (training, momentum, eps, num_splits if training else 1, activation)
    if transforming():
        given: list[Any] = [x, *arguments, None, *options, False]
        y = _fwd_reference(*given)[0]
        y = there.copy_(y) if inplace else y
    elif inplace:
        batch_norm_inplace(x, *arguments, None, *options)
        y = there if there is x else there.copy_(x)
    elif recorded:
        y = _BatchNorm.apply(x, *arguments, *options)
    else:
        y = batch_norm_fwd(x, *arguments, None, *options, False)[0]
    if (training or inplace) and not torch.compiler.is_compiling():  # a graph that holds the old values must notice
        changed = [x] if inplace else []
        changed += [t for t in (*running, num_batches_tracked) if t is not None and training]
        torch.autograd.graph.increment_version(changed)
    if training:
        for own, used in zip((running_mean, running_var), running, strict=True):
            if own is not None and used is not None and used is not own:
                own.copy_(used)
    return y


def check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> int:
    """The number of the activation; raises for what does not fit."""
    check_input(x)
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, allowed: (N, C) or (N, C, ...)")
    named = (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias))
    for name, tensor in named:
        check_parameter(name, tensor, (x.shape[1],), "the channels of x", x)
    check_residual(residual, x)
    check_eps(eps)
    if not training and (running_mean is None or running_var is None):
        raise ValueError(
            "running_mean, running_var: got None, allowed: tensors where the statistics are not those of x; pass "
            "training=True, for an instance norm use_input_stats=True, to use x's own"
        )
    return check_activation(activation)


def check_momentum(momentum: float | None, num_batches_tracked: Tensor | None, running: bool, x: Tensor) -> None:
    """What moves running statistics in training, where there are any."""
    if num_batches_tracked is not None:
        if not isinstance(num_batches_tracked, Tensor):
            got = type(num_batches_tracked).__name__
            raise TypeError(f"num_batches_tracked: got {got}, allowed: an int64 tensor of one element, or None")
        if (
            num_batches_tracked.dtype != torch.int64
            or num_batches_tracked.numel() != 1
            or num_batches_tracked.device != x.device
        ):
            raise ValueError(
                f"num_batches_tracked: got {num_batches_tracked.dtype} of shape {tuple(num_batches_tracked.shape)} on "
                f"{num_batches_tracked.device}, allowed: int64 of one element on the device of x, {x.device}"
            )
    if momentum is None:
        if num_batches_tracked is None and running:
            raise ValueError(
                "momentum: got None without num_batches_tracked, allowed: a number, or None with that count"
            )
    elif not is_number(momentum):
        raise TypeError(f"momentum: got {momentum!r}, allowed: a number such as 0.1, or None")


# ---- modules


class _RefusesConversion:
    """torch's convert_sync_batchnorm would match our modules by isinstance and drop what is fused without a word; it
    asks for `qconfig`, an attribute of quantisation, on its way."""

    def __get__(self, module: Any, owner: type) -> Any:
        converts = sys._getframe(1).f_code.co_name == "convert_sync_batchnorm"  # anyone else may look
        if converts and module is not None and (module.activation is not None or module.num_splits != 1):
            raise TypeError(
                f"module: got one with activation={module.activation!r}, num_splits={module.num_splits}, which "
                "torch's convert_sync_batchnorm would drop; use ssl_fast.convert_sync_batchnorm"
            )
        raise AttributeError("qconfig")


class FusedNorm(nn.modules.batchnorm._NormBase):
    """What the modules of batch and instance norms add to torch's: an activation, statistics that stay fp32."""

    # Of the class too, so that a module of torch's becomes one of ours by its class alone.
    activation: str | None = None
    num_splits: int = 1
    inplace: bool = False

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Parameters follow .half() and .bfloat16(); the running statistics stay fp32, to the bit."""
        before = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new is not None and new.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, old.to(new.device, torch.float32) if new.device.type != "meta" else new.float())
        return self

    def _widen_statistics(self) -> Any:
        for name in ("running_mean", "running_var"):
            statistics = getattr(self, name)
            if statistics is not None and statistics.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, statistics.float())
        return self

    def extra_repr(self) -> str:
        defaults = {"activation": None, "num_splits": 1, "inplace": False}
        changed = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        extra = "".join(f", {name}={value!r}" for name, value in changed.items())
        return super().extra_repr() + extra

    @classmethod
    def from_torch(cls, module: nn.modules.batchnorm._NormBase, **options: Any) -> Any:
        """A module of this class that shares the parameters and buffers of torch's (16-bit statistics are widened);
        options as in the constructor."""
        ours = cls(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats,
                   device="meta", **options)  # fmt: skip
        return _adopt(ours, module)._widen_statistics()

    def to_torch(self) -> nn.modules.batchnorm._NormBase:
        """torch's module with the same parameters and buffers; for one without an activation."""
        if self.activation is not None or self.num_splits != 1:
            raise ValueError(
                f"to_torch: got activation={self.activation!r}, num_splits={self.num_splits}, allowed: None and 1, "
                "which torch's module can express"
            )
        base = next(c for c in type(self).__mro__ if c.__module__.startswith("torch.nn."))
        theirs = base(self.num_features, self.eps, self.momentum, self.affine, self.track_running_stats, device="meta")
        return _adopt(theirs, self)


class _Fused(FusedNorm, nn.modules.batchnorm._BatchNorm):
    qconfig: Any = _RefusesConversion()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        num_splits: int = 1,
        inplace: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # which torch's own constructor takes in later versions alone
            self.register_parameter("bias", None)
        check_activation(activation)
        if not isinstance(num_splits, int) or num_splits < 1:
            raise ValueError(f"num_splits: got {num_splits!r}, allowed: a whole number >= 1")
        self.activation = activation
        self.num_splits = num_splits
        self.inplace = inplace
        self._widen_statistics()

    def forward(self, input: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """`activation` is for a caller who knows what follows; the default is the module's own."""
        self._check_input_dim(input)
        buffers = self._buffers  # attributes of a module are slow to look up
        mean, var = buffers["running_mean"], buffers["running_var"]
        batch = self.training or (mean is None and var is None)
        updates = not self.training or self.track_running_stats
        return batch_norm(
            input,
            mean if updates else None,
            var if updates else None,
            parameter(self, "weight"),
            parameter(self, "bias"),
            batch,
            self.momentum,
            self.eps,
            activation=activation or self.activation,
            residual=residual,
            num_splits=self.num_splits,
            num_batches_tracked=buffers["num_batches_tracked"] if self.training and updates else None,
            inplace=self.inplace and not torch.is_grad_enabled(),
        )


def _adopt(to: nn.Module, source: nn.Module) -> Any:
    for name, own in source._parameters.items():
        to.register_parameter(name, own)
    for name, buffer in source._buffers.items():
        to.register_buffer(name, buffer)
    if isinstance(to, nn.SyncBatchNorm) and isinstance(source, nn.SyncBatchNorm):
        to.process_group = source.process_group
    return to.train(source.training)


class BatchNorm1d(_Fused, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d with a fused residual and activation; (N, C) or (N, C, L). As BatchNorm2d."""


class BatchNorm2d(_Fused, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d with a fused residual and activation: same arguments and state dict.

    Equivalent to: F.relu(torch.nn.BatchNorm2d(num_features)(x) + residual), for activation="relu".

    Args:
        num_features ... dtype: as torch.nn.BatchNorm2d. Running statistics stay fp32 after .half() and .bfloat16().
        activation, num_splits: as in `ssl_fast.functional.batch_norm`.
        inplace: write the result over the input wherever gradients are off.

    Shape:
        forward(x, residual=None): both (N, C, H, W), contiguous or channels_last, as the result is.

    Example:
        >>> norm = BatchNorm2d(64, activation="relu")
        >>> y = norm(conv(x), residual=x)
    """


class BatchNorm3d(_Fused, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d with a fused residual and activation; (N, C, D, H, W). As BatchNorm2d."""
