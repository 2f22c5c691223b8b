"""`fold_conv_bn`: the batch norms of a network in eval mode become part of the layers in front of them.

torch.fx tells which layer each call of a norm follows. What it finds is used for the modules alone: the folded model is
a copy with its own forward, in which a folded layer stands in the layer's place and what is left of the norm, its
activation for one, in that of the norm. A layer in front of several norms becomes a folded layer in the place of each.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import _pytree as pytree

from ssl_fast.accelerate import ADDITIONS, FUNCTIONAL, FUNCTIONS, _Subclass, hooked, norm_act
from ssl_fast.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from ssl_fast.ops.conv_bn import FLOATING, fold_
from ssl_fast.ops.ema import _registered

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
# The largest error of outputs, against the largest output, with which a fold of example inputs is accepted.
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-2}
LIMIT_16_BIT = 0.3


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


# ---- the calls that torch.fx sees


def _leaf(module: nn.Module) -> bool:
    whole = (*LAYERS, nn.modules.conv._ConvNd, Epilogue, _Several)
    plain = module.__module__.startswith("torch.nn") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )
    return isinstance(module, whole) or plain or _known_norm(module)


class _Tracer(fx.Tracer):
    """Sees through modules down to layers and norms, except those that somebody watches, or that cannot be traced."""

    def __init__(self, watched: set[nn.Module]) -> None:
        super().__init__()
        self.watched = watched
        self.opaque: dict[str, str | None] = {}  # modules taken as a whole though they could hold norms, and why

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _leaf(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        if _leaf(m):
            return super().call_module(m, forward, args, kwargs)
        if m in self.watched:
            self.opaque[name] = None
            return self.create_proxy("call_module", name, args, kwargs)
        before, stack = len(self.graph.nodes), self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # whatever a forward raises where it meets a proxy
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.module_stack = stack
            self.opaque[name] = _first_line(error)
            return self.create_proxy("call_module", name, args, kwargs)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _traces(module: nn.Module, watched: set[nn.Module]) -> tuple[list[fx.Graph], dict[str, str | None]] | str:
    """The calls in a module's forward, with its optional arguments left out, and given; or why they are not known."""
    graphs: list[fx.Graph] = []
    opaque: dict[str, str | None] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of defaults that a graph would not check
        try:
            for bound in _bindings(module.forward):
                tracer = _Tracer(watched)
                graphs.append(tracer.trace(module, bound or None))
                opaque |= tracer.opaque
        except Exception as error:
            return ("with its optional arguments given, " if graphs else "") + _first_line(error)
    return graphs, opaque


