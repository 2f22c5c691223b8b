"""Rows of all the processes of torch.distributed; of one process where it is not in use."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssl_fast._checks import check_flags

Strategy = Literal["gather", "ring"]
Visit = Callable[..., list[Tensor]]
Function = TypeVar("Function", bound=Callable[..., Any])
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(x: Tensor) -> Tensor:
    """(ranks * N, ...), the x of every rank in their order, without gradient; as many rows on each."""
    _, world = rank_and_world()
    if world == 1:
        return x.detach()
    parts = torch.empty((world, *x.shape), dtype=x.dtype, device=x.device)
    dist.all_gather(list(parts.unbind()), x.detach().contiguous())
    return parts.flatten(0, 1)


def everyone(thing: Any) -> list[Any]:
    """What each process has, on each."""
    _, world = rank_and_world()
    things = [thing] * world
    if world > 1:
        dist.all_gather_object(things, thing)
    return things


def shared_permutation(n: int, device: torch.device) -> Tensor:
    """A random order of n rows, the same on every rank."""
    order = torch.randperm(n, device=device)
    if rank_and_world()[1] > 1:
        dist.broadcast(order, 0)
    return order


# ---- the batch of a loss


def share(z: Tensor, group: Any, strategy: str, **agreed: bool) -> Ranks | None:
    """How the rows z (N, D) of all the processes of a group lie; None where there is no group. `agreed` is what all
    must say alike, as the tensors that they exchange follow from it."""
    return None if group is None else Ranks(z, group, strategy, **agreed)


def check_strategy(strategy: object) -> None:
    if strategy not in ("gather", "ring"):
        raise ValueError(f"strategy: got {strategy!r}, allowed: 'gather', 'ring'")


def processes(gather_distributed: bool, group: Any, strategy: str) -> Any:
    """The process group that shares a loss's batch; None where this process is alone with it."""
    check_strategy(strategy)
    check_flags(gather_distributed=gather_distributed)
    strange = group is not None and dist.is_available() and not isinstance(group, dist.ProcessGroup)
    if strange and group != dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(f"group: got {group!r}, allowed: what torch.distributed.new_group returns, or None for all")
    if not (gather_distributed or group is not None) or not (dist.is_available() and dist.is_initialized()):
        return None
    if dist.get_rank(group) < 0:
        raise ValueError("group: got a group that this process is not in, allowed: one of its own, or None for all")
    if dist.get_world_size(group) == 1:
        return None
    return dist.group.WORLD if group is None else group


def count_processes(group: Any) -> int:
    """How many processes a group has; None is all."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _answered(method: Function) -> Function:
    """A method that says what a process's silence or end means to the others."""

    @functools.wraps(method)
    def run(self: Ranks, *args: Any) -> Any:
        with self.answered():
            return method(self, *args)

    return cast(Function, run)


