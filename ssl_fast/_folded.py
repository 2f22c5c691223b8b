"""A folded model: its report, where it comes from, its methods, and how far its outputs are from the model's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import _pytree as pytree

from ssl_fast._fold_rules import TRANSPOSED, _value, eval_mode
from ssl_fast.accelerate import _Subclass
from ssl_fast.ops.conv_bn import fold_
from ssl_fast.ops.ema import _registered

# The largest error of outputs, against the largest output, with which a fold of example inputs is accepted.
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-2}
LIMIT_16_BIT = 0.3


@dataclass(repr=False)
class FoldReport:
    """What `fold_conv_bn` did, by the norms' names.

    Attributes:
        folded: into which layer.
        left: why not.
    """

    folded: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        return f"fold_conv_bn: {len(self.folded)} norms folded, {len(self.left)} left"

    def __str__(self) -> str:
        rows = [(name, "folded", f"into {layer}") for name, layer in self.folded.items()]
        rows += [(name, "left", why) for name, why in self.left.items()]
        width = max((len(name) for name, *_ in rows), default=0)
        return "\n".join([self.summary, *(f"  {name:{width}}  {state:6}  {what}" for name, state, what in rows)])

    __repr__ = __str__


@dataclass(eq=False)
class _Origin:
    """Where a folded model comes from. Copies of the model come from there too; one that is pickled has forgotten."""

    source: nn.Module | None = None  # None for a model that was folded in place
    pairs: list[tuple[str, nn.Module, nn.Module]] = field(default_factory=list)  # the folded layer's name, layer, norm
    structure: list[tuple[str, nn.Module | None]] = field(default_factory=list)  # the source's modules
    replaced: list[tuple[str, str, nn.Module]] = field(default_factory=list)  # in place: the parent's name, the child's
    modes: dict[nn.Module, bool] = field(default_factory=dict)  # in place: which of the modules were in training mode
    cls: type | None = None
    table: Any = None
    tensors_of_table: list[int] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)  # the state after the last fold

    def __deepcopy__(self, memo: Any) -> _Origin:
        if self.source is not None:
            return _Origin(self.source, self.pairs, self.structure, cls=self.cls)
        pairs, replaced, modes = copy.deepcopy((self.pairs, self.replaced, self.modes), memo)
        return _Origin(None, pairs, [], replaced, modes, self.cls)

    def __reduce__(self) -> Any:
        return _Origin, ()

    def modules(self) -> list[nn.Module]:
        if self.source is not None:
            return [self.source]
        return list(dict.fromkeys(module for _, *pair in self.pairs for module in pair))

    def tensors(self, folded: nn.Module) -> list[Tensor]:
        """All of a folded model and of what it comes from."""
        return [t for module in (folded, *self.modules()) for t in _registered(module) if t is not None]

    def state(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Changes with any tensor and any eps. A tensor of inference mode counts no versions, and is never known to be
        as before; a fused optimizer leaves versions as they are, but its steps count."""
        return [
            _optimizer_steps()[0],
            *(norm.eps for *_, norm in self.pairs),
            *((id(t), _address(t), object() if t.is_inference() else t._version) for t in tensors),
        ]


