"""layer_norm against autograd of F.layer_norm and its followers in fp64, on every backend that runs here."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from common import DEVICE, FLOOR, assert_close, backends, error
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.nn import functional as F
from torch.nn.utils import parametrize

import ssl_fast
from ssl_fast.functional import layer_norm
from ssl_fast.ops import layer_norm as ops

BACKENDS = backends(ops.layer_norm_fwd, torch.float32)
FOLLOWERS = {None: lambda u: u, "relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu, "gelu": F.gelu}
ACTIVATIONS = tuple(FOLLOWERS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Shape and how many of its last dimensions are normalised; 0: the channels, as planes and as rows of channels.
SHAPES = (
    ((7, 1), 1), ((5, 3), 1), ((6, 65), 1), ((3, 1023), 1), ((2, 3, 1025), 1), ((3, 4097), 1), ((2, 65537), 1),
    ((130, 48), 1), ((5, 4, 3, 2), 2), ((33,), 1), ((300, 96), 1),
    ((2, 5, 3, 3), 0), ((1, 96, 7, 7), 0), ((3, 1, 2, 2), 0), ((2, 17, 9, 11), 0), ((4, 6), 0), ((2, 3, 2, 3, 4), 0),
    ((2, 130, 70), 0), ((2, 1, 65), 0),
)  # fmt: skip
# Every shape with two dtypes and two activations, which move on from shape to shape.
CASES = [
    (shape, last, layout, ACTIVATIONS[(i + 2 * k) % 5], (k + i) % 2 == 0, DTYPES[(i + k) % 4])
    for i, (shape, last) in enumerate(SHAPES)
    for k, layout in enumerate(("planes", "rows") * (1 if last else 2))
]
INTERPRETED = [c for c in CASES if c[-1] != torch.float64]


def laid(x: Tensor, layout: str) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" and x.dim() > 1 else x.contiguous()


def random(shape, dtype=torch.float32, layout="planes", seed=0, mean=0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + mean
    return laid(x.to(DEVICE, dtype), layout)


def normalised(shape: tuple[int, ...], last: int) -> tuple[int, ...]:
    return shape[-last:] if last else shape[1:2]


def affine(shape: tuple[int, ...], seed: int = 7) -> tuple[Tensor, Tensor]:
    """Weights of both signs, one of them 0."""
    weight, bias = random(shape, seed=seed), random(shape, seed=seed + 1)
    weight.view(-1)[weight.numel() // 2] = 0
    return weight, bias


def plain(x, residual, weight, bias, last, *, eps=1e-5, activation=None):
    shape = normalised(x.shape, last)
    if last:
        y = F.layer_norm(x, shape, *(t if t is None else t.to(x.dtype) for t in (weight, bias)), eps)
    else:
        y = plain(x.movedim(1, -1), None, weight, bias, 1, eps=eps).movedim(-1, 1)
    return FOLLOWERS[activation](y if residual is None else y + residual)


def ours(x, residual, weight, bias, last, *, eps=1e-5, activation=None):
    return layer_norm(
        x, normalised(x.shape, last), weight, bias, eps, dim=-1 if last else 1, residual=residual, activation=activation
    )  # fmt: skip


def results(fn, x, residual, weight, bias, dy, last, dtype, **options) -> dict[str, Tensor]:
    """y and gradients, with fn run on inputs in dtype, and on affine parameters in fp32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    inputs = {
        name: None if t is None else t.detach().to(wide if name in ("weight", "bias") else dtype).requires_grad_()
        for name, t in inputs.items()
    }
    y = fn(*inputs.values(), last, **options)
    given = {name: t for name, t in inputs.items() if t is not None}
    gradients = torch.autograd.grad(y, list(given.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(given, gradients, strict=True)}}


