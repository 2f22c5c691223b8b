"""What the op tests share: the backends at hand, the fp64 oracle's rule, and error measures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_fast._op import Op
from ssl_fast.backbones import build_encoder
from ssl_fast.methods import METHODS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# An error may be twice that of plain PyTorch in the same dtype, plus this, as a share of the norm of the whole tensor.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}


def backends(op: Op, dtype: torch.dtype) -> list[str]:
    """The backends of an op that run a dtype on the device under test."""
    return [b for b in ("native", "triton", "reference") if op.reason(b, DEVICE, dtype) is None]


def error(value: Tensor, truth: Tensor) -> float:
    """Relative error in the norm of the whole tensor; NaN and inf anywhere count as infinite."""
    difference = (value.double() - truth.double()).norm().item()
    scale = truth.double().norm().item()
    if not (difference < float("inf")):
        return float("inf")
    return difference / scale if scale else difference


def assert_close(name: str, value: Tensor, truth: Tensor, plain: Tensor | None, dtype: torch.dtype) -> None:
    """The pass rule: error against fp64 <= 2 x plain PyTorch's error in the same dtype + the dtype's floor."""
    ours, floor = error(value, truth), FLOOR[dtype]
    theirs = 0.0 if plain is None else error(plain, truth)
    limit = floor + (2 * theirs if theirs < float("inf") else 0.0)
    assert ours <= limit, f"{name}: error {ours:.2e}, allowed {limit:.2e} (plain PyTorch {theirs:.2e})"


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """Normal random numbers, with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(s, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype).requires_grad_()
        for s in shapes
    ]


class NeverWaits(TorchDispatchMode):
    """On the meta device: refuses what on CUDA waits for the device, or copies from host memory and waits, neither of
    which a CUDA graph captures."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        copies = len(devices) > 1 and name != "ema_update_"  # whose momentum is a number of the host
        assert not copies and name not in ("_local_scalar_dense", "nonzero", "lift_fresh"), func
        return result


def checkpoint(folder: Path, model: str = "convnet", size: int = 8, channels: int = 1, method: str = "simclr",
               data: str = "digits", stem: str = "auto") -> Path:  # fmt: skip
    """The checkpoint of a run of no steps, whose batch norms have seen something; returns the run's folder."""
    torch.manual_seed(0)
    encoder, features = build_encoder(model, size, channels, stem)
    with torch.no_grad():
        for _ in range(3):
            encoder.train()(torch.rand(8, channels, size, size))
    network = METHODS[method].build(encoder, features, dim=16, **({"K": 64} if "moco" in method else {}))
    args = {"data": data, "data_dir": None, "model": model, "method": method, "stem": stem}
    facts = {"args": args, "named": True, "step": 0, "image_size": size, "channels": channels}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({**facts, "model": network.state_dict()}, folder / "checkpoints" / "last.pt")
    return folder
