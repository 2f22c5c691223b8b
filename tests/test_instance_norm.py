"""instance_norm against autograd of F.instance_norm and its followers in fp64, on every backend that runs here."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from common import DEVICE, assert_close, backends, error
from test_batch_norm import FOLLOWERS, affine, laid, random
from torch import Tensor, nn
from torch.nn import functional as F

import ssl_fast
from ssl_fast.functional import instance_norm
from ssl_fast.ops import batch_norm as ops

BACKENDS = backends(ops.batch_norm_fwd, torch.float32)
INTERPRETED = DEVICE == "cpu"  # triton, where each program takes its time
# On a CPU: blocks of several channels and of all, of a whole image, and of a part of one; lines of several rows.
SHAPES = (
    (4, 5, 2, 2), (3, 5, 7), (2, 1, 9, 9), (17, 19, 5, 7), (2, 130, 3, 3), (2, 3, 2, 3, 4), (16, 8, 6, 6),
    (2, 17, 80, 81), (2, 24, 80, 80), (1, 2, 60, 61),
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = tuple(FOLLOWERS)
CASES = [
    (shape, layout, ACTIVATIONS[(i + k) % 5], (k + i // 5) % 2 == 0, DTYPES[(i + k) % 4])
    for i, shape in enumerate(SHAPES)
    for k, layout in enumerate(("planes", "rows") * 2)
]


def cases():
    for backend in BACKENDS:
        few = backend == "triton" and INTERPRETED
        for case in [c for c in CASES[::5] if torch.Size(c[0]).numel() < 4000] if few else CASES:
            if ops.batch_norm_fwd.reason(backend, DEVICE, case[-1]) is None:
                shape, layout, activation, residual, dtype = case
                name = f"{backend}-{'x'.join(map(str, shape))}-{layout}-{activation}-{residual}-{str(dtype)[6:]}"
                yield pytest.param(backend, *case, id=name)


def each_backend(test):
    return pytest.mark.parametrize("backend", BACKENDS)(test)


def plain(x, residual, weight, bias, mean, var, *, training=True, momentum=0.1, eps=1e-5, activation=None):
    y = F.instance_norm(x, mean, var, weight, bias, training, momentum, eps)
    if y.requires_grad:  # torch reads a channels_last gradient for one image in the wrong order
        y.register_hook(lambda dy: dy.contiguous())
    return FOLLOWERS[activation](y if residual is None else y + residual)


def ours(x, residual, weight, bias, mean, var, *, training=True, momentum=0.1, eps=1e-5, activation=None):
    return instance_norm(
        x, mean, var, weight, bias, training, momentum, eps, residual=residual, activation=activation
    )  # fmt: skip


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


def strides(x: Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def check(x, residual, weight, bias, dy, backend, **options) -> dict[str, Tensor]:
    dtype = x.dtype
    truth = results(plain, x, residual, weight, bias, dy, torch.float64, **options)
    theirs = results(plain, x, residual, weight, bias, dy, dtype, **options)
    with ssl_fast.backend(backend):
        value = results(ours, x, residual, weight, bias, dy, dtype, **options)
    assert value["y"].dtype == dtype and strides(value["y"]) == strides(value["dx"]) == strides(x)
    for name in truth:
        assert_close(f"{name} of {backend}", value[name], truth[name], theirs[name], dtype)
    return value


@pytest.mark.parametrize(("backend", "shape", "layout", "activation", "with_residual", "dtype"), list(cases()))
def test_values_gradients_and_running_statistics(backend, shape, layout, activation, with_residual, dtype):
    # Every image its own mean and deviation: statistics of the batch would show.
    image = torch.arange(1, shape[0] + 1, device=DEVICE).view(-1, *(1,) * (len(shape) - 1))
    x = laid((random(shape, layout=layout, mean=0.5) * (0.5 + image / 4)).to(dtype), layout)
    residual = random(shape, dtype, layout, seed=1) if with_residual else None
    dy = random(shape, dtype, layout, seed=2)
    for training in (True, False):
        check(x, residual, *affine(shape[1]), dy, backend, training=training, activation=activation)


@each_backend
@pytest.mark.parametrize("layout", ("planes", "rows"))
@pytest.mark.parametrize("weight", (True, False))
def test_weight_or_bias_alone(backend, layout, weight):
    x, dy = random((3, 4, 5, 5), layout=layout), random((3, 4, 5, 5), layout=layout, seed=2)
    given = affine(4)
    given = (given[0], None) if weight else (None, given[1])
    for activation in (None, "relu"):
        check(x, None, *given, dy, backend, activation=activation)


@each_backend
@pytest.mark.parametrize("layout", ("planes", "rows"))
def test_eps_does_not_reach_the_running_variance(backend, layout):
    x, dy = random((4, 6, 5, 5), layout=layout), random((4, 6, 5, 5), layout=layout, seed=2)
    for momentum in (0.0, 0.3, 1.0):
        check(x, None, *affine(6), dy, backend, eps=1.0, activation="relu", momentum=momentum)


@each_backend
@pytest.mark.parametrize("layout", ("planes", "rows"))
@pytest.mark.parametrize("mean", (1e4, 1e6))
def test_a_large_mean_loses_nothing(backend, layout, mean):
    shape = (4, 6, 9, 9) if backend == "triton" and INTERPRETED else (16, 8, 12, 11)
    x, dy = random(shape, layout=layout, mean=mean), random(shape, layout=layout, seed=2)
    given = affine(shape[1])
    truth = results(plain, x, None, *given, dy, torch.float64)
    with ssl_fast.backend(backend):
        value = results(ours, x, None, *given, dy, torch.float32)
        alone = instance_norm(x, None, None, *given)  # without running statistics in one launch
    for name in truth:
        assert error(value[name], truth[name]) < 2e-6, name
    assert error(alone, truth["y"]) < 2e-6


@each_backend
@pytest.mark.parametrize("layout", ("planes", "rows"))
@pytest.mark.parametrize("value", (0.0, 0.1, -1e4, 1e15))
def test_a_constant_plane_is_its_bias(backend, layout, value):
    x = random((3, 5, 3, 3), layout=layout)
    x[1, 2] = value
    weight, bias = affine(5)
    with ssl_fast.backend(backend):
        y = instance_norm(x, weight=weight, bias=bias)
    assert torch.equal(y[1, 2], bias[2].expand(3, 3))
    assert error(y, F.instance_norm(x.double(), weight=weight.double(), bias=bias.double())) < 1e-6


@each_backend
def test_nan_stays_in_its_plane(backend):
    for layout in ("planes", "rows"):
        x = random((2, 3, 3, 3), layout=layout)
        x[1, 1, 2, 2] = float("nan")
        with ssl_fast.backend(backend):
            y = instance_norm(x, activation="relu")
        assert y[1, 1].isnan().all() and y[0].isfinite().all() and y[1, ::2].isfinite().all()


@each_backend
def test_strides_of_any_kind(backend):
    base = random((4, 6, 10, 8))
    inputs = {
        "sliced": base[:, 1:5, ::2, 1:],
        "expanded": random((1, 4, 1, 8)).expand(3, 4, 5, 8),
        "channels_last": random((4, 6, 5, 7), layout="rows"),
        "one channel": random((4, 1, 5, 7)).to(memory_format=torch.channels_last),
        "channels_last_3d": random((2, 6, 3, 4, 5), layout="rows"),
        "sequence": random((2, 9, 6)).transpose(1, 2),
    }
    for name, x in inputs.items():
        gradients = {
            "like x": random(x.shape, seed=2),
            "rows": random(x.shape, seed=2, layout="rows"),
            "expanded": random((1,), seed=3).expand(x.shape),
        }
        for kind, dy in gradients.items():
            leaf = x.detach().requires_grad_()
            with ssl_fast.backend(backend):
                y = ours(leaf, leaf, *affine(x.shape[1]), None, None, activation="relu")
                (dx,) = torch.autograd.grad(y, leaf, dy)
            wide = x.detach().double().requires_grad_()
            given = (t.double() for t in affine(x.shape[1]))
            expected = plain(wide, wide, *given, None, None, activation="relu")
            assert error(y, expected) < 1e-5, name
            assert error(dx, torch.autograd.grad(expected, wide, dy.double())[0]) < 1e-5, (name, kind)
            if name.startswith("channels_last") or name == "sequence":
                assert y.stride() == x.stride()


@each_backend
@pytest.mark.parametrize("shape", ((0, 3, 4, 4), (2, 3, 0, 4), (0, 3, 5)))
def test_nothing_in_nothing_out(backend, shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    weight, bias, var = (torch.ones(3, device=DEVICE, requires_grad=g) for g in (True, True, False))
    mean = torch.zeros(3, device=DEVICE)
    with ssl_fast.backend(backend):
        y = instance_norm(x, mean, var, weight, bias, activation="relu")
        y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert (weight.grad == 0).all() and (bias.grad == 0).all() and (mean == 0).all() and (var == 1).all()


@each_backend
def test_two_runs_are_equal_to_the_bit_at_any_number_of_threads(backend):
    shape = (2, 3, 7, 7) if backend == "triton" and INTERPRETED else (18, 24, 17, 18)
    x, dy = random(shape), random(shape, seed=2)
    given, threads = affine(shape[1]), torch.get_num_threads()
    for layout in ("planes", "rows"):
        runs = []
        for count in (threads, 1) if backend != "reference" else (threads, threads):
            torch.set_num_threads(count)
            with ssl_fast.backend(backend):
                runs.append(results(ours, laid(x, layout), laid(x, layout), *given, dy, x.dtype, activation="relu"))
        torch.set_num_threads(threads)
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_second_derivatives():
    for shape, activation, residual in (
        ((2, 2, 3), "relu", True),
        ((2, 2, 2, 2), None, False),
        ((3, 1, 3), "gelu", True),
    ):
        inputs = [random(shape, torch.float64), random(shape, torch.float64, seed=1)]
        inputs = [t.requires_grad_() for t in (*inputs, *(a.double() + 0.5 for a in affine(shape[1])))]

        def f(x, r, w, b, residual=residual, activation=activation):
            return ours(x, r if residual else None, w, b, None, None, activation=activation)

        inputs = inputs if residual else [inputs[0], inputs[1].detach(), *inputs[2:]]
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_is_kept_for_the_backward(dtype):
    x, saved = random((4, 16, 32, 32), dtype).requires_grad_(), {}
    norm = ssl_fast.nn.InstanceNorm2d(16, affine=True, activation="relu").to(DEVICE)
    pack = lambda t: saved.setdefault(t.data_ptr(), t) if t.data_ptr() not in own else t  # noqa: E731
    own = {p.data_ptr() for p in norm.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        norm(x)
    kept = sum(t.numel() * t.element_size() for t in saved.values())
    assert 1 <= kept / (x.numel() * x.element_size()) < 1.01


# ---- as torch's


@pytest.mark.parametrize("name", ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"))
def test_torchs_own_module_tests(name):
    from torch.testing._internal.common_modules import module_db

    info = next(m for m in module_db if m.module_cls is getattr(nn, name))
    seen = 0
    for training, dtype in itertools.product((True, False), (torch.float32, torch.float64)):
        for case in info.module_inputs_func(info, device=DEVICE, dtype=dtype, requires_grad=True, training=training):
            args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
            torch.manual_seed(0)
            theirs = info.module_cls(*args, **kwargs).to(DEVICE, dtype).train(training)
            mine = getattr(ssl_fast.nn, name)(*args, **kwargs).to(DEVICE, dtype).train(training)
            mine.load_state_dict(theirs.state_dict())
            given = case.forward_input
            expected, got = theirs(*given.args, **given.kwargs), mine(*given.args, **given.kwargs)
            torch.testing.assert_close(got, expected)
            if case.reference_fn is not None:
                torch.testing.assert_close(got, case.reference_fn(copy.deepcopy(mine), *given.args))
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


@pytest.mark.parametrize("momentum", (0.1, 1.0, None))
def test_running_statistics_are_torchs(momentum):
    """With momentum=None they stay, and no batch is counted: as in torch."""
    mine, theirs = (
        m.InstanceNorm2d(3, momentum=momentum, affine=True, track_running_stats=True) for m in (ssl_fast.nn, nn)
    )
    for step in range(3):
        x = random((4, 3, 5, 5), seed=step, mean=step).cpu()
        assert error(mine(x), theirs(x)) < 1e-6
    for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert error(mine.eval()(x), theirs.eval()(x)) < 1e-6 and mine.num_batches_tracked == 0


def test_modules_are_torchs_subclasses():
    for name, shape in (
        ("InstanceNorm1d", (4, 3, 6)),
        ("InstanceNorm2d", (4, 3, 2, 2)),
        ("InstanceNorm3d", (4, 3, 2, 2, 2)),
    ):
        base, cls = getattr(nn, name), getattr(ssl_fast.nn, name)
        theirs = base(3, affine=True, track_running_stats=True)
        mine = cls.from_torch(theirs, activation="relu")
        assert isinstance(mine, base) and mine.weight is theirs.weight and mine.running_var is theirs.running_var
        assert list(mine.state_dict()) == list(theirs.state_dict()) and "activation='relu'" in repr(mine)
        assert type(cls.from_torch(theirs).to_torch()) is base
        x, residual = torch.randn(shape), torch.randn(shape)
        expected = F.relu(theirs(x) + residual)
        assert error(copy.deepcopy(mine)(x, residual), expected) < 1e-6
        alone = mine(x[0], residual[0])  # without a batch
        assert alone.shape == x[0].shape and error(alone, expected[0]) < 1e-6
        for module in (cls(3), base(3)):
            with pytest.raises(ValueError):
                module(torch.ones(2, 3, 4, 4, 4, 4))
            with pytest.raises(ValueError, match="more than 1 spatial element when training"):
                module(torch.ones(2, 3, *(1,) * (len(shape) - 2)))
        one = torch.ones(2, 3, *(1,) * (len(shape) - 2))
        mine, theirs = (m(3, track_running_stats=True).eval() for m in (cls, base))
        assert error(mine(one), theirs(one)) < 1e-6
    assert ssl_fast.nn.InstanceNorm2d(3).state_dict() == {}
    half = ssl_fast.nn.InstanceNorm2d(3, affine=True, track_running_stats=True).half()
    assert half.weight.dtype == torch.float16 and half.running_var.dtype == torch.float32


def test_another_number_of_channels_is_an_error_or_a_warning():
    x = torch.randn(2, 4, 5, 5)
    for module in (ssl_fast.nn, nn):
        with pytest.raises(ValueError, match="to match num_features"):
            module.InstanceNorm2d(3, affine=True)(x)
        with pytest.warns(UserWarning, match="does not match num_features"):
            assert module.InstanceNorm2d(3)(x).shape == x.shape


def test_compiles_whole_with_a_dynamic_batch():
    mine = ssl_fast.nn.InstanceNorm2d(3, affine=True, track_running_stats=True, activation="relu").to(DEVICE)
    eager = copy.deepcopy(mine)
    compiled = torch.compile(mine, fullgraph=True, dynamic=True)
    for n in (4, 7):
        x, residual = random((n, 3, 5, 5)).requires_grad_(), random((n, 3, 5, 5), seed=1)
        y, expected = compiled(x, residual), eager(x, residual)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (y, expected)))
    assert torch.equal(mine.running_var, eager.running_var)


# ---- in a built model


class Block(nn.Module):
    """As in an InstanceNorm U-Net: conv, norm, activation, and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(0.01))
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.ReLU()
        self.last = nn.InstanceNorm2d(4, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(self.act(self.norm(self.conv(x)) + x))


def test_accelerate_swaps_and_fuses_them():
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 3, 9, 9)
    expected = model(x)
    report = ssl_fast.accelerate(model)
    assert {"stem.1": "leaky_relu"}.items() <= report.fused.items() and "add, relu" in report.fused["norm"]
    assert list(report.swapped) == ["last"] and not report.left
    assert type(model.norm) is ssl_fast.nn.InstanceNorm2d
    assert error(report.model(x), expected) < 1e-6
    model = report.restore()
    assert type(model.norm) is nn.InstanceNorm2d and torch.equal(model(x), expected)


