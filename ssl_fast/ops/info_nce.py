"""Contrastive losses between two sets of rows, without their similarity matrix: the operators, and InfoNCE.

x (N, D) meets y (K, D), unit rows where normalize; s_ij = x_i . y_j. What every loss here needs is

    lse_i = log(sum over j of exp(s_ij / t)),  j over the columns that row i may see
    P_ij  = exp(s_ij / t - lse_i)

and the same over the rows of a column. A column is left out where j = i + diagonal, or where its id equals the row's:
so positives and false negatives never enter a matrix product, where their weights would be rounded to 16 bits.

An lse is kept as its largest similarity, the shift, and log_sum, so that P = exp((s - shift) / t - log_sum) has its
digits where logits are large. docs/kernels.md has the arithmetic of every backend. _info_nce_clip.py has CLIP, and
_info_nce_sup_con.py the losses of rows against each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_fast._distributed import Ranks, Strategy, processes, share
from ssl_fast._op import HALF_AND_FLOAT, Op, records, without_autocast
from ssl_fast.ops import _losses
from ssl_fast.ops._losses import Reduction, accumulator, apart, differentiable_once, positive, tangent, to_rows

# ---- reference: the definition, and the fallback on any device


def _blocks(
    x: Tensor, y: Tensor, x_ids: Tensor | None, y_ids: Tensor | None, diagonal: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of x's rows with their similarities (B, K), -inf where a column is left out. A block holds about as many
    numbers as y: memory is O(K D)."""
    size = max(16, min(1024, y.shape[1] * 2))
    for start in range(0, len(x), size):
        block = slice(start, min(start + size, len(x)))
        s = x[block] @ y.T
        if x_ids is not None and y_ids is not None:
            s.masked_fill_(x_ids[block, None] == y_ids, -torch.inf)
        if diagonal is not None:
            s.diagonal(start + diagonal).fill_(-torch.inf)
        yield block, s


def _add_stats(stats: Tensor, s: Tensor, t: Tensor) -> None:
    """Merge columns s (B, K) into the stats (4, B) of its rows: lse, shift, log_sum, mean."""
    shift = torch.maximum(stats[1], s.amax(1))
    finite = torch.where(shift == -torch.inf, 0, shift)
    e = torch.exp((s - finite[:, None]) / t)
    before = torch.exp((stats[1] - finite) / t + stats[2])
    total = before + e.sum(1)
    moment = torch.where(total == before, 0, (e * s.masked_fill(s == -torch.inf, 0)).sum(1))
    stats[3] = torch.where(total == 0, 0, (before * stats[3] + moment) / total)
    stats[2] = total.log()
    stats[1] = shift
    stats[0] = finite / t + stats[2]


def _empty_stats(n: int, like: Tensor) -> Tensor:
    stats = like.new_zeros(4, n)
    stats[:3] = -torch.inf
    stats[2] = 0  # exp((-inf - shift) / t + 0) is the empty sum
    return stats


