"""`plan`: what a SimCLR step takes at its peak, and which combination of ssl_fast's parts brings it within a memory.

Nothing is allocated and nothing computed: the step runs on fake tensors, which have shapes and lifetimes alone, and
every storage is counted from its first tensor to its last. So what is kept for the backward, what the backward makes
beside it, and when it is released are those of the model as it is written. Workspaces within an operator are not seen.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ssl_fast import _checks
from ssl_fast.accelerate import accelerate
from ssl_fast.backbones import build_encoder
from ssl_fast.cached import MARGIN, checkpoint_stages, fewest_rows
from ssl_fast.demo import dense_nt_xent
from ssl_fast.memory import format_memory, free_memory, parse_memory
from ssl_fast.methods import SimCLR
from ssl_fast.ops.nt_xent import NTXentLoss
from ssl_fast.run import pick_device

STATES = {"sgd": 1, "lars": 1, "adamw": 2}  # tensors that an optimizer holds of each parameter


@dataclass(frozen=True)
class Parts:
    """What a step is made of; `micro_batch` 0 is the plain step, both views of the batch at once."""

    loss: bool = True
    accelerate: bool = False
    bf16: bool = False
    checkpoint: bool = False
    micro_batch: int = 0

    def arguments(self) -> str:
        """As `ssl-fast train` takes them."""
        words = ["accelerate=true"] * self.accelerate + ["precision=bf16"] * self.bf16
        words += ["checkpoint_stages=true"] * self.checkpoint
        return " ".join([*words, *([f"micro_batch={self.micro_batch}"] if self.micro_batch else [])])


@dataclass(frozen=True)
class Row:
    """A combination: its peak in bytes, what it saves against the one it is built on, and its multiplications over
    those of the plain step."""

    name: str
    parts: Parts
    peak: int
    saves: int
    compute: float


@dataclass
class Plan:
    """What `plan` found; `print(plan)` is the table.

    Attributes:
        rows: the combinations, from plain PyTorch on.
        best: the first of those with the least compute that fit, or None.
        others: arguments beside these that `train` does not take by itself, such as {"head": "linear"}.
    """

    model: str
    image: int
    batch: int
    memory: int
    batch_norm: bool
    rows: list[Row] = field(default_factory=list)
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Row | None:
        return min((r for r in self.rows if r.peak <= self.memory), key=lambda r: round(r.compute, 1), default=None)

    def __str__(self) -> str:
        title = f"plan: {self.model}, batch {self.batch} at {self.image} pixels, within {format_memory(self.memory)}"
        lines = [title, f"  {'':30}{'peak':>11}{'saves':>11}{'compute':>9}  fits"]
        for row in self.rows:
            saves = "" if row is self.rows[0] else ("-" if row.saves < 0 else "") + format_memory(abs(row.saves))
            fits = "yes" if row.peak <= self.memory else "no"
            lines.append(f"  {row.name:30}{format_memory(row.peak):>11}{saves:>11}{row.compute:>8.2f}x  {fits}")
        lines += [
            "saves: against the line above, a micro-batch against the same parts without it. compute: multiplications",
            "over those of the plain step, a second forward pass included; how long they take on a device, in bf16 or",
            "beside fused norms, is for a bench to say. Every line is channels_last, as train is.",
        ]
        if self.best is None:
            return "\n".join([*lines, "nothing fits: lower batch or image, choose a smaller model, or raise memory"])
        words = [f"model={self.model} image_size={self.image} batch_size={self.batch}"]
        words += [f"{key}={value}" for key, value in self.others.items()] + [self.best.parts.arguments()]
        lines.append(f"take: ssl-fast train out=... data=... {' '.join(words).rstrip()}")
        if self.best.parts.micro_batch and self.batch_norm:
            size = self.best.parts.micro_batch
            lines.append(f"batch norm takes its statistics from {size} images then: docs/large_batches.md")
        return "\n".join(lines)


def plan(
    model: str | nn.Module = "resnet50",
    image: int = 224,
    batch: int = 256,
    memory: str | int | None = None,
    *,
    channels: int = 3,
    stem: str = "auto",
    head: str = "nonlinear",
    dim: int = 128,
    optimizer: str = "lars",
    device: str = "auto",
) -> Plan:
    """Predict the peak memory of a SimCLR step, and say which parts of ssl_fast bring it within a budget.

    The prediction counts the parameters, gradients, optimizer's state, both views, what is kept for the backward and
    what the backward makes; not the augmentation, nor what the process has taken before, nor workspaces of operators.

    Args:
        model, channels, stem, head, dim: as `train` takes them.
        image: pixels of a view's side.
        batch: images a step; each gives two views.
        memory: the budget, such as "24GiB"; default what is free on the device.
        optimizer: "lars", "sgd" or "adamw".
        device: "auto", "cpu", "cuda" or "cuda:N": where `memory` is looked up.

    Returns:
        A Plan, whose str is the table.

    Raises:
        ValueError: naming the argument that does not fit.

    Example:
        >>> print(plan("resnet50", image=224, batch=8192, memory="24GiB"))
    """
    image, batch = _checks.whole("image", image, 4), _checks.whole("batch", batch, 2)
    channels = _checks.whole("channels", channels)
    if optimizer not in STATES:
        raise ValueError(f"optimizer: got {optimizer!r}, allowed: {', '.join(STATES)}")
    budget = free_memory(pick_device(device)) if memory is None else parse_memory(memory)

    encoder = _on_meta(model, image, channels, stem) if isinstance(model, str) else model

    def step(parts: Parts) -> _Step:
        return _Step(encoder, image, batch, channels, stem, head, dim, STATES[optimizer], parts)

    name = model if isinstance(model, str) else type(model).__name__
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in step(Parts()).network.modules())
    given = {"stem": stem, "head": head, "dim": dim, "optimizer": optimizer, "device": device}
    usual = inspect.signature(plan).parameters
    others = {key: value for key, value in given.items() if value != usual[key].default}
    found = Plan(name, image, batch, budget, norms, others=others)
    forward, trained = (step(Parts()).flops(backward) for backward in (False, True))
    again = {False: 0.0, True: 0.0}
    try:
        again[True] = step(Parts(checkpoint=True)).flops(True) / trained - 1
    except ValueError:  # no stages
        del again[True]

    def add(label: str, parts: Parts, before: Row | None = None) -> None:
        compute = 1 + again[parts.checkpoint] + (forward / trained if parts.micro_batch else 0)
        peak, before = step(parts).peak(), before or (found.rows[-1] if found.rows else None)
        found.rows.append(Row(label, parts, peak, before.peak - peak if before else 0, compute))

    add("plain PyTorch", Parts(loss=False))
    add("ssl_fast's loss", Parts())
    add("+ accelerate", Parts(accelerate=True))
    add("+ bf16", Parts(accelerate=True, bf16=True))
    if True in again:
        add("+ checkpoint_stages", Parts(accelerate=True, bf16=True, checkpoint=True))
    whole = {(row.parts.bf16, row.parts.checkpoint): row for row in found.rows if row.parts.accelerate}
    fewest = fewest_rows(batch, 2)  # batch norm refuses a row alone
    for (bf16, checkpoint), row in whole.items() if fewest < batch else ():
        parts = _largest(row.parts, step, batch, fewest, int(MARGIN * budget))
        extra = "".join([", bf16"] * bf16 + [", stages"] * checkpoint)
        add(f"micro_batch={parts.micro_batch}{extra}", parts, row)
    return found


def _on_meta(name: str, image: int, channels: int, stem: str) -> nn.Module:
    """An encoder without values; by way of the CPU where an initialisation looks at them."""
    try:
        with torch.device("meta"):
            return build_encoder(name, image, channels, stem)[0]
    except RuntimeError:
        return build_encoder(name, image, channels, stem)[0].to("meta")


def _largest(parts: Parts, step: Callable[[Parts], _Step], batch: int, fewest: int, budget: int) -> Parts:
    """With the largest micro-batch that fits, nearly; with the smallest, of `fewest` rows, where none does.

    The peak is convex in it, the larger of what the loss takes and of a line. So where the chord from one that fits to
    one that does not meets the budget, it fits too.
    """

    def peak(size: int) -> int:
        return step(replace(parts, micro_batch=size)).peak()

    low, high = fewest, -(-batch // 2)
    below, above = peak(low), peak(high)
    if above <= budget:
        return replace(parts, micro_batch=high)
    for _ in range(4):
        if not below <= 0.95 * budget:
            break
        size = low + int((high - low) * (budget - below) / (above - below))
        if size == low:
            break
        low, below = size, peak(size)
    return replace(parts, micro_batch=low)


class _Step:
    """A step of SimCLR on the meta device, to be run on fake tensors."""

    def __init__(
        self,
        model: Any,
        image: int,
        batch: int,
        channels: int,
        stem: str,
        head: str,
        dim: int,
        states: int,
        parts: Parts,
    ) -> None:
        self.batch, self.parts, self.states = batch, parts, states
        with torch.device("meta"):
            given = model if isinstance(model, str) else copy.deepcopy(model).to("meta")
            encoder, features = build_encoder(given, image, channels, stem)
            if parts.accelerate:
                encoder = accelerate(encoder, trace=not parts.checkpoint).model
            if parts.checkpoint:
                checkpoint_stages(encoder)
            loss = NTXentLoss() if parts.loss else _Dense()
            self.network = SimCLR(encoder, features, dim, head, loss=loss).to(memory_format=torch.channels_last)
            if parts.accelerate:
                accelerate(self.network, trace=False)
        self.network.train()
        self.shape, self.width = (channels, image, image), features if head == "none" else dim

    def peak(self) -> int:
        """Bytes at the peak of the second step: gradients are made anew, the optimizer's state is there."""
        with self._fake() as count:
            parameters = [p for p in self.network.parameters() if p.requires_grad]
            kept = [torch.empty_like(p) for p in parameters for _ in range(self.states)]
            view1, view2 = (self._images(self.batch) for _ in range(2))
            with torch.autocast("cpu", torch.bfloat16, enabled=self.parts.bf16):
                if self.parts.micro_batch:
                    self._cached(view1)
                else:
                    loss = self.network(view1, view2)
            if not self.parts.micro_batch:
                loss.backward()
            del kept
            return count.peak

    def _cached(self, view: Tensor) -> None:
        """All embeddings, their loss, and the micro-batch that is on its way when the gradients are there."""
        through = nn.Sequential(self.network.encoder, self.network.head)
        with torch.no_grad():
            dtype = through(view[:2]).dtype
        z1, z2 = (torch.empty(self.batch, self.width, dtype=dtype, requires_grad=True) for _ in range(2))
        loss = self.network.loss(z1, z2)
        with torch.autocast("cpu", enabled=False):
            loss.backward()
        for p in self.network.parameters():
            p.grad = torch.empty_like(p)  # of the micro-batches before
        z = through(view[: self.parts.micro_batch])
        with torch.autocast("cpu", enabled=False):
            z.backward(torch.empty_like(z))

    def flops(self, backward: bool) -> float:
        """Of two images."""
        with self._fake(), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            z = self.network.head(self.network.encoder(self._images(2)))
            if backward:
                z.backward(torch.empty_like(z))
        return counter.get_total_flops()

    @contextmanager
    def _fake(self) -> Iterator[_Storages]:
        with FakeTensorMode(), _Storages() as count:
            for module in self.network.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None:
                            tensors[name] = _on_cpu(tensor)  # type: ignore[assignment]
            yield count

    def _images(self, count: int) -> Tensor:
        return torch.empty(count, *self.shape).contiguous(memory_format=torch.channels_last)


class _Dense(nn.Module):
    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return dense_nt_xent(z1, z2, 0.5)


def _on_cpu(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


class _Storages(TorchDispatchMode):
    """Bytes of all storages that are alive, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
