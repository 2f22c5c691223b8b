"""ema_update_: every backend against fp64, what it takes and refuses, and the CUDA kernel's code run on the host."""

from __future__ import annotations

import copy
import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from common import DEVICE, assert_close, backends
from torch import Tensor, nn

import ssl_fast
from ssl_fast.ops import ema
from ssl_fast.ops.ema import ema_update_

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOMENTA = (0.0, 0.3, 0.9, 0.999, 1.0)
# Around the kernel's packs (4, 8) and chunk (4096), none at all, and ResNet-50's first weight.
SIZES = (1, 3, 8, 0, 127, 4095, 4096, 4097, 9408, 3 * 4096 + 1)

gpu = pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str = DEVICE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def oracle(target: Tensor, source: Tensor, momentum: float) -> Tensor:
    return momentum * target.double() + (1 - momentum) * source.double()


def check(targets: list[Tensor], before: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    for i, (target, old, source) in enumerate(zip(targets, before, sources, strict=True)):
        truth = oracle(old, source, momentum)
        plain = torch.lerp(old, source.to(old.dtype), 1 - momentum)
        assert_close(f"target {i} at momentum {momentum}", target, truth, plain, target.dtype)
        if momentum in (0, 1):
            assert torch.equal(target, (source if momentum == 0 else old).to(target.dtype))


CASES = [(dtype, backend) for dtype in FLOATS for backend in backends(ema._update, dtype)]


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("dtype, backend", CASES)
def test_against_fp64(dtype: torch.dtype, backend: str, momentum: float) -> None:
    for source_dtype in FLOATS:
        targets = [draw((n,), dtype, n) for n in SIZES]
        sources = [draw((n,), source_dtype, n + 1) for n in SIZES]
        before = [t.clone() for t in targets]
        with ssl_fast.backend(backend):
            ema_update_(targets, sources, momentum)
        check(targets, before, sources, momentum)


@pytest.mark.parametrize("backend", backends(ema._update, torch.float32))
def test_one_call_takes_any_mix_of_layouts(backend: str) -> None:
    def tensors(seed: int) -> list[Tensor]:
        image = draw((6, 5, 7, 3), torch.float32, seed)
        return [
            image.contiguous(memory_format=torch.channels_last),
            draw((6, 5, 7, 3), torch.bfloat16, seed + 1),  # its source is channels_last
            draw((40, 30), torch.float32, seed + 2).T,
            draw((40, 30), torch.float16, seed + 3)[::2, ::3],
            draw((9001,), torch.float32, seed + 4)[1:],  # off the 16-byte grid
            draw((), torch.float64, seed + 5),
            draw((64, 64, 1, 1), torch.float32, seed + 6).to(memory_format=torch.channels_last),
        ]

    targets, sources = tensors(0), tensors(100)
    sources[1] = sources[1].contiguous(memory_format=torch.channels_last)
    sources[6] = sources[6].contiguous()
    before = [t.clone() for t in targets]
    strides = [t.stride() for t in targets]
    with ssl_fast.backend(backend):
        ema_update_(targets, sources, 0.9)
    check(targets, before, sources, 0.9)
    assert [t.stride() for t in targets] == strides


@pytest.mark.parametrize("backend", backends(ema._update, torch.float32))
def test_more_tensors_than_one_table_holds(backend: str) -> None:
    targets = [draw((1 + i % 5,), torch.float32, i) for i in range(2500)]
    sources = [draw((1 + i % 5,), torch.float32, i + 1) for i in range(2500)]
    before = [t.clone() for t in targets]
    with ssl_fast.backend(backend):
        ema_update_(targets, sources, 0.99)
    check(targets, before, sources, 0.99)


def test_no_tensors() -> None:
    ema_update_([], [], 0.9)


def test_fp32_targets_arrive_where_fp64_does_from_16_bit_sources() -> None:
    target, source = torch.ones(8, device=DEVICE), torch.full((8,), 1.125, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(2000):
        ema_update_([target], [source], 0.999)
    assert torch.allclose(target.double(), torch.tensor(1.125 - 0.125 * 0.999**2000, device=DEVICE).double(), rtol=1e-6)


def test_modules() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4)).to(DEVICE)
    average = copy.deepcopy(encoder)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p))
        encoder[1].running_mean.add_(1)
    before = [p.clone() for p in average.parameters()]
    pointers = [p.data_ptr() for p in average.parameters()]
    ema_update_(average, encoder, 0.9)
    check(list(average.parameters()), before, list(encoder.parameters()), 0.9)
    assert [p.data_ptr() for p in average.parameters()] == pointers
    assert torch.equal(average[1].running_mean, torch.zeros(8, device=DEVICE))


