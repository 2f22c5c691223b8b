"""Batch norm whose statistics are those of all the processes of a group, and the conversion of a model to it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_fast.ops._norms import BY_SIGN, IDENTITY, activate, dense, like
from ssl_fast.ops.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    _Fused,
    batch_norm_bwd,
    batch_norm_fwd,
    batch_norm_inplace,
    batch_norm_stats,
    batch_norm_sums,
    check,
    check_momentum,
)


def _gather(x: Tensor, group: Any) -> Tensor:
    """(processes, 3 C + 1): of each, mean, what its rounding left out, biased variance, and the count behind them."""
    local = batch_norm_stats(x, 1).flatten()
    count = local.new_full((1,), x.numel() // x.shape[1])  # past 2^24 rounded, which a weight does not feel
    own = torch.cat([local, count])
    parts = own.new_empty(dist.get_world_size(group), len(own))
    dist.all_gather(list(parts.unbind()), own, group)
    return parts


def _merge(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, what its rounding left out, and biased variance, (3, C), of all that _gather returned; their count, (1,).

    Chan, Golub & LeVeque 1979 for any number of parts. Each mean's distance from a rough one is exact where they are
    near, so that a mean which is large beside the deviation costs nothing. Parts of nothing count for nothing.
    """
    counts = parts[:, -1:]
    means, lows, variances = parts[:, :-1].unflatten(1, (3, -1)).unbind(1)
    total = counts.sum(0)
    share = counts / total.clamp(min=1)
    rough = (share * means).sum(0)
    away = torch.where(counts > 0, (means - rough) + lows, 0)
    rest = (share * away).sum(0)
    mean = rough + rest
    var = (share * (variances + (away - rest).square())).sum(0)
    return torch.stack([mean, rest - (mean - rough), var]), total


