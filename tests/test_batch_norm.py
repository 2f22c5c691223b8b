"""batch_norm against autograd of F.batch_norm and its followers in fp64, on every backend that runs here."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from common import DEVICE, FLOOR, assert_close, backends, error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.nn import functional as F

import ssl_fast
from ssl_fast.functional import batch_norm
from ssl_fast.ops import batch_norm as ops

BACKENDS = backends(ops.batch_norm_fwd, torch.float32)
FOLLOWERS = {None: lambda u: u, "relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu, "gelu": F.gelu}
SHAPES = (
    (4, 5, 2, 2), (6, 3), (2, 1, 7), (4, 17, 5, 7), (2, 130, 9, 9), (8, 65, 3, 3), (64, 24), (2, 4097), (2, 3, 2, 3, 4),
    (4, 8, 33, 71), (260, 16, 1, 1), (2, 64, 56, 56),
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Each shape in both layouts, with every activation and dtype in turn.
ACTIVATIONS = tuple(FOLLOWERS)
CASES = [
    (shape, layout, ACTIVATIONS[(i + k) % 5], (k + i // 5) % 2 == 0, DTYPES[(i + k) % 4])
    for i, shape in enumerate(SHAPES)
    for k, layout in enumerate(("planes", "rows") * 3)
]  # fmt: skip
# On planes each channel is a program, and those are what the interpreter takes its time for.
INTERPRETED = [
    c
    for c in CASES[::5]
    if c[-1] != torch.float64 and torch.Size(c[0]).numel() < 20_000 and (c[1] == "rows" or c[0][1] < 60)
]


def laid(x: Tensor, layout: str) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else x.contiguous()


def random(shape, dtype=torch.float32, layout="planes", seed=0, mean=0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + mean
    return laid(x.to(DEVICE, dtype), layout)


def affine(C: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Weights of both signs, one of them 0."""
    weight, bias = random((C,), seed=seed), random((C,), seed=seed + 1)
    weight[C // 2] = 0
    return weight, bias


def plain(x, residual, weight, bias, mean, var, *, training=True, momentum=0.1, eps=1e-5, activation=None):
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return FOLLOWERS[activation](y if residual is None else y + residual)


def ours(x, residual, weight, bias, mean, var, *, training=True, momentum=0.1, eps=1e-5, activation=None, **options):
    return batch_norm(
        x, mean, var, weight, bias, training, momentum, eps, activation=activation, residual=residual, **options
    )


def results(fn, x, residual, weight, bias, dy, dtype, **options) -> dict[str, Tensor]:
    """y, running statistics and gradients, with fn run on inputs in dtype; statistics and affine in fp32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    inputs = {
        name: None if t is None else t.detach().to(wide if name in ("weight", "bias") else dtype).requires_grad_()
        for name, t in inputs.items()
    }
    C = x.shape[1]
    mean, var = random((C,), seed=3).to(wide), random((C,), seed=4).to(wide).abs() + 0.5
    y = fn(*inputs.values(), mean, var, **options)
    given = {name: t for name, t in inputs.items() if t is not None}
    gradients = torch.autograd.grad(y, list(given.values()), dy.to(y.dtype))
    return {"y": y.detach(), "mean": mean, "var": var, **{f"d{n}": g for n, g in zip(given, gradients, strict=True)}}


def check(x, residual, weight, bias, dy, backend, **options) -> dict[str, Tensor]:
    dtype = x.dtype
    splits = {k: v for k, v in options.items() if k == "num_splits"}
    expected = {k: v for k, v in options.items() if k not in splits}
    reference = split_plain(splits["num_splits"]) if splits else plain
    truth = results(reference, x, residual, weight, bias, dy, torch.float64, **expected)
    theirs = results(reference, x, residual, weight, bias, dy, dtype, **expected)
    with ssl_fast.backend(backend):
        value = results(ours, x, residual, weight, bias, dy, dtype, **options)
    assert value["y"].dtype == dtype and value["y"].stride() == x.stride() and value["dx"].stride() == x.stride()
    for name in truth:
        if name == "dx" and truth[name].norm() < 1e-6 * dy.double().norm():
            # Nothing remains where two values stand in a channel, or gamma is 0: measured beside the terms.
            assert (value[name].double() - truth[name]).norm() <= (
                2 * (theirs[name].double() - truth[name]).norm() + FLOOR[dtype] * dy.double().norm()
            )
        else:
            assert_close(f"{name} of {backend}", value[name], truth[name], theirs[name], dtype)
    return value


def split_plain(count: int):
    """As MoCo's split batch norm: the parts one by one, running statistics from the mean of theirs."""

    def run(x, residual, weight, bias, mean, var, *, activation=None, **options):
        parts, means, variances = [], [], []
        for part in x.chunk(count):
            own = mean.clone(), var.clone()
            parts.append(F.batch_norm(part, *own, weight, bias, True, 0.1, 1e-5))
            means.append(own[0])
            variances.append(own[1])
        with torch.no_grad():
            mean.copy_(torch.stack(means).mean(0))
            var.copy_(torch.stack(variances).mean(0))
        y = torch.cat(parts)
        return FOLLOWERS[activation](y if residual is None else y + residual)

    return run


def cases():
    for backend in BACKENDS:
        slow = backend == "triton" and DEVICE == "cpu"
        for case in INTERPRETED if slow else CASES:
            if ops.batch_norm_fwd.reason(backend, DEVICE, case[-1]) is None:
                shape, layout, activation, residual, dtype = case
                name = f"{backend}-{'x'.join(map(str, shape))}-{layout}-{activation}-{residual}-{str(dtype)[6:]}"
                yield pytest.param(backend, *case, id=name)


def each_backend(test):
    return pytest.mark.parametrize("backend", BACKENDS)(test)


@pytest.mark.parametrize(("backend", "shape", "layout", "activation", "with_residual", "dtype"), list(cases()))
def test_values_gradients_and_running_statistics(backend, shape, layout, activation, with_residual, dtype):
    x = random(shape, dtype, layout, mean=0.5)
    residual = random(shape, dtype, layout, seed=1) if with_residual else None
    dy = random(shape, dtype, layout, seed=2)
    for training in (True, False):
        check(x, residual, *affine(shape[1]), dy, backend, training=training, activation=activation)


@each_backend
@pytest.mark.parametrize("layout", ("planes", "rows"))
def test_eps_does_not_reach_the_running_variance(backend, layout):
    x, dy = random((4, 6, 5, 5), layout=layout), random((4, 6, 5, 5), layout=layout, seed=2)
    check(x, None, *affine(6), dy, backend, eps=1.0, activation="relu")


@each_backend
@pytest.mark.parametrize("layout", ("planes", "rows"))
@pytest.mark.parametrize("mean", (1e3, 1e4, 1e6))
def test_a_large_mean_loses_nothing(backend, layout, mean):
    """x - mean is exact there, and what the mean's own rounding leaves out is carried along: plain PyTorch is not."""
    shape = (8, 6, 9, 9)
    x, dy = random(shape, layout=layout, mean=mean), random(shape, layout=layout, seed=2)
    truth = results(plain, x, None, *affine(6), dy, torch.float64)
    with ssl_fast.backend(backend):
        value = results(ours, x, None, *affine(6), dy, torch.float32)
    for name in truth:
        assert error(value[name], truth[name]) < 2e-6, name


@each_backend
@pytest.mark.parametrize("value", (0.0, 0.1, -1e4, 1e15))
@pytest.mark.parametrize("layout", ("planes", "rows"))
def test_a_constant_channel_is_its_bias(backend, value, layout):
    x = laid(torch.full((4, 5, 3, 3), value, device=DEVICE), layout)
    weight, bias = affine(5)
    with ssl_fast.backend(backend):
        y = batch_norm(x, None, None, weight, bias, True)
    assert torch.equal(y, bias[:, None, None].expand_as(y))


@each_backend
def test_an_outlier_first_value_does_not_spoil_the_variance(backend):
    for layout in ("planes", "rows"):
        x = random((16, 4, 33, 33), layout=layout)
        x[0, :, 0, 0] = 1e5
        x[3:, 1] += 1e4  # a channel whose images differ
        x = laid(x, layout)
        check(x, None, *affine(4), random(x.shape, layout=layout, seed=2), backend)


@each_backend
@pytest.mark.parametrize("layout", ("planes", "rows"))
@pytest.mark.parametrize("activation", (None, "relu"))
def test_splits_have_statistics_of_their_own(backend, layout, activation):
    x = random((6, 5, 4, 4), layout=layout) * torch.arange(1, 7, device=DEVICE).view(6, 1, 1, 1)
    residual = random(x.shape, layout=layout, seed=1) if activation else None
    dy = random(x.shape, layout=layout, seed=2)
    for num_splits in (2, 6):
        check(laid(x, layout), residual, *affine(5), dy, backend, activation=activation, num_splits=num_splits)


# What the C++ cuts its own way: images as rows, by features or by lines; several of them a row; wide rows.
CUTS = (
    ((64, 3, 3, 3), 1), ((128, 8, 2, 2), 1), ((130, 24, 3, 3), 1), ((64, 40, 2, 2), 1), ((64, 300, 2, 4), 1),
    ((63, 240, 3, 3), 1), ((63, 20, 63), 1), ((62, 20, 63), 1), ((16, 150, 4, 4), 1), ((600, 300, 1, 2), 1),
    ((96, 300, 2, 4), 3), ((512, 17, 2, 2), 16), ((9, 5, 3), 9), ((2000, 9, 3, 3), 2),
    ((300, 2500), 1), ((300, 2496), 2), ((700, 2500), 1), ((64, 1030), 32),
)  # fmt: skip


@pytest.mark.skipif("native" not in BACKENDS, reason="no native library")
@pytest.mark.parametrize(("shape", "num_splits"), CUTS)
def test_every_cut_on_a_cpu(shape, num_splits):
    x, residual, dy = (random(shape, seed=seed, mean=0.5) for seed in range(3))
    x = x * torch.linspace(0.5, 2, shape[1]).view(1, -1, *[1] * (x.dim() - 2))  # no two features alike
    splits = {} if num_splits == 1 else {"num_splits": num_splits}
    # By the input's sign without a residual, a mask with one, gelu with one that is kept, and running statistics.
    for activation, added, training in ((None, False, True), ("relu", False, True), ("relu", True, True),
                                        ("gelu", True, True), ("relu", True, False)):  # fmt: skip
        if training or not splits:
            given = splits if training else {"training": False}
            for dtype in (torch.float32, torch.bfloat16):
                tensors = x.to(dtype), residual.to(dtype) if added else None, *affine(shape[1]), dy.to(dtype)
                check(*tensors, "native", activation=activation, **given)


@pytest.mark.skipif("native" not in BACKENDS, reason="no native library")
def test_rows_past_the_caches():
    """Large enough to be stored so, which blocks that end within a vector cannot be."""
    for shape in ((171, 1024, 7, 7), (4096, 2064)):
        x, dy = torch.empty(shape), torch.empty(shape)
        for seed, t in enumerate((x, dy)):
            t.normal_(generator=torch.Generator().manual_seed(seed))
        value, truth = [], []
        for found, dtype, name in ((value, torch.float32, "native"), (truth, torch.float64, "reference")):
            with ssl_fast.backend(name):
                given = x.to(dtype).requires_grad_()
                y = batch_norm(given, None, None, training=True)
                found += [y.detach(), torch.autograd.grad(y, given, dy.to(dtype))[0]]
        assert all(error(a, b) < 1e-6 for a, b in zip(value, truth, strict=True))


# ---- running statistics


@each_backend
def test_momentum(backend):
    with ssl_fast.backend(backend):
        for momentum in (0.0, 0.3, 1.0, None):
            mine, theirs = (m.BatchNorm1d(5, momentum=momentum).to(DEVICE) for m in (ssl_fast.nn, nn))
            counter = mine.num_batches_tracked.data_ptr()
            for step in range(3):
                x = random((7, 5), seed=step, mean=step)
                assert error(mine(x), theirs(x)) < 1e-5
            assert mine.num_batches_tracked.data_ptr() == counter and mine.num_batches_tracked == 3
            assert error(mine.running_mean, theirs.running_mean) < 1e-6
            assert error(mine.running_var, theirs.running_var) < 1e-6


@each_backend
def test_no_momentum_and_no_running_statistics(backend):
    x = random((4, 3), mean=2.0)
    with ssl_fast.backend(backend):
        y = ssl_fast.nn.BatchNorm1d(3, momentum=None, track_running_stats=False).to(DEVICE)(x)
    assert error(y, F.batch_norm(x, None, None, training=True)) < 1e-5


@each_backend
def test_one_value_a_channel_is_refused_and_nothing_is_modified(backend):
    mine = ssl_fast.nn.BatchNorm2d(3).to(DEVICE)
    before = copy.deepcopy(mine.state_dict())
    with ssl_fast.backend(backend), pytest.raises(ValueError, match="more than one value per channel"):
        mine(torch.ones(1, 3, 1, 1, device=DEVICE))
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


@each_backend
@pytest.mark.parametrize("shape", ((0, 3, 4, 4), (2, 3, 0, 4), (0, 3)))
def test_an_empty_batch_changes_the_counter_alone(backend, shape):
    mine = (ssl_fast.nn.BatchNorm2d if len(shape) == 4 else ssl_fast.nn.BatchNorm1d)(3, activation="relu").to(DEVICE)
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    with ssl_fast.backend(backend):
        y = mine(x)
        y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert (mine.running_mean == 0).all() and (mine.running_var == 1).all() and mine.num_batches_tracked == 1
    assert (mine.weight.grad == 0).all() and (mine.bias.grad == 0).all()


@each_backend
def test_nan_and_inf_stay_in_their_channel(backend):
    for bad in (float("nan"), float("inf")):
        x = random((4, 3, 3, 3))
        x[1, 1, 2, 2] = bad
        mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
        with ssl_fast.backend(backend):
            y = batch_norm(x, mean, var, None, None, True, activation="relu")
        assert y[:, 1].isnan().any() and y[:, ::2].isfinite().all() and mean[::2].isfinite().all()


def test_statistics_stay_fp32():
    for dtype in (torch.float16, torch.bfloat16):
        mine = ssl_fast.nn.BatchNorm2d(4, dtype=dtype)
        assert mine.weight.dtype == dtype and mine.running_var.dtype == torch.float32
        mine = ssl_fast.nn.BatchNorm2d(4)
        mine.running_var.fill_(1e-12)
        mine.running_mean.fill_(1 / 3)
        assert mine.to(dtype) is mine and mine.weight.dtype == dtype
        assert (mine.running_var == 1e-12).all() and (mine.running_mean == 1 / 3).all()
        x = torch.randn(8, 4, 3, 3).to(dtype) * 300  # a variance beyond fp16
        assert mine(x).dtype == dtype and mine.running_var.isfinite().all()
    assert ssl_fast.nn.BatchNorm2d(4).double().running_var.dtype == torch.float64
    assert ssl_fast.nn.BatchNorm2d(4).to("meta").running_var.is_meta
    theirs = nn.BatchNorm2d(4).half()
    mine = ssl_fast.nn.BatchNorm2d.from_torch(theirs)
    assert mine.running_mean.dtype == mine.running_var.dtype == torch.float32 and mine.weight is theirs.weight
    with FakeTensorMode():
        assert ssl_fast.nn.BatchNorm2d(4, dtype=torch.bfloat16).running_var.dtype == torch.float32


@each_backend
def test_running_statistics_of_another_dtype_are_updated(backend):
    mean, var = torch.zeros(3, dtype=torch.bfloat16, device=DEVICE), torch.ones(3, dtype=torch.bfloat16, device=DEVICE)
    with ssl_fast.backend(backend):
        batch_norm(random((8, 3), mean=5.0), mean, var, training=True, momentum=1.0)
    assert (mean > 4).all()
    mean, var = torch.zeros(6, device=DEVICE)[::2], torch.ones(3, 2, device=DEVICE)[:, 0]  # and strided
    with ssl_fast.backend(backend):
        batch_norm(random((8, 3), mean=5.0), mean, var, training=True, momentum=1.0)
    assert (mean > 4).all() and (var != 1).all()


@each_backend
def test_the_backward_needs_nothing_that_a_later_step_changes(backend):
    """Two calls before their backwards, buffers overwritten in between, as DDP's broadcast does."""
    mine, theirs = (m.BatchNorm2d(4).to(DEVICE) for m in (ssl_fast.nn, nn))
    x1, x2 = random((3, 4, 5, 5)).requires_grad_(), random((3, 4, 5, 5), seed=5, mean=3.0).requires_grad_()
    with ssl_fast.backend(backend):
        for norm in (mine, theirs):
            y1, y2 = norm(x1), norm(x2)
            if norm is mine:
                norm.running_mean.fill_(7)
            (y1 * x2).sum().backward()
            (y2 * x1.detach()).sum().backward()
    assert error(mine.weight.grad, theirs.weight.grad) < 1e-5


# ---- layouts


@each_backend
def test_strides_of_any_kind(backend):
    base = random((4, 6, 10, 8))
    inputs = {
        "sliced": base[:, 1:5, ::2, 1:],
        "permuted": random((4, 10, 6, 8)).permute(0, 2, 1, 3),
        "expanded": random((1, 4, 1, 8)).expand(3, 4, 5, 8),
        "channels_last": random((4, 6, 5, 7), layout="rows"),
        "one channel": random((4, 1, 5, 7)).to(memory_format=torch.channels_last),
        "one pixel": random((4, 6, 1, 1)).to(memory_format=torch.channels_last),
        "channels_last_3d": random((2, 6, 3, 4, 5), layout="rows"),
        "sequence": random((2, 9, 6)).transpose(1, 2),
        "columns": random((6, 9)).t(),
    }
    for name, x in inputs.items():
        C = x.shape[1]
        gradients = {
            "like x": random(x.shape, seed=2),
            "rows": random(x.shape, seed=2, layout="rows"),
            "expanded": random((1,), seed=3).expand(x.shape),
        }
        for kind, dy in gradients.items():
            got, expected = [], []
            for fn, into in ((ours, got), (plain, expected)):
                leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
                with ssl_fast.backend(backend):
                    y = fn(
                        leaf if leaf.stride() == x.stride() else leaf + 0,
                        leaf,
                        *affine(C),
                        None,
                        None,
                        activation="relu",
                    )
                    into += [y, *torch.autograd.grad(y, leaf, dy)]
            for a, b in zip(got, expected, strict=True):
                assert error(a, b) < 2e-5, (name, kind)
    x = inputs["channels_last"]
    assert ours(x, None, None, None, None, None).is_contiguous(memory_format=torch.channels_last)
    view = inputs["sliced"]
    with ssl_fast.backend(backend):
        assert error(ours(view, None, None, None, None, None), plain(view, None, None, None, None, None)) < 1e-5


@each_backend
def test_many_rows(backend):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("too many to interpret")
    x, dy = random((70_001, 3)), random((70_001, 3), seed=2)
    check(x, None, *affine(3), dy, backend, activation="relu")


# ---- what has a gradient


@each_backend
@pytest.mark.parametrize("training", (True, False))
def test_every_choice_of_what_has_a_gradient(backend, training):
    C = 4
    dy = random((3, C, 4, 4), seed=2)
    for with_weight, with_bias, activation in itertools.product((False, True), (False, True), (None, "relu", "silu")):
        for needs in itertools.product((False, True), repeat=4):
            values = [random((3, C, 4, 4)), random((3, C, 4, 4), seed=1), *affine(C)]
            values[2] = values[2] if with_weight else None
            values[3] = values[3] if with_bias else None
            inputs = [
                v.clone().requires_grad_() if n and v is not None else v for v, n in zip(values, needs, strict=True)
            ]
            wanted = [v for v in inputs if v is not None and v.requires_grad]
            if not wanted:
                continue
            running = torch.zeros(C, device=DEVICE), torch.ones(C, device=DEVICE)
            options = dict(training=training, activation=activation)
            with ssl_fast.backend(backend):
                got = torch.autograd.grad(ours(*inputs, *running, **options), wanted, dy)
            expected = torch.autograd.grad(plain(*inputs, *running, **options), wanted, dy)
            for a, b in zip(got, expected, strict=True):
                assert error(a, b) < 1e-5
        if backend == "triton" and DEVICE == "cpu":
            break


@each_backend
def test_relu_at_zero_and_at_nan(backend):
    """The gradient at 0 is 0, as torch's; NaN passes both ways; infinite gradients of what is cut off are 0."""
    x = torch.tensor([[-1.0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, float("nan")]], device=DEVICE)
    dy = torch.tensor([[float("inf"), 1, 1], [1, 1, 1], [float("inf"), 1, 1], [float("inf"), 1, 1]], device=DEVICE)
    for residual in (None, torch.zeros_like(x)):
        got = []
        for fn in (ours, plain):
            leaf = x.clone().requires_grad_()
            running = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
            with ssl_fast.backend(backend):
                y = fn(leaf, residual, None, None, *running, training=False, eps=0.0, activation="relu")
            got += [y.detach(), *torch.autograd.grad(y, leaf, dy)]
        assert torch.equal(got[0][:, :2], got[2][:, :2]) and got[0][3, 2].isnan()
        assert torch.equal(got[1][:, :2], got[3][:, :2]) and got[1][3, 2] == got[3][3, 2] == 1


@each_backend
@pytest.mark.parametrize("layout", ("planes", "rows"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_backward_cuts_where_the_forward_did(backend, layout, dtype):
    """The mask is recomputed from x: y > 0 and a gradient that passes are the same elements, to the last one."""
    if ops.batch_norm_fwd.reason(backend, DEVICE, dtype):
        pytest.skip("not on this backend")
    shape = (2, 40, 7, 7) if backend == "triton" and DEVICE == "cpu" else (16, 40, 27, 27)
    x = (random(shape, dtype, layout, mean=0.3) * 64).round() / 64  # many ties and values next to zero
    x = laid(x, layout).requires_grad_()
    weight, bias = affine(shape[1])
    with ssl_fast.backend(backend):
        running = torch.full_like(bias, 0.3), torch.full_like(bias, 0.7)
        y = batch_norm(x, *running, weight, bias, activation="relu")
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    live = (weight != 0).view(-1, 1, 1).expand_as(y)
    assert torch.equal((y > 0)[live], (dx != 0)[live])


@each_backend
def test_a_residual_that_is_the_input_or_has_no_gradient(backend):
    x = random((3, 4, 5, 5)).requires_grad_()
    with ssl_fast.backend(backend):
        for residual in (x, random(x.shape, seed=1)):
            got = torch.autograd.grad(ours(x, residual, *affine(4), None, None, activation="relu").square().sum(), x)
            expected = torch.autograd.grad(
                plain(x, residual, *affine(4), None, None, activation="relu").square().sum(), x
            )
            assert error(got[0], expected[0]) < 1e-5
        wide = random(x.shape, torch.float64, seed=1)
        y = ours(x, wide, None, None, None, None, activation="relu")
        assert y.dtype == torch.float64 and error(y, plain(x, wide, None, None, None, None, activation="relu")) < 1e-6


@each_backend
def test_inplace_writes_over_the_input_where_no_gradient_is_recorded(backend):
    for layout in ("planes", "rows"):
        x, residual = random((3, 4, 5, 5), layout=layout), random((3, 4, 5, 5), seed=1)
        mine = ssl_fast.nn.BatchNorm2d(4, activation="relu", inplace=True).to(DEVICE)
        expected = plain(x, residual, None, None, None, None, activation="relu")
        with ssl_fast.backend(backend):
            kept = mine(x, residual)
            version = x._version
            with torch.no_grad():
                y = mine(x, residual)
        assert y is x and x._version > version and kept is not x
        assert error(y, expected) < 1e-5 and error(kept, expected) < 1e-5
        assert mine.num_batches_tracked == 2
    with pytest.raises(ValueError, match="inplace"):
        batch_norm(torch.ones(4, 3, requires_grad=True), None, None, training=True, inplace=True)
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="expanded"):
        batch_norm(torch.ones(1, 3).expand(4, 3), mean, var, training=True, inplace=True)
    assert (mean == 0).all() and (var == 1).all()


def test_second_derivatives():
    torch.manual_seed(0)
    for shape, activation, residual, training in (
        ((3, 2, 2), "relu", True, True), ((4, 3), None, False, True), ((3, 2, 2), "gelu", True, True),
        ((3, 2, 2), "silu", False, False), ((4, 2), "leaky_relu", True, True),
    ):  # fmt: skip
        inputs = [random(shape, torch.float64), random(shape, torch.float64, seed=1)]
        inputs += [t.double() + 0.5 for t in affine(shape[1])]
        for t in inputs:
            t.requires_grad_()
        running = torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)

        def f(x, r, w, b, residual=residual, running=running, training=training, activation=activation):
            own = [t.clone().to(DEVICE) for t in running]
            return ours(x, r if residual else None, w, b, *own, training=training, activation=activation)

        inputs = inputs if residual else [inputs[0], inputs[1].detach(), *inputs[2:]]
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)
    x = random((4, 3)).requires_grad_()  # and through the native forward, in fp32
    second = []
    for fn in (ours, plain):
        y = fn(x, None, *affine(3), None, None, activation="relu")
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        second += torch.autograd.grad(dx.square().sum(), x)
    assert error(*second) < 1e-4


