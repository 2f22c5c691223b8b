"""The planner's predictions against the measured peaks of real steps, and the combination it chooses.

The measuring process is started by running this file: `python test_plan.py cpu`, or `cuda`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from ssl_fast import CachedStep, SimCLR, accelerate, checkpoint_stages  # noqa: E402
from ssl_fast.backbones import build_encoder  # noqa: E402
from ssl_fast.cli import main  # noqa: E402
from ssl_fast.memory import peak_memory  # noqa: E402
from ssl_fast.plan import Parts, _Dense, _Step, plan  # noqa: E402

IMAGE, BATCH = 24, 64
# Not bf16: a CPU without instructions for it works through copies in fp32, within the operators.
CASES = {
    "plain": Parts(loss=False),
    "accelerate": Parts(accelerate=True),
    "checkpoint": Parts(checkpoint=True),
    "cached": Parts(micro_batch=16),
    "cached, checkpoint": Parts(accelerate=True, checkpoint=True, micro_batch=32),
}


def step(parts: Parts, device: torch.device, batch: int = BATCH) -> None:
    """Two steps of training, as `train` takes them."""
    encoder, features = build_encoder("convnet", IMAGE)
    if parts.accelerate:
        encoder = accelerate(encoder, trace=not parts.checkpoint).model
    if parts.checkpoint:
        checkpoint_stages(encoder)
    network = SimCLR(encoder, features, loss=None if parts.loss else _Dense())
    network.to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    views = [torch.randn(batch, 3, IMAGE, IMAGE, device=device) for _ in range(2)]
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    cached = CachedStep(parts.micro_batch or batch)
    for _ in range(2):
        optimizer.zero_grad()
        network.cached(*views, cached)
        optimizer.step()


def measure(device: torch.device) -> dict[str, int]:
    torch.set_num_threads(1)
    peaks = {}
    for name, parts in CASES.items():
        step(parts, device, 4)  # what is loaded and set up once
        base = peak_memory(lambda: None, device)
        peaks[name] = peak_memory(lambda parts=parts: step(parts, device), device) - base
    return peaks


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def measured(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu" and not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is not counted here")
    # glibc returns what is mapped when it is freed, so that the process holds what its tensors do.
    eager = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, request.param]
    done = subprocess.run(command, env={**os.environ, **eager}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_predicted_is_what_is_measured(measured, name):
    parts = CASES[name]
    predicted = _Step("convnet", IMAGE, BATCH, 3, "auto", "nonlinear", 128, 1, parts).peak()
    assert predicted > 5 * 2**20  # the figure is not that of a rounding
    assert predicted == pytest.approx(measured[name], rel=0.15, abs=3 * 2**20)


def test_plan_chooses_the_cheapest_that_fits():
    roomy = plan("convnet", 8, 64, "1GiB", channels=1)
    assert roomy.best is roomy.rows[0] and roomy.rows[0].compute == 1
    assert "take: ssl-fast train out=... data=... model=convnet image_size=8 batch_size=64\n" in f"{roomy}\n"
    cached = next(row for row in roomy.rows if row.parts.micro_batch)
    assert cached.parts.micro_batch == 32 and 1.2 < cached.compute < 1.4

    other = str(plan("convnet", 8, 64, "1GiB", head="linear", dim=64, optimizer="adamw", stem="imagenet", device="cpu"))
    assert "batch_size=64 stem=imagenet head=linear dim=64 optimizer=adamw device=cpu\n" in f"{other}\n"

    tight = plan("convnet", 32, 512, "80MiB")
    best = tight.best
    assert best.parts.micro_batch and 0.8 * tight.memory < best.peak <= 0.95 * tight.memory
    assert f"micro_batch={best.parts.micro_batch}" in str(tight) and "batch norm takes its statistics from" in str(
        tight
    )
    stages = next(row for row in tight.rows if row.parts.checkpoint)
    assert stages.saves > 0 and stages.compute == pytest.approx(4 / 3, abs=0.1)
    dense, ours = tight.rows[:2]
    assert ours.saves == dense.peak - ours.peak >= 0

    assert replace(tight, memory=1).best is None and "nothing fits" in str(replace(tight, memory=1))


def test_batch_norm_is_left_two_rows():
    cached = [row.parts.micro_batch for row in plan("convnet", 8, 33, "1MiB", channels=1).rows if row.parts.micro_batch]
    assert cached and set(cached) == {3}  # of twos, one row would be left
    assert not any(row.parts.micro_batch for row in plan("convnet", 8, 3, "1MiB", channels=1).rows)


def test_a_module_is_planned_and_left_alone():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    found = plan(encoder, 8, 16, "1GiB", head="none")
    assert found.model == "Sequential" and not found.batch_norm
    assert not any(row.parts.checkpoint for row in found.rows)  # no stages to keep
    assert encoder[1].weight.device.type == "cpu" and found.best is found.rows[0]


class Block(nn.Module):
    """Whose activation is not a module, so that torch.fx alone sees what follows its norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(torch.sin(x))) + x)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(12)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x).mean((2, 3))


def test_stages_of_an_accelerated_model_are_checkpointed():
    rows = {row.name: row for row in plan(Blocks(), 32, 64, "1GiB", head="none").rows}
    assert rows["+ checkpoint_stages"].saves > 0.3 * rows["+ bf16"].peak


def test_a_model_whose_initialisation_looks_at_values(monkeypatch):
    """As torchvision's RegNets do for their widths."""

    def by_name(name: str, channels: int) -> nn.Module:
        width = int(torch.linspace(2, 5, 3)[-1])
        return nn.Sequential(nn.Conv2d(channels, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    monkeypatch.setattr("ssl_fast.backbones._by_name", by_name)
    found = plan("regnet", 8, 8, "1GiB", stem="imagenet")
    assert found.model == "regnet" and found.best is found.rows[0] and "stem=imagenet" in str(found)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"image": 2}, "image: got 2, allowed: a whole number >= 4"),
        ({"batch": 1}, "batch: got 1, allowed: a whole number >= 2"),
        ({"channels": "3"}, "channels: got '3', allowed: a whole number >= 1"),
        ({"memory": "much"}, "memory: got 'much'"),
        ({"optimizer": "adam"}, "optimizer: got 'adam', allowed: sgd, lars, adamw"),
        ({"model": "convnext_giant"}, "model: got 'convnext_giant'"),
    ],
)
def test_what_does_not_fit_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"model": "convnet", "image": 8, "batch": 16, **given})


def test_command_line(capsys):
    assert main(["plan", "model=convnet", "image=8", "batch=16", "memory=1GiB"]) == 0
    assert "plan: convnet, batch 16 at 8 pixels, within 1.0 GiB" in capsys.readouterr().out
    assert main(["plan", "model=convnet", "batsh=16"]) == 2
    assert "did you mean 'batch'?" in capsys.readouterr().err


if __name__ == "__main__":
    print(json.dumps(measure(torch.device(sys.argv[1]))))
