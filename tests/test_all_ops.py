"""One stem per operation: every kernel file has its home page, test and bench, and is named by an op."""

import re
from pathlib import Path

import pytest

import ssl_fast
from ssl_fast import functional
from ssl_fast._op import OPS

ROOT = Path(__file__).parents[1]
STEMS = sorted(
    {p.stem for p in (ROOT / "kernels").glob("[!_]*.py")}
    | {p.stem for suffix in ("[!_]*.cpp", "[!_]*.cu") for p in (ROOT / "csrc").glob(suffix)}
    | {p.stem for p in (ROOT / "ssl_fast/ops").glob("[!_]*.py")}
)


BORROWS = {"instance_norm": "batch_norm"}  # a home page on the operators of another


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("place", ("ssl_fast/ops/{}.py", "tests/test_{}.py", "benches/bench_{}.py"))
def test_a_stem_is_whole(stem, place):
    assert (ROOT / place.format(stem)).exists()


@pytest.mark.parametrize("stem", STEMS)
def test_a_stems_ops_name_the_files_that_exist(stem):
    homes = re.compile(rf"ssl_fast\.ops\.({stem}|_{stem}_\w+)")
    ops = [op for op in OPS.values() if homes.fullmatch(op.reference.__module__)]
    assert ops or f"from ssl_fast.ops.{BORROWS[stem]} import" in (ROOT / f"ssl_fast/ops/{stem}.py").read_text()
    for device, suffix in (("cpu", "cpp"), ("cuda", "cu")):
        assert any(device in op.native for op in ops) == (ROOT / f"csrc/{stem}.{suffix}").exists()
    for op in ops:
        if op.triton:
            module, launcher = op.triton.split(":")
            assert f"def {launcher}(" in (ROOT / "kernels" / f"{module.rpartition('.')[2]}.py").read_text()


def test_kernels_is_not_a_package_of_its_own():
    assert not (ROOT / "kernels/__init__.py").exists()


@pytest.mark.parametrize("module", (ssl_fast, functional))
def test_public_names_exist_and_have_a_docstring(module):
    for name in module.__all__:
        thing = getattr(module, name)
        assert isinstance(thing, str) or thing.__doc__, name
