"""Encoders f by name: a small built-in one, torchvision's and timm's, with a stem that fits the images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssl_fast._extras import nearest, require

SMALL_IMAGE = 64  # pixels; up to here a 7x7 stride-2 convolution and a pooling throw away too much


class ConvNet(nn.Module):
    """Four 3x3 convolutions with batch norm and ReLU, the second and fourth of stride 2, then a global average.

    For images of 8 to 32 pixels on a CPU; `model="convnet"`. Input (N, channels, H, W), output h (N, 4 * width).
    """

    def __init__(self, channels: int = 3, width: int = 32) -> None:
        super().__init__()
        widths = [channels, width, 2 * width, 2 * width, 4 * width]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(widths[i], widths[i + 1], 3, stride=1 + i % 2, padding=1, bias=False),
                    nn.BatchNorm2d(widths[i + 1]),
                    nn.ReLU(inplace=True),
                )
                for i in range(4)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).mean((2, 3))


def build_encoder(
    model: str | nn.Module, image_size: int, channels: int = 3, stem: str = "auto"
) -> tuple[nn.Module, int]:
    """The encoder f without its classifier, and the width of h = f(x).

    Args:
        model: "convnet", a torchvision name, a timm name (or "timm/NAME" where both have it), or any nn.Module that
            maps (N, channels, image_size, image_size) to (N, features); a module is taken as it is.
        image_size: pixels of a side.
        channels: 1 or 3; the first convolution of a named model takes that many.
        stem: "small" puts a 3x3 stride-1 convolution without max pooling in front of a ResNet, as SimCLR does on
            CIFAR-10; "imagenet" keeps the 7x7 stride-2 one; "auto" is "small" for ResNets up to 64 pixels.

    Raises:
        ValueError: for a name that neither library has, a stem the model lacks, or an output that is not (N, features).

    Example:
        >>> encoder, width = build_encoder("resnet18", image_size=32)  # width 512
    """
    if stem not in ("auto", "small", "imagenet"):
        raise ValueError(f"stem: got {stem!r}, allowed: auto, small, imagenet")
    if not isinstance(model, (str, nn.Module)):
        raise TypeError(f"model: got {model!r}, allowed: the name of one, or an nn.Module")
    encoder = _by_name(model, channels) if isinstance(model, str) else model
    if isinstance(model, str) and stem != "imagenet" and (stem == "small" or image_size <= SMALL_IMAGE):
        if isinstance(getattr(encoder, "maxpool", None), nn.Module) and isinstance(
            getattr(encoder, "conv1", None), nn.Conv2d
        ):
            encoder.conv1 = _conv_like(encoder.conv1, kernel_size=3, stride=1, padding=1)
            encoder.maxpool = nn.Identity()
        elif stem == "small":
            raise ValueError(f"stem: got 'small', but {model!r} has no ResNet stem; allowed for it: auto, imagenet")
    return encoder, _width(encoder, model, (channels, image_size, image_size))


def _by_name(name: str, channels: int) -> nn.Module:
    if name == "convnet":
        return ConvNet(channels)
    models = require("torchvision.models", f"model={name!r}")
    if name in models.list_models(module=models):
        return _torchvision(models.get_model(name, weights=None), name, channels)
    timm_name, known = name.removeprefix("timm/"), ["convnet", *models.list_models(module=models)]
    try:
        timm = require("timm", f"model={name!r}")
    except ImportError:
        timm, where = None, "timm, which could have more, is not installed: pip install timm"
    else:
        where = "or a name of timm.list_models()"
        if timm_name in (names := timm.list_models()):
            return timm.create_model(timm_name, num_classes=0, in_chans=channels)
        known += names
    raise ValueError(
        f"model: got {name!r}, {nearest(timm_name, known)}allowed: convnet, "
        f"a name of torchvision.models.list_models(), {where}"
    )


def _torchvision(model: nn.Module, name: str, channels: int) -> nn.Module:
    """Drop the classifier, which is the last linear layer, and fit the first convolution to the channels."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    convs = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if not linear or not convs:
        raise ValueError(
            f"model: {name!r} has no linear classifier to remove; pass an nn.Module that returns (N, features)"
        )
    if getattr(model, "aux_logits", False):
        raise ValueError(f"model: {name!r} has auxiliary classifiers; take 'timm/{name}', or pass an nn.Module")
    model.set_submodule(linear[-1], nn.Identity())
    first = model.get_submodule(convs[0])
    if first.in_channels != channels:
        model.set_submodule(convs[0], _conv_like(first, in_channels=channels))
    return model


def _conv_like(conv: Any, **changes: Any) -> nn.Conv2d:
    keys = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return nn.Conv2d(**{key: getattr(conv, key) for key in keys} | {"bias": conv.bias is not None} | changes)


@torch.no_grad()
def _width(encoder: nn.Module, name: str | nn.Module, shape: tuple[int, int, int]) -> int:
    parameter = next(encoder.parameters(), torch.empty(()))
    training = encoder.training
    try:
        h = encoder.eval()(parameter.new_zeros(2, *shape))
    except Exception as error:
        raise ValueError(f"model: {_title(name)} does not take images of shape {shape}: {error}") from error
    finally:
        encoder.train(training)
    if not isinstance(h, Tensor) or h.ndim != 2:
        got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(
            f"model: {_title(name)} returned {got} for 2 images, allowed: (2, features); for feature maps wrap it in "
            "nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten())"
        )
    return h.shape[1]


def _title(model: str | nn.Module) -> str:
    return repr(model) if isinstance(model, str) else type(model).__name__