def test_transforms_and_forward_mode():
    x, residual, tangent = (random((4, 3, 2, 2), torch.float64, seed=i) for i in range(3))
    weight, bias = (t.double() for t in affine(3))

    def value(fn, x):
        mean, var = torch.zeros(3).to(x), torch.ones(3).to(x)
        return fn(x, residual, weight, bias, mean, var, activation="relu").square()

    for training in (True, False):
        found = []
        for fn in (ours, plain):
            f = functools.partial(value, functools.partial(fn, training=training))
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent
            found.append([torch.func.grad(lambda t, f=f: f(t).sum())(x), torch.func.jvp(f, (x,), (tangent,))[1], dual])
            if not training:  # running statistics do not move under vmap, in torch neither
                found[-1] += [torch.func.vmap(f)(torch.stack([x, tangent])), torch.func.jacrev(f)(x)]
        for a, b in zip(*found, strict=True):
            assert error(a, b) < 1e-12


@each_backend
def test_two_runs_are_equal_to_the_bit_at_any_number_of_threads(backend):
    shape = (6, 4, 7, 7) if backend == "triton" and DEVICE == "cpu" else (8, 24, 17, 17)
    x, dy = random(shape), random(shape, seed=2)
    weight, bias = affine(shape[1])
    threads = torch.get_num_threads()
    for layout in ("planes", "rows"):
        runs = []
        for count in (threads, threads, 1):
            torch.set_num_threads(count)
            with ssl_fast.backend(backend):
                runs.append(
                    results(ours, laid(x, layout), laid(x, layout), weight, bias, dy, x.dtype, activation="relu")
                )
            torch.set_num_threads(threads)
        assert all(
            torch.equal(run[name], runs[0][name]) for run in runs[: 3 if backend != "reference" else 2] for name in run
        )


