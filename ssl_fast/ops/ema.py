"""In-place moving average of weights, the momentum update of MoCo (He et al. 2020, arXiv 1911.05722, equation 2):

    target <- momentum * target + (1 - momentum) * source

computed as torch.lerp does, in fp32 (fp64 where a tensor is fp64), and rounded once to the target's dtype.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ssl_fast._op import HALF_AND_FLOAT, Op

_FLOATING = (*HALF_AND_FLOAT, torch.float64)


# ---- reference: the definition, and the fallback on any device


def _reference(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    weight = 1 - momentum
    alike = [(t, s) for t, s in zip(targets, sources, strict=True) if t.dtype == s.dtype]
    if alike:
        torch._foreach_lerp_([t for t, _ in alike], [s for _, s in alike], weight)
    for t, s in zip(targets, sources, strict=True):
        if t.dtype != s.dtype:
            wide = torch.promote_types(torch.promote_types(t.dtype, s.dtype), torch.float32)
            t.copy_(torch.lerp(t.to(wide), s.to(wide), weight))


def _fake(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    return None


# ---- operator

_update = Op(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum) -> ()",
    _reference,
    fake=_fake,
    native={"cuda": _FLOATING},
    decides="targets",
)


@torch.no_grad()
def ema_update_(targets: nn.Module | Iterable[Tensor], sources: nn.Module | Iterable[Tensor], momentum: float) -> None:
    """Move every target towards its source, in place: target = momentum * target + (1 - momentum) * source.

    On CUDA one launch updates up to 1,024 tensors of any shapes, dtypes and memory formats, at 12 bytes a parameter in
    fp32. A tensor with gaps, or whose strides are not its target's, costs a copy. It captures into a CUDA graph.
    Equivalent to:
        for target, source in zip(targets, sources):
            target.lerp_(source, 1 - momentum)

    Args:
        targets, sources: two modules of one structure, whose parameters are updated (buffers are left alone), or two
            lists of as many tensors, equal in shape. fp16, bf16, fp32 or fp64, a source's dtype may differ from its
            target's; any strides; all on one device. Lists spare the walk over a module's parameters at each call.
            A target that is listed twice is updated once, from its first source. Other overlaps are not supported.
        momentum: a float in [0, 1]. 1 leaves finite targets as they are where the sources are finite, 0 copies them.

    The arithmetic is fp32 but the result is stored in the target's dtype, so that a 16-bit target stands still where a
    step is under half its spacing: at momentum 0.999 in bf16 or fp16 that is practically always. Keep fp32 targets
    there; sources may be 16-bit.

    Raises:
        ValueError, TypeError: naming the tensor or argument that does not fit, before anything is modified.

    Example:
        >>> key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        >>> ema_update_(key_encoder, encoder, momentum=0.999)
    """
    if not isinstance(momentum, numbers.Real):
        raise TypeError(f"momentum: got {type(momentum).__name__}, allowed: a float in [0, 1], such as 0.999")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: got {momentum}, allowed: a float in [0, 1], such as 0.999")
    names, targets, sources = _pairs(targets, sources)
    _check(names, targets, sources)
    if len({id(t) for t in targets}) < len(targets):
        first = {id(t): (t, s) for t, s in reversed(list(zip(targets, sources, strict=True)))}
        targets, sources = [t for t, _ in first.values()], [s for _, s in first.values()]
    if targets:
        _update(targets, sources, float(momentum))
        torch.autograd.graph.increment_version(targets)  # a graph that still holds the old values must notice


def _pairs(
    targets: nn.Module | Iterable[Tensor], sources: nn.Module | Iterable[Tensor]
) -> tuple[Sequence[str | int], list[Tensor], list[Tensor]]:
    """The tensors to update, their sources, and what to call each pair in a message."""
    if isinstance(targets, nn.Module) and isinstance(sources, nn.Module):
        to, by_name = dict(targets.named_parameters()), dict(sources.named_parameters())
        odd = next((n for n in (*to, *by_name) if (n in to) != (n in by_name)), None)
        if odd is not None:
            has, lacks = ("targets", "sources") if odd in to else ("sources", "targets")
            raise ValueError(
                f"{lacks}: got a module without the parameter {odd!r} of {has}, allowed: modules with the same "
                "parameter names; unwrap a DistributedDataParallel or compiled model first"
            )
        return list(to), list(to.values()), [by_name[n] for n in to]
    for name, value in (("targets", targets), ("sources", sources)):
        if isinstance(value, (nn.Module, Tensor)):
            raise TypeError(f"{name}: got {type(value).__name__}, allowed: two modules, or two lists of tensors")
    targets, sources = list(targets), list(sources)  # type: ignore[arg-type]
    for name, values in (("targets", targets), ("sources", sources)):
        strange = next((value for value in values if not isinstance(value, Tensor)), None)
        if strange is not None:
            raise TypeError(
                f"{name}: got {type(strange).__name__} among them, allowed: two modules, or two lists of tensors"
            )
    if len(targets) != len(sources):
        raise ValueError(f"sources: got {len(sources)} tensors, allowed: as many as targets, {len(targets)}")
    return range(len(targets)), targets, sources


def _check(names: Sequence[str | int], targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Raise for the first pair that does not fit. Sets and lists first: a step of a small model has to stay cheap."""
    shapes = [t.shape for t in targets]
    devices = {t.device for t in targets} | {s.device for s in sources}
    dtypes = {t.dtype for t in targets} | {s.dtype for s in sources}
    if shapes == [s.shape for s in sources] and len(devices) <= 1 and dtypes.issubset(_FLOATING):
        return
    for name, target, source in zip(names, targets, sources, strict=True):
        at = f"[{name}]" if isinstance(name, int) else f" parameter {name!r}"
        for side, tensor in (("targets", target), ("sources", source)):
            if tensor.dtype not in _FLOATING:
                raise TypeError(
                    f"{side}{at}: got {tensor.dtype}, allowed: float16, bfloat16, float32, float64; "
                    "copy other tensors with copy_()"
                )
            if tensor.device != targets[0].device:
                raise ValueError(
                    f"{side}{at}: got device {tensor.device}, allowed: the device of the first target, "
                    f"{targets[0].device}; move it there, or update the tensors of each device in a call of their own"
                )
        if source.shape != target.shape:
            raise ValueError(
                f"sources{at}: got shape {tuple(source.shape)}, allowed: the shape of its target, {tuple(target.shape)}"
            )
