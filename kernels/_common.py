"""What more than one Triton kernel file uses: device facts, the choice of a launch configuration, small jit helpers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LN2 = tl.constexpr(0.6931471805599453)
EPS = tl.constexpr(1e-12)  # of F.normalize
# Of tables of pointers: the code of a dtype, and of a tensor that is copied as it lies, whose numel counts bytes.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
RAW = tl.constexpr(4)
CHUNK_BYTES = 64 << 20  # of fp32 similarities held at a time on the chunked paths


class Config(NamedTuple):
    """A launch configuration. programs: how many of the kernel's programs one multiprocessor holds at a time."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    programs: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """Triton's own launch options, apart from the kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}


@functools.cache
def arch(device: torch.device) -> int:
    """80 for Ampere and Ada, 90 for Hopper, 100 for Blackwell. Interpreted kernels take the smallest tiles."""
    if device.type != "cuda":
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    # Interpreted, few enough that small tests reach programs that own several row blocks, and split ones.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision. fp32 follows PyTorch's setting, where Triton's own default would be TF32."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 whatever the operands; cuBLAS follows torch.backends.cuda.matmul for fp32 ones."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def chunks(rows: int, columns: int) -> list[slice]:
    """Rows whose similarities to so many columns are held at a time."""
    size = max(128, CHUNK_BYTES // (4 * columns) // 128 * 128)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def row_blocks(D: int) -> dict[str, int]:
    """Blocks of the kernels that walk over rows: about 1024 numbers a program."""
    block_d = min(triton.next_power_of_2(D), 1024)
    return {"BLOCK_N": max(1, 1024 // block_d), "BLOCK_D": block_d}


@functools.cache
def split_count(units: int, length: int, slots: int) -> int:
    """Into how many programs to cut each of `units` loops of `length` steps, so that waves of `slots` come out full."""

    def steps(splits: int) -> int:  # of the last wave to end; a program costs about two steps besides its loop
        return triton.cdiv(units * splits, slots) * (triton.cdiv(length, splits) + 2)

    most = max(1, min(length, 4 * slots // units))
    return min(range(1, most + 1), key=lambda splits: (steps(splits), splits))


_tuned: dict[tuple[Any, ...], Config] = {}


def pick(
    name: str,
    key: tuple[Any, ...],
    table: Mapping[tuple[Any, ...], Config],
    candidates: Sequence[Config],
    run: Callable[[Config], Any],
) -> Config:
    """The measured configuration for a key; under SSL_FAST_AUTOTUNE=1 the fastest of the candidates on this device.

    Tuning happens once a key and process, at the size of the call that came first, and prints the row to add.
    """
    if os.environ.get("SSL_FAST_AUTOTUNE") != "1":
        return table[key]
    if (name, *key) not in _tuned:
        times = {}
        for config in (table[key], *candidates):
            try:
                times[config] = triton.testing.do_bench(lambda config=config: run(config), return_mode="median")
            except triton.runtime.errors.OutOfResources:
                continue
        best = min(times, key=times.__getitem__)
        device = torch.cuda.get_device_name()
        print(f"{name}: {key}: {best},  # {device}: {times[best]:.3f} ms, was {times[table[key]]:.3f}", flush=True)
        _tuned[(name, *key)] = best
    return _tuned[(name, *key)]


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32; acc may be None."""
    if INTERPRETED:  # which takes the bits of bf16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 to dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # where the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def elements_at(address, element: tl.constexpr, at, WIDE: tl.constexpr):
    """Pointers to elements; WIDE: of an address on the 16-byte grid, from which whole vectors are read."""
    start = address.to(tl.pointer_type(element))
    if WIDE:
        start = tl.multiple_of(start, 16)
    return start + at


@triton.jit
def load_as(address, code, at, mask, MATH: tl.constexpr, WIDE: tl.constexpr):
    """Elements of a tensor whose address and dtype, by its code, come from a table."""
    if code == 0:
        x = tl.load(elements_at(address, tl.float32, at, WIDE), mask).to(MATH)
    elif code == 1:
        x = tl.load(elements_at(address, tl.bfloat16, at, WIDE), mask).to(MATH)
    elif code == 2:
        x = tl.load(elements_at(address, tl.float16, at, WIDE), mask).to(MATH)
    else:
        x = tl.load(elements_at(address, tl.float64, at, WIDE), mask).to(MATH)
    return x


@triton.jit
def store_as(address, code, at, mask, x, WIDE: tl.constexpr):
    if code == 0:
        tl.store(elements_at(address, tl.float32, at, WIDE), x.to(tl.float32), mask)
    elif code == 1:
        tl.store(elements_at(address, tl.bfloat16, at, WIDE), rounded(x.to(tl.float32), tl.bfloat16), mask)
    elif code == 2:
        tl.store(elements_at(address, tl.float16, at, WIDE), x.to(tl.float32).to(tl.float16), mask)
    else:
        tl.store(elements_at(address, tl.float64, at, WIDE), x.to(tl.float64), mask)


@triton.jit
def load_temperature(temperature_ptr):
    """NaN where the temperature is not above 0: it reaches every output, and no value need leave the device."""
    t = tl.load(temperature_ptr)
    return tl.where(t > 0, t, float("nan"))


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, exact for tiny x: the rounding of 1 + x is the same above and below the line."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))
