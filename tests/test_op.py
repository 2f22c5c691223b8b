"""class Op: choice, forcing, reasons and overhead."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

import ssl_fast
from ssl_fast import _op, info
from ssl_fast._op import OPS
from ssl_fast.functional import nt_xent
from ssl_fast.ops.nt_xent import _NTXent, nt_xent_fwd

Z = torch.randn(4, 8)


def test_a_backend_that_does_not_exist_is_named():
    with (
        pytest.raises(ValueError, match="backend: got 'tritan', allowed: native, triton, reference"),
        ssl_fast.backend("tritan"),
    ):
        pass


def test_a_forced_backend_that_cannot_run_says_why():
    double = Z.double()
    with (
        ssl_fast.backend("native"),
        pytest.raises(RuntimeError, match="'native' cannot run nt_xent_fwd on float64 cpu tensors"),
    ):
        nt_xent(double, double)
    assert nt_xent_fwd.backend_for(double) == "reference"


def test_forcing_ends_with_the_block_and_nests():
    chosen = nt_xent_fwd.backend_for(Z)
    with ssl_fast.backend("reference"):
        with ssl_fast.backend(None):
            assert nt_xent_fwd.backend_for(Z) == chosen
        assert nt_xent_fwd.backend_for(Z) == "reference"
    assert nt_xent_fwd.backend_for(Z) == chosen


@pytest.mark.parametrize(
    ("value", "expected"), [("reference", "reference"), ("tritan", "SSL_FAST_BACKEND: got 'tritan'"), ("", "native")]
)
def test_the_environment_forces_a_backend(value, expected):
    code = "import torch, ssl_fast.ops.nt_xent as m; print(m.nt_xent_fwd.backend_for(torch.ones(2, 2)))"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "SSL_FAST_BACKEND": value}, capture_output=True, text=True
    )
    assert expected in result.stdout + result.stderr


def test_importing_needs_no_triton_and_no_library():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; torch.ops.load_library = None\n"
        "import ssl_fast; print('imported')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "imported\n", result.stderr


def test_the_native_library_loads_where_there_is_a_compiler():
    """A wheel without it is slow and says so only in `info`; a checkout under test must not be."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))) or sys.platform != "linux":
        pytest.skip("no C++ compiler here")
    assert _op.native_reason("cpu") is None


def test_info_names_every_op_and_every_reason():
    report = info.report()
    assert all(name in report for name in OPS)
    if not torch.cuda.is_available():
        assert _op.UNMEASURED in report and "GPU: none visible" in report


def test_overhead_of_a_call():
    """Printed, not asserted: seconds belong to the benches. The bound is loose enough to catch a tenfold slip alone."""
    z1, z2 = Z.clone().requires_grad_(), Z.clone()

    def microseconds(step, calls=1000):
        for _ in range(100):
            step()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls * 1e6

    t = torch.tensor(0.5)
    print(f"\ntorch.lerp {microseconds(lambda: torch.lerp(Z, Z, 0.5)):.1f} us, "
          f"op alone {microseconds(lambda: nt_xent_fwd(Z, Z, t, True, 1)):.1f} us, "
          f"with autograd {microseconds(lambda: _NTXent.apply(z1, z2, t, True, 1)):.1f} us, "
          f"functional.nt_xent {microseconds(lambda: nt_xent(z1, z2, 0.5)):.1f} us, "
          f"and its backward {microseconds(lambda: nt_xent(z1, z2, t).backward()):.1f} us in all")  # fmt: skip