def test_a_target_listed_twice_is_updated_once() -> None:
    target = torch.ones(3, device=DEVICE)
    ema_update_([target, target], [torch.zeros_like(target), torch.full_like(target, 9)], 0.5)
    assert torch.equal(target, torch.full_like(target, 0.5))


@pytest.mark.parametrize("backend", backends(ema._update, torch.float32))
def test_a_graph_that_holds_the_old_value_notices(backend: str) -> None:
    weight = torch.ones(3, device=DEVICE, requires_grad=True)
    loss = (weight**3).sum()
    with ssl_fast.backend(backend):
        ema_update_([weight], [torch.zeros_like(weight)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_runs_are_equal_to_the_bit() -> None:
    targets, sources = [draw((n,), torch.float32, n) for n in SIZES], [draw((n,), torch.bfloat16, n) for n in SIZES]
    again = [t.clone() for t in targets]
    ema_update_(targets, sources, 0.996)
    ema_update_(again, sources, 0.996)
    assert all(map(torch.equal, targets, again))


def test_opcheck_and_compile() -> None:
    targets, sources = [draw((5, 3), torch.float32, 0)], [draw((5, 3), torch.bfloat16, 1)]
    torch.library.opcheck(torch.ops.ssl_fast.ema_update_.default, (targets, sources, 0.9))
    before = [t.clone() for t in targets]
    torch.compile(ema_update_, fullgraph=True, backend="aot_eager")(targets, sources, 0.9)
    check(targets, before, sources, 0.9)


BAD = {
    "momentum: got 1.5": (lambda t, s: (t, s, 1.5), ValueError),
    "momentum: got nan": (lambda t, s: (t, s, float("nan")), ValueError),
    "momentum: got Tensor": (lambda t, s: (t, s, torch.tensor(0.9)), TypeError),
    "sources: got 1 tensors": (lambda t, s: (t, s[:1], 0.9), ValueError),
    r"sources\[1\]: got shape \(1,\), allowed: the shape of its target, \(4,\)": (
        lambda t, s: (t, [s[0], s[1][:1]], 0.9),
        ValueError,
    ),
    r"targets\[1\]: got torch.int64": (lambda t, s: ([t[0], t[1].long()], s, 0.9), TypeError),
    r"sources\[0\]: got device meta": (lambda t, s: (t, [s[0].to("meta"), s[1]], 0.9), ValueError),
    "sources: got Linear": (lambda t, s: (t, nn.Linear(2, 2), 0.9), TypeError),
    "targets: got Tensor": (lambda t, s: (t[0], s[0], 0.9), TypeError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named_and_changes_nothing(message: str) -> None:
    arguments, error = BAD[message]
    targets, sources = [draw((4,), torch.float32, i) for i in range(2)], [draw((4,), torch.float32, 9)] * 2
    before = [t.clone() for t in targets]
    with pytest.raises(error, match=message):
        ema_update_(*arguments(targets, sources))
    assert all(map(torch.equal, targets, before))


def test_modules_of_different_structure() -> None:
    with pytest.raises(ValueError, match="sources: got a module without the parameter 'bias' of targets"):
        ema_update_(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.9)
    with pytest.raises(ValueError, match=r"sources parameter 'weight': got shape \(2, 3\)"):
        ema_update_(nn.Linear(2, 2), nn.Linear(3, 2), 0.9)


# ---- the kernel's code, compiled for the host

HOST = """
#include "ema.h"
using namespace ssl_fast::ema;

static int launch(const Table& table, const Weights& weights) {
  for (uint32_t chunk = 0; chunk < table.chunks; ++chunk) {
    for (int thread = 0; thread < kThreads; ++thread) update(table, chunk, thread, weights);
  }
  return table.chunks > 0;
}

extern "C" int run(int count, void** targets, const DType* to, void** sources, const DType* from, const int64_t* numel,
                   double momentum) {
  static Table table;
  table.clear();
  int launches = 0;
  for (int i = 0; i < count; ++i) {
    if (table.add(targets[i], to[i], sources[i], from[i], numel[i])) continue;
    launches += launch(table, Weights(momentum));
    table.clear();
    if (!table.add(targets[i], to[i], sources[i], from[i], numel[i])) return -1;
  }
  return launches + launch(table, Weights(momentum));
}

extern "C" int tensor_of(int count, const int64_t* numel, uint32_t chunk) {
  static Table table;
  table.clear();
  for (int i = 0; i < count; ++i) {
    if (!table.add(nullptr, kFloat, nullptr, kFloat, numel[i])) return -1;
  }
  return chunk < table.chunks ? table.tensor_of(chunk) : -2;
}
"""
CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("ema")
    (folder / "host.cpp").write_text(HOST)
    root, include = Path(__file__).parents[1], Path(torch.__file__).parent / "include"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root / 'csrc'}", f"-I{include}"]
    subprocess.run([*command, str(folder / "host.cpp"), "-o", str(folder / "host.so")], check=True)
    return ctypes.CDLL(str(folder / "host.so"))


def run_on_host(host: ctypes.CDLL, targets: list[Tensor], sources: list[Tensor], momentum: float) -> int:
    n = len(targets)
    pointers = [(ctypes.c_void_p * n)(*(t.data_ptr() for t in side)) for side in (targets, sources)]
    types = [(ctypes.c_uint8 * n)(*(CODE[t.dtype] for t in side)) for side in (targets, sources)]
    numel = (ctypes.c_int64 * n)(*(t.numel() for t in targets))
    return host.run(n, pointers[0], types[0], pointers[1], types[1], numel, ctypes.c_double(momentum))


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("offset", [0, 1, 2, 8])
def test_kernel_code_writes_each_element_once_and_nothing_else(host: ctypes.CDLL, offset: int, momentum: float) -> None:
    pairs = [(to, source, n) for to in FLOATS for source in FLOATS for n in SIZES]
    buffers = [draw((n + 32,), to, i, "cpu") for i, (to, _, n) in enumerate(pairs)]
    before = [b.clone() for b in buffers]
    inside = [slice(offset, offset + n) for _, _, n in pairs]
    targets = [b[s] for b, s in zip(buffers, inside, strict=True)]
    sources = [draw((n,), source, i + 1, "cpu") for i, (_, source, n) in enumerate(pairs)]
    assert run_on_host(host, targets, sources, momentum) == 1
    check(targets, [b[s] for b, s in zip(before, inside, strict=True)], sources, momentum)
    for buffer, old, written in zip(buffers, before, inside, strict=True):
        buffer[written] = old[written]
        assert torch.equal(buffer, old)


@pytest.mark.parametrize("count, launches", [(0, 0), (1, 1), (1024, 1), (1025, 2), (2500, 3)])
def test_kernel_code_takes_1024_tensors_a_launch(host: ctypes.CDLL, count: int, launches: int) -> None:
    targets, sources = [torch.ones(1 + i % 7) for i in range(count)], [torch.zeros(1 + i % 7) for i in range(count)]
    assert run_on_host(host, targets, sources, 0.5) == launches
    assert all((t == 0.5).all() for t in targets)


def test_kernel_table_finds_tensors_past_32_bits(host: ctypes.CDLL) -> None:
    sizes = [5, 0, 2**33 + 1, 4096, 2**31]
    numel = (ctypes.c_int64 * len(sizes))(*sizes)
    first, owners = 0, [i for i, n in enumerate(sizes) if n]
    for entry, i in enumerate(owners):
        last = first + -(-sizes[i] // 4096) - 1
        for chunk in (first, last):
            assert host.tensor_of(len(sizes), numel, ctypes.c_uint32(chunk)) == entry
        first = last + 1
    assert host.tensor_of(len(sizes), numel, ctypes.c_uint32(first)) == -2
    assert host.tensor_of(1, (ctypes.c_int64 * 1)(2**43), ctypes.c_uint32(0)) == -1  # more blocks than a grid has


# ---- on a GPU


@gpu
def test_one_launch_for_a_mix() -> None:
    targets = [draw((n,), dtype, n) for dtype in FLOATS for n in SIZES]
    sources = [t.float() for t in targets]
    with ssl_fast.backend("native"):
        ema_update_(targets, sources, 0.9)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ema_update_(targets, sources, 0.9)
            torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, [e.name for e in kernels]


@gpu
def test_cuda_graph_replays() -> None:
    target, source = torch.zeros(5000, device="cuda"), torch.ones(5000, device="cuda")
    with ssl_fast.backend("native"):
        ema_update_([target], [source], 0.5)
        target.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ema_update_([target], [source], 0.5)
    assert (target == 0).all()
    for _ in range(3):
        graph.replay()
    assert (target == 0.875).all()


@gpu
def test_past_2_31_elements() -> None:
    n = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip(f"needs {5 * n / 2**30:.0f} GiB of GPU memory")
    target = torch.zeros(n, dtype=torch.float16, device="cuda")
    ema_update_([target], [torch.ones_like(target)], 0.5)
    assert target[-1] == 0.5 and target[2**31] == 0.5 and target.sum(dtype=torch.float64) == n / 2