def strides(x: Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def check(x, residual, weight, bias, dy, last, backend, **options) -> dict[str, Tensor]:
    dtype = x.dtype
    truth = results(plain, x, residual, weight, bias, dy, last, torch.float64, **options)
    theirs = results(plain, x, residual, weight, bias, dy, last, dtype, **options)
    with ssl_fast.backend(backend):
        value = results(ours, x, residual, weight, bias, dy, last, dtype, **options)
    for name in ("y", "dx"):
        assert value[name].dtype == dtype and strides(value[name]) == strides(x.contiguous() if last else x)
    scale = dy.double().norm()
    for name in truth:
        if truth[name].norm() < 1e-6 * scale:  # nothing remains of one value, or of two: measured beside the terms
            assert (value[name].double() - truth[name]).norm() <= (
                2 * (theirs[name].double() - truth[name]).norm() + FLOOR[dtype] * scale
            ), name
        else:
            assert_close(f"{name} of {backend}", value[name], truth[name], theirs[name], dtype)
    return value


def cases():
    for backend in BACKENDS:
        slow = backend == "triton" and DEVICE == "cpu"
        for case in INTERPRETED if slow else CASES:
            if ops.layer_norm_fwd.reason(backend, DEVICE, case[-1]) is None:
                shape, last, layout, activation, residual, dtype = case
                size = "x".join(map(str, shape))
                name = f"{backend}-{size}-{last or layout}-{activation}-{residual}-{str(dtype)[6:]}"
                yield pytest.param(backend, *case, id=name)


def each_backend(test):
    return pytest.mark.parametrize("backend", BACKENDS)(test)


@pytest.mark.parametrize(("backend", "shape", "last", "layout", "activation", "with_residual", "dtype"), list(cases()))
def test_values_and_gradients(backend, shape, last, layout, activation, with_residual, dtype):
    layout = "planes" if last else layout
    x = random(shape, dtype, layout, mean=0.5)
    residual = random(shape, dtype, layout, seed=1) if with_residual else None
    dy = random(shape, dtype, layout, seed=2)
    check(x, residual, *affine(normalised(shape, last)), dy, last, backend, activation=activation)


@each_backend
@pytest.mark.parametrize(("shape", "last"), (((7, 33), 1), ((2, 700), 1), ((2, 12, 5, 5), 0)))
def test_weight_or_bias_alone_and_every_choice_of_gradients(backend, shape, last):
    few = backend == "triton" and DEVICE == "cpu"
    choices = [(True,) * 4] if few else list(itertools.product((False, True), repeat=4))
    dy, (weight, bias) = random(shape, seed=2), affine(normalised(shape, last))
    for with_weight, with_bias, activation in itertools.product((False, True), (False, True), (None, "relu", "silu")):
        for needs in choices:
            values = [
                random(shape),
                random(shape, seed=1),
                weight if with_weight else None,
                bias if with_bias else None,
            ]
            inputs = [
                v.clone().requires_grad_() if n and v is not None else v for v, n in zip(values, needs, strict=True)
            ]
            wanted = [v for v in inputs if v is not None and v.requires_grad]
            if not wanted:
                continue
            with ssl_fast.backend(backend):
                got = torch.autograd.grad(ours(*inputs, last, activation=activation), wanted, dy)
            expected = torch.autograd.grad(plain(*inputs, last, activation=activation), wanted, dy)
            for a, b in zip(got, expected, strict=True):
                assert error(a, b) < 1e-5


@each_backend
@pytest.mark.parametrize(("shape", "last"), (((6, 300), 1), ((2, 20, 4, 5), 0)))
def test_a_large_eps_counts(backend, shape, last):
    check(random(shape), None, *affine(normalised(shape, last)), random(shape, seed=2), last, backend, eps=1.0)


@each_backend
@pytest.mark.parametrize("mean", (1e3, 1e4, 1e6))
@pytest.mark.parametrize(
    ("shape", "last", "layout"), (((6, 1000), 1, "planes"), ((2, 96, 5, 5), 0, "planes"), ((2, 96, 5, 5), 0, "rows"))
)
def test_a_large_mean_loses_nothing(backend, shape, last, layout, mean):
    """x - mean is exact there, and what the mean's own rounding leaves out is carried along."""
    x, dy = random(shape, layout=layout, mean=mean), random(shape, layout=layout, seed=2)
    parameters = affine(normalised(shape, last))
    truth = results(plain, x, None, *parameters, dy, last, torch.float64)
    with ssl_fast.backend(backend):
        value = results(ours, x, None, *parameters, dy, last, torch.float32)
    for name in truth:
        assert error(value[name], truth[name]) < 2e-6, name


@each_backend
def test_an_outlier_does_not_spoil_the_variance(backend):
    """Neither in the first number, where a pivot might be looked for, nor elsewhere."""
    for at in (0, 50, 299):
        x = random((4, 300), mean=3.0)
        x[:, at] = 1e5
        check(x, None, *affine((300,)), random((4, 300), seed=2), 1, backend)
        x = random((2, 300, 3), mean=3.0)
        x[:, at] = 1e5
        check(x, None, *affine((300,)), random(x.shape, seed=2), 0, backend)


@each_backend
@pytest.mark.parametrize("value", (0.0, 0.1, -1e4, 1e15))
def test_a_constant_row_is_its_bias(backend, value):
    for shape, last in (((3, 65), 1), ((2, 65, 3), 0)):
        weight, bias = affine((65,))
        with ssl_fast.backend(backend):
            y = ours(torch.full(shape, value, device=DEVICE), None, weight, bias, last)
        expected = bias if last else bias[:, None]
        assert torch.equal(y, expected.expand_as(y))


@each_backend
def test_nan_and_inf_stay_in_their_row(backend):
    for bad in (float("nan"), float("inf")):
        x, planes = random((4, 40)), random((1, 5, 9))
        x[1, 7] = planes[0, 2, 4] = bad
        with ssl_fast.backend(backend):
            y, z = layer_norm(x, 40, activation="relu"), layer_norm(planes, 5, dim=1)
        assert y[1].isnan().any() and y[[0, 2, 3]].isfinite().all()
        assert z[0, :, 4].isnan().any() and z[..., :4].isfinite().all() and z[..., 5:].isfinite().all()


@each_backend
@pytest.mark.parametrize(("shape", "last"), (((0, 5), 1), ((2, 0, 5), 1), ((0, 5, 2, 2), 0), ((2, 5, 0, 3), 0)))
def test_an_empty_batch(backend, shape, last):
    module = (ssl_fast.nn.LayerNorm if last else ssl_fast.nn.LayerNorm2d)(5, activation="relu").to(DEVICE)
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    with ssl_fast.backend(backend):
        y = module(x)
        y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert (module.weight.grad == 0).all() and (module.bias.grad == 0).all()


# ---- dtypes and layouts


@each_backend
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("parameter", (torch.float32, torch.bfloat16, torch.float64))
def test_parameters_of_another_dtype(backend, dtype, parameter):
    """Neither is rounded to the other's dtype: the result is that of fp64, rounded once."""
    x, (weight, bias) = random((5, 48), dtype, mean=2.0), (t.to(parameter).requires_grad_() for t in affine((48,)))
    with ssl_fast.backend(backend):
        y = layer_norm(x, 48, weight, bias)
        gradients = torch.autograd.grad(y.float().square().sum(), (weight, bias))
    truth = F.layer_norm(x.double(), (48,), weight.double(), bias.double())
    assert y.dtype == dtype and all(g.dtype == parameter for g in gradients)
    assert (y.double() - truth).abs().max() <= 0.51 * torch.finfo(dtype).eps * truth.abs().max()


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
    if backend == "triton" and DEVICE == "cpu":
        inputs = {name: inputs[name] for name in ("sliced", "channels_last")}
    for (name, x), last in itertools.product(inputs.items(), (0, 1)):
        parameters = affine(normalised(x.shape, last))
        gradients = {
            "like x": random(x.shape, seed=2),
            "rows": random(x.shape, seed=2, layout="rows"),
            "expanded": random((1,), seed=3).expand(x.shape),
        }
        for kind, dy in gradients.items():
            got, expected = [], []
            for fn, into in ((ours, got), (plain, expected)):
                leaf = x.detach().requires_grad_()  # of x's strides
                with ssl_fast.backend(backend):
                    y = fn(leaf, leaf, *parameters, last, activation="relu")
                    into += [y, *torch.autograd.grad(y, leaf, dy)]
            for a, b in zip(got, expected, strict=True):
                assert error(a, b) < 2e-5, (name, last, kind)
    x = inputs["channels_last"]
    assert ours(x, None, None, None, 0).is_contiguous(memory_format=torch.channels_last)
    view = inputs["sliced"]
    weight = random((7, 2))[:, 0]
    with ssl_fast.backend(backend):
        assert error(ours(view, None, weight, None, 1), plain(view, None, weight, None, 1)) < 1e-5
        assert error(ours(view, None, None, None, 0), plain(view, None, None, None, 0)) < 1e-5


@each_backend
def test_many_rows(backend):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("too many to interpret")
    # The last two are images that are swept tile by tile, and whole.
    for shape, last, layout in (
        ((70_001, 3), 1, "planes"),
        ((3, 5, 20_011), 0, "planes"),
        ((16, 500, 9, 9), 0, "planes"),
    ):
        x, dy = random(shape, layout=layout), random(shape, layout=layout, seed=2)
        check(x, None, *affine(normalised(shape, last)), dy, last, backend, activation="relu")


@pytest.mark.skipif("triton" not in BACKENDS, reason="no triton")
def test_as_many_parts_as_a_large_gpu_has(monkeypatch):
    """More partial sums than are added at a time."""
    home = pytest.importorskip("ssl_fast.kernels.layer_norm")
    monkeypatch.setattr(home, "multiprocessors", lambda device: 20)
    parts = []
    monkeypatch.setattr(home._Launch, "cut", lambda self, config, cut=home._Launch.cut: parts.append(
        (cut(self, config), self.parts)[1]))  # fmt: skip
    for shape, last in (((1300, 21), 1), ((3, 5, 700), 0)):
        check(random(shape), None, *affine(normalised(shape, last)), random(shape, seed=2), last, "triton")
    assert max(parts) > 2 * home.BLOCK_P.value


@each_backend
def test_a_residual_that_is_the_input_or_of_another_dtype(backend):
    x = random((3, 4, 5)).requires_grad_()
    with ssl_fast.backend(backend):
        for activation in (None, "relu"):
            got = torch.autograd.grad(ours(x, x, *affine((5,)), 1, activation=activation).square().sum(), x)
            expected = torch.autograd.grad(plain(x, x, *affine((5,)), 1, activation=activation).square().sum(), x)
            assert error(got[0], expected[0]) < 1e-5
        wide = random(x.shape, torch.float64, seed=1)
        y = ours(x, wide, None, None, 1, activation="relu")
        assert y.dtype == torch.float64 and error(y, plain(x, wide, None, None, 1, activation="relu")) < 1e-6


@each_backend
def test_relu_at_zero(backend):
    """The gradient at 0 is 0, as torch's; NaN passes both ways; infinite gradients of what is cut off are 0."""
    x = torch.tensor([[-1.0, 1, 0], [-1, 0, 1], [float("nan"), 0, 0]], device=DEVICE, requires_grad=True)
    weight, bias = torch.zeros(3, device=DEVICE), torch.tensor([0.0, 1, -1], device=DEVICE, requires_grad=True)
    dy = torch.tensor([[1, 1, float("inf")]] * 3, device=DEVICE)
    with ssl_fast.backend(backend):
        y = layer_norm(x, 3, weight, bias, activation="relu")
        (dbias,) = torch.autograd.grad(y[:2], bias, dy[:2])
        (through,) = torch.autograd.grad(layer_norm(x[2:], 3, weight, bias, activation="relu"), bias, dy[:1])
    assert y[:2].tolist() == [[0, 1, 0]] * 2 and y[2].isnan().all()
    assert dbias.tolist() == [0, 2, 0] and through.tolist() == [1, 1, float("inf")]


# ---- derivatives, determinism, memory


def test_second_derivatives():
    for shape, last, activation, residual in (
        ((3, 4), 1, "relu", True), ((2, 3, 2), 2, None, False), ((2, 3, 2), 0, "gelu", True),
        ((2, 4), 0, "silu", False),
    ):  # fmt: skip
        inputs = [random(shape, torch.float64), random(shape, torch.float64, seed=1)]
        inputs += [t.double() + 0.5 for t in affine(normalised(shape, last))]
        inputs = [t.requires_grad_(residual or i != 1) for i, t in enumerate(inputs)]

        def f(x, r, w, b, last=last, residual=residual, activation=activation):
            return ours(x, r if residual else None, w, b, last, activation=activation)

        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)
    x = random((4, 6)).requires_grad_()  # and through the native forward, in fp32
    second = []
    for fn in (ours, plain):
        (dx,) = torch.autograd.grad(fn(x, None, *affine((6,)), 1).square().sum(), x, create_graph=True)
        second += torch.autograd.grad(dx.square().sum(), x)
    assert error(*second) < 1e-4


