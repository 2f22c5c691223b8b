"""Batch norm in Triton: two launches forward, two backward, in both memory formats; no atomics, nothing to zero first.
Where a program has all of its channels' numbers in a split, as of an instance norm, one launch sweeps twice.

Memory is rows of WIDTH numbers: of channels (channels_last, or (N, C)), or planes, one row for each image and channel.
A unit is a piece of a row, BLOCK_K numbers at most: with channels innermost a program owns one piece of every row, and
units are rows; else it owns one channel, and each of its planes is KT units. A tile is BLOCK_R units. The tiles of a
channel block are cut into P parts of T tiles, for each of S splits of the batch:

    program = channel block + blocks * (split + S * part)

The first launch leaves a partial for each part, and every program of the second merges those of its own channels, in
order, before it starts. The second walks backwards: what the first read last is still in the L2 cache.
docs/kernels.md counts the bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from ssl_fast.kernels._common import INTERPRETED, Config, multiprocessors, pick, rounded
from torch import Tensor

RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
SILU = tl.constexpr(3)
GELU = tl.constexpr(4)
NEGATIVE_SLOPE = tl.constexpr(0.01)
FOLD = tl.constexpr(16)  # tiles between two moves of the pivot
BLOCK_P = tl.constexpr(16)  # partials merged at a time

# (whether channels are innermost, bytes of a number): Config(numbers in a tile, BLOCK_K at most, ...). Not yet measured
# on a GPU; chosen to compile without spills.
CONFIGS = {
    (True, 2): Config(4096, 32, 8, 1, 2),
    (True, 4): Config(4096, 32, 8, 1, 2),
    (False, 2): Config(4096, 256, 8, 1, 2),
    (False, 4): Config(4096, 256, 8, 1, 2),
}
CANDIDATES = tuple(
    Config(numbers, width, warps, 1, programs)
    for numbers, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8))
    for width in (32, 64, 128, 256)
    for programs in (1, 2, 4)
)
MOST_PARTS = 128  # every program reads the partials of its channels


# ---- where things are


@triton.jit
def _place(program, UNITS, S, T, C, INNERMOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of a program: its channel block and channels, (1, BLOCK_K) or (1, 1); its split, part, and tiles, from first to
    before last."""
    blocks = tl.cdiv(C, BLOCK_K) if INNERMOST else C
    block = program % blocks
    part = program // blocks // S
    first = part * T
    last = tl.minimum(first + T, tl.cdiv(UNITS, BLOCK_R))
    channel = block * BLOCK_K + tl.arange(0, BLOCK_K)[None, :] if INNERMOST else tl.full((1, 1), 0, tl.int32) + block
    return block, channel, program // blocks % S, part, first, last


