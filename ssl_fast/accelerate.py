"""`accelerate`: ssl_fast's norms in the place of torch's inside a built model, each one operator with the addition and
the activation that follow it.

A norm becomes ours by its class alone. Fusing is a matter of the place where it is called: a known block, or an
nn.Sequential, gets a subclass whose forward calls `norm_act`, and any other model a forward rebuilt by torch.fx that
does. No module changes what it computes itself, so that one which is shared, indexed, hooked or replaced later behaves
as before.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from ssl_fast._checks import check_flags
from ssl_fast.ops._norms import NEGATIVE_SLOPE
from ssl_fast.ops.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, FusedNorm, _Fused
from ssl_fast.ops.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from ssl_fast.ops.layer_norm import LayerNorm, LayerNorm2d
from ssl_fast.sync_batch_norm import SyncBatchNorm

# What is swapped, by exact type: a subclass may do more than its base.
SWAPS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.InstanceNorm1d: InstanceNorm1d,
    nn.InstanceNorm2d: InstanceNorm2d,
    nn.InstanceNorm3d: InstanceNorm3d,
}
OURS = tuple(SWAPS.values())  # with which others are fused
SWAPPED_ALONE: dict[type, type] = {nn.LayerNorm: LayerNorm}
NORMS = nn.modules.batchnorm._NormBase

# ---- one place where a norm is called

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
}


def activation_of(act: Any) -> str | None:
    """The name by which our norms know an activation, a module or that name itself; None where they do not."""
    if isinstance(act, str):
        return act
    kind = type(act)
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.LeakyReLU and act.negative_slope == NEGATIVE_SLOPE:
        return "leaky_relu"
    return "gelu" if kind is nn.GELU and act.approximate == "none" else None


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches a module's calls, or has replaced them."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def obstacle(norm: nn.Module, act: Any) -> str | None:
    """Why a norm and what follows it are not one operator; None where they are."""
    if type(norm) not in OURS:
        return f"{type(norm).__name__} is not one of ssl_fast.nn"
    if norm.activation is not None:
        return f"it has an activation of its own, {norm.activation}"
    if activation_of(act) is None:
        return f"followed by {_title(act)}"
    if hooked(norm):
        return "it has hooks"
    if not isinstance(act, str) and hooked(act):
        return f"the {type(act).__name__} has hooks"
    return None


def _title(module: nn.Module) -> str:
    name, extra = module.__dict__.get("_before", type(module)).__name__, module.extra_repr()
    return f"{name}({extra})" if extra else name


def norm_act(x: Tensor, norm: nn.Module, act: Any, residual: Tensor | None = None, inplace: bool = True) -> Tensor:
    """act(norm(x) + residual), in one operator wherever nobody could tell, else as it is written (`inplace`: +=)."""
    if isinstance(x, fx.Proxy):
        return _recorded(x, norm, act, residual, inplace)
    alike = residual is None or (
        isinstance(residual, Tensor) and residual.shape == x.shape and residual.dtype == x.dtype
    )
    if alike and not _has_any_global_hook() and obstacle(norm, act) is None:
        return norm(x, residual, activation=activation_of(act))
    x = norm(x)
    if residual is not None:
        x = x.add_(residual) if inplace else x + residual
    return FUNCTIONS[act](x) if isinstance(act, str) else act(x)


def _recorded(x: Any, norm: nn.Module, act: Any, residual: Any, inplace: bool) -> Any:
    """The call as torch.fx is to see it: what is fused is decided when it runs."""

    def reference(module: Any) -> Any:
        if isinstance(module, str):
            return module
        return x.tracer.create_proxy("get_attr", x.tracer.path_of_module(module), (), {})

    arguments = (x, reference(norm), reference(act), residual, inplace)
    return x.tracer.create_proxy("call_function", norm_act, arguments, {})


# ---- known blocks: what a subclass of each computes in their place


@dataclass
class Site:
    """A norm in a known block, what follows it, and whether a residual is added between."""

    norm: nn.Module
    act: Any
    residual: bool = False
    hindered: str | None = None

    def reason(self) -> str | None:
        return self.hindered or obstacle(self.norm, self.act)

    def what(self) -> str:
        name = activation_of(self.act)
        return f"add, {name}" if self.residual else f"{name}"


class _Subclass:
    """A subclass made when it is needed, of a class that need not be installed: pickled as the parts it is made of."""

    _parts: tuple[type, ...]

    def sites(self) -> Iterator[Site]:
        return iter(())

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = super().__reduce_ex__(protocol)[2:]
        return (_new, self._parts, *state)


@functools.cache
def _subclass(before: Any, *mixins: Any) -> type:
    return type(f"Fused{before.__name__}", (*mixins, before), {"_parts": (before, *mixins)})


def _new(before: type, *mixins: type) -> Any:
    cls: Any = _subclass(before, *mixins)
    return cls.__new__(cls)


class _Sequential(_Subclass):
    _modules: dict[str, nn.Module]

    def sites(self) -> Iterator[Site]:
        modules = list(self._modules.values())
        for module, following in zip(modules, modules[1:], strict=False):
            if isinstance(module, NORMS):
                yield Site(module, following)

    def forward(self, input: Any) -> Any:
        modules = list(self._modules.values())
        i = 0
        while i < len(modules):
            if type(modules[i]) in OURS and i + 1 < len(modules) and activation_of(modules[i + 1]) is not None:
                input = norm_act(input, modules[i], modules[i + 1])
                i += 2
            else:
                input = modules[i](input)
                i += 1
        return input


class _Block(_Subclass):
    """A residual block: nothing in it is looked for by torch.fx."""


class _BasicBlock(_Block):
    def sites(self: Any) -> Iterator[Site]:
        yield Site(self.bn1, self.relu)
        yield Site(self.bn2, self.relu, residual=True)

    def forward(self: Any, x: Tensor) -> Tensor:
        out = norm_act(self.conv1(x), self.bn1, self.relu)
        out = self.conv2(out)
        return norm_act(out, self.bn2, self.relu, x if self.downsample is None else self.downsample(x))


class _Bottleneck(_Block):
    def sites(self: Any) -> Iterator[Site]:
        yield Site(self.bn1, self.relu)
        yield Site(self.bn2, self.relu)
        yield Site(self.bn3, self.relu, residual=True)

    def forward(self: Any, x: Tensor) -> Tensor:
        out = norm_act(self.conv1(x), self.bn1, self.relu)
        out = norm_act(self.conv2(out), self.bn2, self.relu)
        out = self.conv3(out)
        return norm_act(out, self.bn3, self.relu, x if self.downsample is None else self.downsample(x))


class _ResNet(_Subclass):
    def sites(self: Any) -> Iterator[Site]:
        yield Site(self.bn1, self.relu)

    def _forward_impl(self: Any, x: Tensor) -> Tensor:
        x = self.maxpool(norm_act(self.conv1(x), self.bn1, self.relu))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class _TimmBlock(_Block):
    def _drop_block(self: Any, x: Tensor, norm: nn.Module, act: nn.Module) -> Tensor:
        if self._dropped() is None:
            return norm_act(x, norm, act)
        return act(self.drop_block(norm(x)))

    def _dropped(self: Any) -> str | None:
        plain = type(self.drop_block) is nn.Identity and not hooked(self.drop_block)
        return None if plain else f"followed by {_title(self.drop_block)}"

    def _tail(self: Any, out: Tensor, norm: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
        if self._between() is not None:
            out = norm(out)
            out = out if self.se is None else self.se(out)
            out = out if self.drop_path is None else self.drop_path(out)
            out += x if self.downsample is None else self.downsample(x)
            return act(out)
        return norm_act(out, norm, act, x if self.downsample is None else self.downsample(x))

    def _between(self: Any) -> str | None:
        module = self.se if self.se is not None else self.drop_path
        return None if module is None else f"followed by {type(module).__name__}"


class _TimmBasicBlock(_TimmBlock):
    def sites(self: Any) -> Iterator[Site]:
        yield Site(self.bn1, self.act1, hindered=self._dropped())
        yield Site(self.bn2, self.act2, residual=True, hindered=self._between())

    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.aa(self._drop_block(self.conv1(x), self.bn1, self.act1))
        return self._tail(self.conv2(out), self.bn2, self.act2, x)


class _TimmBottleneck(_TimmBlock):
    def sites(self: Any) -> Iterator[Site]:
        yield Site(self.bn1, self.act1)
        yield Site(self.bn2, self.act2, hindered=self._dropped())
        yield Site(self.bn3, self.act3, residual=True, hindered=self._between())

    def forward(self: Any, x: Tensor) -> Tensor:
        out = norm_act(self.conv1(x), self.bn1, self.act1)
        out = self.aa(self._drop_block(self.conv2(out), self.bn2, self.act2))
        return self._tail(self.conv3(out), self.bn3, self.act3, x)


class _TimmResNet(_Subclass):
    def sites(self: Any) -> Iterator[Site]:
        yield Site(self.bn1, self.act1)

    def forward_features(self: Any, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return super().forward_features(x)  # type: ignore[misc]
        x = self.maxpool(norm_act(self.conv1(x), self.bn1, self.act1))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class _TimmBatchNormAct(_Subclass, _Fused):
    """timm's norm that holds its activation."""

    def hindrance(self: Any) -> str | None:
        if type(self.drop) is not nn.Identity or hooked(self.drop):
            return f"followed by {_title(self.drop)}"
        if type(self.act) is not nn.Identity and activation_of(self.act) is None:
            return f"followed by {_title(self.act)}"
        return f"the {type(self.act).__name__} has hooks" if hooked(self.act) else None

    def forward(self: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.hindrance() is None and not _has_any_global_hook():
            return super().forward(x, activation=activation_of(self.act))
        return super(_Fused, self).forward(x)  # timm's


class _LayerNorm(_Subclass, LayerNorm):
    """timm's, of tokens."""


class _LayerNorm2d(_Subclass, LayerNorm2d):
    """timm's or torchvision's, of the channels of images."""


# By name, so that nothing is imported that the model did not; each for the methods that stand there now.
KNOWN: dict[str, type] = {
    "torch.nn.modules.container.Sequential": _Sequential,
    "torchvision.models.resnet.BasicBlock": _BasicBlock,
    "torchvision.models.resnet.Bottleneck": _Bottleneck,
    "torchvision.models.resnet.ResNet": _ResNet,
    "timm.models.resnet.BasicBlock": _TimmBasicBlock,
    "timm.models.resnet.Bottleneck": _TimmBottleneck,
    "timm.models.resnet.ResNet": _TimmResNet,
    "timm.layers.norm_act.BatchNormAct2d": _TimmBatchNormAct,
    "timm.layers.norm.LayerNorm": _LayerNorm,
    "timm.layers.norm.LayerNorm2d": _LayerNorm2d,
    "torchvision.models.convnext.LayerNorm2d": _LayerNorm2d,
}


def _mixin(cls: type) -> type | None:
    """What to add to a class that is known, or inherits everything concerned from one that is."""
    for known in cls.__mro__:
        mixin = KNOWN.get(f"{known.__module__}.{known.__qualname__}")
        if mixin is not None:
            methods = {"forward", *(n for n in vars(mixin) if callable(getattr(known, n, None)))}
            return mixin if all(getattr(cls, n) is getattr(known, n) for n in methods) else None
    return None


def _twin(module: nn.Module, cls: Any) -> Any:
    """What module would be in another class."""
    twin = cls.__new__(cls)
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin


def _candidate(module: Any) -> Any:
    """The class that a module of a known one would have."""
    if isinstance(module, _Subclass) or "forward" in module.__dict__ or getattr(module, "_fast_norm", False):
        return None
    kind: Any = type(module)
    mixin = _mixin(kind)
    return None if mixin is None else _subclass(kind, mixin)


def _sites(module: nn.Module) -> list[Site]:
    if isinstance(module, _Subclass):
        return list(module.sites())
    candidate = _candidate(module)
    return [] if candidate is None else list(_twin(module, candidate).sites())


# ---- the rest of a model: what torch.fx sees

FUNCTIONAL: dict[Any, str] = {
    **{call: "relu" for call in (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")},
    **{call: name for name, call in FUNCTIONS.items()},
}
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
IN_PLACE = (operator.iadd, "add_")
FRESH = (nn.modules.conv._ConvNd, nn.Linear)  # what they return is nobody else's


class _Proxy(fx.Proxy):
    """fx takes x += y for x = x + y, which another name for x would not notice."""


def _augmented(assign: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", assign, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _augmented(getattr(operator, _name)))


def _modes() -> Any:
    """What a block in a forward can set for the calls within, and a graph does not hold."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # as checkpoint sets
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, hooks


class _Tracer(fx.Tracer):
    """Sees the calls of some modules, and takes every other one as a whole; raises for what a graph cannot say."""

    def __init__(self, inside: set[nn.Module]) -> None:
        super().__init__()
        self.inside = inside
        self.modes = _modes()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inside

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise NotImplementedError("it sets no_grad, autocast or checkpointing for a part of its calls")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            root: Any = self.root
            if not any(a is own for tensors in (root.parameters(), root.buffers()) for own in tensors):
                raise NotImplementedError("it makes a tensor, which would be the same one at every call")
        return super().create_arg(a)


def _around(model: nn.Module, norms: set[nn.Module]) -> dict[nn.Module, str]:
    """The modules whose forwards decide what follows the norms."""
    names = {path: module for path, module in model.named_modules(remove_duplicate=False)}
    around = {}
    for path, module in names.items():
        while module in norms and path:
            path = path.rpartition(".")[0]
            around[names[path]] = path
    return around


def _state(modules: set[nn.Module]) -> list[Any]:
    """What a forward could change: attributes, what containers among them hold, tensors in place, random numbers."""

    def of(value: Any, inside: bool = False) -> Any:
        if isinstance(value, Tensor):
            return id(value), value._version
        if isinstance(value, (dict, list, set)) and not inside:
            return [of(item, True) for item in (value.values() if isinstance(value, dict) else value)]
        return id(value)

    attributes = [{name: of(value) for name, value in vars(m).items() if name != "training"} for m in modules]
    return [
        attributes,
        random.getstate(),
        torch.get_rng_state().tolist(),
        str(np.random.get_state()),
    ]  # str: shows the position


def _graph(model: nn.Module, norms: set[nn.Module]) -> fx.Graph | str:
    """The calls in the forward of a model; or why they cannot be known.

    Traced is a copy of the modules around the norms, so that a forward which does more than call leaves nothing behind.
    """
    around = _around(model, norms)
    watched = [name for module, name in around.items() if hooked(module)]
    if watched:
        return f"torch.fx does not see the hooks of {watched[0] or 'the model'}"
    optional = [p.name for p in inspect.signature(model.forward).parameters.values() if p.default is not p.empty]
    if optional:  # which a graph takes for given: `is None` would be false for ever
        return f"torch.fx does not see whether the forward's {optional[0]} is given"
    kept: list[Any] = [*model.parameters(), *(module for module in model.modules() if module not in around)]
    graphs = []
    try:
        shell = copy.deepcopy(model, {id(thing): thing for thing in kept})
        inside = {shell.get_submodule(name) for name in around.values()}
        before = _state(inside)
        for mode in (True, False, True):
            for module in inside:
                module.training = mode
            with torch.set_grad_enabled(mode):
                graphs.append(_Tracer(inside).trace(shell))
        if _state(inside) != before:
            return f"torch.fx does not see that {type(model).__name__} sets attributes or draws random numbers"
    except Exception as error:  # whatever a forward raises where it meets a proxy
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"torch.fx cannot trace {type(model).__name__}: {first}"
    if len({str(graph) for graph in graphs}) > 1:
        return f"the calls of {type(model).__name__} depend on more than its input"
    return graphs[0]


@dataclass
class _Match:
    """A norm's node with those that go with it."""

    norm: fx.Node
    act: fx.Node
    by: Any  # the activation: a module, or a name
    sum: fx.Node | None = None
    residual: fx.Node | None = None


def _follow(model: nn.Module, norm: fx.Node) -> _Match | str:
    """What can be fused with a call of a norm, by the structure of the graph alone; or why nothing can."""
    users, residual, addition = list(norm.users), None, None
    if len(users) != 1:
        return f"its output is used {len(users)} times"
    if users[0].target in ADDITIONS and len(users[0].args) == 2 and not users[0].kwargs:
        addition = users[0]
        other = addition.args[1] if addition.args[0] is norm else addition.args[0]
        if not isinstance(other, fx.Node) or other is norm:
            return f"followed by the addition of {other}"
        if addition.target in IN_PLACE and addition.args[0] is not norm:
            return "added in place to another tensor"
        users, residual = list(addition.users), other
        if len(users) != 1:
            return f"its sum is used {len(users)} times"
        late = _late(model, norm, addition)
        if late is not None:
            return late
    act = users[0]
    by = _by(model, act, norm if addition is None else addition)
    if by is None:
        return "no supported activation follows"
    reason = obstacle(model.get_submodule(str(norm.target)), by)
    return reason or _Match(norm, act, by, addition, residual)


def _by(model: nn.Module, act: fx.Node, argument: fx.Node) -> Any:
    """The activation that a node is, of an argument and with defaults."""
    # torch.fx writes the default slope of F.leaky_relu down.
    given = {name: value for name, value in act.kwargs.items() if (name, value) != ("negative_slope", 0.01)}
    if act.args != (argument,) or set(given) - {"inplace"}:
        return None
    if act.op == "call_module":
        return model.get_submodule(str(act.target))
    return FUNCTIONAL.get(act.target) if act.op in ("call_function", "call_method") else None


def _late(model: nn.Module, norm: fx.Node, addition: fx.Node) -> str | None:
    """Why a norm cannot wait until the residual is there: its input, or its own statistics, may change meanwhile."""
    if norm.next is addition:
        return None
    x, module = norm.args[0], model.get_submodule(str(norm.target))
    calls = [n for n in norm.graph.nodes if n.op == "call_module" and model.get_submodule(str(n.target)) is module]
    if len(calls) > 1:
        return "it is called again before its sum"
    source = model.get_submodule(str(x.target)) if isinstance(x, fx.Node) and x.op == "call_module" else None
    if not isinstance(source, FRESH) or hooked(source) or len(x.users) != 1:  # type: ignore[union-attr]
        return "its input is used elsewhere before its sum"
    return None


def _traced(model: nn.Module, norms: set[nn.Module]) -> tuple[type | None, dict[nn.Module, str]]:
    """A class for a copy of model that fuses what torch.fx finds, or None; and why it finds no more, by norm."""
    graph = _graph(model, norms)
    if isinstance(graph, str):
        return None, dict.fromkeys(norms, graph)
    found: list[tuple[str, str, bool]] = []
    reasons = dict.fromkeys(norms, "torch.fx sees no call of it")
    for node in list(graph.nodes):
        norm = model.get_submodule(node.target) if node.op == "call_module" else None
        if norm not in norms or len(node.args) != 1:
            continue
        match = _follow(model, node)
        if isinstance(match, str):
            reasons[norm] = match
            continue
        found.append((node.target, str(activation_of(match.by)), match.sum is not None))
        with graph.inserting_before(match.sum or node):
            by = match.by if isinstance(match.by, str) else graph.get_attr(str(match.act.target))
            arguments = [node.args[0], graph.get_attr(node.target), by]
            if match.sum is not None:
                arguments += [match.residual, match.sum.target in IN_PLACE]
            match.act.replace_all_uses_with(graph.call_function(norm_act, tuple(arguments)))
        for old in (match.act, match.sum, node):
            if old is not None:
                graph.erase_node(old)
    if not found:
        return None, reasons
    parts: tuple[Any, ...] = getattr(model, "_parts", (type(model),))
    before, *mixins = parts
    members = {"forward": type(fx.GraphModule(model, graph)).forward, "found": tuple(found)}
    members["passed"] = tuple(path for path in _around(model, norms).values() if path)
    return type(f"Fused{before.__name__}", (_subclass(before, _Traced, *mixins),), members), reasons


class _Traced(_Subclass):
    """A model whose forward is what torch.fx has seen; it looks again where it is copied or loaded."""

    found: tuple[tuple[str, str, bool], ...]
    passed: tuple[str, ...]  # the modules whose parts it calls by itself

    def sites(self: Any) -> Iterator[Site]:
        yield from super().sites()
        for name, act, residual in self.found:
            yield Site(self.get_submodule(name), act, residual)

    def __setstate__(self: Any, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        before, _, *mixins = self._parts
        plain = _twin(self, _subclass(before, *mixins) if mixins else before)
        self.__class__ = _traced(plain, _survey(plain)[1])[0] or type(plain)


def passed_by(model: nn.Module) -> set[nn.Module]:
    """The modules in a model whose own forwards a rebuilt one has taken the place of."""
    rebuilt = [module for module in model.modules() if isinstance(module, _Traced)]
    return {module.get_submodule(name) for module in rebuilt for name in module.passed}


# ---- the whole model


def _survey(model: nn.Module) -> tuple[list[Site], set[nn.Module]]:
    """The known places of norms; and those norms of which only the model's forward tells what follows."""
    sites: list[Site] = []
    settled: set[nn.Module] = set()
    for module in model.modules():
        sites += _sites(module)
        if issubclass(_candidate(module) or type(module), (_Block, _Traced)):
            settled.update(module.modules())
    norms = {module for module in model.modules() if type(module) in OURS}
    return sites, norms - settled - {site.norm for site in sites}


@dataclass(repr=False)
class Report:
    """What `accelerate` did: of each norm, by name, what it is fused with, or why with nothing.

    Attributes:
        model: what to use from here on: the model given, or, where torch.fx had to rebuild its forward, a copy of it
            that shares every module, parameter, buffer and hook with it.
        fused: norms of ours with what follows them in the same operator.
        swapped: norms of ours with nothing fused, and why.
        left: norms that are not ours, and why.
        changed: how many modules this call gave another class; 0 where there was nothing left to do.
    """

    model: nn.Module
    fused: dict[str, str] = field(default_factory=dict)
    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    changed: int = 0

    def __post_init__(self) -> None:
        self._given = self.model

    def restore(self) -> nn.Module:
        """Give the model back as it was before any `accelerate`."""
        self.model = restore(self._given)
        return self.model

    @property
    def summary(self) -> str:
        counts = f"{len(self.fused)} norms fused, {len(self.swapped)} swapped alone, {len(self.left)} left"
        rebuilt = self.model is not self._given
        note = "; use report.model, whose forward was rebuilt" if rebuilt else "" if self.changed else "; no change"
        return f"accelerate: {counts}{note}"

    def __str__(self) -> str:
        states = (("fused", self.fused), ("swapped", self.swapped), ("left", self.left))
        rows = [(name, state, what) for state, norms in states for name, what in norms.items()]
        width = max((len(name) for name, _, _ in rows), default=0)
        return "\n".join([self.summary, *(f"  {name:{width}}  {state:7}  {what}" for name, state, what in rows)])

    __repr__ = __str__


def accelerate(model: nn.Module, *, fuse: bool = True, trace: bool = True) -> Report:
    """Put ssl_fast's norms in the place of torch's in a built model, and fuse what follows batch and instance norms.

    In place: a norm of torch.nn becomes that of ssl_fast.nn by its class, so that parameters, buffers, names, hooks,
    the state dict and what optimisers refer to stay as they are. norm -> activation and norm -> add -> activation
    become one operator (ReLU, LeakyReLU(0.01), SiLU, GELU) in the blocks and stems of torchvision's and timm's
    ResNets, in timm's BatchNormAct2d and in every nn.Sequential. Where a forward of your own calls the norm, torch.fx
    looks for the same: `report.model` is then a copy that shares all modules and has the rebuilt forward, which keeps
    the control flow it has now; where torch.fx cannot trace, the norms are swapped alone, and the report says why.
    Layer norms are always swapped alone: torch's, timm's, and the LayerNorm2d of torchvision and timm, whose result
    then keeps the memory format of its input.

    The result is that of the unchanged model, within rounding, hooks included: a norm or activation that has hooks is
    called as before, whenever they were registered. A rebuilt forward calls the parts of the modules it went through
    by themselves: register hooks of those before, or on the model; `checkpoint_stages` wants trace=False. A second call
    changes nothing; `report.restore()` and `restore(model)` undo it all. deepcopy, pickle and torch.compile work.
    Convert to synchronised norms, before or after, by `ssl_fast.convert_sync_batchnorm`; torch's own makes norms
    torch's again, and unfuses them.

    Args:
        model: any nn.Module; its mode, device and dtype do not matter.
        fuse: False swaps the norms alone.
        trace: False leaves out torch.fx; `report.model` is then `model` itself.

    Returns:
        A `Report`, which prints as a table, with `.model`, always set, and `.restore()`.

    Raises:
        TypeError: for what is no module. After any error the model is as it was.

    Example:
        >>> report = accelerate(torchvision.models.resnet50())
        >>> model = report.model
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, allowed: a torch.nn.Module")
    check_flags(fuse=fuse, trace=trace)
    changed: list[nn.Module] = []
    try:
        return _accelerate(model, fuse, trace, changed)
    except BaseException:
        for module in changed:
            _undo(module)
        raise


def _accelerate(model: nn.Module, fuse: bool, trace: bool, changed: list[nn.Module]) -> Report:
    def become(module: nn.Module, cls: type) -> None:
        before = type(module)
        module.__class__ = cls
        module.__dict__["_before"] = before
        changed.append(module)

    report = Report(model)
    norms = {module: name for name, module in model.named_modules() if isinstance(module, (NORMS, nn.LayerNorm))}
    for norm in norms:
        cls = (SWAPS | SWAPPED_ALONE).get(type(norm))
        if cls is None and isinstance(norm, nn.LayerNorm):
            cls = _candidate(norm)
        if cls is not None and "forward" not in norm.__dict__:
            become(norm, cls)
    fused: dict[nn.Module, str] = {}
    reasons: dict[nn.Module, str] = {}
    if fuse:
        for norm in norms:  # timm's, which hold their activation
            candidate = _candidate(norm)
            if candidate is not None:
                become(norm, candidate)
            if isinstance(norm, _TimmBatchNormAct):
                hindrance, what = norm.hindrance(), activation_of(norm.act)
                if hindrance is None and what is not None:
                    fused[norm] = what
                else:
                    reasons[norm] = hindrance or "it has no activation"
        sites, unknown = _survey(model)
        for module in list(model.modules()):
            candidate = _candidate(module)
            if candidate is not None and any(site.reason() is None for site in _sites(module)):
                become(module, candidate)
        for site in sites:
            reason = site.reason()
            (fused if reason is None else reasons)[site.norm] = reason or site.what()
        if unknown and not trace:
            reasons |= dict.fromkeys(unknown, "only torch.fx could tell what follows: trace=False")
        elif unknown:
            cls, why = _traced(model, unknown)
            reasons |= why
            if cls is not None:
                report.model = copy.copy(model)
                report.model.__dict__["_before"] = model.__dict__.get("_before", type(model))
                report.model.__class__ = cls
                for site in _sites(report.model):
                    fused.setdefault(site.norm, f"{site.what()}, in report.model")
    for norm, name in norms.items():
        if not isinstance(norm, (FusedNorm, LayerNorm)):
            report.left[name] = _left(norm)
        elif norm in fused:
            report.fused[name] = fused[norm]
        elif isinstance(norm, LayerNorm):
            report.swapped[name] = "a layer norm"
        else:
            report.swapped[name] = reasons.get(norm, "no supported activation follows" if fuse else "fuse=False")
    report.changed = len(changed)
    return report


def _left(norm: nn.Module) -> str:
    if "forward" in norm.__dict__:
        return "its forward was replaced"
    if nn.utils.parametrize.is_parametrized(norm):
        return "it is parametrised"
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        return "it is not initialised: run a batch first"
    if getattr(norm, "_fast_norm", False):
        return "timm's fast_norm rounds as autocast does"
    if _candidate(norm) is not None:
        return "fuse=False"
    return f"{type(norm).__name__} is a subclass that is not known"


def _undo(module: nn.Module) -> None:
    before = module.__dict__.pop("_before", None)
    if before is not None:
        module.__class__ = nn.SyncBatchNorm if type(module) is SyncBatchNorm else before


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` in a model, or in a copy of one: the classes, and with them the forwards, are torch's again.

    Norms that convert_sync_batchnorm took since then become torch.nn.SyncBatchNorm.

    Example:
        >>> accelerate(model)
        >>> restore(model)
    """
    for module in list(model.modules()):
        _undo(module)
    return model
