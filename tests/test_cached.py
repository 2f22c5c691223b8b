"""The cached step against the whole one: gradients, random numbers, buffers, autocast, processes, lack of memory."""

from __future__ import annotations

import copy
import logging
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from processes import finish, start_group
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import ssl_fast
from ssl_fast import (
    EMA,
    BarlowTwins,
    CachedStep,
    CLIPLoss,
    InfoNCE,
    MoCo,
    NTXentLoss,
    cached_step,
    checkpoint_stages,
    ema_update_,
)
from ssl_fast.cli import main
from ssl_fast.run import read_checkpoint, read_rows
from ssl_fast.train import train

N = 11  # micro-batches of unequal size


@pytest.fixture(autouse=True)
def seeded():
    """Threads that wait for each other on a busy machine would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


class Watched(nn.Sequential):
    """Counts the rows of every call."""

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__.setdefault("rows", []).append(len(x))
        return super().forward(x)


def encoder(norm: str = "layer", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    norms = {"layer": lambda: nn.GroupNorm(1, 8), "batch": lambda: nn.BatchNorm2d(8)}
    norms |= {"ours": lambda: ssl_fast.nn.BatchNorm2d(8, activation="relu"), "frozen": lambda: nn.BatchNorm2d(8).eval()}
    norms |= {"cumulative": lambda: nn.BatchNorm2d(8, momentum=None)}
    norms |= {"instance": lambda: nn.InstanceNorm2d(8, track_running_stats=True)}
    return Watched(
        nn.Conv2d(3, 8, 3, bias=False), norms[norm](), nn.ReLU(), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 6),
    )  # fmt: skip


def views(rows: int = N) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(rows, 3, 6, 6, generator=generator) for _ in range(2)]


def gradients(*modules: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for m in modules for p in m.parameters() if p.grad is not None])


def whole(model: nn.Module, loss: Any, given: list[Tensor]) -> Tensor:
    value = loss(*(model(view) for view in given))
    value.backward()
    return value.detach()


def in_parts(model: nn.Module, loss: Any, given: list[Tensor], micro_batch: int) -> Tensor:
    """The graph of the same micro-batches, all at once."""
    parts = -(-len(given[0]) // micro_batch)
    value = loss(*[torch.cat([model(x) for x in view.tensor_split(parts)]) for view in given])
    value.backward()
    return value.detach()


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert theirs.norm() > 1e-3  # a comparison of zeros would say nothing
    assert F.cosine_similarity(ours.double(), theirs.double(), dim=0) > 1 - 1e-9
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("norm", ["layer", "frozen"])
@pytest.mark.parametrize("micro_batch", [1, 4, 10])
def test_gradient_is_that_of_the_whole_batch(norm, micro_batch):
    ours, theirs = encoder(norm), encoder(norm)
    loss, expected = NTXentLoss(0.2), whole(theirs, NTXentLoss(0.2), views())
    value = cached_step(ours, views(), loss, micro_batch)
    assert not value.requires_grad and value == pytest.approx(expected.item(), rel=1e-6)
    assert_same(gradients(ours), gradients(theirs))
    assert max(ours.rows) <= micro_batch and sum(ours.rows) == 4 * N


def test_gradients_accumulate():
    ours, theirs = encoder(), encoder()
    for _ in range(2):
        cached_step(ours, views(), NTXentLoss(), 3)
        whole(theirs, NTXentLoss(), views())
    assert_same(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("micro_batch", [N, 100])
def test_a_micro_batch_that_covers_the_batch_is_the_plain_step(micro_batch):
    ours, theirs = encoder("batch", 0.3), encoder("batch", 0.3)
    torch.manual_seed(3)
    expected = whole(theirs, NTXentLoss(), views())
    torch.manual_seed(3)
    assert torch.equal(cached_step(ours, views(), NTXentLoss(), micro_batch), expected)
    assert torch.equal(gradients(ours), gradients(theirs)) and ours.rows == [N, N]
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


class Noisy(nn.Module):
    """Draws from every generator there is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.4) * (1 + random.random()) * (1 + np.random.rand())


