"""Losses of rows against each other, the symmetric case of ssl_fast/ops/info_nce.py, where no row sees itself nor the
rows of its id: SupCon, and the log-sum-exp that NT-Xent's variants need.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_fast._distributed import Ranks, Strategy, processes, share
from ssl_fast._op import HALF_AND_FLOAT, Op, records
from ssl_fast.ops import _losses
from ssl_fast.ops._losses import Reduction, accumulator, differentiable_once, positive, tangent, to_rows
from ssl_fast.ops.info_nce import (
    _AcrossRanks,
    _add_stats,
    _blocks,
    _empty_stats,
    _merge_columns,
    _merge_stats,
    _softmax,
    info_nce_bwd,
    info_nce_fwd,
    matches,
)

# ---- reference


def _alike(labels: Tensor, block: slice) -> Tensor:
    """(B, M), the other rows of a row's label."""
    alike = labels[block, None] == labels
    alike.diagonal(block.start).fill_(False)
    return alike


def _sup_con_fwd_reference(
    z: Tensor, labels: Tensor | None, ids: Tensor | None, temperature: Tensor, normalize: bool
) -> Tensor:
    if labels is not None and ids is not None:
        raise ValueError("sup_con: got labels and ids, allowed: one of them")
    z, t = to_rows(z, normalize), positive(temperature)
    stats = torch.cat([_empty_stats(len(z), z), z.new_zeros(2, len(z))])
    for block, s in _blocks(z, z, ids, ids, 0):
        _add_stats(stats[:4, block], s, t)
        if labels is None:
            continue
        alike = _alike(labels, block)
        stats[4, block] = s.masked_fill(~alike, 0).sum(1)
        stats[5, block] = alike.sum(1).to(s.dtype)
    return stats


def _sup_con_bwd_reference(
    grad_lse: Tensor,
    grad_positives: Tensor | None,
    z: Tensor,
    labels: Tensor | None,
    ids: Tensor | None,
    temperature: Tensor,
    stats: Tensor,
    normalize: bool,
) -> Tensor:
    zhat, t = to_rows(z, normalize), positive(temperature)
    dz = torch.empty_like(zhat)
    for block, s in _blocks(zhat, zhat, ids, ids, 0):
        # One weight for both roles of z_j, the positives' own term in it: subtracted later, it would have to cancel.
        weight = grad_lse[block, None] * _softmax(s, t, stats[:, block])
        weight += (grad_lse[:, None] * _softmax(s.T, t, stats)).T
        weight /= t
        if labels is not None and grad_positives is not None:
            weight += _alike(labels, block) * (grad_positives[block, None] + grad_positives)
        dz[block] = weight @ zhat
    return tangent(dz, zhat, z) if normalize else dz


# ---- operators

sup_con_fwd = Op(
    "sup_con_fwd(Tensor z, Tensor? labels, Tensor? ids, Tensor temperature, bool normalize) -> Tensor",
    _sup_con_fwd_reference,
    fake=lambda z, *_: z.new_empty(6, z.shape[0], dtype=accumulator(z)),
    native={"cpu": HALF_AND_FLOAT},
    triton="ssl_fast.kernels.info_nce:sup_con_fwd",
    decides="z",
)
sup_con_bwd = Op(
    "sup_con_bwd(Tensor grad_lse, Tensor? grad_positives, Tensor z, Tensor? labels, Tensor? ids, Tensor temperature, "
    "Tensor stats, bool normalize) -> Tensor",
    _sup_con_bwd_reference,
    fake=lambda grad_lse, grad_positives, z, *_: z.new_empty(z.shape, dtype=accumulator(z)),
    native={"cpu": HALF_AND_FLOAT},
    triton="ssl_fast.kernels.info_nce:sup_con_bwd",
    decides="z",
)


# ---- autograd