# ---- memory


@pytest.mark.parametrize(("dtype", "most"), ((torch.float32, 1.04), (torch.bfloat16, 1.07)))
def test_what_is_kept_for_the_backward(dtype, most):
    x, residual = random((32, 64, 14, 14), dtype, "rows"), random((32, 64, 14, 14), dtype, "rows", seed=1)
    mine = ssl_fast.nn.BatchNorm2d(64, activation="relu").to(DEVICE)

    def kept(*inputs) -> float:
        """Bytes saved beside parameters, as a share of the input's."""
        saved = {}
        parameters = {p.data_ptr() for p in mine.parameters()}

        def pack(t):
            if t.data_ptr() not in parameters:
                saved[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = mine(*inputs)
        del y
        return sum(saved.values()) / (x.numel() * x.element_size())

    x.requires_grad_()
    assert 1 <= kept(x) < 1.002
    assert 1 <= kept(x, residual) <= most
    with torch.no_grad():
        assert kept(x, residual) == 0


# ---- as torch's


@pytest.mark.parametrize("name", ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"))
def test_torchs_own_module_tests(name):
    from torch.testing._internal.common_modules import module_db

    info = next(m for m in module_db if m.module_cls is getattr(nn, name))
    cls = getattr(ssl_fast.nn, name)
    seen = 0
    for training, dtype in itertools.product((True, False), (torch.float32, torch.float64)):
        for case in info.module_inputs_func(info, device=DEVICE, dtype=dtype, requires_grad=True, training=training):
            args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
            torch.manual_seed(0)
            theirs = info.module_cls(*args, **kwargs).to(DEVICE, dtype).train(training)
            mine = cls(*args, **kwargs).to(DEVICE, dtype).train(training)
            mine.load_state_dict(theirs.state_dict())
            given = case.forward_input
            expected, got = theirs(*given.args, **given.kwargs), mine(*given.args, **given.kwargs)
            torch.testing.assert_close(got, expected)
            if case.reference_fn is not None:
                torch.testing.assert_close(got, case.reference_fn(mine, list(mine.parameters()), *given.args))
            if got.requires_grad:
                leaves = [t for t in (*given.args, *mine.parameters()) if t.requires_grad]
                of_theirs = [t for t in (*given.args, *theirs.parameters()) if t.requires_grad]
                dy = torch.randn_like(got)
                for a, b in zip(
                    torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, of_theirs, dy), strict=True
                ):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
                torch.testing.assert_close(a, b)
            seen += 1
    assert seen > 10


def test_modules_are_torchs_subclasses_with_their_state_dict():
    for name, shape in (("BatchNorm1d", (4, 3)), ("BatchNorm2d", (4, 3, 2, 2)), ("BatchNorm3d", (4, 3, 2, 2, 2))):
        base, cls = getattr(nn, name), getattr(ssl_fast.nn, name)
        theirs = base(3, momentum=None)
        theirs.eval()
        mine = cls.from_torch(theirs, activation="relu")
        assert isinstance(mine, base) and not mine.training
        assert mine.weight is theirs.weight and mine.running_var is theirs.running_var
        assert list(mine.state_dict()) == list(theirs.state_dict())
        assert "activation='relu'" in repr(mine) and "num_splits" not in repr(mine)
        for copied in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
            assert torch.equal(copied(torch.ones(shape)), mine(torch.ones(shape)))
        with pytest.raises(ValueError, match="activation"):
            mine.to_torch()
        back = cls.from_torch(theirs).to_torch()
        assert type(back) is base and back.weight is theirs.weight and not back.training
        with pytest.raises(ValueError):
            cls(3)(torch.ones(2, 3, 4, 4, 4, 4))
    assert ssl_fast.nn.BatchNorm2d(3, affine=False, track_running_stats=False).state_dict() == {}


def test_a_module_with_an_activation_can_be_looked_at():
    mine = ssl_fast.nn.BatchNorm2d(4, activation="relu")
    assert not hasattr(mine, "qconfig") and "activation" in dict(inspect.getmembers(mine))


def test_autocast_leaves_the_input_dtype():
    x = random((4, 3, 5, 5), torch.bfloat16)
    mine, theirs = (m.BatchNorm2d(3).to(DEVICE) for m in (ssl_fast.nn, nn))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert mine(x).dtype == theirs(x).dtype == torch.bfloat16
        assert mine(x.float()).dtype == theirs(x.float()).dtype


@pytest.mark.skipif("triton" not in BACKENDS, reason="no triton")
@pytest.mark.parametrize("layout", ("planes", "rows"))
def test_as_many_parts_as_a_large_gpu_has(layout, monkeypatch):
    """More partial sums than are merged at a time."""
    home = pytest.importorskip("ssl_fast.kernels.batch_norm")
    monkeypatch.setattr(home, "multiprocessors", lambda device: 60)
    shape = (2200, 2, 3, 3) if layout == "planes" else (2600, 3)
    x, residual, dy = (random(shape, layout=layout, seed=seed) for seed in range(3))
    with ssl_fast.backend("triton"):
        assert home._Launch(x, 1, "batch_norm_fwd", lambda cut: None).parts > 2 * home.BLOCK_P.value
    check(x, residual, *affine(shape[1]), dy, "triton", activation="relu")


def test_opcheck():
    x, dy = random((4, 3, 5, 5), layout="rows"), random((4, 3, 5, 5), layout="rows", seed=2)
    weight, bias = affine(3)
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    count = torch.tensor(0, device=DEVICE)
    forward = (x, weight, bias, mean, var, count, None, True, 0.1, 1e-5)
    namespace = torch.ops.ssl_fast
    for momentum, num_splits, activation, keep in (
        (0.1, 2, 1, True),
        (None, 1, 3, False),
        (0.1, ops.EACH_IMAGE, 1, True),
    ):
        arguments = (*forward[:8], momentum, 1e-5, num_splits, activation)
        opcheck(namespace.batch_norm_fwd.default, (x, *arguments, keep))
        opcheck(namespace.batch_norm_.default, (x.clone(), *arguments))
    _, stats, mask = ops.batch_norm_fwd(x, *forward, 1, 1, True)
    saved = (dy, x, None, mask, weight, bias, stats)
    for num_splits in (2, ops.EACH_IMAGE):
        opcheck(namespace.batch_norm_stats.default, (x, num_splits))
    opcheck(namespace.batch_norm_sums.default, (*saved, 1))
    for means, dx, dresidual in ((None, True, True), (torch.zeros(2, 1, 3, device=DEVICE), True, False)):
        opcheck(namespace.batch_norm_bwd.default, (*saved, means, True, 1, dx, dresidual))


def test_compiles_whole_with_a_dynamic_batch():
    """momentum=None too, where torch's own module breaks the graph."""
    mine = ssl_fast.nn.BatchNorm2d(3, momentum=None, activation="relu").to(DEVICE)
    eager = copy.deepcopy(mine)
    compiled = torch.compile(mine, fullgraph=True, dynamic=True)
    for n in (4, 7):
        x, residual = random((n, 3, 5, 5)).requires_grad_(), random((n, 3, 5, 5), seed=1)
        y, expected = compiled(x, residual), eager(x, residual)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (y, expected)))
    assert torch.equal(mine.running_var, eager.running_var) and mine.num_batches_tracked == 2


