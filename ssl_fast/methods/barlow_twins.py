"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230), Algorithm 1."""

from __future__ import annotations

from torch import Tensor, nn

from ssl_fast._checks import check_callable, whole
from ssl_fast._distributed import Strategy
from ssl_fast.cached import CachedStep, check_rows_of_head
from ssl_fast.ops.barlow_twins import BarlowTwinsLoss


class BarlowTwins(nn.Module):
    """Two views of each image through the encoder f and the projector g, and the cross-correlation of their features.

    h = f(x) is what a downstream task uses; z = g(h) exists for the loss alone. Each view passes f and g as a batch of
    its own. The D x D matrix of correlations is never held. Over several processes it is that of all their images.

    Args:
        encoder: maps images (N, C, H, W) to h (N, features).
        features: the width of h.
        dim: the width of the projector's three layers; 8192 in the paper, whose results rise with it.
        lambda_param, strategy: the weight of the redundancy, and how several processes meet, as in BarlowTwinsLoss.

    Example:
        >>> model = BarlowTwins(encoder, features=512)
        >>> model(view1, view2).backward()
        >>> h = model.encoder(images)
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        dim: int = 8192,
        lambda_param: float = 5e-3,
        strategy: Strategy = "gather",
    ) -> None:
        super().__init__()
        features, dim = whole("features", features), whole("dim", dim, hint=", such as 8192")
        check_callable("encoder", encoder, "an nn.Module from images (N, C, H, W) to h (N, features)")
        self.encoder = encoder
        self.head = projector(features, dim)
        self.loss = BarlowTwinsLoss(lambda_param, gather_distributed=True, strategy=strategy)

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        """The loss, a scalar, of two views (N, C, H, W) of the same N images."""
        return self.loss(self.head(self.encoder(view1)), self.head(self.encoder(view2)))

    def cached(self, view1: Tensor, view2: Tensor, step: CachedStep) -> Tensor:
        """The loss, detached, and the gradients of forward(), a micro-batch of a view through f and g at a time."""
        return step(nn.Sequential(self.encoder, self.head), (view1, view2), self.loss)

    def check_batch(self, images: int, micro_batch: int | str | None = None) -> None:
        """Raise where a batch of so many images on each process leaves the head's batch norm one, in micro-batches."""
        check_rows_of_head(self.head, images, micro_batch)


def projector(features: int, dim: int) -> nn.Sequential:
    """g of section 2.2: three linear layers of one width, the first two with batch norm and ReLU."""
    return nn.Sequential(
        nn.Linear(features, dim, bias=False),
        nn.BatchNorm1d(dim),
        nn.ReLU(inplace=True),
        nn.Linear(dim, dim, bias=False),
        nn.BatchNorm1d(dim),
        nn.ReLU(inplace=True),
        nn.Linear(dim, dim, bias=False),
    )
