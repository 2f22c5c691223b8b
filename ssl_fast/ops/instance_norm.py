"""Instance normalisation (Ulyanov, Vedaldi & Lempitsky 2016, arXiv 1607.08022) with what follows it, the addition of a
residual and an activation:

    u = weight * (x - mean) / sqrt(var + eps) + bias + residual        y = activation(u)

with mean and variance over the positions of each image and channel. That is a batch norm whose every image is a split
of the batch with statistics of its own, so the operators are those of ssl_fast/ops/batch_norm.py, which index weight
and bias by channel, repeat nothing, and read planes and rows of channels as they lie.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ssl_fast._checks import is_number
from ssl_fast.ops._norms import check_activation, check_residual, parameter
from ssl_fast.ops.batch_norm import EACH_IMAGE, FusedNorm, check, normalised


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Instance normalisation, then the residual, then the activation (arXiv 1607.08022, equation 2), fused.

    Equivalent to, for activation="relu":
        F.relu(F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps) + residual)
    Statistics are fp32 whatever x is (fp64 for fp64), and exact for a mean that is large beside the deviation. The
    backward keeps x, and with a residual one bit an element; under no_grad nothing is kept. Differentiable twice;
    torch.func and forward-mode differentiation go through plain torch operations.

    Args:
        x: (N, C, L), (N, C, H, W) or (N, C, D, H, W); fp16, bf16, fp32 or fp64; contiguous or channels_last, which the
            result keeps; other strides cost a copy.
        running_mean, running_var: (C,). With use_input_stats they move, in place and by momentum, towards the mean over
            the images of their means and unbiased variances; else they are what x is normalised with.
        weight, bias: (C,), each optional.
        use_input_stats: normalise with x's own statistics.
        residual: of x's shape and dtype, added before the activation. For "silu" and "gelu" the backward keeps it.
        activation: None, "relu", "leaky_relu" (slope 0.01), "silu" or "gelu" (exact).

    Returns:
        Of x's shape, dtype and memory format.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before anything is modified.

    Example:
        >>> y = instance_norm(conv(x), weight=w, bias=b, residual=x, activation="relu")
    """
    code = check(x, running_mean, running_var, weight, bias, use_input_stats, eps, activation, residual)
    if use_input_stats:
        if not is_number(momentum):
            raise TypeError(f"momentum: got {momentum!r}, allowed: a number such as 0.1")
        if math.prod(x.shape[2:]) == 1:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, allowed: more than 1 spatial element when training, for each has "
                "statistics of its own; use larger images or eval() with running statistics"
            )
    return normalised(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, code, residual,
                      EACH_IMAGE)  # fmt: skip


# ---- modules


class _Fused(FusedNorm, nn.modules.instancenorm._InstanceNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)  # type: ignore[arg-type]
        if not bias:  # which torch's own constructor takes in later versions alone
            self.register_parameter("bias", None)
        check_activation(activation)
        self.activation = activation
        self._widen_statistics()

    def forward(self, input: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """`activation` is for a caller who knows what follows; the default is the module's own."""
        self._check_input_dim(input)
        batched = input.dim() != self._get_no_batch_dim()  # type: ignore[no-untyped-call]
        channels = input.shape[batched]
        if channels != self.num_features:
            message = f"input: got {channels} channels in dimension {int(batched)}, allowed: {self.num_features}"
            if self.affine:
                raise ValueError(f"expected input's size to match num_features; {message}")
            warnings.warn(
                f"input's size does not match num_features, which affine=False does not use; {message}", stacklevel=2
            )
        if not batched:
            check_residual(residual, input)  # while both have the shapes that were given
            input, residual = input[None], None if residual is None else residual[None]
        y = instance_norm(
            input,
            self._buffers["running_mean"],
            self._buffers["running_var"],
            parameter(self, "weight"),
            parameter(self, "bias"),
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
            residual=residual,
            activation=activation or self.activation,
        )
        return y if batched else y[0]


class InstanceNorm1d(_Fused, nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d with a fused residual and activation; (N, C, L) or (C, L). As InstanceNorm2d."""


class InstanceNorm2d(_Fused, nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d with a fused residual and activation: same arguments and state dict.

    Equivalent to: F.relu(torch.nn.InstanceNorm2d(num_features)(x) + residual), for activation="relu".

    Args:
        num_features ... dtype: as torch.nn.InstanceNorm2d; momentum=None leaves the running statistics as they are, as
            there. They stay fp32 after .half() and .bfloat16().
        activation: as in `ssl_fast.functional.instance_norm`.

    Shape:
        forward(x, residual=None): both (N, C, H, W) or (C, H, W), contiguous or channels_last, as the result is.

    Example:
        >>> norm = InstanceNorm2d(64, affine=True, activation="relu")
        >>> y = norm(conv(x), residual=x)
    """


class InstanceNorm3d(_Fused, nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d with a fused residual and activation; (N, C, D, H, W) or (C, D, H, W)."""
