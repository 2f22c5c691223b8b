"""What the frozen features h are worth: weighted kNN and a linear probe."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_fast._extras import require
from ssl_fast.augment import plain_view
from ssl_fast.backbones import build_encoder
from ssl_fast.data import ImageData, Loader, Split, in_order, load_data
from ssl_fast.fold import _Folded, eval_mode, fold_conv_bn
from ssl_fast.run import pick_device, read_checkpoint

log = logging.getLogger("ssl_fast")
PROTOCOLS = ("knn", "linear")
KNN_T = 0.07


def evaluate(
    checkpoint: str | Path,
    data: str | Path | None = None,
    protocol: str = "knn,linear",
    *,
    model: nn.Module | None = None,
    data_dir: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 256,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Evaluate the frozen encoder of a run by kNN and by logistic regression on h; the same figures at every call.

    Args:
        checkpoint: a checkpoint, or the folder `out` of a run, whose checkpoints/last.pt is taken.
        data: a labelled data set as `train` takes it; default the run's own.
        protocol: "knn", "linear", or both with a comma between.
        model: the nn.Module that was trained, for runs whose model had no name.
        data_dir: where the files of a named data set are.
        device: "auto", "cpu", "cuda" or "cuda:1".
        batch_size: images a forward pass.
        num_workers: processes that decode images from a folder.

    Returns:
        A dict with `knn` (and `knn_k`, `knn_t`), `linear` (accuracies between 0 and 1), and what was evaluated.

    Raises:
        ValueError, FileNotFoundError: for a checkpoint or data set that is not there or does not fit.

    Example:
        >>> evaluate("out/digits")["linear"]
    """
    protocols = [p.strip() for p in protocol.split(",")]
    if unknown := [p for p in protocols if p not in PROTOCOLS]:
        raise ValueError(f"protocol: got {unknown[0]!r}, allowed: {', '.join(PROTOCOLS)}, or both with a comma between")
    path = Path(checkpoint).expanduser()
    path = path / "checkpoints" / "last.pt" if path.is_dir() else path
    saved = read_checkpoint(path)
    args, chosen = saved["args"], pick_device(device)
    images = load_data(data or args["data"], data_dir or args["data_dir"], saved["image_size"])
    if images.bank is None or images.test is None:
        raise ValueError(f"data: {images.name} has no labels to evaluate with; pass a labelled set as data=")
    encoder = folded(load_encoder(saved, model).to(chosen), images, chosen)
    settings: dict[str, Any] = {"device": chosen, "batch_size": batch_size, "num_workers": num_workers}
    bank, bank_labels = encode(encoder, images.bank, images.size, **settings)
    test, test_labels = encode(encoder, images.test, images.size, **settings)
    result: dict[str, Any] = {"checkpoint": str(path), "data": images.name, "step": saved["step"]}
    if "knn" in protocols:
        k = knn_k(len(bank))
        result |= {"knn": knn_accuracy(bank, bank_labels, test, test_labels, k=k), "knn_k": k, "knn_t": KNN_T}
    if "linear" in protocols:
        result["linear"] = linear_probe(bank, bank_labels, test, test_labels)
    return result


def load_encoder(saved: dict[str, Any], model: nn.Module | None = None) -> nn.Module:
    """The encoder f, without the head, of a checkpoint that `read_checkpoint` returned."""
    args = saved["args"]
    if model is None and not saved["named"]:
        raise ValueError(f"model: the run trained an nn.Module of class {args['model']}; pass such a module as model=")
    encoder, _ = build_encoder(
        args["model"] if model is None else model, saved["image_size"], saved["channels"], args["stem"]
    )
    weights = {k.removeprefix("encoder."): v for k, v in saved["model"].items() if k.startswith("encoder.")}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"model: the checkpoint's weights do not fit this model: {error}") from error
    return encoder


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


def knn_k(bank: int) -> int:
    """The k of every kNN figure: 200 for banks of at least 10,000 images, else 20."""
    return 200 if bank >= 10_000 else min(20, bank)


