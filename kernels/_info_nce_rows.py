"""The parts of InfoNCE and SupCon that work row by row, around the products of kernels/info_nce.py and on stored rows
of S.

Shapes and names are those of kernels/info_nce.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ssl_fast.kernels._common import EPS, LN2, load_temperature, rounded, row_blocks
from torch import Tensor


@triton.jit(do_not_specialize=["N", "NP"])
def _prepare_kernel(
    x_ptr,  # (N, D)
    xhat_ptr, norm_ptr,  # (NP, DP), (N,)
    stride_n, stride_d, N, NP, D, DP,
    NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    live = n < N
    square = tl.zeros((BLOCK_N, 1), tl.float32)
    if NORMALIZE:
        for start in range(0, D, BLOCK_D):
            d = (start + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
            x = tl.load(x_ptr + n * stride_n + d * stride_d, live & (d < D), other=0.0).to(tl.float32)
            square += tl.sum(x * x, 1, keep_dims=True)
    norm = tl.sqrt(square) if NORMALIZE else square + 1
    inverse = inverse_norm(norm)
    for start in range(0, DP, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
        x = tl.load(x_ptr + n * stride_n + d * stride_d, live & (d < D), other=0.0).to(tl.float32)
        tl.store(xhat_ptr + n * DP + d, rounded(x * inverse, xhat_ptr.dtype.element_ty), (n < NP) & (d < DP))
    tl.store(norm_ptr + n, norm, live)


@triton.jit
def inverse_norm(norm):
    """F.normalize clamps the norm, and a NaN norm must stay one."""
    return 1 / tl.where(norm < EPS, EPS, norm)


@triton.jit
def left_out(i, j, K, diagonal, x_id, y_id):
    """Whether row i may not see column j, or j is padding; diagonal and the ids may be None."""
    out = j >= K
    if diagonal is not None:
        out |= j == i + diagonal
    if x_id is not None:
        out |= x_id == y_id
    return out


@triton.jit
def online(s, out, top, sum_e, sum_es, scale, axis: tl.constexpr):
    """Merge a tile of S, but for what is left out, into the largest s of each line along the axis and the sums of
    e = exp((s - top) / t) and e s."""
    x = tl.where(out, float("-inf"), s)
    above = tl.maximum(top, tl.max(x, axis))
    shift = finite(above)
    e = tl.exp2((x - tl.expand_dims(shift, axis)) * scale)
    decay = tl.exp2((top - shift) * scale)
    return above, sum_e * decay + tl.sum(e, axis), sum_es * decay + tl.sum(e * s, axis)


@triton.jit
def finite(top):
    """A shift for a maximum of nothing so far: -inf - -inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def store_stats(stats_ptr, i, N, live, top, sum_e, sum_es, t):
    """lse, shift, log_sum and mean into stats (4, N)."""
    stats_ptr += i
    plane = N.to(tl.int64)
    log_sum = tl.log(sum_e)
    tl.store(stats_ptr, finite(top) / t + log_sum, live)
    tl.store(stats_ptr + plane, top, live)
    tl.store(stats_ptr + 2 * plane, log_sum, live)
    tl.store(stats_ptr + 3 * plane, tl.where(sum_e == 0, 0.0, sum_es / sum_e), live)


