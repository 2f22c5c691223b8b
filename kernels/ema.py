"""The EMA in Triton: one launch over a table of pointers in device memory.

A row of the table is one pair of tensors (ROW below); a program owns BLOCK elements of one pair. The table is kept from
call to call, and looked up by the addresses, dtypes and sizes of all tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from ssl_fast.kernels._common import CODES, RAW, elements_at, load_as, store_as
from torch import Tensor

BLOCK = 2048
ROW = ("target", "source", "copy", "numel", "first program", "target's code", "source's code", "copy's code")
TABLES = 16  # that are kept

COLUMNS = tl.constexpr(len(ROW))


@triton.jit
def _mix(x):
    """A bijection of 32 bits that looks random: lowbias32 of C. Wellons' hash prospector (public domain)."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _round_stochastically(x, code, noise, MATH: tl.constexpr):
    """x to values of the 16-bit dtype of a code, up with the probability of the part that is cut off."""
    single = x.to(tl.float32)
    bits = single.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7FFFFFFF) < 0x7F800000
    if code == 1:
        near = ((bits + noise) & tl.full((), 0xFFFF0000, tl.uint32)).to(tl.float32, bitcast=True)
        x = tl.where(finite, near, single).to(MATH)
    elif code == 2:
        near = ((bits + (noise >> 3)) & tl.full((), 0xFFFFE000, tl.uint32)).to(tl.float32, bitcast=True)
        size = tl.abs(single)
        steps = tl.floor(size * 16777216.0 + noise.to(tl.float32) * 1.52587890625e-05)
        tiny = (steps * 5.9604644775390625e-08).to(tl.uint32, bitcast=True)  # below 2^-14 fp16 is a grid of 2^-24
        tiny = (tiny | (bits & tl.full((), 0x80000000, tl.uint32))).to(tl.float32, bitcast=True)
        x = tl.where(finite, tl.where(size < 6.103515625e-05, tiny, near), single).to(MATH)
    return x


