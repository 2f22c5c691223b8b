"""A run on several processes, started by torchrun or by hand: `python test_torchrun.py RANK WORLD FOLDER`; or by
torchrun as `test_torchrun.py DYING`: which ranks are killed in the middle of the first attempt."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from ssl_fast.run import read_checkpoint, read_rows  # noqa: E402
from ssl_fast.train import train  # noqa: E402

ROOT = Path(__file__).parents[1]
QUICK = {"data": "digits", "batch_size": 360, "log_every": 1, "optimizer": "sgd", "lr": 0.03}
MOCO = {"method": "moco_v2", "K": 720, "m": 0.9, "bn_splits": 1}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2))


def rows() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU())


def worker(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    train(folder / "simclr", model=model(), epochs=1, **QUICK)
    alone = {**QUICK, "epochs": 2, "head": "linear", "knn_every": 0}  # of rows, each by itself
    for name, micro_batch in (("batch", None), ("parts", 40)):
        train(folder / name, model=rows(), micro_batch=micro_batch, keep_every=1, **alone)
    settings = {**QUICK, **MOCO, "keep_every": 1, "epochs": 2, "knn_every": 0}
    assert train(folder / "moco", model=model(), **settings)["step"] == 6
    assert dist.is_initialized()  # the group is not train's to take down
    if rank == 0:  # the second epoch again
        shutil.copytree(folder / "moco", folder / "whole")
        os.replace(folder / "moco/checkpoints/epoch_0001.pt", folder / "moco/checkpoints/last.pt")
    dist.barrier()
    train(folder / "moco", model=model(), resume=True, **settings)
    with pytest.raises(ValueError, match="batch_size: got 361 on 4 processes"):
        train(folder / "new", model=model(), **{**QUICK, "batch_size": 361})
    with pytest.raises(FileExistsError, match="is not empty"):
        train(folder / "simclr", model=model(), epochs=1, **QUICK)
    dist.barrier()
    dist.destroy_process_group()


class Mortal(nn.Module):
    """Its process is killed in the fifth step of the first attempt, or waits there to be."""

    def __init__(self, dies: str) -> None:
        super().__init__()
        self.layers, self.steps = model(), 0
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and not Path("killed").exists()
        self.dies = first and (dies == "launcher" or os.environ.get("RANK", "none") in dies)
        self.waits = dies == "launcher"

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        if self.dies and self.steps == 5:
            if not self.waits:
                os.kill(os.getpid(), signal.SIGKILL)
            Path(f"waits{os.environ['RANK']}").write_text(str(os.getpid()))
            time.sleep(60)
        return self.layers(x)


def elastic(dies: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train("out", model=Mortal(dies), epochs=3, save_every=2, resume="auto", knn_every=0, **QUICK)


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(out / "metrics.jsonl") if "loss" in row]


def test_four_processes_train_as_one_run_and_resume(tmp_path):
    commands = [[sys.executable, __file__, str(rank), "4", str(tmp_path)] for rank in range(4)]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, errors
    for name, steps in (("simclr", 3), ("whole", 6)):
        assert [step for step, _ in losses(tmp_path / name)] == list(range(1, steps + 1))
        assert read_checkpoint(tmp_path / name / "checkpoints/last.pt")["step"] == steps
        assert len(list((tmp_path / name).glob("events*"))) <= 1
    assert losses(tmp_path / "whole") == losses(tmp_path / "moco")
    batch, parts = (losses(tmp_path / name) for name in ("batch", "parts"))
    assert len(parts) == 6 and [loss for _, loss in parts] == pytest.approx([loss for _, loss in batch], rel=1e-5)
    alone = {**QUICK, "epochs": 2, "head": "linear", "knn_every": 0}
    os.replace(tmp_path / "batch/checkpoints/epoch_0001.pt", tmp_path / "batch/checkpoints/last.pt")
    train(tmp_path / "batch", model=rows(), keep_every=1, resume=True, **alone)  # four go on as one
    assert [loss for _, loss in losses(tmp_path / "batch")] == pytest.approx([loss for _, loss in batch], rel=1e-5)


@pytest.mark.parametrize("dies", ["1", "01", "launcher"])
def test_a_run_that_torchrun_starts_again_ends_as_an_unbroken_one(tmp_path, dies):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--max-restarts=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(folder: str, ranks: str) -> subprocess.Popen[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        return subprocess.Popen(
            [*command, __file__, ranks], cwd=tmp_path / folder, env=environment, stderr=subprocess.PIPE, text=True
        )

    whole, broken = start("whole", "none"), start("broken", dies)
    if dies == "launcher":
        waiting = [tmp_path / f"broken/waits{rank}" for rank in (0, 1)]
        deadline = time.monotonic() + 100
        while not all(path.exists() and path.read_text() for path in waiting) and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = [int(path.read_text()) for path in waiting]
        broken.kill()
        broken.wait()
        while any(map(running, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(running, workers))  # they do not go on beside those that take their place
        (tmp_path / "broken/killed").touch()
        broken = start("broken", dies)
    for process in (whole, broken):
        errors = process.communicate(timeout=200)[1]
        assert process.returncode == 0, errors[-3000:]
    whole, broken = (read_checkpoint(tmp_path / name / "out/checkpoints/last.pt") for name in ("whole", "broken"))
    assert whole["step"] == broken["step"] == 9
    assert all(torch.equal(value, broken["model"][name]) for name, value in whole["model"].items())
    assert losses(tmp_path / "whole/out") == losses(tmp_path / "broken/out")


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


if __name__ == "__main__":
    if len(sys.argv) == 2:
        elastic(sys.argv[1])
    else:
        worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
