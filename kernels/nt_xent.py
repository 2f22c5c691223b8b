"""NT-Xent in Triton: forward on the upper triangle of S = z z^T, row-owner backward, chunked products for wide rows.

Shapes: M = 2N rows, the two views stacked; MP is M padded to whole tiles with zero rows, DP is D padded with zero
columns, so that no load of an inner loop needs a mask. s_ij = z_i . z_j; the positive of row i is p = (i + N) mod M.
The entries (i, i) and (i, p) are masked in every product: the positive's part is added in fp32 from the unrounded rows.

Rows that the kernels normalise have |s| <= 1, so exp(s / t) neither over- nor underflows for t >= SAFE_TEMPERATURE and
needs no maximum. The temperature is on the device, and so is the choice between the two loops.
docs/kernels.md derives the formulas.
"""

from __future__ import annotations

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
    row_blocks,
    split_count,
)
from ssl_fast.kernels._nt_xent_rows import (
    SAFE_TEMPERATURE,
    bwd_finish_kernel,
    bwd_rows_kernel,
    fwd_rows_kernel,
    masked,
    prepare,
    store_losses,
    weights_kernel,
)
from torch import Tensor

# (arch, bytes of an operand, DP up to): Config. Not yet measured on a GPU; chosen to compile without spills.
FWD_CONFIGS = {
    (80, 2, 64): Config(64, 64, 4, 3, 2),
    (80, 2, 128): Config(64, 64, 4, 3, 2),
    (80, 2, 256): Config(64, 64, 4, 2, 1, 240),
    (80, 4, 64): Config(64, 64, 4, 2, 2),
    (80, 4, 128): Config(64, 64, 4, 2, 1, 240),
    (80, 4, 256): Config(32, 32, 4, 2, 1),
    (90, 2, 64): Config(128, 64, 8, 3, 1),
    (90, 2, 128): Config(128, 64, 8, 3, 1),
    (90, 2, 256): Config(128, 64, 8, 2, 1),
    (90, 4, 64): Config(64, 64, 4, 2, 2),
    (90, 4, 128): Config(64, 64, 4, 2, 2),
    (90, 4, 256): Config(64, 64, 4, 2, 1),
    (100, 2, 64): Config(64, 64, 4, 3, 2),
    (100, 2, 128): Config(64, 64, 4, 3, 2),
    (100, 2, 256): Config(128, 64, 8, 2, 1),
    (100, 4, 64): Config(64, 64, 4, 2, 2),
    (100, 4, 128): Config(64, 64, 4, 2, 2),
    (100, 4, 256): Config(64, 64, 4, 2, 1),
}
BWD_CONFIGS = {
    (80, 2, 64): Config(64, 64, 4, 3, 2),
    (80, 2, 128): Config(64, 64, 4, 2, 2),
    (80, 2, 256): Config(64, 32, 4, 2, 1),
    (80, 4, 64): Config(64, 32, 4, 2, 2),
    (80, 4, 128): Config(64, 32, 4, 2, 1),
    (80, 4, 256): Config(32, 32, 4, 2, 1),
    (90, 2, 64): Config(64, 64, 4, 3, 3, 168),
    (90, 2, 128): Config(64, 64, 4, 3, 3, 168),
    (90, 2, 256): Config(128, 64, 8, 2, 1),
    (90, 4, 64): Config(64, 64, 4, 2, 2),
    (90, 4, 128): Config(64, 64, 4, 2, 2),
    (90, 4, 256): Config(32, 32, 4, 2, 1),
    (100, 2, 64): Config(64, 64, 4, 3, 2),
    (100, 2, 128): Config(64, 64, 4, 3, 2),
    (100, 2, 256): Config(128, 64, 8, 2, 1),
    (100, 4, 64): Config(64, 64, 4, 2, 2),
    (100, 4, 128): Config(64, 32, 4, 2, 2),
    (100, 4, 256): Config(64, 32, 4, 2, 1),
}
CANDIDATES = tuple(
    Config(m, n, warps, stages, programs, cap)
    for m, n, warps in ((64, 64, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (256, 64, 8))
    for stages in (2, 3, 4)
    for programs, cap in ((1, None), (2, None), (2, 128), (3, 168))
)


@triton.jit
def _skip(offset, N, other, padded, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """-inf where a tile whose columns start `offset` after its rows holds an entry to mask, else 0: added to the
    exponent it leaves such a tile out. The positives lie N and `other` columns after their rows.

    They are few, and get a loop of their own: the mask in the main loop, even behind a branch, costs it registers.
    """
    low = offset - BLOCK_I
    high = offset + BLOCK_J
    special = (low < 0) & (high > 0) | (low < N) & (high > N) | (low < other) & (high > other)
    return tl.where(special | padded, float("-inf"), 0.0)


@triton.jit
def _special(part, done, last, i0, N, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """What _skip left out, from tile `done` on, in four ascending parts: positives i - N, self, i + N, padding."""
    start = i0 + (part - 1) * N
    low = tl.minimum(tl.maximum(start, 0), 2 * N) // BLOCK_J
    return tl.maximum(done, low), tl.minimum(last, tl.cdiv(start + BLOCK_I, BLOCK_J))


@triton.jit
def _load_tile(z_ptr, row0, DP: tl.constexpr, BLOCK: tl.constexpr):
    z_ptr += tl.cast(row0, tl.int64) * DP  # 64 bits for the base alone: offsets inside a tile cost half the registers
    return tl.load(z_ptr + (tl.arange(0, BLOCK)[:, None] * DP + tl.arange(0, DP)[None, :]))


@triton.jit
def _load_columns(z_ptr, row0, DP: tl.constexpr, BLOCK: tl.constexpr):
    z_ptr += tl.cast(row0, tl.int64) * DP
    return tl.load(z_ptr + (tl.arange(0, BLOCK)[None, :] * DP + tl.arange(0, DP)[:, None]))


@triton.jit
def _sum_register_rows(x, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """(BLOCK_N, BLOCK_M) -> (BLOCK_N / 16, 8, BLOCK_M): adds rows n and n + 8.

    One thread holds both in the accumulator layout of the tensor cores, so the sum needs no shuffle.
    """
    return tl.sum(tl.reshape(x, (BLOCK_N // 16, 2, 8, BLOCK_M)), 1)


@triton.jit
def _triangle_tile(
    zhat_ptr, z_i, slot_ptr, row_e, row_es, scale, i0, tile, WIDTH, MP, N,
    MASK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    j0 = i0 + tile * BLOCK_N
    j0 = tl.where(j0 >= MP, j0 - MP, j0)
    j = j0 + tl.arange(0, BLOCK_N)
    # The diagonal block holds both (i, j) and (j, i): its columns are counted as rows.
    owned = tl.full((BLOCK_N,), 0, tl.int32) + tile >= BLOCK_M // BLOCK_N
    at = slot_ptr + tile * BLOCK_N + tl.arange(0, BLOCK_N)
    col_e = tl.load(at, owned, other=0.0)
    col_es = tl.load(at + WIDTH, owned, other=0.0)
    z_j = _load_tile(zhat_ptr, j0, DP, BLOCK_N)
    s = dot(z_j, z_i, None, PRECISION)  # (BLOCK_N, BLOCK_M), transposed
    if MASK:
        i = i0 + tl.arange(0, BLOCK_M)
        e = tl.where(masked(j[:, None], i[None, :], N), 0.0, tl.exp2(s * scale))
    else:
        skip = _skip(tile * BLOCK_N, N, MP - N, j >= 2 * N, BLOCK_M, BLOCK_N)
        e = tl.exp2(s * scale + skip[:, None])
    es = e * s
    tl.store(at, col_e + tl.sum(e, 1), owned)
    tl.store(at + WIDTH, col_es + tl.sum(es, 1), owned)
    row_e += _sum_register_rows(e, BLOCK_N, BLOCK_M)
    row_es += _sum_register_rows(es, BLOCK_N, BLOCK_M)
    return row_e, row_es


@triton.jit
def _fwd_triangle(
    zhat_ptr, row_ptr, col_ptr, scale, group, split, N, MP, R, S, L, WIDTH,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Sums of e = exp(s / t) and of e s: one tile serves its rows and, by symmetry, its columns.

    Row block I meets the column blocks I, I + 1, ... I + T/2 (mod T): every pair of blocks once, every row block the
    same work. The row sums stay elementwise in registers until the loop ends; the column sums are reduced along the
    cheap axis of the transposed tile, and added to a slot that belongs to this program alone.
    """
    T = MP // BLOCK_M
    first = split * L * (BLOCK_M // BLOCK_N)
    for block in tl.range(group * R, tl.minimum(group * R + R, T), disable_licm=True):
        i0 = block * BLOCK_M
        # Column 0 of the slot is the first one that the first row block meets in this split.
        slot_ptr = col_ptr + tl.program_id(0).to(tl.int64) * 2 * WIDTH + (block - group * R - split * L) * BLOCK_M
        # Loaded transposed: a transposition of the loaded tile would be redone in shared memory at every step.
        z_i = _load_columns(zhat_ptr, i0, DP, BLOCK_M)  # (DP, BLOCK_M)
        row_e = tl.zeros((BLOCK_N // 16, 8, BLOCK_M), tl.float32)
        row_es = tl.zeros((BLOCK_N // 16, 8, BLOCK_M), tl.float32)
        # With an even T the blocks I and I + T/2 would meet twice: the lower one takes the pair.
        meets = T // 2 + 1 - ((T % 2 == 0) & (block >= T // 2)).to(tl.int32)
        last = tl.minimum(split * L + L, meets) * (BLOCK_M // BLOCK_N)
        padded = i0 + BLOCK_M > 2 * N
        for tile in range(first, tl.where(padded, first, last)):
            row_e, row_es = _triangle_tile(
                zhat_ptr, z_i, slot_ptr, row_e, row_es, scale, i0, tile, WIDTH, MP, N,
                False, PRECISION, BLOCK_M, BLOCK_N, DP,
            )  # fmt: skip
        done = first
        for part in tl.range(3, disable_licm=True):  # self, and the positives, N columns further or N behind (mod MP)
            start = tl.where(part == 2, MP - N, part * N)
            low = tl.maximum(done, start // BLOCK_N)
            high = tl.where(padded, last, tl.minimum(last, tl.cdiv(start + BLOCK_M, BLOCK_N)))
            for tile in range(low, high):
                row_e, row_es = _triangle_tile(
                    zhat_ptr, z_i, slot_ptr, row_e, row_es, scale, i0, tile, WIDTH, MP, N,
                    True, PRECISION, BLOCK_M, BLOCK_N, DP,
                )  # fmt: skip
            done = tl.maximum(done, high)
        # The next row block reads column sums that other threads of this program wrote.
        tl.debug_barrier()
        at = split.to(tl.int64) * MP + i0 + tl.arange(0, BLOCK_M)
        tl.store(row_ptr + S.to(tl.int64) * MP + at, tl.sum(tl.sum(row_e, 0), 0))
        tl.store(row_ptr + 2 * S.to(tl.int64) * MP + at, tl.sum(tl.sum(row_es, 0), 0))


@triton.jit
def _online_tile(
    zhat_ptr, z_i, top, row_e, row_es, scale, i0, j0, N,
    MASK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    s = dot(z_i, _load_tile(zhat_ptr, j0, DP, BLOCK_N).T, None, PRECISION)  # (BLOCK_M, BLOCK_N)
    if MASK:
        i = i0 + tl.arange(0, BLOCK_M)
        j = j0 + tl.arange(0, BLOCK_N)
        x = tl.where(masked(i[:, None], j[None, :], N), float("-inf"), s * scale)
    else:
        x = s * scale + _skip(j0 - i0, N, -N, j0 + BLOCK_N > 2 * N, BLOCK_M, BLOCK_N)
    above = tl.maximum(top, tl.max(x, 1))
    shift = tl.where(above == float("-inf"), 0.0, above)  # no negative so far: -inf - -inf would be NaN
    e = tl.exp2(x - shift[:, None])
    decay = tl.exp2(top - shift)
    return above, row_e * decay + tl.sum(e, 1), row_es * decay + tl.sum(e * s, 1)


@triton.jit
def _fwd_online(
    zhat_ptr, row_ptr, scale, group, split, N, MP, R, S,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Per row: the maximum of s / t in units of log 2, and the sums of e and e s relative to it, over all columns."""
    tiles = tl.cdiv(MP // BLOCK_N, S)
    first = split * tiles
    last = tl.minimum(first + tiles, MP // BLOCK_N)
    for block in range(group * R, tl.minimum(group * R + R, MP // BLOCK_M)):
        i0 = block * BLOCK_M
        z_i = _load_tile(zhat_ptr, i0, DP, BLOCK_M)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_e = tl.zeros((BLOCK_M,), tl.float32)
        row_es = tl.zeros((BLOCK_M,), tl.float32)
        for tile in range(first, last):
            top, row_e, row_es = _online_tile(
                zhat_ptr, z_i, top, row_e, row_es, scale, i0, tile * BLOCK_N, N, False, PRECISION, BLOCK_M, BLOCK_N, DP
            )
        done = first
        for part in tl.range(4, disable_licm=True):
            low, high = _special(part, done, last, i0, N, BLOCK_M, BLOCK_N)
            for tile in range(low, high):
                top, row_e, row_es = _online_tile(
                    zhat_ptr, z_i, top, row_e, row_es, scale, i0, tile * BLOCK_N, N,
                    True, PRECISION, BLOCK_M, BLOCK_N, DP,
                )  # fmt: skip
            done = tl.maximum(done, high)
        at = split.to(tl.int64) * MP + i0 + tl.arange(0, BLOCK_M)
        tl.store(row_ptr + at, top)
        tl.store(row_ptr + S.to(tl.int64) * MP + at, row_e)
        tl.store(row_ptr + 2 * S.to(tl.int64) * MP + at, row_es)


@triton.jit(do_not_specialize=["N", "MP", "R", "S", "L", "WIDTH"])
def _fwd_kernel(
    zhat_ptr, temperature_ptr,  # (MP, DP), ()
    row_ptr, col_ptr,  # (3, S, MP), (programs, 2, WIDTH) zeros
    N, MP, R, S, L, WIDTH,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Program (group, split) owns R row blocks and, of the column blocks that each one meets, the split-th share."""
    group = tl.program_id(0) // S
    split = tl.program_id(0) % S
    t = load_temperature(temperature_ptr)
    scale = 1 / (t * LN2)
    triangle = NORMALIZE and t >= SAFE_TEMPERATURE
    if triangle:
        _fwd_triangle(
            zhat_ptr, row_ptr, col_ptr, scale, group, split, N, MP, R, S, L, WIDTH, PRECISION, BLOCK_M, BLOCK_N, DP
        )
    else:
        _fwd_online(zhat_ptr, row_ptr, scale, group, split, N, MP, R, S, PRECISION, BLOCK_M, BLOCK_N, DP)


@triton.jit(do_not_specialize=["N", "MP", "R", "S", "L", "WIDTH", "SLOTS"])
def _fwd_merge_kernel(
    row_ptr, col_ptr, pos_ptr, temperature_ptr,  # as _fwd_kernel left them; (N,), ()
    loss_ptr, lse_ptr, q_ptr, r_ptr,  # (2N,)
    N, MP, R, S, L, WIDTH, SLOTS,
    NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane = S.to(tl.int64) * MP
    t = load_temperature(temperature_ptr)
    top = tl.zeros((BLOCK,), tl.float32)
    sum_e = tl.zeros((BLOCK,), tl.float32)
    sum_es = tl.zeros((BLOCK,), tl.float32)
    triangle = NORMALIZE and t >= SAFE_TEMPERATURE
    if not triangle:
        top += float("-inf")
        for split in range(S):
            top = tl.maximum(top, tl.load(row_ptr + MP.to(tl.int64) * split + i))
        top = tl.where(top == float("-inf"), 0.0, top)
    for split in range(S):
        at = row_ptr + MP.to(tl.int64) * split + i
        decay = tl.full((BLOCK,), 1.0, tl.float32)
        if not triangle:
            decay = tl.exp2(tl.load(at) - top)
        sum_e += decay * tl.load(at + plane)
        sum_es += decay * tl.load(at + 2 * plane)
    if triangle:
        # Slot (group, split) holds the column blocks from group R + split L on (mod T).
        block = (tl.program_id(0) * BLOCK) // BLOCK_M
        for first in range(0, SLOTS, BLOCK_S):
            slot = first + tl.arange(0, BLOCK_S)
            base = (slot // S) * R + (slot % S) * L
            behind = (block - base) * BLOCK_M % MP  # keeps the sign of the dividend
            behind = tl.where(behind < 0, behind + MP, behind)
            held = (slot < SLOTS) & (behind < WIDTH)
            at = slot.to(tl.int64) * 2 * WIDTH + behind
            at = col_ptr + at[:, None] + (i % BLOCK_M)[None, :]
            sum_e += tl.sum(tl.load(at, held[:, None], other=0.0), 0)
            at += WIDTH
            sum_es += tl.sum(tl.load(at, held[:, None], other=0.0), 0)
    live = i < 2 * N
    pos = tl.load(pos_ptr + i % N, live)
    store_losses(loss_ptr, lse_ptr, q_ptr, r_ptr, i, live, top, sum_e, sum_es, pos, t)


@triton.jit
def _bwd_tile(
    zhat_ptr, weight_ptr, lse2_ptr, acc, z_i, weight_i, lse2_i, scale, i0, j0, N,
    MASK: tl.constexpr, FOLDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    j = j0 + tl.arange(0, BLOCK_N)
    weight_j = tl.load(weight_ptr + j)[None, :]
    z_j = _load_tile(zhat_ptr, j0, DP, BLOCK_N)
    x = dot(z_i, z_j.T, None, PRECISION) * scale  # (BLOCK_M, BLOCK_N)
    if MASK:
        i = i0 + tl.arange(0, BLOCK_M)
        x = tl.where(masked(i[:, None], j[None, :], N), float("-inf"), x)
    else:
        x += _skip(j0 - i0, N, -N, j0 + BLOCK_N > 2 * N, BLOCK_M, BLOCK_N)
    if FOLDED:
        w = tl.exp2(x) * (weight_i + weight_j)
    else:
        lse2_j = tl.load(lse2_ptr + j)[None, :]
        w = tl.exp2(x - lse2_i) * weight_i + tl.exp2(x - lse2_j) * weight_j
    return dot(rounded(w, z_j.dtype), z_j, acc, PRECISION)


@triton.jit
def _bwd_rows(
    zhat_ptr, weight_ptr, lse2_ptr, acc_ptr, scale, i0, first, last, MP, N,
    FOLDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    i = i0 + tl.arange(0, BLOCK_M)
    z_i = _load_tile(zhat_ptr, i0, DP, BLOCK_M)
    weight_i = tl.load(weight_ptr + i)[:, None]
    lse2_i = tl.load(lse2_ptr + i)[:, None]
    acc = tl.zeros((BLOCK_M, DP), tl.float32)
    for tile in range(first, last):
        acc = _bwd_tile(
            zhat_ptr, weight_ptr, lse2_ptr, acc, z_i, weight_i, lse2_i, scale, i0, tile * BLOCK_N, N,
            False, FOLDED, PRECISION, BLOCK_M, BLOCK_N, DP,
        )  # fmt: skip
    done = first
    for part in tl.range(4, disable_licm=True):
        low, high = _special(part, done, last, i0, N, BLOCK_M, BLOCK_N)
        for tile in range(low, high):
            acc = _bwd_tile(
                zhat_ptr, weight_ptr, lse2_ptr, acc, z_i, weight_i, lse2_i, scale, i0, tile * BLOCK_N, N,
                True, FOLDED, PRECISION, BLOCK_M, BLOCK_N, DP,
            )  # fmt: skip
        done = tl.maximum(done, high)
    tl.store(acc_ptr + (tl.arange(0, BLOCK_M)[:, None] * DP + tl.arange(0, DP)[None, :]), acc)


@triton.jit(do_not_specialize=["N", "MP", "L"])
def _bwd_kernel(
    zhat_ptr, weight_ptr, lse2_ptr, temperature_ptr,  # (MP, DP), (MP,), (MP,), ()
    acc_ptr,  # (splits, MP, DP): sum over j not i, p of (a_i P_ij + a_j P_ji) z_j
    N, MP, L,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Program (block, split) owns BLOCK_M rows and the split-th L column tiles. S is symmetric, so that the weights
    of z_j as a column of row i's softmax and as the row whose softmax holds i share one product."""
    i0 = tl.program_id(0) * BLOCK_M
    first = tl.program_id(1) * L
    last = tl.minimum(first + L, MP // BLOCK_N)
    t = load_temperature(temperature_ptr)
    scale = 1 / (t * LN2)
    acc_ptr += (tl.program_id(1).to(tl.int64) * MP + i0) * DP
    folded = NORMALIZE and t >= SAFE_TEMPERATURE
    if folded:
        _bwd_rows(
            zhat_ptr, weight_ptr, lse2_ptr, acc_ptr, scale, i0, first, last, MP, N,
            True, PRECISION, BLOCK_M, BLOCK_N, DP,
        )  # fmt: skip
    else:
        _bwd_rows(
            zhat_ptr, weight_ptr, lse2_ptr, acc_ptr, scale, i0, first, last, MP, N,
            False, PRECISION, BLOCK_M, BLOCK_N, DP,
        )  # fmt: skip


def _fused(z: Tensor) -> bool:
    """Whether the products run inside the kernels. Without tensor cores cuBLAS's fp32 product is the better one."""
    return z.shape[1] <= 256 and (z.dtype != torch.float32 or dot_precision(z.dtype) == "tf32")


def _width(z: Tensor) -> int:
    """D padded to what the kernels' tiles, or cuBLAS's fast paths, want."""
    D = z.shape[1]
    return max(16, triton.next_power_of_2(D)) if _fused(z) else triton.cdiv(D, 16) * 16


def _key(z: Tensor) -> tuple[int, int, int]:
    return arch(z.device), z.element_size(), max(64, triton.next_power_of_2(z.shape[1]))


def nt_xent_fwd(
    z1: Tensor, z2: Tensor, temperature: Tensor, normalize: bool, reduction: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (2N,) or (), and lse, q, r (2N,), fp32; see ops/nt_xent.py.

    z1, z2 (N, D) fp16, bf16 or fp32; temperature () fp32; reduction 0 none, 1 mean, 2 sum.
    """
    run = lambda config: _fwd_fused(z1, z2, temperature, normalize, config)  # noqa: E731
    with torch.cuda.device_of(z1):
        if _fused(z1):
            loss, lse, q, r = run(pick("FWD_CONFIGS", _key(z1), FWD_CONFIGS, CANDIDATES, run))
        else:
            loss, lse, q, r = _fwd_chunked(z1, z2, temperature, normalize)
        return (loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()), lse, q, r


def _fwd_fused(z1: Tensor, z2: Tensor, temperature: Tensor, normalize: bool, config: Config) -> tuple[Tensor, ...]:
    N, BLOCK_M = len(z1), config.BLOCK_M
    zhat, _, pos = prepare(z1, z2, normalize, BLOCK_M, _width(z1))
    T = len(zhat) // BLOCK_M
    sms = multiprocessors(z1.device)
    # A slot of column sums covers half the columns: one group a multiprocessor bounds them, splits fill the rest.
    R = triton.cdiv(T, max(2, sms))
    groups = triton.cdiv(T, R)
    S = split_count(groups, (T // 2 + 1) * R, config.programs * sms)
    L = triton.cdiv(T // 2 + 1, S)
    sizes = N, len(zhat), R, S, L, (L + R - 1) * BLOCK_M
    rows = pos.new_empty(3, S, len(zhat))
    columns = pos.new_zeros(groups * S, 2, sizes[-1] if normalize else 0)
    _fwd_kernel[(groups * S,)](
        zhat, temperature, rows, columns, *sizes,
        NORMALIZE=normalize, PRECISION=dot_precision(z1.dtype),
        BLOCK_M=BLOCK_M, BLOCK_N=config.BLOCK_N, DP=zhat.shape[1],
        **config.options,
    )  # fmt: skip
    out = tuple(pos.new_empty(2 * N) for _ in range(4))  # outputs of an operator may not share storage
    BLOCK = min(64, BLOCK_M)
    _fwd_merge_kernel[(triton.cdiv(2 * N, BLOCK),)](
        rows, columns, pos, temperature, *out, *sizes, groups * S,
        NORMALIZE=normalize, BLOCK_M=BLOCK_M, BLOCK=BLOCK, BLOCK_S=32,
    )  # fmt: skip
    return out


def _fwd_chunked(z1: Tensor, z2: Tensor, temperature: Tensor, normalize: bool) -> tuple[Tensor, ...]:
    N = len(z1)
    zhat, _, pos = prepare(z1, z2, normalize, 16, _width(z1))
    out = tuple(pos.new_empty(2 * N) for _ in range(4))
    for rows in chunks(len(zhat), len(zhat)):
        s = product(zhat[rows], zhat.T)
        fwd_rows_kernel[(len(s),)](s, pos, temperature, *out, N, rows.start, s.shape[1], BLOCK=2048)
    return out


def nt_xent_bwd(
    grad_loss: Tensor, grad_lse: Tensor, z1: Tensor, z2: Tensor, temperature: Tensor, lse: Tensor, q: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dz1, dz2 (N, D) in z's dtype from the gradients (2N,) of loss and lse and the forward's lse and q."""
    args = grad_loss, grad_lse, z1, z2, temperature, lse.contiguous(), q.contiguous(), normalize
    run = lambda config: _bwd(*args, config)  # noqa: E731
    with torch.cuda.device_of(z1):
        return run(pick("BWD_CONFIGS", _key(z1), BWD_CONFIGS, CANDIDATES, run) if _fused(z1) else None)


def _bwd(
    grad_loss: Tensor, grad_lse: Tensor, z1: Tensor, z2: Tensor, temperature: Tensor, lse: Tensor, q: Tensor,
    normalize: bool, config: Config | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    N, D = z1.shape
    zhat, norm, _ = prepare(z1, z2, normalize, config.BLOCK_M if config else 16, _width(z1))
    MP, DP = zhat.shape
    scale = None
    if z1.dtype == torch.float16:
        # A weight is at most 2 max |a|: stretched to fp16's range, those of 1e-9 keep their bits.
        scale = 2**14 / (grad_loss + grad_lse).abs().amax().clamp(min=1e-30)
    weight, lse2 = lse.new_empty(2, MP).unbind()
    weights_kernel[(triton.cdiv(MP, 1024),)](
        grad_loss, grad_lse, lse, scale, temperature, weight, lse2, *grad_loss.stride(), *grad_lse.stride(), N, MP,
        FOLD=config is not None and normalize, BLOCK=1024,
    )  # fmt: skip
    if config:
        tiles = MP // config.BLOCK_N
        splits = split_count(MP // config.BLOCK_M, tiles, config.programs * multiprocessors(z1.device))
        acc = lse.new_empty(splits, MP, DP)
        _bwd_kernel[(MP // config.BLOCK_M, splits)](
            zhat, weight, lse2, temperature, acc, N, MP, triton.cdiv(tiles, splits),
            NORMALIZE=normalize, PRECISION=dot_precision(z1.dtype),
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, DP=DP,
            **config.options,
        )  # fmt: skip
    else:
        splits, acc = 1, lse.new_empty(MP, DP)
        for rows in chunks(MP, MP):
            s = product(zhat[rows], zhat.T)
            w = s if zhat.dtype == s.dtype else torch.empty_like(s, dtype=zhat.dtype)
            bwd_rows_kernel[(len(s), triton.cdiv(MP, 1024))](
                s, weight, lse2, temperature, w, N, rows.start, MP, BLOCK=1024
            )
            acc[rows] = product(w, zhat)
    dz1, dz2 = (z1.new_empty(N, D) for _ in range(2))
    blocks = row_blocks(D)
    bwd_finish_kernel[(triton.cdiv(N, blocks["BLOCK_N"]),)](
        acc, z1, z2, norm, grad_loss, grad_lse, q, scale, temperature, dz1, dz2,
        *z1.stride(), *z2.stride(), *grad_loss.stride(), *grad_lse.stride(), N, MP, D, DP, splits,
        NORMALIZE=normalize, **blocks,
    )  # fmt: skip
    return dz1, dz2
