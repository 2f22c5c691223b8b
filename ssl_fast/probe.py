"""The linear probe: what a linear classifier reads from frozen features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_fast._extras import nearest, require
from ssl_fast.data import epoch_batches
from ssl_fast.optim import SCHEDULES
from ssl_fast.progress import counted

PROBES = ("auto", "sgd", "logistic")
SMALL_DATA = 10_000  # images, up to which "auto" is logistic regression
PROBE_LR, PROBE_EPOCHS, PROBE_BATCH = 30.0, 100, 256  # MoCo v1, section 4.1


def linear_probe(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    probe: str = "auto",
    *,
    epochs: int | None = None,
    lr: float | None = None,
    seed: int = 0,
) -> float:
    """Accuracy of a linear classifier on frozen features, standardised with the mean and deviation of the bank.

    "sgd" is the recipe of MoCo (arXiv 1911.05722, section 4.1), which others took over:
    momentum 0.9, no weight decay, batches of 256, learning rate 30, a tenth of it from 60% and from 80% of 100 epochs
    on. Its rate is one of features of about unit length, to which they are scaled. "logistic" is scikit-learn's
    regression (C=1, L-BFGS), on one thread. Both are deterministic.

    Args:
        bank, queries: features (B, F) to learn from and (Q, F) to test on.
        bank_labels, query_labels: classes (B,) and (Q,), integers from 0.
        probe: "sgd", "logistic", or "auto": logistic for up to 10,000 images.
        epochs, lr: of "sgd"; default 100 and 30.
        seed: of the initial weights and the order of "sgd".

    Example:
        >>> linear_probe(h_train, y_train, h_test, y_test)
    """
    if probe_named(probe, len(bank)) == "logistic":
        return _regression(bank, bank_labels, queries, query_labels)
    std, mean = torch.std_mean(bank, 0, correction=0)
    scale = torch.where(std > 0, std, 1.0).reciprocal() / math.sqrt(bank.shape[1])
    classifier = _trained(
        bank, bank_labels, mean, scale, PROBE_EPOCHS if epochs is None else epochs, PROBE_LR if lr is None else lr, seed
    )
    with torch.no_grad():
        right = [
            (classifier((q - mean) * scale).argmax(1) == y).sum()
            for q, y in zip(queries.split(4096), query_labels.split(4096), strict=True)
        ]
    return int(torch.stack(right).sum()) / len(queries)


def probe_named(probe: str, images: int) -> str:
    """ "sgd" or "logistic", where "auto" goes by the number of images to learn from."""
    if probe not in PROBES:
        raise ValueError(f"probe: got {probe!r}, {nearest(str(probe), list(PROBES))}allowed: {', '.join(PROBES)}")
    return ("logistic" if images <= SMALL_DATA else "sgd") if probe == "auto" else probe


def _regression(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    linear, pipeline, preprocessing, pools = (
        require(module, "the linear probe")
        for module in ("sklearn.linear_model", "sklearn.pipeline", "sklearn.preprocessing", "threadpoolctl")
    )
    classifier = pipeline.make_pipeline(preprocessing.StandardScaler(), linear.LogisticRegression(max_iter=2000))
    # One thread: each of its hundreds of steps is a millisecond of work, after which two threads that share their
    # cores with other programs wait for each other far longer.
    with pools.threadpool_limits(1):
        classifier.fit(bank.cpu().numpy(), bank_labels.cpu().numpy())
        return float(classifier.score(queries.cpu().numpy(), query_labels.cpu().numpy()))


def _trained(x: Tensor, labels: Tensor, mean: Tensor, scale: Tensor, epochs: int, lr: float, seed: int) -> nn.Linear:
    """A linear classifier of (x - mean) * scale, which is formed batch by batch: the features are not copied."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = nn.Linear(x.shape[1], int(labels.max()) + 1)
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
    classifier.to(x.device)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=lr, momentum=0.9)
    batch = min(PROBE_BATCH, len(x))
    total, step = epochs * (len(x) // batch), 0
    for epoch in counted(range(epochs), epochs, "linear probe, epochs"):
        for indices in epoch_batches(len(x), batch, seed, epoch):
            indices = indices.to(x.device)
            optimizer.param_groups[0]["lr"] = lr * SCHEDULES["step"](step, total, 0)
            optimizer.zero_grad()
            F.cross_entropy(classifier((x[indices] - mean) * scale), labels[indices]).backward()
            optimizer.step()
            step += 1
    if not all(bool(p.isfinite().all()) for p in classifier.parameters()):
        raise FloatingPointError(f"the linear probe is no longer finite with lr={lr}; lower lr")
    return classifier
