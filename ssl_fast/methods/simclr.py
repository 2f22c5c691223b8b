"""SimCLR (Chen et al. 2020, arXiv 2002.05709), Algorithm 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl_fast._checks import check_callable, whole
from ssl_fast._distributed import Strategy
from ssl_fast.cached import CachedStep, check_rows_of_head
from ssl_fast.ops.nt_xent import NTXentLoss

HEADS = ("nonlinear", "linear", "none")


class SimCLR(nn.Module):
    """Two views of each image through the encoder f and the projection head g, and NT-Xent between them.

    h = f(x) is what a downstream task uses; z = g(h) exists for the loss alone. Both views pass f and g as one batch
    of 2N, so that batch norm sees them together, and the loss never holds the 2N x 2N similarities. Over several
    processes the images of all are negatives.

    Args:
        encoder: maps images (N, C, H, W) to h (N, features).
        features: the width of h.
        dim: the width of z; not used by head="none", where z is h.
        head: "nonlinear" W2 relu(BN(W1 h)) with a hidden layer as wide as h, "linear" W h, or "none" (section 4.2).
        temperature, strategy: as in NTXentLoss.
        loss: what replaces NTXentLoss(temperature), called on z of the first and of the second views, (N, dim) each.

    Example:
        >>> model = SimCLR(encoder, features=512)
        >>> model(view1, view2).backward()
        >>> h = model.encoder(images)
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        dim: int = 128,
        head: str = "nonlinear",
        temperature: float = 0.5,
        loss: nn.Module | None = None,
        strategy: Strategy = "gather",
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head: got {head!r}, allowed: {', '.join(HEADS)}")
        features, dim = whole("features", features), whole("dim", dim, hint=", such as 128")
        check_callable("encoder", encoder, "an nn.Module from images (N, C, H, W) to h (N, features)")
        self.encoder = encoder
        self.head = projection_head(head, features, dim)
        ours = NTXentLoss(temperature, gather_distributed=True, strategy=strategy)
        self.loss = ours if loss is None else loss
        check_callable("loss", self.loss, "None, or a loss of z of the first and of the second views, (N, dim) each")

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        """The loss, a scalar, of two views (N, C, H, W) of the same N images."""
        z1, z2 = self.head(self.encoder(torch.cat([view1, view2]))).chunk(2)
        return self.loss(z1, z2)

    def cached(self, view1: Tensor, view2: Tensor, step: CachedStep) -> Tensor:
        """The loss, detached, and the gradients of forward(), a micro-batch of a view through f and g at a time."""
        through = nn.Sequential(self.encoder, self.head)
        return step(through, (view1, view2), self.loss, whole=lambda: self(view1, view2))

    def check_batch(self, images: int, micro_batch: int | str | None = None) -> None:
        """Raise where a batch of so many images on each process leaves the head's batch norm one, in micro-batches."""
        check_rows_of_head(self.head, images, micro_batch)


def projection_head(kind: str, features: int, dim: int) -> nn.Module:
    """g of section 4.2, from (N, features) to (N, dim): "nonlinear", "linear" or "none"."""
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(features, dim, bias=False)
    return nn.Sequential(
        nn.Linear(features, features, bias=False),
        nn.BatchNorm1d(features),
        nn.ReLU(inplace=True),
        nn.Linear(features, dim),
    )
