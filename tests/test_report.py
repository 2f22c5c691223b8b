"""The online probe beside a run, its pictures, and its report."""

import base64
import copy
import io
import os
import re
import shutil
import signal

import pytest
import torch
from PIL import Image
from test_train import QUICK, equal, metrics, one_thread, tiny  # noqa: F401
from torch import nn

from ssl_fast import plots
from ssl_fast import report as report_module
from ssl_fast.data import Split, load_data
from ssl_fast.evaluate import evaluate
from ssl_fast.online import OnlineProbe
from ssl_fast.report import report
from ssl_fast.run import read_checkpoint, read_rows
from ssl_fast.train import train


@pytest.mark.parametrize(
    "given",
    [{}, {"method": "moco_v2", "K": 720}, {"method": "barlow_twins", "dim": 16}, {"micro_batch": 100}],
    ids=str,
)
def test_the_probe_learns_and_leaves_the_run_as_it_is(tmp_path, monkeypatch, given):
    monkeypatch.setattr("ssl_fast.train.draw_pictures", lambda *args: [])  # which takes longer than these runs
    monkeypatch.setattr("ssl_fast.train.write_report", lambda *args: None)
    settings = {**QUICK, "epochs": 5, "lr": 1e-3, "knn_every": 0, "log_every": 5, **given}
    result = train(tmp_path / "with", model=tiny(), probe_every=4, **settings)
    train(tmp_path / "without", model=tiny(), probe_every=0, **settings)
    assert result["probe"] > 0.5  # about 0.1 where rows and labels do not match
    assert [row["epoch"] for row in metrics(tmp_path / "with") if "probe" in row] == [4, 5]
    ours, theirs = (read_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("with", "without"))
    assert all(equal(ours[key], theirs[key]) for key in ("model", "optimizer", "rng"))
    assert ours["probe"]["steps"] == 15 and theirs["probe"] is None
    losses = [[row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in ("with", "without")]
    assert losses[0] == losses[1]


def test_the_probe_separates_what_is_linear_at_any_scale_and_draws_nothing():
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    h = (torch.randn(3, 16)[labels] + 0.3 * torch.randn(300, 16)) * 1e-3 + 5
    state = torch.get_rng_state()
    probe = OnlineProbe(16, 3)
    for part in torch.arange(300).split(20) * 2:
        probe.learn(h[part].requires_grad_(), labels[part])
    assert probe.accuracy(h, labels) > 0.98 and torch.equal(state, torch.get_rng_state())
    again = OnlineProbe(16, 3)
    again.load_state_dict(copy.deepcopy(probe.state_dict()))
    for p in (probe, again):
        p.learn(h[:1], labels[:1])  # a row alone has no variance
        p.learn(h[:50].bfloat16(), labels[:50])
    assert equal(probe.state_dict(), again.state_dict()) and probe.steps == 31


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.set_num_threads(1)
    train(folder, model="convnet", **{**QUICK, "epochs": 2})
    return folder


def pictures(folder):
    """The captions of a report's pictures, each of which is decoded."""
    text = (folder / "report.html").read_text()
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', text)
    for _, data in found:
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    assert text.count("src=") == text.count("<img") == len(found)
    assert "<script" not in text and "http" not in text and "<link" not in text and "@import" not in text
    return [caption.split(",")[0].split(" ")[0] for caption, _ in found]


def test_the_report_of_a_finished_run_needs_nothing_else(out):
    text = (out / "report.html").read_text()
    assert "convnet, finished after 6 steps" in text and "<td>batch_size</td><td>360</td>" in text
    assert "<td>knn</td>" in text and "<td>probe</td>" in text and "<td>loss</td>" in text
    umap = ["UMAP"] if (out / "plots/umap.png").exists() else []
    assert pictures(out) == ["Loss", "First", *umap, "Images", "Images", "Kernels"]
    assert "None yet: <code>ssl-fast evaluate" in text


def test_the_report_shows_evaluations_made_since(out, tmp_path):
    settings = {"protocol": "knn", "label_fraction": 0.1, "seeds": 2, "out": tmp_path, "device": "cpu"}
    found = [evaluate(out, **settings, initial=initial) for initial in ("checkpoint", "random", "random")]
    shutil.copy(out / "checkpoints/last.pt", tmp_path)
    evaluate(tmp_path / "last.pt", protocol="knn")  # of no run's folder
    path = out / "evaluations.jsonl"
    assert read_rows(path) == found and not (tmp_path / path.name).exists()
    with path.open("a") as file:
        file.write('{"cut sh')
    report(out, device="cpu")
    text = (out / "report.html").read_text()
    assert "<th>label_fraction</th>" in text and "Accuracy" in pictures(out)
    assert text.count(f"<td>{found[0]['knn']:.6g}</td>") == text.count(f"<td>{found[1]['knn']:.6g}</td>") == 1
    path.unlink()
    (out / "plots/fractions.png").unlink()


def test_the_report_of_a_run_that_was_broken_off(tmp_path):
    class Interrupted(nn.Sequential):
        def forward(self, x):
            self.steps = getattr(self, "steps", 0) + self.training
            if self.steps == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(x)

    def module():
        return Interrupted(nn.Flatten(), nn.Linear(64, 8))

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model=module(), **QUICK)
    assert "pass such a module as model=" in report(tmp_path)["missing"]
    assert pictures(tmp_path) == ["Loss", "Images"]
    missing = report(tmp_path, model=module())["missing"]
    assert "filters: the encoder has no convolution on 1 or 3 channels" in missing
    assert "not finished: a checkpoint of step 4 of 9" in (tmp_path / "report.html").read_text()
    assert {"First", "Images"} < set(pictures(tmp_path))

    (tmp_path / "checkpoints/last.pt").write_bytes(b"half")
    assert "is not a checkpoint" in report(tmp_path)["missing"] and "First" in pictures(tmp_path)
    for path in (*tmp_path.glob("checkpoints/*"), *tmp_path.glob("plots/*"), tmp_path / "metrics.jsonl"):
        path.unlink()
    assert "last.pt does not exist" in report(tmp_path)["missing"]
    assert "no checkpoint yet" in (tmp_path / "report.html").read_text() and pictures(tmp_path) == ["Loss"]


