"""Layer normalisation (Ba, Kiros & Hinton 2016, arXiv 1607.06450) with what follows it, the addition of a residual and
an activation, in one operator each way:

    u = weight * (x - mean) / sqrt(var + eps) + bias + residual        y = activation(u)

over the last dimensions of x, or over the channels of each position, dimension 1. The backward recomputes u, and keeps
x alone; with a residual and an activation it keeps the residual too.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_fast._op import HALF_AND_FLOAT, Op, autocast_dtype, records, transforming
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

# ---- the layout that every backend shares


def sizes(x: Tensor, width: int, channels: bool) -> tuple[int, int, int]:
    """(N, D, L): memory is N blocks of D rows of L numbers, and statistics are over D for each of the N L positions."""
    if channels and not channels_innermost(x):
        # Not len(x), which would fix the batch of a compiled model.
        return x.shape[0], width, math.prod(x.shape[2:])
    return x.numel() // (width or 1), width, 1


def _laid(tensor: Tensor, x: Tensor, channels: bool) -> Tensor:
    """tensor, of x's shape, laid out as the dense x is."""
    return like(tensor, x) if channels else tensor.contiguous()


# ---- reference


def _grouped(x: Tensor, width: int, channels: bool) -> Tensor:
    """(N, D, L) in the dtype of sums, with statistics over D."""
    shape = (x.shape[0], width, math.prod(x.shape[2:])) if channels else (x.numel() // (width or 1), width, 1)
    return x.to(accumulator(x)).reshape(shape)


def _statistics(xs: Tensor, eps: float) -> Tensor:
    """(3, N L): mean, what its rounding left out, 1 / sqrt(var + eps)."""
    pivot = xs[:, :1].detach().sum(1)  # from which the mean of equal numbers is exact
    rough = pivot + (xs - pivot.unsqueeze(1)).mean(1)
    centred = xs - rough.unsqueeze(1)
    low = centred.mean(1)
    var = centred.square().mean(1) - low.square()
    mean = rough + low
    return torch.stack([mean, low - (mean - rough), (var + eps).rsqrt()]).flatten(1)


def _normalised(xs: Tensor, stats: Tensor) -> Tensor:
    """x - mean is exact where the two are near, so nothing is lost to a large mean."""
    mean, low, invstd = stats.view(3, xs.shape[0], 1, xs.shape[2])
    return ((xs - mean) - low) * invstd


def _pre_activation(xhat: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    u = xhat if weight is None else xhat * weight.to(xhat.dtype).view(-1, 1)
    u = u if bias is None else u + bias.to(xhat.dtype).view(-1, 1)
    return u if residual is None else u + residual


def _fwd_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    width: int,
    channels: bool,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    xs = _grouped(x, width, channels)
    stats = _statistics(xs, eps)
    added = None if residual is None else _grouped(residual, width, channels)
    u = _pre_activation(_normalised(xs, stats), added, weight, bias)
    return _laid(activate(u, activation).view(x.shape).to(x.dtype), x, channels), stats


def _bwd_reference(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    width: int,
    channels: bool,
    activation: int,
    need_dx: bool,
    need_dresidual: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiable itself, as stats is; see _LayerNorm.backward."""
    dz, xs = _grouped(dy, width, channels), _grouped(x, width, channels)
    xhat = _normalised(xs, stats)
    if activation != IDENTITY:
        added = None if residual is None else _grouped(residual, width, channels)
        u = _pre_activation(xhat, added, weight, bias)
        if activation in BY_SIGN:
            dz = torch.where(u <= 0, 0 if activation == RELU else dz * NEGATIVE_SLOPE, dz)
        else:
            dz = dz * derivative(u, activation)
    dx = dresidual = dy.new_empty(0)
    dweight = dbias = stats.new_empty(0)
    if need_affine:
        dweight, dbias = (dz * xhat).sum((0, 2)), dz.sum((0, 2))
    if need_dresidual:
        dresidual = _laid(dz.to(dy.dtype).view(x.shape), x, channels)
    if need_dx:
        g = dz if weight is None else dz * weight.to(dz.dtype).view(-1, 1)
        g = g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True)
        dx = _laid((g * stats[2].view(len(xs), 1, xs.shape[2])).to(dy.dtype).view(x.shape), x, channels)
    return dx, dresidual, dweight, dbias


# ---- shapes


def _fwd_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    N, _, L = sizes(x, arguments[3], arguments[4])
    return torch.empty_like(x), x.new_empty((3, N * L), dtype=accumulator(x))


def _bwd_fake(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width, need_dx, need_dresidual, need_affine = arguments[4], *arguments[7:]
    dx, dresidual = (torch.empty_like(x) if need else x.new_empty(0) for need in (need_dx, need_dresidual))
    dweight, dbias = (x.new_empty(width if need_affine else 0, dtype=accumulator(x)) for _ in range(2))
    return dx, dresidual, dweight, dbias


# ---- operators

# `channels`: statistics over dimension 1 of a dense x, rather than over the last `width` numbers of a contiguous one.
# y, and the (3, N L) statistics.
layer_norm_fwd = Op(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, int width, bool channels, float eps, "
    "int activation) -> (Tensor, Tensor)",
    _fwd_reference,
    fake=_fwd_fake,
    native={"cpu": HALF_AND_FLOAT, "cuda": (torch.bfloat16,)},
    triton="ssl_fast.kernels.layer_norm:layer_norm_fwd",
    decides="x",
)
# dx, dresidual, dweight, dbias; the last two of `width` numbers in the dtype of sums.
layer_norm_bwd = Op(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor stats, int width, "
    "bool channels, int activation, bool need_dx, bool need_dresidual, bool need_affine) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_reference,
    fake=_bwd_fake,
    native={"cpu": HALF_AND_FLOAT, "cuda": (torch.bfloat16,)},
    triton="ssl_fast.kernels.layer_norm:layer_norm_bwd",
    decides="x",
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        width: int,
        channels: bool,
        eps: float,
        activation: int,
    ) -> Tensor:
        ctx.backend, forward = layer_norm_fwd.chosen(x)
        ctx.width, ctx.channels, ctx.eps, ctx.activation = width, channels, eps, activation
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
        y, stats = forward(x, residual, weight, bias, width, channels, eps, activation)
        again = activation != IDENTITY  # the backward computes u again
        ctx.save_for_backward(x, residual if again else None, weight, bias if again else None, stats)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, residual, weight, bias, stats = ctx.saved_tensors
        need_dx, need_dresidual, need_dweight, need_dbias = ctx.needs_input_grad[:4]
        through = need_dresidual and ctx.activation != IDENTITY
        rest = (ctx.width, ctx.channels, ctx.activation, need_dx, through, need_dweight or need_dbias)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            stats = _statistics(_grouped(x, ctx.width, ctx.channels), ctx.eps)
            gradients = _bwd_reference(dy, x, residual, weight, bias, stats, *rest)
        else:
            dense_dy = _laid(dy, x, ctx.channels)
            gradients = layer_norm_bwd(dense_dy, x, residual, weight, bias, stats, *rest, backend=ctx.backend)
        dx, dresidual, dweight, dbias = gradients
        return (
            dx if need_dx else None,
            (dresidual if through else dy) if need_dresidual else None,
            shaped(dweight, weight.shape, weight.dtype) if need_dweight else None,
            shaped(dbias, *ctx.bias_like) if need_dbias else None,
            *(None,) * 4,
        )


# ---- function


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dim: int = -1,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Layer normalisation, then the residual, then the activation (Ba et al. 2016, arXiv 1607.06450), fused.

    Equivalent to, for activation="relu":
        F.relu(F.layer_norm(x, normalized_shape, weight, bias, eps) + residual)
    and with dim=1, over the channels of images, to F.layer_norm on x.movedim(1, -1), moved back, without a copy.
    Statistics are fp32 whatever x is (fp64 for fp64), and exact for a mean that is large beside the deviation. The
    backward keeps x and three numbers a row, with residual and activation the residual too. Differentiable twice.

    Args:
        x: (..., *normalized_shape), or (N, C, ...) with dim=1; fp16, bf16, fp32 or fp64. With dim=1 contiguous or
            channels_last, which the result keeps; other strides cost a copy.
        normalized_shape: the last dimensions of x; with dim=1, C.
        weight, bias: of normalized_shape, each optional; of any floating dtype beside any x.
        dim: -1, the last dimensions, or 1, the channels.
        residual: of x's shape and dtype, added after the affine map and before the activation.
        activation: None, "relu", "leaky_relu" (slope 0.01), "silu" or "gelu" (exact).

    Returns:
        Of x's shape and dtype; fp32 under CUDA's autocast, as torch's.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Example:
        >>> y = layer_norm(tokens, 768, weight, bias)
        >>> z = layer_norm(images, 96, eps=1e-6, dim=1)
    """
    shape = _shape_of(normalized_shape)
    code = _check(x, shape, weight, bias, eps, dim, residual, activation)
    if x.is_cuda and x.dtype != torch.float64 and autocast_dtype(x) is not None:  # torch's policy for it
        x = x.float()
        residual = residual if residual is None else residual.float()
    if residual is not None and residual.dtype != x.dtype:  # type promotion needs a tensor of its own
        return activate(layer_norm(x, shape, weight, bias, eps, dim=dim) + residual, code)
    channels = dim == 1
    x = dense(x) if channels else x.contiguous()
    if residual is not None:  # compile wants them distinct
        residual = _laid(residual.view_as(residual) if residual is x else residual, x, channels)
    if weight is not None:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    width, eps = math.prod(shape), float(eps)
    if transforming():
        return _fwd_reference(x, residual, weight, bias, width, channels, eps, code)[0]
    if records(x, residual, weight, bias):
        return _LayerNorm.apply(x, residual, weight, bias, width, channels, eps, code)
    return layer_norm_fwd(x, residual, weight, bias, width, channels, eps, code)[0]


def _check(
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dim: int,
    residual: Tensor | None,
    activation: str | None,
) -> int:
    """The number of the activation; raises for what does not fit."""
    check_input(x)
    if dim == 1 and dim is not True:
        if x.dim() < 2 or (x.shape[1],) != shape:
            raise ValueError(
                f"normalized_shape: got {shape} for x of shape {tuple(x.shape)}, allowed with dim=1: the channels of "
                "(N, C, ...)"
            )
    elif dim != -1:
        raise ValueError(f"dim: got {dim!r}, allowed: -1, the last dimensions of x, or 1, its channels")
    elif not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"normalized_shape: got {shape} for x of shape {tuple(x.shape)}, allowed: the last dimensions of x, one or "
            "more; for channels in dimension 1 pass dim=1"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_parameter(name, tensor, shape, "that of normalized_shape", x)
    check_residual(residual, x)
    check_eps(eps)
    return check_activation(activation)


def _shape_of(normalized_shape: Any) -> tuple[int, ...]:
    sizes = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    for size in sizes:
        if not isinstance(size, (int, numbers.Integral, torch.SymInt)) or isinstance(size, bool):
            raise TypeError(f"normalized_shape: got {normalized_shape!r}, allowed: a whole number, or several")
    return tuple(sizes)


# ---- modules


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm with a fused residual and activation: same arguments and state dict.

    Equivalent to: F.relu(torch.nn.LayerNorm(normalized_shape)(x) + residual), for activation="relu".

    Args:
        normalized_shape ... dtype: as torch.nn.LayerNorm.
        activation: as in `ssl_fast.functional.layer_norm`.

    Shape:
        forward(x, residual=None): both (..., *normalized_shape); any of fp16, bf16, fp32, fp64 beside any parameters.

    Example:
        >>> norm = LayerNorm(768)
        >>> y = norm(tokens)
    """

    # Of the class too, so that a module of torch's becomes one of ours by its class alone.
    activation: str | None = None
    dim: int = -1

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(_shape_of(normalized_shape), eps, elementwise_affine, bias, device, dtype)  # type: ignore[arg-type]
        check_activation(activation)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return layer_norm(
            input, self.normalized_shape, parameter(self, "weight"), parameter(self, "bias"), self.eps,
            dim=self.dim, residual=residual, activation=self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        extra = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + extra


class LayerNorm2d(LayerNorm):
    """Layer norm over the channels of images, as ConvNeXt's; the result keeps the memory format, and nothing is copied.

    Equivalent to: torch.nn.LayerNorm(C)(x.movedim(1, -1)).movedim(-1, 1).

    Args:
        normalized_shape: C; the others as LayerNorm's. ConvNeXt's eps is 1e-6.

    Shape:
        forward(x, residual=None): both (N, C, H, W), contiguous or channels_last, as the result is; or (N, C, ...).

    Example:
        >>> norm = LayerNorm2d(96, eps=1e-6)
        >>> y = norm(images)
    """

    dim = 1
