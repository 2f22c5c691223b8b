"""Views in Triton, in three launches: the crop resampled, with the colour steps before contrast and sums of grey
values; the other colour steps, and the rows of a blur; the columns of a blur. A program owns pixels of one view; views
without a blur are done after the second.

What a step has to see whole, contrast a view and a blur its rows, waits in fp32 planes between the launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from ssl_fast.kernels._common import rounded
from torch import Tensor

PIXELS = 256  # of a program
COLUMNS = tl.constexpr(15)  # of a row of parameters: COLUMNS of ssl_fast/ops/two_views.py
SUMS = tl.constexpr(128)  # that are added at a time


@triton.jit
def _whole(params_ptr, COLUMN: tl.constexpr, low, high):
    """A parameter as a whole number within its bounds; NaN and infinities are the lower one."""
    x = tl.load(params_ptr + COLUMN)
    x = tl.where(tl.abs(x) < 1e9, x, 0.0)
    return tl.minimum(tl.maximum(x.to(tl.int32), low), high)


@triton.jit
def _clamped(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _gray(r, g, b, C: tl.constexpr):
    return 0.2989 * r + 0.587 * g + 0.114 * b if C == 3 else r


@triton.jit
def _of_hue(hue, offset: tl.constexpr, most, spread):
    k = hue + offset
    k -= 6 * tl.floor(k / 6)
    return _clamped(most - spread * _clamped(tl.minimum(k, 4 - k)))


@triton.jit
def _adjust(r, g, b, kind, factor, mean, C: tl.constexpr):
    """Brightness, contrast, saturation or hue."""
    if kind == 3:
        if C == 3 and factor != 0:
            most, least = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
            spread = most - least
            safe = tl.where(spread == 0, 1.0, spread)
            hue = tl.where(most == g, (b - r) / safe + 2, (r - g) / safe + 4)
            hue = tl.where(most == r, (g - b) / safe, hue) + 6 * factor
            r = _of_hue(hue, 5, most, spread)
            g = _of_hue(hue, 3, most, spread)
            b = _of_hue(hue, 1, most, spread)
    elif factor != 1 and (C == 3 or kind < 2):
        other = tl.where(kind == 0, 0.0, tl.where(kind == 1, mean, _gray(r, g, b, C))) * (1 - factor)
        r, g, b = _clamped(r * factor + other), _clamped(g * factor + other), _clamped(b * factor + other)
    return r, g, b


@triton.jit
def _kind(order, POSITION: tl.constexpr):
    """Which step is at a position of a permutation of 4, of its number in lexicographic order."""
    a = order // 6
    b = order % 6 // 2
    b += b >= a
    rest = order % 2  # of the two others, the smaller first or the larger
    low = tl.where((a != 0) & (b != 0), 0, tl.where((a != 1) & (b != 1), 1, 2))
    high = 6 - a - b - low
    if POSITION == 0:
        kind = a
    elif POSITION == 1:
        kind = b
    elif POSITION == 2:
        kind = tl.where(rest == 0, low, high)
    else:
        kind = tl.where(rest == 0, high, low)
    return kind


@triton.jit
def _steps(r, g, b, params_ptr, mean, AFTER: tl.constexpr, C: tl.constexpr):
    """The colour steps before contrast, or contrast and those AFTER it."""
    order = _whole(params_ptr, 6, 0, 23)
    before = True
    for position in tl.static_range(4):
        kind = _kind(order, position)
        before = before & (kind != 1)
        if before != AFTER:
            factor = tl.load(params_ptr + 7 + kind)
            r, g, b = _adjust(r, g, b, kind, factor, mean, C)
    return r, g, b


@triton.jit
def _first_and_last(output, scale, support, length):
    """Of a filter's inputs for outputs, and its centre; 0 to `length`, the last exclusive."""
    centre = scale * (output + 0.5)
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    return centre, first, tl.minimum((centre + support + 0.5).to(tl.int32), length)


