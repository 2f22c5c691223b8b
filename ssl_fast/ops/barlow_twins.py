"""The loss of Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230, equations 1 and 2), without its D x D matrix.

a, b (N, D) are the embeddings of the two views, each column standardised over the batch; C = a^T b / N:

    loss = sum over d of (1 - C_dd)^2 + lambda (sum over d != e of C_de^2)

The diagonal costs N D. What is left is the sum of the squares of C, in one of two ways, of min(N, D) N D:

    by columns   C tile by tile, its diagonal left out                                    of 2 N D^2 flop
    by rows      |C|^2 = sum over i, j of (a_i . a_j) (b_i . b_j) / N^2, tile by tile      of 2 N^2 D flop

By rows the diagonal's squares are taken from the sum. C has rank N - 1 at most, so for 2 N <= D they are half of it at
most, and nothing cancels. Gradients are products with the same tiles, as the loss is quadratic in C: the forward takes
them while it has a tile, so that none is computed twice, and the backward is elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ssl_fast._checks import as_float, is_number
from ssl_fast._distributed import Ranks, Strategy, processes, share
from ssl_fast._op import Op, records
from ssl_fast.ops import _losses
from ssl_fast.ops._losses import accumulator, differentiable_once
from ssl_fast.ops.batch_norm import batch_norm
from ssl_fast.sync_batch_norm import sync_batch_norm

# ---- reference: products by the BLAS at hand, and next to nothing between them


def _pieces(count: int, width: int, parts: int = 1) -> Iterator[slice]:
    """At least so many parts of `count` rows of a matrix so wide: tiles of at most 2^22 numbers, but no sliver of a
    product."""
    size = max(128, min(1024, count // parts, (1 << 22) // width))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _operand(x: Tensor) -> Tensor:
    """A CPU's 16-bit products would round C."""
    return x if x.is_cuda else x.to(accumulator(x))


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y in the dtype of sums."""
    return x @ y if x.dtype == accumulator(x) else torch.mm(x, y, out_dtype=accumulator(x))


def _add_product(out: Tensor, x: Tensor, y: Tensor, alpha: float) -> None:
    """out += alpha x y, where x is in the dtype of sums, as out is."""
    if y.dtype == out.dtype:
        out.addmm_(x, y, alpha=alpha)
    else:
        out.add_(_product(x.to(y.dtype), y), alpha=alpha)


def of_diagonal(z: Tensor, other: Tensor, on_diagonal: Tensor | None, gradients: bool) -> Tensor:
    """What C's diagonal gives to the gradient for z, to add the rest to; where there are no gradients, nothing."""
    if not gradients:
        return z.new_empty(0, dtype=accumulator(z))
    if on_diagonal is None:
        return torch.zeros(z.shape, dtype=accumulator(z), device=z.device)
    return other * on_diagonal