class Ranks:
    """A batch whose rows lie on the processes of a group: how many on each, and the ways that rows go.

    Every process makes one from its own rows z (N, D) at the same point of the program; N may differ, and be 0.

    Attributes:
        rank, world: this process's number in the group, and how many there are.
        counts: the rows of each.
        total, first: all rows, and the number of this process's first among them.
    """

    def __init__(self, z: Tensor, group: Any, strategy: str, **agreed: bool) -> None:
        self.group, self.strategy = group, strategy
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        agreed |= {"strategy='ring'": strategy == "ring"}
        facts = torch.tensor([[len(z), z.shape[1], _DTYPES.index(z.dtype), *agreed.values()]], device=z.device)
        everyone = facts.new_empty(self.world, facts.shape[1])
        with self.answered():
            dist.all_gather(list(everyone.split(1)), facts, group)
        counts, widths, dtypes, *answers = everyone.T.tolist()
        for name, said in zip(agreed, answers, strict=True):
            if len(set(said)) > 1:
                ranks = [rank for rank, yes in enumerate(said) if yes]
                raise ValueError(
                    f"{name}: got it on ranks {ranks} of 0 to {self.world - 1} alone, allowed: on all or on none; "
                    "call the loss alike on every process, one without rows with torch.empty(0, D, requires_grad=True)"
                )
        if len(set(widths)) > 1:
            raise ValueError(
                f"D: got embeddings of {widths} columns on ranks 0 to {self.world - 1}, allowed: one width"
            )
        if len(set(dtypes)) > 1:
            names = ", ".join(str(_DTYPES[d]) for d in dtypes)
            raise TypeError(
                f"dtype: got {names} on ranks 0 to {self.world - 1}, allowed: the same; cast the embeddings"
            )
        self.counts = counts
        self.total, self.first = sum(counts), sum(counts[: self.rank])
        if self.total == 0:
            raise ValueError(
                f"embeddings: got an empty batch on all {self.world} processes, allowed: a row on at least one; skip "
                "the step on each"
            )

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Say what it means where another process is gone."""
        try:
            yield
        except torch.OutOfMemoryError:  # this one's own, for what it allocates on the way
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"gather_distributed: rank {self.rank} of {self.world} got no answer, allowed: every process of the "
                "group in the same loss, and in its backward, within the group's time-out; another one has ended or "
                f"failed: look for the first error among them ({error})"
            ) from error

    # ---- all at once

    @_answered
    def gather(self, x: Tensor) -> Tensor:
        """(total, ...), the rows x (N, ...) of every rank in their order."""
        longest = max(self.counts)
        own = x.detach().new_zeros(longest, *x.shape[1:])
        own[: len(x)] = x.detach()
        parts = own.new_empty(self.world, *own.shape)
        # As bytes: not every backend knows every dtype.
        dist.all_gather([_as_bytes(part) for part in parts], _as_bytes(own), self.group)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    @_answered
    def scatter_sum(self, x: Tensor) -> Tensor:
        """(N, ...), this rank's rows of the sum over ranks of x (total, ...)."""
        longest = max(self.counts)
        padded = x.new_zeros(self.world, longest, *x.shape[1:])
        for part, rows in zip(padded, x.split(self.counts), strict=True):
            part[: len(rows)] = rows
        own = x.new_empty(longest, *x.shape[1:])
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1), group=self.group)
        return own[: self.counts[self.rank]]

    @_answered
    def swap(self, x: Tensor) -> Tensor:
        """(world, N, ...): what each rank's x (total, ...) says of this rank's rows."""
        own = self.counts[self.rank]
        parts = x.new_empty(self.world, own, *x.shape[1:])
        dist.all_to_all_single(parts.flatten(0, 1), x.contiguous(), [own] * self.world, self.counts, self.group)
        return parts

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x, of one shape, over ranks. Its gradient is that of the sum over ranks of what follows."""
        return _Sum.apply(x, self)

    @_answered
    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self.group)
        return x

    # ---- by turns

    def meet(
        self, blocks: Sequence[Tensor | None], visit: Visit, merge: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """Let this rank's rows meet the rows of every rank, by the strategy.

        visit(diagonal, *blocks) gets rows (K, ...) of blocks and returns what they are owed, tensors (K, ...); where
        this rank's own are among them, the first is at `diagonal`, else it is None. `merge` adds two of what rows are
        owed; None: sums.

        Returns:
            What this rank's rows are owed by all.
        """
        if self.strategy == "ring":
            return self.ring(blocks, lambda ahead, *rows: visit(None if ahead else 0, *rows), merge, self.world)
        owed = visit(self.first, *(None if x is None else self.gather(x) for x in blocks))
        if merge is None:
            return [self.scatter_sum(x) for x in owed]
        return [functools.reduce(merge, self.swap(x)) for x in owed]

    def ring(
        self,
        blocks: Sequence[Tensor | None],
        visit: Visit,
        merge: Callable[[Tensor, Tensor], Tensor] | None,
        turns: int,
    ) -> list[Tensor]:
        """At turn k this rank has the blocks of rank + k: visit(k, *blocks). The next are on their way meanwhile.

        What a block's rows are owed follows it one turn behind, and goes home from the last.
        """
        merge = merge or torch.add
        arriving: Callable[[], list[Tensor]] = list
        for k in range(turns):
            last = k + 1 == turns
            following = self._shift([] if last else blocks, k, 1)
            owed = visit(k, *blocks)
            if k:
                owed = [merge(*pair) for pair in zip(arriving(), owed, strict=True)]
            arriving = self._shift(owed, k, 1 - turns if last else 1)
            blocks = following()
        return arriving()

    @_answered
    def _shift(self, blocks: Sequence[Tensor | None], k: int, distance: int) -> Callable[[], list[Any]]:
        """Start to send blocks (of rank + k) `distance` ranks back, and to receive those from as far ahead."""
        to, source = ((self.rank + step) % self.world for step in (-distance, distance))
        rows = self.counts[(source + k) % self.world]
        sent = [None if x is None else x.contiguous() for x in blocks]
        received = [None if x is None else x.new_empty(rows, *x.shape[1:]) for x in sent]
        operations = []
        for tensors, operation, peer in ((sent, dist.isend, to), (received, dist.irecv, source)):
            peer = dist.get_global_rank(self.group, peer)
            operations += [dist.P2POp(operation, x, peer, self.group) for x in tensors if x is not None and x.numel()]
        works = dist.batch_isend_irecv(operations) if operations else []

        def arrived() -> list[Any]:
            with self.answered():
                for work in works:
                    work.wait()
            sent.clear()  # kept until it has left
            return received

        return arrived


def _as_bytes(x: Tensor) -> Tensor:
    return x.flatten().view(torch.uint8)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.ranks.all_reduce(grad), None


# ---- a run of several processes


class _Zero(nn.Module):
    """0, by way of every parameter of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self) -> Tensor:
        return torch.stack([p.sum() * 0 for p in self.network.parameters() if p.requires_grad]).sum()