def knn_on(encoder: nn.Module, data: ImageData, device: torch.device, num_workers: int = 0) -> dict[str, float]:
    """kNN accuracy of an encoder on a labelled data set, with the k and temperature it was taken at."""
    assert data.bank is not None and data.test is not None
    bank = encode(encoder, data.bank, data.size, device, num_workers=num_workers)
    test = encode(encoder, data.test, data.size, device, num_workers=num_workers)
    k = knn_k(len(bank[0]))
    return {"knn": round(knn_accuracy(*bank, *test, k=k), 6), "knn_k": k, "knn_t": KNN_T}


@torch.no_grad()
def encode(
    encoder: nn.Module,
    split: Split,
    size: int,
    device: torch.device,
    batch_size: int = 256,
    num_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features (N, F), fp32, and labels (N,) of a split, both on the device; the encoder in eval mode.

    Without labels, the labels are -1. Every module is left in the mode it was in.
    """
    features, labels = [], []
    known = split.labels if split.labels is not None else torch.full((len(split),), -1)
    with eval_mode(encoder):
        for images, indices in Loader(split, device, num_workers)(in_order(len(split), batch_size)):
            features.append(encoder(plain_view(images, size)).float())
            labels.append(known[indices])
    return torch.cat(features), torch.cat(labels).to(device)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = KNN_T,
    block: int = 4096,
) -> float:
    """Accuracy of the weighted kNN of Wu et al. 2018 (arXiv 1805.01978): each neighbour votes exp(cosine / t).

    Blockwise over queries and bank: memory is O(block^2), whatever their sizes.

    Args:
        bank, queries: features (B, F) and (Q, F).
        bank_labels, query_labels: classes (B,) and (Q,), integers from 0.
        k: neighbours, at most B.
        temperature: t > 0.

    Example:
        >>> knn_accuracy(h_train, y_train, h_test, y_test, k=200)
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k: got {k}, allowed: 1 to {len(bank)}, the images in the bank")
    bank, classes, right = F.normalize(bank), int(bank_labels.max()) + 1, 0
    for query, label in zip(F.normalize(queries).split(block), query_labels.split(block), strict=True):
        best = torch.empty(len(query), 0, device=query.device)
        votes_for = torch.empty(len(query), 0, dtype=torch.long, device=query.device)
        for part, part_labels in zip(bank.split(block), bank_labels.split(block), strict=True):
            best = torch.cat([best, query @ part.T], 1)
            votes_for = torch.cat([votes_for, part_labels.expand(len(query), -1)], 1)
            best, kept = best.topk(min(k, best.shape[1]), dim=1)
            votes_for = votes_for.gather(1, kept)
        # exp((s - max) / t) in place of exp(s / t): the same vote without overflow at a small t.
        votes = torch.exp((best - best[:, :1]) / temperature)
        score = torch.zeros(len(query), classes, device=query.device).scatter_add_(1, votes_for, votes)
        right += int((score.argmax(1) == label).sum())
    return right / len(queries)


def linear_probe(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    """Accuracy of scikit-learn's logistic regression (C=1, L-BFGS) on standardised features.

    Arguments as in `knn_accuracy`. For data that fits in memory; deterministic.
    """
    linear = require("sklearn.linear_model", "the linear probe")
    pipeline, preprocessing = require("sklearn.pipeline", "the probe"), require("sklearn.preprocessing", "the probe")
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), linear.LogisticRegression(max_iter=2000))
    probe.fit(bank.cpu().numpy(), bank_labels.cpu().numpy())
    return float(probe.score(queries.cpu().numpy(), query_labels.cpu().numpy()))


def embedding_std(z: Tensor) -> float:
    """The collapse meter: standard deviation of each coordinate of the unit rows z / |z|, averaged over coordinates.

    About 1 / sqrt(D) for embeddings (N, D) spread over the sphere, 0 where all have collapsed into one direction.
    """
    return float(F.normalize(z.detach().float()).std(0, correction=0).mean())
