"""Runs on several processes: the curves of one process, resumed on another number of them, killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import finish, start, start_group
from torch import Tensor, nn

from ssl_fast.evaluate import evaluate
from ssl_fast.run import read_checkpoint, read_rows
from ssl_fast.train import train

ROOT = Path(__file__).parents[1]
QUICK = {"data": "digits", "log_every": 1, "optimizer": "sgd", "lr": 0.03, "probe_every": 0}


def model(norm: str = "batch", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), norms[norm](32), nn.ReLU(), nn.Dropout(dropout))


def plain(out: str | Path, **arguments: Any) -> dict[str, Any]:
    """train without its pictures, which would take most of the time."""
    module = sys.modules["ssl_fast.train"]
    for name in ("plot_views", "draw_pictures", "write_report"):
        setattr(module, name, lambda *_: None)
    return train(out, **{**QUICK, **arguments})


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(out / "metrics.jsonl") if "loss" in row]


def knn(out: Path) -> list[float]:
    return [row["knn"] for row in read_rows(out / "metrics.jsonl") if "knn" in row]


# ---- one process or several

MOCO = {"method": "moco_v2", "K": 512, "m": 0.9, "bn_splits": 1, "norm": "layer"}
RUNS: dict[str, dict[str, Any]] = {  # 22 steps each
    "simclr": {"norm": "layer", "head": "linear"},
    "simclr, synchronised batch norm": {"norm": "batch", "knn_every": 1},
    "simclr in parts": {"norm": "layer", "head": "linear", "micro_batch": 9, "strategy": "ring"},
    "moco": MOCO,
    "moco in parts": {**MOCO, "micro_batch": 9},
}


def curve(out: str, name: str, **arguments: Any) -> None:
    given = {"epochs": 2, "batch_size": 128, "keep_every": 1, "knn_every": 0, **RUNS[name], **arguments}
    plain(out, model=model(given.pop("norm")), **given)


def curves(rank: int, world: int) -> None:
    for name in RUNS:
        curve(name, name)


def go_on(rank: int, world: int) -> None:
    curve("run", "simclr, synchronised batch norm", resume=True)
    curve("moco", "moco", resume=True)


def test_several_processes_train_as_one_and_go_on_as_any_number(tmp_path):
    folders = {world: tmp_path / str(world) for world in (1, 2, 4)}
    finish([process for world, folder in folders.items() for process in start_group(world, folder, curves)])
    for name in RUNS:
        alone = losses(folders[1] / name)
        assert [step for step, _ in alone] == list(range(1, 23))
        for world in (2, 4):
            several = losses(folders[world] / name)
            assert [loss for _, loss in several] == pytest.approx([loss for _, loss in alone], rel=2e-5), (name, world)
            weights = [read_checkpoint(folders[w] / name / "checkpoints/last.pt")["model"] for w in (1, world)]
            for key, value in weights[0].items():
                assert torch.allclose(value.double(), weights[1][key].double(), rtol=1e-3, atol=1e-5), (name, key)
            assert len(list((folders[world] / name).glob("events*"))) <= 1
    for name in ("simclr", "moco"):
        batch, parts = (losses(folders[1] / name) for name in (name, f"{name} in parts"))
        assert [loss for _, loss in parts] == pytest.approx([loss for _, loss in batch], rel=1e-5)
    for world, folder in folders.items():
        out, shared = folder / "simclr, synchronised batch norm", knn(folder / "simclr, synchronised batch norm")
        assert len(shared) == 3 and shared[0] == knn(folders[1] / out.name)[0]
        found = evaluate(out, model=model(), protocol="knn")["knn"]
        assert shared[-1] == pytest.approx(found, abs=1e-6), world

    started = []
    for before, after in ((4, 2), (2, 4), (4, 1)):
        folder = tmp_path / f"{before} as {after}"
        for name, to in (("simclr, synchronised batch norm", "run"), ("moco", "moco")):
            shutil.copytree(folders[before] / name, folder / to)
            os.replace(folder / to / "checkpoints/epoch_0001.pt", folder / to / "checkpoints/last.pt")
        started += start_group(after, folder, go_on)
    finish(started)
    for folder in tmp_path.glob("* as *"):
        for name, to in (("simclr, synchronised batch norm", "run"), ("moco", "moco")):
            unbroken = losses(folders[1] / name)
            assert [step for step, _ in losses(folder / to)] == list(range(1, 23))
            assert [loss for _, loss in losses(folder / to)] == pytest.approx([x for _, x in unbroken], rel=2e-5)


def unused(rank: int, world: int) -> None:
    encoder = model()
    encoder.classifier = nn.Linear(3, 3)
    encoder.forward = lambda x: nn.Sequential(*list(encoder)[:-1])(x)
    with pytest.raises(
        ValueError, match=r"model: got parameters that its output does not depend on \(encoder.classifi"
    ):
        plain("unused", model=encoder, epochs=1, batch_size=128, knn_every=0)


def test_parameters_that_nothing_depends_on_are_named(tmp_path):
    finish(start_group(2, tmp_path, unused))


def exact(rank: int, world: int) -> None:
    settings = {**MOCO, "K": 720, "batch_size": 360, "keep_every": 1, "epochs": 2, "knn_every": 0}
    del settings["norm"]
    assert plain("moco", model=model(dropout=0.2), **settings)["step"] == 6
    assert dist.is_initialized()  # the group is not train's to take down
    if rank == 0:  # the second epoch again
        shutil.copytree("moco", "whole")
        os.replace("moco/checkpoints/epoch_0001.pt", "moco/checkpoints/last.pt")
    dist.barrier()
    plain("moco", model=model(dropout=0.2), resume=True, **settings)
    with pytest.raises(ValueError, match="batch_size: got 361 on 4 processes"):
        plain("new", model=model(), **{**settings, "batch_size": 361})
    with pytest.raises(FileExistsError, match="is not empty"):
        plain("moco", model=model(dropout=0.2), **settings)


def test_four_processes_resume_to_the_bit(tmp_path):
    finish(start_group(4, tmp_path, exact))
    assert len(losses(tmp_path / "whole")) == 6 and losses(tmp_path / "whole") == losses(tmp_path / "moco")


# ---- killed and started again


class Mortal(nn.Module):
    """Its process is killed in the fifth step of the first attempt, or waits there to be."""

    def __init__(self, dies: str) -> None:
        super().__init__()
        self.layers, self.steps = model(dropout=0.2), 0
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and not Path("killed").exists()
        self.dies = first and (dies == "launcher" or os.environ["RANK"] in dies)
        self.waits = dies == "launcher"

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        if self.dies and self.steps == 5:
            if not self.waits:
                os.kill(os.getpid(), signal.SIGKILL)
            Path("waits.tmp" + os.environ["RANK"]).write_text(str(os.getpid()))
            os.replace("waits.tmp" + os.environ["RANK"], "waits" + os.environ["RANK"])
            time.sleep(60)
        return self.layers(x)


def elastic(dies: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which a process of torchrun's own would have
    torch.manual_seed(0)
    plain("out", model=Mortal(dies), batch_size=360, epochs=3, save_every=2, resume="auto", knn_every=0)


def launch(world: int, dies: str) -> None:
    """What torchrun does, but for its processes, which are forked."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(1, 1, world, run_id=str(uuid.uuid4()), rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          max_restarts=1, start_method="fork")  # fmt: skip
    elastic_launch(config, elastic)(dies)