def test_transforms_and_forward_mode():
    x, residual, tangent = (random((3, 4, 5), torch.float64, seed=i) for i in range(3))
    for last in (2, 0):
        w, b = (t.double() for t in affine(normalised(x.shape, last)))
        found = []
        for fn in (ours, plain):

            def f(t, fn=fn, w=w, b=b, last=last):
                return fn(t, residual, w, b, last, activation="gelu").square()

            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent
            vmapped = torch.func.vmap(f)(torch.stack([x, tangent]))
            found.append([torch.func.grad(lambda t, f=f: f(t).sum())(x), dual, vmapped, torch.func.jacrev(f)(x)])
        for mine, theirs in zip(*found, strict=True):
            assert error(mine, theirs) < 1e-12


@each_backend
def test_two_runs_are_equal_to_the_bit_at_any_number_of_threads(backend):
    small = backend == "triton" and DEVICE == "cpu"
    threads = torch.get_num_threads()
    for shape, last in (((40 if small else 2000, 65), 1), ((2, 12, 9, 9) if small else (9, 48, 33, 35), 0)):
        x, dy = random(shape), random(shape, seed=2)
        runs = []
        for count in (threads, threads, 1):
            torch.set_num_threads(count)
            with ssl_fast.backend(backend):
                runs.append(results(ours, x, x, *affine(normalised(shape, last)), dy, last, x.dtype, activation="relu"))
            torch.set_num_threads(threads)
        compared = runs[: 3 if backend != "reference" else 2]
        assert all(torch.equal(run[name], runs[0][name]) for run in compared for name in run)


