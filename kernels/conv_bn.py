"""Folding batch norms in Triton: one launch over a table of pointers in device memory, for a whole network.

A row of the table is one tensor that is written (ROW below). A program owns BLOCK elements of it: of a weight RUNS
stretches of one channel each, or parts of such, so that the scale in fp64 is computed once a stretch.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from ssl_fast.kernels._common import CODES, RAW, elements_at, load_as, store_as
from torch import Tensor

RUNS, WIDTH = 8, 256
ROW = ("target", "source", "mean", "variance", "gamma", "beta", "eps, its bits", "kind", "first program", "numel",
       "run", "channel's stride", "channels", "outer stride", "outer size", "outer size a group",
       *(f"code of the {name}" for name in ("target", "source", "mean", "variance", "gamma", "beta")))  # fmt: skip
TABLES = 16  # that are kept

COLUMNS = tl.constexpr(len(ROW))
CODES_AT = tl.constexpr(len(ROW) - 6)


@triton.jit
def _vector(row, COLUMN: tl.constexpr, at, mask, absent: tl.constexpr, CODES_AT: tl.constexpr):
    """fp64 values of a vector of a layer or norm, where it has one."""
    address = tl.load(row + COLUMN)
    if address != 0:
        x = load_as(address, tl.load(row + CODES_AT + COLUMN), at, mask, tl.float64, False)
    else:
        x = tl.full(at.shape, absent, tl.float64)
    return x


@triton.jit
def _scale(row, channel, mask, CODES_AT: tl.constexpr):
    eps = tl.load(row + 6).to(tl.float64, bitcast=True)
    gamma = _vector(row, 4, channel, mask, 1.0, CODES_AT)
    return gamma / tl.sqrt(_vector(row, 3, channel, mask, 1.0, CODES_AT) + eps)


@triton.jit
def _fold_kernel(
    table_ptr, owner_ptr,
    COLUMNS: tl.constexpr, CODES_AT: tl.constexpr, RUNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = table_ptr + tl.load(owner_ptr + program) * COLUMNS
    target, source, numel = tl.load(row), tl.load(row + 1), tl.load(row + 9)
    code, source_code = tl.load(row + CODES_AT), tl.load(row + CODES_AT + 1)
    own = program - tl.load(row + 8)
    kind = tl.load(row + 7)
    if kind == 0:  # a weight
        run, size = tl.load(row + 10), tl.load(row + 12)
        parts = tl.cdiv(run, WIDTH)
        start = (own // parts * RUNS + tl.arange(0, RUNS)) * run
        along = own % parts * WIDTH + tl.arange(0, WIDTH)
        channel = start // tl.load(row + 11) % size
        channel += start // tl.load(row + 13) % tl.load(row + 14) // tl.load(row + 15) * size
        scale = _scale(row, channel, start < numel, CODES_AT)
        inside = start[:, None] + along[None, :]
        whole = (start < numel)[:, None] & (along < run)[None, :]
        w = load_as(source, source_code, inside, whole, tl.float64, False)
        store_as(target, code, inside, whole, w * scale[:, None], False)
    else:
        at = own * (RUNS * WIDTH) + tl.arange(0, RUNS * WIDTH)
        mask = at < numel
        if kind == 1:  # a bias
            x = _vector(row, 1, at, mask, 0.0, CODES_AT) - _vector(row, 2, at, mask, 0.0, CODES_AT)
            x = x * _scale(row, at, mask, CODES_AT) + _vector(row, 5, at, mask, 0.0, CODES_AT)
            store_as(target, code, at, mask, x, False)
        elif code == RAW:
            raw = tl.load(elements_at(source, tl.uint8, at, False), mask)
            tl.store(elements_at(target, tl.uint8, at, False), raw, mask)
        else:
            store_as(target, code, at, mask, load_as(source, source_code, at, mask, tl.float64, False), False)


# ---- launcher

_tables: OrderedDict[Any, tuple[Tensor, Tensor]] = OrderedDict()


def conv_bn_fold_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], norms: Sequence[Tensor], eps: Sequence[float],
    groups: Sequence[int],
) -> None:  # fmt: skip
    """Write the folded weights and biases, and copy the others, in place."""
    pairs, device = len(eps), targets[0].device
    rows = []
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        of = i % pairs if i < 2 * pairs else None
        vectors = list(norms[4 * of : 4 * of + 4]) if of is not None else [None] * 4
        bits = struct.unpack("q", struct.pack("d", eps[of] if of is not None else 0.0))[0]
        raw = of is None and target.dtype == source.dtype
        numel = target.numel() * (target.element_size() if raw else 1)
        channels = _channels(target, groups[i]) if i < pairs else (WIDTH, 1, 1, 1, 1, 1)
        tensors = (target, source, *vectors)
        addresses = [0 if t is None or not t.numel() else t.data_ptr() for t in tensors]
        codes = [RAW.value if raw else 0 if t is None else CODES[t.dtype] for t in tensors]
        rows.append((*addresses, bits, min(i // max(pairs, 1), 2) if of is not None else 2, numel, *channels, *codes))
    key = tuple(rows), device
    found = _tables.get(key)
    if found is None:
        found = _tables[key] = _table(rows, device)
        if len(_tables) > TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    table, owner = found
    if len(owner):
        with torch.cuda.device_of(targets[0]):
            _fold_kernel[(len(owner),)](table, owner, COLUMNS=len(ROW), CODES_AT=CODES_AT, RUNS=RUNS, WIDTH=WIDTH)


def _channels(weight: Tensor, groups: int) -> tuple[int, ...]:
    """Where a dense weight has its channels: see Channels in csrc/conv_bn.cpp."""
    whole = max(weight.numel(), 1)
    inner, outer = (whole if weight.shape[d] == 1 else weight.stride(d) for d in (1 if groups else 0, 0))
    per_group = max(weight.shape[0] // (groups or 1), 1)
    run = min(inner, outer * per_group if outer < inner else outer) if groups > 1 else inner
    return run, inner, weight.shape[1 if groups else 0], outer, weight.shape[0], per_group


def _table(rows: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows on the device with the number of their first program, and the row that each program belongs to."""
    counts = []
    for row in rows:
        kind, numel, run = row[7:10]
        parts = triton.cdiv(run, WIDTH)
        counts.append(triton.cdiv(numel // run, RUNS) * parts if kind == 0 else triton.cdiv(numel, RUNS * WIDTH))
    programs = torch.tensor(counts)
    first = (programs.cumsum(0) - programs).tolist()
    full = [(*row[:8], f, *row[8:]) for row, f in zip(rows, first, strict=True)]
    owner = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), programs)
    return torch.tensor(full, dtype=torch.int64).to(device), owner.to(device)