@pytest.mark.parametrize("world", [2, 4])
def test_a_run_that_torchrun_starts_again_ends_as_an_unbroken_one(tmp_path, world):
    ranks = "".join(map(str, range(world)))
    deaths = {"none": "none", "one": "1", "all": ranks, "launcher": "launcher"}
    started = {name: start(tmp_path / name, "launcher", launch, world, dies) for name, dies in deaths.items()}
    waiting = [tmp_path / f"launcher/waits{rank}" for rank in ranks]
    until(lambda: all(path.exists() for path in waiting))
    workers = [int(path.read_text()) for path in waiting]
    started["launcher"].kill()
    started["launcher"].join()
    until(lambda: not any(map(running, workers)))  # they do not go on beside those that take their place
    (tmp_path / "launcher/killed").touch()
    started["launcher"] = start(tmp_path / "launcher", "launcher again", launch, world, "launcher")
    finish(list(started.values()))
    saved = {name: read_checkpoint(tmp_path / name / "out/checkpoints/last.pt") for name in deaths}
    for name in ("one", "all", "launcher"):
        assert saved[name]["step"] == saved["none"]["step"] == 9
        for key, value in saved["none"]["model"].items():
            assert torch.equal(value, saved[name]["model"][key]), (name, key)
        assert losses(tmp_path / name / "out") == losses(tmp_path / "none/out")


def until(done: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_torchrun_starts_barlow_twins_from_the_command_line(tmp_path):
    words = "train out=out data=digits model=convnet method=barlow_twins dim=64 epochs=1 batch_size=360 log_every=1"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]
    done = subprocess.run(
        [*command, "ssl_fast.cli", *words.split()],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("checkpoint ") == 1
    assert [step for step, _ in losses(tmp_path / "out")] == [1, 2, 3]
    saved = read_checkpoint(tmp_path / "out/checkpoints/last.pt")
    assert saved["step"] == 3 and saved["model"]["head.6.weight"].shape == (64, 64)
    biases, weights = (saved["optimizer"]["param_groups"][k]["lr"] for k in (1, 0))
    assert biases == pytest.approx(0.024 * weights)
