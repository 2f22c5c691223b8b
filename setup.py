"""Builds csrc/*.cpp into ssl_fast/_C_cpu and csrc/*.cu into ssl_fast/_C_cuda, on PyTorch's stable ABI.

Both are plain shared libraries that torch.ops.load_library opens: one binary serves every torch from 2.10 and every
Python. Without torch, a compiler or nvcc the package installs all the same, and the reason is kept in
ssl_fast/_build.json for `python -m ssl_fast.info`. CXX and NVCC name other compilers, SSL_FAST_CUDA_ARCHS="80 90" other
compute capabilities; empty, it leaves the CUDA library out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.modified import newer_group

ROOT = Path(__file__).parent
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
NVCC = os.environ.get("NVCC") or shutil.which("nvcc")
STABLE = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-std=c++20", "-O3"]
# Compute capabilities that the library carries machine code for; PTX of the last serves later ones.
CUDA_ARCHS = os.environ.get("SSL_FAST_CUDA_ARCHS", "80 90 100").split()


def sources(suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob(f"*{suffix}"))


def torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")  # found, not imported: an import costs seconds and may need a GPU driver
    return Path(spec.origin).parent if spec and spec.origin else None


def why_not() -> dict[str, str]:
    """The libraries that cannot be built here, with the reason and the next step."""
    if sys.platform != "linux":
        reason = f"native code is built on Linux, not {sys.platform}"
        return {"_C_cpu": reason, "_C_cuda": reason}
    if torch_folder() is None:
        reason = "torch was not importable at build time; use `pip install --no-build-isolation .`"
        return {"_C_cpu": reason, "_C_cuda": reason}
    reasons = {}
    if CXX is None:
        reasons["_C_cpu"] = "no C++ compiler at build time; install g++ or clang++, then reinstall"
    if NVCC is None:
        reasons["_C_cuda"] = "no nvcc at build time; install the CUDA toolkit, then reinstall"
    elif not CUDA_ARCHS:
        reasons["_C_cuda"] = "SSL_FAST_CUDA_ARCHS was empty at build time"
    return reasons


def commands(name: str, folder: Path, output: Path) -> tuple[list[list[str]], list[str]]:
    """The compiler's command lines for one library: one for each source, and the one that links their objects."""
    torch = torch_folder()
    assert torch is not None
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    link = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if name == "_C_cpu":
        compiler, suffix, options = CXX, ".cpp", ["-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
    else:
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
        codes.append(f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}")
        compiler, suffix, options = NVCC, ".cu", ["-Xcompiler=-fPIC", "-DUSE_CUDA", "--threads=0", *codes]
        if list((torch / "lib").glob("libtorch_cuda.so")):
            link.append("-ltorch_cuda")
    objects = {source: str(folder / f"{Path(source).name}.o") for source in sources(suffix)}
    compile_ = [[compiler, "-c", *options, *STABLE, *include, source, "-o", to] for source, to in objects.items()]
    return compile_, [compiler, "-shared", *objects.values(), "-o", str(output), *link]


def extensions() -> list[Extension]:
    missing = why_not()
    return [
        Extension(f"ssl_fast.{name}", sources(suffix), depends=sources(".h"), py_limited_api=True)
        for name, suffix in (("_C_cpu", ".cpp"), ("_C_cuda", ".cu"))
        if name not in missing
    ]


def failure(command: list[str]) -> str | None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return (result.stderr.strip() or f"the compiler ended with {result.returncode}") if result.returncode else None


class BuildLibraries(build_ext):
    """All sources at a time. A library that does not compile becomes a reason, not a failed install."""

    def run(self) -> None:
        self.parallel, self.beside_sources = True, self.inplace  # which setuptools resets as it builds
        self.failed: dict[str, str] = {}
        super().run()
        note(self.folder(), why_not() | self.failed)

    def folder(self) -> Path:
        """Where the libraries end up: beside the sources for --inplace and editable installs, else in build_lib."""
        return ROOT / "ssl_fast" if self.inplace else Path(self.build_lib) / "ssl_fast"

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        there = ROOT / "ssl_fast" / output.name
        if self.beside_sources and not newer_group([*ext.sources, *ext.depends, __file__], str(there)):
            shutil.copy2(there, output)  # from where setuptools copies it back
            return
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
            compile_, link = commands(name, Path(folder), output)
            failed = next(filter(None, pool.map(failure, compile_)), None) or failure(link)
        if failed:
            self.warn(f"ssl_fast installs without {name}:\n{failed}")
            self.failed[name] = f"did not compile: {failed.splitlines()[0]}"

    def copy_extensions_to_source(self) -> None:
        self.extensions = [e for e in self.extensions if e.name.rpartition(".")[2] not in self.failed]
        super().copy_extensions_to_source()


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules and not self.editable_mode:
            note(Path(self.build_lib) / "ssl_fast", why_not())


def note(folder: Path, reasons: dict[str, str]) -> None:
    """Write the build record that `ssl_fast.info` shows; no record where all was built."""
    record = folder / "_build.json"
    record.unlink(missing_ok=True)
    if reasons:
        record.write_text(json.dumps(reasons, indent=2))


built = extensions()
setup(
    packages=[*find_packages(include=["ssl_fast", "ssl_fast.*"], exclude=["ssl_fast.kernels*"]), "ssl_fast.kernels"],
    # kernels/ has no __init__.py: the import name `kernels` belongs to another project and must never be ours.
    package_dir={"ssl_fast.kernels": "kernels"},
    package_data={"ssl_fast": ["py.typed"]},
    include_package_data=False,  # it would bring the checkout's ssl_fast/kernels/__init__.py along
    ext_modules=built,
    cmdclass={"build_ext": BuildLibraries, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if built else {},
)
