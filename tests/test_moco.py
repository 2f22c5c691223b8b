"""MoCo against the original's step written in plain PyTorch, lightly's parts, and one process against two."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from common import DEVICE
from processes import finish, start
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ssl_fast
from benches.bench_moco import PlainMoCo
from ssl_fast import KeyQueue, MoCo
from ssl_fast.augment import POLICIES
from ssl_fast.backbones import ConvNet
from ssl_fast.evaluate import evaluate
from ssl_fast.methods import METHODS
from ssl_fast.optim import warmup_steps
from ssl_fast.train import train


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def smooth():
    """No kinks, which would turn rounding into chaos, and no bias before a norm, whose gradient would be rounding."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.Tanh(),
        nn.Flatten(), nn.Linear(144, 24),
    )  # fmt: skip


def moco(encoder=smooth, features=24, dtype=torch.float32, **arguments):
    torch.manual_seed(0)
    model = MoCo(encoder(), **{"dim": 10, "K": 64, "features": features, **arguments}).to(DEVICE, dtype)
    model.queue.keys.copy_(F.normalize(model.queue.keys))  # unit rows in this dtype, as the original takes them
    return model


def views(steps, N=16, seed=1, dtype=torch.float32):
    return torch.randn(steps, 2, N, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def trained(model, pairs):
    """The loss of each step, and the gradients of the last, in the order of the parameters."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for im_q, im_k in pairs:
        loss = model(im_q, im_k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.grad for p in model.parameters() if p.requires_grad]


class SplitBatchNorm(nn.BatchNorm2d):
    """The statistics of the CIFAR notebook of facebookresearch/moco in training."""

    splits = 4

    def forward(self, x):
        N, C, H, W = x.shape
        folded = x.view(N // self.splits, C * self.splits, H, W)  # which puts every `splits`-th image into a part
        weight, bias = (t.repeat(self.splits) for t in (self.weight, self.bias))
        return F.batch_norm(folded, None, None, weight, bias, True, 0, self.eps).view(N, C, H, W)


@pytest.mark.parametrize("mlp", (False, True))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_original_step(mlp, dtype, tolerance):
    """Eight steps of 16 keys: the queue of 64 wraps twice."""
    ours = moco(mlp=mlp, m=0.9, T=0.2, dtype=dtype)
    theirs = PlainMoCo.like(ours)
    results = [trained(model, views(8, dtype=dtype)) for model in (ours, theirs)]
    assert results[0][0] == pytest.approx(results[1][0], rel=tolerance)
    for a, b in zip(*(r[1] for r in results), strict=True):
        assert (a - b).norm() <= 100 * tolerance * b.norm() + 1e-9
    for a, b in zip(ours.key.module.state_dict().values(), theirs.encoder_k.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=100 * tolerance, atol=100 * tolerance)
    torch.testing.assert_close(ours.queue.keys, theirs.queue.T, rtol=0, atol=100 * tolerance)
    assert ours.queue.pointer == theirs.queue_ptr and ours.queue.fill == 64
    other = PlainMoCo.like(moco(mlp=mlp, m=0.9, T=0.2, dtype=dtype))
    other.m = 0.95
    assert max(abs(a - b) for a, b in zip(trained(other, views(8, dtype=dtype))[0], results[0][0], strict=True)) > 1e-3


def test_split_norms_are_the_authors(monkeypatch):
    """Part p of the notebook's norm is every fourth image; ours are contiguous, so theirs sees the batch reordered."""
    N = 16
    shuffle = torch.randperm(N, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    monkeypatch.setattr("ssl_fast.methods.moco.shared_permutation", lambda n, device: shuffle)
    ours = moco(bn_splits=4, T=0.2, dtype=torch.float64)
    theirs = PlainMoCo.like(ours)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SplitBatchNorm
    interleaved = torch.arange(N, device=DEVICE).view(4, N // 4).T.flatten()  # the batch as their norm divides it
    query, key = theirs.encoder_q.forward, theirs.encoder_k.forward
    theirs.encoder_q.forward = lambda x: query(x[interleaved])[interleaved.argsort()]
    theirs.encoder_k.forward = lambda x: key(x[shuffle][interleaved])[interleaved.argsort()][shuffle.argsort()]
    results = [trained(model, views(4, dtype=torch.float64)) for model in (ours, theirs)]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    assert trained(moco(T=0.2, dtype=torch.float64), views(1, dtype=torch.float64))[0][0] != pytest.approx(
        results[0][0][0]
    )


def test_lightly(steps=20):
    lightly_loss = pytest.importorskip("lightly.loss")
    utils = pytest.importorskip("lightly.models.utils")
    ours = moco(m=0.9, T=0.2)
    query = copy.deepcopy(ours._query())
    key = copy.deepcopy(query)
    utils.deactivate_requires_grad(key)
    criterion = lightly_loss.NTXentLoss(temperature=0.2, memory_bank_size=(64, 10)).to(DEVICE)
    criterion.memory_bank.bank = ours.queue.keys.clone()
    optimizer = torch.optim.SGD(query.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for im_q, im_k in views(steps):
        utils.update_momentum(query, key, m=0.9)
        q = query(im_q)
        with torch.no_grad():
            k = key(im_k)
        loss = criterion(q, k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert trained(ours, views(steps))[0] == pytest.approx(losses, rel=1e-4)


def test_a_state_dict_continues_to_the_bit():
    first, pairs = moco(bn_splits=2, mlp=True), views(6)
    trained(first, pairs[:3])
    state = copy.deepcopy(first.state_dict())
    assert state["queue.fill"] == 48 and state["queue.pointer"] == 48 and "key.module.0.0.weight" in state
    second = MoCo(smooth(), 10, 64, mlp=True, features=24, bn_splits=2).to(DEVICE)
    second.load_state_dict(state)
    results = []
    for model in (first, second):
        torch.manual_seed(5)
        results.append(trained(model, pairs[3:]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(*(r[1] for r in results), strict=True))


def test_the_key_encoder_keeps_nothing_and_nothing_of_the_queues_length_is_kept():
    model = moco(K=4096)
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        q = model.head(model.encoder(views(1)[0, 0]))
    alone = sum(kept)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(*views(1)[0])
    assert sum(kept) - alone < 16 * q.numel() < 4096  # rows of q and k; a row of logits alone has 4,096
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.key.parameters())
    assert model.key.module[0][1].num_batches_tracked == 1 and model.key.training


@pytest.mark.parametrize("bn_splits", (1, 4))
def test_eval_moves_nothing(bn_splits):
    """Not the generator either, and any number of images will do."""
    model = moco(bn_splits=bn_splits).eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert model(*views(1, 18)[0]).requires_grad and model(*views(1, 70)[0]) > 0
    assert torch.equal(random, torch.get_rng_state()) or DEVICE != "cpu"
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


class NothingFetched(TorchDispatchMode):
    """Raises where a value leaves the device, or decides about a shape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


def test_a_step_fetches_nothing_from_the_device():
    model = moco(mlp=True, bn_splits=2)
    with NothingFetched():
        for im_q, im_k in views(2):
            model(im_q, im_k).backward()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            model.queue.pointer.item()


@pytest.mark.parametrize("mlp", (False, True))
def test_torchvisions_encoders_as_the_original_takes_them(mlp):
    models = pytest.importorskip("torchvision.models")
    model = MoCo(models.resnet18, 16, 32, mlp=mlp, bn_splits=2).to(DEVICE)
    x = torch.randn(2, 4, 3, 32, 32, device=DEVICE)
    model(*x).backward()
    assert model.encoder(x[0]).shape == (4, 512) and isinstance(model.encoder.fc, nn.Identity)
    kinds = [type(m) for m in model.head.modules()]
    assert kinds == ([nn.Sequential, nn.Linear, nn.ReLU, nn.Linear] if mlp else [nn.Linear])
    assert all(p.grad is not None for p in [*model.encoder.parameters(), *model.head.parameters()])
    fresh = models.resnet18()
    assert fresh.load_state_dict(model.encoder.state_dict(), strict=False).unexpected_keys == []


def test_accelerated_and_split():
    plain, fused = (moco(lambda: ConvNet(1), 128, bn_splits=4) for _ in range(2))
    report = ssl_fast.accelerate(fused, trace=False)
    assert len(report.fused) == 8 and list(plain.state_dict()) == list(fused.state_dict())
    pairs = views(3)
    torch.manual_seed(0)
    expected = trained(plain, pairs)[0]
    torch.manual_seed(0)
    assert trained(fused, pairs)[0] == pytest.approx(expected, rel=1e-4)


class Other(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"m": 1.5}, r"m: got 1.5, allowed: a float in \[0, 1\]"),
        ({"m": -0.1}, r"m: got -0.1, allowed: a float in \[0, 1\]"),
        ({"K": 0}, "K: got 0, allowed: a whole number >= 1"),
        ({"dim": 2.5}, "dim: got 2.5"),
        ({"bn_splits": 0}, "bn_splits: got 0"),
        ({"T": 0.0}, "T: got 0.0, allowed: a number above 0"),
        ({"T": "0.2"}, "T: got '0.2', allowed: a number above 0"),
        ({"T": float("inf")}, "T: got inf, allowed: a number above 0 and finite"),
        ({"T": True}, "T: got True, allowed: a number above 0"),
        ({"m": float("nan")}, "m: got nan"),
        ({"m": True}, "m: got True, allowed: a float in"),
        ({"K": True}, "K: got True, allowed: a whole number >= 1"),
        ({"mlp": "no"}, "mlp: got 'no', allowed: True, False"),
        ({"features": True}, "features: got True, allowed: a whole number >= 1"),
        ({"encoder": lambda: "resnet18", "features": None}, "base_encoder: got 'resnet18', allowed: a function of num"),
        (
            {"encoder": lambda: lambda num_classes: nn.Sequential(nn.Linear(3, num_classes))},
            "features: got 24 with a func",
        ),
        ({"features": None}, "features: got None with a module"),
        ({"encoder": lambda: lambda num_classes: nn.Flatten()}, "whose last linear layer is no nn.Linear"),
        ({"encoder": lambda: lambda num_classes: nn.Sequential(nn.Linear(3, 4))}, "'0' with 4 outputs, .*dim|num_cl"),
        ({"encoder": lambda: nn.Sequential(Other(1)), "bn_splits": 2}, "bn_splits: got 2 with Other at '0'"),
        ({"encoder": lambda: nn.SyncBatchNorm(1), "bn_splits": 2}, "bn_splits: got 2 with SyncBatchNorm"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        moco(**arguments)


@pytest.mark.parametrize(
    "arguments, N, message",
    [
        ({"bn_splits": 4}, 18, "bn_splits: got 4 for a batch of 18, allowed: a divisor of the batch"),
        ({"K": 15}, 16, "K: got 15, smaller than the 16 keys of a step"),
    ],
)
def test_a_batch_that_does_not_fit_changes_nothing(arguments, N, message):
    model = moco(**arguments)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model(*views(1, N)[0])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_views_that_do_not_fit_change_nothing():
    model, (im_q, im_k) = moco(), views(1)[0]
    before = copy.deepcopy(model.state_dict())
    for q, k in ((im_q[:8], im_k), (im_q[:0], im_k[:0])):
        with pytest.raises(ValueError, match="im_k: got (16|0) images for (8|0) in im_q"):
            model(q, k)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_a_checkpoint_of_another_precision():
    model, narrow = moco(), moco().bfloat16()
    trained(model, views(2))
    narrow.load_state_dict(model.state_dict())
    narrow.key.update(narrow._query())  # the masters take over what was loaded
    for name, average in narrow.key.module.named_parameters():
        loaded, master = model.key.module.get_parameter(name), narrow.key.masters.get_buffer(name.replace(".", "/"))
        assert torch.allclose(master, loaded, rtol=1e-2, atol=1e-3) and torch.equal(average, master.bfloat16())
    again = moco()
    again.load_state_dict(narrow.state_dict())
    for a, b in zip(again.key.module.parameters(), narrow.key.module.parameters(), strict=True):
        assert torch.equal(a, b.float())


def test_a_checkpoint_of_another_K_changes_nothing():
    model, other = moco(), moco(K=32)
    trained(other, views(1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"queue.keys: got a checkpoint of 32 x 10 .*, allowed: .* 64 x 10"):
        model.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="^keys: got a checkpoint of 5 x 3"):
        KeyQueue(5, 2).load_state_dict(KeyQueue(5, 3).state_dict())


# ---- presets and the train command


def test_presets_are_the_papers():
    v1, v2 = (METHODS[name].build(nn.Flatten(), 12) for name in ("moco_v1", "moco_v2"))
    assert (v1.T, v2.T) == (0.07, 0.2) and isinstance(v1.head, nn.Linear) and isinstance(v2.head, nn.Sequential)
    for model in (v1, v2):
        assert model.queue.keys.shape == (65536, 128) and model.key.momentum == 0.999 and model.bn_splits == 8
    assert [METHODS[name].schedule for name in ("moco_v1", "moco_v2")] == ["step", "cosine"]
    drops = [step for step in range(1, 200) if warmup_steps(step, 200) != warmup_steps(step - 1, 200)]
    assert drops == [120, 160] and warmup_steps(199, 200) == 0.01
    assert [warmup_steps(step, 10, 2) for step in range(3)] == [0.5, 1.0, 1.0]
    jitter = {}
    for name in ("moco_v1", "moco_v2"):
        p = POLICIES[name]
        jitter[name] = [round(share * p.strength, 6) for share in (0.8, p.saturation, p.hue)], p.jitter
    assert jitter == {"moco_v1": ([0.4, 0.4, 0.4], 1.0), "moco_v2": ([0.4, 0.4, 0.1], 0.8)}
    assert [POLICIES[name].blur for name in ("moco_v1", "moco_v2")] == [0.0, 0.5]


QUICK = {"data": "digits", "model": "convnet", "batch_size": 360, "epochs": 1, "log_every": 1, "K": 720}


def test_train_and_evaluate(tmp_path):
    result = train(tmp_path, method="moco_v1", **QUICK)
    assert result["step"] == 3 and 0 < result["loss"] < 10 and 0.9 < result["knn"] <= 1
    assert evaluate(tmp_path, protocol="knn")["knn"] == pytest.approx(result["knn"], abs=1e-6)
    log = (tmp_path / "train.log").read_text()
    assert "moco_v1, 0.146 M parameters" in log


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"K": 128}, "K: got 128, smaller than the 360 keys"),
        ({"batch_size": 100}, "bn_splits: got 8 for a batch of 100"),
        ({"m": 2.0}, "m: got 2.0"),
        ({"T": float("inf")}, "T: got inf, allowed: a number above 0 and finite"),
        ({"schedule": "steps"}, "schedule: got 'steps', did you mean 'step'"),
        ({"method": "moco"}, "method: got 'moco', did you mean 'moco_v"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "out", **{"method": "moco_v2", **QUICK, **wrong})
    assert not (tmp_path / "out").exists()


# ---- two processes


class Watched(nn.Module):
    """An encoder without batch norm that remembers the images it saw."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 6)

    def forward(self, x):
        self.seen = x.detach().clone()
        return self.linear(x.flatten(1))


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = moco(Watched, 6, torch.float64, K=40, m=0.9)
    torch.manual_seed(10 + rank)  # the order comes from rank 0
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    losses, seen = [], []
    for pair in views(4, dtype=torch.float64).cpu():
        loss = wrapped(*pair.unflatten(1, (world, -1))[:, rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        seen.append(model.key.module[0].seen)
    queue = KeyQueue(5, 2, normalize=False, gather_distributed=True)
    queue.enqueue(torch.full((2, 2), float(rank)))
    with pytest.raises(ValueError, match="K: got 40, smaller than the 64 keys"):
        model(*views(1, 32, dtype=torch.float64).cpu()[0])
    torch.save({"losses": torch.stack(losses), "seen": torch.stack(seen), "keys": model.queue.keys,
                "gathered": queue.keys[:4, 0], "fill": queue.fill}, folder / f"{rank}.pt")  # fmt: skip


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    """No norm: so what is left of the shuffle is where each image goes, and that each key comes back to its query."""
    finish([start(tmp_path, f"rank{rank}", worker, rank, 2, tmp_path) for rank in range(2)])
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    model = moco(Watched, 6, torch.float64, K=40, m=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for i, pair in enumerate(views(4, dtype=torch.float64).cpu()):
        loss = model(*pair)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert (a["losses"][i] + b["losses"][i]) / 2 == pytest.approx(loss.item(), rel=1e-10)
        key_of = {tuple(image.flatten().tolist()): n for n, image in enumerate(pair[1])}
        went = [[key_of[tuple(image.flatten().tolist())] for image in part["seen"][i]] for part in (a, b)]
        assert sorted(went[0] + went[1]) == list(range(16))
        assert set(went[0]) != set(range(8))  # shuffled between the processes
    for part in (a, b):
        torch.testing.assert_close(part["keys"], model.queue.keys, rtol=1e-9, atol=1e-9)
        assert part["gathered"].tolist() == [0, 0, 1, 1] and part["fill"] == 4
