"""The code of csrc/batch_norm_cuda.h, run on the host by an emulator, against the references in fp64."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from common import assert_close
from torch import Tensor

from ssl_fast.ops import batch_norm as home
from ssl_fast.ops._norms import ACTIVATIONS, BY_SIGN, LEAKY_RELU

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Host:
    """The operators, launched on so many blocks at a time; `resident` as in batch_norm_on_host.cpp."""

    def __init__(self, library: ctypes.CDLL, slots: int, resident: bool) -> None:
        self.library, self.slots, self.resident = library, slots, resident

    def sizes(self, x: Tensor, splits: int, *others: Tensor | None):
        inner, positions = home.channels_innermost(x), math.prod(x.shape[2:])
        width = x.shape[1] if inner else positions
        pointers = [t.data_ptr() for t in (x, *others) if t is not None]
        vectors = all(n % 16 == 0 for n in (width * x.element_size(), *pointers))
        shape = (len(x), x.shape[1], positions, inner, splits, self.slots, self.resident, vectors)
        return DTYPES.index(x.dtype), (ctypes.c_int64 * 8)(*shape)

    @staticmethod
    def pointers(*tensors: Tensor | None):
        return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))

    def statistics(self, y, mask, x, residual, weight, bias, mean, var, count, stats, training, momentum, eps, splits,
                   activation, variance=False):  # fmt: skip
        splits = splits if training else 1
        own = torch.full((3, splits, x.shape[1]), math.nan)
        done = self.library.run_forward(
            *self.sizes(x, splits, residual, y),
            self.pointers(x, residual, weight, bias, mean, var, count if training else None, stats, y, own, mask),
            training and stats is None, momentum is None, activation, variance,
            ctypes.c_float(momentum or 0), ctypes.c_float(eps),
        )  # fmt: skip
        assert done == 0, "threads wait for each other for ever"
        return own

    def fwd(self, x, *arguments):
        *arguments, keep_mask = arguments
        y, mask = torch.full_like(x, math.nan), torch.full((math.prod(home.mask_shape(x)),), 9, dtype=torch.uint8)
        return y, self.statistics(y, mask if keep_mask else None, x, *arguments), mask

    def stats(self, x, splits):
        return self.statistics(None, None, x, *[None] * 7, True, 0.1, 0, splits, 0, True)

    def bwd(self, dy, x, residual, mask, weight, bias, stats, means, training, activation, need_dx, need_dresidual):
        dx, dresidual = (torch.full_like(x, math.nan) if need else None for need in (need_dx, need_dresidual))
        dweight, dbias = (torch.full(x.shape[1:2], math.nan) if means is None else None for _ in range(2))
        sums = torch.full((2, *stats.shape[1:]), math.nan) if means is None else None
        done = self.library.run_backward(
            *self.sizes(x, stats.shape[1], dy, residual, dx, dresidual),
            self.pointers(dy, x, residual, mask, weight, bias, stats, means, dx, dresidual, dweight, dbias, sums),
            training, activation,
        )  # fmt: skip
        assert done == 0, "threads wait for each other for ever"
        return dx, dresidual, dweight, dbias, sums


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root, include = Path(__file__).parents[1], Path(torch.__file__).parent / "include"
    path = tmp_path_factory.mktemp("batch_norm") / "host.so"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command += [f"-I{root / 'csrc'}", f"-I{root / 'tests'}", f"-I{include}"]
    subprocess.run([*command, str(root / "tests" / "batch_norm_on_host.cpp"), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


CASES = [
    # shape, channels_last, dtype, activation, residual, splits, mean, momentum, (slots, resident)
    ((3, 5, 2, 2), False, torch.float32, "relu", True, 1, 0, 0.1, (1, False)),
    ((1000, 72), False, torch.bfloat16, "relu", True, 2, 0, 0.1, (8, True)),
    ((1000, 72), False, torch.float32, "relu", False, 1, 1e4, None, (9, True)),
    ((500, 16), False, torch.float32, "leaky_relu", True, 2, 1e4, 1.0, (6, False)),
    ((8, 65, 3, 5), True, torch.bfloat16, None, True, 1, 3, 0.1, (9, False)),
    ((30, 35, 3, 3), True, torch.float16, "relu", True, 2, 0, 0.1, (12, True)),
    ((6, 24, 8, 8), True, torch.float16, "gelu", True, 3, 0, None, (6, True)),
    ((20, 2, 40, 30), False, torch.bfloat16, "relu", True, 2, -3, 0.1, (8, True)),
    ((9, 3, 14, 14), False, torch.float32, "relu", True, 3, 1e4, 0.1, (9, False)),
    ((40, 3, 7, 7), False, torch.float16, "silu", True, 1, 0, 0.1, (9, True)),
    ((2, 1, 700), False, torch.float32, "silu", False, 2, 100, 0.1, (4, True)),
    # Instance norms: one launch of blocks that need no other.
    ((3, 5, 14, 14), False, torch.bfloat16, "relu", True, 3, 3, 0.1, (1, 2)),
    ((17, 3, 9, 9), True, torch.float16, "leaky_relu", True, 17, 0, None, (1, 2)),
    ((4, 2, 31, 33), False, torch.float32, None, False, 4, 1e4, 0.1, (1, False)),
]


def make(shape, last, dtype, residual, mean, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, other, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    values = [(x + mean).to(dtype), other.to(dtype) if residual else None, dy.to(dtype)]
    if last:
        values = [t if t is None else t.movedim(1, -1).contiguous().movedim(-1, 1) for t in values]
    channels = [torch.randn(shape[1], generator=generator) for _ in range(4)]
    return (*values, *channels)


def wide(*tensors):
    return [t if t is None or not t.is_floating_point() else t.double() for t in tensors]


@pytest.mark.parametrize("case", CASES)
def test_kernel_code_on_the_host(library, case):
    shape, last, dtype, activation, residual, splits, mean, momentum, launch = case
    host, code = Host(library, *launch), ACTIVATIONS[activation]
    x, residual, dy, weight, bias, running_mean, running_var = make(shape, last, dtype, residual, mean)
    keep_mask = residual is not None and code in BY_SIGN
    running, count = (running_mean, running_var.abs()), torch.tensor(2)
    truth_running, truth_count = wide(*running), count.clone()
    options = (None, True, momentum, 1e-3, splits, code, keep_mask)
    y, stats, mask = host.fwd(x, residual, weight, bias, *running, count, *options)
    truth = home._fwd_reference(*wide(x, residual, weight, bias), *truth_running, truth_count, *options)
    assert_close("y", y, truth[0], None, dtype)
    deviation = (truth[1][2] * (stats[0].double() + stats[1] - truth[1][0] - truth[1][1])).abs().max()
    assert deviation < 1e-6, "the mean, low part included, in standard deviations"
    assert_close("invstd", stats[2], truth[1][2], None, torch.float32)
    for name, value, expected in zip(("running_mean", "running_var"), running, truth_running, strict=True):
        assert_close(name, value, expected, None, torch.float32)
    assert count == truth_count == 3
    assert_close("var", host.stats(x, splits)[2], home._stats_reference(x.double(), splits)[2], None, torch.float32)

    given = host.fwd(x, residual, weight, bias, None, None, None, stats, *options[1:])
    assert torch.equal(given[0], y)
    over = x.clone()
    host.statistics(over, None, over, residual, weight, bias, None, None, None, None, *options[1:-1])
    assert torch.equal(over, y)
    if keep_mask:
        assert torch.equal(given[2], mask) and torch.equal(home._pack(home._unpack(mask, x), x), mask)
        positive = home._unpack(mask, x)
        assert (positive == (truth[0] > 0))[truth[0].abs() > 1e-3].all()
    mean_and_var = [running[0], running[1]]
    evaluated = host.fwd(x, residual, weight, None, *mean_and_var, None, None, False, momentum, 1e-3, 1, code, False)
    expected = home._fwd_reference(
        *wide(x, residual, weight), None, *wide(*mean_and_var), None, None, False, momentum, 1e-3, 1, code, False
    )
    assert_close("y in eval", evaluated[0], expected[0], None, dtype)
    assert_close("statistics in eval", evaluated[1], expected[1], None, torch.float32)

    saved = (residual if code > LEAKY_RELU else None, mask if keep_mask else None, weight, bias, stats)
    means = torch.randn(2, splits, shape[1])
    for case in ((None, True), (means, True), (None, False)):
        options = (*case, code, True, True)
        gradients = host.bwd(dy, x, *saved, *options)
        truth = home._bwd_reference(*wide(dy, x, *saved, case[0]), *options[1:])
        for name, value, expected in zip(("dx", "dresidual"), gradients[:2], truth[:2], strict=True):
            assert_close(name, value, expected, None, dtype)
        if case[0] is None:
            for name, value, expected in zip(("dweight", "dbias"), gradients[2:4], truth[2:], strict=True):
                assert_close(name, value, expected, None, torch.float32)
            expected = home._sums_reference(*wide(dy, x, *saved), code)
            assert_close("sums", gradients[4], expected, None, torch.float32)
            merged = host.bwd(dy, x, *saved, *options[:-2], False, False)
            assert all(torch.equal(a, b) for a, b in zip(merged[2:], gradients[2:], strict=True))
    if activation == "relu" and not keep_mask:  # signs found again are the forward's
        ones = host.bwd(torch.ones_like(x), x, *saved, means, False, code, False, True)[1]
        assert torch.equal(ones != 0, y != 0)


@pytest.mark.parametrize("resident", [False, True])
def test_drift_constants_and_nothing(library, resident):
    host = Host(library, 4, resident)
    x = torch.zeros(3000, 3)
    x[300:, 0] = 1e4 + torch.randn(2700)
    x[:, 1] = torch.arange(3000.0) + torch.randn(3000)
    x[:, 2] = 7.3
    stats, truth = host.stats(x, 1), home._stats_reference(x.double(), 1)
    assert_close("var", stats[2, :, :2], truth[2, :, :2], None, torch.float32)
    assert stats[2, 0, 2] < 1e-9
    mean, var, count = torch.ones(3), torch.ones(3), torch.tensor(0)
    for empty in (torch.empty(0, 3), torch.empty(4, 3, 0), torch.empty(0, 3, 2, 2)):
        _, stats, _ = host.fwd(empty, None, None, None, mean, var, count, None, True, 0.1, 0.25, 2, 1, False)
        assert torch.equal(stats, torch.tensor([0.0, 0.0, 2.0])[:, None, None].expand(3, 2, 3))
        gradients = host.bwd(empty, empty, None, None, None, None, stats, None, True, 1, True, True)
        assert all((g == 0).all() for g in gradients[2:])
    assert count == 3 and (mean == 1).all() and (var == 1).all()
    x[5, 0] = math.nan
    y, _, mask = host.fwd(x, torch.zeros_like(x), None, None, mean, var, count, None, True, 0.1, 1, 1, 1, True)
    assert y[:, 0].isnan().all() and not y[:, 1:].isnan().any()
    assert home._unpack(mask, x)[:, 0].all() and mean.isnan().tolist() == [True, False, False]
