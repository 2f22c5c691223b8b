"""Every csrc/*.cu compiles with nvcc for each chip, spills no register, and loads; no GPU is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p.name for p in (ROOT / "csrc").glob("*.cu"))
NVCC = os.environ.get("NVCC") or shutil.which("nvcc")
CHIPS = ("80", "90", "100")

LOAD = """
import importlib, pkgutil, sys, torch, ssl_fast.ops
from ssl_fast._op import OPS
for module in pkgutil.iter_modules(ssl_fast.ops.__path__, "ssl_fast.ops."):
    importlib.import_module(module.name)
torch.ops.load_library(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
print("implements", *(name for name in OPS if has(f"ssl_fast_native::{name}", "CUDA")))
"""


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills_and_loads(source: str, tmp_path: Path) -> None:
    folder, library = Path(torch.__file__).parent, tmp_path / "library.so"
    include = folder / "include"
    command = [NVCC, "-shared", "-Xcompiler=-fPIC", "-Xptxas=-v", "-std=c++20", "-O3", "-DUSE_CUDA",
               "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000", "--threads=0", f"-I{include}",
               f"-I{include / 'torch/csrc/api/include'}", f"{ROOT / 'csrc' / source}", "-o", str(library)]  # fmt: skip
    command += [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in CHIPS]
    command += [f"-L{folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if torch.version.cuda is not None:
        command.append("-ltorch_cuda")
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr

    report = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        built.stderr,
        re.DOTALL,
    )
    assert {chip for _, chip, *_ in report} == set(CHIPS), built.stderr
    for kernel, chip, stores, loads, registers, rest in report:
        shared = re.search(r"(\d+) bytes smem", rest)
        print(f"{source} sm_{chip}: {registers} registers, {shared[1] if shared else 0} B shared, "
              f"spills {stores} B stored {loads} B loaded: {kernel}")  # fmt: skip
    spilled = [(kernel, chip) for kernel, chip, stores, loads, *_ in report if int(stores) or int(loads)]
    assert not spilled, f"registers spill in {spilled}"

    if torch.version.cuda is None:
        return  # the library needs libtorch_cuda to load
    loaded = subprocess.run([sys.executable, "-c", LOAD, str(library)], cwd=ROOT, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert re.search(r"implements \w", loaded.stdout), f"{source} implements no op: {loaded.stdout}"
