"""NT-Xent, the loss of SimCLR (Chen et al. 2020, arXiv 2002.05709, equation 1), without the similarity matrix.

M = 2N rows z = [z1; z2], unit rows where normalize; the positive of row i is p = (i + N) mod M; s_ij = z_i . z_j.
With Zneg_i the sum over j not in {i, p} of exp(s_ij / t):

    lse_i  = log(Zneg_i + exp(s_ip / t))
    q_i    = Zneg_i / (Zneg_i + exp(s_ip / t))               1 - P_ip, without cancellation
    loss_i = lse_i - s_ip / t = log1p(Zneg_i / exp(s_ip / t))
    r_i    = sum over j not in {i, p} of P_ij (s_ij - s_ip)   so that dloss_i/dt = -r_i / t^2

The positive never enters the matrix products: there its weight 1 - P_ip would be rounded to 16 bits, which loses the
gradient of confident pairs. docs/kernels.md has the arithmetic of every backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_fast._distributed import Strategy, processes, share
from ssl_fast._op import HALF_AND_FLOAT, Op, records
from ssl_fast.ops import _losses
from ssl_fast.ops._info_nce_sup_con import log_sum_exp_of_others
from ssl_fast.ops._losses import REDUCTIONS, Reduction, accumulator, differentiable_once, positive, tangent, to_rows
from ssl_fast.ops.info_nce import info_nce, matches
from ssl_fast.queue import KeyQueue

# ---- reference: the definition, and the fallback on any device


def _rows(z1: Tensor, z2: Tensor, normalize: bool) -> Tensor:
    return to_rows(torch.cat([z1, z2]), normalize)


def _similarity_of_pairs(z: Tensor) -> Tensor:
    """s_ip of every row, (M,)."""
    z1, z2 = z.chunk(2)
    return (z1 * z2).sum(1).repeat(2)


def _blocks(z: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row blocks with their similarities (B, M). A block holds about as many numbers as z, so memory stays O(M D)."""
    size = max(16, min(1024, z.shape[1] * 2))
    for start in range(0, len(z), size):
        block = slice(start, min(start + size, len(z)))
        yield block, z[block] @ z.T


