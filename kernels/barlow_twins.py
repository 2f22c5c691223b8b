"""Barlow Twins in Triton: tiles of products whose squares are summed while they are in registers, and which are written
once, as operands of cuBLAS's products for the gradient.

By columns a tile is one of C = scale x^T y; by rows one of scale a x^T together with one of scale b y^T, each the
other's weight, where a symmetric pair's upper triangle is written twice. What is written is no more than the
embeddings, or CHUNK_BYTES. docs/kernels.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from ssl_fast.kernels._common import (
    CHUNK_BYTES,
    Config,
    arch,
    dot,
    dot_precision,
    pick,
    product,
    rounded,
)
from torch import Tensor

# (arch, bytes of an operand): Config. Not yet measured on a GPU; chosen to compile without spills.
COLUMNS_CONFIGS = {
    (80, 2): Config(128, 128, 8, 3, 1),
    (80, 4): Config(128, 64, 8, 3, 1),
    (90, 2): Config(128, 128, 8, 3, 1),
    (90, 4): Config(128, 64, 8, 3, 1),
    (100, 2): Config(128, 128, 8, 3, 1),
    (100, 4): Config(128, 64, 8, 3, 1),
}
ROWS_CONFIGS = {  # square: a symmetric tile is written on both sides of the diagonal
    (80, 2): Config(64, 64, 4, 3, 2),
    (80, 4): Config(64, 64, 4, 3, 1),
    (90, 2): Config(128, 128, 8, 3, 1),
    (90, 4): Config(64, 64, 4, 3, 1),
    (100, 2): Config(64, 64, 4, 3, 2),
    (100, 4): Config(64, 64, 4, 3, 1),
}
CANDIDATES = tuple(
    Config(m, n, warps, stages, 1)
    for m, n, warps in ((64, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
    for stages in (3, 4)
)


@triton.jit
def _product(
    left_ptr, right_ptr, i0, j0, rows, cols, K, left_i, left_k, right_j, right_k,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N): the sum over k < K of left(i, k) right(j, k), and 0 beyond rows and cols."""
    left_ptr += i0.to(tl.int64) * left_i
    right_ptr += j0.to(tl.int64) * right_j
    i, j, k = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(left_ptr + i * left_i + k[None, :] * left_k, (i < rows - i0) & (k[None, :] < K - start), 0.0)
        right = tl.load(right_ptr + j * right_j + k[:, None] * right_k, (j < cols - j0) & (k[:, None] < K - start), 0.0)
        acc = dot(left, right, acc, PRECISION)
        left_ptr += tl.cast(left_k, tl.int64) * BLOCK_K
        right_ptr += tl.cast(right_k, tl.int64) * BLOCK_K
    return acc


@triton.jit
def _store_tile(out_ptr, x, i0, j0, rows, cols, out_i, out_j, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    out_ptr += i0.to(tl.int64) * out_i + j0.to(tl.int64) * out_j
    i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_ptr + i * out_i + j * out_j, rounded(x, out_ptr.dtype.element_ty), (i < rows - i0) & (j < cols - j0))


@triton.jit
def _finish_columns(
    C, out_ptr, sums_ptr, i0, j0, rows, cols, diagonal, scale,
    STORE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    on = tl.arange(0, BLOCK_N)[None, :] + j0 == tl.arange(0, BLOCK_M)[:, None] + (i0 + diagonal)
    C = tl.where(on, 0.0, C * scale)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(C * C))
    if STORE:
        _store_tile(out_ptr, C, i0, j0, rows, cols, cols, 1, BLOCK_M, BLOCK_N)


