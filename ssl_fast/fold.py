"""`fold_conv_bn`: the batch norms of a network in eval mode become part of the layers in front of them.

torch.fx tells which layer each call of a norm follows. What it finds is used for the modules alone: the folded model is
a copy with its own forward, in which a folded layer stands in the layer's place and what is left of the norm, its
activation for one, in that of the norm. A layer in front of several norms becomes a folded layer in the place of each.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ssl_fast._checks import check_flags
from ssl_fast._fold_graph import _Calls, _calls, _ChangedError, _computed, _first_line, _Region, _regions, _shell
from ssl_fast._fold_rules import (
    FoldedLinear,
    _folded_layer,
    _known_norm,
    _layer_obstacle,
    _mismatch,
    _norm_obstacle,
    _rank,
    _rest,
    _Several,
    _spatial,
    _value,
    eval_mode,
)
from ssl_fast._folded import (
    FoldReport,
    _beyond_float16,
    _compare,
    _Folded,
    _of_norms,
    _Origin,
    _outputs,
    _present,
    _structure,
    verify,
)
from ssl_fast.ops.conv_bn import fold_
from ssl_fast.ops.ema import _registered

__all__ = ["FoldReport", "FoldedLinear", "eval_mode", "fold_conv_bn", "verify"]


def fold_conv_bn(
    model: nn.Module, example_inputs: Any = None, inplace: bool = False, allow_training: bool = False
) -> Any:
    """A model for evaluation whose batch norms are part of the convolutions and linear layers in front of them.

    Folded into Conv1d/2d/3d, ConvTranspose1d/2d/3d with groups, and Linear: batch norms of torch, synchronised ones,
    ours (their residual and activation stay), timm's BatchNormAct2d, torchvision's frozen ones. Weights that are
    parametrised (weight_norm, spectral_norm) are folded as they are computed. All in fp64, rounded once. Every call
    counts: a layer that is called in front of several norms is folded for each of them; one that is called without a
    norm as well is left, as is whatever is hooked, used elsewhere or not a layer of torch's. `.fold_report` says why.

    The result is a copy, in eval mode, with the model's structure, names and forward; its weights need no gradient, and
    train() raises. It has, besides the model's own methods:
        .fold_report: prints as a table; `folded` and `left` by the norms' names.
        .refresh(): brings its weights up to date with the model's; see there. Cheap enough for each evaluation.
        .unfold(): the original.
        .verify(example_inputs): the largest error, see `verify`.
    Copies of it do too. What the forward calls is known with its optional arguments left out, and given, flags either
    way; where others decide what it calls, it counts as one that torch.fx cannot trace.

    Equivalent to: the model in eval mode, up to rounding.

    Args:
        model: any nn.Module.
        example_inputs: what the model takes: a tensor, a tuple or list, or a dict of keywords. They show that a Linear
            in front of a norm sees rows (N, C); without them such norms are left, since batch norm of (N, L, C) is over
            L. With them, modules that torch.fx cannot trace are folded in parts, as far as the calls bear it
            out, and the outputs are compared.
        inplace: change the model itself; unfold() gives it its modules back.
        allow_training: take a model in training mode. Else that is an error, as its outputs would differ.

    Returns:
        The folded model, of a subclass of the model's class.

    Raises:
        TypeError, ValueError: for a model in training mode, or that cannot be traced without example inputs; for
            example inputs that do not fit.
        RuntimeError: where the outputs on the example inputs differ by more than rounding.
        After any error the model is as it was.

    Example:
        >>> folded = fold_conv_bn(model.eval(), images)
        >>> print(folded.fold_report.summary)
        fold_conv_bn: 53 norms folded, 0 left
    """
    check_flags(inplace=inplace, allow_training=allow_training)
    _check(model, allow_training)
    names = {module: name for name, module in model.named_modules()}
    norms = [module for module in names if _known_norm(module)]
    try:
        shell, watched = _shell(model)
    except Exception as error:
        raise ValueError(f"model: {type(model).__name__} cannot be copied: {_first_line(error)}") from error
    regions, opaque = _regions(shell, watched)
    outputs = None
    ranks: dict[nn.Module, set[int]] = {}
    reasons: dict[nn.Module, str] = {}
    calls = _calls(regions)
    if example_inputs is not None:
        try:
            outputs, ranks, outside = _observed(_shell(model)[0], regions, calls, example_inputs)
        except Exception as error:
            raise ValueError(
                f"example_inputs: the model does not run on them: {_first_line(error)}; pass a tensor, a tuple of what "
                "model(*example_inputs) takes, or a dict of keywords"
            ) from error
        reasons |= outside
    elif "" in opaque:
        raise ValueError(f"model: {opaque['']}; pass example_inputs, so that its parts can be folded and compared")
    for path, why in opaque.items():
        for module in shell.get_submodule(path).modules():
            region = calls.region.get(module)
            if example_inputs is not None and region is not None and region.path.startswith(path):
                continue  # a part of what cannot be traced, and observed
            if module in calls.after:
                calls.after[module].append(None)
            if _known_norm(module):
                reasons[module] = why if example_inputs is not None else f"{why}; pass example_inputs"
    for norm, layers in calls.before.items():
        if _spatial(norm) is None and norm not in reasons:
            for layer in layers:
                if isinstance(layer, nn.Linear) and not ranks.get(norm):
                    reasons[norm] = "its input may have more than 2 dimensions; pass example_inputs"
                elif ranks.get(norm, {_rank(layer)}) != {_rank(layer)}:
                    reasons[norm] = f"its input has {sorted(ranks[norm])} dimensions, not {_rank(layer)}"
    reasons = calls.reasons | reasons
    while True:
        plan = _fold(calls, reasons, names)
        try:
            return _assembled(model, plan, inplace, names, norms, reasons, regions, example_inputs, outputs)
        except _ChangedError as error:
            planned = [norm for *_, norm in plan.pairs]
            inside = [norm for norm in planned if calls.region[norm] is error.region]
            reasons |= dict.fromkeys(inside or planned, str(error))


def _check(model: nn.Module, allow_training: bool) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: got {type(model).__name__}, allowed: a torch.nn.Module that is not scripted")
    if isinstance(model, _Folded):
        raise TypeError("model: got a folded model, allowed: one that is not; call its refresh() or unfold()")
    for attribute in ("_orig_mod", "module"):
        inner = model._modules.get(attribute)
        if inner is not None and type(model).__module__.startswith(("torch._dynamo", "torch.nn.parallel")):
            raise TypeError(f"model: got {type(model).__name__}, allowed: the module inside; pass model.{attribute}")
    devices = {t.device for t in _registered(model) if t is not None}
    if len(devices) > 1:
        raise ValueError(
            f"model: got parameters on {', '.join(sorted(map(str, devices)))}, allowed: one device; fold the parts of "
            "each device by themselves"
        )
    training = [name for name, m in model.named_modules() if m.training and (m is model or _known_norm(m))]
    if training and not allow_training:
        raise ValueError(
            f"model: got {training[0] or type(model).__name__} in training mode, allowed: eval mode, in which batch "
            "norm is a linear map; call model.eval(), or pass allow_training=True to fold what eval mode would do"
        )


def _observed(
    shell: nn.Module, regions: Sequence[_Region], calls: _Calls, example_inputs: Any
) -> tuple[list[Tensor], dict[nn.Module, set[int]], dict[nn.Module, str]]:
    """The outputs on example inputs; the dimensions of each norm's inputs; and which norms, or whose layers, are called
    from outside of the part of the model that was traced."""
    ranks: dict[nn.Module, set[int]] = {}
    outside: set[nn.Module] = set()
    at = {shell.get_submodule(region.path): region.path for region in regions}
    active = dict.fromkeys(at.values(), 0)
    handles = []

    def entering(module: nn.Module, args: Any) -> None:
        if module in at:
            active[at[module]] += 1
        if module in calls.region and not active[calls.region[module].path]:
            outside.add(module)
        if _known_norm(module) and args and isinstance(args[0], Tensor):
            ranks.setdefault(module, set()).add(args[0].dim())

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        active[at[module]] -= 1

    try:
        for module in {*at, *calls.region}:
            handles.append(module.register_forward_pre_hook(entering))
            if module in at:
                handles.append(module.register_forward_hook(leaving))
        outputs = _outputs(shell, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    for layer in outside & set(calls.after):
        calls.after[layer].append(None)
    where = "it is called from outside of the part of the model that torch.fx can trace"
    return outputs, ranks, {module: where for module in outside if _known_norm(module)}


# ---- the plan


@dataclass
class _Plan:
    """What to put in the places of layers and norms, and the pairs to fold: the folded layer, the layer, the norm."""

    pairs: list[tuple[Any, nn.Module, nn.Module]] = field(default_factory=list)
    replace: dict[nn.Module, nn.Module] = field(default_factory=dict)


def _planned(calls: _Calls, reasons: dict[nn.Module, str], names: dict[nn.Module, str]) -> _Plan:
    """Every norm either becomes part of a plan or is given a reason."""
    for norm, layers in calls.before.items():
        for layer in layers:
            if norm in reasons:
                break
            why = _norm_obstacle(norm) or _layer_obstacle(layer) or _mismatch(layer, norm)
            if why is None and {norm, layer} & calls.touched:
                why = "the forward reads its parameters, or the layer's, by itself"
            if why is not None:
                reasons[norm] = why

    def followers(layer: nn.Module) -> set[nn.Module | None]:
        return {None if norm in reasons else norm for norm in calls.after[layer]}

    plan = _Plan()
    for norm, layers in calls.before.items():
        if norm in reasons:
            continue
        if all(followers(layer) == {norm} for layer in layers):
            plan.replace[norm] = _rest(norm)
            for layer in layers:
                plan.replace[layer] = _folded_layer(layer, norm)
                plan.pairs.append((plan.replace[layer], layer, norm))
            continue
        layer, *others = layers
        norms = followers(layer)
        alone = not others and None not in norms and all(calls.before[n] == {layer} for n in norms if n is not None)
        rest = _rest(norm)
        stateful = any(list(_rest(n).parameters()) for n in norms if n is not None)
        if not alone or layer in calls.moved or stateful:
            shared = next(c for c in layers if followers(c) != {norm})
            reasons[norm] = f"{names[shared]} is called elsewhere too, not always in front of this norm"
            continue
        folded = _folded_layer(layer, norm)
        plan.replace[layer] = nn.Identity()
        plan.replace[norm] = folded if type(rest) is nn.Identity else _Several(OrderedDict(layer=folded, rest=rest))
        plan.pairs.append((folded, layer, norm))
    return plan


# ---- folding


@torch.no_grad()
def _fold(calls: _Calls, reasons: dict[nn.Module, str], names: dict[nn.Module, str]) -> _Plan:
    """Plan, and write the folded weights; a pair that leaves the range of float16 is left."""
    while True:
        plan = _planned(calls, reasons, names)
        folded, layers, norms = (list(t) for t in zip(*plan.pairs, strict=True)) if plan.pairs else ([], [], [])
        targets = [*(layer.weight for layer in folded), *(layer.bias for layer in folded)]
        vectors, groups = _of_norms(layers, norms)
        values = [_value(layer, name) for name in ("weight", "bias") for layer in layers]
        fold_(targets, _present(values), vectors, [float(norm.eps) for norm in norms], groups)
        too_large = _beyond_float16(targets)
        if not too_large:
            return plan
        reasons |= {norms[i % len(norms)]: "folded it leaves the range of torch.float16" for i in too_large}


def _assembled(
    model: nn.Module, plan: _Plan, inplace: bool, names: dict[nn.Module, str], norms: Sequence[nn.Module],
    reasons: dict[nn.Module, str], regions: Sequence[_Region], example_inputs: Any, outputs: list[Tensor] | None,
) -> Any:  # fmt: skip
    """The folded model, once it is known to make the calls that were planned for."""
    into: dict[nn.Module, str] = {}
    for _, layer, norm in plan.pairs:
        into[norm] = f"{into[norm]}, {names[layer]}" if norm in into else names[layer]
    report = FoldReport(
        {names[norm]: into[norm] for norm in norms if norm in into},
        {names[n]: reasons.get(n, "it is not called in eval mode") for n in norms if n not in into},
    )
    replaced = []
    modes = {module: module.training for module in model.modules()}
    if inplace:
        folded = model
        for path, parent in model.named_modules(remove_duplicate=False):
            replaced += [(path, name, m) for name, m in parent._modules.items() if m in plan.replace]
        for path, name, module in replaced:
            model.get_submodule(path)._modules[name] = plan.replace[module]
    else:
        folded = copy.deepcopy(model, {id(module): new for module, new in plan.replace.items()} | _computed(model))
        for parameter in folded.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
    try:
        for module in folded.modules():
            module.training = False
        shell, watched = _shell(folded)
        changed = (region for region in regions if not region.remains(shell, watched))
        if plan.pairs and (region := next(changed, None)) is not None:
            raise _ChangedError(region)
        if outputs is not None:
            _compare(outputs, _outputs(_shell(folded)[0], example_inputs))
        new_names = {module: name for name, module in folded.named_modules()}
        pairs = [(new_names[layer], source, norm) for layer, source, norm in plan.pairs]
        in_place = {"replaced": replaced, "modes": modes} if inplace else {"structure": _structure(model)}
        origin = _Origin(None if inplace else model, pairs, cls=type(folded), **in_place)
        origin.seen = origin.state(origin.tensors(folded))
    except BaseException:
        for path, name, module in replaced:
            model.get_submodule(path)._modules[name] = module
        for module, training in modes.items():
            module.training = training
        raise
    cls: Any = type(folded)
    parts = getattr(cls, "_parts", (cls,))
    folded.fold_report = report  # type: ignore[assignment]
    folded._origin = origin  # type: ignore[assignment]
    folded.__class__ = type(f"Folded{parts[0].__name__}", (_Folded, cls), {"_parts": (*parts, _Folded)})
    return folded