def _update_running(
    mean: Tensor,
    var: Tensor,
    total: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    """By the count of all processes, which stays on the device; where that is 0 the statistics stay as they are."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is None and running_var is None:
        return
    weight = torch.full_like(total, momentum) if momentum is not None else 1 / num_batches_tracked.to(total.dtype)  # type: ignore[union-attr]
    weight = weight * (total > 0)
    for running, batch in ((running_mean, mean), (running_var, var * (total / (total - 1)))):
        if running is not None:
            running.copy_(torch.lerp(running.to(batch.dtype), batch, weight))


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,
        total: Tensor,
        eps: float,
        activation: int,
        group: Any,
    ) -> Tensor:
        ctx.backend, forward = batch_norm_fwd.chosen(x)
        ctx.activation, ctx.group = activation, group
        ctx.bias_dtype = None if bias is None else bias.dtype
        keep_mask = residual is not None and activation in BY_SIGN
        y, _, mask = forward(
            x, residual, weight, bias, None, None, None, stats, True, 0.0, eps, 1, activation, keep_mask
        )
        ctx.save_for_backward(
            x,
            residual if activation not in (IDENTITY, *BY_SIGN) else None,
            mask if keep_mask else None,
            weight,
            bias if activation != IDENTITY else None,
            stats,
            total,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *saved, total = ctx.saved_tensors
        x, _, _, weight, _, _ = saved
        need_dx, need_dresidual, need_dweight, need_dbias = ctx.needs_input_grad[:4]
        through = need_dresidual and ctx.activation != IDENTITY
        dy = like(dy, x)
        sums = batch_norm_sums(dy, *saved, ctx.activation, backend=ctx.backend)
        dbias, dweight = sums[:, 0]  # of this process, as every other parameter's: averaging is left to DDP
        dx = dresidual = None
        if need_dx or through:
            means = sums.clone()
            if need_dx:
                dist.all_reduce(means, group=ctx.group)
                means = means / total.clamp(min=1)
            dx, dresidual, _, _ = batch_norm_bwd(
                dy, *saved, means, True, ctx.activation, need_dx, through, backend=ctx.backend
            )
        return (
            dx if need_dx else None,
            (dresidual if through else dy) if need_dresidual else None,
            dweight.to(weight.dtype) if need_dweight else None,
            dbias.to(ctx.bias_dtype) if need_dbias else None,
            *(None,) * 5,
        )


def _sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    inplace: bool,
    group: Any,
) -> Tensor:
    code = check(x, running_mean, running_var, weight, bias, True, eps, activation, residual)
    check_momentum(momentum, num_batches_tracked, running_mean is not None or running_var is not None, x)
    if residual is not None and residual.dtype != x.dtype:  # type promotion needs a tensor of its own
        y = _sync_batch_norm(x, running_mean, running_var, weight, bias, num_batches_tracked, momentum, eps, None, None,
                             False, group)  # fmt: skip
        return activate(y + residual, code)
    there, x = x, dense(x)
    if residual is not None:
        residual = like(residual, x)
    with torch.no_grad():
        (mean, low, var), total = _merge(_gather(x, group))
        _update_running(mean, var, total, running_mean, running_var, num_batches_tracked, momentum)
        stats = torch.stack([mean, low, (var + eps).rsqrt()])[:, None]
    if not inplace:
        if torch.is_grad_enabled():
            return _SyncBatchNorm.apply(x, residual, weight, bias, stats, total, eps, code, group)
        unused = (None, None, None)
        return batch_norm_fwd(x, residual, weight, bias, *unused, stats, True, 0.0, eps, 1, code, False)[0]
    batch_norm_inplace(x, residual, weight, bias, None, None, None, stats, True, 0.0, eps, 1, code)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(x)  # a graph that holds the old values must notice
    return there if there is x else there.copy_(x)


def sync_batch_norm(x: Tensor, group: Any, eps: float = 1e-5) -> Tensor:
    """x (N, C, ...) standardised by the statistics of all the processes of a group; differentiable once."""
    unused = (None, None, None, None, None)
    return _sync_batch_norm(x, *unused, 0.1, eps, None, None, False, group)


class SyncBatchNorm(_Fused, nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm with a fused residual and activation, on CPUs (gloo) as on GPUs: same state dict.

    In training the statistics are those of the batches of all processes of the group together, merged by Chan's rule
    in fp32 (fp64 for fp64) without a host sync: one all_gather of 3 C + 1 values forward, one all_reduce of 2 C
    backward. Batches may be uneven or empty. The gradients of weight and bias are those of the local batch, as
    torch's: DistributedDataParallel averages them. In eval, and in a group of one, it is ssl_fast's plain batch norm.
    Not differentiable twice where processes take part.

    Equivalent to: F.relu(torch.nn.SyncBatchNorm(num_features)(x) + residual), for activation="relu".

    Args:
        num_features ... dtype: as torch.nn.SyncBatchNorm; process_group None is the whole world.
        activation, inplace: as in `ssl_fast.nn.BatchNorm2d`. There is no num_splits: a part of the batch on one process
            and on another would need a rule which belong together.

    Shape:
        forward(x, residual=None): both (N, C) or (N, C, ...), contiguous or channels_last, as the result is.

    Example:
        >>> norm = SyncBatchNorm(64, activation="relu")
        >>> y = norm(conv(x), residual=x)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype,
                         activation=activation, inplace=inplace)  # fmt: skip
        self.process_group = process_group

    def forward(self, input: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        group = self._group()
        if group is None:
            return super().forward(input, residual, activation=activation)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        tracks = self.track_running_stats
        return _sync_batch_norm(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            self.num_batches_tracked if tracks else None,
            self.momentum,
            self.eps,
            activation or self.activation,
            residual,
            self.inplace and not torch.is_grad_enabled(),
            group,
        )

    def _group(self) -> Any:
        """The processes to share statistics with; None where there are none."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None


CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d,
             SyncBatchNorm)  # fmt: skip


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Make every batch norm of a model, torch's or ours, an `ssl_fast.nn.SyncBatchNorm`, in place.

    Parameters, buffers, hooks, mode and what is fused stay: a norm changes its class alone. Before or after
    `accelerate`. torch's own converter, torch.nn.SyncBatchNorm.convert_sync_batchnorm, raises for a norm of ours with
    an activation or num_splits, which it would drop; other norms of ours it turns into torch's, unfused.

    Args:
        module: a model, or a batch norm.
        process_group: whose processes share statistics; None is the whole world.

    Returns:
        The module given.

    Raises:
        ValueError: for a norm with num_splits (statistics of parts and of all processes exclude each other), and for
            another subclass of torch's, which may add what is not known here. Nothing is changed then.

    Example:
        >>> model = DistributedDataParallel(convert_sync_batchnorm(model).cuda(), [rank])
        >>> model = DistributedDataParallel(model)  # on CPUs, where it refuses what is converted already
        >>> convert_sync_batchnorm(model.module)
    """
    norms = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for name, norm in norms:
        where = f"module: got {type(norm).__name__} at {name!r}" if name else f"module: got {type(norm).__name__}"
        if type(norm) not in CONVERTED:
            raise ValueError(
                f"{where}, allowed: the batch norms of torch.nn and ssl_fast.nn; convert it by its own library, as "
                "timm.layers.convert_sync_batchnorm does for timm's"
            )
        if getattr(norm, "num_splits", 1) != 1:
            raise ValueError(
                f"{where} with num_splits={norm.num_splits}, allowed: 1; statistics are those of a part of the batch, "
                "or of all processes, so set num_splits to 1 or leave the module out"
            )
    for _, norm in norms:
        norm.__class__ = SyncBatchNorm
        norm.process_group = process_group
    return module
