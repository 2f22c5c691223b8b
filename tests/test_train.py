"""A run and its folder: exact resume after SIGKILL, and everything that must not break a run or a checkpoint."""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from ssl_fast import run as run_module
from ssl_fast.cli import main
from ssl_fast.progress import Progress
from ssl_fast.run import read_checkpoint, read_rows, rng_state, set_rng_state, write_atomically
from ssl_fast.train import train

TIMING = ("images_per_s", "data_wait")
# 1437 digits in batches of 360: 3 steps an epoch.
QUICK = {"data": "digits", "batch_size": 360, "epochs": 3, "log_every": 1, "optimizer": "sgd", "lr": 0.03}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Tiny(nn.Module):
    """A small encoder with dropout, so that the global generator matters; `die` ends the process in that step."""

    def __init__(self, die=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2))
        self.die, self.steps = die, 0

    def forward(self, x):
        self.steps += self.training
        if self.die == self.steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layers(x)


class Poisoned(Tiny):
    """NaN from the given step on."""

    def forward(self, x):
        h = super().forward(x)
        return h * float("nan") if self.training and self.steps >= 5 else h


def tiny(kind=Tiny, **arguments):
    torch.manual_seed(0)
    return kind(**arguments)


def metrics(out):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(Path(out) / "metrics.jsonl")]


