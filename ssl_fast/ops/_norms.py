"""What batch, instance and layer norm share: layouts in memory, activations, checks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_fast._checks import is_number
from ssl_fast._op import HALF_AND_FLOAT

# As the kernels number them.
ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "gelu": 4}
IDENTITY, RELU, LEAKY_RELU, SILU, GELU = range(5)
BY_SIGN = (RELU, LEAKY_RELU)  # whose derivative depends on u by its sign alone
NEGATIVE_SLOPE = 0.01  # of leaky_relu, as torch's default
DTYPES = (*HALF_AND_FLOAT, torch.float64)


# ---- the layout that every backend shares


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums, and of what the kernels compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def channels_innermost(x: Tensor) -> bool:
    """Whether a dense x is rows of channels in memory, (N L, C), rather than planes, (N C, L)."""
    return math.prod(x.shape[2:]) == 1 or (x.shape[1] > 1 and x.stride(1) == 1)


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it where memory holds it neither as planes nor as rows of channels."""
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.stride(1) == 1 else x.contiguous()


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """tensor, of x's shape, laid out as the dense x is."""
    if tensor.stride() == x.stride():
        return tensor
    rows = tensor.movedim(1, -1) if channels_innermost(x) else tensor
    return tensor if rows.is_contiguous() else torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)


# ---- activations


def activate(u: Tensor, activation: int) -> Tensor:
    return (
        u if activation == IDENTITY
        else u.relu() if activation == RELU
        else F.leaky_relu(u, NEGATIVE_SLOPE) if activation == LEAKY_RELU
        else F.silu(u) if activation == SILU
        else F.gelu(u)
    )  # fmt: skip


def derivative(u: Tensor, activation: int) -> Tensor:
    if activation == SILU:
        return u.sigmoid() * (1 + u * (1 - u.sigmoid()))
    return 0.5 * (1 + torch.erf(u * math.sqrt(0.5))) + u * torch.exp(-0.5 * u * u) * (0.5 / math.pi) ** 0.5


# ---- what costs a small call as much as its arithmetic


def shaped(gradient: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A gradient as its parameter is, which most are as they come."""
    if gradient.shape == shape and gradient.dtype == dtype:
        return gradient
    return gradient.view(shape).to(dtype)


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """module.name; attributes that are not in a module's dictionary are slow to look up."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found  # of a parametrisation


# ---- checks


def check_input(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, allowed: a tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got {x.dtype}, allowed: float16, bfloat16, float32, float64; convert with x.float()")


def check_parameter(name: str, tensor: Any, shape: tuple[int, ...], of: str, x: Tensor) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, allowed: a tensor of shape {shape}, or None")
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, allowed: {shape}, {of}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: got device {tensor.device}, allowed: that of x, {x.device}; move one to the other")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: got {tensor.dtype}, allowed: a floating-point dtype, best float32")


def check_residual(residual: Any, x: Tensor) -> None:
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual: got {type(residual).__name__}, allowed: a tensor of x's shape, or None")
    if residual.shape != x.shape or residual.device != x.device:
        raise ValueError(
            f"residual: got shape {tuple(residual.shape)} on {residual.device}, allowed: that of x, {tuple(x.shape)} "
            f"on {x.device}"
        )


def check_eps(eps: Any) -> None:
    if not is_number(eps) or not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps!r}, allowed: a number >= 0, such as 1e-5")


def check_activation(activation: Any) -> int:
    """Its number."""
    if not (activation is None or isinstance(activation, str)) or activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, allowed: {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[activation]