def test_what_is_kept_for_the_backward():
    x, residual = random((64, 768)).requires_grad_(), random((64, 768), seed=1)
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    tensor, parameter, statistics = (4 * numbers for numbers in (x.numel(), 768, 3 * 64))
    for activation, more in ((None, 0), ("relu", tensor + parameter)):  # the residual, and the bias
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ssl_fast.nn.LayerNorm(768, activation=activation).to(DEVICE)(x, residual=residual)
        assert sum(saved.values()) == tensor + parameter + statistics + more


# ---- as torch's


def test_torchs_own_module_tests():
    from torch.testing._internal.common_modules import module_db

    info = next(m for m in module_db if m.module_cls is nn.LayerNorm)
    seen = 0
    for training, dtype in itertools.product((True, False), (torch.float32, torch.float64)):
        for case in info.module_inputs_func(info, device=DEVICE, dtype=dtype, requires_grad=True, training=training):
            args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
            theirs = nn.LayerNorm(*args, **kwargs).to(DEVICE, dtype).train(training)
            mine = ssl_fast.nn.LayerNorm(*args, **kwargs).to(DEVICE, dtype).train(training)
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
            seen += 1
    assert seen > 10


def test_modules_are_torchs_subclasses_with_their_state_dict():
    for cls, x in ((ssl_fast.nn.LayerNorm, random((4, 3))), (ssl_fast.nn.LayerNorm2d, random((2, 3, 4, 4)))):
        mine, theirs = cls(3, eps=1e-3, activation="relu").to(DEVICE), nn.LayerNorm(3)
        assert isinstance(mine, nn.LayerNorm) and list(mine.state_dict()) == list(theirs.state_dict())
        assert "activation='relu'" in repr(mine) and "activation" not in repr(cls(3))
        assert cls(3, bias=False).bias is None and cls(3, elementwise_affine=False).state_dict() == {}
        for copied in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
            assert torch.equal(copied(x), mine(x))
    x = random((2, 3, 4, 4))
    assert error(ssl_fast.nn.LayerNorm2d(3).to(DEVICE)(x), plain(x, None, None, None, 0)) < 1e-6


