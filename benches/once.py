"""Every kernel of ours once, by each backend that is named, at small shapes: what compute-sanitizer looks at.

`python -m benches.once nt_xent ema` takes the ops of these benches: the steps of ours at their quick shapes, and what
those do not reach. Each tensor has memory of its own, where a kernel that leaves one is seen to.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ssl_fast
from benches import common
from benches.machine import DEVICE
from ssl_fast import ema_update_
from ssl_fast.functional import barlow_twins, batch_norm, clip, info_nce, layer_norm, nt_xent, sup_con
from ssl_fast.ops import _norms
from ssl_fast.ops import batch_norm as batch_norm_ops

# With the precision of fp32 products: in kernels they are TF32's, the others cuBLAS's.
BACKENDS = (("native", "highest"), ("triton", "highest"), ("triton", "high"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = (torch.contiguous_format, torch.channels_last)


def rows(N: int, D: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(N, D, device=DEVICE).to(dtype).requires_grad_()


# ---- beyond the quick shapes of the benches, for a dtype


def beyond_nt_xent(dtype: torch.dtype) -> None:
    """An odd width, wide rows, and a temperature that needs the maximum."""
    for N, D, t in ((65, 123, 0.1), (33, 768, 0.1), (65, 64, 0.005)):
        nt_xent(rows(N, D, dtype), rows(N, D, dtype), t).backward()


def beyond_info_nce(dtype: torch.dtype) -> None:
    """One pass over a queue, by each of its tiles, with groups."""
    for D in (40, 128, 200, 300):
        q, k, queue = (rows(n, D, dtype) for n in (33, 33, 257))
        ids, of_queue = (torch.arange(n, device=DEVICE) % 5 for n in (33, 257))
        info_nce(q, k, queue.detach(), group_ids=ids, negative_group_ids=of_queue).backward()


def beyond_clip(dtype: torch.dtype) -> None:
    """The rows of a batch against each other, an odd width."""
    q, k = rows(65, 123, dtype), rows(65, 123, dtype)
    clip(q, k, 10.0).backward()
    sup_con(q, torch.arange(65, device=DEVICE) % 5).backward()


def beyond_batch_norm(dtype: torch.dtype) -> None:
    """Rows that no vector fits, in parts; more than the multiprocessors hold; over the input; what processes share."""
    for (shape, splits), layout in itertools.product((((6, 5, 7, 7), 2), ((32, 256, 48, 48), 1)), FORMATS):
        x = torch.randn(shape, device=DEVICE).to(dtype, memory_format=layout).requires_grad_()
        weight, bias, mean, var = (torch.rand(shape[1], device=DEVICE) for _ in range(4))
        keys: dict[str, Any] = {"activation": "relu", "residual": x, "num_splits": splits}
        y = batch_norm(x, mean, var, weight.requires_grad_(), bias, True, **keys)
        y.backward(torch.ones_like(y))
        with torch.no_grad():
            batch_norm(x.clone(memory_format=torch.preserve_format), mean, var, weight, bias, inplace=True)
            stats = batch_norm_ops.batch_norm_stats(x, splits)
            operands = (y, x, None, None, weight, bias, stats)
            means = batch_norm_ops.batch_norm_sums(*operands, _norms.RELU)
            batch_norm_ops.batch_norm_bwd(*operands, means, True, _norms.RELU, True, False)


def beyond_layer_norm(dtype: torch.dtype) -> None:
    """Rows that no vector fits, and rows that are too wide to be kept; of tokens and of the channels of images."""
    for shape in ((7, 197), (5, 9001), (2, 197, 5, 5), (2, 9001, 5, 5)):
        x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
        weight, bias = (torch.rand(shape[1], device=DEVICE, requires_grad=True) for _ in range(2))
        y = layer_norm(x, (shape[1],), weight, bias, dim=1, activation="gelu")
        y.backward(torch.ones_like(y))


def beyond_barlow_twins(dtype: torch.dtype) -> None:
    for N, D in ((65, 130), (130, 65)):
        barlow_twins(rows(N, D, dtype), rows(N, D, dtype)).backward()


def beyond_ema(dtype: torch.dtype) -> None:
    """Tensors off the 16-byte grid, with gaps, and of another layout than their source."""
    for rounding in ("nearest", "stochastic"):
        targets, sources = ([rows(n, 1031, dtype).detach() for n in (9, 9, 9)] for _ in range(2))
        targets = [targets[0][1:], targets[1][:, ::2], targets[2]]
        sources = [sources[0][1:], sources[1][:, ::2], sources[2].T.contiguous().T]
        ema_update_(targets, sources, 0.9, rounding=rounding)


BEYOND: dict[str, tuple[Callable[[torch.dtype], None], ...]] = {
    "nt_xent": (beyond_nt_xent,),
    "info_nce": (beyond_info_nce, beyond_clip),
    "barlow_twins": (beyond_barlow_twins,),
    "batch_norm": (beyond_batch_norm,),
    "layer_norm": (beyond_layer_norm,),
    "ema": (beyond_ema,),
}


def once(stem: str) -> None:
    """What a backend does not run is left out, and printed."""
    module = common.setups()[stem]
    works = [
        (f"{case} {provider.key}", lambda provider=provider: provider.build()())
        for case in module.cases(True)
        for provider in module.setup(*case).providers
        if provider.name.startswith("ssl_fast")
    ]
    beyond = itertools.product(BEYOND.get(stem, ()), DTYPES)
    works += [(f"{work.__name__} {dtype}", partial(work, dtype)) for work, dtype in beyond]
    for (name, work), (backend, precision) in itertools.product(works, BACKENDS):
        torch.set_float32_matmul_precision(precision)
        torch.manual_seed(0)
        said = ""
        try:
            with ssl_fast.backend(backend):
                work()
        except RuntimeError as error:
            if f"backend {backend!r} cannot run" not in str(error):
                raise
            said = ": does not run there"
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(f"{stem} {name}, {backend}, {precision}{said}", flush=True)


def main() -> int:
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read at the first allocation
    stems = sys.argv[1:]
    for stem in stems or [""]:
        if stem not in common.setups():
            print(f"STEM: got {stem!r}, allowed: {', '.join(common.setups())}\n\n{__doc__}", file=sys.stderr)
            return 2
    for stem in stems:
        once(stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