@triton.jit(do_not_specialize=["diagonal", "row0", "N", "K"])
def fwd_rows_kernel(
    s_ptr, temperature_ptr,  # (rows, KP) fp32 rows of S from row0 on; ()
    x_ids_ptr, y_ids_ptr, diagonal,  # (N,), (K,), an integer; or None
    stats_ptr,  # (4, N); (6, N) with POSITIVES
    row0, N, K, KP,
    POSITIVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stats of rows. With POSITIVES columns of the row's id are not left out, but summed and counted."""
    i = row0 + tl.program_id(0)
    s_ptr += tl.program_id(0).to(tl.int64) * KP
    t = load_temperature(temperature_ptr)
    scale = 1 / (t * LN2)
    top = tl.full((1,), float("-inf"), tl.float32)
    sum_e = tl.zeros((1,), tl.float32)
    sum_es = tl.zeros((1,), tl.float32)
    positives = 0.0
    count = 0
    x_id = None
    if x_ids_ptr is not None:
        x_id = tl.load(x_ids_ptr + i)
    for start in range(0, K, BLOCK):
        j = (start + tl.arange(0, BLOCK))[None, :]
        s = tl.load(s_ptr + j, j < K, other=0.0)
        y_id = None
        if y_ids_ptr is not None:
            y_id = tl.load(y_ids_ptr + j, j < K, other=0)
        if POSITIVES:
            out = left_out(i, j, K, diagonal, None, None)
            alike = (x_id == y_id) & ~out
            positives += tl.sum(tl.where(alike, s, 0.0))
            count += tl.sum(alike.to(tl.int32))
        else:
            out = left_out(i, j, K, diagonal, x_id, y_id)
        top, sum_e, sum_es = online(s, out, top, sum_e, sum_es, scale, 1)
    store_stats(stats_ptr, i + tl.arange(0, 1), N, True, top, sum_e, sum_es, t)
    if POSITIVES:
        tl.store(stats_ptr + 4 * N.to(tl.int64) + i, positives)
        tl.store(stats_ptr + 5 * N.to(tl.int64) + i, count.to(tl.float32))


@triton.jit(do_not_specialize=["diagonal", "row0", "rows", "K", "L"])
def fwd_columns_kernel(
    s_ptr, temperature_ptr,  # (rows, KP) fp32 rows of S from row0 on; ()
    x_ids_ptr, y_ids_ptr, diagonal,  # (N,), (K,), an integer; or None
    part_ptr,  # (splits, 3, K): top, sum of e, sum of e s
    row0, rows, K, KP, L,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (block, split) adds the split-th L of the rows to its own partial stats of BLOCK_N columns, so that
    nothing but the order of the chunks orders the sums."""
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * L
    scale = 1 / (load_temperature(temperature_ptr) * LN2)
    plane = K.to(tl.int64)
    part_ptr += tl.program_id(1) * 3 * plane + j
    top = tl.load(part_ptr, j < K, other=0.0)
    sum_e = tl.load(part_ptr + plane, j < K, other=0.0)
    sum_es = tl.load(part_ptr + 2 * plane, j < K, other=0.0)
    y_id = None
    if y_ids_ptr is not None:
        y_id = tl.load(y_ids_ptr + j, j < K, other=0)[None, :]
    for start in range(first, tl.minimum(first + L, rows), BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M))[:, None]
        inside = (row < rows) & (j < K)[None, :]
        s = tl.load(s_ptr + row.to(tl.int64) * KP + j[None, :], inside, other=0.0)
        x_id = None
        if x_ids_ptr is not None:
            x_id = tl.load(x_ids_ptr + row0 + row, row < rows, other=0)
        out = left_out(row0 + row, j[None, :], K, diagonal, x_id, y_id) | (row >= rows)
        top, sum_e, sum_es = online(s, out, top, sum_e, sum_es, scale, 0)
    tl.store(part_ptr, top, j < K)
    tl.store(part_ptr + plane, sum_e, j < K)
    tl.store(part_ptr + 2 * plane, sum_es, j < K)


@triton.jit(do_not_specialize=["N", "splits"])
def merge_kernel(
    part_ptr, part_out_ptr, temperature_ptr,  # (splits, 3, N); (splits, N, D) or None; ()
    stats_ptr, out_ptr,  # (4, N); (N, D) or None
    N, splits,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stats, and softmax(S) y, from their parts. Many splits are loaded at a time: one by one each would wait."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, None, :]
    t = load_temperature(temperature_ptr)
    scale = 1 / (t * LN2)
    plane = N.to(tl.int64)
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    sum_e = tl.zeros((BLOCK_N,), tl.float32)
    sum_es = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = (start + tl.arange(0, BLOCK_S))[:, None]
        held = (split < splits) & (n < N)[None, :]
        at = part_ptr + split * 3 * plane + n[None, :]
        part_top = tl.load(at, held, other=float("-inf"))
        above = tl.maximum(top, tl.max(part_top, 0))
        shift = finite(above)
        weight = tl.where(held, tl.exp2((part_top - shift[None, :]) * scale), 0.0)
        decay = tl.exp2((top - shift) * scale)
        sum_e = sum_e * decay + tl.sum(weight * tl.load(at + plane, held, other=0.0), 0)
        sum_es = sum_es * decay + tl.sum(weight * tl.load(at + 2 * plane, held, other=0.0), 0)
        if out_ptr is not None:
            at = part_out_ptr + (split * plane + n[None, :])[:, :, None] * D + d
            part = tl.load(at, held[:, :, None] & (d < D), other=0.0)
            acc = acc * decay[:, None] + tl.sum(weight[:, :, None] * part, 0)
        top = above
    store_stats(stats_ptr, n, N, n < N, top, sum_e, sum_es, t)
    if out_ptr is not None:
        d = tl.arange(0, BLOCK_D)[None, :]
        out = tl.where(sum_e == 0, 0.0, 1 / sum_e)[:, None] * acc
        tl.store(out_ptr + n[:, None] * D + d, out, (n < N)[:, None] & (d < D))


@triton.jit(do_not_specialize=["stride_g", "stride_s", "N"])
def _weights_kernel(
    grad_ptr, stats_ptr, scale_ptr,  # (N,), (4, N), () or None
    weight_ptr, shift_ptr,  # (N,)
    stride_g, stride_s, N,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """g P = weight exp((s - shift) / t): log_sum is at least 0, so that its exp belongs into the weight."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    plane = tl.cast(stride_s, tl.int64)
    shift = tl.load(stats_ptr + plane + i, live)
    log_sum = tl.load(stats_ptr + 2 * plane + i, live)
    weight = tl.load(grad_ptr + i * stride_g, live) * tl.exp(-log_sum)
    if scale_ptr is not None:
        weight *= tl.load(scale_ptr)
    tl.store(weight_ptr + i, tl.where(log_sum == float("-inf"), 0.0, weight), live)  # it sees nothing
    tl.store(shift_ptr + i, finite(shift), live)


@triton.jit(do_not_specialize=["diagonal", "row0", "K"])
def bwd_rows_kernel(
    s_ptr, temperature_ptr,  # (rows, KP) fp32 rows of S from row0 on; ()
    x_ids_ptr, y_ids_ptr, diagonal,  # (N,), (K,), an integer; or None
    weight_ptr, shift_ptr,  # (rows,)
    column_weight_ptr, column_shift_ptr, positive_ptr,  # (K,), or None
    w_ptr,  # (rows, KP), may be s_ptr
    row0, K, KP,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """W_ij = g_i P_ij + h_j Q_ij, where Q is the softmax over the rows of a column. With positives columns of the
    row's id are not left out, but get p_i + p_j before W is rounded: where they cancel, what is left keeps its bits."""
    i = row0 + tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * KP + j
    scale = 1 / (load_temperature(temperature_ptr) * LN2)
    s = tl.load(s_ptr + at, j < KP, other=0.0)
    row_shift = tl.load(shift_ptr + tl.program_id(0))
    w = tl.load(weight_ptr + tl.program_id(0)) * tl.exp2((s - row_shift) * scale)
    if column_weight_ptr is not None:
        shift = tl.load(column_shift_ptr + j, j < K, other=0.0)
        w += tl.load(column_weight_ptr + j, j < K, other=0.0) * tl.exp2((s - shift) * scale)
    x_id = None
    y_id = None
    if x_ids_ptr is not None:
        x_id = tl.load(x_ids_ptr + i)
        y_id = tl.load(y_ids_ptr + j, j < K, other=0)
    if positive_ptr is not None:
        both = tl.load(positive_ptr + i) + tl.load(positive_ptr + j, j < K, other=0.0)
        w += tl.where(x_id == y_id, both, 0.0)
        out = left_out(i, j, K, diagonal, None, None)
    else:
        out = left_out(i, j, K, diagonal, x_id, y_id)
    tl.store(w_ptr + at, rounded(tl.where(out, 0.0, w), w_ptr.dtype.element_ty), j < KP)


@triton.jit(do_not_specialize=["N"])
def _finish_kernel(
    acc_ptr, x_ptr, norm_ptr, scale_ptr, temperature_ptr,  # (NP, DP), (N, D), (N,), () or None, ()
    dx_ptr,  # (N, D)
    stride_n, stride_d, N, D, DP,
    NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Divides by t, projects on the tangent of the unit sphere, and divides by |x|."""
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    live = n < N
    factor = 1 / load_temperature(temperature_ptr)
    if scale_ptr is not None:
        factor /= tl.load(scale_ptr)
    norm = tl.load(norm_ptr + n, live, other=1.0)
    inverse = inverse_norm(norm)
    radial = tl.zeros((BLOCK_N, 1), tl.float32)
    if NORMALIZE:
        for start in range(0, D, BLOCK_D):
            d = (start + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
            mask = live & (d < D)
            x = tl.load(x_ptr + n * stride_n + d * stride_d, mask, other=0.0).to(tl.float32)
            radial += tl.sum(tl.load(acc_ptr + n * DP + d, mask, other=0.0) * (x * inverse), 1, keep_dims=True)
        radial = tl.where(norm < EPS, 0.0, radial)  # there F.normalize divides by a constant
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
        mask = live & (d < D)
        dx = tl.load(acc_ptr + n * DP + d, mask, other=0.0)
        if NORMALIZE:
            x = tl.load(x_ptr + n * stride_n + d * stride_d, mask, other=0.0).to(tl.float32)
            dx = (dx - radial * (x * inverse)) * inverse
        tl.store(dx_ptr + n * D + d, dx * factor, mask)


def prepare(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """The operand (NP, DP) in x's dtype, padded with zeros to what cuBLAS's fast paths want; norms (N,)."""
    N, D = x.shape
    NP, DP = (triton.cdiv(size, 16) * 16 for size in (N, D))
    xhat = x.new_empty(NP, DP)
    norm = x.new_empty(N, dtype=torch.float32)
    blocks = row_blocks(DP)
    _prepare_kernel[(triton.cdiv(NP, blocks["BLOCK_N"]),)](
        x, xhat, norm, *x.stride(), N, NP, D, DP, NORMALIZE=normalize, **blocks
    )
    return xhat, norm


def weights(grad: Tensor, stats: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights and shifts (N,) of bwd_rows_kernel from grad (N,) and stats (4, N) or more, of rows or of columns."""
    N = len(grad)
    weight, shift = stats.new_empty(2, N).unbind()
    _weights_kernel[(triton.cdiv(N, 1024),)](
        grad, stats, scale, weight, shift, grad.stride(0), stats.stride(0), N, BLOCK=1024
    )
    return weight, shift


def finish(acc: Tensor, x: Tensor, norm: Tensor, scale: Tensor | None, temperature: Tensor, normalize: bool) -> Tensor:
    """The gradient (N, D) for x, fp32, from that for xhat times t and scale, (NP, DP)."""
    N, D = x.shape
    dx = acc.new_empty(N, D)
    blocks = row_blocks(D)
    _finish_kernel[(triton.cdiv(N, blocks["BLOCK_N"]),)](
        acc, x, norm, scale, temperature, dx, *x.stride(), N, D, acc.shape[1], NORMALIZE=normalize, **blocks
    )
    return dx