# ---- bad input


def test_bad_input_is_named():
    x = torch.ones(4, 3, 2, 2)
    for error_, match, call in (
        (TypeError, "x: got torch.int64", lambda: instance_norm(x.long())),
        (ValueError, r"x: got shape \(3,\)", lambda: instance_norm(torch.ones(3))),
        (ValueError, "1 spatial element", lambda: instance_norm(torch.ones(4, 3))),
        (ValueError, r"weight: got shape \(4,\)", lambda: instance_norm(x, weight=torch.ones(4))),
        (ValueError, "running_mean, running_var: got None", lambda: instance_norm(x, use_input_stats=False)),
        (ValueError, "activation: got 'tanh'", lambda: instance_norm(x, activation="tanh")),
        (ValueError, "activation: got 'tanh'", lambda: ssl_fast.nn.InstanceNorm2d(3, activation="tanh")),
        (ValueError, "residual: got shape", lambda: instance_norm(x, residual=torch.ones(3))),
        (ValueError, "eps: got -1", lambda: instance_norm(x, eps=-1)),
        (ValueError, "eps: got None", lambda: instance_norm(x, eps=None)),
        (TypeError, "x: got list", lambda: instance_norm([[[1.0, 2.0]]])),
        (TypeError, "bias: got list", lambda: instance_norm(x, bias=[1.0] * 3)),
        (TypeError, "residual: got list", lambda: instance_norm(x, residual=[1.0])),
        (TypeError, "residual: got list", lambda: ssl_fast.nn.InstanceNorm2d(3)(x[0], [1.0])),
        (
            ValueError,
            r"residual: got shape \(3, 1, 1\).*\(3, 2, 2\)",
            lambda: ssl_fast.nn.InstanceNorm2d(3)(x[0], torch.ones(3, 1, 1)),
        ),
        (TypeError, "momentum: got None, allowed: a number such as 0.1$", lambda: instance_norm(x, momentum=None)),
        (ValueError, r"activation: got \[", lambda: instance_norm(x, activation=["relu"])),
    ):
        with pytest.raises(error_, match=match):
            call()
