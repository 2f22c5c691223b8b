"""The parts of NT-Xent that work row by row, around the products of kernels/nt_xent.py and on stored rows of S.

Shapes and names are those of kernels/nt_xent.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ssl_fast.kernels._common import EPS, LN2, load_temperature, log1p, rounded, row_blocks
from torch import Tensor

SAFE_TEMPERATURE = tl.constexpr(0.025)


@triton.jit
def _load_pair(z1_ptr, z2_ptr, stride_1n, stride_1d, stride_2n, stride_2d, n, d, mask):
    x1 = tl.load(z1_ptr + n * stride_1n + d * stride_1d, mask, other=0.0).to(tl.float32)
    x2 = tl.load(z2_ptr + n * stride_2n + d * stride_2d, mask, other=0.0).to(tl.float32)
    return x1, x2


@triton.jit(do_not_specialize=["N", "PAIRS"])
def _prepare_kernel(
    z1_ptr, z2_ptr,  # (N, D)
    zhat_ptr, norm_ptr, pos_ptr,  # (MP, DP) operands of the products; (2, N) |x|; (N,) s_ip
    stride_1n, stride_1d, stride_2n, stride_2d, N, PAIRS, D, DP,
    NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    live = n < N
    square1 = tl.zeros((BLOCK_N, 1), tl.float32)
    square2 = tl.zeros((BLOCK_N, 1), tl.float32)
    if NORMALIZE:
        for start in range(0, D, BLOCK_D):
            d = (start + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
            x1, x2 = _load_pair(z1_ptr, z2_ptr, stride_1n, stride_1d, stride_2n, stride_2d, n, d, live & (d < D))
            square1 += tl.sum(x1 * x1, 1, keep_dims=True)
            square2 += tl.sum(x2 * x2, 1, keep_dims=True)
    norm1 = tl.sqrt(square1) if NORMALIZE else square1 + 1
    norm2 = tl.sqrt(square2) if NORMALIZE else square2 + 1
    # F.normalize clamps the norm, and a NaN norm must stay one.
    inverse1 = 1 / tl.where(norm1 < EPS, EPS, norm1)
    inverse2 = 1 / tl.where(norm2 < EPS, EPS, norm2)
    pos = tl.zeros((BLOCK_N, 1), tl.float32)
    # Programs past the last pair zero the padded rows, which follow the 2N real ones.
    row1 = tl.where(live, n, n + N)
    for start in range(0, DP, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
        x1, x2 = _load_pair(z1_ptr, z2_ptr, stride_1n, stride_1d, stride_2n, stride_2d, n, d, live & (d < D))
        z1 = x1 * inverse1
        z2 = x2 * inverse2
        pos += tl.sum(z1 * z2, 1, keep_dims=True)
        out = (n < PAIRS) & (d < DP)
        tl.store(zhat_ptr + row1 * DP + d, rounded(z1, zhat_ptr.dtype.element_ty), out)
        tl.store(zhat_ptr + (n + N) * DP + d, rounded(z2, zhat_ptr.dtype.element_ty), out)
    tl.store(norm_ptr + n, norm1, live)
    tl.store(norm_ptr + N + n, norm2, live)
    tl.store(pos_ptr + n, pos, live)


@triton.jit
def masked(i, j, N):
    """Self, positive, or padding."""
    positive = tl.where(i < N, i + N, i - N)
    return (j == i) | (j == positive) | (tl.maximum(i, j) >= 2 * N)


@triton.jit
def store_losses(loss_ptr, lse_ptr, q_ptr, r_ptr, i, live, top, sum_e, sum_es, pos, t):
    """From the negatives of row i: their maximum in units of log 2, and the sums of e and e s relative to it."""
    gap = LN2 * top + tl.log(sum_e) - pos / t  # log(Zneg / e_ip), -inf without negatives
    small = tl.exp(-tl.abs(gap))
    loss = tl.where(gap > 0, gap, 0.0) + log1p(small)
    loss = tl.where(gap == gap, loss, gap)
    q = tl.where(gap > 0, 1.0, small) / (1 + small)
    tl.store(loss_ptr + i, loss, live)
    tl.store(lse_ptr + i, loss + pos / t, live)
    tl.store(q_ptr + i, q, live)
    tl.store(r_ptr + i, tl.where(sum_e == 0, q, q * (sum_es / sum_e - pos)), live)


@triton.jit(do_not_specialize=["N", "row0", "MP"])
def fwd_rows_kernel(
    s_ptr, pos_ptr, temperature_ptr,  # (rows, MP) fp32 rows of S from row0 on; (N,), ()
    loss_ptr, lse_ptr, q_ptr, r_ptr,  # (2N,)
    N, row0, MP,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = row0 + tl.program_id(0)
    s_ptr += tl.program_id(0).to(tl.int64) * MP
    t = load_temperature(temperature_ptr)
    scale = 1 / (t * LN2)
    top = float("-inf")
    sum_e = 0.0
    sum_es = 0.0
    for start in range(0, 2 * N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        s = tl.load(s_ptr + j, j < 2 * N, other=0.0)
        x = tl.where(masked(i, j, N), float("-inf"), s * scale)
        above = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(above == float("-inf"), 0.0, above)
        e = tl.exp2(x - shift)
        decay = tl.exp2(top - shift)
        sum_e = sum_e * decay + tl.sum(e, 0)
        sum_es = sum_es * decay + tl.sum(e * s, 0)
        top = above
    top = tl.where(top == float("-inf"), 0.0, top)
    store_losses(loss_ptr, lse_ptr, q_ptr, r_ptr, i, i < 2 * N, top, sum_e, sum_es, tl.load(pos_ptr + i % N), t)


@triton.jit(do_not_specialize=["N", "MP", "stride_g", "stride_h"])
def weights_kernel(
    grad_loss_ptr, grad_lse_ptr, lse_ptr, scale_ptr, temperature_ptr,  # (2N,) three times, () twice
    weight_ptr, lse2_ptr,  # (MP,)
    stride_g, stride_h, N, MP,
    FOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a_i = g_i + h_i, scaled; where the loop needs no maximum, a_i / Z_i. lse in units of log 2."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < 2 * N
    weight = tl.load(grad_loss_ptr + i.to(tl.int64) * stride_g, live, other=0.0)
    weight += tl.load(grad_lse_ptr + i.to(tl.int64) * stride_h, live, other=0.0)
    if scale_ptr is not None:
        weight *= tl.load(scale_ptr)
    lse2 = tl.load(lse_ptr + i, live, other=0.0) / LN2
    if FOLD and load_temperature(temperature_ptr) >= SAFE_TEMPERATURE:
        weight *= tl.exp2(-lse2)
    tl.store(weight_ptr + i, weight, i < MP)
    tl.store(lse2_ptr + i, lse2, i < MP)


@triton.jit(do_not_specialize=["N", "row0", "MP"])
def bwd_rows_kernel(
    s_ptr, weight_ptr, lse2_ptr, temperature_ptr,  # (rows, MP) fp32 rows of S from row0 on; (MP,), (MP,), ()
    w_ptr,  # (rows, MP), may be s_ptr
    N, row0, MP,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = row0 + tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * MP + j
    scale = 1 / (load_temperature(temperature_ptr) * LN2)
    x = tl.load(s_ptr + at, j < MP) * scale
    weight_j = tl.load(weight_ptr + j, j < MP)
    lse2_j = tl.load(lse2_ptr + j, j < MP)
    w = tl.exp2(x - tl.load(lse2_ptr + i)) * tl.load(weight_ptr + i) + tl.exp2(x - lse2_j) * weight_j
    w = tl.where(masked(i, j, N), 0.0, w)
    tl.store(w_ptr + at, rounded(w, w_ptr.dtype.element_ty), j < MP)


@triton.jit
def _dzhat(acc_ptr, n, d, MP, DP, splits, c, unscale, z, mask):
    """(1 / t) (sum of the product over its splits + c z_p), for the rows n of acc; z is the positive's row."""
    total = tl.zeros(z.shape, tl.float32)
    for split in range(splits):
        total += tl.load(acc_ptr + (MP.to(tl.int64) * split + n) * DP + d, mask, other=0.0)
    return total * unscale + c * z


