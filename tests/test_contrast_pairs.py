"""csrc/contrast_blocks.h: every pair of blocks is visited once, each block in its order, however the threads meet."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

VISITS = """
import ctypes, sys, torch
host, threads = ctypes.CDLL(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
for name in ("alone", "tournament", "meeting"):
    getattr(host, name).restype = ctypes.c_int64
count = ctypes.c_int64
for _ in range(5):
    assert host.alone(count(20_000), count(threads)) == 0
    for blocks in range(2, 16, 2):
        assert host.tournament(count(blocks), count(threads)) == 0, blocks
    for i in range(1, 8):
        for j in range(1, 8):
            assert host.meeting(count(i), count(j), count(threads)) == 0, (i, j)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="builds as on Linux")
def test_pairs_are_visited_in_turn(tmp_path):
    """In a process of its own: where a turn is lost, the threads wait for it without end."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root, of_torch, library = Path(__file__).parents[1], Path(torch.__file__).parent, tmp_path / "pairs.so"
    command = [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-DTORCH_STABLE_ONLY",
               "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{root / 'csrc'}", f"-I{of_torch / 'include'}",
               str(root / "tests" / "contrast_pairs_on_host.cpp"), f"-L{of_torch / 'lib'}", "-ltorch_cpu",
               "-o", str(library)]  # fmt: skip
    subprocess.run(command, check=True)
    for threads in ("2", "7"):
        command = [sys.executable, "-c", VISITS, str(library), threads]
        subprocess.run(command, check=True, timeout=300)  # of which seconds are enough where a core is free
