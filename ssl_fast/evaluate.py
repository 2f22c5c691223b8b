"""What an encoder's features h are worth: weighted kNN, a linear probe, fine-tuning and transfer."""

from __future__ import annotations

import io
import json
import logging
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_fast._checks import is_number, whole, with_plain_numbers
from ssl_fast._extras import nearest
from ssl_fast.data import ImageData, Split, load_data
from ssl_fast.features import encode, folded, load_encoder, saved_at
from ssl_fast.finetune import balanced_subset, finetune, freeze_through, subset
from ssl_fast.knn import KNN_T, knn_accuracy, knn_k
from ssl_fast.probe import PROBES, linear_probe, probe_named
from ssl_fast.run import pick_device, read_checkpoint, write_atomically

log = logging.getLogger("ssl_fast")
PROTOCOLS = ("knn", "linear", "finetune", "transfer")
INITIAL = ("checkpoint", "random")


@with_plain_numbers
def evaluate(
    checkpoint: str | Path,
    data: str | Path | None = None,
    protocol: str = "knn,linear",
    *,
    model: nn.Module | None = None,
    data_dir: str | Path | None = None,
    initial: str = "checkpoint",
    label_fraction: float = 1.0,
    freeze: str = "none",
    probe: str = "auto",
    epochs: int | None = None,
    lr: float | None = None,
    seeds: int = 1,
    seed: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 256,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Evaluate the encoder of a run by what a task with labels gets from its features h.

    Two evaluations of a checkpoint give the same figures, on a GPU as far as its convolutions are deterministic.

    kNN and the linear probe see features of the frozen encoder, folded, of images as they are. Fine-tuning trains it
    on, see `ssl_fast.finetune.finetune`; transfer does so with the first layers frozen.

    Args:
        checkpoint: a checkpoint, or the folder `out` of a run, whose checkpoints/last.pt is taken.
        data: a labelled data set as `train` takes it; default the run's own. Images are brought to the size and the
            channels that the run had.
        protocol: "knn" (weighted, k = 20, or 200 from 10,000 images up, t = 0.07), "linear", "finetune", "transfer",
            or several with commas between.
        model: the nn.Module that was trained, for runs whose model had no name.
        data_dir: where the files of a named data set are.
        initial: "checkpoint", or "random": the same network with random weights, the baseline of every protocol; with
            finetune it is trained from scratch. A module given as model keeps the weights it has.
        label_fraction: the share of the labelled images to learn from, as many of each class, in every protocol.
        freeze: for transfer, the last of the frozen stages by its name, such as "layer2" or "blocks.1".
        probe: of linear, "sgd", "logistic" or "auto", see `ssl_fast.probe.linear_probe`.
        epochs, lr: of the training that linear by SGD, finetune and transfer do; default each one's recipe.
        seeds: repetitions, from `seed` on, each with labels, weights and order of its own; figures are means.
        seed: of the first.
        out: folder for the indices of the labelled subsets; default `evaluation` in the run's folder.
        device: "auto", "cpu", "cuda" or "cuda:1".
        batch_size: images a forward pass of the frozen encoder.
        num_workers: processes that decode images from a folder.

    Returns:
        A dict of what was evaluated and, by protocol, of accuracies between 0 and 1: `knn` (and `knn_k`, `knn_t`),
        `linear` (and `probe`), `finetune`, `transfer`; with several seeds the mean, and `linear_std`, the sample
        standard deviation, and `linear_seeds`, each figure; for the others alike. `subsets`: the .npy files of indices.
        It is added to evaluations.jsonl in the run's folder, for the run's report.

    Raises:
        ValueError, FileNotFoundError: for a checkpoint or data set that is not there or does not fit, classes that are
            not the same in training and test images, a fraction that a class has too few images for.

    Example:
        >>> evaluate("out/digits")["linear"]
        >>> evaluate("out/digits", protocol="finetune", label_fraction=0.1, seeds=3)["finetune_std"]
    """
    if not isinstance(protocol, str):
        raise TypeError(f"protocol: got {protocol!r}, allowed: names in one string, such as 'knn,linear'")
    protocols = [p.strip() for p in protocol.split(",")]
    _check(protocols, initial, probe, freeze)
    _check_numbers(lr, seeds=(seeds, 1), seed=(seed, 0), epochs=(epochs, 1), batch_size=(batch_size, 1),
                   num_workers=(num_workers, 0))  # fmt: skip
    path = saved_at(checkpoint)
    saved = read_checkpoint(path)
    args, chosen, random, whole = saved["args"], pick_device(device), initial == "random", label_fraction == 1
    images = load_data(data or args["data"], data_dir or args["data_dir"], saved["image_size"])
    images.channels = saved["channels"]
    bank, test, classes = _labelled(images)
    assert bank.labels is not None
    taken = {s: balanced_subset(bank.labels, label_fraction, s, images.classes) for s in range(seed, seed + seeds)}
    if "transfer" in protocols:
        freeze_through(load_encoder(saved, model), freeze)  # raises before any work is done
    count = len(taken[seed])
    result: dict[str, Any] = {"checkpoint": str(path), "data": images.name, "step": saved["step"], "initial": initial}
    result |= {"classes": classes, "images": count}
    if not whole:
        folder = Path(out).expanduser() if out else _run_folder(path) / "evaluation"
        files = [_save(indices, folder, images.name, label_fraction, s) for s, indices in taken.items()]
        result |= {"label_fraction": label_fraction, "subsets": files}
    result |= {"knn_k": knn_k(count), "knn_t": KNN_T} if "knn" in protocols else {}
    result |= {"probe": probe_named(probe, count)} if "linear" in protocols else {}
    result |= {"freeze": freeze} if "transfer" in protocols else {}
    log.info("%s", ", ".join(f"{key} {value}" for key, value in result.items()))

    settings: dict[str, Any] = {"num_workers": num_workers, "channels": images.channels, "title": "features, batches"}
    found: dict[str, list[float]] = {p: [] for p in protocols}
    for s, indices in taken.items():
        start = s if random else None
        if {"knn", "linear"} & set(protocols) and (random or s == seed):
            encoder = folded(load_encoder(saved, model, start).to(chosen), images, chosen)
            bank_h, bank_y = encode(encoder, bank, images.size, chosen, batch_size, **settings)
            test_h, test_y = encode(encoder, test, images.size, chosen, batch_size, **settings)
        for p in protocols:
            if p in ("finetune", "transfer"):
                recipe: dict[str, Any] = {"freeze": freeze if p == "transfer" else "none", "lr": lr, "seed": s}
                recipe |= {"epochs": epochs or (60 if label_fraction < 0.1 else 30), "num_workers": num_workers}
                encoder = load_encoder(saved, model, start).to(chosen)
                value = finetune(encoder, subset(bank, indices), test, images, chosen, **recipe)
            elif s > seed and whole and not random and (p == "knn" or result["probe"] == "logistic"):
                value = found[p][0]  # which no seed changes
            else:
                h, y = (bank_h, bank_y) if whole else (bank_h[indices], bank_y[indices])
                if p == "knn":
                    value = knn_accuracy(h, y, test_h, test_y, k=result["knn_k"])
                else:
                    value = linear_probe(h, y, test_h, test_y, result["probe"], epochs=epochs, lr=lr, seed=s)
            found[p].append(value)
            log.info("seed %d: %s %.4f", s, p, value)
    for p, values in found.items():
        result[p] = statistics.fmean(values)
        result |= {f"{p}_std": statistics.stdev(values), f"{p}_seeds": values} if seeds > 1 else {}
    _record(result, _run_folder(path))
    return result


def _check(protocols: list[str], initial: str, probe: str, freeze: str) -> None:
    words = [*(("protocol", p, PROTOCOLS) for p in protocols), ("initial", initial, INITIAL), ("probe", probe, PROBES)]
    for name, value, allowed in words:
        if value not in allowed:
            several = ", or several with commas between" if name == "protocol" else ""
            raise ValueError(
                f"{name}: got {value!r}, {nearest(str(value), list(allowed))}allowed: {', '.join(allowed)}{several}"
            )
    if freeze != "none" and "transfer" not in protocols:
        raise ValueError(f"freeze: got {freeze!r} without protocol=transfer, allowed: none; add protocol=transfer")


def _check_numbers(lr: float | None, **at_least: tuple[int | None, int]) -> None:
    for name, (number, low) in at_least.items():
        if number is not None or name != "epochs":
            whole(name, number, low)
    if lr is not None and not (is_number(lr) and 0 < lr < math.inf):
        raise ValueError(f"lr: got {lr!r}, allowed: a finite number above 0")


def _labelled(images: ImageData) -> tuple[Split, Split, int]:
    """What to learn from and to test on, and the number of classes, which both have."""
    bank, test = images.bank, images.test
    if bank is None or test is None or bank.labels is None or test.labels is None:
        raise ValueError(
            f"data: {images.name} has no labels to evaluate with, allowed: a named set, or a folder of at least 10 "
            "images with one subfolder per class; pass a labelled set as data="
        )
    known, tested = (set(labels.unique().tolist()) for labels in (bank.labels, test.labels))
    if known != tested:
        where, label = "test" if known - tested else "training", min(known ^ tested)
        name = repr(images.classes[label]) if images.classes else label
        raise ValueError(
            f"data: {images.name} has {len(known)} classes to learn from and {len(tested)} to test on, allowed: the "
            f"same in both; add {where} images of class {name}, in folders train/ and test/, or leave that class out"
        )
    return bank, test, len(known)


def _run_folder(checkpoint: Path) -> Path:
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def _save(indices: Tensor, folder: Path, data: str, fraction: float, seed: int) -> str:
    """Write the indices of a subset, into the images that are learnt from, as .npy, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(data).name}_{fraction:g}_seed{seed}.npy"
    buffer = io.BytesIO()
    np.save(buffer, indices.numpy())
    write_atomically(path, buffer.getvalue())
    return str(path)


