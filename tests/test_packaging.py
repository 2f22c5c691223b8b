"""The wheel and the sdist, each installed in a clean environment beside PyPI's `kernels`, whose import name that is."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


NO_CUDA = {**os.environ, "SSL_FAST_CUDA_ARCHS": ""}  # which takes a minute each time; test_nvcc.py compiles it


def run(*command, env=NO_CUDA, **kwargs):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What a clone holds: a build must not use, or leave, anything else."""
    copy = tmp_path_factory.mktemp("source")
    files = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard").split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def dist(source, tmp_path_factory):
    folder, env = tmp_path_factory.mktemp("dist"), NO_CUDA
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is not None:  # whether it compiles is the question, not how fast it runs: a third of the time
        quick = tmp_path_factory.mktemp("compiler") / "c++"
        quick.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
        quick.chmod(0o755)
        env = {**NO_CUDA, "CXX": str(quick)}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, env=env)  # wheel from sdist
    return folder


def test_the_wheel_is_abi3_and_owns_one_name(dist):
    wheel = next(dist.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"ssl_fast"}
    assert "ssl_fast/kernels/nt_xent.py" in names and "ssl_fast/kernels/__init__.py" not in names
    assert "ssl_fast/py.typed" in names and any(n.endswith("licenses/LICENSE") for n in names)
    if "ssl_fast/_C_cpu.abi3.so" in names:
        assert "cp310-abi3-linux" in wheel.name
    assert "ssl_fast/_build.json" in names  # for the CUDA library, if not for both


def test_the_metadata_asks_for_no_more_than_is_needed(dist):
    wheel = zipfile.ZipFile(next(dist.glob("*.whl")))
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [n.split()[1].split(">")[0].rstrip(";") for n in needed] == ["torch", "triton", "numpy"]
    assert "Requires-Python: >=3.10" in metadata


CHECK = """
import pathlib, sys, ssl_fast, kernels, torch
from ssl_fast import _op, info
assert pathlib.Path(ssl_fast.__file__).is_relative_to(sys.prefix), ssl_fast.__file__
assert pathlib.Path(kernels.__file__).is_relative_to(sys.prefix), kernels.__file__
import ssl_fast.kernels.nt_xent
print(_op.native_reason("cpu"))
print(ssl_fast.NTXentLoss()(torch.randn(4, 8), torch.randn(4, 8)).item())
info.main()
"""


@pytest.mark.parametrize("kind", ("*.whl", "*.tar.gz"))
def test_it_installs_beside_kernels(kind, dist, tmp_path):
    """torch is lent from here by a .pth, which brings no editable ssl_fast along; the rest is the clean one's own.

    The wheel was compiled from the sdist; that itself is installed where nothing compiles.
    """
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "torch_from_outside.pth").write_text(str(Path(torch.__file__).parents[1]))
    run(python, "-m", "pip", "install", "--quiet", "kernels", "setuptools>=77")
    env = NO_CUDA if kind == "*.whl" else {**NO_CUDA, "CXX": "false"}
    run(python, "-m", "pip", "install", "--no-deps", "--quiet", "--no-build-isolation", next(dist.glob(kind)), env=env)
    output = run(python, "-c", CHECK, cwd=tmp_path).splitlines()
    assert output[0] == "None" if kind == "*.whl" else output[0].startswith("did not compile")
    assert float(output[1]) > 0


def test_the_sdist_holds_the_sources(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"kernels/nt_xent.py", "csrc/nt_xent.cpp", "ssl_fast/kernels/__init__.py", "setup.py", "LICENSE"} <= names
    assert not any(n.endswith(".so") for n in names)


SETUP = """
import importlib.util, runpy, sys
if "{missing}" == "torch":
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
sys.path.insert(0, "")
sys.argv = ["setup.py", "-q", "bdist_wheel", "-d", "{folder}/dist", "-b", "{folder}/build"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("missing", "reason"), [("compiler", "no C++ compiler at build time"), ("torch", "torch was not importable")]
)
def test_without_a_compiler_or_torch_the_wheel_is_pure_and_says_why(missing, reason, source, tmp_path):
    bare = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    run(sys.executable, "-c", SETUP.format(missing=missing, folder=tmp_path), cwd=source, env=bare)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    assert "py3-none-any" in wheel.name
    assert reason in zipfile.ZipFile(wheel).read("ssl_fast/_build.json").decode()


CHECKOUT = """
import importlib.util, ssl_fast.kernels.nt_xent as nt_xent
print(nt_xent.__file__, importlib.util.find_spec("kernels").origin)
"""


def test_the_checkout_needs_no_install():
    """PYTHONPATH alone finds the Triton kernels; the folder kernels/ is no module, only a namespace without a file."""
    output = run(sys.executable, "-c", CHECKOUT, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"})
    assert output.split() == [str(ROOT / "kernels/nt_xent.py"), "None"]