def _fwd_reference(
    x: Tensor,
    y: Tensor,
    temperature: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    diagonal: int | None,
    normalize: bool,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    x, y, t = to_rows(x, normalize), to_rows(y, normalize), positive(temperature)
    of_rows, of_columns = _empty_stats(len(x), x), _empty_stats(len(y) if columns else 0, x)
    for block, s in _blocks(x, y, x_ids, y_ids, diagonal):
        _add_stats(of_rows[:, block], s, t)
        if columns:
            _add_stats(of_columns, s.T, t)
    return of_rows, of_columns


def _softmax(s: Tensor, t: Tensor, stats: Tensor) -> Tensor:
    """P (B, K) from its rows' stats; rows that see nothing are zero."""
    shift = torch.where(stats[1] == -torch.inf, 0, stats[1])
    return torch.exp((s - shift[:, None]) / t - stats[2][:, None]).masked_fill(s == -torch.inf, 0)


def _bwd_reference(
    grad_lse: Tensor,
    grad_column_lse: Tensor | None,
    x: Tensor,
    y: Tensor,
    temperature: Tensor,
    of_rows: Tensor,
    of_columns: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    diagonal: int | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    xhat, yhat, t = to_rows(x, normalize), to_rows(y, normalize), positive(temperature)
    dx, dy = torch.empty_like(xhat), torch.zeros_like(yhat)
    for block, s in _blocks(xhat, yhat, x_ids, y_ids, diagonal):
        weight = grad_lse[block, None] * _softmax(s, t, of_rows[:, block])
        if grad_column_lse is not None:
            weight += (grad_column_lse[:, None] * _softmax(s.T, t, of_columns)).T
        dx[block] = weight @ yhat / t
        dy += weight.T @ xhat[block] / t
    return (tangent(dx, xhat, x), tangent(dy, yhat, y)) if normalize else (dx, dy)


def _one_pass_reference(
    x: Tensor,
    y: Tensor,
    temperature: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    diagonal: int | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    xhat, yhat, t = to_rows(x, normalize), to_rows(y, normalize), positive(temperature)
    stats, out = _empty_stats(len(x), xhat), torch.empty_like(xhat)
    for block, s in _blocks(xhat, yhat, x_ids, y_ids, diagonal):
        _add_stats(stats[:, block], s, t)
        out[block] = _softmax(s, t, stats[:, block]) @ yhat
    return stats, out


# ---- shapes


def _fwd_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    columns = rest[-1]
    dtype = accumulator(x)
    return x.new_empty(4, x.shape[0], dtype=dtype), x.new_empty(4, y.shape[0] if columns else 0, dtype=dtype)


def _bwd_fake(grad_lse: Tensor, grad_column_lse: Tensor, x: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulator(x)
    return x.new_empty(x.shape, dtype=dtype), y.new_empty(y.shape, dtype=dtype)


def _one_pass_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulator(x)
    return x.new_empty(4, x.shape[0], dtype=dtype), x.new_empty(x.shape, dtype=dtype)


# ---- operators

info_nce_fwd = Op(
    "info_nce_fwd(Tensor x, Tensor y, Tensor temperature, Tensor? x_ids, Tensor? y_ids, int? diagonal, bool normalize, "
    "bool columns) -> (Tensor, Tensor)",
    _fwd_reference,
    fake=_fwd_fake,
    native={"cpu": HALF_AND_FLOAT},
    triton="ssl_fast.kernels.info_nce:info_nce_fwd",
    decides="x",
)
info_nce_bwd = Op(
    "info_nce_bwd(Tensor grad_lse, Tensor? grad_column_lse, Tensor x, Tensor y, Tensor temperature, Tensor of_rows, "
    "Tensor of_columns, Tensor? x_ids, Tensor? y_ids, int? diagonal, bool normalize) -> (Tensor, Tensor)",
    _bwd_reference,
    fake=_bwd_fake,
    native={"cpu": HALF_AND_FLOAT},
    triton="ssl_fast.kernels.info_nce:info_nce_bwd",
    decides="x",
)
info_nce_one_pass = Op(
    "info_nce_one_pass(Tensor x, Tensor y, Tensor temperature, Tensor? x_ids, Tensor? y_ids, int? diagonal, "
    "bool normalize) -> (Tensor, Tensor)",
    _one_pass_reference,
    fake=_one_pass_fake,
    native={"cpu": HALF_AND_FLOAT, "cuda": HALF_AND_FLOAT},
    triton="ssl_fast.kernels.info_nce:info_nce_one_pass",
    decides="x",
)


# ---- autograd


# The operators multiply in `dtype`, which may be narrower than x and y; gradients are rounded to the dtype of x and y
# alone. Where these are the rows in the dtype of sums, what a positive adds meets the rest of the gradient unrounded;
# in a narrow cone they nearly cancel.


class _LogSumExp(torch.autograd.Function):
    """lse of the rows, (N,), of the columns, (K,) or empty, and with a diagonal of 0 and K = N, s_ii, (N,), or empty.

    s_ii is here for its gradient's sake, which is added to the operator's where it lies; autograd would hold both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        temperature: Tensor,
        x_ids: Tensor | None,
        y_ids: Tensor | None,
        diagonal: int | None,
        normalize: bool,
        columns: bool,
        pairs: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.given = x.dtype, y.dtype
        x, y = x.to(dtype), y.to(dtype)
        ctx.backend, forward = info_nce_fwd.chosen(x)
        ctx.diagonal, ctx.normalize, ctx.columns, ctx.pairs = diagonal, normalize, columns, pairs
        stats = forward(x, y, temperature, x_ids, y_ids, diagonal, normalize, columns)
        pos = (to_rows(x, normalize) * to_rows(y, normalize)).sum(1) if pairs else stats[0].new_empty(0)
        ctx.save_for_backward(x, y, temperature, x_ids, y_ids, *stats, pos)
        ctx.set_materialize_grads(False)
        return stats[0][0].clone(), stats[1][0].clone(), pos.clone()

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, grad_lse: Tensor | None, grad_column_lse: Tensor | None, grad_pos: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, y, temperature, x_ids, y_ids, of_rows, of_columns, pos = ctx.saved_tensors
        if grad_lse is None:
            grad_lse = torch.zeros_like(of_rows[0])
        if not ctx.columns:  # compiled, a gradient that nobody asked for is no None
            grad_column_lse = None
        dx = dy = dt = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dx, dy = info_nce_bwd(
                grad_lse, grad_column_lse, x, y, temperature, of_rows, of_columns, x_ids, y_ids, ctx.diagonal,
                ctx.normalize, backend=ctx.backend,
            )  # fmt: skip
            if ctx.pairs and grad_pos is not None:
                _add_pair_gradient(dx, dy, grad_pos, pos, x, y, ctx.normalize)
            dx, dy = dx.to(ctx.given[0]), dy.to(ctx.given[1])
        if ctx.needs_input_grad[2]:
            dt = (grad_lse * of_rows[3]).sum()  # d lse / dt = -E_P[s] / t^2
            if grad_column_lse is not None:
                dt = dt + (grad_column_lse * of_columns[3]).sum()
            dt = -dt / temperature**2
        return dx, dy, dt, None, None, None, None, None, None, None


def _add_pair_gradient(
    dx: Tensor, dy: Tensor, grad: Tensor, pos: Tensor, x: Tensor, y: Tensor, normalize: bool
) -> None:
    """Add the gradients of s_ii = x_i . y_i, of unit rows where normalize, to dx and dy in place."""
    if not normalize:
        dx.addcmul_(y, grad[:, None])
        dy.addcmul_(x, grad[:, None])
        return
    x_norm, y_norm = (torch.linalg.vector_norm(z, dim=1, dtype=pos.dtype) for z in (x, y))
    cross = grad / (x_norm.clamp(min=1e-12) * y_norm.clamp(min=1e-12))
    for dz, z, other, norm in ((dx, x, y, x_norm), (dy, y, x, y_norm)):
        along = torch.where(norm < 1e-12, 0, grad * pos / norm**2)
        dz.addcmul_(other, cross[:, None]).addcmul_(z, along[:, None], value=-1)


class _OnePass(torch.autograd.Function):
    """lse of the rows, (N,), where y carries no gradient: the forward takes softmax(x y^T) y along, (N, D), and the
    backward is elementwise. y is not kept: it may be written over at once, as a queue is."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        temperature: Tensor,
        x_ids: Tensor | None,
        y_ids: Tensor | None,
        diagonal: int | None,
        normalize: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.given = x.dtype, y.dtype
        x, y = x.to(dtype), y.to(dtype)
        stats, out = info_nce_one_pass(x, y, temperature, x_ids, y_ids, diagonal, normalize)
        ctx.normalize = normalize
        ctx.save_for_backward(x, temperature, stats, out)
        return stats[0].clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        x, temperature, stats, out = ctx.saved_tensors
        dx = dt = None
        if ctx.needs_input_grad[0]:
            dx = out * (grad_lse / temperature)[:, None]
            if ctx.normalize:
                dx = tangent(dx, to_rows(x, True), x)
            dx = dx.to(ctx.given[0])
        if ctx.needs_input_grad[2]:
            dt = -(grad_lse * stats[3]).sum() / temperature**2
        return dx, None, dt, None, None, None, None, None


# ---- autograd over the ranks of a process group


def _merge_stats(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """The stats (4, N) of rows over two sets of columns."""
    shift = torch.maximum(a[1], b[1])
    finite = torch.where(shift == -torch.inf, 0, shift)
    in_a, in_b = (torch.exp((stats[1] - finite) / t + stats[2]) for stats in (a, b))
    total = in_a + in_b
    mean = torch.where(total == 0, 0, (in_a * a[3] + in_b * b[3]) / total)
    return torch.stack([finite / t + total.log(), shift, total.log(), mean])


def _merge_columns(t: Tensor) -> Any:
    """_merge_stats of stats (N, 4), as they travel with their rows."""
    return lambda a, b: _merge_stats(a.T, b.T, t).T


class _AcrossRanks(torch.autograd.Function):
    """_LogSumExp, without s_ii, of this rank's x against the y of every rank, and of its y against every x. `paired`:
    row i does not see column i of its own rank.

    Neither strategy keeps the others' rows for the backward: they come a second time, and what is owed to them goes
    back, reduce-scattered or along the ring.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        temperature: Tensor,
        x_ids: Tensor | None,
        y_ids: Tensor | None,
        paired: bool,
        normalize: bool,
        columns: bool,
        ranks: Ranks,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.given = x.dtype, y.dtype
        x, y = x.to(dtype), y.to(dtype)
        ctx.backend = info_nce_fwd.backend_for(x)
        ctx.paired, ctx.normalize, ctx.columns, ctx.ranks = paired, normalize, columns, ranks
        t = positive(temperature)
        of_rows = _empty_stats(len(x), t)

        def visit(diagonal: int | None, y: Tensor, y_ids: Tensor | None) -> list[Tensor]:
            nonlocal of_rows
            of_y = _empty_stats(len(y), t)
            if len(x) and len(y):
                of_x, of_y = info_nce_fwd(
                    x, y, temperature, x_ids, y_ids, diagonal if paired else None, normalize, columns,
                    backend=ctx.backend,
                )  # fmt: skip
                of_rows = _merge_stats(of_rows, of_x, t)
            return [of_y.T] if columns else []

        owed = ranks.meet([y, y_ids], visit, _merge_columns(t))
        of_columns = owed[0].T.contiguous() if columns else _empty_stats(0, t)
        ctx.save_for_backward(x, y, temperature, x_ids, y_ids, of_rows, of_columns)
        return of_rows[0].clone(), of_columns[0].clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_lse: Tensor, grad_column_lse: Tensor) -> tuple[Tensor | None, ...]:
        x, y, temperature, x_ids, y_ids, of_rows, of_columns = ctx.saved_tensors
        h, stats = (grad_column_lse, of_columns.T) if ctx.columns else (None, None)
        dx = x.new_zeros(x.shape, dtype=accumulator(x))
        dy = None

        def visit(
            diagonal: int | None, y: Tensor, y_ids: Tensor | None, h: Tensor | None, stats: Tensor | None
        ) -> list[Tensor]:
            dy = y.new_zeros(y.shape, dtype=dx.dtype)
            if len(x) and len(y):
                of_y = of_columns if stats is None else stats.T.contiguous()
                parts = info_nce_bwd(
                    grad_lse, h, x, y, temperature, of_rows, of_y, x_ids, y_ids, diagonal if ctx.paired else None,
                    ctx.normalize, backend=ctx.backend,
                )  # fmt: skip
                dx.add_(parts[0])
                dy = parts[1]
            return [dy] if ctx.needs_input_grad[1] else []

        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            owed = ctx.ranks.meet([y, y_ids, h, stats], visit)
            dy = owed[0].to(ctx.given[1]) if owed else None
        dt = -((grad_lse * of_rows[3]).sum() + (grad_column_lse * of_columns[3]).sum()) / temperature**2
        return dx.to(ctx.given[0]), dy, dt, None, None, None, None, None, None, None


def log_sum_exp(
    x: Tensor,
    y: Tensor,
    temperature: Tensor,
    *,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    diagonal: int | None = None,
    normalize: bool = True,
    ranks: Ranks | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(N,) log of the sum over the columns, of all ranks, of exp(x_i . y_j / t), with products in `dtype`, x's where
    None; in one pass where y needs no gradient and there is one rank."""
    dtype = dtype or x.dtype
    (x, y), (x_ids, y_ids) = apart(x, y), apart(x_ids, y_ids)
    if ranks is not None:
        return _AcrossRanks.apply(x, y, temperature, x_ids, y_ids, diagonal == 0, normalize, False, ranks, dtype)[0]
    if not (torch.is_grad_enabled() and y.requires_grad):
        return _OnePass.apply(x, y, temperature, x_ids, y_ids, diagonal, normalize, dtype)
    return _LogSumExp.apply(x, y, temperature, x_ids, y_ids, diagonal, normalize, False, False, dtype)[0]


# ---- function


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    paired_negative_keys: Tensor | None = None,
    in_batch: bool | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    label_smoothing: float = 0.0,
    decoupled: bool = False,
    tau_plus: float = 0.0,
    group_ids: Tensor | None = None,
    negative_group_ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    gather_distributed: bool = False,
    group: Any = None,
    strategy: Strategy = "gather",
) -> Any:
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equation 4; MoCo, arXiv 1911.05722, equation 1).

    Row i of positive_key is the positive of query i. Its negatives are every row of negative_keys (a queue, or any
    bank), its own paired_negative_keys, and with `in_batch` the other rows of positive_key. No matrix of similarities
    is held. Where negative_keys carry no gradient, one pass over them gives the loss and the gradient for the queries,
    and nothing of them is kept: they may be written over before backward().

    Equivalent to, with every row normalised:
        logits = torch.cat([(query * positive_key).sum(1, keepdim=True), query @ negative_keys.T], 1) / temperature
        F.cross_entropy(logits, torch.zeros(N, dtype=torch.long), reduction=reduction)

    Args:
        query, positive_key: (N, D), fp16, bf16, fp32 or fp64, any strides.
        negative_keys: (K, D), shared by all queries.
        temperature: a float above 0, or a tensor of one element, which gets a gradient.
        paired_negative_keys: (N, M, D), for each query its own; group_ids do not concern them.
        in_batch: whether the other queries' positives are negatives. Default: where no other negatives are given.
        normalize: divide every row by its L2 norm, as F.normalize.
        reduction: "mean" and "sum" give a scalar, "none" the losses (N,).
        return_lse: also return the (N,) log-sum-exp of each row's logits, the positive's included.
        label_smoothing, decoupled, tau_plus: F.cross_entropy's smoothing; the positive left out of the denominator
            (DCL, arXiv 2110.06848); the probability of false negatives to correct for (arXiv 2007.00224), where the
            sum over the negatives stays at least what rows of unit length can give, exp(-1 / t) each.
        group_ids, negative_group_ids: (N,) and (K,) integers: a negative of the query's group is a known false one, and
            left out. In the batch group_ids alone decides; the positive always counts.
        sample_weight: (N,) weights of the rows; the mean becomes the weighted one.
        gather_distributed, group, strategy: as in `nt_xent`; in_batch then means the positives of all processes.
            negative_keys are the same on each, as a queue is that all keys enter; paired_negative_keys are its own.

    Returns:
        The loss in fp32 (fp64 for fp64), or (loss, lse).

    Raises:
        ValueError, TypeError: naming the argument, for shapes, dtypes or combinations that do not fit.

    Example:
        >>> loss = info_nce(q, k, queue.keys, temperature=0.07)
    """
    group = processes(gather_distributed, group, strategy)
    query, positive_key = _losses.check_embeddings(
        "query", query, "positive_key", positive_key, empty=group is not None
    )
    N, device = len(query), query.device
    t = _losses.check_temperature(temperature, query)
    if in_batch is None:
        in_batch = negative_keys is None and paired_negative_keys is None
    _losses.check_options(
        reduction, label_smoothing=label_smoothing, tau_plus=tau_plus, group_ids=group_ids, decoupled=decoupled,
        in_batch=in_batch, normalize=normalize, return_lse=return_lse,
    )  # fmt: skip
    group_ids = _losses.check_per_row("group_ids", group_ids, N, device, integer=True)
    _losses.check_per_row("sample_weight", sample_weight, N, device, integer=False)
    if group_ids is not None and not in_batch and negative_keys is None:
        raise ValueError(
            "group_ids: got ids with paired_negative_keys alone, allowed: with negative_keys or in_batch=True; drop "
            "false negatives from paired_negative_keys"
        )
    if negative_group_ids is not None and negative_keys is None:
        raise ValueError("negative_group_ids: got ids without negative_keys, allowed: the ids of negative_keys")

    ranks = share(
        query, group, strategy, requires_grad=records(query, positive_key, t), keys_require_grad=records(positive_key),
        in_batch=in_batch, group_ids=group_ids is not None, sample_weight=sample_weight is not None,
        label_smoothing=bool(label_smoothing),
    )  # fmt: skip
    q, k = to_rows(query, False), to_rows(positive_key, False)
    pos = (to_rows(q, normalize) * to_rows(k, normalize)).sum(1)
    lses: list[Tensor] = []
    negatives: int | Tensor = 0
    negative_sum = torch.zeros_like(pos) if label_smoothing else None

    @without_autocast
    def total(keys: Tensor, ranks: Ranks | None = None) -> Tensor:
        keys = to_rows(keys, False)
        length = torch.linalg.vector_norm(keys, dim=1).clamp(min=1e-12) if normalize else keys.new_ones(len(keys))
        return to_rows(q, normalize) @ _losses.total(length.reciprocal() @ keys, ranks)

    if in_batch:
        lses.append(
            log_sum_exp(
                q, k, t, x_ids=group_ids, y_ids=group_ids, diagonal=0, normalize=normalize, ranks=ranks,
                dtype=query.dtype,
            )
        )  # fmt: skip
        alike: int | Tensor = 1
        if group_ids is not None:
            alike = matches(group_ids, group_ids if ranks is None else ranks.gather(group_ids))
        negatives = negatives + ((N if ranks is None else ranks.total) - alike)
        if negative_sum is not None:
            negative_sum = negative_sum + total(k, ranks) - pos
    if negative_keys is not None:
        query, negative_keys = _losses.check_embeddings(
            "query", query, "negative_keys", negative_keys, alike=False, empty=group is not None
        )
        K = len(negative_keys)
        if (negative_group_ids is None) != (group_ids is None):
            raise ValueError(
                "negative_group_ids: got " + ("None" if negative_group_ids is None else "ids without group_ids")
                + f", allowed: ids of the queries as group_ids (N={N}) and of the keys as negative_group_ids (K={K}), "
                "or neither"
            )  # fmt: skip
        negative_group_ids = _losses.check_per_row("negative_group_ids", negative_group_ids, K, device, integer=True)
        ids = (group_ids, negative_group_ids)
        if N:
            lses.append(
                log_sum_exp(
                    q, negative_keys, t, x_ids=ids[0], y_ids=ids[1], normalize=normalize, dtype=negative_keys.dtype
                )
            )
        else:  # on a process without rows
            lses.append(q.sum(1) + negative_keys.sum() * t)
        same = 0 if group_ids is None or negative_group_ids is None else matches(group_ids, negative_group_ids)
        negatives = negatives + (K - same)
        if negative_sum is not None:
            negative_sum = negative_sum + total(negative_keys)
    if paired_negative_keys is not None:
        paired = paired_negative_keys
        if not isinstance(paired, Tensor):
            raise TypeError(f"paired_negative_keys: got {type(paired).__name__}, allowed: a torch.Tensor (N, M, D)")
        if paired.dim() != 3 or paired.shape[0] != N or paired.shape[2] != query.shape[1] or paired.shape[1] == 0:
            raise ValueError(
                f"paired_negative_keys: got shape {tuple(paired.shape)}, allowed: (N, M, D) = "
                f"({N}, M, {query.shape[1]}), M >= 1; leave it out where there are none"
            )
        if N:
            _, rows = _losses.check_embeddings(
                "query", query, "paired_negative_keys", paired.flatten(0, 1), alike=False
            )
            paired = rows.view_as(paired)
        s = _paired_similarities(to_rows(q, normalize), to_rows(paired, normalize))
        lses.append(torch.logsumexp(s / positive(t), 1))
        negatives = negatives + paired.shape[1]
        if negative_sum is not None:
            negative_sum = negative_sum + s.sum(1)
    if not lses:
        raise ValueError(
            "negative_keys: got None with in_batch=False, allowed: a tensor (K, D), paired_negative_keys, or "
            "in_batch=True"
        )

    lse = lses[0]
    for other in lses[1:]:  # both are -inf where a row sees no negative in either, and have no gradient there
        none = (lse == -torch.inf) & (other == -torch.inf)
        both = torch.logaddexp(lse.masked_fill(none, 0), other.masked_fill(none, 0))
        lse = both.masked_fill(none, -torch.inf)
    scaled = pos / positive(t)
    loss = _losses.row_loss(
        lse - scaled, pos, temperature=t, negatives=negatives, decoupled=decoupled, tau_plus=tau_plus,
        label_smoothing=label_smoothing, negative_sum=negative_sum,
    )  # fmt: skip
    loss = _losses.reduce(loss, reduction, sample_weight, ranks)
    return (loss, torch.logaddexp(lse, scaled)) if return_lse else loss


@without_autocast
def _paired_similarities(x: Tensor, y: Tensor) -> Tensor:
    """(N, M) of x (N, D) and y (N, M, D), in their dtype."""
    return torch.einsum("nd,nmd->nm", x, y)


def matches(ids: Tensor, others: Tensor) -> Tensor:
    """For each id how many of the others are equal to it, in O(K log K) and without a matrix."""
    ordered = others.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


# ---- module


class InfoNCE(nn.Module):
    """InfoNCE as a module; a drop-in for info_nce.InfoNCE of info-nce-pytorch without its similarity matrix.

    Equivalent to: info_nce.InfoNCE(temperature, reduction, negative_mode)(query, positive_key, negative_keys).

    Args:
        temperature: a float above 0, or a tensor of one element; an nn.Parameter is learned with the model.
        reduction: "mean", "sum" or "none".
        negative_mode: "unpaired", negative_keys (K, D) for all queries; or "paired", (N, M, D), for each its own.
        options: keyword arguments of `ssl_fast.functional.info_nce`, such as in_batch, gather_distributed or decoupled.

    Shape:
        query, positive_key: (N, D). Without negative_keys the other positives of the batch are the negatives.

    Example:
        >>> loss = InfoNCE(temperature=0.07)(query, positive_key, queue.keys)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: Reduction = "mean",
        negative_mode: Literal["unpaired", "paired"] = "unpaired",
        **options: Any,
    ) -> None:
        super().__init__()
        _losses.check_temperature_alone(temperature)
        _losses.check_module(self, info_nce, {"reduction": reduction, **options}, "paired_negative_keys")
        if negative_mode not in ("unpaired", "paired"):
            raise ValueError(f"negative_mode: got {negative_mode!r}, allowed: 'unpaired', 'paired'")
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode
        self.options = options

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, **per_call: Any
    ) -> Tensor:
        name = "negative_keys" if self.negative_mode == "unpaired" else "paired_negative_keys"
        negatives: dict[str, Any] = {} if negative_keys is None else {name: negative_keys}
        options = {"reduction": self.reduction, **self.options, **per_call}
        return info_nce(query, positive_key, temperature=self.temperature, **negatives, **options)

    def extra_repr(self) -> str:
        t = self.temperature
        return (
            f"temperature={'learned' if isinstance(t, nn.Parameter) else t}, reduction={self.reduction!r}, "
            f"negative_mode={self.negative_mode!r}"
        )
