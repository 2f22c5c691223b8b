"""The encoder of a checkpoint, and its features h, without the head."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssl_fast._checks import a_path
from ssl_fast._distributed import rank_and_world
from ssl_fast._folded import _Folded
from ssl_fast.augment import plain_view
from ssl_fast.backbones import build_encoder
from ssl_fast.data import ImageData, Loader, Split, in_order
from ssl_fast.fold import eval_mode, fold_conv_bn
from ssl_fast.methods import METHODS
from ssl_fast.ops.two_views import GRAY
from ssl_fast.progress import counted

log = logging.getLogger("ssl_fast")


def load_encoder(saved: dict[str, Any], model: nn.Module | None = None, seed: int | None = None) -> nn.Module:
    """The encoder f, without the head, of a checkpoint that `read_checkpoint` returned; of MoCo that of the queries.

    Args:
        saved: the checkpoint.
        model: a module built as the one that was trained, for runs whose model had no name; it is not changed.
        seed: take random weights from this seed in the place of the checkpoint's; of a module its own.

    Raises:
        ValueError: for a checkpoint of an unknown method, or whose weights do not fit the model.
    """
    args = saved["args"]
    if args["method"] not in METHODS:
        raise ValueError(
            f"checkpoint: its method is {args['method']!r}, allowed: {', '.join(METHODS)}; take a checkpoint of one"
        )
    if model is None and not saved["named"]:
        raise ValueError(f"model: the run trained an nn.Module of class {args['model']}; pass such a module as model=")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed or 0)
        chosen = args["model"] if model is None else copy.deepcopy(model)
        encoder, _ = build_encoder(chosen, saved["image_size"], saved["channels"], args["stem"])
    if seed is not None:
        return encoder
    weights = {k.removeprefix("encoder."): v for k, v in saved["model"].items() if k.startswith("encoder.")}
    wanted = encoder.state_dict()
    unlike = [k for k in wanted if k not in weights or wanted[k].shape != weights[k].shape]
    if unlike := unlike + [k for k in weights if k not in wanted]:
        found, needed = (_shape(state.get(unlike[0])) for state in (weights, wanted))
        raise ValueError(
            f"model: the checkpoint's weights do not fit this {type(encoder).__name__}: {len(unlike)} of {len(wanted)} "
            f"differ, such as {unlike[0]}, {found} in the checkpoint and {needed} in the model, allowed: the backbone "
            f"that was trained, {args['model']} with stem={args['stem']}; pass one like it as model="
        )
    encoder.load_state_dict(weights)
    return encoder


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"


def saved_at(checkpoint: str | Path) -> Path:
    """The file of a checkpoint that is given by its path, or by the folder of its run."""
    path = a_path("checkpoint", checkpoint, "the folder of a run, or the path of a checkpoint in it")
    return path / "checkpoints" / "last.pt" if path.is_dir() else path


def folded(encoder: nn.Module, data: ImageData, device: torch.device) -> nn.Module:
    """The encoder with its batch norms folded, or itself where that cannot be; a folded one is brought up to date.

    Keep the result from evaluation to evaluation of a training run: then folding costs a copy of the weights.
    """
    if isinstance(encoder, _Folded):
        try:
            encoder.refresh()
            return encoder
        except RuntimeError as error:  # its source has changed its structure, for one
            log.debug("the encoder is folded again: %s", error)
            encoder = encoder.unfold()
    generator = torch.Generator().manual_seed(0)  # PyTorch's own goes on as without an evaluation
    images = torch.rand(2, data.channels, data.size, data.size, generator=generator).to(device)
    try:
        return fold_conv_bn(encoder, images, allow_training=True)
    except (TypeError, ValueError, RuntimeError) as error:
        log.debug("evaluation runs unfolded: %s", error)
        return encoder


@torch.no_grad()
def encode(
    encoder: nn.Module,
    split: Split,
    size: int,
    device: torch.device,
    batch_size: int = 256,
    num_workers: int = 0,
    *,
    channels: int | None = None,
    title: str | None = None,
    together: bool = False,
) -> tuple[Tensor, Tensor]:
    """Features (N, F), fp32, and labels (N,) of a split, both on the device; the encoder in eval mode.

    Images are resized to `size` and, where given, brought to 1 or 3 channels. With a title, progress is shown. Without
    labels, the labels are -1. Every module is left in the mode it was in. `together`: every process of
    torch.distributed, with the same encoder, embeds a share of the batches and gets all of the features.
    """
    features = torch.empty(0)
    known = split.labels if split.labels is not None else torch.full((len(split),), -1)
    rank, world = rank_and_world() if together else (0, 1)
    every = in_order(len(split), batch_size)
    batches = every[rank::world] or every[:1]  # which tells the width where there are fewer than processes
    loaded = Loader(split, device, num_workers)(batches)
    with eval_mode(encoder):
        for images, indices in counted(loaded, len(batches), title) if title else loaded:
            h = encoder(plain_view(as_channels(images, channels or images.shape[1]), size))
            if not len(features):
                features = torch.zeros(len(split), *h.shape[1:], device=device)
            if rank < len(every):
                features[indices[0] : indices[0] + len(h)] = h
    if world > 1:
        dist.all_reduce(features)  # of rows that are 0 on all processes but one
    return features, known.to(device)


def as_channels(images: Tensor, channels: int) -> Tensor:
    """uint8 images (N, C, H, W) with 1 or 3 channels: luma of colours, or grey three times."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    weights = torch.tensor(GRAY, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True).round().to(torch.uint8)
