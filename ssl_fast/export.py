"""`export`: the encoder of a run for other programs, without the head."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_fast._checks import a_path, check_flags
from ssl_fast._extras import nearest, require
from ssl_fast.augment import MEAN_STD
from ssl_fast.data import ImageData, Split
from ssl_fast.features import folded, load_encoder, saved_at
from ssl_fast.run import read_checkpoint

SUFFIXES = {"safetensors": ".safetensors", "torch_export": ".pt2", "onnx": ".onnx"}


def export(
    checkpoint: str | Path,
    format: str,
    out: str | Path,
    *,
    model: nn.Module | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the encoder of a run, images to h, without the head, for use elsewhere.

    Args:
        checkpoint: a checkpoint, or the folder `out` of a run, whose checkpoints/last.pt is taken.
        format: "safetensors", the state dict under the names of torchvision or timm, which load it as it is:
            `torchvision.models.resnet50().load_state_dict(load_file(out), strict=False)`, where only the classifier is
            missing, or `timm.create_model("resnet50", num_classes=0).load_state_dict(load_file(out))`; "torch_export",
            a graph for torch.export.load; or "onnx", for any ONNX runtime. The graphs have their batch norms folded,
            and take any number of images.
        out: the file, ending in .safetensors, .pt2 or .onnx.
        model: the nn.Module that was trained, for runs whose model had no name.
        overwrite: replace `out`.

    Returns:
        A dict: `out`, `format`, `model`, `stem`, `input` (N, C, H, W), `features`, and the `mean` and `std` of each
        channel that images between 0 and 1 are normalised with; the file holds them too. With the stem "small", a
        ResNet has a 3x3 convolution of stride 1 as conv1, and no pooling after it.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: naming the argument, before anything is written.
        ImportError: where the packages that write a format are not installed.

    Example:
        >>> export("out/simclr", "onnx", "encoder.onnx")
    """
    check_flags(overwrite=overwrite)
    target = a_path("out", out, f"the path of a file ending in {', '.join(SUFFIXES.values())}")
    if format not in list(SUFFIXES):
        near = nearest(str(format), list(SUFFIXES))
        raise ValueError(f"format: got {format!r}, {near}allowed: {', '.join(SUFFIXES)}")
    if target.suffix != SUFFIXES[format]:
        raise ValueError(f"out: got {str(out)!r} with format={format}, allowed: a file ending in {SUFFIXES[format]}")
    if target.exists() and not overwrite:
        raise FileExistsError(f"out: {target} exists; add overwrite=true to replace it, or choose another file")
    for module in {"onnx": ("onnx", "onnxscript"), "safetensors": ("safetensors.torch",)}.get(format, ()):
        require(module, f"format={format}", "export" if format == "onnx" else "train")
    saved = read_checkpoint(saved_at(checkpoint))
    encoder = load_encoder(saved, model).eval()
    channels, size = saved["channels"], saved["image_size"]
    images = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = encoder(images).shape[1]
    mean, std = (list(values) for values in MEAN_STD[channels])
    facts = {"model": saved["args"]["model"], "stem": saved["args"]["stem"], "method": saved["args"]["method"]}
    facts |= {"step": saved["step"], "input": ["N", *images.shape[1:]], "features": features, "mean": mean, "std": std}
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp_{target.name}")
    try:
        if format != "safetensors":
            nothing = Split(torch.empty(0))
            encoder = folded(encoder, ImageData("", size, channels, nothing), images.device).requires_grad_(False)
        WRITERS[format](encoder, images, temporary, {key: json.dumps(value) for key, value in facts.items()})
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return {"out": str(target), "format": format, **facts}


def _safetensors(encoder: nn.Module, images: Tensor, path: Path, facts: dict[str, str]) -> None:
    weights = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    require("safetensors.torch", "format=safetensors").save_file(weights, path, {"format": "pt", **facts})


def _exported(encoder: nn.Module, images: Tensor) -> Any:
    return torch.export.export(encoder, (images,), dynamic_shapes=({0: torch.export.Dim("N")},))


def _torch_export(encoder: nn.Module, images: Tensor, path: Path, facts: dict[str, str]) -> None:
    torch.export.save(_exported(encoder, images), path, extra_files=facts)


def _onnx(encoder: nn.Module, images: Tensor, path: Path, facts: dict[str, str]) -> None:
    program = torch.onnx.export(
        _exported(encoder, images), (images,), input_names=["images"], output_names=["h"], dynamo=True, verbose=False
    )
    assert program is not None
    program.model.metadata_props.update(facts)
    program.save(path, external_data=False)


WRITERS: dict[str, Callable[[nn.Module, Tensor, Path, dict[str, str]], None]] = {
    "safetensors": _safetensors,
    "torch_export": _torch_export,
    "onnx": _onnx,
}
