"""The methods by the names that `train(method=...)` takes, with the settings that each takes where none are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ssl_fast.methods.barlow_twins import BarlowTwins
from ssl_fast.methods.moco import MoCo, moco_v1, moco_v2
from ssl_fast.methods.simclr import SimCLR


@dataclass(frozen=True)
class Method:
    """A method and its recipe.

    Attributes:
        build: called as build(encoder, features, **method_args) for a module with `encoder`, `head`, a forward of
            two views that returns the loss, `cached`, which takes a CachedStep beside them, and `check_batch`.
        optimizer, schedule: of its paper.
        warmup: the share of the epochs that the learning rate rises in, ten at most.
        augment: its policy; for small images; for digits, which no flip leaves what they are.
        lr, weight_decay: of its optimizer, for 256 images a step, where they are not the optimizer's own.
        bias_lr: the rate of biases and normalisation as a share of lr.
        sync_norms: whether batch norm sees the images of all processes.
        trained_views: how many of an image's two views pass the encoder that learns.
    """

    build: Callable[..., Any]
    optimizer: str
    schedule: str
    warmup: float
    augment: str
    augment_small: str
    augment_digits: str
    lr: float | None = None
    weight_decay: float | None = None
    bias_lr: float = 1.0
    sync_norms: bool = True
    trained_views: int = 2


MOCO: dict[str, Any] = {"sync_norms": False, "trained_views": 1}
METHODS = {
    "simclr": Method(SimCLR, "lars", "cosine", 0.1, "simclr", "simclr_small", "digits"),
    "moco_v1": Method(moco_v1, "sgd", "step", 0.0, "moco_v1", "moco_v1", "digits", **MOCO),
    "moco_v2": Method(moco_v2, "sgd", "cosine", 0.0, "moco_v2", "moco_v2", "digits_blur", **MOCO),
    "barlow_twins": Method(
        BarlowTwins,
        "lars",
        "cosine_0.001",
        0.1,
        "barlow_twins",
        "barlow_twins_small",
        "barlow_twins_digits",
        lr=0.2,
        weight_decay=1.5e-6,
        bias_lr=0.024,
    ),  # section 2.2
}

__all__ = ["METHODS", "BarlowTwins", "Method", "MoCo", "SimCLR"]
