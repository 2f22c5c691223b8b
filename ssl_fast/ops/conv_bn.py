"""Batch norm of running statistics folded into the convolution or linear layer in front of it. Per output channel,

    s = gamma / sqrt(var + eps)        W <- s W        b <- s (b - mean) + beta

in fp64, rounded to the layer's dtype at the end. `ssl_fast.fold_conv_bn` folds whole networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ssl_fast._op import HALF_AND_FLOAT, Op

FLOATING = (*HALF_AND_FLOAT, torch.float64)


# ---- reference: the definition, and the fallback on any device


def _reference(
    targets: Sequence[Tensor], sources: Sequence[Tensor], norms: Sequence[Tensor], eps: Sequence[float],
    groups: Sequence[int],
) -> None:  # fmt: skip
    """Of P pairs: write the folded weights to the first P targets, the biases to the next P; copy to the others.

    sources: the weights, the biases, then what is copied. norms: mean, variance, gamma and beta of each pair in turn.
    A bias, gamma or beta that is absent has no elements. eps: P; groups: P, 0 for a layer whose weight has the output
    channels in dimension 0, else those of a transposed convolution.
    """
    pairs = len(eps)
    for i in range(pairs):
        weight, bias = sources[i].double(), sources[pairs + i].double()
        mean, var, gamma, beta = (t.double() for t in norms[4 * i : 4 * i + 4])
        scale = (gamma if gamma.numel() else 1) / (var + eps[i]).sqrt()
        if groups[i]:  # (in, out / groups, ...)
            grouped = weight.unflatten(0, (groups[i], -1))
            by_channel = scale.view(groups[i], 1, -1, *(1,) * (weight.dim() - 2))
            weight = (grouped * by_channel).flatten(0, 1)
        else:
            weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
        shift = ((bias if bias.numel() else 0) - mean) * scale + (beta if beta.numel() else 0)
        targets[i].copy_(weight)
        targets[pairs + i].copy_(shift)
    for target, source in zip(targets[2 * pairs :], sources[2 * pairs :], strict=True):
        target.copy_(source)


# ---- operator

_fold = Op(
    "conv_bn_fold_(Tensor(a!)[] targets, Tensor[] sources, Tensor[] norms, float[] eps, int[] groups) -> ()",
    _reference,
    fake=lambda *_: None,
    native={"cpu": FLOATING},
    triton="ssl_fast.kernels.conv_bn:conv_bn_fold_",
    triton_dtypes=FLOATING,
    decides="targets",
)


def fold_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], norms: Sequence[Tensor], eps: Sequence[float],
    groups: Sequence[int],
) -> None:  # fmt: skip
    """The operator, for sources of any strides."""
    if targets:
        sources = [_in_layout_of(t, s) for t, s in zip(targets, sources, strict=True)]
        _fold(targets, sources, [t.contiguous() for t in norms], eps, groups)
        increment_version(targets)


def _in_layout_of(target: Tensor, source: Tensor) -> Tensor:
    """What the kernels walk through side by side."""
    if not source.numel() or source.stride() == target.stride():
        return source
    return torch.empty_like(target, dtype=source.dtype).copy_(source)


# ---- functions


def fuse_conv_bn_weights(
    conv_w: Tensor,
    conv_b: Tensor | None,
    bn_rm: Tensor,
    bn_rv: Tensor,
    bn_eps: float,
    bn_w: Tensor | None,
    bn_b: Tensor | None,
    transpose: bool = False,
) -> tuple[nn.Parameter, nn.Parameter]:
    """The weight and bias of a convolution that does what the convolution and the batch norm after it do.

    Equivalent to: torch.nn.utils.fuse_conv_bn_weights, in fp64 up to one rounding, and for grouped transposed
    convolutions too.

    Args:
        conv_w: (out, in / groups, ...), or (in, out / groups, ...) where `transpose`; fp16, bf16, fp32 or fp64.
        conv_b: (out,), or None.
        bn_rm, bn_rv: the running mean and variance, (out,).
        bn_eps: what is added to the variance.
        bn_w, bn_b: (out,), each optional.
        transpose: of a transposed convolution; its groups follow from the shapes.

    Returns:
        Two parameters: of conv_w's shape, dtype and memory format; (out,) in the dtype of conv_b, else of conv_w. They
        require a gradient where conv_w and conv_b do.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Example:
        >>> conv.weight, conv.bias = fuse_conv_bn_weights(
        ...     conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    """
    return _fused("conv", conv_w, conv_b, bn_rm, bn_rv, bn_eps, bn_w, bn_b, transpose)


def fuse_linear_bn_weights(
    linear_w: Tensor,
    linear_b: Tensor | None,
    bn_rm: Tensor,
    bn_rv: Tensor,
    bn_eps: float,
    bn_w: Tensor | None,
    bn_b: Tensor | None,
) -> tuple[nn.Parameter, nn.Parameter]:
    """The weight and bias of a linear layer that does what the layer and the batch norm of its rows (N, out) do.

    Equivalent to: torch.nn.utils.fuse_linear_bn_weights, in fp64 up to one rounding, with bn_w and bn_b optional.
    Batch norm of (N, out, L) normalises another dimension, and does not fold.

    Args:
        linear_w: (out, in); fp16, bf16, fp32 or fp64.
        linear_b ... bn_b: as in `fuse_conv_bn_weights`.

    Returns, Raises: as `fuse_conv_bn_weights`.

    Example:
        >>> fc.weight, fc.bias = fuse_linear_bn_weights(
        ...     fc.weight, fc.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    """
    return _fused("linear", linear_w, linear_b, bn_rm, bn_rv, bn_eps, bn_w, bn_b, False)


@torch.no_grad()
def _fused(
    layer: str, weight: Tensor, bias: Tensor | None, mean: Any, var: Any, eps: float, gamma: Tensor | None,
    beta: Tensor | None, transpose: bool,
) -> tuple[nn.Parameter, nn.Parameter]:  # fmt: skip
    for name, value in ((f"{layer}_w", weight), ("bn_rm", mean), ("bn_rv", var)):
        if not isinstance(value, Tensor):
            hint = "; a norm without running statistics does not fold" if name != f"{layer}_w" else ""
            raise TypeError(f"{name}: got {type(value).__name__}, allowed: a tensor{hint}")
    least = 2 if layer == "linear" else 3
    if weight.dim() < least:
        raise ValueError(f"{layer}_w: got shape {tuple(weight.shape)}, allowed: at least {least} dimensions")
    channels = mean.numel()
    fits = channels > 0 and (channels % weight.shape[1] == 0 if transpose else channels == weight.shape[0])
    groups = channels // weight.shape[1] if transpose and fits else 0
    if not fits or (groups and weight.shape[0] % groups):
        of = "its output channels over the groups in dimension 1" if transpose else "its output channels in dimension 0"
        raise ValueError(f"{layer}_w: got shape {tuple(weight.shape)}, allowed: {of}, for {channels} values in bn_rm")
    vectors = ((f"{layer}_b", bias), ("bn_rm", mean), ("bn_rv", var), ("bn_w", gamma), ("bn_b", beta))
    for name, value in ((f"{layer}_w", weight), *vectors):
        if value is None:
            continue
        if value.dtype not in FLOATING:
            raise TypeError(f"{name}: got {value.dtype}, allowed: float16, bfloat16, float32, float64")
        if value.device != weight.device:
            raise ValueError(f"{name}: got device {value.device}, allowed: that of {layer}_w, {weight.device}")
        if value is not weight and value.shape != (channels,):
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, allowed: ({channels},), that of bn_rm")
    own, absent = bias if bias is not None else weight, weight.new_empty(0)
    targets = torch.empty_like(weight), torch.empty(channels, dtype=own.dtype, device=own.device)
    sources = [weight, absent if bias is None else bias]
    norm = [absent if t is None else t for t in (mean, var, gamma, beta)]
    fold_(targets, sources, norm, [float(eps)], [groups])
    return (
        nn.Parameter(targets[0], weight.requires_grad),
        nn.Parameter(targets[1], bias is not None and bias.requires_grad),
    )
