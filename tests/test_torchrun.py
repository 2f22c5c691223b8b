"""A run on several processes, started by torchrun or by hand: `python test_torchrun.py RANK WORLD FOLDER`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

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
        train(folder / name, model=rows(), micro_batch=micro_batch, **alone)
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
    with pytest.raises(ValueError, match="the run was on 4 processes, now on 1"):
        train(tmp_path / "simclr", model=model(), epochs=1, resume=True, **QUICK)


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
    worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
