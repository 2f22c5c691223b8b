"""What `fold_conv_bn` folds: which layers and norms, why not, and the modules that stand in their places."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ssl_fast.accelerate import FUNCTIONS, hooked
from ssl_fast.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from ssl_fast.ops.conv_bn import FLOATING

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED = nn.modules.conv._ConvTransposeNd
# Of other packages, by name: linear in `weight` and `bias`, which they read from themselves.
LAYERS_BY_NAME = ("timm.layers.conv2d_same.Conv2dSame",)
OURS = (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
TORCH_NORMS: dict[type, int | None] = {  # and the spatial dimensions that they check
    nn.BatchNorm1d: None, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None,
}  # fmt: skip
TIMM_NORMS = ("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct")  # with drop and act
FROZEN_NORMS = ("torchvision.ops.misc.FrozenBatchNorm2d",)
# Hooks that compute a parameter before each call, of torch.nn.utils before its parametrisations.
OLD_HOOKS: dict[type, Callable[[Any, nn.Module], Tensor]] = {
    WeightNorm: lambda hook, layer: hook.compute_weight(layer),
    SpectralNorm: lambda hook, layer: hook.compute_weight(layer, do_power_iteration=False),
}


def _qualname(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for the block, then each of its modules back in its own mode."""
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# ---- what folds


def _own_class(module: nn.Module) -> Any:
    """The class before parametrisations, or before accelerate's."""
    cls = parametrize.type_before_parametrizations(module)
    return getattr(cls, "_parts", (cls,))[0]


def _known_layer(module: nn.Module) -> Any:
    """The class of LAYERS, or by name, whose forward a module has; None for other modules."""
    cls = _own_class(module)
    for known in cls.__mro__:
        if known in LAYERS or _qualname(known) in LAYERS_BY_NAME:
            methods = ("forward", "_conv_forward")
            return known if all(getattr(cls, n, None) is getattr(known, n, None) for n in methods) else None
    return None


def _old_hook(layer: nn.Module, name: str) -> Any:
    hooks: list[Any] = list(layer._forward_pre_hooks.values())
    return next((hook for hook in hooks if type(hook) in OLD_HOOKS and hook.name == name), None)


def _value(layer: nn.Module, name: str) -> Tensor | None:
    """A layer's weight or bias as it computes with in eval mode."""
    if name in layer._parameters:  # those of hooks and parametrisations are not
        return layer._parameters[name]
    hook = _old_hook(layer, name)
    if hook is not None:
        return OLD_HOOKS[type(hook)](hook, layer)
    if parametrize.is_parametrized(layer, name):
        with eval_mode(layer):
            return getattr(layer, name)
    return getattr(layer, name)


def _layer_obstacle(layer: nn.Module) -> str | None:
    """Why nothing can be folded into a layer."""
    if _known_layer(layer) is None:
        return f"{type(layer).__name__} has a forward of its own"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return f"{type(layer).__name__} is not initialised: run a batch first"
    old = [k for k, h in layer._forward_pre_hooks.items() if type(h) in OLD_HOOKS]
    pre_hooks = [k for k in layer._forward_pre_hooks if k not in old]
    if pre_hooks or layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "the layer has hooks"
    if "forward" in layer.__dict__:
        return "the layer's forward was replaced"
    for name in ("weight", "bias"):
        there = name in layer._parameters or parametrize.is_parametrized(layer, name) or _old_hook(layer, name)
        if not there:
            return f"the layer's {name} is no parameter"
    weight = _value(layer, "weight")
    if weight is None or weight.dtype not in FLOATING or weight.is_meta:
        return f"the layer's weight is {'on the meta device' if weight is not None and weight.is_meta else weight}"
    return None


def _known_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm that a report speaks of."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or _qualname(type(module)) in FROZEN_NORMS


def _norm_obstacle(norm: nn.Module) -> str | None:
    """Why a norm cannot be folded into anything."""
    cls = _own_class(norm)
    names = (*TIMM_NORMS, *FROZEN_NORMS)
    known = next((c for c in cls.__mro__ if c in OURS or c in TORCH_NORMS or _qualname(c) in names), None)
    if known is None or cls.forward is not known.forward:
        return f"{cls.__name__} has a forward of its own"
    if hooked(norm):
        return "it has hooks"
    if parametrize.is_parametrized(norm):
        return "it is parametrised"
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        return "it is not initialised: run a batch first"
    if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
        return "it has no running statistics"
    return None