class _SupCon(torch.autograd.Function):
    """lse over the other rows of z whose ids differ, (M,), and over those of equal labels the sum of the similarities,
    (M,), and their number."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        labels: Tensor | None,
        ids: Tensor | None,
        temperature: Tensor,
        normalize: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.given, z = z.dtype, z.to(dtype)
        ctx.backend, forward = sup_con_fwd.chosen(z)
        ctx.normalize = normalize
        stats = forward(z, labels, ids, temperature, normalize)
        ctx.save_for_backward(z, labels, ids, temperature, stats)
        lse, positives, count = stats[0].clone(), stats[4].clone(), stats[5].clone()
        ctx.mark_non_differentiable(count)
        return lse, positives, count

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_lse: Tensor, grad_positives: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        z, labels, ids, temperature, stats = ctx.saved_tensors
        dz = dt = None
        if ctx.needs_input_grad[0]:
            h = None if labels is None else grad_positives
            dz = sup_con_bwd(grad_lse, h, z, labels, ids, temperature, stats, ctx.normalize, backend=ctx.backend)
            dz = dz.to(ctx.given)
        if ctx.needs_input_grad[3]:
            dt = -(grad_lse * stats[3]).sum() / temperature**2
        return dz, None, None, dt, None, None


class _RingOfOthers(torch.autograd.Function):
    """lse of this rank's z against the other rows of every rank whose ids differ. S is symmetric, so that half a turn
    of the ring meets each pair of ranks once; of two that face each other each takes half of the first one's rows."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        ids: Tensor | None,
        temperature: Tensor,
        normalize: bool,
        ranks: Ranks,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.given, z = z.dtype, z.to(dtype)
        ctx.backend = sup_con_fwd.backend_for(z)
        ctx.normalize, ctx.ranks = normalize, ranks
        t = positive(temperature)
        of_rows = _empty_stats(len(z), t)

        def visit(ahead: int, y: Tensor, y_ids: Tensor | None) -> list[Tensor]:
            of_y = _empty_stats(len(y), t)
            if not ahead:
                if len(z):
                    of_rows.copy_(sup_con_fwd(z, None, ids, temperature, normalize, backend=ctx.backend)[:4])
                return [of_y.T]
            rows, columns = _half(ranks, ahead)
            if len(z[rows]) and len(y[columns]):
                of_x, of_y[:, columns] = info_nce_fwd(
                    z[rows], y[columns], temperature, *_of(ids, rows, y_ids, columns), None, normalize, True,
                    backend=ctx.backend,
                )  # fmt: skip
                of_rows[:, rows] = _merge_stats(of_rows[:, rows], of_x, t)
            return [of_y.T]

        (owed,) = ranks.ring([z, ids], visit, _merge_columns(t), ranks.world // 2 + 1)
        of_rows = _merge_stats(of_rows, owed.T, t)
        ctx.save_for_backward(z, ids, temperature, of_rows)
        return of_rows[0].clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        z, ids, temperature, of_rows = ctx.saved_tensors
        dz = z.new_zeros(z.shape, dtype=accumulator(z))

        def visit(ahead: int, y: Tensor, y_ids: Tensor | None, g: Tensor, stats: Tensor) -> list[Tensor]:
            dy = y.new_zeros(y.shape, dtype=dz.dtype)
            if not ahead:
                if len(z):
                    padded = F.pad(of_rows, (0, 0, 0, 2))
                    dz.add_(sup_con_bwd(g, None, z, None, ids, temperature, padded, ctx.normalize, backend=ctx.backend))
                return [dy]
            rows, columns = _half(ctx.ranks, ahead)
            if len(z[rows]) and len(y[columns]):
                of_x, of_y = of_rows[:, rows].contiguous(), stats[columns].T.contiguous()
                dx, dy[columns] = info_nce_bwd(
                    grad_lse[rows], g[columns], z[rows], y[columns], temperature, of_x, of_y,
                    *_of(ids, rows, y_ids, columns), None, ctx.normalize, backend=ctx.backend,
                )  # fmt: skip
                dz[rows] += dx
            return [dy]

        if ctx.needs_input_grad[0]:
            (owed,) = ctx.ranks.ring([z, ids, grad_lse, of_rows.T], visit, None, ctx.ranks.world // 2 + 1)
            dz += owed
        dt = -(grad_lse * of_rows[3]).sum() / temperature**2
        return dz.to(ctx.given), None, dt, None, None, None


def _half(ranks: Ranks, ahead: int) -> tuple[slice, slice]:
    """Which of this rank's rows meet which of those of the rank so far ahead."""
    rows, columns = slice(None), slice(None)
    if 2 * ahead == ranks.world:  # the other one meets this one too
        if ranks.rank < ahead:
            rows = slice(ranks.counts[ranks.rank] // 2)
        else:
            columns = slice(ranks.counts[ranks.rank - ahead] // 2, None)
    return rows, columns


def _of(ids: Tensor | None, rows: slice, y_ids: Tensor | None, columns: slice) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if ids is None or y_ids is None else (ids[rows], y_ids[columns])


class _SumsOfLabel(torch.autograd.Function):
    """(N, D), for each row the sum of the rows, of all ranks, of its label; their number, (N,). A symmetric operator:
    its backward is itself."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, labels: Tensor, ranks: Ranks | None) -> tuple[Tensor, Tensor]:
        ctx.labels, ctx.ranks = labels, ranks
        sums, count = torch.zeros_like(z), z.new_zeros(len(z))

        def visit(_: Any, y: Tensor, y_labels: Tensor) -> list[Tensor]:
            if len(z) and len(y):
                sums.add_(_sums_of_label(labels, y, y_labels))
                count.add_(matches(labels, y_labels))
            return []

        if ranks is None:
            visit(None, z, labels)
        else:
            ranks.meet([z, labels], visit)
        ctx.mark_non_differentiable(count)
        return sums, count

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return _SumsOfLabel.apply(grad, ctx.labels, ctx.ranks)[0], None, None


def _sums_of_label(labels: Tensor, y: Tensor, y_labels: Tensor) -> Tensor:
    """(N, D), for each label the sum of the rows of y (K, D) that have it, in K D and a fixed order."""
    ordered, order = y_labels.sort(stable=True)
    counts = matches(ordered, ordered)
    firsts = torch.searchsorted(ordered, ordered) == torch.arange(len(y), device=y.device)
    sums = torch.segment_reduce(y[order], "sum", lengths=counts * firsts)  # empty but where a label begins
    at = torch.searchsorted(ordered, labels).clamp(max=len(y) - 1)
    return torch.where((ordered[at] == labels)[:, None], sums[at], 0)


def log_sum_exp_of_others(
    z: Tensor,
    ids: Tensor | None,
    temperature: Tensor,
    *,
    normalize: bool = True,
    ranks: Ranks | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(M,) log of the sum of exp(z_i . z_j / t) over the rows j, on all ranks, whose ids differ from row i's; None:
    over all but i. S is symmetric; products are in `dtype`, z's where None."""
    dtype = dtype or z.dtype
    if ranks is None:
        return _SupCon.apply(z, None, ids, temperature, normalize, dtype)[0]
    if ranks.strategy == "ring":
        return _RingOfOthers.apply(z, ids, temperature, normalize, ranks, dtype)
    return _AcrossRanks.apply(z, z, temperature, ids, ids, ids is None, normalize, False, ranks, dtype)[0]


# ---- function


def sup_con(
    embeddings: Tensor,
    labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    normalize: bool = True,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    label_smoothing: float = 0.0,
    decoupled: bool = False,
    sample_weight: Tensor | None = None,
    gather_distributed: bool = False,
    group: Any = None,
    strategy: Strategy = "gather",
) -> Any:
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, equation 2), in O(M D) memory.

    Rows of one label are each other's positives, all other rows the negatives; a row is never its own.
    Equivalent to:
        z = F.normalize(embeddings); logits = (z @ z.T / temperature).fill_diagonal_(-inf)
        alike = (labels[:, None] == labels).fill_diagonal_(False)
        loss = -(logits.log_softmax(1).masked_fill(~alike, 0).sum(1) / alike.sum(1))[alike.any(1)].mean()

    Args:
        embeddings: (M, D), or (N, V, D) for V views of N images, fp16, bf16, fp32 or fp64, any strides.
        labels: (M,) or (N,) integers. None with (N, V, D): the views of an image are its positives, as in SimCLR.
        temperature: a float above 0, or a tensor of one element, which gets a gradient.
        normalize: divide each row by its L2 norm, as F.normalize.
        reduction: "mean" over the rows that have a positive, and "sum", give a scalar; "none" (M,) or (N, V), with 0
            where a row has no positive.
        return_lse: also return the log-sum-exp over the denominators, in the shape of reduction "none".
        label_smoothing: as in F.cross_entropy: of each row's target, this share lies on all other rows alike, and the
            rest on its positives alike.
        decoupled: leave every positive out of the denominators, which then run over the negatives alone (DCL, arXiv
            2110.06848, of several positives); rows without a negative have no loss.
        sample_weight: (M,) or (N,) weights of the rows or images; the mean becomes the weighted one.
        gather_distributed, group, strategy: as in `nt_xent`. labels mean the same on every process.

    Returns:
        The loss in fp32 (fp64 for fp64), or (loss, lse). Without any positive the loss is 0.

    The group_ids and tau_plus of the other losses are for negatives that may be of the positive's class; here labels
    say which are.

    Raises:
        ValueError, TypeError: naming the argument, for shapes or dtypes that do not fit.

    Example:
        >>> loss = sup_con(model(images), labels, temperature=0.1)
    """
    group = processes(gather_distributed, group, strategy)
    views, of_images = 1, labels is None
    if isinstance(embeddings, Tensor) and embeddings.dim() == 3:
        N, views = embeddings.shape[:2]
        if labels is None:
            labels = torch.arange(N, device=embeddings.device)
    z = (
        embeddings.flatten(0, 1)
        if views > 1 or (isinstance(embeddings, Tensor) and embeddings.dim() == 3)
        else embeddings
    )
    z, _ = _losses.check_embeddings("embeddings", z, "embeddings", z, empty=group is not None)
    images = len(z) // views
    t = _losses.check_temperature(temperature, z)
    _losses.check_options(
        reduction, label_smoothing=label_smoothing, decoupled=decoupled, normalize=normalize, return_lse=return_lse
    )
    labels = _losses.check_per_row("labels", labels, images, z.device, integer=True)
    if labels is None:
        raise ValueError("labels: got None with embeddings (M, D), allowed: (M,) integers, or embeddings (N, V, D)")
    _losses.check_per_row("sample_weight", sample_weight, images, z.device, integer=False)
    if views > 1:
        labels = labels.repeat_interleave(views)
        sample_weight = None if sample_weight is None else sample_weight.repeat_interleave(views)

    ranks = share(
        z, group, strategy, requires_grad=records(z, t), decoupled=decoupled, sample_weight=sample_weight is not None,
        label_smoothing=bool(label_smoothing),
    )  # fmt: skip
    if of_images and ranks is not None:
        labels = labels + ranks.first // views
    if ranks is None and not decoupled and not label_smoothing:
        lse, positives, count = _SupCon.apply(z, labels, None, t, normalize, z.dtype)
    else:
        # In the dtype of sums: the positives' share of the gradient nearly cancels that of their softmax.
        z = to_rows(z, normalize)
        lse = log_sum_exp_of_others(z, labels if decoupled else None, t, normalize=False, ranks=ranks)
        sums, count = _SumsOfLabel.apply(z, labels, ranks)
        positives, count = (z * (sums - z)).sum(1), count - 1
    has = (count > 0) & (lse != -torch.inf)  # NaN stays
    target = positives / count.clamp(min=1)
    if label_smoothing:
        others = (z * (_losses.total(z.sum(0), ranks) - z)).sum(1)
        among = (len(z) if ranks is None else ranks.total) - 1
        target = torch.lerp(target, others / max(among, 1), float(label_smoothing))
    loss = torch.where(has, lse - target / positive(t), 0)
    if reduction == "mean":
        weight = has.to(loss.dtype) if sample_weight is None else has * sample_weight.to(loss.dtype)
        total = _losses.total(weight.sum(), ranks)
        loss = _losses.reduce(loss, "sum", weight, ranks) / torch.where(total == 0, 1, total)
    else:
        loss = _losses.reduce(loss, reduction, sample_weight, ranks)
    if embeddings.dim() == 3:
        lse = lse.unflatten(0, (images, views))
        loss = loss.unflatten(0, (images, views)) if reduction == "none" else loss
    return (loss, lse) if return_lse else loss


# ---- module


class SupConLoss(nn.Module):
    """Supervised contrastive loss as a module, without the similarity matrix; a drop-in for
    pytorch_metric_learning.losses.SupConLoss (its default reducer) and, with (N, V, D), for SupContrast's.

    Equivalent to: pytorch_metric_learning.losses.SupConLoss(temperature)(embeddings, labels), but for two edges: there
    a row whose loss has come down to 0 leaves the mean as well, and a batch of one class has the loss 0, where equation
    2 has it spread its rows evenly. indices_tuple and ref_emb are not taken; labels are integers.

    Args:
        temperature: a float above 0, or a tensor of one element; an nn.Parameter is learned with the model.
        options: keyword arguments of `ssl_fast.functional.sup_con`.

    Shape:
        embeddings (M, D) with labels (M,), or (N, V, D) with labels (N,) or None.

    Example:
        >>> loss = SupConLoss(temperature=0.1)(embeddings, labels)
    """

    def __init__(self, temperature: float | Tensor = 0.1, **options: Any) -> None:
        super().__init__()
        _losses.check_temperature_alone(temperature)
        _losses.check_module(self, sup_con, options)
        self.temperature = temperature
        self.options = options

    def forward(self, embeddings: Tensor, labels: Tensor | None = None, **per_call: Any) -> Tensor:
        return sup_con(embeddings, labels, self.temperature, **{**self.options, **per_call})

    def extra_repr(self) -> str:
        t = self.temperature
        return f"temperature={'learned' if isinstance(t, nn.Parameter) else t}"
