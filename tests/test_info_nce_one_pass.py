"""info_nce_one_pass on every backend, and the code of its CUDA kernels run on the host by an emulator."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from common import DEVICE, FLOOR, assert_close, backends, tensors

from ssl_fast.ops import info_nce as home

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE_PASS = [
    # N, K, D, t, ids, diagonal, normalize
    (1, 1, 1, 0.07, False, None, True),
    (4, 1, 16, 0.1, False, 0, True),  # the first row sees nothing
    (5, 7, 3, 0.07, False, None, False),
    (70, 260, 64, 0.1, True, 2, True),
    (130, 110, 123, 0.01, False, -3, True),
    (20, 90, 256, 0.07, True, None, False),
    (9, 150, 520, 0.5, False, 0, True),
]


def check_one_pass(run, N, K, D, t, ids, diagonal, normalize, dtype, device, tolerance=1e-5):
    """Against the reference in fp64: keys of all lengths and a zero, contiguous and strided."""
    x, y = (z.detach().to(device) for z in tensors((N, D), (K, D), dtype=dtype, seed=N))
    generator = torch.Generator().manual_seed(K)
    x_ids, y_ids = (torch.randint(0, 4, (n,), generator=generator).to(device) * 2**40 for n in (N, K))
    if not normalize:
        x, y = ((z * (3 * t) ** 0.5 / D**0.25) for z in (x, y))
    elif K > 100:
        y[::3], y[1::3], y[5] = y[::3] * 1e-4, y[1::3] * 300, 0
    layouts = (x, y), (x.T.contiguous().T, torch.cat([y, y], 1)[:, :D])
    for x, y in layouts:
        args = (x_ids if ids else None, y_ids if ids else None, diagonal, normalize)
        temperature = torch.tensor(t, device=device)
        stats, out = run(x, y, temperature, *args)
        truth, products = home.info_nce_one_pass.reference(x.double(), y.double(), temperature.double(), *args)
        stats, seen = stats.double(), truth[1] > -torch.inf  # the shift is the backend's choice
        lse = stats[1] / t + stats[2]
        for value, expected in ((stats[0], truth[0]), (lse[seen], truth[0][seen]), (stats[3], truth[3])):
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
        assert_close("out", out, products, None, dtype)


@pytest.mark.parametrize(
    ("backend", "dtype"), [(b, dtype) for dtype in DTYPES for b in backends(home.info_nce_one_pass, dtype)]
)
@pytest.mark.parametrize("case", ONE_PASS)
def test_one_pass_against_the_reference_in_fp64(case, backend, dtype):
    # Triton rounds the unit rows to the operands' dtype, as autocast does; so do CPUs that multiply in bf16.
    rounds = backend == "triton" or (backend == "native" and dtype == torch.bfloat16)
    tolerance = FLOOR[dtype] if rounds else 1e-5
    check_one_pass(lambda *args: home.info_nce_one_pass(*args, backend=backend), *case, dtype, DEVICE, tolerance)


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root, include = Path(__file__).parents[1], Path(torch.__file__).parent / "include"
    library = tmp_path_factory.mktemp("info_nce") / "host.so"
    command = [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command += [f"-I{root / 'csrc'}", f"-I{root / 'tests'}", f"-I{include}"]
    subprocess.run([*command, str(root / "tests" / "info_nce_on_host.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ONE_PASS)
def test_kernel_code_on_the_host(on_host: ctypes.CDLL, case, dtype):
    def run(x, y, t, x_ids, y_ids, diagonal, normalize):
        stats, out = torch.full((4, len(x)), 9.0), torch.full(x.shape, 9.0)
        sizes = (ctypes.c_int64 * 3)(*x.shape[:1], *y.shape)
        strides = (ctypes.c_int64 * 4)(*x.stride(), *y.stride())
        pointers = [
            ctypes.c_void_p(z.data_ptr()) if z is not None else None for z in (x, y, t, x_ids, y_ids, stats, out)
        ]
        at = ctypes.byref(ctypes.c_int64(diagonal)) if diagonal is not None else None
        done = on_host.one_pass(
            DTYPES.index(x.dtype), *pointers[:2], sizes, strides, *pointers[2:5], at, normalize,
            1 if x.is_contiguous() else 3, *pointers[5:],
        )  # fmt: skip
        assert done == 0, "threads wait for each other for ever"
        return stats, out

    check_one_pass(run, *case, dtype, "cpu")