def equal(a, b):
    """Whether nested dicts and lists hold the same values and bit-equal tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def in_process(code, folder):
    command = [sys.executable, "-c", f"import torch; torch.set_num_threads(1); from test_train import *; {code}"]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The metrics of an unbroken run with QUICK's settings."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    train(folder, model=tiny(), **QUICK)
    return metrics(folder)


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "lars"},
        {"optimizer": "adamw", "accelerate": True},
        {"method": "moco_v2", "K": 1000, "m": 0.9},
        {"method": "moco_v1", "K": 1000, "m": 0.9, "accelerate": True},
    ],
    ids=str,
)
def test_resume_after_sigkill_equals_an_unbroken_run(tmp_path, given):
    settings = {**QUICK, **given, "save_every": 2, "keep_every": 1}
    train(tmp_path / "whole", model=tiny(), **settings)
    # Killed in step 6: after the checkpoint of step 4, in the middle of the second epoch, with step 5 already recorded.
    killed = in_process(f"train('broken', model=tiny(die=6), **{settings})", tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert read_checkpoint(tmp_path / "broken/checkpoints/last.pt")["step"] == 4
    assert metrics(tmp_path / "broken")[-1]["step"] == 5
    train(tmp_path / "broken", model=tiny(), resume=True, **settings)

    whole, broken = (read_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("whole", "broken"))
    assert whole["step"] == whole["probe"]["steps"] == 9 and equal(whole, broken)
    assert given.get("method") is None or whole["model"]["queue.pointer"] == 9 * 360 % 1000
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    assert [row["step"] for row in metrics(tmp_path / "broken") if "loss" in row] == list(range(1, 10))
    assert sorted(p.name for p in (tmp_path / "broken/checkpoints").glob("epoch*")) == [
        f"epoch_000{i}.pt" for i in (1, 2, 3)
    ]


def test_accelerate_changes_rounding_alone(tmp_path, whole):
    train(tmp_path, model=tiny(), accelerate=True, **QUICK)
    assert "accelerate: 2 norms fused, 0 swapped alone, 0 left" in (tmp_path / "train.log").read_text()
    ours, theirs = ([row["loss"] for row in rows if "loss" in row] for rows in (metrics(tmp_path), whole))
    assert ours == pytest.approx(theirs, rel=1e-4)
    with pytest.raises(ValueError, match="accelerate: was True, now False"):
        train(tmp_path, model=tiny(), resume=True, **QUICK)


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path, whole):
    assert in_process(f"train('broken', model=tiny(die=2), **{QUICK})", tmp_path).returncode == -signal.SIGKILL
    train(tmp_path / "broken", model=tiny(), resume=True, **QUICK)
    assert metrics(tmp_path / "broken") == whole


def test_ctrl_c_saves_the_step_and_the_same_command_continues(tmp_path, whole):
    class Interrupted(Tiny):
        def forward(self, x):
            h = super().forward(x)
            if self.training and self.steps == self.die_at:
                os.kill(os.getpid(), signal.SIGINT)
            return h

    Interrupted.__qualname__ = "Tiny"
    Interrupted.die_at = 5
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", model=tiny(Interrupted), **QUICK)
    assert read_checkpoint(tmp_path / "broken/checkpoints/last.pt")["step"] == 5
    assert "resume=true" in (tmp_path / "broken/train.log").read_text()
    train(tmp_path / "broken", model=tiny(), resume=True, **QUICK)
    assert metrics(tmp_path / "broken") == whole


def test_out_holds_everything(tmp_path):
    pytest.importorskip("tensorboard")
    result = train(tmp_path, model="convnet", **{**QUICK, "epochs": 1, "precision": "bf16"}, head="linear", dim=16)
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and "tfevents" not in p.name}
    plots = {f"plots/{name}.png" for name in ("curves", "pca", "neighbours", "filters", "views")}
    plots |= {"plots/umap.png"} if importlib.util.find_spec("umap") else set()
    assert names == {"args.yaml", "metrics.jsonl", "train.log", "report.html", "checkpoints/last.pt"} | plots
    assert list(tmp_path.glob("events.out.tfevents.*"))
    args = yaml.safe_load((tmp_path / "args.yaml").read_text())
    assert (args["model"], args["head"], args["dim"], args["temperature"], args["lr"]) == (
        "convnet",
        "linear",
        16,
        0.5,
        0.03,
    )
    assert result["step"] == 3 and result["epoch"] == 1 and 0.9 < result["knn"] <= 1 and result["knn_k"] == 20
    rows = metrics(tmp_path)
    assert rows[0].keys() >= {"knn", "knn_k", "knn_t"} and rows[0]["step"] == 0  # the random encoder
    assert 0.3 < rows[1]["std"] * 16**0.5 <= 1.001  # near 1 / sqrt(dim)


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    settings = {**QUICK, "epochs": 1, "model": "convnet"}
    first = train(tmp_path, **settings)
    before = metrics(tmp_path)
    assert train(tmp_path, resume=True, **settings) == first and metrics(tmp_path) == before


def test_resume_refuses_other_arguments(tmp_path):
    train(tmp_path, model="convnet", **{**QUICK, "epochs": 1})
    with pytest.raises(ValueError, match="epochs: was 1, now 3"):
        train(tmp_path, model="convnet", resume=True, **QUICK)
    with pytest.raises(ValueError, match="temperature: was 0.5, now 0.1"):
        train(tmp_path, model="convnet", resume=True, **{**QUICK, "epochs": 1}, temperature=0.1)


def test_a_run_from_before_an_argument_goes_on_with_its_default(tmp_path):
    settings = {**QUICK, "model": "convnet", "epochs": 2}
    train(tmp_path, **settings, keep_every=1)
    last = tmp_path / "checkpoints/last.pt"
    whole, old = read_checkpoint(last), read_checkpoint(last.with_name("epoch_0001.pt"))
    for key in ("probe_every", "checkpoint_stages", "temperature"):
        del old["args"][key]
    del old["probe"], old["micro_batch"]
    torch.save(old, last)
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(old["args"]))
    with pytest.raises(ValueError, match=r"other arguments \(checkpoint_stages: was False, now True\);"):
        train(tmp_path, **settings, keep_every=1, resume=True, checkpoint_stages=True)
    with pytest.raises(ValueError, match=r"other arguments \(temperature: was 0.5, now 0.1\);"):
        train(tmp_path, **settings, keep_every=1, resume=True, temperature=0.1)
    assert main(["train", f"out={tmp_path}", "resume=true"]) == 0
    ended = read_checkpoint(last)
    assert ended["args"] == whole["args"] and ended["step"] == 6 and equal(ended["model"], whole["model"])
    assert ended["probe"]["steps"] == 3  # which the old run did not have


def test_resume_refuses_other_images(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(9):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(data / f"{i}.png")
    settings = {"data": data, "model": "convnet", "image_size": 8, "batch_size": 4, "epochs": 1, "num_workers": 0}
    train(tmp_path / "out", **settings)
    Image.new("RGB", (16, 16)).save(data / "new.png")
    with pytest.raises(ValueError, match="had 9 training images, now 10"):
        train(tmp_path / "out", resume=True, **settings)


def test_out_that_is_not_empty(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileExistsError, match="add resume=true to continue its run, overwrite=true to start anew"):
        train(tmp_path, model="convnet", **QUICK)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        train(tmp_path, model="convnet", resume=True, **QUICK)
    other = tmp_path / "other"
    (other / "plots").mkdir(parents=True)
    (other / "plots/thesis.png").write_text("mine")
    (other / "args.yaml").write_text("lr: 0.1")
    with pytest.raises(FileExistsError, match="holds no run to overwrite"):
        train(other, model="convnet", overwrite=True, **QUICK)
    with pytest.raises(ValueError, match=r"args.yaml is not that of a run"):
        train(other, model="convnet", resume=True, **QUICK)
    (other / "args.yaml").write_text(": : [")
    with pytest.raises(ValueError, match=r"args.yaml cannot be read"):
        train(other, model="convnet", resume=True, **QUICK)
    assert (other / "plots/thesis.png").read_text() == "mine"
    with pytest.raises(ValueError, match="dim: got 0, allowed: a whole number >= 1"):
        train(tmp_path / "new", model="convnet", dim=0, **QUICK)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="resume and overwrite"):
        train(tmp_path, model="convnet", resume=True, overwrite=True, **QUICK)
    run = tmp_path / "run"
    train(run, model="convnet", overwrite=True, **{**QUICK, "epochs": 1})
    (run / "plots/thesis.png").write_text("mine")
    (run / "checkpoints/best.pt").write_text("mine")
    train(run, model="convnet", overwrite=True, **{**QUICK, "epochs": 1})
    assert (run / "plots/thesis.png").read_text() == (run / "checkpoints/best.pt").read_text() == "mine"
    assert metrics(run)[-1]["step"] == 3


def test_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match="loss is nan at step 5.*last.pt is from before"):
        train(tmp_path, model=tiny(Poisoned), **QUICK)
    saved = read_checkpoint(tmp_path / "checkpoints/last.pt")
    assert saved["step"] == 3 and all(v.isfinite().all() for v in saved["model"].values())
    assert "FloatingPointError" in (tmp_path / "train.log").read_text()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    write_atomically(tmp_path / "last.pt", {"args": {}, "step": 1, "model": {}})

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(run_module.torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "last.pt", {"args": {}, "step": 2, "model": {}})
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_what_is_not_a_checkpoint(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"no checkpoint")
    torch.save({"weight": torch.ones(1)}, tmp_path / "b.pt")
    (tmp_path / "c.pt").touch()
    torch.save({}, tmp_path / "d.pt")
    torch.save(torch.ones(1), tmp_path / "e.pt")
    for name, reason in (
        ("a.pt", "it is not of tensors and plain values"),
        ("b.pt", "it holds weight, not args, step and model"),
        ("c.pt", "it cannot be read: EOFError"),
        ("d.pt", "it holds nothing, not args"),
        ("e.pt", "it holds Tensor, not args"),
    ):
        said = f"{name} is not a checkpoint of .* [(]{reason}.*where that is damaged, give an earlier one"
        with pytest.raises(ValueError, match=said):
            read_checkpoint(tmp_path / name)


def test_numbers_of_numpy_leave_a_checkpoint_that_loads(tmp_path):
    settings = {**QUICK, "epochs": np.int64(1), "batch_size": np.int64(360), "lr": np.float64(0.03), "knn_every": 0}
    settings |= {"weight_decay": np.float32(0), "warmup_epochs": np.float32(0.5), "probe_every": 0}
    result = train(tmp_path, model="convnet", temperature=np.float32(0.5), micro_batch=np.int64(180), **settings)
    assert read_checkpoint(result["checkpoint"])["args"]["lr"] == 0.03
    train(tmp_path, model="convnet", temperature=0.5, resume=True, micro_batch=180, **settings)


def test_a_folder_without_a_name():
    for out in ("", None, 5):
        with pytest.raises(ValueError, match=f"out: got {out!r}, allowed: the path of a folder"):
            train(out, model="convnet", **QUICK)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"method": "simcrl"}, "method: got 'simcrl', did you mean 'simclr'"),
        ({"batch_size": 2000}, "batch_size: got 2000, allowed: 2 to 1437, the training images of digits"),
        ({"batch_size": 1}, "batch_size: got 1, allowed: a whole number >= 2"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"epochs": 1.5}, "epochs: got 1.5"),
        ({"num_workers": -1}, "num_workers: got -1"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"precision": "fp16"}, "precision: got 'fp16', .*allowed: fp32, bf16"),
        ({"optimizer": "adam"}, "optimizer: got 'adam', did you mean 'adamw'"),
        ({"augment": "none"}, "augment: got 'none'"),
        ({"device": "cuda:99"}, "device: got 'cuda:99'"),
        ({"device": "mps"}, r"device: got 'mps', allowed: auto, cpu, cuda, cuda:N \([^\n]{5,200}\)$"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": float("inf")}, "temperature: got inf, allowed: a float above 0 and finite"),
        ({"warmup_epochs": 3, "epochs": 2}, "warmup_epochs: got 3 with epochs=2, allowed: at most epochs"),
        ({"epochs": True}, "epochs: got True, allowed: a whole number >= 1"),
        ({"method": None}, "method: got None, allowed: simclr"),
        ({"model": None}, "model: got None, allowed: the name of one, or an nn.Module"),
        ({"data": ""}, "data: got '', allowed: digits"),
        ({"seed": 2**32}, "seed: got 4294967296, allowed: a whole number below"),
        ({"lr": "fast"}, "lr: got 'fast', allowed: a finite number >= 0"),
        ({"lr": True}, "lr: got True, allowed: a finite number >= 0"),
        ({"image_size": "8"}, "image_size: got '8', allowed: a whole number >= 4"),
        ({"accelerate": "no"}, "accelerate: got 'no', allowed: True, False"),
        ({"checkpoint_stages": "no"}, "checkpoint_stages: got 'no', allowed: True, False"),
        ({"overwrite": "no"}, "overwrite: got 'no', allowed: True, False"),
        ({"resume": 1}, "resume: got 1, allowed: True, False, 'auto'"),
        ({"device": "meta"}, "device: got 'meta', allowed: auto, cpu"),
        ({"strategy": "tree"}, "strategy: got 'tree', allowed: 'gather', 'ring'"),
        ({"temprature": 1.0}, "unknown argument 'temprature', did you mean 'temperature'"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        train(tmp_path / "out", **{**QUICK, "model": "convnet", **wrong})
    assert not (tmp_path / "out").exists()


def test_a_folder_without_labels_trains_with_workers(tmp_path, caplog):
    for i in range(8):
        Image.new("RGB", (20, 24), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    settings = {"model": "convnet", "image_size": 8, "batch_size": 4, "epochs": 2, "log_every": 1, "num_workers": 2}
    with caplog.at_level(logging.INFO, "ssl_fast"):
        result = train(tmp_path / "out", tmp_path, **settings)
    text = caplog.text
    assert result["step"] == 4 and "knn" not in result
    assert (
        "kNN is skipped" in text
        and "the online probe is skipped" in text
        and text.count("cannot decode") == 1
        and "3.png" in text
    )
    assert (tmp_path / "out/plots/pca.png").exists() and "finished after 4" in (
        tmp_path / "out/report.html"
    ).read_text()


def test_collapse_is_reported(tmp_path, caplog):
    class Constant(Tiny):
        def forward(self, x):
            return super().forward(x) * 0 + 1

    with caplog.at_level(logging.WARNING, "ssl_fast"):
        train(tmp_path, model=tiny(Constant), **{**QUICK, "epochs": 1, "knn_every": 0, "probe_every": 0}, head="none")
    assert "collapse" in caplog.text and metrics(tmp_path)[-1]["std"] < 1e-6


def test_without_tensorboard_a_note_and_no_events(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.INFO, "ssl_fast"):
        train(tmp_path, model="convnet", **{**QUICK, "epochs": 1, "knn_every": 0})
    assert "tensorboard is not installed" in caplog.text and not list(tmp_path.glob("events*"))


def test_without_a_terminal_one_line_a_minute(caplog):
    row = {"step": 1, "epoch": 0.5, "loss": 2.0, "std": 0.1, "images_per_s": 100.0, "data_wait": 0.25}
    with caplog.at_level(logging.INFO, "ssl_fast"):
        quiet, every = Progress(10, 0, every=1e9), Progress(10, 0, every=0)
        quiet.show(row)
        assert not caplog.records
        quiet.show({"step": 2, "epoch": 1.0, "knn": 0.5, "probe": 0.25}, line=True)
        every.show(row)
    line = "epoch 1, step 2 of 10: loss 2.0000, 100 images/s, data wait 25%, kNN 50.00%, probe 25.00%, std 0.1000"
    assert [r.getMessage() for r in caplog.records] == [
        line,
        line.replace("epoch 1, step 2", "epoch 0.5, step 1").replace(" kNN 50.00%, probe 25.00%,", ""),
    ]


def test_generator_states_survive_a_safe_load(tmp_path):
    write_atomically(tmp_path / "last.pt", {"args": {}, "step": 0, "model": {}, "rng": rng_state()})
    drawn = [torch.rand(3), np.random.rand(3), __import__("random").random()]
    set_rng_state(read_checkpoint(tmp_path / "last.pt")["rng"])
    assert torch.equal(drawn[0], torch.rand(3)) and (drawn[1] == np.random.rand(3)).all()
    assert drawn[2] == __import__("random").random()


def test_another_optimizer_learns_biases_at_its_own_rate(tmp_path):
    """0.024 is of LARS, in the paper of Barlow Twins."""
    settings = {"method": "barlow_twins", "model": "convnet", "dim": 8, "epochs": 1, "batch_size": 720, "knn_every": 0}
    for optimizer, share in (("lars", 0.024), ("adamw", 1.0)):
        train(tmp_path / optimizer, optimizer=optimizer, **settings)
        saved = read_checkpoint(tmp_path / optimizer / "checkpoints/last.pt")["optimizer"]["param_groups"]
        assert {round(group["lr"] / saved[0]["lr"], 6) for group in saved} == {1.0, share}
