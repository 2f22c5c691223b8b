"""The losses over groups of one, two and four processes against one process with the whole batch, in dense fp64."""

from __future__ import annotations

import datetime
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import assert_close, error
from processes import finish, start
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import ssl_fast
from ssl_fast import BarlowTwinsLoss, CLIPLoss, InfoNCE, NTXentLoss, SupConLoss
from ssl_fast._distributed import Ranks
from ssl_fast.functional import barlow_twins, clip, info_nce, nt_xent, sup_con
from ssl_fast.optim import LARS, parameter_groups

D, K = 6, 9
COUNTS = {1: [(7,)], 2: [(5, 2), (0, 6), (3, 3)], 4: [(3, 1, 0, 4)]}
STRATEGIES = ("gather", "ring")


@dataclass
class Batch:
    """The images of all processes or of one, with what a loss may ask for beside their embeddings."""

    x1: Tensor
    x2: Tensor
    labels: Tensor
    weight: Tensor
    queue: Tensor
    first: int = 0

    @staticmethod
    def whole(n: int, dtype: torch.dtype = torch.float64, width: int = D) -> Batch:
        generator = torch.Generator().manual_seed(n)
        x1, x2 = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (n,), generator=generator)
        weight = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
        queue = torch.randn(K, width, generator=generator, dtype=torch.float64)
        return Batch(x1.to(dtype), (x1 + x2).to(dtype), labels, weight.to(dtype), queue.to(dtype))

    def of(self, counts: tuple[int, ...], rank: int) -> Batch:
        first = sum(counts[:rank])
        rows = slice(first, first + counts[rank])
        return Batch(self.x1[rows], self.x2[rows], self.labels[rows], self.weight[rows], self.queue, first)


# ---- the losses as anyone writes them, of a whole batch


def unit(z: Tensor) -> Tensor:
    return F.normalize(z)