@triton.jit
def _byte(image_ptr, y, x, height, width, row_stride, pixel_stride, live):
    inside = live & (y >= 0) & (x >= 0) & (y < height) & (x < width)
    at = y.to(tl.int64) * row_stride + x * pixel_stride
    return tl.load(image_ptr + at, inside, 0).to(tl.float32)


@triton.jit
def _turned(image_ptr, y, x, sine, cosine, height, width, row_stride, pixel_stride, live):
    """Bilinear at the place that a rotation about the image's centre brings here."""
    along, down = x + 0.5 - width / 2, y + 0.5 - height / 2
    at_x, at_y = cosine * along - sine * down + width / 2 - 0.5, sine * along + cosine * down + height / 2 - 0.5
    left, top = tl.floor(at_x), tl.floor(at_y)
    part_x, part_y = at_x - left, at_y - top
    x0, y0 = left.to(tl.int32), top.to(tl.int32)
    a = _byte(image_ptr, y0, x0, height, width, row_stride, pixel_stride, live) * (1 - part_x)
    a += _byte(image_ptr, y0, x0 + 1, height, width, row_stride, pixel_stride, live) * part_x
    b = _byte(image_ptr, y0 + 1, x0, height, width, row_stride, pixel_stride, live) * (1 - part_x)
    b += _byte(image_ptr, y0 + 1, x0 + 1, height, width, row_stride, pixel_stride, live) * part_x
    return a * (1 - part_y) + b * part_y