# ---- instruction sets

ISA = """
import torch, sys
from ssl_fast.ops import batch_norm as ops
torch.manual_seed(0)
off = 0.0
for shape in ((4, 21, 5, 7), (3, 64, 9, 9), (20, 19)):
    for rows in (False, True):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, r, dy = ((torch.randn(shape) * 3).to(dtype) for _ in range(3))
            if rows:
                x, r, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, r, dy))
            w, b = torch.randn(2, shape[1])
            for activation in range(5):
                got = []
                for backend in ("native", "reference"):
                    keep = activation in (1, 2)
                    y, stats, mask = ops.batch_norm_fwd(
                        x, r, w, b, None, None, None, None, True, 0.1, 1e-5, 1, activation, keep, backend=backend)
                    saved = (dy, x, None if keep else r, mask if keep else None, w, b, stats, None, True, activation)
                    got.append((y, *ops.batch_norm_bwd(*saved, True, activation > 0, backend=backend)))
                for mine, theirs in zip(*got):
                    error = (mine.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-9)
                    off = max(off, error.item() / {torch.float32: 1e-5, torch.float16: 1e-3}.get(dtype, 1e-2))
print("off", off)
sys.exit(not off < 1)
"""


@pytest.mark.skipif(ops.batch_norm_fwd.reason("native", "cpu", torch.float32) is not None, reason="no native library")
@pytest.mark.parametrize("capability", ("portable", "avx2", "avx512"))
def test_lesser_instruction_sets(capability, monkeypatch):
    monkeypatch.setenv("SSL_FAST_CPU_CAPABILITY", capability)
    ran = subprocess.run([sys.executable, "-c", ISA], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


# ---- bad input


def test_bad_input_is_named():
    x, ones = torch.ones(4, 3, 2, 2), torch.ones(3)
    for error_, match, call in (
        (TypeError, "x: got torch.int64", lambda: batch_norm(x.long(), None, None, training=True)),
        (ValueError, r"x: got shape \(3,\)", lambda: batch_norm(ones, None, None, training=True)),
        (ValueError, r"weight: got shape \(4,\)", lambda: batch_norm(x, None, None, torch.ones(4), training=True)),
        (TypeError, "running_mean: got torch.int64", lambda: batch_norm(x, ones.long(), ones, training=True)),
        (ValueError, "running_mean, running_var: got None", lambda: batch_norm(x, None, None)),
        (ValueError, "activation: got 'tanh'", lambda: batch_norm(x, None, None, training=True, activation="tanh")),
        (ValueError, "residual: got shape", lambda: batch_norm(x, None, None, training=True, residual=ones)),
        (ValueError, "eps: got -1", lambda: batch_norm(x, None, None, training=True, eps=-1)),
        (ValueError, "eps: got None", lambda: batch_norm(x, None, None, training=True, eps=None)),
        (TypeError, "x: got ndarray", lambda: batch_norm(x.numpy(), None, None, training=True)),
        (TypeError, "weight: got list", lambda: batch_norm(x, None, None, [1.0] * 3, training=True)),
        (TypeError, "residual: got int", lambda: batch_norm(x, None, None, training=True, residual=1)),
        (ValueError, r"activation: got \[", lambda: batch_norm(x, None, None, training=True, activation=["relu"])),
        (
            TypeError,
            "num_batches_tracked: got int",
            lambda: batch_norm(x, ones, ones, training=True, num_batches_tracked=1),
        ),
        (ValueError, "num_splits: got 0", lambda: batch_norm(x, None, None, training=True, num_splits=0)),
        (ValueError, "num_splits: got 3", lambda: batch_norm(x, None, None, training=True, num_splits=3)),
        (ValueError, "num_splits: got 0", lambda: ssl_fast.nn.BatchNorm2d(3, num_splits=0)),
        (ValueError, "momentum: got None", lambda: batch_norm(x, ones, ones, training=True, momentum=None)),
        (
            ValueError,
            "num_batches_tracked: got torch.int32",
            lambda: batch_norm(x, ones, ones, training=True, num_batches_tracked=torch.tensor(0, dtype=torch.int32)),
        ),
        (TypeError, "momentum: got 'a'", lambda: batch_norm(x, ones, ones, training=True, momentum="a")),
        (ValueError, "activation: got 'tanh'", lambda: ssl_fast.nn.BatchNorm2d(3, activation="tanh")),
    ):
        with pytest.raises(error_, match=match):
            call()