def _spatial(norm: nn.Module) -> int | None:
    """How many spatial dimensions a norm insists on; None where it takes inputs of several ranks."""
    return next((n for cls, n in TORCH_NORMS.items() if n and isinstance(norm, cls)), None)


def _rank(layer: Any) -> int:
    """The dimensions of a batch of a layer's inputs and outputs."""
    return 2 if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 2


def _mismatch(layer: Any, norm: Any) -> str | None:
    """Why a norm that follows a layer does not fold into it."""
    spatial = _spatial(norm)
    if spatial is not None and spatial != _rank(layer) - 2:
        return f"it is a {type(norm).__name__} after a {type(layer).__name__}"
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if norm.running_mean.numel() != channels:
        return f"it has {norm.running_mean.numel()} channels, the layer {channels}"
    weight = _value(layer, "weight")
    assert weight is not None
    if norm.running_mean.device != weight.device:
        return f"it lies on {norm.running_mean.device}, the layer on {weight.device}"
    return None


# ---- what stands in their places


class _Checked:
    """A folded layer that refuses inputs whose outputs the norm would have normalised along another dimension."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rank = _rank(self)
        torch._assert(
            input.dim() == rank,
            f"input: got another number of dimensions than {rank}, for which the batch norm was folded into this layer",
        )
        return super().forward(input, *args, **kwargs)  # type: ignore[misc]


class FoldedLinear(_Checked, nn.Linear):
    """A linear layer with the batch norm of its rows folded in; takes (N, in) alone."""


class FoldedConv1d(_Checked, nn.Conv1d):
    """A convolution with a batch norm folded in; takes batches alone."""


class FoldedConv2d(_Checked, nn.Conv2d):
    """A convolution with a batch norm folded in; takes batches alone."""


class FoldedConv3d(_Checked, nn.Conv3d):
    """A convolution with a batch norm folded in; takes batches alone."""


class FoldedConvTranspose1d(_Checked, nn.ConvTranspose1d):
    """A convolution with a batch norm folded in; takes batches alone."""


class FoldedConvTranspose2d(_Checked, nn.ConvTranspose2d):
    """A convolution with a batch norm folded in; takes batches alone."""


class FoldedConvTranspose3d(_Checked, nn.ConvTranspose3d):
    """A convolution with a batch norm folded in; takes batches alone."""


CHECKED: dict[type, type] = {cls.__mro__[2]: cls for cls in _Checked.__subclasses__()}


class Epilogue(nn.Module):
    """What is left of a norm of ssl_fast.nn: the addition of the residual, and the activation."""

    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None, *, activation: str | None = None) -> Tensor:
        name = activation or self.activation
        y = input if residual is None else input + residual
        return FUNCTIONS[name](y) if name else y

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class _Several(nn.Sequential):
    """What stands in a norm's place where that takes several modules."""


def _folded_layer(layer: Any, norm: Any) -> Any:
    """A layer of the same arguments with a weight and bias of its own, not yet written."""
    known = _known_layer(layer)
    unchecked = _spatial(norm) is not None or known not in CHECKED
    cls: Any = _own_class(layer) if unchecked else CHECKED[known]
    folded = cls.__new__(cls)
    nn.Module.__init__(folded)
    inner = {*vars(folded), "weight", "bias"}  # an old weight_norm keeps its product as an attribute
    vars(folded).update({name: value for name, value in vars(layer).items() if name not in inner})
    weight, bias = _value(layer, "weight"), _value(layer, "bias")
    assert weight is not None
    channels = norm.running_mean.shape
    own = weight if bias is None else bias
    folded.weight = nn.Parameter(torch.empty_like(weight, requires_grad=False), requires_grad=False)
    folded.bias = nn.Parameter(torch.empty(channels, dtype=own.dtype, device=own.device), requires_grad=False)
    return folded.eval()


def _rest(norm: Any) -> nn.Module:
    """What a norm does besides normalising."""
    if any(cls in OURS for cls in type(norm).__mro__):
        return Epilogue(norm.activation)
    if any(_qualname(cls) in TIMM_NORMS for cls in type(norm).__mro__):
        parts = {name: getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)}
        return copy.deepcopy(_Several(OrderedDict(parts))).eval()
    return nn.Identity()