@pytest.mark.parametrize("norm", ["batch", "ours", "cumulative", "instance"])
def test_both_passes_draw_the_same_and_buffers_move_once(norm):
    ours, theirs = (Watched(encoder(norm), Noisy()) for _ in range(2))
    results = []
    for step, model in ((cached_step, ours), (in_parts, theirs)):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(3)
        value = step(model, *((views(), NTXentLoss()) if step is cached_step else (NTXentLoss(), views())), 4)
        results.append((value, torch.rand(1), random.random(), np.random.rand()))
    assert results[0] == results[1]  # the generators go on as after one pass
    assert_same(gradients(ours), gradients(theirs), 1e-6)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b), name
    if norm != "instance":  # which torch does not count
        assert dict(ours.named_buffers())["0.1.num_batches_tracked"] == 6  # two views in three parts


def test_power_iterations_are_replayed():
    ours, theirs = (
        nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(linear))
        for linear in (torch.manual_seed(4) and nn.Linear(108, 5) for _ in range(2))
    )
    theirs.load_state_dict(ours.state_dict())
    cached_step(ours, views(), NTXentLoss(), 4)
    in_parts(theirs, NTXentLoss(), views(), 4)
    assert_same(gradients(ours), gradients(theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


def test_a_learned_temperature_and_two_encoders():
    class Clip(CLIPLoss):
        def __init__(self):
            super().__init__()
            self.logit_scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, a, b):
            return super().forward(F.normalize(a), F.normalize(b), self.logit_scale.exp())

    images, texts = views()[0], torch.randint(50, (N, 7))
    found = []
    for step in (cached_step, None):
        torch.manual_seed(5)
        towers = [encoder(), nn.Sequential(nn.Embedding(50, 16), nn.Flatten(), nn.LayerNorm(112), nn.Linear(112, 6))]
        loss = Clip()
        if step:
            step(towers, (images, texts), loss, 4)
        else:
            loss(towers[0](images), towers[1](texts)).backward()
        found.append(gradients(*towers, loss))
    assert_same(*found)


def test_keys_without_gradient_are_embedded_once():
    ours, theirs, key = encoder(), encoder(), encoder("batch").requires_grad_(False)
    loss = InfoNCE(0.1)
    cached_step([ours, key], views(), loss, 4)
    k = torch.cat([copy.deepcopy(key)(x) for x in views()[1].tensor_split(3)])
    loss(theirs(views()[0]), k).backward()
    assert_same(gradients(ours), gradients(theirs))
    assert sum(key.rows[:3]) == N and key[1].num_batches_tracked == 3
    both = encoder("batch")
    cached_step(both, views(), lambda q, k: loss(q, k.detach()), 4)
    assert sum(both.rows) == 3 * N and both[1].num_batches_tracked == 6


@pytest.mark.parametrize("norm, micro_batch", [("layer", 4), ("batch", 4), ("ours", 3), ("batch", 12)])
def test_moco_in_parts(norm, micro_batch):
    """Against forward() for rows apart, and by hand for batch norm; key encoder, statistics and queue move once."""
    given, models = views(12), [MoCo(encoder(norm), dim=5, K=16, m=0.5, features=6) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for step in range(2):  # in the second, keys of the first are negatives, and the queue wraps
        values = []
        for model in models:
            model.zero_grad()
            torch.manual_seed(step)
            if model is models[0]:
                values.append(model.cached(*given, CachedStep(micro_batch)))
            elif norm == "layer":
                values.append(model(*given))
            else:
                query, parts = nn.Sequential(model.encoder, model.head), 12 // micro_batch
                model.key.update(query)
                order = torch.randperm(12)
                k = torch.empty(12, 5)
                k[order] = torch.cat([model.key(x) for x in given[1][order].chunk(parts)])
                values.append(InfoNCE(0.07)(torch.cat([query(x) for x in given[0].chunk(parts)]), k, model.queue.keys))
                model.queue.enqueue(k)
            if values[-1].requires_grad:
                values[-1].backward()
        assert values[0].item() == pytest.approx(values[1].item(), rel=1e-6)
        assert_same(*(gradients(model.encoder, model.head) for model in models))
    for (name, ours), theirs in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.allclose(ours.double(), theirs.double(), atol=1e-6), name
    assert models[0].queue.pointer == 24 % 16 and models[0].key.num_updates == 2


@pytest.mark.parametrize("micro_batch", [4, N])
def test_barlow_twins_in_parts(micro_batch):
    found = []
    for cached in (True, False):
        model = BarlowTwins(encoder(), 6, dim=4)
        torch.manual_seed(1)
        model.head = nn.Linear(6, 4)  # each row by itself
        value = model.cached(*views(), CachedStep(micro_batch)) if cached else model(*views())
        if not cached:
            value.backward()
        found.append((value.item(), gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert_same(found[0][1], found[1][1])


def test_autocast():
    found = []
    for step in (cached_step, whole):
        model = encoder()
        with torch.autocast("cpu", torch.bfloat16):
            value = step(model, views(), NTXentLoss(), 4) if step is cached_step else NTXentLoss()(*map(model, views()))
        if step is whole:
            value.backward()
        assert value.dtype == torch.float32
        found.append(gradients(model))
    assert F.cosine_similarity(*found, dim=0) > 0.9999  # whose rows went into other sums of bf16 products


def test_scale_of_a_scaler():
    ours, theirs, scaler = encoder(), encoder(), torch.amp.GradScaler("cpu", init_scale=1024)
    value = cached_step(ours, views(), NTXentLoss(), 4, scale=scaler.scale)
    assert value == pytest.approx(whole(theirs, NTXentLoss(), views()).item())
    assert gradients(ours).norm() > 1000 * gradients(theirs).norm()
    scaler.unscale_(torch.optim.SGD(ours.parameters(), 0.1))
    assert_same(gradients(ours), gradients(theirs))


def test_views_with_a_gradient():
    ours, theirs = views(), views()
    for view in (*ours, *theirs):
        view.requires_grad_()
    cached_step(encoder(), ours, NTXentLoss(), 4)
    whole(encoder(), NTXentLoss(), theirs)
    assert_same(torch.cat([v.grad.flatten() for v in ours]), torch.cat([v.grad.flatten() for v in theirs]))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"micro_batch": 0}, ValueError, "micro_batch: got 0, allowed: a whole number >= 1"),
        ({"micro_batch": True}, ValueError, "micro_batch: got True"),
        ({"micro_batch": "auto"}, ValueError, "CachedStep and train also take 'auto'"),
        ({"views": torch.ones(2, 3)}, TypeError, "views: got Tensor, allowed: a list of tensors"),
        ({"views": []}, TypeError, "views: got list"),
        ({"views": [torch.ones(2, 3, 6, 6), torch.ones(3, 3, 6, 6)]}, ValueError, r"views: got \[2, 3\] rows"),
        ({"views": [torch.ones(0, 3, 6, 6)] * 2}, ValueError, r"views: got \[0, 0\] rows"),
        ({"encoder": len}, TypeError, "encoder: got builtin_function_or_method, allowed: an nn.Module"),
        ({"encoder": [nn.Identity()]}, ValueError, "encoder: got 1 modules for 2 views"),
        ({"encoder": nn.LSTM(6, 6)}, TypeError, "encoder: returned tuple for 3 rows"),
        ({"encoder": nn.Sequential(nn.Flatten(0), nn.Linear(648, 2))}, TypeError, r"shape \(2,\) for 6 rows"),
        ({"loss": lambda a, b: (a * b).sum(1)}, TypeError, r"loss: returned shape \(11,\), allowed: a scalar"),
        ({"loss": lambda a, b: 1.0}, TypeError, "loss: returned float"),
        ({"loss": torch.ones(())}, TypeError, r"loss: got tensor\(1.\), allowed: a function of the embeddings"),
        ({"scale": torch.amp.GradScaler("cpu")}, TypeError, "scale: got .*GradScaler.*, allowed: None, or a function"),
        ({"loss": lambda a, b: a.detach().sum()}, ValueError, "loss: returned a tensor without gradient"),
        ({"encoder": nn.Flatten()}, ValueError, "loss: returned a tensor without gradient"),
        ({"views": [2 * v.requires_grad_() for v in views()]}, ValueError, "views: got one made by MulBackward0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, error, message):
    given: dict[str, Any] = {"encoder": encoder(), "views": views(), "loss": NTXentLoss(), "micro_batch": 6}
    if isinstance(change.get("encoder"), nn.LSTM):
        given |= {"views": [torch.ones(6, 6)] * 2, "micro_batch": 3}
    elif isinstance(change.get("encoder"), nn.Sequential):
        given |= {"views": [torch.ones(12, 3, 6, 6)] * 2}
    with pytest.raises(error, match=message):
        cached_step(**{**given, **change})


# ---- the micro-batch that fits


def test_what_says_that_memory_ran_out():
    ran_out = ssl_fast.memory.out_of_memory
    assert ran_out(torch.OutOfMemoryError("CUDA")) and ran_out(MemoryError())
    assert ran_out(RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"))
    assert ran_out(RuntimeError("could not create a primitive"))  # oneDNN's
    assert not ran_out(RuntimeError("could not create a primitive descriptor for a convolution"))
    assert not ran_out(ValueError("out of memory"))


class Hungry(nn.Module):
    """Runs out of memory in the `at`-th call with a graph, where it sees more than `most` rows."""

    def __init__(self, inner: nn.Module, most: int, at: int = 2):
        super().__init__()
        self.inner, self.most, self.at, self.calls = inner, most, at, 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(x) > self.most:
            self.calls += 1
            if self.calls >= self.at:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(x)


def test_running_out_halves_and_loses_nothing(caplog):
    ours, theirs = encoder("batch", 0.3), encoder("batch", 0.3)
    step = CachedStep()
    step.micro_batch = 8
    for model, call in ((ours, step), (theirs, None)):
        model[-1].weight.grad = torch.ones_like(model[-1].weight)  # of an earlier backward
        torch.manual_seed(3)
        with caplog.at_level(logging.WARNING, "ssl_fast"):
            if call:
                call(Hungry(model, most=4), views(), NTXentLoss())
            else:
                in_parts(model, NTXentLoss(), views(), 4)
    assert step.micro_batch == 4
    assert [r.getMessage() for r in caplog.records] == [
        "out of memory with micro_batch=8: the step begins again with 4"
    ]
    assert_same(gradients(ours), gradients(theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


def test_running_out_loses_no_gradient_of_what_the_loss_knows_of():
    """A temperature in a function, a view, and what comes to the loss by the encoder's own head."""
    found = []
    for micro_batch, most in ((8, 4), (N, 8), (4, N)):  # in parts, and from the whole batch to parts of 6
        step, temperature, model = CachedStep(), nn.Parameter(torch.tensor(0.3)), encoder()
        given = [view.requires_grad_() for view in views()]
        for x in (temperature, given[1]):
            x.grad = torch.full_like(x, 0.5)  # of an earlier backward
        step.micro_batch = micro_batch

        def loss(a: Tensor, b: Tensor, t: Tensor = temperature) -> Tensor:
            return F.cross_entropy(F.normalize(a) @ F.normalize(b).T / t.abs(), torch.arange(N))

        hungry = Hungry(model, most)
        step(hungry, given, loss, whole=lambda m=hungry, x=given: loss(*map(m, x)))
        assert step.micro_batch == (4 if micro_batch < 5 or most == 4 else 6)
        found.append(torch.cat([gradients(model), temperature.grad[None], *(v.grad.flatten() for v in given)]))
    assert_same(found[0], found[2])
    assert_same(found[1], found[2])


def test_running_out_stops_where_batch_norm_has_rows():
    step = CachedStep()
    step.micro_batch = 8
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 6), nn.BatchNorm1d(6))
    with pytest.raises(torch.OutOfMemoryError):
        step(Hungry(model, most=1, at=1), views(12), NTXentLoss())
    assert step.micro_batch == 2
    with pytest.raises(ValueError, match="micro_batch: got 2, which leaves a row alone, of which batch norm"):
        cached_step(model, views(11), NTXentLoss(), 2)
    ssl_fast.accelerate(model)
    with pytest.raises(ValueError, match="micro_batch: got 2, which leaves a row alone, of which batch norm"):
        cached_step(model, views(11), NTXentLoss(), 2)
    cached_step(model.eval(), views(11), NTXentLoss(), 2)


@pytest.mark.parametrize("rows", [3, 5, 7, 9, 33])
def test_auto_leaves_batch_norm_no_row_alone(rows, monkeypatch):
    """Of an odd batch parts of two rows leave one; three do not."""
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(108, 6), nn.BatchNorm1d(6)), []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))

    def peak(work: Any, device: torch.device) -> int:
        seen.clear()
        work()
        return 10**9 + 10**8 * (seen[0] if seen else 0)

    monkeypatch.setattr(ssl_fast.cached, "peak_memory", peak)
    for room, found in ((2.3, None), (3.3, None if rows == 3 else 3), (2 * rows + 1, rows)):
        step = CachedStep("auto", memory=int(10**9 + room * 10**8 / 0.95))
        if found is None:
            with pytest.raises(ValueError, match=f"memory: got .* room for {6 if rows == 3 else 3} of them"):
                step(model, views(rows), NTXentLoss())
            continue
        step(model, views(rows), NTXentLoss())
        assert step.micro_batch == found

    step = CachedStep("auto")
    step.micro_batch = rows
    hungry = Hungry(model, most=min(rows - 1, 3), at=1)
    if rows == 3:
        with pytest.raises(torch.OutOfMemoryError):
            step(hungry, views(rows), NTXentLoss())
    else:
        step(hungry, views(rows), NTXentLoss())
        assert step.micro_batch == 3


def test_running_out_while_measuring_is_a_measurement():
    class Narrow(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    given = [torch.randn(64, 5, requires_grad=True) for _ in range(2)]
    for most, found in ((8, 8), (33, 32)):
        step, model = CachedStep("auto", memory="1TiB"), Narrow(5, 4)
        model.most = most
        step(model, given, NTXentLoss())
        assert step.micro_batch == found and model.weight.grad.norm() > 0
    model.most = 3
    with pytest.raises(torch.OutOfMemoryError):
        CachedStep("auto", memory="1TiB")(model, given, NTXentLoss())


def test_free_memory_of_a_container(tmp_path, monkeypatch):
    """Pages of files count as used there, and are given back on demand."""
    memory = ssl_fast.memory
    for name, text in (("max", 10**9), ("current", 9 * 10**8), ("stat", "anon 5\ninactive_file 700000000\nfile 7")):
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(memory, "LIMITS", (str(tmp_path / "max"), "none"))
    monkeypatch.setattr(memory, "USED", (str(tmp_path / "current"), "none"))
    monkeypatch.setattr(memory, "CACHE", ((str(tmp_path / "stat"), "inactive_file"), ("none", "total_inactive_file")))
    free = memory.free_memory(torch.device("cpu")) - memory.resident_memory("VmRSS")
    assert free == pytest.approx(0.9 * 8 * 10**8, abs=2**24)
    for stat in ("no numbers here\n", "anon 5\n", None):  # the limit stands without it
        (tmp_path / "stat").write_text(stat) if stat else (tmp_path / "stat").unlink()
        free = memory.free_memory(torch.device("cpu")) - memory.resident_memory("VmRSS")
        assert free == pytest.approx(0.9 * 10**8, abs=2**24)


def test_running_out_is_an_error_where_nothing_is_left_to_halve():
    step = CachedStep(5)
    with pytest.raises(torch.OutOfMemoryError):
        step(Hungry(encoder(), most=3), views(), NTXentLoss())
    step = CachedStep()
    step.micro_batch = 8
    with pytest.raises(torch.OutOfMemoryError):
        step(Hungry(encoder(), most=0), views(), NTXentLoss())
    assert step.micro_batch == 1
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        CachedStep()(nn.Linear(3, 4), [torch.ones(8, 5)] * 2, NTXentLoss())


class Sized(nn.Module):
    """A row of it takes a million bytes for the backward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.exp(x.expand(len(x), 250_000) * self.weight[0])
        return self.norm(self.weight * wide.mean(1, keepdim=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is not counted here")
def test_auto_finds_what_fits():
    model, x = Sized(), torch.randn(1000, 1)
    before = copy.deepcopy(model.state_dict())
    taken = ssl_fast.memory.resident_memory("VmRSS")
    torch.manual_seed(3)
    found = CachedStep("auto", memory=taken + 10**9)._find([model, model], [x, x], 1000)
    # Forward and backward hold three such rows at once; what the heap keeps of other tests makes it fewer.
    assert 100 <= found <= 500
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items()) and model.weight.grad is None
    assert torch.equal(torch.rand(2), torch.manual_seed(3) and torch.rand(2))
    assert CachedStep("auto", memory=taken + 10**11)._find([model, model], [x[:100], x[:100]], 100) == 100
    with pytest.raises(ValueError, match=r"memory: got .* are taken by the model.* and .* by each row"):
        CachedStep("auto", memory=taken // 2)._find([model, model], [x, x], 100)
    step, small = CachedStep("auto"), x[:5]
    assert step(model, [small, small], NTXentLoss()).isfinite()
    assert step.micro_batch == 5 and model.norm.num_batches_tracked == 2


@pytest.mark.parametrize("wrong", ["20", "GiB", "20 parsecs", "-1GiB", "0GB", ""])
def test_sizes(wrong):
    parse = ssl_fast.memory.parse_memory
    assert parse("20GiB") == 20 * 2**30 and parse("1.5 gb") == 1_500_000_000 and parse(4096) == 4096
    if wrong != "20":
        with pytest.raises(ValueError, match="memory: got .*such as 20GiB"):
            parse(wrong)


# ---- stages


def test_checkpointed_stages_give_the_same_and_move_statistics_once():
    def stages() -> nn.Module:
        torch.manual_seed(6)
        blocks = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2))]
        return nn.Sequential(*blocks, copy.deepcopy(blocks[0]), nn.Flatten())

    ours, theirs, copied = stages(), stages(), stages()
    assert checkpoint_stages(ours) == checkpoint_stages(copied) == ["0", "1"]
    copied = copy.deepcopy(copied)  # as an EMA and the folding of an evaluation do
    for model in (ours, theirs, copied):
        torch.manual_seed(3)
        whole(model, NTXentLoss(), views())
    for model in (ours, copied):
        assert torch.equal(gradients(model), gradients(theirs))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), theirs.buffers(), strict=True))
        assert torch.equal(model.eval()(views()[0]), theirs.eval()(views()[0]))
    kept = [held(model.train(), views()[0]) for model in (stages(), ours)]
    assert kept[1] < 0.5 * kept[0]
    once = ours[0].forward
    assert checkpoint_stages(ours) == ["0", "1"] and ours[0].forward is once  # not computed three times
    with pytest.raises(ValueError, match="model: got Linear, allowed: one with an nn.Sequential"):
        checkpoint_stages(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model: got 'resnet18', allowed: an nn.Module"):
        checkpoint_stages("resnet18")


class Called(nn.Conv2d):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Block(nn.Module):
    """Whose activation is not a module, so that torch.fx alone sees what follows its norm."""

    def __init__(self, width: int):
        super().__init__()
        self.conv, self.norm = Called(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


class Own(nn.Module):
    def __init__(self, channels: int = 3):
        super().__init__()
        self.stem, self.layers = nn.Conv2d(channels, 4, 3, padding=1), nn.Sequential(*(Block(4) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.stem(x)).mean((2, 3))


def test_a_rebuilt_forward_does_not_go_past_checkpointed_stages(tmp_path):
    x, stages = views()[0], [f"layers.{i}" for i in range(6)]
    rebuilt = ssl_fast.accelerate(Own()).model
    kept = held(rebuilt, x)
    for model in (rebuilt, ssl_fast.SimCLR(rebuilt, 4)):
        with pytest.raises(ValueError, match=r"goes past the stages (encoder.)?layers.0, .*accelerate\(model, trace=F"):
            checkpoint_stages(model)
    assert held(rebuilt, x) == kept
    model = ssl_fast.accelerate(Own(), trace=False).model
    assert checkpoint_stages(model) == stages and held(model, x) < 0.5 * kept
    train(tmp_path / "out", model=(model := Own(1)), accelerate=True, checkpoint_stages=True, **{**QUICK, "epochs": 1})
    assert model.layers[0].conv.calls >= 2 * 4  # steps, forward and again


def test_checkpointed_stages_replay_power_iterations():
    def stages() -> nn.Module:
        torch.manual_seed(6)
        convolution = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 3, padding=1))
        return nn.Sequential(nn.Sequential(convolution, nn.ReLU()), nn.Flatten())

    ours, theirs = stages(), stages()
    checkpoint_stages(ours)
    for model in (ours, theirs):
        for _ in range(2):
            whole(model, NTXentLoss(), views())
    assert torch.equal(gradients(ours), gradients(theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


def held(model: nn.Module, x: Tensor) -> int:
    """Numbers kept for the backward."""
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return count


# ---- train

QUICK = {
    "data": "digits",
    "batch_size": 360,
    "epochs": 2,
    "log_every": 1,
    "optimizer": "sgd",
    "lr": 0.3,
    "knn_every": 0,
}


class Rows(nn.Module):
    """An encoder that treats each row alone; `stop` interrupts the run in that call."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm, stop: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), norm(32), nn.ReLU(), nn.Dropout(0.0))
        self.stop, self.rows = stop, []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.rows.append(len(x))
            if len(self.rows) == self.stop:
                os.kill(os.getpid(), signal.SIGINT)
        return self.layers(x)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_rows(out / "metrics.jsonl") if "loss" in row]


def test_train_takes_the_same_steps_in_parts(tmp_path):
    plain, parts = Rows(), Rows()
    train(tmp_path / "plain", model=plain, head="linear", **QUICK)
    train(tmp_path / "parts", model=parts, head="linear", micro_batch=100, **QUICK)
    assert set(plain.rows) == {720} and set(parts.rows) == {90}
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert losses(tmp_path / "plain")[0] > losses(tmp_path / "plain")[-1]
    train(tmp_path / "covered", model=Rows(nn.BatchNorm1d), micro_batch=360, accelerate=True, **QUICK)
    train(tmp_path / "whole", model=Rows(nn.BatchNorm1d), accelerate=True, **QUICK)
    assert losses(tmp_path / "covered") == losses(tmp_path / "whole")


def test_train_resumes_with_the_micro_batch_it_found(tmp_path, monkeypatch):
    found = iter([100, 50])
    monkeypatch.setattr(CachedStep, "_find", lambda *_: next(found))
    settings = {**QUICK, "micro_batch": "auto", "memory": "3GiB"}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", model=Rows(nn.BatchNorm1d, stop=4 * 16), **settings)
    train(tmp_path / "broken", model=(model := Rows(nn.BatchNorm1d)), resume=True, **{**settings, "memory": "5GiB"})
    assert set(model.rows) == {90}
    found = iter([100])
    train(tmp_path / "unbroken", model=Rows(nn.BatchNorm1d), **settings)
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    states = [read_checkpoint(tmp_path / f"{name}/checkpoints/last.pt")["model"] for name in ("broken", "unbroken")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_train_finds_a_micro_batch_and_checkpoints_stages(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ssl_fast"):
        settings = {**QUICK, "epochs": 1, "model": "convnet", "micro_batch": "auto", "accelerate": True}
        train(tmp_path / "free", checkpoint_stages=True, **settings)
        assert "micro_batch=auto: the whole batch of 360 rows" in caplog.text


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"accumulate_grad_batches": 4},
            "unknown argument 'accumulate_grad_batches', which a contrastive loss does not ",
        ),
        ({"update_freq": 4}, "unknown argument 'update_freq', which a contrastive loss does not "),
        ({"grad_acc_steps": 4}, "unknown argument 'grad_acc_steps', which a contrastive loss does not "),
        ({"strategy": "rings"}, "strategy: got 'rings', allowed: 'gather', 'ring'"),
        ({"strategy": "rings", "method": "barlow_twins"}, "strategy: got 'rings', allowed: 'gather', 'ring'"),
        ({"micro_batch": 0}, "micro_batch: got 0"),
        ({"micro_batch": "all"}, "micro_batch: got 'all'"),
        ({"micro_batch": "auto", "memory": "3 apples"}, "memory: got '3 apples'"),
        (
            {"micro_batch": 4, "memory": "3GiB"},
            "memory: got '3GiB' with micro_batch=4, allowed: with micro_batch='auto'",
        ),
        ({"memory": "3GiB"}, "memory: got '3GiB' with micro_batch=None"),
        (
            {"micro_batch": 64, "method": "moco_v2"},
            "bn_splits: got 8 with micro_batch=64 of a batch of 360, allowed: a divisor of each micro-batch",
        ),
        ({"micro_batch": 1}, "micro_batch: got 1, which leaves a row alone, of which batch norm"),
        (
            {"micro_batch": 2, "batch_size": 361, "method": "barlow_twins"},
            "micro_batch: got 2, which leaves a row alone, of which batch norm",
        ),
        ({"micro_batch": "auto", "method": "moco_v1"}, "bn_splits: got 8 with micro_batch='auto'"),
    ],
)
def test_train_names_what_does_not_fit(tmp_path, given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        train(tmp_path / "out", **{**QUICK, "model": "convnet", **given})
    assert not (tmp_path / "out").exists()


def test_command_line(capsys, tmp_path):
    words = ["data=digits", "model=convnet", "batch_size=360", "epochs=1", "knn_every=0"]
    assert main(["train", f"out={tmp_path / 'a'}", *words, "gradient_accumulation_steps=4"]) == 2
    error = capsys.readouterr().err
    assert "unknown key 'gradient_accumulation_steps', which" in error and "micro_batch=N or auto" in error
    assert main(["train", f"out={tmp_path / 'a'}", *words, "micro_batch=128"]) == 0
    assert yaml.safe_load((tmp_path / "a/args.yaml").read_text())["micro_batch"] == 128
    assert main(["train", f"out={tmp_path / 'b'}", *words, "micro_batch=auto", "memory=1MiB"]) == 1
    assert "are taken by the model" in capsys.readouterr().err


# ---- two processes


def of_process(rank: int, world: int) -> None:
    model = DistributedDataParallel(encoder("batch", 0.2))
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.index())
        return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

    model.register_comm_hook(None, hook)
    given = [v.chunk(2)[rank] for v in views(12)]
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(rank)
        cached_step(model, given, NTXentLoss(), 2)
    step = CachedStep()
    step.micro_batch = 4
    error = ""
    try:
        step(Hungry(model, most=1, at=1), given, NTXentLoss())
    except torch.OutOfMemoryError as raised:
        error = str(raised)
    torch.save({"gradient": gradients(model), "reduced": reduced, "error": error,
                "stats": dict(model.module.named_buffers())}, f"{rank}.pt")  # fmt: skip