def test_the_report_of_images_that_have_moved_and_of_strange_names(tmp_path):
    data = tmp_path / "<script>&"
    data.mkdir()
    for i in range(9):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(data / f"{i}.png")
    settings = {"model": "convnet", "image_size": 8, "batch_size": 4, "epochs": 1, "num_workers": 0}
    train(tmp_path / "out", data, method="moco_v2", K=8, bn_splits=2, **settings)
    assert pictures(tmp_path / "out")
    assert "umap" in report(tmp_path / "out")["missing"] or (tmp_path / "out/plots/umap.png").exists()
    data.rename(tmp_path / "elsewhere")
    assert "is neither a data set nor a folder" in report(tmp_path / "out")["missing"] and pictures(tmp_path / "out")


def test_what_holds_no_run(tmp_path, out):
    with pytest.raises(FileNotFoundError, match="holds no run, allowed: the folder that `train` was given as out"):
        report(tmp_path)
    (tmp_path / "args.yaml").write_text("lr: 0.1")
    with pytest.raises(ValueError, match="args.yaml is not that of a run"):
        report(tmp_path)
    with pytest.raises(ValueError, match="device: got 'cuda:99'"):
        report(out, device="cuda:99")


def test_a_picture_that_fails_costs_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "plot_neighbours", lambda *args: 1 / 0)
    train(tmp_path, model="convnet", **{**QUICK, "epochs": 1})
    text = (tmp_path / "report.html").read_text()
    assert "neighbours: division by zero" in text and (tmp_path / "plots/filters.png").exists()


def test_overwrite_leaves_no_picture_of_the_run_before(tmp_path, out):
    settings = {**QUICK, "epochs": 1}
    train(tmp_path, model="convnet", **settings)
    (tmp_path / "evaluations.jsonl").write_text("{}\n")
    train(tmp_path, model=tiny(), overwrite=True, **settings)
    assert not (tmp_path / "evaluations.jsonl").exists() and not (tmp_path / "plots/filters.png").exists()


@pytest.fixture
def tiles(monkeypatch):
    """What is put into the next picture of tiles."""
    kept = {}
    monkeypatch.setattr(plots, "_plot_tiles", lambda rows, path, **given: kept.update(given, rows=rows))
    return kept


def test_neighbours_are_the_nearest_by_cosine(tiles):
    angle = torch.tensor([0.0, 0.1, 3.0, 0.3])
    h = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([[1.0], [100.0], [1.0], [0.01]])
    shown = plots.neighbours(h, queries=4, k=2)
    assert shown.tolist() == [[0, 1, 3], [1, 0, 3], [2, 3, 1], [3, 1, 0]]
    assert plots.neighbours(h, queries=9, k=9).shape == (4, 4)
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    plots.plot_neighbours(images[shown], torch.tensor([0, 0, 1, 1])[shown], None)
    assert [[round(float(v) * 255) for v in row[:, 2, 1, 1]] for row in tiles["rows"]] == shown.tolist()
    assert tiles["borders"][0] == [plots.PLAIN, plots.SAME, plots.OTHER] and tiles["borders"][2][1] == plots.SAME
    plots.plot_neighbours(images[shown], torch.full((4,), -1)[shown], None)
    assert {colour for line in tiles["borders"] for colour in line} == {plots.PLAIN}


@pytest.mark.parametrize("channels, count", [(1, 1), (3, 20), (3, 500)])
def test_filters_to_scale(tiles, tmp_path, channels, count):
    weight = torch.randn(count, channels, 5, 3)
    weight[0] = 0
    plots.plot_filters(weight, None)
    rows = torch.cat(tiles["rows"])
    assert len(rows) == {1: 1, 20: 32, 500: 128}[count] and (rows[0] == 0.5).all()
    assert rows.min() >= 0 and rows.max() <= 1 and len({len(row) for row in tiles["rows"]}) == 1


def test_pca_is_that_of_the_svd_and_draws_nothing():
    torch.manual_seed(0)
    x = torch.randn(200, 24) * torch.linspace(1, 8, 24) @ torch.randn(24, 24) + 7
    state = torch.get_rng_state()
    ours = plots.pca(x)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(ours, plots.pca(x))
    u, s, _ = torch.linalg.svd(x - x.mean(0))
    theirs = u[:, :2] * s[:2]
    assert (ours.abs() - theirs.abs()).norm() < 0.02 * theirs.norm()
    assert plots.pca(torch.randn(5, 1)).shape == (5, 2)


def test_a_spread_of_images():
    test = load_data("digits").test
    part = report_module._spread(test, 100)
    assert len(part) == len(part.labels) == 100 and torch.equal(part.images[-1], test.images[-1])
    assert report_module._spread(test, 360) is test and report_module._spread(Split(test.images), 7).labels is None
