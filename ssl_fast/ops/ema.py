"""Moving averages of weights, in place: the momentum update of MoCo (He et al. 2020, arXiv 1911.05722, equation 2),

    target <- momentum * target + (1 - momentum) * source

computed as torch.lerp does, in fp32 (fp64 where a tensor is fp64), and rounded once to the target's dtype.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy

from ssl_fast._checks import as_float, is_number, whole
from ssl_fast._op import HALF_AND_FLOAT, Op

_FLOATING = (*HALF_AND_FLOAT, torch.float64)
_16_BIT = (torch.float16, torch.bfloat16)
_LISTS = "targets", "sources"
_WRAPPED = "module.", "_orig_mod."  # how the names of wrapped modules begin


# ---- reference: the definition, and the fallback on any device


def _reference(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: Tensor,
    averaged: int,
    copies: Sequence[Tensor],
    seed: Tensor | None,
) -> None:
    """Average the first pairs, copy the others; then round the first targets into the copies.

    seed: to round 16-bit targets stochastically; every backend draws the same noise.
    """
    weight = 1 - momentum.double().reshape(())
    rest = dict(enumerate(zip(targets, sources, strict=True)))
    if weight.device.type == "cpu":
        alike = [i for i in range(averaged) if targets[i].dtype == sources[i].dtype]
        alike = [i for i in alike if seed is None or targets[i].dtype not in _16_BIT]
        if alike:
            torch._foreach_lerp_([targets[i] for i in alike], [sources[i] for i in alike], weight.item())
            done = set(alike)
            rest = {i: pair for i, pair in rest.items() if i not in done}
    for i, (t, s) in rest.items():
        if i < averaged:
            wide = torch.promote_types(torch.promote_types(t.dtype, s.dtype), torch.float32)
            s = torch.lerp(t.to(wide), s.to(wide), weight.to(t.device, wide))
            if seed is not None and t.dtype in _16_BIT:
                s = _round_stochastically(s.float(), t.dtype, _noise(seed, i, t.shape))
        t.copy_(s)
    for c, t in zip(copies, targets, strict=False):
        c.copy_(t)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits that looks random: lowbias32 of C. Wellons' hash prospector (public domain)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _noise(seed: Tensor, tensor: int, shape: Sequence[int]) -> Tensor:
    """16 random bits, in int64, for each element of the tensor of that number: neighbours share a draw of 32."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    key = _mix((_mix((_mix(high) + low) & 0xFFFFFFFF) + tensor + 0x9E3779B9) & 0xFFFFFFFF)  # mix(0) is 0
    count = math.prod(shape)
    draws = _mix((torch.arange((count + 1) // 2, device=seed.device) & 0xFFFFFFFF) ^ key)
    return torch.stack((draws & 0xFFFF, draws >> 16), 1).flatten()[:count].reshape(shape)


def _round_stochastically(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """fp32 to values of a 16-bit dtype, up with the probability of the part that is cut off."""
    bits = x.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((bits + noise.int()) & -0x10000).view(torch.float32)
    else:
        rounded = ((bits + (noise >> 3).int()) & -0x2000).view(torch.float32)
        tiny = (x.abs() * 2.0**24 + noise.float() * 2.0**-16).floor() * 2.0**-24  # its subnormal grid
        rounded = torch.where(x.abs() < 2.0**-14, tiny.copysign(x), rounded)
    return torch.where(x.isfinite(), rounded, x)


def _fake(targets: Sequence[Tensor], *args: object) -> None:
    return None


# ---- operator

_update = Op(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor momentum, int averaged, Tensor(b!)[] copies, "
    "Tensor? seed) -> ()",
    _reference,
    fake=_fake,
    native={"cpu": _FLOATING, "cuda": _FLOATING},
    triton="ssl_fast.kernels.ema:ema_update_",
    triton_dtypes=_FLOATING,
    decides="targets",
)


# ---- functions


@torch.no_grad()
def ema_update_(
    targets: nn.Module | Iterable[Tensor],
    sources: nn.Module | Iterable[Tensor],
    momentum: float | Tensor,
    *,
    rounding: str = "nearest",
) -> None:
    """Move every target towards its source, in place: target = momentum * target + (1 - momentum) * source.

    One parallel loop on a CPU, one launch on CUDA (C++: up to 800 tensors each) for tensors of any shapes, dtypes and
    memory formats, at 12 bytes a parameter in fp32. A tensor with gaps, or whose strides are not its target's, costs a
    copy. It captures into a CUDA graph.
    Equivalent to:
        for target, source in zip(targets, sources):
            target.lerp_(source, 1 - momentum)

    Args:
        targets, sources: two modules of one structure, whose parameters are updated (buffers are left alone: `EMA`
            takes them along), or two lists of as many tensors, equal in shape. fp16, bf16, fp32 or fp64, a source's
            dtype may differ from its target's; any strides; all on one device. Lists spare the walk over a module's
            parameters at each call. A target that is listed twice is updated once, from its first source. Other
            overlaps are not supported.
        momentum: in [0, 1]; 1 leaves finite targets as they are where the sources are finite, 0 copies finite ones. A
            float, or one fp32 or fp64 number in a tensor on the targets' device, which is read there: its value is
            not checked, and a CUDA graph sees what is written to it between replays.
        rounding: how the fp32 result is stored in a 16-bit target. "nearest": it stands still where a step is under
            half its spacing, which at momentum 0.999 is practically always; keep fp32 targets there (sources may be
            16-bit). "stochastic": up or down so that the mean is right, with noise from PyTorch's generator of the
            device (torch.manual_seed).

    Raises:
        ValueError, TypeError: naming the tensor or argument that does not fit, before anything is modified.

    Example:
        >>> key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        >>> ema_update_(key_encoder, encoder, momentum=0.999)
    """
    _one_of("rounding", rounding, ("nearest", "stochastic"))
    names, targets, sources = _pairs(targets, sources)
    weight = _momentum("momentum", momentum, targets)
    if len(set(map(id, targets))) < len(targets):
        _check(_LISTS, names, targets, sources, len(targets))
        first = sorted({id(t): i for i, t in reversed(list(enumerate(targets)))}.values())
        names, targets, sources = [names[i] for i in first], [targets[i] for i in first], [sources[i] for i in first]
    if targets:
        seed = torch.randint(2**62, (), device=targets[0].device) if rounding == "stochastic" else None
        _checked(
            lambda: _update(targets, sources, weight, len(targets), [], seed),
            _LISTS, names, targets, sources, len(targets),
        )  # fmt: skip
        increment_version(targets)  # a graph that still holds the old values must notice


def update_momentum(model: nn.Module, model_ema: nn.Module, m: float | Tensor) -> None:
    """ema_update_ of a module's parameters, in lightly's order of arguments.

    Equivalent to: lightly.models.utils.update_momentum(model, model_ema, m).

    Args:
        model: where to move to.
        model_ema: what is moved, in place; of the same structure.
        m: the momentum, in [0, 1], as in ema_update_.

    Raises:
        ValueError, TypeError: naming the parameter or argument that does not fit, before anything is modified.

    Example:
        >>> update_momentum(backbone, backbone_momentum, m=0.996)
    """
    ema_update_(model_ema, model, m)


def cosine_momentum(steps: int, start: float = 0.996, end: float = 1.0) -> Callable[[int | Tensor], Tensor]:
    """The momentum of BYOL (Grill et al. 2020, arXiv 2006.07733, section 3.2) and MoCo v3, for `EMA(schedule=...)`:

        end - (end - start) * (cos(pi * step / steps) + 1) / 2

    It stays at `end` once `steps` are over, and is computed on the device of the step.

    Raises:
        ValueError: naming the argument that is out of range.

    Example:
        >>> ema = EMA(encoder, schedule=cosine_momentum(epochs * len(loader)))
    """
    steps = whole("steps", steps, hint=", of all the updates to come")
    for name, value in (("start", start), ("end", end)):
        _momentum(name, value, ())
    return functools.partial(_cosine, steps=steps, start=start, end=end)


def _cosine(step: int | Tensor, steps: int, start: float, end: float) -> Tensor:
    done = (torch.as_tensor(step, dtype=torch.float64) / steps).clamp(max=1)
    return end - (end - start) * (torch.cos(math.pi * done) + 1) / 2


# ---- module


class EMA(nn.Module):
    """A moving average of a model's weights: the teacher, target or key encoder, or the weights to evaluate with.

    `.module` is a copy of the model that needs no gradient, in the model's dtypes and on its device; `.update(model)`
    moves it, in place, in one launch (one parallel loop on a CPU). 16-bit weights would stand still at the usual
    momenta: an fp32 master of each is averaged, and rounded into `.module` in the same pass. Values that are written to
    `.module` between updates, by a checkpoint or a forward pass, are taken over by the masters; to a parameter by
    `.data`, which autograd does not notice either, they are not.

    Args:
        model: any module. A DistributedDataParallel or compiled one is given unwrapped (model.module, model._orig_mod),
            here and to update().
        momentum: a float in [0, 1], or an fp32 or fp64 number in a tensor, which may lie on the device and is then
            not checked. It may be set between updates.
        schedule: called as schedule(step) at each update for the momentum, instead of `momentum`. step is
            `num_updates`, a 0-dim int64 tensor on the device, so that a schedule in torch operations, such as
            `cosine_momentum(steps)`, advances within a CUDA graph and without a synchronisation.
        buffers: what becomes of floating-point buffers, such as the running statistics of batch norm. "ema": averaged
            like parameters, as timm does; "copy": the model's at each update; "none": left to the copy's own forward
            passes. With "ema" and "copy", buffers of other dtypes, those outside the state dict and those that hold
            infinities or NaN at the beginning (masks) are copied.
        rounding: of 16-bit weights. "nearest": from their masters; "stochastic": no masters, up or down so that the
            mean is right. The noise follows from the number of the update, so ranks agree and runs repeat.

    Attributes:
        module: the averaged copy, in train or eval mode as the model was; train() and eval() of the EMA reach it.
        num_updates: how many there were. With the masters it is in the state dict: a resumed run goes on to the bit.

    forward() runs `.module` without gradient. Parameters that share storage by name (tied ones) are updated once. It
    captures into a CUDA graph, after one update outside.

    Raises:
        ValueError, TypeError: from update(), naming the first parameter or buffer in which the model's structure
            differs, before anything is modified.

    Example:
        >>> ema = EMA(model, momentum=0.999)
        >>> optimizer.step(); ema.update(model)
        >>> evaluate(ema.module)
    """

    num_updates: Tensor
    _key: list[Any] | None = None  # the tensors that _match has seen
    _versions: list[int | None]  # of the averages that have masters, after the last update

    def __init__(
        self,
        model: nn.Module,
        momentum: float | Tensor = 0.999,
        schedule: Callable[[Tensor], float | Tensor] | None = None,
        *,
        buffers: str = "ema",
        rounding: str = "nearest",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, allowed: a module")
        _one_of("buffers", buffers, ("none", "copy", "ema"))
        _one_of("rounding", rounding, ("nearest", "stochastic"))
        if schedule is not None and not callable(schedule):
            raise TypeError(
                f"schedule: got {schedule!r}, allowed: a function of the step, such as cosine_momentum(steps)"
            )
        _momentum("momentum", momentum, _present(model))
        self.momentum, self.schedule = momentum, schedule
        self.buffer_rule, self.rounding = buffers, rounding
        if any(is_lazy(t) for t in _present(model)):
            raise ValueError("model: got parameters that are not initialised, allowed: initialised ones; run a batch")
        _refuse_shards(model)
        self._masks = _not_finite(model)
        try:
            self.module = copy.deepcopy(model).requires_grad_(False)
        except RuntimeError as error:
            raise ValueError(
                f"model: got {type(model).__name__}, which copy.deepcopy refuses: {error}; build the EMA before the "
                "first forward pass, and with torch.nn.utils.parametrizations in the place of weight_norm"
            ) from error
        if any(t.is_inference() for t in _present(self.module)):
            raise ValueError(
                "model: got tensors of torch.inference_mode(), which no update may change outside of it, allowed: "
                "others; build the EMA outside"
            )
        for parameter in self.module.parameters():
            parameter.grad = None  # which were copied as well
        device = next((t.device for t in _present(model)), None)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64, device=device))
        self.masters = _Masters()
        self._keep_masters()
        self._match(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move every parameter, and every buffer by its rule, towards the model's."""
        ours, theirs = _registered(self.module), _registered(model)
        key = [*map(id, ours), *map(id, theirs), *[None if t is None else t.dtype for t in ours]]
        if key != self._key:
            self._keep_masters()
            self._match(model)
            self._key = key
        averages, values = [ours[i] for i, _ in self._places], [theirs[j] for _, j in self._places]
        name, momentum = "momentum", self.momentum
        if self.schedule is not None:
            name, momentum = "schedule", self.schedule(self.num_updates)
        weight = _momentum(name, momentum, averages)
        if averages:
            masters: list[Any] = [self.masters._buffers[n] for n in self._mastered]
            narrow = averages[: len(masters)]
            for average, master, version in zip(narrow, masters, self._versions, strict=True):
                # torch's batch norm moves its running statistics without a new version.
                if average._version != version or not isinstance(average, nn.Parameter):
                    master.copy_(torch.where(master.to(average.dtype) == average, master, average.float()))
            seed = self.num_updates.to(averages[0].device) if self.rounding == "stochastic" else None
            targets = [*masters, *averages[len(masters) :]]
            _checked(
                lambda: _update(targets, values, weight, self._averaged, narrow, seed),
                self._SIDES, self._labels, averages, values, self._averaged,
            )  # fmt: skip
            increment_version(averages)
            self._versions = [average._version for average in narrow]
        self.num_updates.add_(1)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def extra_repr(self) -> str:
        momentum = f"momentum={self.momentum}" if self.schedule is None else f"schedule={self.schedule}"
        return f"{momentum}, buffers={self.buffer_rule!r}, rounding={self.rounding!r}"

    # What an update touches is found by name once, and by place as long as both modules hold the same tensors.

    _SIDES = "EMA.module", "model"

    def _match(self, model: nn.Module) -> None:
        """Pair the tensors by name: 16-bit ones with a master first, then the other averaged ones, then the copied."""
        self._key = None  # should the models not match, nothing of this is used
        for module in (self.module, model):
            _refuse_shards(module)
        averaged, copied = self._roles(self.module)
        pairs = _by_name(self._SIDES, "parameter", dict(self.module.named_parameters()), dict(model.named_parameters()))
        if self.buffer_rule != "none":
            pairs |= _by_name(self._SIDES, "buffer", dict(self.module.named_buffers()), dict(model.named_buffers()))
        mastered = [n for n in averaged if _Masters.key(n) in self.masters._buffers]
        order = [*mastered, *(n for n in averaged if n not in set(mastered)), *copied]
        ours, theirs = _places(self.module), _places(model)
        self._places = [(ours[id(average)], theirs[id(value)]) for average, value, _ in map(pairs.__getitem__, order)]
        self._labels = [pairs[n][2] for n in order]
        self._averaged = len(averaged)
        self._mastered = [_Masters.key(n) for n in mastered]
        self._versions = [None] * len(mastered)
        _check(self._SIDES, self._labels, [pairs[n][0] for n in order], [pairs[n][1] for n in order], len(averaged))

    def _roles(self, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors of a module that are averaged, and those that are copied, by name."""
        averaged: dict[str, Tensor] = {}
        copied: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            numeric = parameter.is_floating_point() or parameter.is_complex()
            (averaged if numeric else copied)[name] = parameter
        if self.buffer_rule != "none":
            # Caches and masks are kept outside the state dict; the average of an infinite mask would be NaN.
            outside = {
                f"{prefix}.{n}".lstrip(".")
                for prefix, m in module.named_modules()
                for n in m._non_persistent_buffers_set
            }
            for name, buffer in module.named_buffers():
                average = self.buffer_rule == "ema" and buffer.is_floating_point()
                average = average and name not in outside and name not in self._masks
                (averaged if average else copied)[name] = buffer
        return averaged, copied

    def _keep_masters(self) -> None:
        """One for each averaged 16-bit tensor, and no other."""
        wanted = {}
        if self.rounding == "nearest":
            wanted = {_Masters.key(n): t for n, t in self._roles(self.module)[0].items() if t.dtype in _16_BIT}
        for name in self.masters._buffers.keys() - wanted.keys():
            del self.masters._buffers[name]
        for name in wanted.keys() - self.masters._buffers.keys():
            self.masters.register_buffer(name, wanted[name].detach().float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMA:
        super()._apply(fn, recurse)
        self._keep_masters()  # of what .half() or .bfloat16() narrowed
        return self


class _Masters(nn.Module):
    """fp32 buffers that .half() and its like leave fp32."""

    @staticmethod
    def key(name: str) -> str:
        return name.replace(".", "/")  # which the name of a buffer may not hold

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: Any) -> None:
        """Of a checkpoint in another precision there are none, or too many: the averages tell what they are."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, [], [], lists[2])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Masters:
        for name, master in self._buffers.items():
            assert master is not None
            moved = fn(master)
            self._buffers[name] = moved if moved.dtype == master.dtype else master.to(moved.device)
        return self


# ---- what they take, and what they say where it does not fit


def _registered(module: nn.Module) -> list[Any]:
    """Every parameter and buffer, at each place where one is registered; a fifth of the time that names take."""
    found: list[Tensor | None] = []
    modules: list[nn.Module | None] = [module]
    while modules:
        if (m := modules.pop()) is not None:
            found += m._parameters.values()
            found += m._buffers.values()
            modules += m._modules.values()
    return found


def _not_finite(module: nn.Module) -> set[str]:
    """The names of buffers with infinities or NaN, whose averages would be NaN; none where there are no values yet."""
    if _len_torch_dispatch_stack():  # fake tensors
        return set()
    buffers = [(n, b) for n, b in module.named_buffers() if b.is_floating_point() and not b.is_meta]
    return {name for name, buffer in buffers if not buffer.isfinite().all()}


def _refuse_shards(module: nn.Module) -> None:
    if any(hasattr(t, "full_tensor") for t in _present(module)):  # a DTensor, whose import takes long
        raise ValueError(
            "model: got parameters that fully_shard has split between processes, allowed: whole ones, as under "
            "DistributedDataParallel; shard a copy alike, and call ema_update_ on p.detach().to_local() of the "
            "parameters of both"
        )


def _present(module: nn.Module) -> list[Tensor]:
    return [t for t in _registered(module) if t is not None]


def _places(module: nn.Module) -> dict[int, int]:
    """Where _registered has each tensor, by id."""
    return {id(t): i for i, t in enumerate(_registered(module))}


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, allowed: {', '.join(map(repr, allowed))}")


def _momentum(name: str, momentum: object, targets: Sequence[Tensor]) -> Tensor:
    """As the operator takes it. The value of a tensor stays where it is, unchecked."""
    if isinstance(momentum, Tensor):
        if momentum.numel() != 1 or momentum.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name}: got {momentum.dtype} of shape {tuple(momentum.shape)}, allowed: a float in [0, 1], or one "
                "float32 or float64 number in a tensor (0.999 is 1 in bfloat16)"
            )
        if targets and momentum.device not in (targets[0].device, torch.device("cpu")):
            raise ValueError(f"{name}: got device {momentum.device}, allowed: that of the targets, {targets[0].device}")
        return momentum
    if not is_number(momentum):
        raise TypeError(f"{name}: got {momentum!r}, allowed: a float in [0, 1], such as 0.999")
    if not 0 <= (value := as_float(momentum)) <= 1:
        raise ValueError(f"{name}: got {momentum}, allowed: a float in [0, 1], such as 0.999")
    return torch.scalar_tensor(value, dtype=torch.float64)


def _by_name(
    sides: tuple[str, str], what: str, targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor, str]]:
    """Target, source and what to call them in a message, by name; raises for the first that one side lacks, or has in
    another shape."""
    hint = " (EMA's buffers='none' leaves buffers alone)" if what == "buffer" else ""
    for name in dict.fromkeys(n for pair in itertools.zip_longest(targets, sources) for n in pair if n is not None):
        if (name in targets) != (name in sources):
            has, lacks = sides if name in targets else sides[::-1]
            if any(n.startswith(_WRAPPED) for n in (*targets, *sources)):
                hint = "; unwrap a DistributedDataParallel (model.module) or compiled model (model._orig_mod) first"
            raise ValueError(
                f"{lacks}: got a module without the {what} {name!r} of {has}, allowed: modules with the same {what} "
                f"names{hint}"
            )
        if targets[name].shape != sources[name].shape:
            raise _wrong_shape(f"{sides[1]} {what} {name!r}", targets[name], sources[name], hint)
    return {n: (targets[n], sources[n], f" {what} {n!r}") for n in targets}


def _wrong_shape(where: str, target: Tensor, source: Tensor, hint: str = "") -> ValueError:
    return ValueError(
        f"{where}: got shape {tuple(source.shape)}, allowed: the shape of its target, {tuple(target.shape)}{hint}"
    )


def _pairs(
    targets: nn.Module | Iterable[Tensor], sources: nn.Module | Iterable[Tensor]
) -> tuple[Sequence[str | int], list[Tensor], list[Tensor]]:
    """What to call each pair in a message, the tensors to update and their sources."""
    if isinstance(targets, nn.Module) and isinstance(sources, nn.Module):
        parameters = dict(targets.named_parameters()), dict(sources.named_parameters())
        found = _by_name(_LISTS, "parameter", *parameters).values()
        return [label for *_, label in found], [t for t, *_ in found], [s for _, s, _ in found]
    if any(isinstance(value, (nn.Module, Tensor)) or not isinstance(value, Iterable) for value in (targets, sources)):
        got = f"{type(targets).__name__} and {type(sources).__name__}"
        raise TypeError(f"targets, sources: got {got}, allowed: two modules, or two lists of tensors")
    targets, sources = list(targets), list(sources)  # type: ignore[arg-type]
    for name, values in (("targets", targets), ("sources", sources)):
        strange = next((kind for kind in set(map(type, values)) if not issubclass(kind, Tensor)), None)
        if strange is not None:
            raise TypeError(f"{name}: got {strange.__name__} among them, allowed: two modules, or two lists of tensors")
    if len(targets) != len(sources):
        raise ValueError(f"sources: got {len(sources)} tensors, allowed: as many as targets, {len(targets)}")
    return range(len(targets)), targets, sources


def _checked(
    update: Callable[[], None],
    sides: tuple[str, str],
    names: Sequence[str | int],
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    averaged: int,
) -> None:
    """Update once every pair is known to fit. C++ looks at them all before it writes to any, in a fourth of the time
    that it takes here, so that for C++ only the words for what does not fit are looked for."""
    if torch.compiler.is_compiling() or _update.backend_for(targets[0]) != "native":
        _check(sides, names, targets, sources, averaged)
        return update()
    try:
        update()
    except RuntimeError:
        _check(sides, names, targets, sources, averaged)
        raise


def _check(
    sides: tuple[str, str],
    names: Sequence[str | int],
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    averaged: int,
) -> None:
    """Raise for the first pair that does not fit."""
    for i, (name, target, source) in enumerate(zip(names, targets, sources, strict=True)):
        at = f"[{name}]" if isinstance(name, int) else name
        for side, tensor in zip(sides, (target, source), strict=True):
            if i < averaged and tensor.dtype not in _FLOATING:
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
            raise _wrong_shape(f"{sides[1]}{at}", target, source)
        if any(stride == 0 and size > 1 for stride, size in zip(target.stride(), target.shape, strict=True)):
            raise ValueError(f"{sides[0]}{at}: got an expanded tensor, allowed: one whose elements are each its own")
        if i >= averaged and source.dtype != target.dtype and not {source.dtype, target.dtype}.issubset(_FLOATING):
            raise TypeError(f"{sides[1]}{at}: got {source.dtype}, allowed: the dtype of its target, {target.dtype}")
