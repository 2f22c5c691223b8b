"""InfoNCE and SupCon in Triton: chunks of S = x y^T between cuBLAS's products, and one fused pass over a queue.

Shapes: x (N, D), y (K, D); NP, KP and DP are N, K and D padded with zeros to multiples of 16. xhat and yhat are the
rows in their own dtype, of unit length where normalised; s_ij = xhat_i . yhat_j in fp32. What a row may not see, its
diagonal and columns of its id, is masked in every product; what the positives add is added in fp32 outside of them.

The largest s of a row, its shift, is subtracted before the division by t: logits of any size keep their digits.
docs/kernels.md derives the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from ssl_fast.kernels._common import (
    LN2,
    Config,
    arch,
    chunks,
    dot,
    dot_precision,
    load_temperature,
    multiprocessors,
    pick,
    product,
    rounded,
    split_count,
)
from ssl_fast.kernels._info_nce_rows import (
    bwd_rows_kernel,
    finish,
    finite,
    fwd_columns_kernel,
    fwd_rows_kernel,
    inverse_norm,
    left_out,
    merge_kernel,
    prepare,
    weights,
)
from torch import Tensor

# (arch, bytes of an operand, D up to): Config. Not yet measured on a GPU; chosen to compile without spills, by
# Triton 3.9, and on 90 by 3.6 too where D is that of the row; of 16 bits, D = 200 spills there.
ONE_PASS_CONFIGS = {
    (80, 2, 64): Config(32, 64, 4, 3, 2),
    (80, 2, 128): Config(32, 64, 4, 3, 2),
    (80, 2, 256): Config(32, 64, 8, 2, 1),
    (80, 4, 64): Config(32, 32, 4, 2, 2),
    (80, 4, 128): Config(32, 32, 8, 2, 1),
    (90, 2, 64): Config(128, 64, 8, 3, 1),
    (90, 2, 128): Config(128, 64, 8, 3, 1),
    (90, 2, 256): Config(64, 32, 8, 2, 1),
    (90, 4, 64): Config(64, 64, 4, 2, 2),
    (90, 4, 128): Config(64, 32, 8, 2, 1),
    (100, 2, 64): Config(128, 64, 8, 3, 1),
    (100, 2, 128): Config(128, 64, 8, 3, 1),
    (100, 2, 256): Config(128, 32, 8, 2, 1),
    (100, 4, 64): Config(64, 64, 4, 2, 2),
    (100, 4, 128): Config(64, 32, 4, 2, 2),
}
COLUMN_BLOCKS = {"BLOCK_M": 32, "BLOCK_N": 64}
CANDIDATES = tuple(
    Config(m, n, warps, stages, programs)
    for m, n, warps in ((64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8))
    for stages in (2, 3, 4)
    for programs in (1, 2)
)


@triton.jit
def _unit(z, NORMALIZE: tl.constexpr):
    """The rows of a tile as _prepare_kernel would leave them."""
    if NORMALIZE:
        x = z.to(tl.float32)
        norm = tl.sqrt(tl.sum(x * x, 1, keep_dims=True))
        z = rounded(x * inverse_norm(norm), z.dtype)
    return z


@triton.jit(do_not_specialize=["diagonal", "N", "K", "L"])
def _one_pass_kernel(
    x_ptr, y_ptr, temperature_ptr,  # (N, D), (K, D), ()
    x_ids_ptr, y_ids_ptr, diagonal,  # (N,), (K,), an integer; or None
    part_ptr, out_ptr,  # (splits, 3, N): top, sum of e, sum of e s; (splits, N, D): sum of e y
    stride_xn, stride_xd, stride_yk, stride_yd, N, K, L,
    D: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, STRETCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Program (block, split) meets BLOCK_M rows of x with the split-th L tiles of y, as flash attention does.

    e = exp((s - top) / t) is stretched by 2^STRETCH: among the operands of the second product are tiny ones, and in
    fp16 they would be lost.
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    d = tl.arange(0, DP)[None, :]
    live = (i < N)[:, None] & (d < D)
    scale = 1 / (load_temperature(temperature_ptr) * LN2)
    x_ptr += tl.program_id(0).to(tl.int64) * BLOCK_M * stride_xn
    x = tl.load(x_ptr + (tl.arange(0, BLOCK_M)[:, None] * stride_xn + d * stride_xd), live, other=0.0)
    x = _unit(x, NORMALIZE)
    x_id = None
    if x_ids_ptr is not None:
        x_id = tl.load(x_ids_ptr + i, i < N, other=0)[:, None]
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_e = tl.zeros((BLOCK_M,), tl.float32)
    sum_es = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DP), tl.float32)
    for tile in range(split * L, tl.minimum(split * L + L, tl.cdiv(K, BLOCK_N))):
        j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        # 64 bits for the base alone: offsets inside a tile cost half the registers
        at = y_ptr + tl.cast(tile, tl.int64) * BLOCK_N * stride_yk
        at += tl.arange(0, BLOCK_N)[:, None] * stride_yk + d * stride_yd
        y = _unit(tl.load(at, (j < K)[:, None] & (d < D), other=0.0), NORMALIZE)
        y_id = None
        if y_ids_ptr is not None:
            y_id = tl.load(y_ids_ptr + j, j < K, other=0)[None, :]
        s = dot(x, y.T, None, PRECISION)
        masked = tl.where(left_out(i[:, None], j[None, :], K, diagonal, x_id, y_id), float("-inf"), s)
        above = tl.maximum(top, tl.max(masked, 1))
        shift = finite(above)
        e = tl.exp2((masked - shift[:, None]) * scale + STRETCH)
        decay = tl.exp2((top - shift) * scale)
        sum_e = sum_e * decay + tl.sum(e, 1)
        sum_es = sum_es * decay + tl.sum(e * s, 1)
        acc = dot(rounded(e, y.dtype), y, acc * decay[:, None], PRECISION)
        top = above
    unstretch = tl.exp2(-1.0 * STRETCH)
    plane = N.to(tl.int64)
    part_ptr += split * 3 * plane + i
    tl.store(part_ptr, top, i < N)
    tl.store(part_ptr + plane, sum_e * unstretch, i < N)
    tl.store(part_ptr + 2 * plane, sum_es * unstretch, i < N)
    out_ptr += (split * plane + tl.program_id(0) * BLOCK_M) * D
    tl.store(out_ptr + (tl.arange(0, BLOCK_M)[:, None] * D + d), acc * unstretch, live)


# ---- what the launchers share


class _Hidden(NamedTuple):
    """What rows may not see, as the kernels take it."""

    x_ids: Tensor | None
    y_ids: Tensor | None
    diagonal: int | None


def _hidden(N: int, K: int, x_ids: Tensor | None, y_ids: Tensor | None, diagonal: int | None) -> _Hidden:
    if diagonal is not None:
        diagonal = max(-N, min(K, diagonal))  # which meet no column either, and are int32
    if x_ids is None or y_ids is None:
        return _Hidden(None, None, diagonal)
    return _Hidden(x_ids.contiguous(), y_ids.contiguous(), diagonal)


def _similarities(xhat: Tensor, yhat: Tensor, N: int) -> Iterator[tuple[slice, Tensor]]:
    """Chunks (rows, KP) of the first N rows of S."""
    for rows in chunks(N, len(yhat)):
        yield rows, product(xhat[rows], yhat.T)


def _stretch(x: Tensor, largest: Tensor) -> Tensor | None:
    """What to multiply weights up to `largest` with, so that in fp16's range those of 1e-9 of it keep their bits."""
    return 2**15 / largest.clamp(min=1e-30) if x.dtype == torch.float16 else None