@triton.jit(do_not_specialize=["N", "MP", "splits", "stride_g", "stride_h"])
def bwd_finish_kernel(
    acc_ptr, z1_ptr, z2_ptr, norm_ptr,  # (splits, MP, DP), (N, D), (N, D), (2, N)
    grad_loss_ptr, grad_lse_ptr, q_ptr, scale_ptr, temperature_ptr,  # (2N,) three times, () twice
    dz1_ptr, dz2_ptr,  # (N, D)
    stride_1n, stride_1d, stride_2n, stride_2d, stride_g, stride_h, N, MP, D, DP, splits,
    NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the positives, projects on the tangent of the unit sphere, and divides by |x|."""
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    live = n < N
    t = load_temperature(temperature_ptr)
    unscale = 1.0
    if scale_ptr is not None:
        unscale = 1 / tl.load(scale_ptr)
    # c is the same for both rows of a pair.
    q1 = tl.load(q_ptr + n, live, other=0.0)
    q2 = tl.load(q_ptr + n + N, live, other=0.0)
    c = tl.load(grad_lse_ptr + n * stride_h, live, other=0.0) * (1 - q1)
    c += tl.load(grad_lse_ptr + (n + N) * stride_h, live, other=0.0) * (1 - q2)
    c -= tl.load(grad_loss_ptr + n * stride_g, live, other=0.0) * q1
    c -= tl.load(grad_loss_ptr + (n + N) * stride_g, live, other=0.0) * q2
    norm1 = tl.load(norm_ptr + n, live, other=1.0)
    norm2 = tl.load(norm_ptr + N + n, live, other=1.0)
    inverse1 = 1 / tl.where(norm1 < EPS, EPS, norm1)
    inverse2 = 1 / tl.where(norm2 < EPS, EPS, norm2)
    radial1 = tl.zeros((BLOCK_N, 1), tl.float32)
    radial2 = tl.zeros((BLOCK_N, 1), tl.float32)
    if NORMALIZE:
        for start in range(0, D, BLOCK_D):
            d = (start + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
            mask = live & (d < D)
            x1, x2 = _load_pair(z1_ptr, z2_ptr, stride_1n, stride_1d, stride_2n, stride_2d, n, d, mask)
            z1 = x1 * inverse1
            z2 = x2 * inverse2
            radial1 += tl.sum(_dzhat(acc_ptr, n, d, MP, DP, splits, c, unscale, z2, mask) * z1, 1, keep_dims=True)
            radial2 += tl.sum(_dzhat(acc_ptr, n + N, d, MP, DP, splits, c, unscale, z1, mask) * z2, 1, keep_dims=True)
        # F.normalize divides by a constant below EPS: no projection there.
        radial1 = tl.where(norm1 < EPS, 0.0, radial1)
        radial2 = tl.where(norm2 < EPS, 0.0, radial2)
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
        mask = live & (d < D)
        x1, x2 = _load_pair(z1_ptr, z2_ptr, stride_1n, stride_1d, stride_2n, stride_2d, n, d, mask)
        z1 = x1 * inverse1
        z2 = x2 * inverse2
        dz1 = (_dzhat(acc_ptr, n, d, MP, DP, splits, c, unscale, z2, mask) - radial1 * z1) * (inverse1 / t)
        dz2 = (_dzhat(acc_ptr, n + N, d, MP, DP, splits, c, unscale, z1, mask) - radial2 * z2) * (inverse2 / t)
        tl.store(dz1_ptr + n * D + d, rounded(dz1, dz1_ptr.dtype.element_ty), mask)
        tl.store(dz2_ptr + n * D + d, rounded(dz2, dz2_ptr.dtype.element_ty), mask)


def prepare(z1: Tensor, z2: Tensor, normalize: bool, tile: int, DP: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operands (MP, DP) in z's dtype, MP a multiple of tile; norms (2, N); s_ip (N,)."""
    N, D = z1.shape
    MP = triton.cdiv(2 * N, tile) * tile
    zhat = z1.new_empty(MP, DP)
    norm = z1.new_empty(2, N, dtype=torch.float32)
    pos = z1.new_empty(N, dtype=torch.float32)
    pairs = MP - N  # and as many more as there are padded rows
    blocks = row_blocks(DP)
    _prepare_kernel[(triton.cdiv(pairs, blocks["BLOCK_N"]),)](
        z1, z2, zhat, norm, pos, *z1.stride(), *z2.stride(), N, pairs, D, DP, NORMALIZE=normalize, **blocks
    )
    return zhat, norm, pos