def cross_entropy(pos: Tensor, negatives: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    """Of (N,) positives and (N, M) negatives, -inf where there is none."""
    logits = torch.cat([pos[:, None], negatives], 1)
    loss = F.cross_entropy(logits, torch.zeros(len(pos), dtype=torch.long), reduction="none", **options)
    return loss.mean() if weight is None else (loss * weight).sum() / weight.sum()


def dense_nt_xent(a: Tensor, b: Tensor, t: Tensor, ids: Tensor | None = None, **options: Any) -> Tensor:
    z = unit(torch.cat([a, b]))
    ids = (torch.arange(len(a)) if ids is None else ids).repeat(2)
    s = z @ z.T / t
    pos = s.diagonal(len(a)).repeat(2)
    if options.get("label_smoothing"):
        keep = ids[:, None] != ids
        return cross_entropy(pos, s[keep].view(len(z), -1), **options)
    return cross_entropy(pos, s.masked_fill(ids[:, None] == ids, -torch.inf), **options)


def dense_info_nce(a: Tensor, b: Tensor, t: Tensor, queue: Tensor | None = None, in_batch: bool = False) -> Tensor:
    a, b = unit(a), unit(b)
    s = a @ b.T / t
    parts = [s.masked_fill(torch.eye(len(a), dtype=torch.bool), -torch.inf)] if in_batch else []
    parts += [] if queue is None else [a @ unit(queue).T / t]
    return cross_entropy(s.diagonal(), torch.cat(parts, 1))


def dense_clip(a: Tensor, b: Tensor, t: Tensor, ids: Tensor | None = None, **options: Any) -> Tensor:
    s = unit(a) @ unit(b).T / t
    ids = torch.arange(len(a)) if ids is None else ids
    eye = torch.eye(len(a), dtype=torch.bool)
    s = s.masked_fill((ids[:, None] == ids) & ~eye, -torch.inf)
    losses = [F.cross_entropy(x, torch.arange(len(a)), reduction="none", **options) for x in (s, s.T)]
    return (losses[0] + losses[1]).mean() / 2


def dense_sup_con(z: Tensor, labels: Tensor, t: Tensor, weight: Tensor | None = None) -> Tensor:
    s = (unit(z) @ unit(z).T / t).fill_diagonal_(-torch.inf)
    alike = (labels[:, None] == labels).fill_diagonal_(False)
    has = alike.any(1)
    loss = -(s.log_softmax(1).masked_fill(~alike, 0).sum(1)[has] / alike.sum(1)[has])
    return loss.mean() if weight is None else (loss * weight[has]).sum() / weight[has].sum()


# ---- the losses of this package, and their oracle, of (z1, z2, t, batch)

Loss = Callable[..., Tensor]
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "NT-Xent": (
        lambda a, b, t, batch, **over: NTXentLoss(t, **over)(a, b),
        lambda a, b, t, batch: dense_nt_xent(a, b, t),
    ),
    "NT-Xent, groups and weights": (
        lambda a, b, t, batch, **over: nt_xent(a, b, t, group_ids=batch.labels, sample_weight=batch.weight, **over),
        lambda a, b, t, batch: dense_nt_xent(a, b, t, batch.labels, weight=batch.weight.repeat(2)),
    ),
    "NT-Xent, smoothed": (
        lambda a, b, t, batch, **over: nt_xent(a, b, t, label_smoothing=0.2, **over),
        lambda a, b, t, batch: dense_nt_xent(a, b, t, label_smoothing=0.2),
    ),
    "NT-Xent, debiased": (
        lambda a, b, t, batch, **over: nt_xent(a, b, t, tau_plus=0.1, group_ids=batch.labels, **over),
        lambda a, b, t, batch: nt_xent(a, b, t, tau_plus=0.1, group_ids=batch.labels),
    ),
    "NT-Xent, sum": (
        lambda a, b, t, batch, **over: nt_xent(a, b, t, reduction="sum", **over),
        lambda a, b, t, batch: dense_nt_xent(a, b, t) * 2 * len(a),
    ),
    "InfoNCE with a queue": (
        lambda a, b, t, batch, **over: InfoNCE(t, **over)(a, b, batch.queue),
        lambda a, b, t, batch: dense_info_nce(a, b, t, batch.queue),
    ),
    "InfoNCE with a queue, in the batch": (
        lambda a, b, t, batch, **over: info_nce(a, b, batch.queue, t, in_batch=True, **over),
        lambda a, b, t, batch: dense_info_nce(a, b, t, batch.queue, True),
    ),
    "InfoNCE, keys without gradient": (
        lambda a, b, t, batch, **over: info_nce(a, b.detach(), None, t, **over),
        lambda a, b, t, batch: dense_info_nce(a, b.detach(), t, None, True),
    ),
    "InfoNCE, smoothed": (
        lambda a, b, t, batch, **over: info_nce(a, b, None, t, label_smoothing=0.3, **over),
        lambda a, b, t, batch: info_nce(a, b, None, t, label_smoothing=0.3),
    ),
    "InfoNCE, debiased with groups": (
        lambda a, b, t, batch, **over: info_nce(a, b, None, t, tau_plus=0.1, group_ids=batch.labels, **over),
        lambda a, b, t, batch: info_nce(a, b, None, t, tau_plus=0.1, group_ids=batch.labels),
    ),
    "CLIP": (
        lambda a, b, t, batch, **over: CLIPLoss(**over)(unit(a), unit(b), 1 / t),
        lambda a, b, t, batch: dense_clip(a, b, t),
    ),
    "CLIP, smoothed": (
        lambda a, b, t, batch, **over: clip(a, b, 1 / t, normalize=True, label_smoothing=0.1, **over),
        lambda a, b, t, batch: dense_clip(a, b, t, label_smoothing=0.1),
    ),
    "CLIP with groups": (
        lambda a, b, t, batch, **over: clip(a, b, 1 / t, normalize=True, group_ids=batch.labels, **over),
        lambda a, b, t, batch: dense_clip(a, b, t, batch.labels),
    ),
    "CLIP, debiased with groups": (
        lambda a, b, t, batch, **over: clip(a, b, 1 / t, tau_plus=0.1, group_ids=batch.labels, **over),
        lambda a, b, t, batch: clip(a, b, 1 / t, tau_plus=0.1, group_ids=batch.labels),
    ),
    "SupCon, decoupled": (
        lambda a, b, t, batch, **over: sup_con(a, batch.labels, t, decoupled=True, **over),
        lambda a, b, t, batch: sup_con(a, batch.labels, t, decoupled=True),
    ),
    "SupCon": (
        lambda a, b, t, batch, **over: SupConLoss(t, **over)(a + b, batch.labels),
        lambda a, b, t, batch: dense_sup_con(a + b, batch.labels, t),
    ),
    "SupCon, weighted": (
        lambda a, b, t, batch, **over: sup_con(a, batch.labels, t, sample_weight=batch.weight, **over),
        lambda a, b, t, batch: dense_sup_con(a, batch.labels, t, batch.weight),
    ),
    "SupCon of views": (
        lambda a, b, t, batch, **over: sup_con(torch.stack([a, b], 1), None, t, **over),
        lambda a, b, t, batch: dense_nt_xent(a, b, t),
    ),
}


