"""Performance that must not be lost, as ratios of one interleaved run with wide margins, never as seconds.

Each step is what a user calls; it is held against what it replaces, in processor time where threads wait for a busy
machine, and its memory against the promise. A limit is twice what was measured on a busy machine, more or less, so that
a failure is a kernel that is gone (a fallback, a copy too many), not noise. Where valgrind is present the losses' inner
loops are held against the instructions of their products besides, which no machine's mood changes. They run by
themselves there: to import torch under valgrind takes minutes.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ssl_fast
from benches import bench_nt_xent, machine, timing
from ssl_fast import functional
from ssl_fast._op import native_reason

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    native_reason(machine.DEVICE) is not None, reason=f"the references are not fast: {native_reason(machine.DEVICE)}"
)


@pytest.fixture(autouse=True)
def one_thread(poisoned_memory):
    """Whose processor time is its own; and memory that nobody fills with NaN."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    yield
    torch.set_num_threads(before)


def ratio(ours, theirs, seconds=0.3):
    """The fastest of ours by the fastest of theirs, turn by turn: a neighbour on the caches only ever adds."""
    fastest, end, rounds = [math.inf, math.inf], time.perf_counter() + seconds, 0
    while rounds < 6 or time.perf_counter() < end:
        fastest = [min(best, spent(step)) for best, step in zip(fastest, (ours, theirs), strict=True)]
        rounds += 1
    return fastest[0] / fastest[1]


def spent(step):
    """Of this thread on a CPU: what others do is not counted. On a GPU, of the device."""
    if machine.DEVICE == "cuda":
        return timing._timed(step, cold=False, idle=False)
    start = time.thread_time()
    step()
    return time.thread_time() - start


def backward_of(function, *inputs):
    def step():
        for x in inputs:
            x.grad = None
        function(*inputs).sum().backward()

    return step


def leaves(*shape, count=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(machine.DEVICE).requires_grad_() for _ in range(count)]


def test_nt_xent_against_dense_and_the_product():
    z = leaves(512, 128)
    ours = backward_of(ssl_fast.NTXentLoss(0.1), *z)
    assert ratio(ours, backward_of(bench_nt_xent.dense, *z)) < 0.9
    rows, kept = torch.cat(z).detach(), torch.empty(1024, 1024, device=machine.DEVICE)
    assert ratio(ours, lambda: torch.mm(rows, rows.T, out=kept)) < 6


def test_info_nce_with_a_queue_against_cat():
    q, k = leaves(64, 128)
    queue = F.normalize(torch.randn(8192, 128, device=machine.DEVICE))

    def plain(q, k):
        q, k = F.normalize(q), F.normalize(k.detach())
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T.clone()], 1) / 0.1
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))

    ours = backward_of(lambda q, k: functional.info_nce(q, k.detach(), queue, 0.1), q, k)
    assert ratio(ours, backward_of(plain, q, k)) < 1.3


def test_batch_norm_with_add_and_relu_against_eager():
    x, residual = (t.detach().contiguous(memory_format=torch.channels_last) for t in leaves(16, 64, 28, 28))
    x, residual = x.requires_grad_(), residual.requires_grad_()
    fused, plain = ssl_fast.nn.BatchNorm2d(64, activation="relu").to(x.device), nn.BatchNorm2d(64).to(x.device)
    theirs = backward_of(lambda x, residual: F.relu(plain(x) + residual), x, residual)
    assert ratio(backward_of(fused, x, residual), theirs) < 1.6