@triton.jit
def _update_chunk(
    row, i, begin, numel, momentum, seed_ptr, averaged,
    MATH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """target + (1 - m)(source - target), or source where it is copied, of one program's elements."""
    target, source, copy = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    code, source_code, copy_code = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    at = begin + tl.arange(0, BLOCK)
    mask = None if WIDE else at < numel
    t = load_as(target, code, at, mask, MATH, WIDE)
    s = load_as(source, source_code, at, mask, MATH, WIDE)
    keep, take = momentum.to(MATH), (1 - momentum).to(MATH)
    x = tl.where(take < 0.5, t + take * (s - t), s - keep * (s - t))
    x = tl.where(keep == 0, s, x)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        key = _mix(_mix((seed >> 32).to(tl.uint32)) + seed.to(tl.uint32)) + i.to(tl.uint32)
        key = _mix(key + tl.full((), 0x9E3779B9, tl.uint32))  # mix(0) is 0
        draws = _mix((begin // 2 + tl.arange(0, BLOCK // 2)).to(tl.uint32) ^ key)  # two neighbours share one
        noise = tl.interleave(draws & 0xFFFF, draws >> 16)
        x = _round_stochastically(x, tl.where(i < averaged, code, 0), noise, MATH)
    store_as(target, code, at, mask, x, WIDE)
    if copy != 0:
        store_as(copy, copy_code, at, mask, x, WIDE)


@triton.jit
def _update_kernel(
    table_ptr, owner_ptr, momentum_ptr, seed_ptr, averaged,
    ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i = tl.load(owner_ptr + program)
    row = table_ptr + i * COLUMNS
    numel, code, source_code = tl.load(row + 3), tl.load(row + 5), tl.load(row + 6)
    begin = (program - tl.load(row + 4)) * BLOCK
    momentum = tl.where(i < averaged, tl.load(momentum_ptr).to(tl.float64), 0.0)
    if code == RAW:
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(elements_at(tl.load(row + 1), tl.uint8, at, False), at < numel)
        tl.store(elements_at(tl.load(row), tl.uint8, at, False), x, at < numel)
    elif (code == 3) | (source_code == 3):
        _update_chunk(row, i, begin, numel, momentum, seed_ptr, averaged, tl.float64, False, BLOCK)
    elif ALIGNED and begin + BLOCK <= numel:
        _update_chunk(row, i, begin, numel, momentum, seed_ptr, averaged, tl.float32, True, BLOCK)
    else:
        _update_chunk(row, i, begin, numel, momentum, seed_ptr, averaged, tl.float32, False, BLOCK)


# ---- launcher

_tables: OrderedDict[Any, tuple[Tensor, Tensor, bool]] = OrderedDict()
_captured: list[tuple[Tensor, Tensor, bool]] = []  # a CUDA graph reads its tables at each replay


def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: Tensor, averaged: int, copies: Sequence[Tensor],
    seed: Tensor | None,
) -> None:  # fmt: skip
    """Average the first pairs and copy the others, in place; then round the first targets into the copies."""
    device = targets[0].device
    with torch.cuda.device_of(targets[0]):
        late, kept, pairs = [], [], []
        for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
            raw = i >= averaged and target.dtype == source.dtype
            copy = copies[i] if i < len(copies) else None
            t = _dense(target)
            if t is not target:
                late.append((target, t))
            s = _in_layout_of(t, source)
            c = None if copy is None else _in_layout_of(t, copy)
            if c is not copy:
                late.append((copy, c))
            kept.append((s, c))  # the allocator may hand freed memory to the next copy
            codes = (RAW.value, RAW.value) if raw else (CODES[t.dtype], CODES[s.dtype])
            numel = t.numel() * (t.element_size() if raw else 1)
            extra = (0, 0) if c is None else (c.data_ptr(), CODES[c.dtype])
            pairs.append((t.data_ptr(), s.data_ptr(), extra[0], numel, *codes, extra[1]))
        table, owner, aligned = _table(tuple(pairs), device)
        if momentum.device != device:
            momentum = torch.full((), momentum.item(), dtype=torch.float64, device=device)
        if len(owner):
            _update_kernel[(len(owner),)](
                table, owner, momentum, seed, averaged, ALIGNED=aligned, COLUMNS=len(ROW), BLOCK=BLOCK
            )
        for tensor, updated in late:
            tensor.copy_(updated)


def _table(pairs: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """The rows, the pair that each program belongs to, and whether every address lies on the 16-byte grid."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key = pairs, device
    found = _tables.get(key)
    if found is None:
        if capturing:
            raise RuntimeError(
                "ema_update_ (Triton): got tensors that no call outside the CUDA graph has seen, allowed: the same "
                "tensors, without gaps; update them once before the capture, or use backend 'native'"
            )
        programs = torch.tensor([-(-numel // BLOCK) for _, _, _, numel, *_ in pairs])
        first = (programs.cumsum(0) - programs).tolist()
        rows = [(t, s, c, numel, f, *codes) for (t, s, c, numel, *codes), f in zip(pairs, first, strict=True)]
        owner = torch.repeat_interleave(torch.arange(len(pairs), dtype=torch.int32), programs)
        aligned = all(address % 16 == 0 for row in pairs for address in row[:3])
        found = _tables[key] = torch.tensor(rows, dtype=torch.int64).to(device), owner.to(device), aligned
        if len(_tables) > TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    if capturing:
        _captured.append(found)
    return found


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where it has gaps."""
    if tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride():
        return tensor
    return tensor.contiguous()


def _in_layout_of(layout: Tensor, values: Tensor) -> Tensor:
    """The values, or a copy with the strides of a dense tensor."""
    if layout.is_contiguous() and values.is_contiguous():
        return values
    alike = [a == b for a, b, size in zip(layout.stride(), values.stride(), values.shape, strict=True) if size != 1]
    return values if all(alike) else torch.empty_like(layout, dtype=values.dtype).copy_(values)