@triton.jit
def _resample_kernel(
    images_ptr, table_ptr, params_ptr, planes_ptr, sums_ptr, N, H, W, size,
    C: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    view, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image = view % N
    if table_ptr is None:
        image_ptr = images_ptr + image * C * H * W
        height, width = H, W
    else:
        image_ptr = images_ptr + tl.load(table_ptr + image * 3)
        height, width = tl.load(table_ptr + image * 3 + 1).to(tl.int32), tl.load(table_ptr + image * 3 + 2).to(tl.int32)
    row_stride, pixel_stride, plane = (width * C, C, 1) if LAST else (width, 1, height.to(tl.int64) * width)
    params_ptr += view * COLUMNS
    top, left = _whole(params_ptr, 0, 0, height - 1), _whole(params_ptr, 1, 0, width - 1)
    rows, columns = _whole(params_ptr, 2, 1, height - top), _whole(params_ptr, 3, 1, width - left)
    angle = tl.load(params_ptr + 4)
    angle = tl.where(tl.abs(angle) < 1e9, angle, 0.0)

    at = tile * PIXELS + tl.arange(0, PIXELS)
    live = at < size * size
    y, x = at // size, at % size
    x = tl.where(tl.load(params_ptr + 5) != 0, size - 1 - x, x)
    scale_y, scale_x = rows / (size * 1.0), columns / (size * 1.0)
    support_y, support_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    centre_y, first_y, last_y = _first_and_last(y, scale_y, support_y, rows)
    centre_x, first_x, last_x = _first_and_last(x, scale_x, support_x, columns)
    sine, cosine = tl.sin(angle * 0.017453292519943295), tl.cos(angle * 0.017453292519943295)

    r = tl.zeros((PIXELS,), tl.float32)
    g = tl.zeros((PIXELS,), tl.float32)
    b = tl.zeros((PIXELS,), tl.float32)
    total = tl.zeros((PIXELS,), tl.float32)
    for j in range(tl.ceil(support_y).to(tl.int32) * 2 + 1):
        from_y = first_y + j
        weight_y = tl.maximum(1 - tl.abs(from_y + 0.5 - centre_y) / support_y, 0.0)
        weight_y = tl.where(from_y < last_y, weight_y, 0.0)
        for i in range(tl.ceil(support_x).to(tl.int32) * 2 + 1):
            from_x = first_x + i
            weight = weight_y * tl.maximum(1 - tl.abs(from_x + 0.5 - centre_x) / support_x, 0.0)
            weight = tl.where(from_x < last_x, weight, 0.0)
            total += weight
            taken = live & (weight > 0)
            if angle == 0:
                r += weight * _byte(
                    image_ptr, top + from_y, left + from_x, height, width, row_stride, pixel_stride, taken
                )
                if C == 3:
                    p = image_ptr + plane
                    g += weight * _byte(p, top + from_y, left + from_x, height, width, row_stride, pixel_stride, taken)
                    p = image_ptr + 2 * plane
                    b += weight * _byte(p, top + from_y, left + from_x, height, width, row_stride, pixel_stride, taken)
            else:
                for c in tl.static_range(C):
                    p = image_ptr + c * plane
                    value = weight * _turned(p, top + from_y, left + from_x, sine, cosine, height, width, row_stride,
                                             pixel_stride, taken)  # fmt: skip
                    if c == 0:
                        r += value
                    elif c == 1:
                        g += value
                    else:
                        b += value
    scale = 1 / (255 * tl.where(total > 0, total, 1.0))
    r, g, b = _steps(r * scale, g * scale, b * scale, params_ptr, 0.0, False, C)
    gray = tl.sum(tl.where(live, _gray(r, g, b, C), 0.0))
    tl.store(sums_ptr + view * tl.num_programs(1) + tile, gray)
    planes_ptr += view * C * size * size + at
    tl.store(planes_ptr, r, live)
    if C == 3:
        tl.store(planes_ptr + size * size, g, live)
        tl.store(planes_ptr + 2 * size * size, b, live)


@triton.jit
def _blur_of(params_ptr, size):
    """Deviation, and radius; 0: none."""
    sigma = tl.load(params_ptr + 12)
    blurs = (sigma > 0) & (sigma < 1e30)
    radius = tl.minimum(_whole(params_ptr, 13, 1, 1 << 20) // 2, size - 1)
    radius = tl.minimum(radius, tl.ceil(5 * tl.minimum(tl.where(blurs, sigma, 1.0), 1e5)).to(tl.int32))
    return sigma, tl.where(blurs, radius, 0)


@triton.jit
def _mirrored(at, size):
    at = tl.abs(at)
    return tl.where(at < size, at, 2 * size - 2 - at)


@triton.jit
def _store(out_ptr, at, live, value, params_ptr, mean, std):
    value = tl.where(value >= tl.load(params_ptr + 14), 1 - value, value)
    tl.store(out_ptr + at, rounded((value - mean) / std, out_ptr.dtype.element_ty), live)


@triton.jit
def _colour_kernel(
    planes_ptr, params_ptr, sums_ptr, out_ptr, size, tiles, mean0, mean1, mean2, std0, std1, std2,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(0).to(tl.int64)
    params_ptr += view * COLUMNS
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    x = tl.arange(0, WIDTH)[None, :]
    live = (y < size) & (x < size)
    area = size * size
    mean = 0.0
    for first in range(0, tiles, SUMS):
        tile = first + tl.arange(0, SUMS)
        mean += tl.sum(tl.load(sums_ptr + view * tiles + tile, tile < tiles, 0.0))
    mean /= area
    planes_ptr += view * C * area
    at = y * size + x
    r = tl.load(planes_ptr + at, live, 0.0)
    if C == 3:
        g, b = tl.load(planes_ptr + area + at, live, 0.0), tl.load(planes_ptr + 2 * area + at, live, 0.0)
    else:
        g, b = r, r
    r, g, b = _steps(r, g, b, params_ptr, mean, True, C)
    if C == 3 and tl.load(params_ptr + 11) != 0:
        r = _gray(r, g, b, C)
        g, b = r, r
    sigma, radius = _blur_of(params_ptr, size)
    if radius == 0:
        out_ptr += view * C * area
        _store(out_ptr, at * C, live, r, params_ptr, mean0, std0)
        if C == 3:
            _store(out_ptr, at * C + 1, live, g, params_ptr, mean1, std1)
            _store(out_ptr, at * C + 2, live, b, params_ptr, mean2, std2)
    else:
        tl.store(planes_ptr + at, r, live)
        if C == 3:
            tl.store(planes_ptr + area + at, g, live)
            tl.store(planes_ptr + 2 * area + at, b, live)
        tl.debug_barrier()  # the rows are this program's own, and now as it wrote them
        r = tl.zeros((ROWS, WIDTH), tl.float32)
        g = tl.zeros((ROWS, WIDTH), tl.float32)
        b = tl.zeros((ROWS, WIDTH), tl.float32)
        total = 0.0
        for d in range(-radius, radius + 1):
            over = d / sigma
            weight = tl.exp(-0.5 * over * over)
            total += weight
            beside = y * size + _mirrored(x + d, size)
            r += weight * tl.load(planes_ptr + beside, live, 0.0)
            if C == 3:
                g += weight * tl.load(planes_ptr + area + beside, live, 0.0)
                b += weight * tl.load(planes_ptr + 2 * area + beside, live, 0.0)
        tl.debug_barrier()
        tl.store(planes_ptr + at, r / total, live)
        if C == 3:
            tl.store(planes_ptr + area + at, g / total, live)
            tl.store(planes_ptr + 2 * area + at, b / total, live)


@triton.jit
def _columns_kernel(
    planes_ptr, params_ptr, out_ptr, size, mean0, mean1, mean2, std0, std1, std2,
    C: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(0).to(tl.int64)
    params_ptr += view * COLUMNS
    sigma, radius = _blur_of(params_ptr, size)
    if radius > 0:
        at = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
        area = size * size
        live = at < area
        y, x = at // size, at % size
        planes_ptr += view * C * area
        r = tl.zeros((PIXELS,), tl.float32)
        g = tl.zeros((PIXELS,), tl.float32)
        b = tl.zeros((PIXELS,), tl.float32)
        total = 0.0
        for d in range(-radius, radius + 1):
            over = d / sigma
            weight = tl.exp(-0.5 * over * over)
            total += weight
            beside = _mirrored(y + d, size) * size + x
            r += weight * tl.load(planes_ptr + beside, live, 0.0)
            if C == 3:
                g += weight * tl.load(planes_ptr + area + beside, live, 0.0)
                b += weight * tl.load(planes_ptr + 2 * area + beside, live, 0.0)
        out_ptr += view * C * area
        _store(out_ptr, at * C, live, r / total, params_ptr, mean0, std0)
        if C == 3:
            _store(out_ptr, at * C + 1, live, g / total, params_ptr, mean1, std1)
            _store(out_ptr, at * C + 2, live, b / total, params_ptr, mean2, std2)


# ---- launcher


def two_views(
    images: Tensor, table: Tensor | None, params: Tensor, channels: int, size: int, mean: Sequence[float],
    std: Sequence[float], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The views; the fp32 planes and sums are freed with the call."""
    V, area = len(params), size * size
    out = torch.empty((V, size, size, channels), dtype=dtype, device=images.device)
    if V:
        last = table is not None or not images.is_contiguous()
        N, H, W = (len(table), 1, 1) if table is not None else (len(images), *images.shape[2:])
        tiles = triton.cdiv(area, PIXELS)
        planes = torch.empty((V, channels, area), dtype=torch.float32, device=images.device)
        sums = torch.empty((V, tiles), dtype=torch.float32, device=images.device)
        on_device = None if table is None else table.to(images.device, non_blocking=True)
        numbers = [*mean, *mean, *mean][:3] + [*std, *std, *std][:3]
        width = triton.next_power_of_2(size)
        rows = max(1, 2 * PIXELS // width)
        with torch.cuda.device_of(images):
            _resample_kernel[(V, tiles)](
                images, on_device, params, planes, sums, N, H, W, size, C=channels, LAST=last, PIXELS=PIXELS,
                num_warps=8, maxnreg=64,
            )  # fmt: skip
            _colour_kernel[(V, triton.cdiv(size, rows))](
                planes, params, sums, out, size, tiles, *numbers, C=channels, ROWS=rows, WIDTH=width
            )
            _columns_kernel[(V, tiles)](planes, params, out, size, *numbers, C=channels, PIXELS=PIXELS)
    return out.permute(0, 3, 1, 2)
