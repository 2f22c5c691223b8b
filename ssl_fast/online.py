"""The online linear probe: what h is worth to a classifier, while the encoder is still learning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LR = 0.01


class OnlineProbe:
    """A linear classifier that learns beside a run, from the features h that the run computes anyway.

    It sees h without its graph and has an optimizer of its own, so the encoder never learns of it; it draws from no
    generator, so the run is the same to the bit with and without it. The recipe is fixed: h standardised by its running
    mean and variance (batch norm without parameters), weights that start at 0, Adam at lr 0.01.

    Args:
        features: the width of h.
        classes: how many there are.
        device: of h.

    Example:
        >>> probe = OnlineProbe(features=512, classes=10)
        >>> probe.learn(h, labels)
        >>> probe.accuracy(h_test, y_test)
    """

    def __init__(self, features: int, classes: int, device: torch.device | str = "cpu") -> None:
        linear = nn.utils.skip_init(nn.Linear, features, classes)  # whose own initial weights would be drawn
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.norm = nn.BatchNorm1d(features, eps=1e-8, affine=False)
        self.model = nn.Sequential(self.norm, linear).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), LR)
        self.steps = 0

    def learn(self, h: Tensor, labels: Tensor) -> None:
        """A step on features (N, F), of any dtype, and their classes (N,), but for a single row, without variance."""
        if len(h) < 2:
            return
        self.steps += 1
        self.norm.momentum = max(0.1, 1 / self.steps)  # a plain mean at first: h may be far from mean 0, variance 1
        self.model.train()
        F.cross_entropy(self.model(h.detach().float()), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def accuracy(self, h: Tensor, labels: Tensor) -> float:
        """The share of features (N, F) whose class (N,) is found."""
        self.model.eval()
        return float((self.model(h.float()).argmax(1) == labels).float().mean())

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