@triton.jit
def _tile(tile, block, split, UNITS, C, KT, INNERMOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of each unit of a tile, (BLOCK_R, 1): its row, the column where it starts, and whether it exists."""
    if INNERMOST:
        unit = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = tl.cast(split, tl.int64) * UNITS + unit
        return row, tl.full((1, 1), 0, tl.int32) + block * BLOCK_K, unit < UNITS
    else:  # so many units fit in 32 bits, and are divided faster there
        unit = tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        image = split * (UNITS // KT) + unit // KT
        return image.to(tl.int64) * C + block, unit % KT * BLOCK_K, unit < UNITS


@triton.jit
def _counted(tile, UNITS, KT, WIDTH, INNERMOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """How many numbers of one channel the tiles of a split in front of this one hold."""
    if INNERMOST:
        return tl.minimum(tl.cast(tile, tl.int64) * BLOCK_R, UNITS)
    else:
        unit = tl.minimum(tile * BLOCK_R, UNITS)
        return (unit // KT).to(tl.int64) * WIDTH + unit % KT * BLOCK_K


@triton.jit
def _sum(values, INNERMOST: tl.constexpr):
    """Over what a tile holds of each channel."""
    values = tl.sum(values, 0, keep_dims=True)
    return values if INNERMOST else tl.sum(values, 1, keep_dims=True)


@triton.jit
def _load_channels(ptr, channel, C, other: tl.constexpr):
    if ptr is None:
        return tl.full(channel.shape, other, tl.float32)
    else:
        return tl.load(ptr + channel, channel < C, other=other).to(tl.float32)


@triton.jit
def _load_stats(stats_ptr, split, channel, S, C):
    at = stats_ptr + tl.cast(split, tl.int64) * C + channel
    plane = S.to(tl.int64) * C
    live = channel < C
    return tl.load(at, live, other=0.0), tl.load(at + plane, live, other=0.0), tl.load(at + 2 * plane, live, other=0.0)


@triton.jit
def _load_partials(ptr, index, p0, split, channel, S, P, C, COUNT: tl.constexpr):
    """(BLOCK_P, channels): number `index` of the COUNT that each part left for a channel, and 0 past the last."""
    part = p0 + tl.arange(0, BLOCK_P)[:, None]
    at = ((split + S * part).to(tl.int64) * COUNT + index) * C + channel
    return tl.load(ptr + at, (part < P) & (channel < C), other=0.0)


# ---- mean and variance


@triton.jit
def _moments_of_part(
    x_ptr, block, split, first, last, UNITS, C, KT, WIDTH,
    INNERMOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean, what its rounding left out, squared deviations, and count of the tiles from first to before last.

    Sums of x - pivot and of its square, which are exact to a rounding each where the pivot is near. It is the mean of
    the first tile, and then moves to the mean of all that was seen, so that no drift of x gets the better of it.
    """
    start = _counted(first, UNITS, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K)
    row, column, inside = _tile(first, block, split, UNITS, C, KT, INNERMOST, BLOCK_R, BLOCK_K)
    column = column + tl.arange(0, BLOCK_K)[None, :]
    x = tl.load(x_ptr + row * WIDTH + column, inside & (column < WIDTH), other=0.0).to(tl.float32)
    in_first = _counted(first + 1, UNITS, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K) - start
    mean = _sum(x, INNERMOST) / in_first.to(tl.float32)
    low = tl.zeros_like(mean)
    squares = tl.zeros_like(mean)
    seen = 0.0
    for fold in range(first, last, FOLD):
        s1 = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        s2 = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        end = tl.minimum(fold + FOLD, last)
        for tile in range(fold, end):
            row, column, inside = _tile(tile, block, split, UNITS, C, KT, INNERMOST, BLOCK_R, BLOCK_K)
            column = column + tl.arange(0, BLOCK_K)[None, :]
            live = inside & (column < WIDTH)
            x = tl.load(x_ptr + row * WIDTH + column, live, other=0.0).to(tl.float32)
            centred = tl.where(live, x - mean, 0.0)
            s1 += centred
            s2 += centred * centred
        count = (_counted(end, UNITS, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K) - start).to(tl.float32)
        shift = (seen * low + _sum(s1, INNERMOST)) / count
        squares += seen * low * low + _sum(s2, INNERMOST) - count * shift * shift
        moved = mean + shift
        low = (mean - moved) + shift
        mean = moved
        seen = count
    return mean, low, squares, seen


@triton.jit(do_not_specialize=["UNITS", "S", "T", "C", "KT", "W"])
def _moments_kernel(
    x_ptr, partial_ptr, num_batches_tracked_ptr,  # dense; (P, S, 3, C); ()
    UNITS, S, T, C, KT, W,
    VECTOR: tl.constexpr, INNERMOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    WIDTH = W * VECTOR
    block, channel, split, part, first, last = _place(
        tl.program_id(0), UNITS, S, T, C, INNERMOST, BLOCK_R, BLOCK_K
    )  # fmt: skip
    mean, low, squares, _ = _moments_of_part(
        x_ptr, block, split, first, last, UNITS, C, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K
    )
    at = partial_ptr + (split + S * part).to(tl.int64) * 3 * C + channel
    tl.store(at, mean, channel < C)
    tl.store(at + C, low, channel < C)
    tl.store(at + 2 * C, squares, channel < C)
    if num_batches_tracked_ptr is not None and tl.program_id(0) == 0:  # the second launch reads it
        tl.store(num_batches_tracked_ptr, tl.load(num_batches_tracked_ptr) + 1)


@triton.jit
def _merged_moments(
    partial_ptr, split, channel, UNITS, S, P, T, C, KT, WIDTH,
    INNERMOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean, what its rounding left out, squared deviations, and count of a split (Chan, Golub & LeVeque)."""
    origin = tl.load(partial_ptr + tl.cast(split, tl.int64) * 3 * C + channel, channel < C, other=0.0)
    total = _counted(P * T, UNITS, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K).to(tl.float32)
    shift = tl.zeros_like(origin)
    squares = tl.zeros_like(origin)
    for squaring in tl.static_range(2):
        for p0 in range(0, P, BLOCK_P):
            part = p0 + tl.arange(0, BLOCK_P)[:, None]
            before = _counted(part * T, UNITS, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K)
            count = _counted(part * T + T, UNITS, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K) - before
            weight = count.to(tl.float32)
            mean = _load_partials(partial_ptr, 0, p0, split, channel, S, P, C, 3)
            centred = (mean - origin) + _load_partials(partial_ptr, 1, p0, split, channel, S, P, C, 3)
            if squaring:
                deviations = _load_partials(partial_ptr, 2, p0, split, channel, S, P, C, 3)
                centred -= shift
                squares += tl.sum(deviations + weight * centred * centred, 0, keep_dims=True)
            else:
                shift += tl.sum(weight / total * centred, 0, keep_dims=True)
    mean = origin + shift
    return mean, (origin - mean) + shift, tl.where(squares < 0, 0.0, squares), total


@triton.jit(do_not_specialize=["UNITS", "S", "P", "T", "C", "KT", "WIDTH"])
def _stats_kernel(
    partial_ptr, stats_ptr,  # (P, S, 3, C), (3, S, C)
    UNITS, S, P, T, C, KT, WIDTH,
    INNERMOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _, channel, split, _, _, _ = _place(tl.program_id(0), UNITS, S, T, C, INNERMOST, BLOCK_R, BLOCK_K)
    mean, low, squares, count = _merged_moments(
        partial_ptr, split, channel, UNITS, S, P, T, C, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K
    )
    at = stats_ptr + tl.cast(split, tl.int64) * C + channel
    plane = S.to(tl.int64) * C
    tl.store(at, mean, channel < C)
    tl.store(at + plane, low, channel < C)
    tl.store(at + 2 * plane, squares / count, channel < C)


# ---- forward


@triton.jit
def _scale_and_shift(weight_ptr, bias_ptr, low, invstd, channel, C):
    """u = (x - mean) * scale + shift, alike to the bit both ways: the fused multiply-adds are explicit."""
    scale = invstd * _load_channels(weight_ptr, channel, C, 1.0)
    return scale, tl.fma(-low, scale, _load_channels(bias_ptr, channel, C, 0.0))


@triton.jit
def _gelu_cdf(u):
    return 0.5 * (1 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _activate(u, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        return tl.where(u <= 0, 0.0, u)  # NaN stays
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(u <= 0, u * NEGATIVE_SLOPE, u)
    elif ACTIVATION == SILU:
        return u * tl.sigmoid(u)
    elif ACTIVATION == GELU:
        return u * _gelu_cdf(u)
    else:
        return u


@triton.jit
def _moved(running, value, weight):
    """As torch.lerp: exact at 0 and 1."""
    return tl.where(weight < 0.5, running + weight * (value - running), value - (1 - weight) * (value - running))


@triton.jit
def _update_running(
    running_mean_ptr, running_var_ptr, momentum, num_batches_tracked_ptr,
    partial_ptr, channel, UNITS, S, P, T, C, KT, WIDTH,
    INNERMOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    mean = tl.zeros(channel.shape, tl.float32)
    var = tl.zeros(channel.shape, tl.float32)
    if P == 1:  # many splits, as of an instance norm, with a part each
        count = _counted(T, UNITS, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K).to(tl.float32)
        for s0 in range(0, S, BLOCK_P):
            squares = _load_partials(partial_ptr, 2, s0, 0, channel, 1, S, C, 3)
            mean += tl.sum(_load_partials(partial_ptr, 0, s0, 0, channel, 1, S, C, 3) / S, 0, keep_dims=True)
            var += tl.sum(tl.where(squares < 0, 0.0, squares) / (count - 1) / S, 0, keep_dims=True)
    else:
        for split in range(S):
            of_split, _, squares, count = _merged_moments(
                partial_ptr, split, channel, UNITS, S, P, T, C, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K
            )
            mean += of_split / S
            var += squares / (count - 1) / S
    weight = 1 / tl.load(num_batches_tracked_ptr).to(tl.float32) if momentum is None else momentum
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + channel, channel < C, other=0.0)
        tl.store(running_mean_ptr + channel, _moved(old, mean, weight), channel < C)
    if running_var_ptr is not None:
        old = tl.load(running_var_ptr + channel, channel < C, other=0.0)
        tl.store(running_var_ptr + channel, _moved(old, var, weight), channel < C)


@triton.jit(do_not_specialize=["momentum", "eps", "UNITS", "S", "P", "T", "C", "KT", "W"])
def _normalise_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr,  # dense, twice; (C,), twice
    partial_ptr, given_ptr,  # (P, S, 3, C) as _moments_kernel left it, or (3, S, C), or, WHOLE among others, neither
    running_mean_ptr, running_var_ptr, num_batches_tracked_ptr,  # (C,), (C,), ()
    y_ptr, stats_ptr, mask_ptr,  # dense, may be x; (3, S, C); by rows of memory
    momentum, eps, UNITS, S, P, T, C, KT, W,
    WHOLE: tl.constexpr, VECTOR: tl.constexpr, ACTIVATION: tl.constexpr,
    INNERMOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    WIDTH = W * VECTOR
    block, channel, split, part, first, last = _place(
        tl.num_programs(0) - 1 - tl.program_id(0), UNITS, S, T, C, INNERMOST, BLOCK_R, BLOCK_K
    )
    if given_ptr is not None:
        mean, low, invstd = _load_stats(given_ptr, split, channel, S, C)
    else:
        if WHOLE:
            mean, low, squares, count = _moments_of_part(
                x_ptr, block, split, first, last, UNITS, C, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K
            )
            var = tl.where(squares < 0, 0.0, squares) / count
        elif partial_ptr is not None:
            mean, low, squares, count = _merged_moments(
                partial_ptr, split, channel, UNITS, S, P, T, C, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K
            )
            var = squares / count
            if (running_mean_ptr is not None or running_var_ptr is not None) and split + part == 0:
                _update_running(
                    running_mean_ptr, running_var_ptr, momentum, num_batches_tracked_ptr, partial_ptr, channel,
                    UNITS, S, P, T, C, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K,
                )  # fmt: skip
        else:
            mean = _load_channels(running_mean_ptr, channel, C, 0.0)
            low = tl.zeros_like(mean)
            var = _load_channels(running_var_ptr, channel, C, 0.0)
        invstd = 1 / tl.sqrt_rn(var + eps)
        if part == 0:
            own = stats_ptr + tl.cast(split, tl.int64) * C + channel
            plane = S.to(tl.int64) * C
            tl.store(own, mean, channel < C)
            tl.store(own + plane, low, channel < C)
            tl.store(own + 2 * plane, invstd, channel < C)
    scale, shift = _scale_and_shift(weight_ptr, bias_ptr, low, invstd, channel, C)
    for back in range(first, last):
        row, start, inside = _tile(
            first + last - 1 - back, block, split, UNITS, C, KT, INNERMOST, BLOCK_R, BLOCK_K
        )  # fmt: skip
        column = start + tl.arange(0, BLOCK_K)[None, :]
        live = inside & (column < WIDTH)
        at = row * WIDTH + column
        x = tl.load(x_ptr + at, live, other=0.0, eviction_policy="evict_first").to(tl.float32)
        u = tl.fma(x - mean, scale, shift)
        if residual_ptr is not None:
            u += tl.load(residual_ptr + at, live, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(y_ptr + at, rounded(_activate(u, ACTIVATION), y_ptr.dtype.element_ty), live)
        if mask_ptr is not None:
            bits = tl.where((u <= 0) | (column >= WIDTH), 0, 1)
            bits = tl.reshape(bits << (tl.arange(0, BLOCK_K) % 8)[None, :], (BLOCK_R, BLOCK_K // 8, 8))
            byte = start // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
            width = (WIDTH + 7) // 8
            tl.store(mask_ptr + row * width + byte, tl.sum(bits, 2).to(tl.uint8), inside & (byte < width))


# ---- backward


@triton.jit
def _gradient(
    dy_ptr, residual_ptr, mask_ptr, centred, scale, shift, row, start, inside, live, at, WIDTH,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """That for u, from the one for y."""
    dz = tl.load(dy_ptr + at, live, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        byte = start // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
        width = (WIDTH + 7) // 8
        bits = tl.load(mask_ptr + row * width + byte, inside & (byte < width), other=0).to(tl.int32)
        bits = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        negative = tl.reshape(bits, (BLOCK_R, BLOCK_K)) == 0
    elif ACTIVATION != 0:
        u = tl.fma(centred, scale, shift)
        if residual_ptr is not None:
            u += tl.load(residual_ptr + at, live, other=0.0).to(tl.float32)
        negative = u <= 0
    if ACTIVATION == RELU:
        dz = tl.where(negative, 0.0, dz)
    elif ACTIVATION == LEAKY_RELU:
        dz = tl.where(negative, dz * NEGATIVE_SLOPE, dz)
    elif ACTIVATION == SILU:
        sigmoid = tl.sigmoid(u)
        dz *= sigmoid * (1 + u * (1 - sigmoid))
    elif ACTIVATION == GELU:
        dz *= _gelu_cdf(u) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
    return dz


@triton.jit
def _sums_of_part(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, partial_ptr, mean, low, invstd, scale, shift,
    block, channel, split, part, first, last, UNITS, S, C, KT, WIDTH, ACTIVATION: tl.constexpr,
    INNERMOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient for u, and of it times (x - mean) / std, also left in (P, S, 2, C)."""
    sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    moments = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for tile in range(first, last):
        row, start, inside = _tile(tile, block, split, UNITS, C, KT, INNERMOST, BLOCK_R, BLOCK_K)
        column = start + tl.arange(0, BLOCK_K)[None, :]
        live = inside & (column < WIDTH)
        at = row * WIDTH + column
        centred = tl.load(x_ptr + at, live, other=0.0).to(tl.float32) - mean
        dz = _gradient(
            dy_ptr, residual_ptr, mask_ptr, centred, scale, shift, row, start, inside, live, at, WIDTH,
            ACTIVATION, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        dz = tl.where(live, dz, 0.0)
        sums += dz
        moments += dz * centred
    at = partial_ptr + (split + S * part).to(tl.int64) * 2 * C + channel
    all_dz = _sum(sums, INNERMOST)
    all_moments = (_sum(moments, INNERMOST) - low * all_dz) * invstd
    tl.store(at, all_dz, channel < C)
    tl.store(at + C, all_moments, channel < C)
    return all_dz, all_moments


@triton.jit(do_not_specialize=["UNITS", "S", "T", "C", "KT", "W"])
def _sums_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, weight_ptr, bias_ptr, stats_ptr,  # as in _gradients_kernel
    partial_ptr,  # (P, S, 2, C)
    UNITS, S, T, C, KT, W,
    VECTOR: tl.constexpr, ACTIVATION: tl.constexpr,
    INNERMOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, channel, split, part, first, last = _place(
        tl.program_id(0), UNITS, S, T, C, INNERMOST, BLOCK_R, BLOCK_K
    )  # fmt: skip
    mean, low, invstd = _load_stats(stats_ptr, split, channel, S, C)
    scale, shift = _scale_and_shift(weight_ptr, bias_ptr, low, invstd, channel, C)
    _sums_of_part(
        dy_ptr, x_ptr, residual_ptr, mask_ptr, partial_ptr, mean, low, invstd, scale, shift,
        block, channel, split, part, first, last, UNITS, S, C, KT, W * VECTOR, ACTIVATION, INNERMOST, BLOCK_R, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _merged_sums(partial_ptr, split, channel, S, P, C):
    sums = tl.zeros(channel.shape, tl.float32)
    moments = tl.zeros(channel.shape, tl.float32)
    for p0 in range(0, P, BLOCK_P):
        sums += tl.sum(_load_partials(partial_ptr, 0, p0, split, channel, S, P, C, 2), 0, keep_dims=True)
        moments += tl.sum(_load_partials(partial_ptr, 1, p0, split, channel, S, P, C, 2), 0, keep_dims=True)
    return sums, moments


@triton.jit(do_not_specialize=["UNITS", "S", "P", "T", "C", "KT", "W"])
def _gradients_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, weight_ptr, bias_ptr, stats_ptr,  # the first three dense; (3, S, C)
    partial_ptr, means_ptr,  # (P, S, 2, C) as _sums_kernel left it (WHOLE: for another launch), or (2, S, C)
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    UNITS, S, P, T, C, KT, W,
    WHOLE: tl.constexpr, TRAINING: tl.constexpr, VECTOR: tl.constexpr, ACTIVATION: tl.constexpr,
    INNERMOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    WIDTH = W * VECTOR
    block, channel, split, part, first, last = _place(
        tl.num_programs(0) - 1 - tl.program_id(0), UNITS, S, T, C, INNERMOST, BLOCK_R, BLOCK_K
    )
    if dweight_ptr is not None and split + part == 0:
        dbias, dweight = _merged_sums(partial_ptr, 0, channel, 1, S * P, C)  # the parts of all splits
        tl.store(dbias_ptr + channel, dbias, channel < C)
        tl.store(dweight_ptr + channel, dweight, channel < C)
    if dx_ptr is not None or dresidual_ptr is not None:
        mean, low, invstd = _load_stats(stats_ptr, split, channel, S, C)
        scale, shift = _scale_and_shift(weight_ptr, bias_ptr, low, invstd, channel, C)
        if WHOLE:
            mean_dz, slope = _sums_of_part(
                dy_ptr, x_ptr, residual_ptr, mask_ptr, partial_ptr, mean, low, invstd, scale, shift,
                block, channel, split, part, first, last, UNITS, S, C, KT, WIDTH, ACTIVATION,
                INNERMOST, BLOCK_R, BLOCK_K,
            )  # fmt: skip
        if TRAINING:
            if means_ptr is not None:
                means = means_ptr + tl.cast(split, tl.int64) * C + channel
                mean_dz = tl.load(means, channel < C, other=0.0)
                slope = tl.load(means + S.to(tl.int64) * C, channel < C, other=0.0)
            else:
                count = _counted(P * T, UNITS, KT, WIDTH, INNERMOST, BLOCK_R, BLOCK_K).to(tl.float32)
                if not WHOLE:
                    mean_dz, slope = _merged_sums(partial_ptr, split, channel, S, P, C)
                mean_dz /= count
                slope /= count
            slope *= invstd
            mean_dz -= low * slope
        for back in range(first, last):
            row, start, inside = _tile(
                first + last - 1 - back, block, split, UNITS, C, KT, INNERMOST, BLOCK_R, BLOCK_K
            )  # fmt: skip
            column = start + tl.arange(0, BLOCK_K)[None, :]
            live = inside & (column < WIDTH)
            at = row * WIDTH + column
            centred = tl.load(x_ptr + at, live, other=0.0, eviction_policy="evict_first").to(tl.float32) - mean
            dz = _gradient(
                dy_ptr, residual_ptr, mask_ptr, centred, scale, shift, row, start, inside, live, at, WIDTH,
                ACTIVATION, BLOCK_R, BLOCK_K,
            )  # fmt: skip
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + at, rounded(dz, dresidual_ptr.dtype.element_ty), live)
            if dx_ptr is not None:
                if TRAINING:
                    dz -= mean_dz + centred * slope
                tl.store(dx_ptr + at, rounded(dz * scale, dx_ptr.dtype.element_ty), live)


# ---- launchers


def _channels_innermost(x: Tensor) -> bool:
    return math.prod(x.shape[2:]) == 1 or (x.shape[1] > 1 and x.stride(1) == 1)


def _width(x: Tensor) -> int:
    """The length of a row of memory."""
    return x.shape[1] if _channels_innermost(x) else math.prod(x.shape[2:])


def _splits_of(x: Tensor, num_splits: int) -> int:
    """Sets of statistics of the batch; `num_splits` of 0: one for each image."""
    return num_splits or max(x.shape[0], 1)


class _Launch:
    """The cut of a dense x into programs, and the arguments that all kernels take it by."""

    def __init__(self, x: Tensor, splits: int, name: str, first: Callable[[_Launch], Any]) -> None:
        C, width, innermost = x.shape[1], _width(x), _channels_innermost(x)
        rows = x.numel() // (width or 1)

        def cut(config: Config) -> None:
            if INTERPRETED:  # where a program costs what it says and not what it reads: few, but with several tiles
                config = config._replace(BLOCK_N=256 if innermost else 64)
            block_k = min(max(triton.next_power_of_2(width), 8), config.BLOCK_N)
            block_r = 64 if INTERPRETED else config.BLOCK_M // block_k
            blocks, pieces = (triton.cdiv(C, block_k), 1) if innermost else (C, max(1, triton.cdiv(width, block_k)))
            units = rows // splits if innermost else rows // (C * splits or 1) * pieces
            tiles = triton.cdiv(units, block_r)
            slots = config.programs * multiprocessors(x.device)
            most = max(1, min(triton.cdiv(slots, blocks * splits or 1), MOST_PARTS))
            self.per_part = max(1, triton.cdiv(tiles, most))
            self.parts = max(1, triton.cdiv(tiles, self.per_part))
            self.units, self.pieces = units, pieces
            self.grid, self.merging, self.blocks = (blocks * splits * self.parts,), (blocks * splits,), (blocks,)
            self.constants = {"INNERMOST": innermost, "BLOCK_R": block_r, "BLOCK_K": block_k,
                              "num_warps": config.num_warps}  # fmt: skip

        def run(config: Config) -> None:
            cut(config)
            first(self)

        self.splits, self.C, self.width = splits, C, width
        self.vector = math.gcd(width, 16)
        cut(pick(name, (innermost, x.element_size()), CONFIGS, CANDIDATES, run))

    @property
    def sizes(self) -> dict[str, int]:
        return {"UNITS": self.units, "S": self.splits, "T": self.per_part, "C": self.C, "KT": self.pieces}

    @property
    def row(self) -> dict[str, int]:
        """WIDTH, the divisor that makes 16-byte accesses possible known to the compiler."""
        return {"W": self.width // self.vector, "VECTOR": self.vector}


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(launcher)
    def run(*arguments: Any) -> Any:
        with torch.cuda.device_of(arguments[0]):
            return launcher(*arguments)

    return run


def _compact(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


def _moments(launch: _Launch, x: Tensor, num_batches_tracked: Tensor | None) -> Tensor:
    partials = x.new_empty(launch.parts, launch.splits, 3, launch.C, dtype=torch.float32)
    _moments_kernel[launch.grid](
        x, partials, num_batches_tracked, **launch.sizes, **launch.row, **launch.constants
    )  # fmt: skip
    return partials


def _forward(
    y: Tensor,
    mask: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    stats: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_splits: int,
    activation: int,
) -> Tensor:
    """Fills y and mask; returns the statistics, unless they were given."""
    C, training = x.shape[1], training and stats is None
    if training and x.numel() == 0:  # statistics of nothing are 0, and move nothing
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        running_mean = running_var = x.new_zeros(C, dtype=torch.float32)
        training, splits = False, _splits_of(x, num_splits)
    else:
        splits = stats.shape[1] if stats is not None else _splits_of(x, num_splits) if training else 1
    weight, bias, stats, mean, var = _compact(weight, bias, stats, running_mean, running_var)
    launch = _Launch(x, splits, "batch_norm_fwd", lambda cut: _moments(cut, x, None))
    # A program that has all of a channel in its split sweeps twice at once, over what the cache then holds.
    whole = training and launch.parts == 1 and mean is None and var is None and num_batches_tracked is None
    partials = _moments(launch, x, num_batches_tracked) if training and not whole else None
    own = x.new_empty((3, splits, C) if stats is None else (0,), dtype=torch.float32)
    by_count = momentum is None and training and not (mean is None and var is None)
    _normalise_kernel[launch.grid](
        x, residual, weight, bias, partials, stats,
        None if stats is not None else mean, None if stats is not None else var,
        num_batches_tracked if by_count else None, y, own if stats is None else None, mask,
        None if by_count else float(momentum or 0), float(eps), P=launch.parts, WHOLE=whole, ACTIVATION=activation,
        **launch.sizes, **launch.row, **launch.constants,
    )  # fmt: skip
    if training:
        for given, used in ((running_mean, mean), (running_var, var)):
            if given is not None and given is not used:
                given.copy_(used)
    return own


@_on_its_device
def batch_norm_fwd(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, keep_mask = arguments
    y, width = torch.empty_like(x), _width(x)
    size = x.numel() // (width or 1) * triton.cdiv(width, 8) if keep_mask else 0
    mask = x.new_empty(size, dtype=torch.uint8)
    return y, _forward(y, mask if keep_mask else None, x, *arguments), mask


@_on_its_device
def batch_norm_(x: Tensor, *arguments: Any) -> None:
    _forward(x, None, x, *arguments)


@_on_its_device
def batch_norm_stats(x: Tensor, num_splits: int) -> Tensor:
    splits = _splits_of(x, num_splits)
    stats = x.new_zeros(3, splits, x.shape[1], dtype=torch.float32)
    if x.numel():
        launch = _Launch(x, splits, "batch_norm_fwd", lambda cut: _moments(cut, x, None))
        _stats_kernel[launch.merging](
            _moments(launch, x, None), stats, P=launch.parts, WIDTH=launch.width, **launch.sizes, **launch.constants
        )
    return stats


def _sums(launch: _Launch, operands: tuple[Tensor | None, ...], activation: int) -> Tensor:
    stats = operands[-1]
    partials = stats.new_empty(launch.parts, launch.splits, 2, launch.C)
    _sums_kernel[launch.grid](
        *operands, partials, ACTIVATION=activation, **launch.sizes, **launch.row, **launch.constants
    )
    return partials


def _backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    activation: int,
) -> tuple[_Launch, tuple[Tensor | None, ...]]:
    """The launch, and of the operands those that the activation's derivative depends on."""
    by_sign = activation in (RELU.value, LEAKY_RELU.value)
    smooth = activation and not by_sign
    operands = (dy, x, residual if smooth else None, mask if by_sign else None, *_compact(weight, bias, stats))
    launch = _Launch(x, stats.shape[1], "batch_norm_bwd", lambda cut: _sums(cut, operands, activation))
    return launch, operands


@_on_its_device
def batch_norm_sums(*arguments: Any) -> Tensor:
    launch, operands = _backward(*arguments)
    return _sums(launch, operands, arguments[-1]).sum(0).movedim(1, 0).contiguous()


@_on_its_device
def batch_norm_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    means: Tensor | None,
    training: bool,
    activation: int,
    need_dx: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    launch, operands = _backward(dy, x, residual, mask, weight, bias, stats, activation)
    dx, dresidual = (torch.empty_like(x) if needed else None for needed in (need_dx, need_dresidual))
    dweight, dbias = (stats.new_empty(x.shape[1]) if means is None else None for _ in range(2))
    elementwise = need_dx or need_dresidual

    def run(grid: tuple[int], partials: Tensor | None, *outputs: Tensor | None, whole: bool = False) -> None:
        _gradients_kernel[grid](
            *operands, partials, *_compact(means), *outputs, P=launch.parts, WHOLE=whole, TRAINING=training,
            ACTIVATION=activation, **launch.sizes, **launch.row, **launch.constants,
            maxnreg=128 if whole else None,  # two programs a multiprocessor; ptxas would spill for a third
        )  # fmt: skip

    if elementwise and means is None and launch.parts == 1:  # as in the forward; then sums over the splits
        partials = stats.new_empty(1, launch.splits, 2, launch.C)
        run(launch.grid, partials, dx, dresidual, None, None, whole=True)
        run(launch.blocks, partials, None, None, dweight, dbias)
    elif elementwise or means is None:
        partials = _sums(launch, operands, activation) if means is None else None
        run(launch.grid if elementwise else launch.blocks, partials, dx, dresidual, dweight, dbias)
    return (
        *(x.new_empty(0) if t is None else t for t in (dx, dresidual)),
        *(stats.new_empty(0) if t is None else t for t in (dweight, dbias)),
    )  # type: ignore[return-value]
