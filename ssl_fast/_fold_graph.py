"""The calls that torch.fx sees in a model's forward: which norm follows which layer, and what else would notice."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ssl_fast._fold_rules import LAYERS, Epilogue, _known_norm, _Several
from ssl_fast.accelerate import ADDITIONS, FUNCTIONAL, hooked, norm_act

# ---- one trace


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


# ---- what a forward computes


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


# ---- the parts of a model that can be traced


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


# ---- which norm follows which layer


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