def agree(rank: int, world: int) -> None:
    """Rank 1 may take less, and stops to measure earlier; batch norm waits for both."""
    model, x = Sized(), torch.randn(1000, 1)
    parallel = DistributedDataParallel(model)
    ssl_fast.convert_sync_batchnorm(model)
    taken = ssl_fast.memory.resident_memory("VmRSS")
    found = CachedStep("auto", memory=taken + 10**9 // (1 + 3 * rank))._find([model, model], [x, x], 1000)
    Path(f"found{rank}").write_text(str(found))
    with pytest.raises(ValueError, match="are taken by the model"):
        CachedStep("auto", memory=taken // 2 if rank else taken + 10**9)._find([model, model], [x, x], 100)
    step = CachedStep("auto", memory=taken + 10**9)
    value = step(parallel, [x[:8], x[:8] + 1], NTXentLoss())
    assert value.isfinite() and step.micro_batch == 8
    assert ssl_fast.memory.free_memory(torch.device("cpu")) > 4 * 10**8


def test_two_processes_reduce_once(tmp_path):
    finish(start_group(2, tmp_path, of_process))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert all(f["reduced"] == [0, 0] for f in found)  # one bucket, once a step
    assert all("out of memory" in f["error"] for f in found)
    alone = []
    for rank in (0, 1):
        model = encoder("batch", 0.2)
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(rank)
            in_parts(model, NTXentLoss(), [v.chunk(2)[rank] for v in views(12)], 2)
        alone.append((gradients(model), model[1]))
    mean = (alone[0][0] + alone[1][0]) / 2
    for f in found:
        assert_same(f["gradient"], mean)
        assert f["stats"]["1.num_batches_tracked"] == 12
    assert torch.allclose(found[0]["stats"]["1.running_mean"], alone[0][1].running_mean, atol=1e-6)


def sharded(rank: int, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    def model(shard: bool) -> nn.Module:
        torch.manual_seed(1)
        network = nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 6))
        for part in (network[1], network[4], network) if shard else ():
            fully_shard(part)
        return network

    ours, theirs = model(True), model(False)
    whole(theirs, NTXentLoss(0.2), views(12))
    mine = [view.chunk(world)[rank] for view in views(12)]
    loss = NTXentLoss(0.2, gather_distributed=True)
    auto = CachedStep()
    auto.micro_batch = 4
    for step in (lambda *given: cached_step(*given, 2), lambda *given: cached_step(*given, 6), auto):
        ours.zero_grad()
        step(ours, mine, loss)
        gradient = torch.cat([p.grad.full_tensor().flatten() for p in ours.parameters()])
        assert_same(gradient, gradients(theirs))
    with pytest.raises(ValueError, match="model: got parameters that fully_shard has split"):
        EMA(ours)
    average = EMA(theirs)
    with pytest.raises(ValueError, match="call ema_update_ on"):
        average.update(ours)
    torch.optim.SGD(ours.parameters(), 0.1).step()
    key = model(True)
    ema_update_(*([p.detach().to_local() for p in module.parameters()] for module in (key, ours)), 0.75)
    for k, p, start in zip(key.parameters(), ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(k.full_tensor(), 0.75 * start + 0.25 * p.full_tensor())


def test_two_processes_with_sharded_parameters(tmp_path):
    finish(start_group(2, tmp_path, sharded))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is not counted here")
def test_two_processes_agree_on_a_micro_batch(tmp_path):
    finish(start_group(2, tmp_path, agree))
    found = [int((tmp_path / f"found{rank}").read_text()) for rank in (0, 1)]
    assert found[0] == found[1] and 25 <= found[0] <= 125
