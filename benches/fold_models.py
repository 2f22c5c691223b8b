"""Folds every torchvision classification model that has batch norms, and thirteen of timm's: how many norms were
folded, how many left and why, and the error of the folded fp32 model against fp64, beside that of the unfolded.

Weights are random; affine and statistics are not the defaults, and the statistics those of the batch, so that an error
in any norm shows. `python -m benches.fold_models` writes docs/fold_models.md, model by model; names as arguments, such
as `resnet18 "timm dla34"`, measure these alone anew.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import ssl_fast
from benches import results
from ssl_fast.fold import FoldReport

TABLE = Path(__file__).parents[1] / "docs/fold_models.md"
NORMS = nn.modules.batchnorm._BatchNorm
TIMM = ("resnet18", "resnetv2_50", "efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv3_small_100", "regnety_002",
        "mixnet_s", "ghostnet_100", "dla34", "cspresnet50", "densenet121", "repvgg_a0", "levit_128s")  # fmt: skip
COLUMNS = ("model", "norms", "folded", "left", "why left", "draws", "error, unfolded", "error, folded", "ratio")
SIZE = {"inception_v3": 96, "maxvit_t": 224, "timm levit_128s": 224}  # of images; the others take 64
DRAWS = {"timm levit_128s": 16}  # the others take 4
BATCH = 4
WITHOUT = "Without batch norm: "


def models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    import timm
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        yield name, lambda name=name, options=options: torchvision.models.get_model(name, weights=None, **options)
    for name in TIMM:
        yield f"timm {name}", lambda name=name: timm.create_model(name)


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """In eval mode with affine that is not the default, and the statistics of x."""
    norms = [m for m in model.eval().modules() if isinstance(m, NORMS)]
    for norm in norms:
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(x)
    return model.eval()


def first(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output))  # type: ignore[call-overload]


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@torch.no_grad()
def errors(model: nn.Module, draws: int, size: int = 64) -> tuple[float, float, FoldReport]:
    """The relative errors of the fp32 outputs against fp64, unfolded and folded, and the report.

    Geometric means over draws of affine, images and their statistics: the ratio of one draw is rounding noise, the more
    so the more a network amplifies that.
    """
    logs = torch.zeros(2, dtype=torch.float64)
    for seed in range(draws):
        torch.manual_seed(seed)
        x = torch.randn(BATCH, 3, size, size)
        model = calibrated(model, x)
        truth = first(copy.deepcopy(model).double()(x.double()))
        folded = ssl_fast.fold_conv_bn(model)
        logs += torch.tensor([error(first(net(x)), truth) for net in (model, folded)], dtype=torch.float64).log()
    plain, ours = (logs / draws).exp().tolist()
    return plain, ours, folded.fold_report


def measured(name: str, build: Callable[[], nn.Module]) -> results.Row | None:
    """The model's row; None where it has no batch norm."""
    with torch.device("meta"):
        try:
            if not any(isinstance(m, NORMS) for m in build().modules()):
                return None
        except (NotImplementedError, RuntimeError):  # an initialisation that looks at values
            pass
    torch.manual_seed(0)
    model = build()
    if not any(isinstance(m, NORMS) for m in model.modules()):
        return None
    draws = DRAWS.get(name, 4)
    plain, ours, report = errors(model, draws, SIZE.get(name, 64))
    why = Counter(report.left.values())
    return {
        "model": name,
        "norms": len(report.folded) + len(report.left),
        "folded": len(report.folded),
        "left": len(report.left),
        "why left": "; ".join(f"{count}x {reason}" for reason, count in why.items()),
        "draws": draws,
        "error, unfolded": plain,
        "error, folded": ours,
        "ratio": ours / plain,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models, as in the table; default all")
    names = parser.parse_args().names
    rows, without = read() if names else ({}, [])
    for name, build in models():
        if names and name not in names:
            continue
        try:
            row = measured(name, build)
        except Exception as problem:  # one model must not end the table
            row = {"model": name, "why left": f"{type(problem).__name__}: {str(problem).splitlines()[0]}"}
        if row is not None:
            rows[name] = row
            print(*(f"{c}={row.get(c)}" for c in COLUMNS), sep="  ", flush=True)
        elif name not in without:
            without.append(name)
        gc.collect()
        write(rows, without)


def write(rows: dict[str, results.Row], without: list[str]) -> None:
    TABLE.write_text(
        "# Which batch norms fold\n\nMade by `python -m benches.fold_models`: random weights, statistics of a batch of "
        f"{BATCH}, relative error of the fp32 outputs against fp64,\nthe geometric mean over draws of affine and "
        "images; why one draw tells little, [kernels.md](kernels.md#conv_bn) says.\n\n"
        f"{results.table(list(rows.values()), COLUMNS)}\n\n{WITHOUT}{', '.join(without)}.\n"
    )


def read() -> tuple[dict[str, results.Row], list[str]]:
    """The rows of the table by their models, and the models without batch norm."""
    lines = TABLE.read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    rows = [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]
    without = next(line for line in lines if line.startswith(WITHOUT))
    return {row["model"]: row for row in rows}, without.removeprefix(WITHOUT).removesuffix(".").split(", ")


if __name__ == "__main__":
    main()