def _operand(
    s: Tensor, like: Tensor, row0: int, K: int, temperature: Tensor, hidden: _Hidden, row: tuple[Tensor, Tensor],
    column: tuple[Tensor | None, Tensor | None] = (None, None), positive: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """W (rows, KP) in the operands' dtype from a chunk of S, which is not needed again."""
    w = s if like.dtype == s.dtype else torch.empty_like(s, dtype=like.dtype)
    bwd_rows_kernel[(len(s), triton.cdiv(s.shape[1], 1024))](
        s, temperature, *hidden, *row, *column, positive, w, row0, K, s.shape[1], BLOCK=1024
    )
    return w


# ---- InfoNCE


def info_nce_fwd(
    x: Tensor, y: Tensor, temperature: Tensor, x_ids: Tensor | None, y_ids: Tensor | None, diagonal: int | None,
    normalize: bool, columns: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Stats (4, N) of the rows, and (4, K) of the columns or (4, 0), fp32; see ops/info_nce.py.

    x (N, D), y (K, D) fp16, bf16 or fp32; temperature () fp32; x_ids (N,), y_ids (K,) int64.
    """
    N, K = len(x), len(y)
    hidden = _hidden(N, K, x_ids, y_ids, diagonal)
    of_rows = temperature.new_empty(4, N)
    of_columns = temperature.new_empty(4, K if columns else 0)
    with torch.cuda.device_of(x):
        xhat, yhat = prepare(x, normalize)[0], prepare(y, normalize)[0]
        parts = _no_rows(N, K, x.device) if columns else None
        for rows, s in _similarities(xhat, yhat, N):
            _set_rows(of_rows, s, rows.start, K, temperature, hidden)
            if parts is not None:
                _add_columns(parts, s, rows.start, temperature, hidden)
        if parts is not None:
            _merge(parts, None, temperature, of_columns, None)
    return of_rows, of_columns


def _set_rows(
    stats: Tensor, s: Tensor, row0: int, K: int, temperature: Tensor, hidden: _Hidden, positives: bool = False
) -> None:
    """The stats of the rows of a chunk of S."""
    N, KP = stats.shape[1], s.shape[1]
    fwd_rows_kernel[(len(s),)](s, temperature, *hidden, stats, row0, N, K, KP, POSITIVES=positives, BLOCK=2048)


def _no_rows(N: int, K: int, device: torch.device) -> Tensor:
    """Partial stats (splits, 3, K) of columns, before any chunk of rows is added."""
    tiles = triton.cdiv(chunks(N, K)[0].stop, COLUMN_BLOCKS["BLOCK_M"])
    splits = split_count(triton.cdiv(K, COLUMN_BLOCKS["BLOCK_N"]), tiles, 4 * multiprocessors(device))
    parts = torch.zeros(splits, 3, K, device=device)
    parts[:, 0] = -torch.inf
    return parts


def _add_columns(parts: Tensor, s: Tensor, row0: int, temperature: Tensor, hidden: _Hidden) -> None:
    """Merge a chunk of S into the partial stats of its columns."""
    splits, _, K = parts.shape
    BLOCK_M, BLOCK_N = COLUMN_BLOCKS["BLOCK_M"], COLUMN_BLOCKS["BLOCK_N"]
    L = triton.cdiv(len(s), BLOCK_M * splits) * BLOCK_M
    fwd_columns_kernel[(triton.cdiv(K, BLOCK_N), splits)](
        s, temperature, *hidden, parts, row0, len(s), K, s.shape[1], L, **COLUMN_BLOCKS
    )


def _merge(parts: Tensor, outs: Tensor | None, temperature: Tensor, stats: Tensor, out: Tensor | None) -> None:
    """stats (4, N) and out (N, D) from parts (splits, 3, N) and outs (splits, N, D)."""
    splits, _, N = parts.shape
    D = 1 if out is None else out.shape[1]
    BLOCK_N = 32 if out is None else 1
    merge_kernel[(triton.cdiv(N, BLOCK_N),)](
        parts, outs, temperature, stats, out, N, splits,
        D=D, BLOCK_N=BLOCK_N, BLOCK_S=32, BLOCK_D=triton.next_power_of_2(D),
    )  # fmt: skip


def info_nce_bwd(
    grad_lse: Tensor, grad_column_lse: Tensor | None, x: Tensor, y: Tensor, temperature: Tensor, of_rows: Tensor,
    of_columns: Tensor, x_ids: Tensor | None, y_ids: Tensor | None, diagonal: int | None, normalize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx (N, D), dy (K, D), fp32, from the gradients (N,) of the rows' lse, (K,) of the columns' or None, and the
    forward's stats."""
    N, K = len(x), len(y)
    hidden = _hidden(N, K, x_ids, y_ids, diagonal)
    with torch.cuda.device_of(x):
        (xhat, x_norm), (yhat, y_norm) = prepare(x, normalize), prepare(y, normalize)
        largest = grad_lse.abs().amax()
        if grad_column_lse is not None:
            largest = largest + grad_column_lse.abs().amax()
        scale = _stretch(x, largest)
        column = (None, None) if grad_column_lse is None else weights(grad_column_lse, of_columns, scale)
        dxhat = temperature.new_empty(xhat.shape)
        dyhat = temperature.new_zeros(yhat.shape)
        for rows, s in _similarities(xhat, yhat, N):
            row = weights(grad_lse[rows], of_rows[:, rows], scale)
            w = _operand(s, xhat, rows.start, K, temperature, hidden, row, column)
            dxhat[rows] = product(w, yhat)
            dyhat += product(w.T, xhat[rows])
        dx = finish(dxhat, x, x_norm, scale, temperature, normalize)
        return dx, finish(dyhat, y, y_norm, scale, temperature, normalize)


def info_nce_one_pass(
    x: Tensor, y: Tensor, temperature: Tensor, x_ids: Tensor | None, y_ids: Tensor | None, diagonal: int | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Stats (4, N) of the rows and softmax(S / t) yhat (N, D), fp32."""
    hidden = _hidden(len(x), len(y), x_ids, y_ids, diagonal)
    run = lambda config: _one_pass_fused(x, y, temperature, hidden, normalize, config)  # noqa: E731
    with torch.cuda.device_of(x):
        if not _fused(x):
            return _one_pass_chunked(x, y, temperature, hidden, normalize)
        key = arch(x.device), x.element_size(), max(64, triton.next_power_of_2(x.shape[1]))
        return run(pick("ONE_PASS_CONFIGS", key, ONE_PASS_CONFIGS, CANDIDATES, run))


def _fused(x: Tensor) -> bool:
    """Whether the products run inside the kernel. Without tensor cores cuBLAS's fp32 product is the better one, and
    rows of more than 512 bytes leave too few registers."""
    return x.shape[1] * x.element_size() <= 512 and (x.dtype != torch.float32 or dot_precision(x.dtype) == "tf32")


def _one_pass_fused(
    x: Tensor, y: Tensor, temperature: Tensor, hidden: _Hidden, normalize: bool, config: Config
) -> tuple[Tensor, Tensor]:
    (N, D), K = x.shape, len(y)
    # The kernel's offsets inside a tile are 32-bit.
    x, y = (z if max(z.stride(0) * 256, z.stride(1) * D) < 2**30 else z.contiguous() for z in (x, y))
    blocks, tiles = triton.cdiv(N, config.BLOCK_M), triton.cdiv(K, config.BLOCK_N)
    splits = split_count(blocks, tiles, config.programs * multiprocessors(x.device))
    parts, outs = temperature.new_empty(splits, 3, N), temperature.new_empty(splits, N, D)
    _one_pass_kernel[(blocks, splits)](
        x, y, temperature, *hidden, parts, outs, *x.stride(), *y.stride(), N, K, triton.cdiv(tiles, splits),
        D=D, NORMALIZE=normalize, PRECISION=dot_precision(x.dtype), STRETCH=15 if x.dtype == torch.float16 else 0,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, DP=max(16, triton.next_power_of_2(D)),
        **config.options,
    )  # fmt: skip
    stats, out = temperature.new_empty(4, N), temperature.new_empty(N, D)
    _merge(parts, outs, temperature, stats, out)
    return stats, out


def _one_pass_chunked(
    x: Tensor, y: Tensor, temperature: Tensor, hidden: _Hidden, normalize: bool
) -> tuple[Tensor, Tensor]:
    (N, D), K = x.shape, len(y)
    xhat, yhat = prepare(x, normalize)[0], prepare(y, normalize)[0]
    stats, out = temperature.new_empty(4, N), temperature.new_empty(N, D)
    one = temperature.new_ones(())
    scale = _stretch(x, one)
    for rows, s in _similarities(xhat, yhat, N):
        _set_rows(stats, s, rows.start, K, temperature, hidden)
        row = weights(one.expand(len(s)), stats[:, rows], scale)
        P = _operand(s, xhat, rows.start, K, temperature, hidden, row)
        out[rows] = product(P, yhat)[:, :D]
    if scale is not None:
        out /= scale
    return stats, out


# ---- SupCon


def sup_con_fwd(z: Tensor, labels: Tensor | None, ids: Tensor | None, temperature: Tensor, normalize: bool) -> Tensor:
    """Stats (6, M) of the rows: those of InfoNCE without the row itself and rows of its id, and over rows of its label
    the sum of s, and their count.

    z (M, D) fp16, bf16 or fp32; labels or ids (M,) int64, one of them; temperature () fp32.
    """
    M = len(z)
    kinds = ids if labels is None else labels
    hidden = _hidden(M, M, kinds, kinds, 0)
    stats = temperature.new_zeros(6, M)
    with torch.cuda.device_of(z):
        zhat, _ = prepare(z, normalize)
        for rows, s in _similarities(zhat, zhat, M):
            _set_rows(stats, s, rows.start, M, temperature, hidden, positives=labels is not None)
    return stats


def sup_con_bwd(
    grad_lse: Tensor, grad_positives: Tensor | None, z: Tensor, labels: Tensor | None, ids: Tensor | None,
    temperature: Tensor, stats: Tensor, normalize: bool,
) -> Tensor:  # fmt: skip
    """dz (M, D), fp32, from the gradients (M,) of lse and of the positives' sums, and the forward's stats."""
    M = len(z)
    kinds = ids if labels is None else labels
    hidden = _hidden(M, M, kinds, kinds, 0)
    with torch.cuda.device_of(z):
        zhat, norm = prepare(z, normalize)
        largest = grad_lse.abs().amax()
        positive = None
        if labels is not None:
            # finish() divides all of W by the temperature.
            positive = torch.zeros_like(grad_lse) if grad_positives is None else grad_positives * temperature
            largest = largest + positive.abs().amax()
        scale = _stretch(z, 2 * largest)
        if scale is not None and positive is not None:
            positive = positive * scale
        column = weights(grad_lse, stats, scale)
        dzhat = temperature.new_empty(zhat.shape)
        for rows, s in _similarities(zhat, zhat, M):
            row = column[0][rows], column[1][rows]
            w = _operand(s, zhat, rows.start, M, temperature, hidden, row, column, positive)
            dzhat[rows] = product(w, zhat)
        return finish(dzhat, z, norm, scale, temperature, normalize)
