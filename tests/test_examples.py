"""The loops under examples/, as they stand, on a few random pictures."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest
import torch
import torchvision

EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = {"simclr": {"epochs": 1}, "moco": {"epochs": 1}, "cached": {"steps": 1, "micro_batch": 3}}


def test_every_example_is_run():
    assert sorted(FEW) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", FEW)
def test_example(name, tmp_path, monkeypatch, capsys):
    def unreachable(*args, **options):
        raise RuntimeError("no network")

    pictures = torchvision.datasets.FakeData
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", unreachable)
    monkeypatch.setattr(torchvision.datasets, "FakeData", lambda size, *args, **options: pictures(8, *args, **options))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](batch_size=8, **FEW[name])

    printed = capsys.readouterr().out
    assert "no CIFAR-10 (no network): random pictures" in printed
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 1 and all(math.isfinite(loss) for loss in losses), printed
    weights = torch.load("encoder.pt")
    theirs = torchvision.models.resnet18()
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert set(missing) <= {"fc.weight", "fc.bias"} and not unexpected