def test_norms_against_eager():
    (tokens,) = leaves(2048, 384, count=1)
    weight, bias = torch.ones(384, device=tokens.device), torch.zeros(384, device=tokens.device)
    ours = backward_of(lambda x: functional.layer_norm(x, (384,), weight, bias), tokens)
    assert ratio(ours, backward_of(lambda x: F.layer_norm(x, (384,), weight, bias), tokens)) < 3
    (images,) = leaves(8, 32, 32, 32, count=1)
    assert ratio(backward_of(functional.instance_norm, images), backward_of(F.instance_norm, images)) < 0.9
    small = leaves(256, 24, 8, 8, count=1)[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert ratio(backward_of(functional.instance_norm, small), backward_of(F.instance_norm, small)) < 0.85


def test_ema_against_foreach_and_a_copy():
    tiny, others = ([torch.randn(8, device=machine.DEVICE) for _ in range(512)] for _ in range(2))
    ours = lambda: ssl_fast.ema_update_(tiny, others, 0.999)  # noqa: E731
    assert ratio(ours, lambda: torch._foreach_lerp_(tiny, others, 0.001)) < 2.2
    targets, sources = ([torch.randn(256, 256, device=machine.DEVICE) for _ in range(32)] for _ in range(2))
    ours = lambda: ssl_fast.ema_update_(targets, sources, 0.999)  # noqa: E731
    assert ratio(ours, lambda: torch._foreach_lerp_(targets, sources, 0.001)) < 2.5
    flat = torch.cat([t.flatten() for t in targets])
    kept = torch.empty_like(flat)
    assert ratio(ours, lambda: kept.copy_(flat)) < 3


PEAKS = """
import json
from benches import bench_nt_xent, memory
found = {}
for N in (1024, 2048):
    for provider in bench_nt_xent.setup(N, 128).providers[1:3]:
        if (provider.name, N) != ("dense PyTorch", 2048):
            found[f"{provider.name} {N}"] = memory.first_call(provider.build)
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak memory of a process")
def test_memory_is_linear_in_the_batch():
    """At 1,024 pairs dense takes tens of MB, ours a few; and twice the pairs at most twice as much."""
    output = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = json.loads(output.splitlines()[-1])
    assert found["ssl_fast 1024"] < 0.25 * found["dense PyTorch 1024"], found
    assert found["ssl_fast 2048"] < 3 * found["ssl_fast 1024"], found


# Blocks of the losses' own size through the AVX2 engine, the widest that valgrind knows. Nothing refers to the choice
# of an engine, so that the compiler leaves the others out.
COUNTED = """
#include "contrast_tiles.h"
#include <cstdio>
#include <vector>
#define choose_engine static unused_choice
#include "_contrast_engines.cpp"

namespace ssl_fast::contrast {
void run(const std::string& what, int64_t D) {
  std::vector<float> z(kBlock * std::max<int64_t>(row_stride(D), D) + D * kStride, 0.1f), one(kBlock, 1.0f);
  std::vector<float> dz_i(kBlock * row_stride(D)), dz_j(dz_i), work(avx2::backward_work(D) + kBlock * kStride);
  static TileSums i, j;
  Tile tile{z.data(), z.data(), D, kBlock, kBlock, kNoDiagonal, nullptr, nullptr, 1.0f, work.data()};
  if (what == "forward") avx2::forward({tile, &i, &j}, true);
  if (what == "backward")
    avx2::backward({tile, z.data(), z.data(), one.data(), one.data(), nullptr, nullptr, nullptr, nullptr, nullptr,
                    nullptr, dz_i.data(), dz_j.data(), true, true, row_stride(D)}, true);
  std::printf("%g %g\\n", i.sum[0], dz_j[0]);
}
}  // namespace ssl_fast::contrast

int main(int, char** words) { ssl_fast::contrast::run(words[1], 128); }
"""
VALGRIND, CXX = shutil.which("valgrind"), os.environ.get("CXX") or shutil.which("c++")


@pytest.mark.skipif(VALGRIND is None or CXX is None, reason="valgrind or a C++ compiler is not installed")
@pytest.mark.skipif(machine.instruction_set() in ("baseline", "unknown"), reason="this CPU has no AVX2")
def test_instructions_of_the_losses(tmp_path):
    """For each 8 multiply-adds: 1.67 in the inner loop (12 of them, 8 loads), in all 2.3 forward, and 6.3 for the three
    products backward; on scalars 8 times as many, and 2 more where the register tile is spilt."""
    include = Path(torch.__file__).parent / "include"
    source, program = tmp_path / "counted.cpp", tmp_path / "counted"
    source.write_text(COUNTED)
    options = ["-std=c++20", "-O3", "-w", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    folders = [f"-I{ROOT / 'csrc'}", f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    subprocess.run([CXX, *options, *folders, str(source), "-o", str(program)], check=True)

    def instructions(what):
        command = [VALGRIND, "--tool=callgrind", "--callgrind-out-file=/dev/null", str(program), what]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return int(re.search(r"Collected : (\d+)", report)[1])

    product, nothing = 192 * 192 * 128 / 8, instructions("nothing")
    found = {what: (instructions(what) - nothing) / product for what in ("forward", "backward")}
    print(found)
    assert 1 < found["forward"] < 3, found
    assert 3 < found["backward"] < 8, found