def dense_barlow_twins(a: Tensor, b: Tensor) -> Tensor:
    a, b = (F.batch_norm(z, None, None, training=True) for z in (a, b))
    C = a.T @ b / len(a)
    on = C.diagonal()
    return (1 - on).square().sum() + 0.1 * (C - on.diag()).square().sum()


for what, width in (("columns", 5), ("rows", 5 * 8)):
    LOSSES[f"Barlow Twins by {what}"] = (
        lambda a, b, t, batch, width=width, **over: BarlowTwinsLoss(0.1, **over)(*widened(a, b, t, width)),
        lambda a, b, t, batch, width=width: dense_barlow_twins(*widened(a, b, t, width)),
    )


def widened(a: Tensor, b: Tensor, t: Tensor, width: int) -> list[Tensor]:
    """Columns that are not linear in each other, so that wide ones have something to correlate."""
    return [torch.cat([torch.sin((k + 1) * z + k * t) for k in range(width // 5)], 1) for z in (a, b)]


class Model(nn.Module):
    """An encoder and a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(D, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 5)).double()
        self.log_t = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z1, z2 = self.encoder(x1), self.encoder(x2)
        return z1, z2, self.log_t.exp()


def step(model: nn.Module, loss: Loss, batch: Batch, **over: Any) -> dict[str, Any]:
    """The loss, and its gradients for z1, z2, the encoder's weights and the temperature."""
    model.zero_grad()
    a, b, t = model(batch.x1, batch.x2)
    for z in (a, b):
        z.retain_grad()
    value = loss(a, b, t, queue_of(model, batch), **over)
    value.backward()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    weights = torch.cat([p.grad.flatten() for p in inner.encoder.parameters()])
    grads = [torch.zeros_like(z) if z.grad is None else z.grad for z in (a, b)]
    temperature = inner.log_t.grad.clone()
    return {"loss": value.detach(), "embeddings": grads, "encoder": weights, "temperature": temperature}


def queue_of(model: nn.Module, batch: Batch) -> Batch:
    width = 5
    return Batch(batch.x1, batch.x2, batch.labels, batch.weight, batch.queue[:, :width], batch.first)


def curve(build: Callable[[], nn.Module], counts: tuple[int, ...], rank: int | None) -> Tensor:
    """The losses of 20 steps with LARS, of the rows of a process or of all."""
    torch.manual_seed(1)
    network = build().double()
    wrapped: nn.Module = network
    if rank is not None:
        wrapped = DistributedDataParallel(network)
        ssl_fast.convert_sync_batchnorm(network)
    optimizer = LARS(parameter_groups(network, 1e-6), lr=0.5, eta=0.05)
    losses = []
    for k in range(20):
        whole = Batch.whole(sum(counts) + 100 * k)
        whole.x1, whole.x2 = whole.x1[: sum(counts)], whole.x2[: sum(counts)]
        batch = whole if rank is None else whole.of(counts, rank)
        loss = wrapped(batch.x1, batch.x2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 12))


CURVES: dict[str, Callable[[], nn.Module]] = {
    "SimCLR": lambda: ssl_fast.SimCLR(encoder(), 12, 8, temperature=0.2),
    "Barlow Twins by columns": lambda: ssl_fast.BarlowTwins(encoder(), 12, 16, 0.02),
    "Barlow Twins by rows": lambda: ssl_fast.BarlowTwins(encoder(), 12, 64, 0.02),
}


# ---- in the processes


def worker(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    results: dict[Any, Any] = {}
    model = DistributedDataParallel(Model())
    for counts in COUNTS[world]:
        batch = Batch.whole(sum(counts)).of(counts, rank)
        for name, (loss, _) in LOSSES.items():
            for strategy in STRATEGIES:
                over = {"gather_distributed": True, "strategy": strategy}
                results[counts, name, strategy] = step(model, loss, batch, **over)
    timed, mortal = (dist.new_group(timeout=datetime.timedelta(seconds=s)) for s in (2, 30))
    if world > 1:
        results["dtypes"] = {key: of_dtype(*key, rank) for key in DTYPE_CASES}
        results["others"] = others(rank, world)
    if world == 2:
        rows = slice(SIZES[2][0] * rank, SIZES[2][0] + SIZES[2][1] * rank)
        results["cone"] = {
            (name, way): gradients(ours, cone(learned, torch.bfloat16, rows), gather_distributed=True, strategy=way)
            for name, (ours, _, learned) in IN_A_CONE.items()
            for way in STRATEGIES
        }
        results["curves"] = {name: curve(build, (8, 8), rank) for name, build in CURVES.items()}
        results["silent"] = silent(rank, world, timed, mortal)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(results))
    if world == 2:
        os._exit(0)  # as a killed process would: the group is not taken down together
    dist.barrier()
    dist.destroy_process_group()


SIZES = {2: (211, 70), 4: (100, 3, 0, 130)}
DTYPE_CASES = [
    (name, dtype, strategy)
    for name in ("NT-Xent", "InfoNCE with a queue, in the batch", "CLIP", "SupCon")
    for dtype in (torch.float32, torch.bfloat16)
    for strategy in STRATEGIES
]


def of_dtype(name: str, dtype: torch.dtype, strategy: str, rank: int) -> list[Tensor]:
    """The loss and the gradients of embeddings alone, by the backend that is chosen for the dtype."""
    counts = SIZES[dist.get_world_size()]
    batch = Batch.whole(sum(counts), dtype, 33).of(counts, rank)
    a, b = batch.x1.requires_grad_(), batch.x2.requires_grad_()
    t = torch.tensor(0.2, requires_grad=True)
    loss = LOSSES[name][0](a, b, t, batch, gather_distributed=True, strategy=strategy)
    loss.backward()
    return [loss.detach(), a.grad, torch.zeros_like(a) if b.grad is None else b.grad, t.grad]


# Ours, as anyone writes it, and whether b learns.
IN_A_CONE: dict[str, tuple[Loss, Loss, bool]] = {
    "CLIP": (
        lambda a, b, **over: clip(a, b, 10.0, **over),
        lambda a, b: (of_rows(a, b) + of_rows(b, a)) / 2,
        True,
    ),
    "InfoNCE": (
        lambda a, b, **over: info_nce(a, b, None, 0.1, normalize=False, **over),
        lambda a, b: of_rows(a, b),
        True,
    ),
    "InfoNCE of given keys": (
        lambda a, b, **over: info_nce(a, b, None, 0.1, normalize=False, **over),
        lambda a, b: of_rows(a, b),
        False,
    ),
}


def of_rows(a: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a)))


def cone(learned: bool, dtype: torch.dtype, rows: slice = slice(None)) -> list[Tensor]:
    """Unit rows that are nearly one, as every network has them at first, rounded to bf16."""
    axis, *x = torch.randn(1 + 2 * sum(SIZES[2]), 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = (unit(axis + 0.05 * part)[rows].bfloat16().to(dtype) for part in torch.stack(x).chunk(2))
    return [a.requires_grad_(), b.requires_grad_(learned)]


def gradients(loss: Loss, x: list[Tensor], **over: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss(*x, **over), [z for z in x if z.requires_grad]))


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def others(rank: int, world: int) -> dict[str, Any]:
    """Groups, memory banks, queues, errors."""
    found: dict[str, Any] = {}
    groups = [dist.new_group([r]) for r in range(world)]
    pair = dist.new_group([0, world - 1])
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))
    found["alone"] = torch.equal(nt_xent(z, z.flip(0), group=groups[rank]), nt_xent(z, z.flip(0)))
    if rank in (0, world - 1):
        found["pair"] = nt_xent(z, z.flip(0), group=pair, strategy="ring")
    else:
        found["outside"] = message(lambda: nt_xent(z, z, group=pair))
    rows = nt_xent(z, z.flip(0), gather_distributed=True, reduction="none", return_lse=True)
    found["rows"] = [x.detach() for x in rows]
    torch.manual_seed(rank)  # as those may who want other augmentations on each
    bank = NTXentLoss(0.1, memory_bank_size=(7, 4), gather_distributed=True)
    found["bank before"] = bank.memory_bank.keys.clone()
    with torch.no_grad():
        bank.memory_bank.keys.copy_(torch.ones(7, 4))
    uneven = z[: rank % 3].requires_grad_()
    found["bank loss"] = bank(uneven, uneven.detach()).detach()
    found["bank"] = bank.memory_bank.keys.clone()
    found["bank pointer"] = bank.memory_bank.pointer.item()
    found["empty"] = message(lambda: nt_xent(z[:0], z[:0], gather_distributed=True))
    found["width"] = message(lambda: nt_xent(z[:, : 3 + rank % 2], z[:, : 3 + rank % 2], gather_distributed=True))
    trained = z.clone().requires_grad_()
    some = trained if rank else z[:0]
    found["gradient"] = message(lambda: nt_xent(some, some, gather_distributed=True))
    ids = None if rank else torch.arange(3)
    found["ids"] = message(lambda: nt_xent(trained, trained, gather_distributed=True, group_ids=ids))
    way = "gather" if rank else "ring"
    found["way"] = message(lambda: nt_xent(trained, trained, gather_distributed=True, strategy=way))
    keys = trained if rank else z
    found["keys"] = message(lambda: info_nce(trained, keys, gather_distributed=True, in_batch=True))
    views = (trained, z) if rank else (z, trained)
    found["views"] = message(lambda: barlow_twins(*views, gather_distributed=True))
    mixed = z.double() if rank else z
    found["dtype"] = message(lambda: clip(mixed, mixed, 10.0, gather_distributed=True))
    found["world size"] = message(lambda: CLIPLoss(world_size=world + 1)(z, z, 10.0))
    found["clip"] = CLIPLoss(world_size=world)(z, z, 10.0)
    return found