def _record(result: dict[str, Any], run: Path) -> None:
    """Add a row to the run's evaluations.jsonl, which its report shows."""
    if not (run / "args.yaml").is_file():  # a checkpoint that was taken elsewhere
        return
    try:
        with (run / "evaluations.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
    except OSError as error:
        log.info("the run's report will not have this evaluation: %s", error)


def knn_on(
    encoder: nn.Module,
    data: ImageData,
    device: torch.device,
    num_workers: int = 0,
    test: tuple[Tensor, Tensor] | None = None,
    together: bool = False,
) -> dict[str, float]:
    """kNN accuracy of an encoder on a labelled data set, with the k and temperature it was taken at.

    `test` is what `encode` returned for data.test, where that is at hand; `together` is as there.
    """
    assert data.bank is not None and data.test is not None
    bank = encode(encoder, data.bank, data.size, device, num_workers=num_workers, together=together)
    test = test or encode(encoder, data.test, data.size, device, num_workers=num_workers, together=together)
    k = knn_k(len(bank[0]))
    return {"knn": round(knn_accuracy(*bank, *test, k=k), 6), "knn_k": k, "knn_t": KNN_T}


def embedding_std(z: Tensor) -> float:
    """The collapse meter: standard deviation of each coordinate of the unit rows z / |z|, averaged over coordinates.

    About 1 / sqrt(D) for embeddings (N, D) spread over the sphere, 0 where all have collapsed into one direction.
    """
    return float(F.normalize(z.detach().float()).std(0, correction=0).mean())