class Team:
    """The processes of one run: those that torchrun has started, or that share a process group already; else this one.

    Attributes:
        rank, world: this process's number, and how many there are.
        device: what this process computes on; for "auto" and "cuda" the GPU of its number on the machine.
        leads: whether it is the one that writes.
    """

    def __init__(self, device: Callable[[str], torch.device], name: str) -> None:
        local = os.environ.get("LOCAL_RANK")
        if local is not None and name in ("auto", "cuda") and torch.cuda.is_available():
            name = f"cuda:{local}"
        self.device = device(name)
        self.started = False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available() and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            store, rank, world = next(dist.rendezvous("env://"))
            # torchrun keeps one store for all its attempts: one that is started again would find dead addresses there.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            kind = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(kind, store=store, rank=rank, world_size=world)
            self.started = True
            if "TORCHELASTIC_RUN_ID" in os.environ:
                _end_with_the_launcher()
        self.rank, self.world = rank_and_world()
        self.leads, self.checked = self.rank == 0, False

    def share(self, batch_size: int) -> int:
        """Images a step on each process."""
        if batch_size % self.world:
            raise ValueError(
                f"batch_size: got {batch_size} on {self.world} processes, allowed: a multiple of {self.world}, as each "
                "brings as many images"
            )
        return batch_size // self.world

    def wrap(self, network: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over processes."""
        if self.world == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():  # of the newer name of an argument
            warnings.simplefilter("ignore", FutureWarning)
            model = nn.parallel.DistributedDataParallel(network, devices, broadcast_buffers=False)
        # After its first backward it arranges its buckets anew, and a sum over more than two processes is rounded by
        # its place in them: the first step of a resumed run would differ in bits. So that backward is one of zeros.
        model.module = _Zero(network)
        model().backward()
        model.module = network
        network.zero_grad(set_to_none=True)
        return model

    def check_gradients(self, network: nn.Module) -> None:
        """Raise after the first backward of a model whose gradients `wrap` could not average all."""
        if self.world == 1 or self.checked:
            return
        self.checked = True
        without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            raise ValueError(
                f"model: got parameters that its output does not depend on ({', '.join(without[:4])}), allowed on "
                "several processes: none, as each waits for the others' gradients; remove them, or call "
                "requires_grad_(False) on them"
            )

    @torch.no_grad()
    def average_gradients(self, network: nn.Module) -> None:
        """As `wrap` does, after a step whose forward did not pass through it."""
        if self.world > 1:
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            flat = self.mean(torch.cat([g.flatten() for g in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def mean(self, x: Tensor) -> Tensor:
        x = x.detach().clone()
        if self.world > 1:
            dist.all_reduce(x)
        return x / self.world

    def any(self, here: bool) -> bool:
        """Whether it is so on any process."""
        return here if self.world == 1 else self.mean(torch.tensor(float(here), device=self.device)).item() > 0

    def share_buffers(self, network: nn.Module) -> None:
        """Give each process the leader's, such as running statistics where each has its own."""
        if self.world > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Let the leader run a block, and then the others."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Take down the group that this has started."""
        if self.started and dist.is_initialized():
            dist.destroy_process_group()


def _end_with_the_launcher() -> None:
    """Where torchrun itself is killed its processes would go on, and write beside those that take their place. Linux
    can end them with it; elsewhere they are left."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