class _Folded(_Subclass):
    """The methods of a folded model."""

    fold_report: FoldReport
    _origin: _Origin

    def refresh(self: Any, *, force: bool = False) -> bool:
        """Bring the folded weights, and all others, up to date with the source model; True where there was need to.

        One parallel loop on a CPU, one launch on CUDA (Triton), at about the cost of a copy of the weights; nothing
        where no tensor of the source has another version or address, and no optimizer took a step. What is written
        through `.data` has no version: force=True. The result is that of a fresh fold, to the bit, in this model's
        dtypes.

        Raises:
            RuntimeError: for a model that was loaded from a file, or whose source has other modules than it had; where
                a folded weight leaves the range of float16. Then no weight is changed.
        """
        origin = self._known_origin("refresh")
        if origin.source is not None and _structure(origin.source) != origin.structure:
            raise RuntimeError("refresh: the source has other modules than when it was folded; fold it again")
        tensors = origin.tensors(self)
        if not force and origin.state(tensors) == origin.seen:
            return False
        ids = list(map(id, tensors))
        if origin.table is None or ids != origin.tensors_of_table:
            origin.table, origin.tensors_of_table = self._table(origin), ids
        targets, layers, copies, norms, groups, others = origin.table
        with torch.no_grad():
            values = [_value(layer, name) for name in ("weight", "bias") for layer in layers]
            sources = [*_present(values), *copies]
            misplaced = [t for t in (*sources, *norms) if t.device != targets[0].device]
            if misplaced:
                raise RuntimeError(
                    f"refresh: got a source on {misplaced[0].device}, allowed: the device of the folded model, "
                    f"{targets[0].device}; move one to the other"
                )
            eps = [float(norm.eps) for *_, norm in origin.pairs]
            ours = targets[: 2 * len(eps)]
            written = list(map(torch.empty_like, targets)) if any(t.dtype == torch.float16 for t in ours) else targets
            fold_(written, sources, norms, eps, groups)
            if too_large := _beyond_float16(written[: 2 * len(eps)]):
                name = origin.pairs[too_large[0] % len(eps)][0]
                raise RuntimeError(f"refresh: the norm folded into {name!r} leaves the range of float16; fold it again")
        with torch.inference_mode():  # in which alone a model that was folded there can be written to
            if written is not targets:
                torch._foreach_copy_(targets, written)
            for target, source in others:
                target.copy_(source)
        origin.seen = origin.state(tensors)
        return True

    def unfold(self: Any) -> nn.Module:
        """The original: the model that was folded, which never changed, or this one with its own modules back.

        Raises:
            RuntimeError: for a model that was loaded from a file.
        """
        origin = self._known_origin("unfold")
        if origin.source is not None:
            return origin.source
        for parent, name, module in origin.replaced:
            self.get_submodule(parent)._modules[name] = module
        for module, training in origin.modes.items():
            module.training = training
        self.__class__ = origin.cls
        del self.__dict__["_origin"], self.__dict__["fold_report"]
        return self

    def verify(self: Any, example_inputs: Any) -> float:
        """`verify(source, self, example_inputs)`."""
        origin = self._known_origin("verify")
        if origin.source is None:
            raise RuntimeError("verify: got a model folded in place, allowed: one with a source; compare with a copy")
        return verify(origin.source, self, example_inputs)

    def train(self: Any, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(
                "train: got True for a folded model, which has no norms to train; train its source and refresh(), or "
                "train what unfold() returns"
            )
        return super().train(False)  # type: ignore[misc]

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        if self._origin.source is None:
            for module in self._origin.modules():
                module._apply(fn)
        return self

    def _known_origin(self, method: str) -> _Origin:
        if self._origin.cls is None:
            raise RuntimeError(f"{method}: got a model from a file, which has no source; fold the source model again")
        return self._origin

    def _table(self: Any, origin: _Origin) -> tuple[Any, ...]:
        """What the operator takes, apart from the values of layers; and the sparse tensors, which it does not."""
        folded = [self.get_submodule(name) for name, *_ in origin.pairs]
        targets = [*(layer.weight for layer in folded), *(layer.bias for layer in folded)]
        layers, found = [layer for _, layer, _ in origin.pairs], [norm for *_, norm in origin.pairs]
        own, copies, others = set(map(id, targets)), [], []
        if origin.source is not None:
            theirs: dict[str, Tensor] = dict(origin.source.named_parameters(remove_duplicate=False))
            theirs |= dict(origin.source.named_buffers(remove_duplicate=False))
            for name, tensor in (*self.named_parameters(), *self.named_buffers()):
                if id(tensor) in own:
                    continue
                if name not in theirs or theirs[name].shape != tensor.shape:
                    raise RuntimeError(
                        f"refresh: the source has no {name!r} of shape {tuple(tensor.shape)} any more; fold it again"
                    )
                if tensor.layout is not torch.strided:
                    others.append((tensor, theirs[name]))
                    continue
                targets.append(tensor)
                copies.append(theirs[name])
        return targets, layers, copies, *_of_norms(layers, found), others


@functools.cache
def _optimizer_steps() -> list[int]:
    """How many steps all optimizers have taken since the first fold."""
    steps = [0]

    def count(*_: Any) -> None:
        steps[0] += 1

    register_optimizer_step_post_hook(count)
    return steps


def _structure(model: nn.Module) -> list[tuple[str, nn.Module | None]]:
    """Every module at each place, with its name there; a third of the time that named_modules takes."""
    found: list[tuple[str, nn.Module | None]] = [("", model)]
    for _, module in found:
        if module is not None:
            found += module._modules.items()
    return found


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout is torch.strided else 0


def _beyond_float16(tensors: Sequence[Tensor]) -> list[int]:
    """Which tensors of float16 hold what is out of its range."""
    half = [i for i, t in enumerate(tensors) if t.dtype == torch.float16 and t.numel()]
    if not half:
        return []
    largest = torch.stack(torch._foreach_norm([tensors[i] for i in half], float("inf")))
    return [i for i, finite in zip(half, largest.isfinite().tolist(), strict=True) if not finite]


def _present(values: Sequence[Tensor | None]) -> list[Tensor]:
    """As the operator takes them: what is absent has no elements."""
    absent = next((t.new_empty(0) for t in values if t is not None), None)
    return [t if t is not None else absent for t in values]  # type: ignore[misc]


def _of_norms(layers: Sequence[Any], norms: Sequence[Any]) -> tuple[list[Tensor], list[int]]:
    vectors = [t for norm in norms for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    return _present(vectors), [layer.groups if isinstance(layer, TRANSPOSED) else 0 for layer in layers]


# ---- outputs, compared


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    args, kwargs = _arguments(example_inputs)
    with eval_mode(model), torch.no_grad():
        return [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)), {}


def verify(model: nn.Module, folded: nn.Module, example_inputs: Any) -> float:
    """The largest error of a folded model: the largest difference between its outputs and the model's, in eval mode.

    Args:
        model, folded: the two modules; neither is changed.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of those by name.

    Raises:
        TypeError: where no tensor is found in the model's outputs.
        ValueError: where the outputs differ in number or shape.

    Example:
        >>> verify(model, fold_conv_bn(model), images)
    """
    return _largest(_outputs(model, example_inputs), _outputs(folded, example_inputs))


def _largest(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    errors = [float((a.double() - b.double()).abs().max()) for a, b in _paired(before, after) if a.numel()]
    return float("nan") if any(e != e for e in errors) else max(errors, default=0.0)


def _paired(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    if not before:
        raise TypeError(
            "model: its outputs hold no tensor that can be compared, allowed: tensors, in tuples, lists, dicts or "
            "classes known to torch.utils._pytree; return one of these"
        )
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (before, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"folded: got outputs of shapes {shapes[1]}, allowed: those of the model, {shapes[0]}")
    return list(zip(before, after, strict=True))


def _compare(before: list[Tensor], after: list[Tensor]) -> None:
    for a, b in _paired(before, after):
        if not a.is_floating_point() or not a.numel() or not bool(a.isfinite().all()):
            continue
        error, size = _largest([a], [b]), float(a.abs().max())
        if not error <= LIMITS.get(a.dtype, LIMIT_16_BIT) * size + torch.finfo(a.dtype).tiny:
            raise RuntimeError(
                f"model: folded, its outputs on example_inputs differ by {error:.3g} and reach {size:.3g}; it "
                "draws random numbers in eval mode, or its calls depend on values; fold its parts by themselves"
            )