def _mask_pairs(x: Tensor, block: slice, value: float) -> Tensor:
    """Set the entries of the row itself and of its positive, in place."""
    M = x.shape[1]
    i = torch.arange(block.start, block.stop, device=x.device)
    local = i - block.start
    x[local, i] = value
    x[local, (i + M // 2) % M] = value
    return x


def _reduce(loss: Tensor, reduction: int) -> Tensor:
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


def _fwd_reference(z1: Tensor, z2: Tensor, temperature: Tensor, normalize: bool, reduction: int) -> tuple[Tensor, ...]:
    z, t = _rows(z1, z2, normalize), positive(temperature)
    s_pos = _similarity_of_pairs(z)
    lse_neg, r = torch.empty_like(s_pos), torch.empty_like(s_pos)
    for block, s in _blocks(z):
        lse_neg[block] = torch.logsumexp(_mask_pairs(s / t, block, -torch.inf), 1)
        lse = torch.logaddexp(lse_neg[block], s_pos[block] / t)
        P_neg = _mask_pairs(torch.exp(s / t - lse[:, None]), block, 0.0)
        r[block] = (P_neg * (s - s_pos[block, None])).sum(1)
    gap = lse_neg - s_pos / t
    loss = _reduce(torch.logaddexp(gap, torch.zeros_like(gap)), reduction)
    return loss, torch.logaddexp(lse_neg, s_pos / t), torch.sigmoid(gap), r


def _bwd_reference(
    grad_loss: Tensor,
    grad_lse: Tensor,
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor,
    lse: Tensor,
    q: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    z, t = _rows(z1, z2, normalize), positive(temperature)
    a = grad_loss + grad_lse
    c = grad_lse * (1 - q) - grad_loss * q
    dz = (c + c.roll(len(z1)))[:, None] * z.roll(len(z1), 0)
    for block, s in _blocks(z):
        # One weight for both roles of z_j: as a column of row i's softmax, and as the row whose softmax holds i.
        weight = a[block, None] * torch.exp(s / t - lse[block, None]) + a * torch.exp(s / t - lse)
        dz[block] += _mask_pairs(weight, block, 0.0) @ z
    dz /= t
    if normalize:
        dz = tangent(dz, z, torch.cat([z1, z2]))
    dz1, dz2 = dz.to(z1.dtype).chunk(2)
    return dz1.clone(), dz2.clone()  # two outputs of one operator may not share storage


def _fwd_fake(z1: Tensor, z2: Tensor, temperature: Tensor, normalize: bool, reduction: int) -> tuple[Tensor, ...]:
    loss, *rows = (z1.new_empty(2 * z1.shape[0], dtype=accumulator(z1)) for _ in range(4))
    return (loss.new_empty(()) if reduction else loss), *rows


def _bwd_fake(grad_loss: Tensor, grad_lse: Tensor, z1: Tensor, z2: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return z1.new_empty(z1.shape), z2.new_empty(z2.shape)


# ---- operators

nt_xent_fwd = Op(
    "nt_xent_fwd(Tensor z1, Tensor z2, Tensor temperature, bool normalize, int reduction) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_reference,
    fake=_fwd_fake,
    native={"cpu": HALF_AND_FLOAT},
    triton="ssl_fast.kernels.nt_xent:nt_xent_fwd",
    decides="z1",
)
nt_xent_bwd = Op(
    "nt_xent_bwd(Tensor grad_loss, Tensor grad_lse, Tensor z1, Tensor z2, Tensor temperature, Tensor lse, Tensor q, "
    "bool normalize) -> (Tensor, Tensor)",
    _bwd_reference,
    fake=_bwd_fake,
    native={"cpu": HALF_AND_FLOAT},
    triton="ssl_fast.kernels.nt_xent:nt_xent_bwd",
    decides="z1",
)


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z1: Tensor, z2: Tensor, temperature: Tensor, normalize: bool, reduction: int
    ) -> tuple[Tensor, Tensor]:
        ctx.backend, forward = nt_xent_fwd.chosen(z1)
        ctx.normalize, ctx.reduction = normalize, reduction
        loss, lse, q, r = forward(z1, z2, temperature, normalize, reduction)
        ctx.save_for_backward(z1, z2, temperature, lse, q, r)
        ctx.set_materialize_grads(False)
        return loss, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        z1, z2, temperature, lse, q, r = ctx.saved_tensors
        only_loss = grad_lse is None
        grad_loss = lse.new_zeros(()) if grad_loss is None else grad_loss
        grad_lse = lse.new_zeros(()) if grad_lse is None else grad_lse
        if ctx.reduction == REDUCTIONS["mean"]:
            grad_loss = grad_loss / len(lse)
        grad_loss, grad_lse = grad_loss.expand_as(lse), grad_lse.expand_as(lse)
        dz1 = dz2 = dt = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dz1, dz2 = nt_xent_bwd(grad_loss, grad_lse, z1, z2, temperature, lse, q, ctx.normalize, backend=ctx.backend)
        if ctx.needs_input_grad[2]:
            expected = (grad_loss + grad_lse) * r
            if not only_loss:  # d lse_i / dt = -E_P[s] / t^2, and E_P[s] = r + s_ip
                expected = expected + grad_lse * _similarity_of_pairs(_rows(z1, z2, ctx.normalize))
            dt = -expected.sum() / temperature**2
        return dz1, dz2, dt, None, None


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    normalize: bool = True,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    label_smoothing: float = 0.0,
    decoupled: bool = False,
    tau_plus: float = 0.0,
    group_ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
    gather_distributed: bool = False,
    group: Any = None,
    strategy: Strategy = "gather",
) -> Any:
    """NT-Xent of SimCLR (Chen et al. 2020, arXiv 2002.05709, equation 1 and Algorithm 1), in O(N D) memory.

    Row i of z1 and row i of z2 are the two views of image i; the other 2N - 2 rows are its negatives.
    Equivalent to:
        z = F.normalize(torch.cat([z1, z2])); logits = (z @ z.T / temperature).fill_diagonal_(-inf)
        F.cross_entropy(logits, torch.arange(2 * N).roll(N), reduction=reduction)

    Args:
        z1, z2: (N, D) embeddings, fp16, bf16, fp32 or fp64, any strides. Under autocast they are cast as for a
            matrix product; logits, sums and the loss are fp32 (fp64 for fp64) in any case.
        temperature: a float above 0, or a tensor of one element, which gets a gradient. A tensor's value is not
            fetched: where it is not above 0 the loss is NaN.
        normalize: divide each row by its L2 norm, as F.normalize (eps 1e-12), fused into the kernels.
        reduction: "mean" and "sum" give a scalar, "none" the losses (2N,), z1's rows first.
        return_lse: also return the (2N,) log-sum-exp of each row's logits without itself, differentiable.
        label_smoothing, decoupled, tau_plus: F.cross_entropy's smoothing; the positive left out of the denominator
            (DCL, arXiv 2110.06848); the probability of false negatives to correct for (arXiv 2007.00224), where the
            sum over the negatives stays at least what rows of unit length can give, exp(-1 / t) each.
        group_ids: (N,) integers: other images of an image's group are known false negatives, and left out.
        sample_weight: (N,) weights of the images; the mean becomes the weighted one.
        gather_distributed: let the images of all processes of torch.distributed be negatives. Each process brings its
            own N, 0 too. It returns world / N_global times the sum over its own rows ("sum": world times it; "none":
            its rows), and the backward is that of the sum over processes: the mean over processes, as
            DistributedDataParallel takes it, is the loss and the gradient of one process with the whole batch.
        group: the process group; None for all. Given, gather_distributed is implied.
        strategy: "gather" brings the rows of all processes to each, forward and backward, and reduce-scatters the
            gradient. "ring" passes blocks of rows around instead, the next on its way while one is multiplied: memory
            is that of a few blocks whatever the number of processes, and each pair of them meets once.

    Returns:
        The loss, or (loss, lse). Gradients are those of what is returned; they are not differentiable again.

    Raises:
        ValueError, TypeError: naming the argument, for shapes or dtypes that do not fit.
        RuntimeError: where another process of the group ends or stays silent for longer than the group's time-out.

    Example:
        >>> loss = nt_xent(model(view1), model(view2), temperature=0.1)
    """
    group = processes(gather_distributed, group, strategy)
    z1, z2 = _losses.check_embeddings("z1", z1, "z2", z2, empty=group is not None)
    t = _losses.check_temperature(temperature, z1)
    _losses.check_options(
        reduction, label_smoothing=label_smoothing, tau_plus=tau_plus, group_ids=group_ids, decoupled=decoupled,
        normalize=normalize, return_lse=return_lse,
    )  # fmt: skip
    options = label_smoothing or tau_plus or decoupled or group_ids is not None or sample_weight is not None
    if options or group is not None:
        N, device = len(z1), z1.device
        group_ids = _losses.check_per_row("group_ids", group_ids, N, device, integer=True)
        _losses.check_per_row("sample_weight", sample_weight, N, device, integer=False)
        z = torch.cat([z1, z2])
        ranks = share(
            z, group, strategy, requires_grad=records(z1, z2, t), group_ids=group_ids is not None,
            sample_weight=sample_weight is not None, label_smoothing=bool(label_smoothing),
        )  # fmt: skip
        first, rows = (0, 2 * N) if ranks is None else (ranks.first // 2, ranks.total)
        ids = (torch.arange(first, first + N, device=device) if group_ids is None else group_ids).repeat(2)
        dtype, z = z.dtype, to_rows(z, False)
        lse_neg = log_sum_exp_of_others(z, ids, t, normalize=normalize, ranks=ranks, dtype=dtype)
        everyone = ids if ranks is None or group_ids is None else ranks.gather(ids)
        z = to_rows(z, normalize)
        pos = _similarity_of_pairs(z)
        loss = _losses.row_loss(
            lse_neg - pos / positive(t), pos, temperature=t, decoupled=decoupled, tau_plus=tau_plus,
            negatives=rows - 2 if group_ids is None else rows - matches(ids, everyone),
            label_smoothing=label_smoothing,
            negative_sum=(z * (_losses.total(z.sum(0), ranks) - z)).sum(1) - pos if label_smoothing else None,
        )  # fmt: skip
        loss = _losses.reduce(loss, reduction, None if sample_weight is None else sample_weight.repeat(2), ranks)
        return (loss, torch.logaddexp(lse_neg, pos / positive(t))) if return_lse else loss
    loss, lse = _NTXent.apply(z1, z2, t, normalize, REDUCTIONS[reduction])
    return (loss, lse) if return_lse else loss


class NTXentLoss(nn.Module):
    """NT-Xent loss of SimCLR as a module; a drop-in for lightly.loss.NTXentLoss that never holds a 2N x 2N matrix.

    Equivalent to: lightly.loss.NTXentLoss(temperature)(out0, out1).

    Args:
        temperature: a float above 0, or a tensor of one element; an nn.Parameter is learned with the model.
        memory_bank_size: 0, or (K, D): the negatives of out0 are then the last K rows given as out1, instead of the
            batch, as in MoCo. They lie in `memory_bank`, a KeyQueue, and in the state dict; after a loss whose out0 has
            a gradient, out1 is enqueued.
        gather_distributed: let the images of all processes be negatives, as in `ssl_fast.functional.nt_xent`, which
            has `group` and `strategy` beside it; a memory bank is filled by all of them.
        reduction, normalize: as in `ssl_fast.functional.nt_xent`.
        options: further keyword arguments of `nt_xent`, or of `info_nce` where there is a memory bank.

    Shape:
        out0, out1: (N, D), the two views of N images. Returns a scalar, fp32 (fp64 for fp64 inputs).

    Example:
        >>> criterion = NTXentLoss(temperature=0.1)
        >>> loss = criterion(model(view1), model(view2))
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        reduction: Reduction = "mean",
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        given = {"gather_distributed": gather_distributed, "reduction": reduction, "normalize": normalize, **options}
        _losses.check_module(self, info_nce if memory_bank_size else nt_xent, given)
        self.memory_bank = None
        if isinstance(memory_bank_size, Sequence) and len(memory_bank_size) == 2:
            size, dim = memory_bank_size
            self.memory_bank = KeyQueue(
                size, dim, normalize=normalize, gather_distributed=gather_distributed, group=options.get("group")
            )
        elif memory_bank_size != 0:
            raise ValueError(
                f"memory_bank_size: got {memory_bank_size!r}, allowed: 0 (the other images are the negatives), or "
                "(K, D)"
            )
        _losses.check_temperature_alone(temperature)
        self.temperature = temperature
        self.reduction = reduction
        self.normalize = normalize
        self.options = {"gather_distributed": gather_distributed, **options}

    def forward(self, out0: Tensor, out1: Tensor, **per_call: Any) -> Tensor:
        options = {"normalize": self.normalize, "reduction": self.reduction, **self.options, **per_call}
        if self.memory_bank is None:
            return nt_xent(out0, out1, self.temperature, **options)
        negatives = self.memory_bank.keys.to(out0.dtype)
        loss = info_nce(out0, out1, negatives, self.temperature, **options)
        if out0.requires_grad:
            self.memory_bank.enqueue(out1)
        return loss

    def extra_repr(self) -> str:
        t = self.temperature
        return f"temperature={'learned' if isinstance(t, nn.Parameter) else t}, reduction={self.reduction!r}"