class Doubled(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return 2 * values


@pytest.mark.parametrize("cls", (ssl_fast.nn.LayerNorm, ssl_fast.nn.BatchNorm1d, ssl_fast.nn.InstanceNorm1d))
def test_a_weight_that_is_no_parameter_of_the_module_counts(cls):
    x = random((3, 5, 5))
    norm = cls(5, **({"affine": True} if cls is ssl_fast.nn.InstanceNorm1d else {})).to(DEVICE)
    expected = 2 * norm(x)
    torch.testing.assert_close(torch.func.functional_call(norm, {"weight": 2 * norm.weight}, (x,)), expected)
    parametrize.register_parametrization(norm, "weight", Doubled())
    torch.testing.assert_close(norm(x), expected)
    del norm.parametrizations
    norm.__class__ = cls
    norm.weight = 2 * torch.ones(5, device=DEVICE)  # as wrappers of modules leave it
    torch.testing.assert_close(norm(x), expected)


def test_autocast_is_as_torchs():
    mine, theirs = (m.LayerNorm(8).to(DEVICE) for m in (ssl_fast.nn, nn))
    with torch.autocast(DEVICE, torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            assert mine(random((4, 8), dtype)).dtype == theirs(random((4, 8), dtype)).dtype


def test_opcheck():
    for shape, channels in (((4, 6), False), ((2, 6, 3, 3), True)):
        x, dy, residual = (laid(random(shape, seed=s), "rows" if channels else "planes") for s in range(3))
        weight, bias = affine((6,))
        opcheck(torch.ops.ssl_fast.layer_norm_fwd.default, (x, residual, weight, bias, 6, channels, 1e-5, 1))
        _, stats = ops.layer_norm_fwd(x, None, weight, None, 6, channels, 1e-5, 0)
        for flags in ((True, True, True), (True, False, False), (False, False, True)):
            opcheck(
                torch.ops.ssl_fast.layer_norm_bwd.default,
                (dy, x, residual, weight, bias, stats, 6, channels, 3, *flags),
            )


@pytest.mark.parametrize("name", ("LayerNorm", "LayerNorm2d"))
def test_compiles_whole_with_a_dynamic_batch(name):
    mine = getattr(ssl_fast.nn, name)(6, activation="relu").to(DEVICE)
    compiled = torch.compile(mine, fullgraph=True, dynamic=True)
    for n in (4, 7):
        shape = (n, 5, 6) if name == "LayerNorm" else (n, 6, 5)
        x, residual = random(shape).requires_grad_(), random(shape, seed=1)
        y, expected = compiled(x, residual), mine(x, residual)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (y, expected)))


