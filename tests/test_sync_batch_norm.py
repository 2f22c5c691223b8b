"""SyncBatchNorm in groups of two and four processes against one process with the whole batch, and the conversion."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import finish, start
from torch import Tensor, nn
from torch.nn import functional as F

import ssl_fast
from ssl_fast.nn import SyncBatchNorm
from ssl_fast.sync_batch_norm import _merge


@dataclass
class Case:
    """A module, and for each call of it the images of each process."""

    calls: tuple[tuple[int, ...], ...]
    size: tuple[int, ...] = (5, 3, 2)
    activation: str | None = None
    residual: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float64
    residual_dtype: torch.dtype | None = None
    channels_last: bool = False
    mean: float = 0.5
    tolerance: float = 1e-12

    def inputs(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """x, residual and the gradient of y, of the whole batch, for each call."""
        generator = torch.Generator().manual_seed(0)
        drawn = []
        for rows in self.calls:
            x, r, dy = torch.randn(3, sum(rows), *self.size, generator=generator, dtype=torch.float64)
            drawn.append(((x + self.mean).to(self.dtype), r.to(self.residual_dtype or self.dtype), dy.to(self.dtype)))
        return drawn

    def norm(self, dtype: torch.dtype) -> SyncBatchNorm:
        norm = SyncBatchNorm(self.size[0], activation=self.activation, dtype=dtype, **dict(self.options))
        generator = torch.Generator().manual_seed(1)
        for p in norm.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        return norm


CASES = {
    "relu and residual": Case(((3, 4),), activation="relu", residual=True),
    "uneven channels_last": Case(((2, 5),), activation="relu", channels_last=True, options=(("eps", 0.1),)),
    "cumulative": Case(((3, 4), (1, 1), (2, 3)), options=(("momentum", None),)),
    "an empty process": Case(((0, 4), (3, 0)), activation="relu", residual=True),
    "an empty process, silu": Case(((4, 0),), activation="silu", residual=True, channels_last=True),
    "everybody empty": Case(((0, 0), (2, 2)), options=(("momentum", None),)),
    "one value each": Case(((1, 1),), size=(7,), residual=True, activation="leaky_relu"),
    "no parameters": Case(((3, 2),), size=(4,), options=(("affine", False),)),
    "no running statistics": Case(((3, 2),), options=(("track_running_stats", False),), activation="gelu"),
    "called twice before backward": Case(((2, 3), (4, 1)), activation="relu", residual=True),
    "large mean": Case(((64, 31),), dtype=torch.float32, mean=1e4, tolerance=1e-6),
    "bf16": Case(((8, 9),), dtype=torch.bfloat16, activation="relu", residual=True, tolerance=1.6e-2),
    "promoted": Case(((2, 3),), dtype=torch.float32, residual_dtype=torch.float64, activation="relu", residual=True,
                     tolerance=1e-6),
}  # fmt: skip


def parameters(norm: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in norm.named_parameters()}


def share(whole: Tensor, rows: tuple[int, ...], rank: int, case: Case) -> Tensor:
    part = whole.split(rows)[rank].clone()
    return part.to(memory_format=torch.channels_last) if case.channels_last else part


def of_process(case: Case, rank: int) -> dict[str, Any]:
    """What a process has after all calls and then all backwards."""
    norm = case.norm(torch.float32 if case.dtype == torch.bfloat16 else case.dtype)
    xs, residuals, ys, dys = [], [], [], []
    for rows, (x, r, dy) in zip(case.calls, case.inputs(), strict=True):
        xs.append(share(x, rows, rank, case).requires_grad_())
        residuals.append(share(r, rows, rank, case).requires_grad_() if case.residual else None)
        ys.append(norm(xs[-1], residuals[-1]))
        dys.append(share(dy, rows, rank, case))
        assert ys[-1].stride() == xs[-1].stride() or not xs[-1].numel()
    for y, dy in zip(ys, dys, strict=True):
        y.backward(dy.to(y.dtype))
    result: dict[str, Any] = {
        "y": [y.detach() for y in ys],
        "dx": [x.grad for x in xs],
        "dresidual": [r.grad for r in residuals if r is not None],
        "gradients": {name: p.grad for name, p in parameters(norm).items()},
        "buffers": dict(norm.named_buffers()),
    }
    norm.eval()
    result["eval"] = norm(xs[0], residuals[0]).detach()
    return result


def act(u: Tensor, activation: str | None) -> Tensor:
    return u if activation is None else getattr(F, activation)(u)


def of_one(case: Case) -> dict[str, Any]:
    """The same in fp64 by torch, in one process with the whole batch."""
    source = case.norm(torch.float64)
    options = {k: v for k, v in dict(case.options).items()}
    norm = nn.BatchNorm2d(case.size[0], dtype=torch.float64, **options)
    norm._check_input_dim = lambda x: None  # type: ignore[method-assign]
    norm.load_state_dict(source.state_dict())
    xs, residuals, ys = [], [], []
    for x, r, dy in case.inputs():
        xs.append(x.double().requires_grad_())
        residuals.append(r.double().requires_grad_())
        u = norm(xs[-1])
        ys.append(act(u + residuals[-1] if case.residual else u, case.activation))
        ys[-1].backward(dy.double())
    result = {
        "y": [y.detach() for y in ys],
        "dx": [x.grad for x in xs],
        "dresidual": [r.grad for r in residuals] if case.residual else [],
        "gradients": {name: p.grad for name, p in parameters(norm).items()},
        "buffers": dict(norm.named_buffers()),
    }
    norm.eval()
    u = norm(xs[0])
    result["eval"] = act(u + residuals[0] if case.residual else u, case.activation).detach()
    return result


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.norm(self.conv(x)) + x).mean((2, 3)))


def model() -> nn.Module:
    torch.manual_seed(0)
    return Network().double()


IMAGES = (3, 1, 0, 4)
ORDERS = ("accelerate, convert", "convert, accelerate", "convert")


def prepared(order: str) -> nn.Module:
    network = model()
    for step in order.split(", "):
        if step == "accelerate":
            report = ssl_fast.accelerate(network)
            network = report.model
            assert report.fused == {"stem.1": "relu", "norm": "add, relu, in report.model"}
        else:
            ssl_fast.convert_sync_batchnorm(network)
    assert all(type(m) is SyncBatchNorm for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return network


def images() -> Tensor:
    return torch.randn(sum(IMAGES), 3, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def step(network: nn.Module, x: Tensor) -> dict[str, Any]:
    y = network(x)
    (y**3).sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return {"y": y.detach(), "gradients": gradients, "buffers": dict(network.named_buffers())}


def worker(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result: dict[str, Any] = {}
    if world == 2:
        result = {name: of_process(case, rank) for name, case in CASES.items()}
        alone = [dist.new_group([r]) for r in range(world)][rank]
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        result["group of one"] = SyncBatchNorm(5, process_group=alone, dtype=torch.float64)(x).detach()
        with torch.no_grad():
            norm = SyncBatchNorm(5, inplace=True, activation="relu", dtype=torch.float64)
            fresh = copy.deepcopy(norm)
            fresh.inplace = False
            want, pointer = fresh(x.clone(), x), x.data_ptr()
            residual = x.clone()
            y = norm(x, residual)
            assert y.data_ptr() == pointer and torch.equal(y, want)
        x = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (gradient,) = torch.autograd.grad(SyncBatchNorm(5).double()(x * rank).pow(2).sum(), x, create_graph=True)
            gradient.sum().backward()
    else:
        for order in ORDERS:
            network = prepared(order)
            result[order] = step(network, images().split(IMAGES)[rank])
            for gradient in result[order]["gradients"].values():  # DistributedDataParallel refuses a CPU here
                dist.all_reduce(gradient)
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def run(world: int, folder: Path) -> list[dict[str, Any]]:
    finish([start(folder, f"rank{rank}", worker, rank, world, folder) for rank in range(world)])
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(2, tmp_path_factory.mktemp("two"))


def close(name: str, value: Tensor, truth: Tensor, tolerance: float) -> None:
    assert value.shape == truth.shape, name
    difference = (value.double() - truth.double()).norm().item()
    assert difference <= tolerance * (1 + truth.double().norm().item()), f"{name}: {difference:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(two: list[dict[str, Any]], name: str) -> None:
    case = CASES[name]
    if name == "everybody empty":  # what torch does with an empty batch is to raise, or to divide by 0
        whole = of_one(Case(case.calls[1:], options=(("momentum", 0.5),)))
        whole["buffers"]["num_batches_tracked"] += 1
        for result in two:
            assert result[name]["y"][0].shape == result[name]["dx"][0].shape == (0, *case.size)
            for key, value in whole["buffers"].items():
                close(key, result[name]["buffers"][key], value, case.tolerance)
        return
    whole, parts = of_one(case), [result[name] for result in two]
    for key in ("y", "dx", "dresidual"):
        for i, truth in enumerate(whole[key]):
            close(f"{key} of call {i}", torch.cat([part[key][i] for part in parts]), truth, case.tolerance)
    assert whole["gradients"].keys() == parts[0]["gradients"].keys()
    for key, truth in whole["gradients"].items():
        close(key, sum(part["gradients"][key] for part in parts), truth, case.tolerance)
    for part in parts:
        for key, truth in whole["buffers"].items():
            close(key, part["buffers"][key], truth, min(case.tolerance, 1e-5))
    if "track_running_stats" not in dict(case.options):
        close("eval", torch.cat([part["eval"] for part in parts]), whole["eval"], case.tolerance)


def test_a_group_of_one_is_plain(two: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(two):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        close("y", result["group of one"], F.batch_norm(x, None, None, training=True), 1e-12)


def test_four_processes_with_a_converted_and_accelerated_model(tmp_path: Path) -> None:
    whole, results = step(model(), images()), run(4, tmp_path)
    for order in ORDERS:
        close("y", torch.cat([result[order]["y"] for result in results]), whole["y"], 1e-10)
        for kind in ("gradients", "buffers"):
            for key, truth in whole[kind].items():
                for result in results:
                    close(f"{order}: {key}", result[order][kind][key], truth, 1e-10)


# ---- in this process


def test_merge_keeps_what_a_mean_rounds_away() -> None:
    x = torch.randn(4, 1000, 3, generator=torch.Generator().manual_seed(0)).add(torch.tensor([0, 1e4, -3e5])).double()
    rows, counts = [], (1000, 1, 0, 613)
    for part, count in zip(x, counts, strict=True):
        part = part[:count]
        mean = part.mean(0) if count else torch.zeros(3).double()
        high = mean.float()
        var = part.var(0, correction=0) if count else torch.zeros(3)
        rows.append(torch.cat([high, (mean - high.double()).float(), var.float(), torch.tensor([float(count)])]))
    (mean, low, var), total = _merge(torch.stack(rows))
    whole = torch.cat([part[:count] for part, count in zip(x, counts, strict=True)])
    assert total.item() == len(whole)
    assert ((mean.double() + low.double() - whole.mean(0)).abs() < 1e-6 * whole.std(0)).all()
    assert torch.allclose(var.double(), whole.var(0, correction=0), rtol=1e-6)


def test_without_processes_it_is_the_plain_norm() -> None:
    x = torch.randn(6, 5, 2, 2, dtype=torch.float64)
    ours, plain = SyncBatchNorm(5, activation="relu").double(), ssl_fast.nn.BatchNorm2d(5, activation="relu").double()
    assert torch.equal(ours(x, x), plain(x, x))
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    assert isinstance(ours, nn.SyncBatchNorm) and ours.state_dict().keys() == nn.SyncBatchNorm(5).state_dict().keys()


def test_convert_keeps_everything_but_the_class() -> None:
    network = nn.Sequential(
        nn.BatchNorm1d(3), ssl_fast.nn.BatchNorm1d(3, activation="silu", inplace=True), nn.SyncBatchNorm(3)
    )
    network[0].eval()
    calls = []
    network[0].register_forward_hook(lambda *_: calls.append(1))
    modules, tensors = list(network), [*network.parameters(), *network.buffers()]
    group = object()
    assert ssl_fast.convert_sync_batchnorm(network, group) is network
    assert list(network) == modules and all(type(m) is SyncBatchNorm and m.process_group is group for m in network)
    assert all(a is b for a, b in zip(tensors, [*network.parameters(), *network.buffers()], strict=True))
    assert [m.training for m in network] == [False, True, True]
    assert [m.activation for m in network] == [None, "silu", None] and network[1].inplace
    network[0](torch.randn(4, 3))
    assert calls
    single = nn.BatchNorm2d(3)
    assert ssl_fast.convert_sync_batchnorm(single) is single and type(single) is SyncBatchNorm


def test_convert_refuses_and_changes_nothing() -> None:
    class Other(nn.BatchNorm2d):
        pass

    for bad, message in (
        (Other(3), "got Other at '1', allowed: the batch norms of torch.nn and ssl_fast.nn"),
        (ssl_fast.nn.BatchNorm2d(4, num_splits=2), "got BatchNorm2d at '1' with num_splits=2, allowed: 1"),
    ):
        network = nn.Sequential(nn.BatchNorm2d(3), bad)
        with pytest.raises(ValueError, match=message):
            ssl_fast.convert_sync_batchnorm(network)
        assert type(network[0]) is nn.BatchNorm2d


def test_torchs_converter_refuses_what_it_would_drop() -> None:
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    for norm in (ssl_fast.nn.BatchNorm2d(3, activation="relu"), ssl_fast.nn.BatchNorm2d(4, num_splits=2),
                 SyncBatchNorm(3, activation="relu")):  # fmt: skip
        with pytest.raises(TypeError, match="use ssl_fast.convert_sync_batchnorm"):
            convert(nn.Sequential(norm))
    assert type(convert(ssl_fast.nn.BatchNorm2d(3))) is nn.SyncBatchNorm
    norm = ssl_fast.nn.BatchNorm2d(3)
    norm.qconfig = "kept"
    assert convert(norm).qconfig == "kept"


def test_torchs_converter_after_accelerate_loses_no_activation() -> None:
    network, x = model().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    want = network(x)
    network = ssl_fast.accelerate(network).model
    close("y", nn.SyncBatchNorm.convert_sync_batchnorm(network)(x), want, 1e-12)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="activation: got 'tanh'"):
        SyncBatchNorm(3, activation="tanh")
    with pytest.raises(ValueError, match="at least 2D"):
        SyncBatchNorm(3)(torch.ones(3))