def silent(rank: int, world: int, timed: Any, mortal: Any) -> dict[str, Any]:
    """The last rank leaves out a loss, and then ends in place of a backward; what that is to the others."""
    z = torch.randn(3, 4, requires_grad=True)
    missing = rank == world - 1
    found = {}
    begin = time.monotonic()
    if not missing:
        found["silent"] = message(lambda: nt_xent(z, z * 2, group=timed, strategy="ring")), time.monotonic() - begin
    loss = nt_xent(z, z * 2, group=mortal)
    if not missing:
        begin = time.monotonic()
        found["dead"] = message(loss.backward), time.monotonic() - begin
    return found


# ---- the tests


def of(*worlds):
    """On so many processes alone."""
    return pytest.mark.parametrize(
        "processes", worlds, indirect=True, scope="module", ids=lambda world: f"{world} processes"
    )


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda world: f"{world} processes")
def processes(request, tmp_path_factory):
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    if world == 1:
        threads = torch.get_num_threads()
        worker(0, 1, folder)
        torch.set_num_threads(threads)
    else:
        finish([start(folder, f"rank{rank}", worker, rank, world, folder) for rank in range(world)])
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]


def check(name: str, value: Tensor, truth: Tensor, tolerance: float = 1e-9) -> None:
    """Ratio and cosine of a gradient beside the true one."""
    value, truth = value.double().flatten(), truth.double().flatten()
    if truth.norm() < 1e-12:
        assert value.norm() < 1e-12, name
        return
    ratio = (value @ truth / (truth @ truth)).item()
    cosine = (value @ truth / (value.norm() * truth.norm())).item()
    assert abs(ratio - 1) < tolerance and 1 - cosine < tolerance, f"{name}: ratio {ratio}, cosine {cosine}"
    assert (value - truth).norm() <= tolerance * truth.norm(), name


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_one_process(processes, name):
    world = len(processes)
    for counts in COUNTS[world]:
        truth = step(Model(), LOSSES[name][1], Batch.whole(sum(counts)))
        for strategy in STRATEGIES:
            what = f"{name}, {strategy}, {counts}"
            ranks = [found[counts, name, strategy] for found in processes]
            loss = torch.stack([r["loss"] for r in ranks]).mean()
            torch.testing.assert_close(loss, truth["loss"], rtol=1e-12, atol=1e-12)
            for k in range(2):
                embeddings = torch.cat([r["embeddings"][k] for r in ranks]) / world
                check(f"{what}: z{k + 1}", embeddings, truth["embeddings"][k])
            for r in ranks:
                check(f"{what}: encoder", r["encoder"], truth["encoder"])
                check(f"{what}: temperature", r["temperature"], truth["temperature"])