def _bindings(forward: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Optional arguments with the values to trace a forward with: all left out; flags either way, the others given."""
    parameters = inspect.signature(forward).parameters.values()
    optional = {p.name: p.default for p in parameters if p.default is not p.empty}
    yield optional
    flags = [name for name, default in optional.items() if isinstance(default, bool)]
    if len(flags) > 4:
        raise ValueError(f"its forward has {len(flags)} flags, more than are tried both ways")
    if optional:
        for values in itertools.product((False, True), repeat=len(flags)):
            yield dict(zip(flags, values, strict=True))


@dataclass
class _Region:
    """A module whose calls are known, as long as it is called as a whole."""

    path: str
    module: nn.Module
    graphs: list[fx.Graph]

    def remains(self, model: nn.Module, watched: set[nn.Module]) -> bool:
        """Whether this part of a folded model does the same."""
        traces = _traces(model.get_submodule(self.path), watched)
        return not isinstance(traces, str) and list(map(_computes, traces[0])) == list(map(_computes, self.graphs))


def _computes(graph: fx.Graph) -> Counter[str]:
    """All that a graph computes, each value named by what it comes from. accelerate's forwards may choose another
    order, or norm, sum and activation one by one, where a norm is not theirs."""
    found: Counter[str] = Counter()
    names: dict[fx.Node, str] = {}

    def value(*parts: Any) -> str:
        name = f"%{hash(repr(parts)):x}"
        found[name] += 1
        return name

    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), names.__getitem__)
        function = node.target if node.op in ("call_function", "call_method") else None
        if node.op == "get_attr":
            names[node] = str(node.target)
        elif node.target is norm_act:
            x, norm, act, residual, _ = args
            x = value(norm, x)
            x = x if residual is None else value("+", *sorted((x, residual)))
            names[node] = value(act if isinstance(node.args[2], fx.Node) else f"{act}()", x)
        elif node.op == "call_module" and len(args) == 1 and not kwargs:
            names[node] = value(node.target, *args)
        elif function in FUNCTIONAL and len(args) == 1 and not set(kwargs) - {"inplace"}:
            names[node] = value(f"{FUNCTIONAL[function]}()", *args)
        elif function in ADDITIONS and not kwargs:
            names[node] = value("+", *sorted(map(str, args)))
        else:
            names[node] = value(node.op, node.target, args, kwargs)
    return found


class _ChangedError(Exception):
    """A region of a folded model does not do what it did."""

    def __init__(self, region: _Region) -> None:
        name = type(region.module).__name__
        super().__init__(
            f"the forward of {name} looks at what its modules are, or has them elsewhere than as submodules"
        )
        self.region = region


def _shell(model: nn.Module) -> tuple[nn.Module, set[nn.Module]]:
    """A copy of a model's containers and their buffers, in eval mode and without hooks, around its own layers, norms
    and parameters; and the containers that have hooks. A forward that does more than call leaves nothing in the model.
    """
    kept: list[Any] = [*model.parameters(), *(m for m in model.modules() if _leaf(m) and m is not model)]
    shell = copy.deepcopy(model, {id(thing): thing for thing in kept} | _computed(model))
    watched = set()
    for module in shell.modules():
        if not _leaf(module):
            if hooked(module):
                watched.add(module)
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
                          module._backward_pre_hooks):  # fmt: skip
                hooks.clear()
            module.training = False
    return shell, watched


def _computed(model: nn.Module) -> dict[int, Any]:
    """A memo for copies of a model: what an old weight_norm computed, which deepcopy refuses."""
    values = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(value): value.detach().clone() for value in values if not value.is_leaf}


def _regions(shell: nn.Module, watched: set[nn.Module]) -> tuple[list[_Region], dict[str, str]]:
    """The largest modules that can be traced; and why those around them cannot, by name."""
    regions: list[_Region] = []
    opaque: dict[str, str] = {}
    pending, seen = [("", shell)], set()
    while pending:
        path, module = pending.pop(0)
        if module in seen or _leaf(module) or not any(_known_norm(m) for m in module.modules()):
            continue
        seen.add(module)
        traces = _traces(module, watched)
        if isinstance(traces, str):
            opaque[path] = f"torch.fx cannot trace {type(module).__name__}: {traces}"
            pending += [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
            continue
        regions.append(_Region(path, module, traces[0]))
        for name, why in traces[1].items():
            inner, at = module.get_submodule(name), f"{path}.{name}".lstrip(".")
            if why is None:
                pending.append((at, inner))
            else:
                opaque[at] = f"torch.fx cannot trace {type(inner).__name__}: {why}"
                pending += [(f"{at}.{child}", m) for child, m in inner.named_children()]
    return regions, opaque


@dataclass
class _Calls:
    """Of norms: the layers that their calls follow, or why one does not fold. Of layers: the norms that follow."""

    before: dict[nn.Module, set[nn.Module]] = field(default_factory=dict)
    reasons: dict[nn.Module, str] = field(default_factory=dict)
    after: dict[nn.Module, list[nn.Module | None]] = field(default_factory=dict)
    moved: set[nn.Module] = field(default_factory=set)  # layers between which and their norm something else runs
    touched: set[nn.Module] = field(default_factory=set)  # whose parameters a forward reads by itself
    region: dict[nn.Module, _Region] = field(default_factory=dict)


def _calls(regions: Sequence[_Region]) -> _Calls:
    calls = _Calls()
    for region in regions:
        for graph in region.graphs:
            _read(region, graph, calls)
    return calls


def _read(region: _Region, graph: fx.Graph, calls: _Calls) -> None:
    def module_of(node: Any, op: str = "call_module") -> Any:
        return region.module.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == op else None

    folded: dict[fx.Node, nn.Module] = {}
    for node in graph.nodes:
        by_function = node.op == "call_function" and node.target is norm_act
        norm = module_of(node.args[1], "get_attr") if by_function else module_of(node)
        if norm is None or not _known_norm(norm):
            continue
        calls.region.setdefault(norm, region)
        source: Any = node.args[0] if node.args else None
        layer = module_of(source)
        if not isinstance(layer, LAYERS):
            calls.reasons.setdefault(norm, _other_input(region, node, source, layer))
        elif len(source.users) != 1:
            calls.reasons.setdefault(norm, f"the output of its layer is used {len(source.users)} times")
        elif source in [a for a in pytree.tree_leaves((node.args[1:], node.kwargs)) if isinstance(a, fx.Node)]:
            calls.reasons.setdefault(norm, "the output of its layer is its residual too")
        else:
            calls.before.setdefault(norm, set()).add(layer)
            folded[source] = norm
            following = source.next
            while following.op == "get_attr":  # norm_act names its modules
                following = following.next
            if following is not node or len(source.args) != 1 or source.kwargs:
                calls.moved.add(layer)
    for node in graph.nodes:
        layer = module_of(node)
        if layer is not None and isinstance(layer, LAYERS):
            calls.region.setdefault(layer, region)
            calls.after.setdefault(layer, []).append(folded.get(node))
        if node.op == "get_attr" and not all(user.target is norm_act for user in node.users):
            path = str(node.target)
            while path := path.rpartition(".")[0]:  # a parametrised weight lies three levels below its layer
                calls.touched.add(region.module.get_submodule(path))


def _other_input(region: _Region, node: fx.Node, source: Any, layer: nn.Module | None) -> str:
    followers = [region.module.get_submodule(str(u.target)) for u in node.users if u.op == "call_module"]
    if any(isinstance(m, nn.modules.conv._ConvNd) for m in followers):
        return "BN -> conv: the convolution's padding is not normalised"
    if layer is not None:
        return f"its input comes from {type(layer).__name__}, no convolution or linear layer"
    if isinstance(source, fx.Node) and source.op == "placeholder":
        return f"its input is that of {type(region.module).__name__}"
    name = getattr(source.target, "__name__", source.target) if isinstance(source, fx.Node) else source
    return f"its input comes from {name}, no convolution or linear layer"


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


# ---- the folded model


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


# ---- folding


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
