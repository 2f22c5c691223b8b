"""CLIP's loss, on the operators of ssl_fast/ops/info_nce.py: InfoNCE in both directions from each tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssl_fast._checks import as_float, whole
from ssl_fast._distributed import Strategy, count_processes, processes, share
from ssl_fast._op import records
from ssl_fast.ops import _losses
from ssl_fast.ops._losses import Reduction, accumulator, apart, positive, to_rows
from ssl_fast.ops.info_nce import _AcrossRanks, _LogSumExp, matches


def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    normalize: bool = False,
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
    """The loss of CLIP (Radford et al. 2021, arXiv 2103.00020, figure 3), both directions from each tile.

    Equivalent to:
        logits = logit_scale * image_features @ text_features.T + logit_bias; labels = torch.arange(N)
        (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    Args:
        image_features, text_features: (N, D), fp16, bf16, fp32 or fp64, any strides; row i of each: one pair.
        logit_scale: 1 / temperature: a float above 0, or a tensor of one element, which gets a gradient.
        logit_bias: a number, or a tensor of one element, added to every logit, which a softmax does not see: its
            gradient is zero.
        normalize: divide every row by its L2 norm first. False, as in open_clip, whose models normalise.
        reduction: "mean" and "sum" give a scalar, "none" the mean of both directions of each pair, (N,).
        return_lse: also return the (2, N) log-sum-exp of the logits of each image and of each text, the positive's
            included and logit_bias left out.
        label_smoothing, decoupled, tau_plus, group_ids, sample_weight: as in `info_nce`, in both directions; pairs of
            a group are no negatives of each other, and tau_plus reckons with rows of unit length.
        gather_distributed, group, strategy: as in `nt_xent`.

    Returns:
        The loss in fp32 (fp64 for fp64), or (loss, lse).

    Raises:
        ValueError, TypeError: naming the argument, for shapes, dtypes or combinations that do not fit.

    Example:
        >>> loss = clip(image_features, text_features, model.logit_scale.exp())
    """
    group = processes(gather_distributed, group, strategy)
    image, text = _losses.check_embeddings(
        "image_features", image_features, "text_features", text_features, empty=group is not None
    )
    N = len(image)
    _losses.check_options(
        reduction, label_smoothing=label_smoothing, tau_plus=tau_plus, group_ids=group_ids, decoupled=decoupled,
        normalize=normalize, return_lse=return_lse,
    )  # fmt: skip
    group_ids = _losses.check_per_row("group_ids", group_ids, N, image.device, integer=True)
    _losses.check_per_row("sample_weight", sample_weight, N, image.device, integer=False)
    t = _losses.check_temperature(_inverse(logit_scale, image), image)
    if logit_bias is not None:
        _losses.check_number("logit_bias", logit_bias, "a number", image)

    ranks = share(
        image, group, strategy, requires_grad=records(image, text, t), text_requires_grad=records(text),
        group_ids=group_ids is not None, tau_plus=bool(tau_plus), sample_weight=sample_weight is not None,
        label_smoothing=bool(label_smoothing),
    )  # fmt: skip
    ids, dtype = apart(group_ids, group_ids), image.dtype
    if ranks is None:
        *lses, pos = _LogSumExp.apply(image, text, t, *ids, 0, normalize, True, True, dtype)
    else:
        image, text = to_rows(image, False), to_rows(text, False)
        lses = _AcrossRanks.apply(image, text, t, *ids, True, normalize, True, ranks, dtype)
        pos = (to_rows(image, normalize) * to_rows(text, normalize)).sum(1)
    others: int | Tensor = (N if ranks is None else ranks.total) - 1
    if group_ids is not None and tau_plus:
        alike = matches(group_ids, group_ids if ranks is None else ranks.gather(group_ids))
        others = others + 1 - alike
    losses = []
    for lse, queries, keys in zip(lses, (image, text), (text, image), strict=True):
        negative_sum = None
        if label_smoothing:
            everyone = _losses.total(to_rows(keys, normalize).sum(0), ranks)
            negative_sum = (to_rows(queries, normalize) * everyone).sum(1) - pos
        losses.append(
            _losses.row_loss(
                lse - pos / positive(t),
                pos,
                temperature=t,
                negatives=others,
                decoupled=decoupled,
                tau_plus=tau_plus,
                label_smoothing=label_smoothing,
                negative_sum=negative_sum,
            )  # fmt: skip
        )
    loss = (losses[0] + losses[1]) / 2
    if logit_bias is not None:
        bias = logit_bias.to(loss).reshape(()) if isinstance(logit_bias, Tensor) else as_float(logit_bias)
        loss = loss + 0 * bias
    loss = _losses.reduce(loss, reduction, sample_weight, ranks)
    return (loss, torch.logaddexp(torch.stack(tuple(lses)), pos / positive(t))) if return_lse else loss


def _inverse(logit_scale: float | Tensor, z: Tensor) -> float | Tensor:
    _losses.check_number("logit_scale", logit_scale, "a float above 0, such as 1 / 0.07", z)
    if isinstance(logit_scale, Tensor):
        return logit_scale.to(accumulator(z)).reciprocal()
    if not 1e-30 < as_float(logit_scale) < 1e30:
        raise ValueError(f"logit_scale: got {logit_scale!r}, allowed: a float above 0, such as 1 / 0.07")
    return 1 / float(logit_scale)


class CLIPLoss(nn.Module):
    """The loss of CLIP as a module; a drop-in for open_clip.ClipLoss without its two similarity matrices.

    Equivalent to: open_clip.ClipLoss()(image_features, text_features, logit_scale).

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: in open_clip's places. The first
            three change how open_clip computes; here the result is exact whatever they say. world_size: above 1 as
            gather_distributed=True over so many processes. use_horovod: False.
        options: keyword arguments of `ssl_fast.functional.clip`.

    Shape:
        image_features, text_features: (N, D), normalised by the caller; logit_scale a scalar, already exponentiated.

    Example:
        >>> loss = CLIPLoss()(image_features, text_features, model.logit_scale.exp())
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod: got True, allowed: False; processes are those of torch.distributed")
        _losses.check_module(self, clip, options)
        if whole("world_size", world_size) > 1:
            options = {"gather_distributed": True, **options}
        self.world_size = world_size
        self.options = options

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        **per_call: Any,
    ) -> Any:
        options = {**self.options, **per_call}
        if self.world_size > 1 and self.world_size != (there := count_processes(options.get("group"))):
            raise ValueError(
                f"world_size: got {self.world_size}, allowed: {there}, the processes of the group; call "
                "torch.distributed.init_process_group first"
            )
        loss = clip(image_features, text_features, logit_scale, logit_bias, **options)
        return {"contrastive_loss": loss} if output_dict else loss
