"""The code of csrc/layer_norm_cuda.h, run on the host by an emulator, against the references in fp64."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from common import assert_close

from ssl_fast.ops import layer_norm as home

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root, include = Path(__file__).parents[1], Path(torch.__file__).parent / "include"
    path = tmp_path_factory.mktemp("layer_norm") / "host.so"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command += [f"-I{root / 'csrc'}", f"-I{root / 'tests'}", f"-I{include}"]
    subprocess.run([*command, str(root / "tests" / "layer_norm_on_host.cpp"), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


class Host:
    """The operators, with the backward's blocks cut for so many slots."""

    def __init__(self, library: ctypes.CDLL, slots: int) -> None:
        self.library, self.slots = library, slots

    def run(self, forward, x, others, parameters, eps, width, channels, activation):
        N, D, L = home.sizes(x, width, channels)
        inner = (D if L == 1 else L) * x.element_size()
        pointers = [t.data_ptr() for t in (x, *others) if t is not None]
        vectors = all(n % 16 == 0 for n in (inner, *pointers))
        sizes = (ctypes.c_int64 * 6)(N, D, L, self.slots, vectors, activation)
        residual, *rest = others
        given = (x, residual, *parameters, *rest)
        addresses = (ctypes.c_void_p * len(given))(*(None if t is None else t.data_ptr() for t in given))
        done = self.library.run(DTYPES.index(x.dtype), sizes, addresses, forward, ctypes.c_float(eps))
        assert done == 0, "threads wait for each other for ever"

    def fwd(self, x, residual, weight, bias, width, channels, eps, activation):
        N, _, L = home.sizes(x, width, channels)
        y, stats = torch.full_like(x, math.nan), torch.full((3, N * L), math.nan)
        self.run(True, x, (residual, y), (weight, bias, stats), eps, width, channels, activation)
        return y, stats

    def bwd(self, dy, x, residual, weight, bias, stats, width, channels, activation, dx, dresidual, affine):
        outs = [torch.full_like(x, math.nan) if need else None for need in (dx, dresidual)]
        outs += [torch.full((width,), math.nan) if affine else None for _ in range(2)]
        others = (residual, dy, *outs)
        self.run(False, x, others, (weight, bias, stats), 0, width, channels, activation)
        return outs


# shape, channels, dtype, activation, residual, mean, slots
CASES = [
    ((37, 1), False, torch.float32, 0, False, 0, 3),
    ((50, 3), False, torch.bfloat16, 0, True, 0, 1),
    ((300, 24), False, torch.bfloat16, 1, True, 0, 4),
    ((40, 96), False, torch.float16, 4, False, 3, 9),
    ((9, 384), False, torch.float32, 0, False, 1e4, 2),
    ((5, 768), False, torch.bfloat16, 0, False, 0, 9),
    ((7, 1025), False, torch.float32, 2, True, 1e4, 8),
    ((3, 4096), False, torch.bfloat16, 3, True, 0, 7),
    ((2, 5, 7, 9), True, torch.float32, 1, True, 1e4, 2),
    ((3, 12, 16, 17), True, torch.bfloat16, 0, False, 0, 5),
    ((2, 130, 7, 7), True, torch.float16, 4, True, 0, 1),
    ((2, 17, 40, 4), True, torch.float32, 3, False, 0, 3),
]


@pytest.mark.parametrize(("shape", "channels", "dtype", "activation", "with_residual", "mean", "slots"), CASES)
def test_host(library, shape, channels, dtype, activation, with_residual, mean, slots):
    generator = torch.Generator().manual_seed(0)
    x, other, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    x, residual, dy = (x + mean).to(dtype), other.to(dtype) if with_residual else None, dy.to(dtype)
    width, host = shape[1], Host(library, slots)
    weight, bias = torch.randn(2, width, generator=generator)
    wide = [None if t is None else t.double() for t in (x, residual, weight, bias)]
    y, stats = host.fwd(x, residual, weight, bias, width, channels, 1e-5, activation)
    truth, true_stats = home._fwd_reference(*wide, width, channels, 1e-5, activation)
    assert_close("y", y, truth, None, dtype)
    assert_close("mean", stats[0].double() + stats[1], true_stats[0] + true_stats[1], None, torch.float32)
    assert_close("invstd", stats[2], true_stats[2], None, torch.float32)
    kept = residual if activation else None
    saved = (kept, weight, bias, stats, width, channels, activation)
    for need in ((True, bool(activation), True), (True, False, False), (False, False, True)):
        got = host.bwd(dy, x, *saved, *need)
        expected = home._bwd_reference(
            dy.double(), wide[0], wide[1] if activation else None, *wide[2:], true_stats, *saved[4:], *need
        )
        for name, a, b in zip(("dx", "dresidual", "dweight", "dbias"), got, expected, strict=True):
            if a is not None and (name != "dx" or width > 1):
                assert_close(name, a, b, None, dtype if name[1] in "xr" else torch.float32)
    if activation == 1:  # signs found again are the forward's
        ones = host.bwd(torch.ones_like(x), x, *saved, False, True, False)[1]
        assert torch.equal(ones != 0, y != 0)


def test_constants_outliers_and_nan(library):
    host = Host(library, 4)
    for shape, channels in (((6, 40), False), ((2, 40, 3), True)):
        x = torch.full(shape, 7.3)
        assert (host.fwd(x, None, None, None, 40, channels, 1e-5, 0)[0] == 0).all()
        x = torch.randn(shape)
        x[:, 0] = 1e5
        y, _ = host.fwd(x, None, None, None, 40, channels, 1e-5, 0)
        assert_close("y", y, home._fwd_reference(x.double(), None, None, None, 40, channels, 1e-5, 0)[0], None, x.dtype)
        x[1] = math.nan
        y, _ = host.fwd(x, None, None, None, 40, channels, 1e-5, 1)
        assert y[1].isnan().all() and not y[0].isnan().any()
