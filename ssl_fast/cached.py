"""`cached_step`: a contrastive step whose encoder sees a micro-batch at a time and whose loss sees the whole batch.

The loss needs every embedding at once, but not the encoder's activations. So (GradCache: Gao et al. 2021, arXiv
2101.06983, section 3.2):

    1. embed the batch micro-batch by micro-batch, without a graph        z_i = f(x_i)
    2. one loss over all embeddings, and its gradient for them            u_i = dL/dz_i
    3. embed each micro-batch again, now with a graph, and end it there   dL/dw += u_i^T dz_i/dw

which is the chain rule, and so the gradient of the whole batch, for the memory of one micro-batch and one more forward
pass. The second pass starts from the generators and buffers that the first one started from.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ssl_fast._checks import check_callable, whole
from ssl_fast._distributed import everyone, rank_and_world
from ssl_fast.accelerate import passed_by
from ssl_fast.memory import format_memory, free_memory, out_of_memory, parse_memory, peak_memory

log = logging.getLogger("ssl_fast")
MARGIN = 0.95  # of the budget, for what is off the line


def cached_step(
    encoder: nn.Module | Sequence[nn.Module],
    views: Sequence[Tensor],
    loss: Callable[..., Tensor],
    micro_batch: int,
    *,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The loss of a batch and its gradients, with the activations of one micro-batch in memory (GradCache, arXiv
    2101.06983).

    Equivalent to, in one micro-batch's memory and at the cost of a second forward pass:
        value = loss(*(encoder(view) for view in views)); value.backward()
    to fp32 rounding for every encoder that treats each row alone (layer norm, frozen batch norm). Batch norm in
    training takes its statistics from a micro-batch, as it would on so many devices: docs/large_batches.md measures
    what that does. Where micro_batch covers the batch, it is exactly the two lines above.

    Both passes draw the same random numbers (torch's on the CPU and on the GPUs of the encoder, Python's and NumPy's),
    so that dropout agrees, and start from the same buffers, so that running statistics move once for each micro-batch.
    Autocast around the call is in force for the passes and the loss, and off for the backwards. Under
    DistributedDataParallel gradients are reduced once, in the last backward.

    Args:
        encoder: from rows of a view (n, ...) to embeddings (n, ...), a tensor; or a list of such modules, one for each
            view, as in CLIP. The same module may appear more than once.
        views: tensors of N rows each, a micro-batch of which is moved to the encoder's device when its turn comes. They
            may require a gradient, but not have a history.
        loss: called once, as loss(*embeddings) with the embeddings of all N rows of each view; returns a scalar. Its
            own parameters, such as a temperature, get their gradients.
        micro_batch: rows of a view that the encoder sees at once; the batch is cut into equal parts of at most as many.
        scale: what the loss goes through before its backward, such as the `scale` of a torch.amp.GradScaler.

    Returns:
        The loss, detached, without `scale`. Gradients are added to `.grad`, as by backward().

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Example:
        >>> optimizer.zero_grad()
        >>> loss = cached_step(model, (view1, view2), NTXentLoss(0.1), micro_batch=256)
        >>> optimizer.step()
    """
    encoders, rows = _check(encoder, views, micro_batch)
    check_callable("loss", loss, "a function of the embeddings of each view, such as NTXentLoss(0.1)")
    if scale is not None:
        check_callable("scale", scale, "None, or a function, such as the method `scale` of a torch.amp.GradScaler")
    if micro_batch >= rows:
        value = loss(*(_embed(own, view) for own, view in zip(encoders, views, strict=True)))
        _backward_of_loss(value, scale)
        return value.detach()

    parts = -(-rows // micro_batch)
    devices = _devices(encoders)
    embeddings: list[Tensor] = []
    drawn: list[list[_Generators]] = []
    before: list[_Buffers] = []
    for own, view in zip(encoders, views, strict=True):
        before.append(_Buffers([own]))
        states, pieces = [], []
        with torch.no_grad():
            for rows_of_view in view.tensor_split(parts):
                states.append(_Generators(devices))
                with _naming_micro_batch(micro_batch, rows_of_view):
                    pieces.append(_embed(own, rows_of_view))
            learned = any(p.requires_grad for p in own.parameters()) or view.requires_grad
            embeddings.append(torch.cat(pieces).requires_grad_(learned))
        drawn.append(states)
    after = _Buffers(encoders)
    torch.clear_autocast_cache()  # of weights that were cast without a graph

    value = loss(*embeddings)
    _backward_of_loss(value, scale)
    gradients = [z.grad for z in embeddings]
    del embeddings
    end = _Generators(devices)

    used = [i for i, gradient in enumerate(gradients) if gradient is not None]
    last = {id(encoders[i]): i for i in used}
    for i in used:
        before[i].restore()
        cut = (x.tensor_split(parts) for x in (views[i], gradients[i]))  # type: ignore[union-attr]
        for part, (rows_of_view, gradient, state) in enumerate(zip(*cut, drawn[i], strict=True)):
            reduces = last[id(encoders[i])] == i and part == parts - 1
            state.restore()
            with contextlib.nullcontext() if reduces else _no_sync(encoders[i]):
                z = _embed(encoders[i], rows_of_view)
                with _no_autocast():
                    torch.autograd.backward(z, gradient)
    after.restore()
    end.restore()
    return value.detach()


class CachedStep:
    """`cached_step` with a micro-batch that it finds itself, and halves where memory runs out.

    At the first call micro-batches are measured (peak RSS on a CPU, max_memory_allocated on a GPU), each twice the one
    before, until one takes a quarter of the budget or a GiB; the line through them says how many rows fit. The
    step itself does not notice. Should memory run out all the same, the micro-batch is halved, a warning says so, and
    the step begins again as if nothing had been: gradients, generators and the buffers of the encoder and of a loss
    that is a module are those of before. Batch norm in training is left two rows in every part of a batch. Several
    processes measure together, and take the smallest of what they find; a lack of memory is an error there, as the
    others would not know of it.

    Args:
        micro_batch: "auto", or a number, which is taken as it is and never halved.
        memory: the budget, such as "20GiB", of all that the process holds on the encoder's device; default: what is
            free, on a CPU shared between the processes.
        reserve: bytes of the budget to leave to what comes later, such as the optimizer's state.

    Attributes:
        micro_batch: the number in use; None before the first call with "auto". It may be set: a resumed run goes on
            with the one it had.

    Raises:
        ValueError: naming the argument that does not fit; from the first call where the memory does not hold one row.

    Example:
        >>> step = CachedStep("auto", memory="20GiB")
        >>> loss = step(model, (view1, view2), criterion)
    """

    def __init__(self, micro_batch: int | str = "auto", memory: str | int | None = None, *, reserve: int = 0) -> None:
        self.auto = micro_batch == "auto"
        self.micro_batch: int | None = None if self.auto else check_micro_batch(micro_batch)
        self.memory = None if memory is None else parse_memory(memory)
        self.reserve = reserve

    def __call__(
        self,
        encoder: nn.Module | Sequence[nn.Module],
        views: Sequence[Tensor],
        loss: Callable[..., Tensor],
        *,
        scale: Callable[[Tensor], Tensor] | None = None,
        whole: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """As cached_step. `whole` computes the loss where the micro-batch covers the batch, if not as cached_step's
        docstring has it: SimCLR passes both views as one batch."""
        encoders, rows = _check(encoder, views, 1)
        if self.micro_batch is None:
            self.micro_batch = self._find(encoders, views, rows)
            held = "the whole batch" if self.micro_batch >= rows else f"micro_batch {self.micro_batch}"
            log.info("micro_batch=auto: %s of %d rows", held, rows)
        holders = [*encoders, *([loss] if isinstance(loss, nn.Module) else [])]
        while True:
            before = _State(holders, views) if self.auto else None
            watched = scale if before is None else functools.partial(before.keep_leaves, scale=scale)
            try:
                if whole is None or self.micro_batch < rows:
                    return cached_step(encoder, views, loss, self.micro_batch, scale=watched)
                value = whole()
                _backward_of_loss(value, watched)
                return value.detach()
            except Exception as error:
                tried = min(self.micro_batch, rows)
                half = max(-(-tried // 2), fewest_rows(rows, _least_rows(encoders)))
                if before is None or half >= tried or not out_of_memory(error) or rank_and_world()[1] > 1:
                    raise
            # Out of the handler, whose traceback holds the tensors of the failed step.
            self.micro_batch = half
            log.warning("out of memory with micro_batch=%d: the step begins again with %d", tried, self.micro_batch)
            before.restore()
            _release()

    def _find(self, encoders: list[nn.Module], views: Sequence[Tensor], rows: int) -> int:
        """The largest micro-batch whose peak, on the line through the measured ones, is within the budget, on each
        process. All take as many measurements: the encoder may hold operations of all of them."""
        device = _device(encoders[0], views[0])
        budget = (free_memory(device) if self.memory is None else self.memory) - self.reserve
        state, width, most = _State(encoders, views), 0, rows
        distinct = {id(own): (own, view) for own, view in zip(encoders, views, strict=True)}

        def embed(count: int) -> None:
            nonlocal width
            width = 0
            for own, view in distinct.values():
                with _no_sync(own):
                    z = _embed(own, view[:count])
                    width += z[0].numel() * z.element_size()
                    if z.requires_grad:
                        with _no_autocast():
                            torch.autograd.backward(z, torch.zeros_like(z))

        try:
            sizes, peaks, done = [0], [peak_memory(lambda: None, device)], False
            while not all(everyone(done)):
                size = sizes[-1] if done else min(max(4, 2 * sizes[-1]), rows)
                try:
                    peak = peak_memory(functools.partial(embed, size), device)
                except Exception as error:
                    if not out_of_memory(error) or not sizes[-1] or rank_and_world()[1] > 1:
                        raise
                    most = sizes[-1]
                    break
                sizes.append(size)
                peaks.append(peak)
                enough = peaks[-1] - peaks[0] > min(0.25 * (budget - peaks[0]), 2**30)
                done = done or sizes[-1] == rows or (enough and len(sizes) > 2)
        finally:
            state.restore()
            _release()
        if len(sizes) > 2:  # an empty batch has no gradients, and is off the line
            sizes, peaks = sizes[1:], peaks[1:]
        slope, start = np.polyfit(sizes, peaks, 1)
        slope = max(slope, 1)
        start += 2 * rows * width * len(views) // len(distinct)  # every embedding and its gradient
        fits, budget, start, slope = min(everyone((int(MARGIN * (budget - start) / slope), budget, start, slope)))
        if fits >= rows * len(views) and most == rows:
            return rows
        fewest = fewest_rows(rows, _least_rows(encoders))
        needed = fewest if fewest < rows else rows * len(views)
        if fits < needed:
            raise ValueError(
                f"memory: got {format_memory(budget + self.reserve)}, of which {format_memory(start + self.reserve)} "
                f"are taken by the model, its gradients and the embeddings, and {format_memory(slope)} by each row, "
                f"allowed: room for {needed} of them, the least that a batch of {rows} is cut into; raise it, or "
                "checkpoint the encoder's stages"
            )
        return min(fits, most, -(-rows // 2))


def checkpoint_stages(model: nn.Module) -> list[str]:
    """Keep the activations between a model's stages alone, and compute those within again in the backward, in place.

    A stage is a child of one of its outermost nn.Sequentials or nn.ModuleLists: a residual block of a ResNet, a block
    of a ViT. One more forward pass for the activations of one stage at a time (torch.utils.checkpoint); dropout is
    replayed, and buffers, such as running statistics and power iterations, are those that the first pass started from
    and move once. A model that has it already stays as it is. Beside fused norms: `accelerate(model, trace=False)`
    first, whose fused blocks stay fused.

    Returns:
        The names of the stages.

    Raises:
        ValueError: for a model without stages, or whose forward `accelerate` has rebuilt, which goes past them.

    Example:
        >>> checkpoint_stages(torchvision.models.resnet50())  # 16 names, layer1.0 to layer4.2
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {model!r}, allowed: an nn.Module")
    containers = [n for n, m in model.named_modules() if isinstance(m, (nn.Sequential, nn.ModuleList))]
    outermost = [n for n in containers if not any(n != o and (n.startswith(f"{o}.") or not o) for o in containers)]
    stages = {f"{n}.{c}".lstrip("."): m for n in outermost for c, m in model.get_submodule(n).named_children()}
    stages = {name: stage for name, stage in stages.items() if any(stage.children())}
    if not stages:
        raise ValueError(
            f"model: got {type(model).__name__}, allowed: one with an nn.Sequential or nn.ModuleList of stages; wrap "
            "its parts in torch.utils.checkpoint"
        )
    passed = passed_by(model)
    if past := [name for name, stage in stages.items() if stage in passed]:
        raise ValueError(
            f"model: got {type(model).__name__}, whose forward accelerate has rebuilt and which goes past the stages "
            f"{', '.join(past[:4])}{', ...' if past[4:] else ''}, allowed: one that calls its stages; take "
            "accelerate(model, trace=False), which fuses in place, and then checkpoint_stages(model)"
        )
    for stage in stages.values():
        if getattr(stage.forward, "func", None) is not _checkpointed:
            stage.forward = functools.partial(_checkpointed, stage, stage.forward)  # type: ignore[method-assign]
    return list(stages)


def _checkpointed(stage: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts = (contextlib.nullcontext(), _BuffersOf([stage]))
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: contexts, **kwargs)


def check_micro_batch(micro_batch: Any) -> int:
    hint = ", the rows of a view that the encoder sees at once; CachedStep and train also take 'auto'"
    return whole("micro_batch", micro_batch, hint=hint)


def _check(encoder: Any, views: Any, micro_batch: Any) -> tuple[list[nn.Module], int]:
    """The encoder of each view, and the rows of each."""
    check_micro_batch(micro_batch)
    if isinstance(views, Tensor) or not isinstance(views, Sequence) or not views:
        raise TypeError(f"views: got {type(views).__name__}, allowed: a list of tensors, such as (view1, view2)")
    for view in views:
        if not isinstance(view, Tensor) or view.dim() < 1:
            raise TypeError(f"views: got one that is {type(view).__name__}, allowed: tensors (N, ...)")
        if view.requires_grad and not view.is_leaf:
            raise ValueError(
                f"views: got one made by {type(view.grad_fn).__name__}, allowed: tensors without a history, through "
                "which each micro-batch would go back again; detach() it, or make it within the encoder"
            )
    lengths = [len(view) for view in views]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(f"views: got {lengths} rows, allowed: as many in each, and at least one")
    encoders = list(encoder) if isinstance(encoder, (list, tuple)) else [encoder] * len(views)
    if len(encoders) != len(views):
        raise ValueError(
            f"encoder: got {len(encoders)} modules for {len(views)} views, allowed: one module, or one for each view"
        )
    for own in encoders:
        if not isinstance(own, nn.Module):
            raise TypeError(
                f"encoder: got {type(own).__name__}, allowed: an nn.Module, whose buffers can be found and put back; "
                "make one of the parts by nn.Sequential"
            )
    return encoders, lengths[0]


def _embed(encoder: nn.Module, rows: Tensor) -> Tensor:
    z = encoder(rows.to(_device(encoder, rows), non_blocking=True))
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.dim() < 1 or len(z) != len(rows):
        got = f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(
            f"encoder: returned {got} for {len(rows)} rows, allowed: a floating-point tensor with a row for each; wrap "
            "it in a module that returns the embeddings alone"
        )
    return z


@contextlib.contextmanager
def _naming_micro_batch(micro_batch: int, rows: Tensor) -> Iterator[None]:
    """A row alone has no statistics, which batch norm says without a word of where it was cut from."""
    try:
        yield
    except ValueError as error:
        of_norms = ("more than 1 value per channel", "more than one value per channel")  # torch's, and ours
        if len(rows) > 1 or not any(words in str(error) for words in of_norms):
            raise
        raise _row_alone(micro_batch) from error


def _row_alone(micro_batch: int) -> ValueError:
    return ValueError(
        f"micro_batch: got {micro_batch}, which leaves a row alone, of which batch norm in training has no "
        "statistics, allowed: one that cuts the batch into parts of two rows and more; raise it, or use layer norm"
    )


def check_rows_of_head(head: nn.Module, rows: int, micro_batch: int | str | None) -> None:
    """Raise where a batch is cut so that batch norm of a head, of (N, features), would see a row alone. That of several
    processes sees the rows of all."""
    if not isinstance(micro_batch, int) or micro_batch >= rows or rank_and_world()[1] > 1:
        return
    if rows // -(-rows // micro_batch) == 1 and any(isinstance(m, nn.BatchNorm1d) for m in head.modules()):
        raise _row_alone(micro_batch)


def fewest_rows(rows: int, least: int) -> int:
    """The smallest micro-batch that cuts so many rows into parts of at least `least`; all of them where none does.
    Every larger one does too."""
    return next((size for size in range(least, -(-rows // 2) + 1) if rows // -(-rows // size) >= least), rows)


def _least_rows(encoders: Sequence[nn.Module]) -> int:
    """Of a micro-batch: batch norm in training takes its statistics from it."""
    return 1 + any(isinstance(m, _BatchNorm) and m.training for own in encoders for m in own.modules())


def _backward_of_loss(value: Any, scale: Callable[[Tensor], Tensor] | None) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss: returned {got}, allowed: a scalar tensor; reduce it by its mean or sum")
    if not value.requires_grad:
        raise ValueError(
            "loss: returned a tensor without gradient, allowed: one that depends on the embeddings; look for detach(), "
            "torch.no_grad() around the step, or an encoder without parameters that require a gradient"
        )
    with _no_autocast():
        (value if scale is None else scale(value)).backward()


@contextlib.contextmanager
def _no_sync(encoder: nn.Module) -> Iterator[None]:
    """No reduction between processes: of DistributedDataParallel, and of what else goes by its name for it."""
    with contextlib.ExitStack() as stack:
        for module in encoder.modules():
            if callable(quiet := getattr(module, "no_sync", None)):
                stack.enter_context(quiet())
        yield


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """A backward has its dtypes from the forward."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def _device(encoder: nn.Module, rows: Tensor) -> torch.device:
    return next((p.device for p in encoder.parameters()), rows.device)


def _devices(encoders: Sequence[nn.Module]) -> set[torch.device]:
    """The GPUs that the encoders are on."""
    return {p.device for own in encoders for p in own.parameters() if p.device.type == "cuda"}


def _release() -> None:
    """What a try has left: tensors in cycles, weights that autocast keeps, memory that the GPU's allocator keeps."""
    gc.collect()
    torch.clear_autocast_cache()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Generators:
    """The states of the generators that a forward pass may draw from."""

    def __init__(self, devices: set[torch.device]) -> None:
        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for device, state in self.cuda:
            torch.cuda.set_rng_state(state, device)


class _Buffers:
    """The buffers of all modules in training: running statistics, power iterations, queues. In eval mode none moves."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        training = {module for root in modules for module in root.modules() if module.training}
        own = [(m, name, b) for m in training for name, b in m._buffers.items() if b is not None]
        self.saved = [(module, name, buffer, buffer.detach().clone()) for module, name, buffer in own]

    @torch.no_grad()
    def restore(self) -> None:
        for module, name, buffer, value in self.saved:
            module._buffers[name] = buffer.copy_(value)


class _BuffersOf:
    """In whose block buffers are those of when it was made, and move for nothing; it may be entered again."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules, self.first = modules, _Buffers(modules)

    def __enter__(self) -> None:
        self.before = _Buffers(self.modules)
        self.first.restore()

    def __exit__(self, *error: Any) -> None:
        self.before.restore()


class _State:
    """Buffers, generators and gradients: all that a step changes."""

    def __init__(self, modules: Sequence[nn.Module], views: Sequence[Tensor] = ()) -> None:
        self.buffers, self.generators = _Buffers(modules), _Generators(_devices(modules))
        self.gradients: dict[int, tuple[weakref.ref[Tensor], Tensor | None]] = {}
        self._keep(p for module in modules for p in module.parameters())
        self._keep(views)

    def _keep(self, tensors: Iterable[Tensor]) -> None:
        for x in tensors:
            if x.requires_grad and id(x) not in self.gradients:
                self.gradients[id(x)] = weakref.ref(x), None if x.grad is None else x.grad.clone()

    def keep_leaves(self, value: Tensor, scale: Callable[[Tensor], Tensor] | None) -> Tensor:
        """value, by its scale, once the gradients are kept of what it was made of: a loss may be a function that knows
        of parameters. Embeddings among it do not live longer by that."""
        nodes, seen, leaves = [value.grad_fn], set(), []
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [following for following, _ in node.next_functions]
                leaves += [node.variable] if isinstance(node, torch._C._functions.AccumulateGrad) else []
        self._keep(leaves)
        return value if scale is None else scale(value)

    def restore(self) -> None:
        self.buffers.restore()
        self.generators.restore()
        for kept, gradient in self.gradients.values():
            if (x := kept()) is not None:
                x.grad = gradient