def _rows_reference(
    a: Tensor,
    b: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    on_diagonal: Tensor | None,
    scale: float,
    weight: float,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    a, b = _operand(a), _operand(b)
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    da, db = of_diagonal(a, b, on_diagonal, gradients), of_diagonal(b, a, on_diagonal, gradients)
    symmetric = x is None or y is None
    x, y = (a, b) if x is None or y is None else (_operand(x), _operand(y))
    # Four parts of a symmetric matrix have something to spare.
    for rows in _pieces(len(a), len(x), 4 if symmetric else 1):
        others, later = slice(rows.start if symmetric else 0, None), slice(rows.stop, None)
        # In fp16's range before they are rounded.
        of_a = _product(a[rows], x[others].T).mul_(scale)
        of_b = _product(b[rows], y[others].T).mul_(scale)
        if gradients:
            for products, dz, z, own in ((of_b, da, x, a), (of_a, db, y, b)):
                _add_product(dz[rows], products, z[others], 2 * weight * scale)
                if symmetric:
                    _add_product(dz[later], products[:, rows.stop - rows.start :].T, own[rows], 2 * weight * scale)
        products = of_a.mul_(of_b)
        total += products.sum()
        if symmetric:  # what lies above the diagonal stands for what lies below
            total += products[:, rows.stop - rows.start :].sum()
    return total, da, db


def _columns_reference(
    x: Tensor, y: Tensor, on_diagonal: Tensor | None, diagonal: int, scale: float, weight: float, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, y = _operand(x), _operand(y)
    total, paired = torch.zeros((), dtype=torch.float64, device=x.device), slice(diagonal, diagonal + x.shape[1])
    dx, dy = of_diagonal(x, y[:, paired], on_diagonal, gradients), of_diagonal(y, y, None, gradients)
    if on_diagonal is not None:
        dy[:, paired] = x * on_diagonal
    for columns in _pieces(x.shape[1], y.shape[1]):
        C = _product(x[:, columns].T, y).mul_(scale)
        C.diagonal(columns.start + diagonal).zero_()
        if gradients:
            _add_product(dx[:, columns].T, C, y.T, 2 * weight * scale)
            _add_product(dy.T, C.T, x[:, columns].T, 2 * weight * scale)
        total += C.mul_(C).sum()
    return total, dx, dy


def _fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    like = [z.new_empty(z.shape if rest[-1] else (0,), dtype=accumulator(z)) for z in (x, y)]
    return x.new_empty((), dtype=torch.float64), like[0], like[1]


# ---- operators: the sum of squares, in fp64 as others are to be taken from it, and with `gradients` those of `weight`
# times it and of C's diagonal, whose entry d has the derivative on_diagonal[d] / scale

barlow_twins_rows = Op(
    "barlow_twins_rows(Tensor a, Tensor b, Tensor? x, Tensor? y, Tensor? on_diagonal, float scale, float weight, "
    "bool gradients) -> (Tensor, Tensor, Tensor)",
    _rows_reference,
    fake=_fake,
    triton="ssl_fast.kernels.barlow_twins:barlow_twins_rows",
    decides="a",
)
barlow_twins_columns = Op(
    "barlow_twins_columns(Tensor x, Tensor y, Tensor? on_diagonal, int diagonal, float scale, float weight, "
    "bool gradients) -> (Tensor, Tensor, Tensor)",
    _columns_reference,
    fake=_fake,
    triton="ssl_fast.kernels.barlow_twins:barlow_twins_columns",
    decides="x",
)


class _BarlowTwins(torch.autograd.Function):
    """The loss of standardised a, b (N, D), with `ranks` of the rows of all processes.

    By rows a process multiplies its own rows with everyone's, and owns their gradient. By columns each takes a share of
    C's rows, from all rows gathered, and gradients are reduce-scattered.

    a and b are in the dtype of sums, and C's diagonal is theirs: where the views are near each other, 1 - C_dd is far
    smaller than what rounding to 16 bits would make of it. `dtype` is that of the products on a GPU; what is taken from
    their squares is the diagonal of what they multiply, or nothing would cancel.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, lambda_param: float, ranks: Ranks | None, gradients: bool, dtype: torch.dtype
    ) -> Tensor:
        N, D = (len(a) if ranks is None else ranks.total), a.shape[1]
        by_rows = D >= 2 * N or (ranks is not None and ranks.strategy == "ring")
        inputs = a, b
        a, b = _rounded(a, dtype), _rounded(b, dtype)
        diagonals = [_diagonal(*inputs)]
        if by_rows and a.dtype != inputs[0].dtype:
            diagonals.append(_diagonal(a, b))
        sums = torch.stack(diagonals)
        if ranks is not None:
            sums = ranks.all_reduce(sums)
        diagonal, multiplied = sums[0] / N, sums[-1] / N
        on_diagonal = None
        if gradients:
            on_diagonal = 2 / N * (diagonal - 1 - (lambda_param * multiplied if by_rows else 0))
            on_diagonal = on_diagonal.to(inputs[0].dtype)
        options = (1 / N, lambda_param, gradients)
        if ranks is None and by_rows:
            squares, da, db = barlow_twins_rows(a, b, None, None, on_diagonal, *options)
        elif ranks is None:
            squares, da, db = barlow_twins_columns(a, b, on_diagonal, 0, *options)
        elif by_rows:
            squares, da, db = (
                diagonal.new_zeros(()),
                of_diagonal(a, b, None, gradients),
                of_diagonal(b, a, None, gradients),
            )

            def visit(first: int | None, x: Tensor, y: Tensor) -> list[Tensor]:
                if len(a) and len(x):
                    parts = barlow_twins_rows(a, b, x, y, None if first is None else on_diagonal, *options)
                    for whole, part in zip((squares, da, db), parts, strict=True):
                        whole.add_(part)
                return []

            ranks.meet([a, b], visit)
        else:
            own, x, y = _share(D, ranks), ranks.gather(a), ranks.gather(b)
            on_own = None if on_diagonal is None else on_diagonal[own]
            squares, own_dx, dy = barlow_twins_columns(x[:, own], y, on_own, own.start, *options)
            if gradients:
                dx = torch.zeros(x.shape, dtype=dy.dtype, device=x.device)
                dx[:, own] = own_dx
                da, db = ranks.scatter_sum(dx), ranks.scatter_sum(dy)
        if ranks is not None:
            squares = ranks.all_reduce(squares)
        if by_rows:
            squares = squares - multiplied.square().sum()
        if gradients:
            ctx.save_for_backward(da, db, *inputs)  # for what would differentiate twice
            ctx.ranks = ranks
        return ((1 - diagonal).square().sum() + lambda_param * squares).to(inputs[0].dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.ranks is not None:
            grad = ctx.ranks.all_reduce(grad)
        da, db, *_ = ctx.saved_tensors
        return da * grad, db * grad, None, None, None, None


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As it is multiplied."""
    return x.to(dtype) if x.is_cuda else x


def _diagonal(a: Tensor, b: Tensor) -> Tensor:
    """N times C's diagonal, in fp64."""
    diagonal = a.new_zeros(a.shape[1], dtype=torch.float64)
    for rows in _pieces(len(a), a.shape[1]):
        diagonal += (a[rows].to(accumulator(a)) * b[rows].to(accumulator(b))).sum(0, dtype=torch.float64)
    return diagonal


def _share(D: int, ranks: Ranks) -> slice:
    """This rank's rows of C."""
    return slice(D * ranks.rank // ranks.world, D * (ranks.rank + 1) // ranks.world)


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float = 5e-3,
    *,
    eps: float = 1e-5,
    gather_distributed: bool = False,
    group: Any = None,
    strategy: Strategy = "gather",
) -> Tensor:
    """Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230, equations 1 and 2), in memory of order N D.

    Equivalent to:
        a, b = (F.batch_norm(z, None, None, training=True, eps=eps) for z in (z_a, z_b))
        C = a.T @ b / N; off = C - C.diagonal().diag()
        (1 - C.diagonal()).square().sum() + lambda_param * off.square().sum()

    Args:
        z_a, z_b: (N, D) embeddings of the two views, N >= 2, fp16, bf16, fp32 or fp64. C is fp32 (fp64 for fp64).
        lambda_param: the weight of the redundancy, what lies beside the diagonal.
        eps: added to the biased variances.
        gather_distributed, group, strategy: let the rows of all processes be one batch: statistics and C are those of
            all rows. Each process brings its own N, 0 too, and returns the loss of the whole; the backward is that of
            the sum over processes, so that the mean over them, as DistributedDataParallel takes it, is the gradient of
            one process with the whole batch. "gather" brings all rows to each; "ring" passes blocks of them around, in
            memory that does not grow with the number of processes.

    Returns:
        The loss in fp32 (fp64 for fp64). Its gradient is not differentiable again.

    Raises:
        ValueError, TypeError: naming the argument, for shapes or dtypes that do not fit.
        RuntimeError: where another process of the group ends or stays silent for longer than the group's time-out.

    Example:
        >>> loss = barlow_twins(model(view1), model(view2))
    """
    group = processes(gather_distributed, group, strategy)
    z_a, z_b = _losses.check_embeddings("z_a", z_a, "z_b", z_b, empty=group is not None)
    check_weights(lambda_param, eps)
    eps = float(eps)
    ranks = share(z_a, group, strategy, z_a_requires_grad=records(z_a), z_b_requires_grad=records(z_b))
    rows = len(z_a) if ranks is None else ranks.total
    if rows < 2:
        raise ValueError(f"z_a: got {rows} row, allowed: at least 2 to standardise over; use a larger batch")
    of_both = (z.to(accumulator(z)) for z in (z_a, z_b))
    if ranks is None:
        a, b = (batch_norm(z, None, None, training=True, eps=eps) for z in of_both)
    else:
        with ranks.answered():
            a, b = (sync_batch_norm(z, ranks.group, eps) for z in of_both)
    return _BarlowTwins.apply(a, b, float(lambda_param), ranks, records(a, b), z_a.dtype)


def check_weights(lambda_param: object, eps: object = 1e-5) -> None:
    for name, value in (("lambda_param", lambda_param), ("eps", eps)):
        if not is_number(value) or not 0 <= as_float(value) < math.inf:
            raise ValueError(f"{name}: got {value!r}, allowed: a finite number >= 0")


class BarlowTwinsLoss(nn.Module):
    """The loss of Barlow Twins as a module; a drop-in for lightly.loss.BarlowTwinsLoss that never holds a D x D matrix.

    Equivalent to: lightly.loss.BarlowTwinsLoss(lambda_param)(z_a, z_b). Over several processes lightly standardises by
    each one's own statistics, this loss by those of all rows, as one process with the whole batch would.

    Args:
        lambda_param: the weight of the redundancy.
        gather_distributed: let the rows of all processes be one batch.
        options: keyword arguments of `ssl_fast.functional.barlow_twins`: eps, group, strategy.

    Shape:
        z_a, z_b: (N, D). Returns a scalar, fp32 (fp64 for fp64 inputs).

    Example:
        >>> loss = BarlowTwinsLoss()(model(view1), model(view2))
    """

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False, **options: Any) -> None:
        super().__init__()
        _losses.check_module(self, barlow_twins, {"gather_distributed": gather_distributed, **options})
        check_weights(lambda_param, options.get("eps", 1e-5))
        self.lambda_param = lambda_param
        self.options = {"gather_distributed": gather_distributed, **options}

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return barlow_twins(z_a, z_b, self.lambda_param, **self.options)

    def extra_repr(self) -> str:
        return f"lambda_param={self.lambda_param}"