# ---- instruction sets

ISA = """
import torch, sys
from ssl_fast.ops import layer_norm as ops
torch.manual_seed(0)
off = 0.0
for shape in ((9, 21), (3, 64), (3, 1025), (2, 21, 37), (2, 40, 5, 7)):
    channels = len(shape) > 2
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, r, dy = ((torch.randn(shape) * 3 + 1).to(dtype) for _ in range(3))
        w, b = torch.randn(2, shape[1])
        for activation in range(5):
            got = []
            for backend in ("native", "reference"):
                y, stats = ops.layer_norm_fwd(x, r, w, b, shape[1], channels, 1e-5, activation, backend=backend)
                saved = (dy, x, r if activation else None, w, b, stats, shape[1], channels, activation)
                got.append((y, stats, *ops.layer_norm_bwd(*saved, True, activation > 0, True, backend=backend)))
            for mine, theirs in zip(*got):
                error = (mine.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-9)
                off = max(off, error.item() / {torch.float32: 1e-5, torch.float16: 1e-3}.get(dtype, 1e-2))
print("off", off)
sys.exit(not off < 1)
"""


@pytest.mark.skipif(ops.layer_norm_fwd.reason("native", "cpu", torch.float32) is not None, reason="no native library")
@pytest.mark.parametrize("capability", ("portable", "avx2", "avx512"))
def test_lesser_instruction_sets(capability, monkeypatch):
    monkeypatch.setenv("SSL_FAST_CPU_CAPABILITY", capability)
    ran = subprocess.run([sys.executable, "-c", ISA], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


# ---- bad input


def test_bad_input_is_named():
    x, ones = torch.ones(4, 3, 2), torch.ones(2)
    for error_, match, call in (
        (TypeError, "x: got torch.int64", lambda: layer_norm(x.long(), 2)),
        (ValueError, r"normalized_shape: got \(3,\) for x of shape \(4, 3, 2\)", lambda: layer_norm(x, 3)),
        (ValueError, r"normalized_shape: got \(\)", lambda: layer_norm(x, ())),
        (ValueError, r"normalized_shape: got \(2,\).*dim=1", lambda: layer_norm(x, 2, dim=1)),
        (ValueError, r"normalized_shape: got \(2,\).*dim=1", lambda: layer_norm(ones, 2, dim=1)),
        (ValueError, "dim: got 0", lambda: layer_norm(x, 2, dim=0)),
        (ValueError, "dim: got True", lambda: layer_norm(x, 3, dim=True)),
        (ValueError, "eps: got inf", lambda: layer_norm(x, 2, eps=float("inf"))),
        (ValueError, r"weight: got shape \(4,\)", lambda: layer_norm(x, 2, torch.ones(4))),
        (TypeError, "bias: got torch.int64", lambda: layer_norm(x, 2, ones, ones.long())),
        (ValueError, "bias: got device meta", lambda: layer_norm(x, 2, ones, ones.to("meta"))),
        (ValueError, "residual: got shape", lambda: layer_norm(x, 2, residual=ones)),
        (ValueError, "activation: got 'tanh'", lambda: layer_norm(x, 2, activation="tanh")),
        (ValueError, "activation: got 'tanh'", lambda: ssl_fast.nn.LayerNorm(2, activation="tanh")),
        (ValueError, "eps: got -1", lambda: layer_norm(x, 2, eps=-1)),
        (ValueError, "eps: got None", lambda: layer_norm(x, 2, eps=None)),
        (ValueError, "eps: got 'x'", lambda: layer_norm(x, 2, eps="x")),
        (TypeError, "x: got list", lambda: layer_norm([[1.0, 2.0]], 2)),
        (TypeError, "weight: got list", lambda: layer_norm(x, 2, [1.0, 2.0])),
        (TypeError, "residual: got list", lambda: layer_norm(x, 2, residual=[1.0, 2.0])),
        (TypeError, "normalized_shape: got 2.0", lambda: layer_norm(x, 2.0)),
        (TypeError, r"normalized_shape: got \[2.0\]", lambda: layer_norm(x, [2.0])),
        (TypeError, "normalized_shape: got '2'", lambda: ssl_fast.nn.LayerNorm("2")),
        (ValueError, r"activation: got \['relu'\]", lambda: layer_norm(x, 2, activation=["relu"])),
    ):
        with pytest.raises(error_, match=match):
            call()