@of(2)
@pytest.mark.parametrize("name", CURVES)
def test_two_processes_with_half_the_batch_give_the_curve_of_one(processes, name):
    one = curve(CURVES[name], (8, 8), None)
    two = torch.stack([found["curves"][name] for found in processes]).mean(0)
    assert one[-1] < one[0]
    torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)


@of(2, 4)
@pytest.mark.parametrize(("name", "dtype", "strategy"), DTYPE_CASES)
def test_native_backends_by_dtype(processes, name, dtype, strategy):
    world = len(processes)
    batch = Batch.whole(sum(SIZES[world]), dtype, 33)
    a, b = (x.double().requires_grad_() for x in (batch.x1, batch.x2))
    batch.queue = batch.queue.double()
    t = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    loss = LOSSES[name][1](a, b, t, batch)
    loss.backward()
    losses, da, db, dt = zip(*(found["dtypes"][name, dtype, strategy] for found in processes), strict=True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    check("loss", torch.stack(losses).mean(), loss, tolerance)
    check("z1", torch.cat(da) / world, a.grad, tolerance)
    check("z2", torch.cat(db) / world, b.grad, tolerance)
    check("temperature", torch.stack(dt).mean(), t.grad, tolerance)


@of(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", IN_A_CONE)
def test_a_cone_keeps_its_gradient_in_bf16(processes, name, strategy):
    """What the positive adds nearly cancels what the negatives add, on whichever process they are: rounded before they
    meet, as in plain PyTorch, little of their difference is left."""
    _, dense, learned = IN_A_CONE[name]
    truth, plain = (gradients(dense, cone(learned, dtype)) for dtype in (torch.float64, torch.bfloat16))
    for k, parts in enumerate(zip(*(found["cone"][name, strategy] for found in processes), strict=True)):
        value = torch.cat(parts) / len(processes)
        assert_close(f"gradient {k} of {name}", value, truth[k], None, torch.bfloat16)
        assert error(value, truth[k]) < error(plain[k], truth[k]) / 4


@of(2, 4)
def test_groups_queues_and_errors(processes):
    world = len(processes)
    found = [f["others"] for f in processes]
    z = [torch.randn(3, 4, generator=torch.Generator().manual_seed(rank)) for rank in range(world)]
    flipped = [x.flip(0) for x in z]
    assert all(f["alone"] for f in found)
    pair = nt_xent(torch.cat([z[0], z[-1]]), torch.cat([flipped[0], flipped[-1]]))
    torch.testing.assert_close((found[0]["pair"] + found[-1]["pair"]) / 2, pair)
    for f in found[1:-1]:
        assert "group: got a group that this process is not in" in f["outside"]
    whole = nt_xent(torch.cat(z), torch.cat(flipped), reduction="none", return_lse=True)
    for k in range(2):
        views = zip(*(f["rows"][k].chunk(2) for f in found), strict=True)
        torch.testing.assert_close(torch.cat([row for view in views for row in view]), whole[k])
    keys = torch.cat([x[: rank % 3] for rank, x in enumerate(z)])
    expected = torch.cat([F.normalize(keys), torch.ones(7 - len(keys), 4)])
    loss = info_nce(keys, keys, torch.ones(7, 4), 0.1)
    torch.testing.assert_close(torch.stack([f["bank loss"] for f in found]).mean(), loss)
    rest = list(range(1, world))
    for f in found:
        assert torch.equal(f["bank before"], found[0]["bank before"])
        assert f["gradient"].startswith(f"ValueError: requires_grad: got it on ranks {rest} of 0 to {world - 1} alone")
        assert f["ids"].startswith("ValueError: group_ids: got it on ranks [0] of")
        assert f["way"].startswith("ValueError: strategy='ring': got it on ranks [0] of")
        assert f["keys"].startswith(f"ValueError: keys_require_grad: got it on ranks {rest} of")
        assert f["views"].startswith(f"ValueError: z_a_requires_grad: got it on ranks {rest} of")
        torch.testing.assert_close(f["bank"], expected)
        assert f["bank pointer"] == len(keys)
        assert f["empty"].startswith(f"ValueError: embeddings: got an empty batch on all {world} processes")
        assert f["width"].startswith("ValueError: D: got embeddings of [3, 4")
        assert "torch.float32, torch.float64" in f["dtype"]
        assert f["world size"].startswith(f"ValueError: world_size: got {world + 1}, allowed: {world}")
    clipped = torch.stack([f["clip"] for f in found]).mean()
    torch.testing.assert_close(clipped, clip(torch.cat(z), torch.cat(z), 10.0))


@of(2)
def test_a_dead_or_silent_process_is_an_error_within_the_time_out(processes):
    for kind, limit in (("silent", 6), ("dead", 20)):
        said, seconds = processes[0]["silent"][kind]
        assert said.startswith("RuntimeError: gather_distributed: rank 0 of 2 got no answer"), said
        assert seconds < limit, kind


def test_a_lack_of_memory_is_not_the_silence_of_another_process():
    ranks = object.__new__(Ranks)
    ranks.rank, ranks.world = 0, 2
    for raised, seen, message in (
        (torch.OutOfMemoryError("2 GiB"), torch.OutOfMemoryError, "^2 GiB"),
        (RuntimeError("closed"), RuntimeError, "gather_distributed: rank 0 of 2 got no answer.*closed"),
    ):
        with pytest.raises(seen, match=message), ranks.answered():
            raise raised


def test_arguments_are_checked_and_one_process_is_no_group():
    z = torch.randn(4, 3)
    assert torch.equal(nt_xent(z, z.flip(0), gather_distributed=True, strategy="ring"), nt_xent(z, z.flip(0)))
    with pytest.raises(ValueError, match="strategy: got 'tree', allowed: 'gather', 'ring'"):
        nt_xent(z, z, gather_distributed=True, strategy="tree")
    with pytest.raises(TypeError, match="gather_distributed: got 2"):
        ssl_fast.functional.clip(z, z, 10.0, gather_distributed=2)
    with pytest.raises(ValueError, match="world_size: got 2, allowed: 1"):
        CLIPLoss(world_size=2)(z, z, 10.0)
    with pytest.raises(ValueError, match="use_horovod"):
        CLIPLoss(use_horovod=True)
