"""Eval forward of ResNets and MobileNetV3: as it is, folded, folded and compiled, by torch.fx's fuse, and by inductor's
freezing; and what refresh() takes beside a fold and a copy of the weights.

`python -m benches.bench_conv_bn` prints the tables and writes the rows to benches/results.csv. On a CPU images of 64
pixels are taken, and compiled is one case of each network, and one of ResNet-18 in bf16: compiling takes minutes there.
`--quick` takes ResNet-18, batch 1 and nothing compiled, and writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import ssl_fast
from benches import common
from benches.fold_models import calibrated, error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 224 if DEVICE == "cuda" else 64
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def frozen(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """torch.compile with the weights as constants, which inductor folds; stale once they change."""
    return torch.compile(model, options={"freezing": True})


def providers(model: nn.Module, compiled: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    folded = ssl_fast.fold_conv_bn(model)
    found = {"unfolded": model, "ssl_fast folded": folded, "torch.fx fuse": fuse(model)}
    if compiled:
        found["torch.compile"] = torch.compile(copy.deepcopy(model))
        found["ssl_fast folded, torch.compile"] = torch.compile(folded)
        found["inductor freezing"] = frozen(copy.deepcopy(model))
    return found


@torch.no_grad()
def forward_rows(name: str, dtype: torch.dtype, layout: str, batch: int, compiled: bool, seconds: float) -> Any:
    import torchvision

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    model = calibrated(model.to(DEVICE), torch.randn(8, 3, SIZE, SIZE, device=DEVICE))
    x = torch.randn(batch, 3, SIZE, SIZE, device=DEVICE)
    few = x[:4]
    truth = copy.deepcopy(model).double()(few.double())
    model, x = model.to(dtype, memory_format=FORMATS[layout]), x.to(dtype, memory_format=FORMATS[layout])
    steps = {provider: (lambda f=f: f(x)) for provider, f in providers(model, compiled).items()}
    errors = {provider: error(step()[:4], truth) for provider, step in steps.items()}
    measured = common.interleave(steps, seconds=seconds, rounds=5)
    rows = []
    for provider, times in measured.items():
        row = {"op": "conv_bn", "shape": f"{name} {batch}x3x{SIZE}x{SIZE} {layout} {str(dtype)[6:]}"}
        row |= {"dtype": str(dtype)[6:], "provider": provider, "allocator": "default"}
        rows.append(row | {"error": errors[provider]})
        rows[-1] |= common.timing(times)
    return [row | {"ratio": row["ms"] / rows[0]["ms"], "to": "unfolded"} for row in rows]


@torch.no_grad()
def refresh_rows(name: str, seconds: float) -> list[common.Row]:
    """One refresh after every weight has changed, against a fold from the start and a copy of all weights."""
    import torchvision

    model = torchvision.models.get_model(name, weights=None).eval().to(DEVICE)
    folded = ssl_fast.fold_conv_bn(model)
    flat = torch.cat([t.flatten() for t in (*folded.parameters(), *folded.buffers())])
    kept = torch.empty_like(flat)
    steps: dict[str, Callable[[], Any]] = {
        "copy of the weights": lambda: kept.copy_(flat),
        "refresh": lambda: folded.refresh(force=True),
        "refresh, nothing changed": folded.refresh,
        "fold_conv_bn": lambda: ssl_fast.fold_conv_bn(model),
        "torch.fx fuse": lambda: fuse(model),
    }
    rows = []
    for provider, times in common.interleave(steps, seconds=seconds, rounds=7).items():
        row = {"op": "conv_bn refresh", "shape": f"{name}, {flat.numel()} numbers", "dtype": "float32"}
        rows.append(row | {"provider": provider, "allocator": "default", **common.timing(times)})
    return [row | {"ratio": row["ms"] / rows[0]["ms"], "to": "copy of the weights"} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-18, batch 1, nothing compiled or written")
    quick = parser.parse_args().quick
    print(f"eval forward on {common.device_name()}, {torch.get_num_threads()} threads")
    conditions = common.conditions()

    def show(rows: list[common.Row], *columns: str) -> None:
        print(f"\n{rows[0]['shape']}")
        print(common.table(rows, ("provider", "ms", "ms_p20", "ms_p80", "ratio", *columns)), flush=True)
        if not quick:
            common.save([row | conditions for row in rows])

    networks = ("resnet18",) if quick else ("resnet18", "resnet50", "mobilenet_v3_large")
    for name in networks:
        show(refresh_rows(name, 0.5 if quick else 3.0))
    batches = (1,) if quick else (1, 64)
    for name, layout, batch in itertools.product(networks, FORMATS, batches):
        for dtype in (torch.float32, torch.bfloat16):
            few = (layout, batch) == ("channels_last", 64) and (dtype == torch.float32 or name == "resnet18")
            compiled = not quick and (DEVICE == "cuda" or few)
            show(forward_rows(name, dtype, layout, batch, compiled, 0.5 if quick else 2.0), "error")


if __name__ == "__main__":
    main()
