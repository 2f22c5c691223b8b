"""Layer norm in Triton: one launch forward, two or three backward; no atomics, nothing to zero first.

Memory is N blocks of D rows of L numbers, with statistics over D for each of the R = N L positions; L is 1 for rows, as
under channels_last. A tile is BLOCK_R positions of one block by BLOCK_D numbers of each. Where D fits a tile, both
directions read x once; else the forward goes over D three times, which the caches hold, and the backward finds its two
means a position in a launch of its own. Every program of the backward owns a run of tiles and leaves one partial of
the affine gradients, which the last launch adds in order. docs/kernels.md counts the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from ssl_fast.kernels._common import INTERPRETED, Config, multiprocessors, pick, rounded
from ssl_fast.kernels.batch_norm import (
    GELU,
    LEAKY_RELU,
    NEGATIVE_SLOPE,
    RELU,
    SILU,
    _activate,
    _compact,
    _gelu_cdf,
    _on_its_device,
)
from torch import Tensor

BLOCK_P = tl.constexpr(16)  # partials added at a time

# Whether memory is planes: Config(numbers in a tile, BLOCK_D at most, ...). Not yet measured on a GPU; chosen to
# compile without spills.
CONFIGS = {(False,): Config(4096, 4096, 8, 1, 2), (True,): Config(2048, 128, 8, 1, 2)}
CANDIDATES = tuple(
    Config(numbers, widest, warps, 1, programs)
    for numbers, warps in ((2048, 4), (4096, 8))
    for widest in (128, 1024, 4096)
    for programs in (1, 2, 4)
)


# ---- what each number needs


@triton.jit
def _place(tile, R, D, L, PLANES: tl.constexpr, BLOCK_R: tl.constexpr):
    """Of each position of a tile, (BLOCK_R, 1): its number, where it starts, and whether it exists."""
    if PLANES:
        tiles = tl.cdiv(L, BLOCK_R)
        n = tl.cast(tile // tiles, tl.int64)
        column = tile % tiles * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        return n * L + column, n * D * L + column, column < L
    else:
        row = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        return row, row * D, row < R


@triton.jit
def _at(start, d, L, PLANES: tl.constexpr):
    return start + d.to(tl.int64) * L if PLANES else start + d


@triton.jit
def _parameter(ptr, d, D, other: tl.constexpr):
    if ptr is None:
        return tl.full(d.shape, other, tl.float32)
    else:
        return tl.load(ptr + d, d < D, other=other).to(tl.float32)


@triton.jit
def _normalised(x_ptr, at, live, mean, low, invstd):
    x = tl.load(x_ptr + at, live, other=0.0).to(tl.float32)
    return tl.where(live, ((x - mean) - low) * invstd, 0.0)


@triton.jit
def _pre_activation(xhat, residual_ptr, at, live, weight, bias):
    """One expression both ways, its roundings spelt out: signs found again are the forward's."""
    u = tl.fma(xhat, weight, bias)
    if residual_ptr is not None:
        u += tl.load(residual_ptr + at, live, other=0.0).to(tl.float32)
    return u


@triton.jit
def _gradient(dy_ptr, residual_ptr, xhat, at, live, weight, bias, ACTIVATION: tl.constexpr):
    """dz, 0 where nothing is."""
    dz = tl.load(dy_ptr + at, live, other=0.0).to(tl.float32)
    if ACTIVATION != 0:
        u = _pre_activation(xhat, residual_ptr, at, live, weight, bias)
        if ACTIVATION == RELU:
            dz = tl.where(u <= 0, 0.0, dz)
        elif ACTIVATION == LEAKY_RELU:
            dz = tl.where(u <= 0, dz * NEGATIVE_SLOPE, dz)
        elif ACTIVATION == SILU:
            sigmoid = tl.sigmoid(u)
            dz *= sigmoid * (1 + u * (1 - sigmoid))
        elif ACTIVATION == GELU:
            dz *= _gelu_cdf(u) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
    return dz


@triton.jit
def _load_stats(stats_ptr, row, inside, R):
    at = stats_ptr + row
    plane = R.to(tl.int64)
    mean, low = tl.load(at, inside, other=0.0), tl.load(at + plane, inside, other=0.0)
    return mean, low, tl.load(at + 2 * plane, inside, other=0.0)


# ---- forward