@triton.jit
def _place(rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first row and column of this program's tile; neighbours in time share what they read."""
    columns = tl.cdiv(cols, BLOCK_N)
    i, j = tl.swizzle2d(tl.program_id(0) // columns, tl.program_id(0) % columns, tl.cdiv(rows, BLOCK_M), columns, 8)
    return i * BLOCK_M, j * BLOCK_N


@triton.jit(do_not_specialize=["diagonal"])
def _columns_kernel(
    x_ptr, y_ptr, C_ptr, sums_ptr,  # (N, rows), (N, cols), (rows, cols), (programs,)
    N, rows, cols, diagonal, scale, x_n, x_d, y_n, y_d,
    STORE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i0, j0 = _place(rows, cols, BLOCK_M, BLOCK_N)
    C = _product(x_ptr, y_ptr, i0, j0, rows, cols, N, x_d, x_n, y_d, y_n, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    _finish_columns(C, C_ptr, sums_ptr, i0, j0, rows, cols, diagonal, scale, STORE, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["diagonal"])
def _columns_finish_kernel(
    C_ptr, sums_ptr, rows, cols, diagonal, scale, STORE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """What _columns_kernel does to its tiles, of products that are there."""
    i0, j0 = _place(rows, cols, BLOCK_M, BLOCK_N)
    C = _load_tile(C_ptr, i0, j0, rows, cols, BLOCK_M, BLOCK_N)
    _finish_columns(C, C_ptr, sums_ptr, i0, j0, rows, cols, diagonal, scale, STORE, BLOCK_M, BLOCK_N)


@triton.jit
def _load_tile(ptr, i0, j0, rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    ptr += i0.to(tl.int64) * cols + j0
    i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    return tl.load(ptr + i * cols + j, (i < rows - i0) & (j < cols - j0), 0.0)


@triton.jit
def _finish_rows(
    of_a, of_b, weights_a_ptr, weights_b_ptr, sums_ptr, i0, j0, rows, cols,
    MIRROR: tl.constexpr, STORE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sum = tl.sum(of_a * of_b)
    if MIRROR:
        sum = tl.where(j0 > i0, 2 * sum, sum)
    tl.store(sums_ptr + tl.program_id(0), sum)
    if STORE:
        _store_tile(weights_a_ptr, of_b, i0, j0, rows, cols, cols, 1, BLOCK_M, BLOCK_N)
        _store_tile(weights_b_ptr, of_a, i0, j0, rows, cols, cols, 1, BLOCK_M, BLOCK_N)
        if MIRROR and j0 > i0:
            _store_tile(weights_a_ptr, of_b, i0, j0, rows, cols, 1, cols, BLOCK_M, BLOCK_N)
            _store_tile(weights_b_ptr, of_a, i0, j0, rows, cols, 1, cols, BLOCK_M, BLOCK_N)


@triton.jit
def _rows_kernel(
    a_ptr, b_ptr, x_ptr, y_ptr,  # (rows, D) twice, (cols, D) twice
    weights_a_ptr, weights_b_ptr, sums_ptr,  # (rows, cols) twice, (programs,)
    rows, cols, D, scale, a_n, a_d, b_n, b_d, x_n, x_d, y_n, y_d,
    MIRROR: tl.constexpr, STORE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i0, j0 = _place(rows, cols, BLOCK_M, BLOCK_N)
    if MIRROR and j0 < i0:
        return
    of_a = (
        _product(a_ptr, x_ptr, i0, j0, rows, cols, D, a_n, a_d, x_n, x_d, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K) * scale
    )
    of_b = (
        _product(b_ptr, y_ptr, i0, j0, rows, cols, D, b_n, b_d, y_n, y_d, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K) * scale
    )
    _finish_rows(
        of_a, of_b, weights_a_ptr, weights_b_ptr, sums_ptr, i0, j0, rows, cols, MIRROR, STORE, BLOCK_M, BLOCK_N
    )  # fmt: skip


@triton.jit
def _rows_finish_kernel(
    of_a_ptr, of_b_ptr, sums_ptr, rows, cols, scale, STORE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """What _rows_kernel does to its tiles, of products that are there: each takes the other's place as a weight."""
    i0, j0 = _place(rows, cols, BLOCK_M, BLOCK_N)
    of_a = _load_tile(of_a_ptr, i0, j0, rows, cols, BLOCK_M, BLOCK_N) * scale
    of_b = _load_tile(of_b_ptr, i0, j0, rows, cols, BLOCK_M, BLOCK_N) * scale
    _finish_rows(of_a, of_b, of_a_ptr, of_b_ptr, sums_ptr, i0, j0, rows, cols, False, STORE, BLOCK_M, BLOCK_N)


def _fused(x: Tensor) -> bool:
    """Whether the products run inside the kernels. Without tensor cores cuBLAS's fp32 product is the better one."""
    return x.dtype != torch.float32 or dot_precision(x.dtype) == "tf32"


def _strips(count: int, width: int, numel: int) -> Iterator[slice]:
    """Rows of a matrix so wide that are held at a time: no more numbers than the embeddings have."""
    size = max(128, max(CHUNK_BYTES // 4, numel) // width // 128 * 128)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _options(x: Tensor, config: Config) -> dict[str, object]:
    return {
        "PRECISION": dot_precision(x.dtype), "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": 128 // x.element_size(), **config.options,
    }  # fmt: skip


FINISH = {"BLOCK_M": 32, "BLOCK_N": 128}


def _programs(rows: int, cols: int, BLOCK_M: int, BLOCK_N: int) -> int:
    return triton.cdiv(rows, BLOCK_M) * triton.cdiv(cols, BLOCK_N)


def _start(z: Tensor, other: Tensor, on_diagonal: Tensor | None, gradients: bool) -> Tensor:
    """What C's diagonal gives to the gradient for z."""
    if not gradients:
        return z.new_empty(0, dtype=torch.float32)
    return torch.zeros_like(z, dtype=torch.float32) if on_diagonal is None else other * on_diagonal


def _add(out: Tensor, x: Tensor, y: Tensor, alpha: float) -> None:
    """out += alpha x y"""
    if x.dtype == out.dtype:
        out.addmm_(x, y, alpha=alpha)
    else:
        out.add_(product(x, y), alpha=alpha)


def _columns(
    x: Tensor, y: Tensor, diagonal: int, scale: float, gradients: bool, config: Config | None
) -> tuple[Tensor, Tensor]:
    """C without its diagonal, in the dtype of y, and sums of its squares."""
    rows, cols = x.shape[1], y.shape[1]
    if config:
        sums = torch.empty(_programs(rows, cols, config.BLOCK_M, config.BLOCK_N), device=x.device)
        C = y.new_empty(rows if gradients else 0, cols)
        _columns_kernel[(len(sums),)](
            x, y, C, sums, len(x), rows, cols, diagonal, scale, *x.stride(), *y.stride(),
            STORE=gradients, **_options(x, config),
        )  # fmt: skip
    else:
        sums = torch.empty(_programs(rows, cols, **FINISH), device=x.device)
        C = product(x.T, y)
        _columns_finish_kernel[(len(sums),)](C, sums, rows, cols, diagonal, scale, STORE=gradients, **FINISH)
    return C, sums


def barlow_twins_columns(
    x: Tensor, y: Tensor, on_diagonal: Tensor | None, diagonal: int, scale: float, weight: float, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of squares beside C's diagonal, and the gradients in fp32; see ops/barlow_twins.py."""
    paired, slope = slice(diagonal, diagonal + x.shape[1]), 2 * weight * scale
    with torch.cuda.device_of(x):
        dx, dy = _start(x, y[:, paired], on_diagonal, gradients), _start(y, y, None, gradients)
        if on_diagonal is not None:
            dy[:, paired] = x * on_diagonal
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for columns in _strips(x.shape[1], y.shape[1], y.numel()):
            part = x[:, columns]
            run = lambda config: _columns(part, y, diagonal + columns.start, scale, gradients, config)  # noqa: B023, E731
            key = arch(x.device), x.element_size()
            C, sums = run(pick("COLUMNS_CONFIGS", key, COLUMNS_CONFIGS, CANDIDATES, run) if _fused(x) else None)
            total += sums.sum(dtype=torch.float64)
            if gradients:
                _add(dx[:, columns], y, C.T, slope)
                _add(dy, part, C, slope)
        return total, dx, dy


def _rows(
    a: Tensor, b: Tensor, x: Tensor, y: Tensor, mirror: bool, scale: float, gradients: bool, config: Config | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of x and of y, in their dtype, and sums of their products."""
    rows, cols = len(a), len(x)
    if config:
        sums = torch.zeros(_programs(rows, cols, config.BLOCK_M, config.BLOCK_N), device=a.device)
        weights_a, weights_b = (x.new_empty(rows if gradients else 0, cols) for _ in range(2))
        _rows_kernel[(len(sums),)](
            a, b, x, y, weights_a, weights_b, sums, rows, cols, a.shape[1], scale,
            *a.stride(), *b.stride(), *x.stride(), *y.stride(),
            MIRROR=mirror, STORE=gradients, **_options(a, config),
        )  # fmt: skip
    else:
        sums = torch.empty(_programs(rows, cols, **FINISH), device=a.device)
        weights_a, weights_b = product(a, x.T), product(b, y.T)
        _rows_finish_kernel[(len(sums),)](weights_a, weights_b, sums, rows, cols, scale, STORE=gradients, **FINISH)
    return weights_a, weights_b, sums


def barlow_twins_rows(
    a: Tensor, b: Tensor, x: Tensor | None, y: Tensor | None, on_diagonal: Tensor | None, scale: float, weight: float,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum of squares of C, and the gradients in fp32; see ops/barlow_twins.py."""
    symmetric = x is None or y is None
    x, y = (a, b) if x is None or y is None else (x, y)
    with torch.cuda.device_of(a):
        da, db = _start(a, b, on_diagonal, gradients), _start(b, a, on_diagonal, gradients)
        total = torch.zeros((), dtype=torch.float64, device=a.device)
        for rows in _strips(len(a), len(x), a.numel()):
            own = a[rows], b[rows], x, y
            mirror = symmetric and len(own[0]) == len(x)
            run = lambda config: _rows(*own, mirror, scale, gradients, config)  # noqa: B023, E731
            key = arch(a.device), a.element_size()
            config = pick("ROWS_CONFIGS", key, ROWS_CONFIGS, CANDIDATES[:-2], run) if _fused(a) else None
            weights_a, weights_b, sums = run(config)
            total += sums.sum(dtype=torch.float64)
            if gradients:
                _add(da[rows], weights_a, x, 2 * weight * scale)
                _add(db[rows], weights_b, y, 2 * weight * scale)
        return total, da, db
