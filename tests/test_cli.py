"""The command line as a newcomer meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ssl_fast import demo as demo_module
from ssl_fast.cli import COMMANDS, main

QUICK = ["data=digits", "model=convnet", "batch_size=360", "epochs=1", "knn_every=0"]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_overview_and_help(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "batch_size=256" in text and "temperature=0.5" in text and "resume: continue the run" in text
    for command in COMMANDS:
        assert main([command, "--help"]) == 0


@pytest.mark.parametrize(
    "line, message",
    [
        ("trian", "unknown command 'trian', did you mean 'train'? allowed: train, evaluate, embed, export, report"),
        ("train", "out= is missing"),
        ("train out=x bath_size=4", "unknown key 'bath_size', did you mean 'batch_size'? allowed: out, data, method"),
        ("train out=x hed=linear", "did you mean 'head'?"),
        ("train out=x loss=dense", "unknown key 'loss'"),
        ("train out= data=digits", "out: got nothing after '=', allowed: a value\n"),
        ("train out=x lr=", "lr: got nothing after '=', allowed: a value; leave lr= out for its default\n"),
        ("train out=x strategy=tree", "strategy: got 'tree', allowed: gather or ring"),
        ("train out=x epochs=ten", "epochs: got 'ten', allowed: a whole number"),
        ("train out=x epochs=1.5", "epochs: got '1.5', allowed: a whole number"),
        ("train out=x lr=fast", "lr: got 'fast', allowed: a number or none"),
        ("train out=x resume=yes", "resume: got 'yes', allowed: true or false or auto"),
        ("train out=x --epochs", "got '--epochs', allowed: key=value, such as epochs=..."),
        ("train out=x method=simsiam", "method: got 'simsiam'"),
        ("evaluate data=digits", "checkpoint= is missing"),
        ("evaluate checkpoint=x label_fraction=1%", "label_fraction: got '1%', allowed: a number"),
        ("embed checkpoint=x data=y", "out= is missing"),
        ("export checkpoint=x out=y", "format= is missing"),
        ("info verbose=true", "unknown key 'verbose'"),
    ],
)
def test_wrong_command_lines(capsys, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_errors_of_a_command_are_one_line(capsys, tmp_path):
    assert main(["train", f"out={tmp_path / 'x'}", "data=/no/such/folder"]) == 1
    error = capsys.readouterr().err
    assert "neither a data set nor a folder" in error and error.count("\n") == 1
    for device in ("meta", "hpu"):  # that hold no value, or are a module which is not there
        assert main(["train", f"out={tmp_path / 'x'}", *QUICK, f"device={device}"]) == 1
        error = capsys.readouterr().err
        assert f"train: device: got '{device}', allowed: auto, cpu, cuda" in error and error.count("\n") == 1
    assert main(["evaluate", "checkpoint=/no/such.pt"]) == 1
    assert "/no/such.pt does not exist" in capsys.readouterr().err


def test_train_then_evaluate(capsys, tmp_path):
    assert main(["train", f"out={tmp_path}", *QUICK, "lr=1e-3", "optimizer=SGD".lower(), "head=none"]) == 0
    assert "checkpoint" in capsys.readouterr().out
    assert main(["evaluate", f"checkpoint={tmp_path}"]) == 0
    assert "linear" in capsys.readouterr().out
    assert main(["report", f"out={tmp_path}"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert main(["report", f"out={tmp_path / 'none'}"]) == 1
    assert "none holds no run, allowed: the folder that `train` was given as out" in capsys.readouterr().err
    assert main(["train", f"out={tmp_path}", *QUICK]) == 1
    assert "is not empty; add resume=true" in capsys.readouterr().err
    assert main(["train", f"out={tmp_path}", "resume=true"]) == 0  # the other arguments are the run's own
    assert main(["train", f"out={tmp_path}", "resume=true", "lr=2e-3"]) == 1
    assert "lr: was 0.001, now 0.002" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_goes_on_with_a_warm_up_longer_than_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_fast.train.check_warmup", lambda config: None)
    assert main(["train", f"out={tmp_path}", *QUICK, "warmup_epochs=2", "strategy=ring"]) == 0
    monkeypatch.undo()
    assert main(["train", f"out={tmp_path}", "resume=true"]) == 0
    assert main(["train", f"out={tmp_path}", "overwrite=true", *QUICK, "warmup_epochs=2"]) == 1
    assert "warmup_epochs: got 2.0 with epochs=1, allowed: at most epochs" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info"]) == 0
    assert "nt_xent_fwd" in capsys.readouterr().out


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path):
    command = [sys.executable, "-m", "ssl_fast.cli", "train", "out=run", *QUICK[:3], "epochs=10000", "log_every=1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and "loss" in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "ssl-fast train out=run resume=true" in error and "Traceback" not in error
    assert (tmp_path / "run/checkpoints/last.pt").exists()


def test_demo(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "N", 256)
    result = demo_module.demo(tmp_path, epochs=3)
    text = capsys.readouterr().out
    assert result.keys() >= {"random", "trained", "pixels"} and "trained, no labels" in text
    assert (tmp_path / "plots/curves.png").exists() and (tmp_path / "plots/pca.png").exists()
    if sys.platform == "linux":
        assert result["blockwise"] < 0.1 * result["dense"]  # 4096 pairs: a fresh process reads the module's own N
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["knn"] == result["random"]