@triton.jit(do_not_specialize=["R", "eps"])
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, stats_ptr,  # dense, dense, (D,), (D,), dense, (3, R)
    R, D, L, eps,
    PLANES: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, FITS: tl.constexpr,
):  # fmt: skip
    """The mean is guessed by a sum of x - pivot, the pivot being a position's first number: exact where all are equal.
    Then what the guess left out is found, and the squares about it."""
    row, start, inside = _place(tl.program_id(0), R, D, L, PLANES, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)[None, :]
    pivot = tl.load(x_ptr + start, inside, other=0.0).to(tl.float32)
    if FITS:
        live = inside & (columns < D)
        x = tl.load(x_ptr + _at(start, columns, L, PLANES), live, other=0.0).to(tl.float32)
        guess = pivot + tl.sum(tl.where(live, x - pivot, 0.0), 1, keep_dims=True) / D
        centred = tl.where(live, x - guess, 0.0)
        rest = tl.sum(centred, 1, keep_dims=True) / D
        squares = tl.sum(centred * centred, 1, keep_dims=True) / D
    else:
        s1 = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        s2 = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for first in range(0, D, BLOCK_D):
            live = inside & (first + columns < D)
            x = tl.load(x_ptr + _at(start, first + columns, L, PLANES), live, other=0.0).to(tl.float32)
            s1 += tl.where(live, x - pivot, 0.0)
        guess = pivot + tl.sum(s1, 1, keep_dims=True) / D
        s1 = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for first in range(0, D, BLOCK_D):
            live = inside & (first + columns < D)
            x = tl.load(x_ptr + _at(start, first + columns, L, PLANES), live, other=0.0).to(tl.float32)
            centred = tl.where(live, x - guess, 0.0)
            s1 += centred
            s2 += centred * centred
        rest = tl.sum(s1, 1, keep_dims=True) / D
        squares = tl.sum(s2, 1, keep_dims=True) / D
    mean = guess + rest
    low = (guess - mean) + rest
    var = squares - rest * rest
    invstd = 1 / tl.sqrt_rn(tl.where(var < 0, 0.0, var) + eps)
    plane = R.to(tl.int64)
    tl.store(stats_ptr + row, mean, inside)
    tl.store(stats_ptr + plane + row, low, inside)
    tl.store(stats_ptr + 2 * plane + row, invstd, inside)
    for first in range(0, BLOCK_D if FITS else D, BLOCK_D):
        d = first + columns
        live, at = inside & (d < D), _at(start, d, L, PLANES)
        xhat = ((x - mean) - low) * invstd if FITS else _normalised(x_ptr, at, live, mean, low, invstd)
        weight, bias = _parameter(weight_ptr, d, D, 1.0), _parameter(bias_ptr, d, D, 0.0)
        u = _pre_activation(xhat, residual_ptr, at, live, weight, bias)
        tl.store(y_ptr + at, rounded(_activate(u, ACTIVATION), y_ptr.dtype.element_ty), live)


# ---- backward


@triton.jit(do_not_specialize=["R"])
def _means_kernel(
    dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, stats_ptr, means_ptr,  # as in _backward_kernel
    R, D, L,
    PLANES: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Means over D of g = weight dz, and of g xhat."""
    row, start, inside = _place(tl.program_id(0), R, D, L, PLANES, BLOCK_R)
    mean, low, invstd = _load_stats(stats_ptr, row, inside, R)
    even = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    along = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        live, at = inside & (d < D), _at(start, d, L, PLANES)
        weight, bias = _parameter(weight_ptr, d, D, 1.0), _parameter(bias_ptr, d, D, 0.0)
        xhat = _normalised(x_ptr, at, live, mean, low, invstd)
        g = weight * _gradient(dy_ptr, residual_ptr, xhat, at, live, weight, bias, ACTIVATION)
        even += g
        along += g * xhat
    tl.store(means_ptr + row, tl.sum(even, 1, keep_dims=True) / D, inside)
    tl.store(means_ptr + R.to(tl.int64) + row, tl.sum(along, 1, keep_dims=True) / D, inside)


@triton.jit(do_not_specialize=["R", "TILES", "T"])
def _backward_kernel(
    dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, stats_ptr,  # the first three dense
    means_ptr, dx_ptr, dresidual_ptr, partial_ptr,  # (2, R) where D does not fit; dense; (P, 2, D)
    R, D, L, TILES, T,
    PLANES: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (part, block of columns) takes the tiles from T part on."""
    part = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    weight, bias = _parameter(weight_ptr, d, D, 1.0), _parameter(bias_ptr, d, D, 0.0)
    dweight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for tile in range(part * T, tl.minimum(part * T + T, TILES)):
        row, start, inside = _place(tile, R, D, L, PLANES, BLOCK_R)
        live, at = inside & (d < D), _at(start, d, L, PLANES)
        mean, low, invstd = _load_stats(stats_ptr, row, inside, R)
        xhat = _normalised(x_ptr, at, live, mean, low, invstd)
        dz = _gradient(dy_ptr, residual_ptr, xhat, at, live, weight, bias, ACTIVATION)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at, rounded(dz, dresidual_ptr.dtype.element_ty), live)
        if dx_ptr is not None:
            g = dz * weight
            if means_ptr is not None:
                even = tl.load(means_ptr + row, inside, other=0.0)
                along = tl.load(means_ptr + R.to(tl.int64) + row, inside, other=0.0)
            else:
                even = tl.sum(g, 1, keep_dims=True) / D
                along = tl.sum(g * xhat, 1, keep_dims=True) / D
            tl.store(dx_ptr + at, rounded((g - even - xhat * along) * invstd, dx_ptr.dtype.element_ty), live)
        if partial_ptr is not None:
            dweight += dz * xhat
            dbias += dz
    if partial_ptr is not None:
        own = partial_ptr + tl.cast(part, tl.int64) * 2 * D + d
        tl.store(own, tl.sum(dweight, 0, keep_dims=True), d < D)
        tl.store(own + D, tl.sum(dbias, 0, keep_dims=True), d < D)


