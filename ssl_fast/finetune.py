"""Fine-tuning with a share of the labels, all layers or those after the frozen ones; transfer."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_fast._checks import is_number
from ssl_fast._extras import nearest
from ssl_fast._folded import _Folded
from ssl_fast.augment import POLICIES, Policy, TwoViews, seed_of
from ssl_fast.backbones import _width
from ssl_fast.data import ImageData, Loader, Split, epoch_batches
from ssl_fast.features import as_channels, encode, folded
from ssl_fast.folder import ImageFiles
from ssl_fast.optim import SCHEDULES
from ssl_fast.progress import counted

log = logging.getLogger("ssl_fast")
FINETUNE_BATCH, FINETUNE_LR = 256, 0.05  # SimCLR, section B.5


def balanced_subset(labels: Tensor, fraction: float, seed: int = 0, names: Sequence[str] = ()) -> Tensor:
    """Indices, sorted, of a share of the images with as many of each class (SimCLR, section 4.2, on 1% and 10%).

    Of each class round(fraction * N / classes) images. The same at every call with a seed, and those of a smaller
    fraction are among those of a larger one. A fraction of 1 is every image.

    Args:
        labels: classes (N,), integers from 0.
        fraction: above 0, at most 1.
        seed: of the draw.
        names: of the classes, for errors.

    Raises:
        ValueError: where that is less than one image of a class, or more than a class has.

    Example:
        >>> balanced_subset(torch.arange(1000) % 10, 0.01)  # ten images, one of each class
    """
    if not is_number(fraction) or not 0 < fraction <= 1:
        raise ValueError(f"label_fraction: got {fraction!r}, allowed: above 0 and at most 1, such as 0.01, 0.1 or 1.0")
    if fraction == 1:
        return torch.arange(len(labels))
    classes, counts = labels.unique(return_counts=True)
    each, fewest = round(fraction * len(labels) / len(classes)), int(counts.min())
    label = int(classes[counts.argmin()])
    rarest = names[label] if names else label
    if not 1 <= each <= fewest:
        low, high = (math.ceil(0.501 * len(classes) / len(labels) * 1e4) / 1e4, fewest * len(classes) / len(labels))
        raise ValueError(
            f"label_fraction: got {fraction}, which is {each} images of each of the {len(classes)} classes, and class "
            f"{rarest} has {fewest}, allowed: {low:g} to {math.floor(high * 1e4) / 1e4:g}, or 1 for all; change it, or "
            "add images of that class"
        )
    chosen = []
    for label in classes.tolist():
        own = (labels == label).nonzero().flatten()
        chosen.append(own[torch.randperm(len(own), generator=_generator((seed, label)))[:each]])
    return torch.cat(chosen).sort().values


def subset(split: Split, indices: Tensor) -> Split:
    """The split of these images alone."""
    images = split.images
    chosen = (
        ImageFiles([images.files[i] for i in indices], images.size)
        if isinstance(images, ImageFiles)
        else images[indices]
    )
    return Split(chosen, None if split.labels is None else split.labels[indices])


def stages(encoder: nn.Module) -> list[str]:
    """The stages of an encoder by name, in order: its children, and those of each nn.Sequential or nn.ModuleList."""
    names = []
    for name, child in encoder.named_children():
        inner: Iterable[tuple[str, nn.Module]] = ()
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            inner = ((f"{name}.{key}", module) for key, module in child.named_children())
        names += [n for n, m in [(name, child), *inner] if next(m.parameters(), None) is not None]
    return names


def freeze_through(encoder: nn.Module, stage: str) -> list[str]:
    """Freeze an encoder from its input up to and with a stage: no gradient for what is registered before its end.

    Args:
        encoder: whose parameters are changed.
        stage: the name of a submodule, such as "layer2" or "blocks.5".

    Returns:
        The names of the outermost modules that are frozen; keep them in eval mode.

    Raises:
        ValueError: for another name; the message lists the stages.

    Example:
        >>> freeze_through(torchvision.models.resnet18(), "layer1")
        ['conv1', 'bn1', 'relu', 'maxpool', 'layer1']
    """
    names = [name for name, _ in encoder.named_modules()][1:]
    if stage not in names:
        known = stages(encoder)
        raise ValueError(
            f"freeze: got {stage!r}, {nearest(stage, known)}allowed: a stage of {type(encoder).__name__}, "
            f"{', '.join(known)}, up to which, and with which, it is frozen"
        )
    above = ["", *(name for name in names if stage.startswith(f"{name}."))]
    end = max(i for i, name in enumerate(names) if f"{name}.".startswith(f"{stage}."))
    frozen = [name for name in names[: end + 1] if name not in above]
    outermost = [name for name in frozen if name.rpartition(".")[0] in above]
    for name in outermost:
        encoder.get_submodule(name).requires_grad_(False)
    for name in above:  # what a module holds itself comes before its children: a ViT's class token
        for parameter in encoder.get_submodule(name).parameters(recurse=False):
            parameter.requires_grad_(False)
    return outermost


def finetune(
    encoder: nn.Module,
    train: Split,
    test: Split,
    data: ImageData,
    device: torch.device,
    *,
    freeze: str = "none",
    epochs: int = 60,
    lr: float | None = None,
    num_workers: int = 0,
    seed: int = 0,
) -> float:
    """Train the encoder and a linear classifier on h with labels, and return the accuracy on the test images.

    The recipe of SimCLR (arXiv 2002.05709, section B.5): SGD with Nesterov momentum 0.9, learning rate 0.05 times
    batch / 256, random crops and flips (no flips of digits), neither warm-up nor weight decay; and a cosine decay.
    Batches are of 256; of a quarter of the images, but at least 8, where there are fewer than 1,024, at the same rate.
    Frozen layers are in eval mode, their batch norms too, and are folded unless a norm right after them is trained.
    A function of its arguments, to the bit on a CPU.

    Args:
        encoder: maps images to h (N, features); it is trained in place.
        train, test: labelled splits.
        data: whose size and channels the views have, and whose name decides on flips.
        device: of the encoder.
        freeze: "none", or the last stage that is frozen, see `freeze_through`.
        epochs: passes over the training images; the paper takes 60 of 1% of the labels and 30 of 10%.
        lr: the learning rate; default 0.05.
        num_workers: processes that decode images from a folder.
        seed: of the classifier, the order and the augmentation.

    Raises:
        ValueError: for a stage that the encoder lacks.
        FloatingPointError: where the loss is no longer finite.
    """
    assert train.labels is not None and test.labels is not None
    n = len(train)
    batch = min(FINETUNE_BATCH, max(8, n // 4), n)
    lr = FINETUNE_LR if lr is None else lr
    outermost = [] if freeze == "none" else freeze_through(encoder, freeze)
    _fold_frozen(encoder, outermost, data, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        width = _width(encoder, encoder, (data.channels, data.size, data.size))
        network = nn.Sequential(encoder, nn.Linear(width, int(train.labels.max()) + 1)).to(device)
        network.to(memory_format=torch.channels_last)
        frozen = {module for name in outermost for module in encoder.get_submodule(name).modules()}
        for module in network.modules():
            module.training = module not in frozen
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True)
        views = TwoViews(_light(data), data.size, views=1, seed=seed)
        labels, loader = train.labels.to(device), Loader(train, device, num_workers)
        total, step = epochs * (n // batch), 0
        loss = torch.zeros(())
        for epoch in counted(range(epochs), epochs, "fine-tuning, epochs"):
            for images, indices in loader(epoch_batches(n, batch, seed, epoch)):
                (view,) = views(as_channels(images, data.channels), indices, epoch)
                optimizer.param_groups[0]["lr"] = lr * SCHEDULES["cosine"](step, total, 0)
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(network(view), labels[indices.to(device)])
                loss.backward()
                optimizer.step()
                step += 1
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss of fine-tuning is {loss.item()} with lr={lr}; lower lr")
        tested = folded(network, data, device)
        logits, known = encode(tested, test, data.size, device, num_workers=num_workers, channels=data.channels)
    return int((logits.argmax(1) == known).sum()) / len(known)


def _fold_frozen(encoder: nn.Module, outermost: list[str], data: ImageData, device: torch.device) -> None:
    """Fold what is frozen, in place, unless a norm and the layer in front of it are on different sides."""
    copy = folded(encoder, data, device) if outermost else encoder
    if not isinstance(copy, _Folded):
        return
    inside = tuple(f"{name}." for name in outermost)
    pairs = [(norm, layer) for norm, layers in copy.fold_report.folded.items() for layer in layers.split(", ")]
    if all(f"{norm}.".startswith(inside) == f"{layer}.".startswith(inside) for norm, layer in pairs):
        for name in outermost:
            encoder.set_submodule(name, copy.get_submodule(name))


def _light(data: ImageData) -> Policy:
    """Crops and flips alone, with the gentle crops and no flips for digits."""
    policy = POLICIES["digits"] if data.name == "digits" else Policy()
    return replace(policy, strength=0.0, gray=0.0, blur=0.0)


def _generator(key: tuple[int, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(key))