@triton.jit(do_not_specialize=["P", "D"])
def _merge_kernel(partial_ptr, dweight_ptr, dbias_ptr, P, D, BLOCK_K: tl.constexpr):  # (P, 2, D)
    d = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    dweight = tl.zeros((1, BLOCK_K), tl.float32)
    dbias = tl.zeros((1, BLOCK_K), tl.float32)
    for first in range(0, P, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)[:, None]
        live = (part < P) & (d < D)
        at = partial_ptr + tl.cast(part, tl.int64) * 2 * D + d
        dweight += tl.sum(tl.load(at, live, other=0.0), 0, keep_dims=True)
        dbias += tl.sum(tl.load(at + D, live, other=0.0), 0, keep_dims=True)
    tl.store(dweight_ptr + d, dweight, d < D)
    tl.store(dbias_ptr + d, dbias, d < D)


# ---- launchers


class _Launch:
    """How a dense x is cut into tiles."""

    def __init__(self, x: Tensor, width: int, channels: bool) -> None:
        planes = channels and not (x[0, 0].numel() == 1 or (width > 1 and x.stride(1) == 1)) if x.numel() else False
        self.D = width
        self.L = x[0, 0].numel() if planes else 1
        self.N = x.numel() // (width * self.L or 1)
        self.R = self.N * self.L
        self.planes, self.slots = planes, multiprocessors(x.device)

    def cut(self, config: Config) -> None:
        numbers, widest = (512, min(config.BLOCK_N, 512)) if INTERPRETED else config[:2]
        block_d = min(triton.next_power_of_2(self.D), widest)
        block_r = max(1, numbers // block_d)
        self.fits = block_d >= self.D
        self.tiles = self.N * triton.cdiv(self.L, block_r) if self.planes else triton.cdiv(self.R, block_r)
        self.per_part = max(1, triton.cdiv(self.tiles, config.programs * self.slots))
        self.parts = triton.cdiv(self.tiles, self.per_part)
        self.columns = triton.cdiv(self.D, block_d)
        self.constants = {"PLANES": self.planes, "BLOCK_R": block_r, "BLOCK_D": block_d,
                          "num_warps": config.num_warps}  # fmt: skip

    @property
    def sizes(self) -> dict[str, int]:
        return {"R": self.R, "D": self.D, "L": self.L}


@_on_its_device
def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    width: int,
    channels: bool,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    launch = _Launch(x, width, channels)
    y, stats = torch.empty_like(x), x.new_empty(3, launch.R, dtype=torch.float32)
    weight, bias = _compact(weight, bias)

    def run(config: Config) -> None:
        launch.cut(config)
        _forward_kernel[(launch.tiles,)](
            x, residual, weight, bias, y, stats, **launch.sizes, eps=float(eps), ACTIVATION=activation,
            FITS=launch.fits, **launch.constants,
        )  # fmt: skip

    if x.numel():
        run(pick("layer_norm_fwd", (launch.planes,), CONFIGS, CANDIDATES, run))
    return y, stats


@_on_its_device
def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    width: int,
    channels: bool,
    activation: int,
    need_dx: bool,
    need_dresidual: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    launch = _Launch(x, width, channels)
    dx, dresidual = (torch.empty_like(x) if need else x.new_empty(0) for need in (need_dx, need_dresidual))
    dweight, dbias = (stats.new_zeros(width if need_affine else 0) for _ in range(2))
    operands = (dy, x, residual, *_compact(weight, bias, stats))

    def run(config: Config) -> None:
        launch.cut(config)
        options: dict[str, Any] = {"ACTIVATION": activation, **launch.sizes, **launch.constants}
        means = None
        if need_dx and not launch.fits:
            means = stats.new_empty(2, launch.R)
            _means_kernel[(launch.tiles,)](*operands, means, **options)
        partials = stats.new_empty(launch.parts, 2, width) if need_affine else None
        _backward_kernel[(launch.parts, launch.columns)](
            *operands, means, dx if need_dx else None, dresidual if need_dresidual else None, partials,
            TILES=launch.tiles, T=launch.per_part, **options,
        )  # fmt: skip
        if partials is not None:
            _merge_kernel[(triton.cdiv(width, 128),)](partials, dweight, dbias, launch.parts, width, BLOCK_K=128)

    if x.numel():
        run(pick("layer_norm_bwd", (launch.planes,), CONFIGS, CANDIDATES, run))
    return dx, dresidual, dweight, dbias
