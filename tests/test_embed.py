"""Features of a folder as a file: names and classes, unreadable images, and a call that was killed."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import checkpoint
from PIL import Image
from safetensors.torch import load_file

from ssl_fast import embed as embed_module
from ssl_fast.cli import main
from ssl_fast.data import load_data
from ssl_fast.embed import embed
from ssl_fast.evaluate import encode
from ssl_fast.features import load_encoder
from ssl_fast.run import read_checkpoint


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def images(tmp_path):
    """Thirty digits in three classes, of which one cannot be decoded."""
    digits = load_data("digits").train.images[:30, 0].numpy()
    for i, pixels in enumerate(digits):
        path = tmp_path / "images" / "cab"[i % 3] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((9, 9), Image.NEAREST).save(path)
    (tmp_path / "images" / "b" / "11.png").write_bytes(b"no image")
    return tmp_path / "images"


def rows(path):
    return list(csv.reader(path.open()))


def test_rows_are_the_features_of_the_files_named(run, images, tmp_path):
    result = embed(run, images, tmp_path / "h.npy", batch_size=7)
    assert result == {"out": str(tmp_path / "h.npy"), "names": str(tmp_path / "h.csv"), "images": 29, "features": 128,
                      "unreadable": 1}  # fmt: skip
    h, (head, *names) = np.load(tmp_path / "h.npy"), rows(tmp_path / "h.csv")
    assert h.shape == (29, 128) and h.dtype == np.float32 and head == ["file", "class"]
    whole = sorted(str(path.relative_to(images)) for path in images.rglob("*.png") if path.stem != "11")
    assert [name for name, _ in names] == whole
    assert all(name[0] == label for name, label in names)
    for i in (0, 12, 28):  # each alone: no row belongs to another file
        (tmp_path / "one").mkdir(exist_ok=True)
        (tmp_path / "one" / "x.png").write_bytes((images / names[i][0]).read_bytes())
        embed(run, tmp_path / "one", tmp_path / "one.npy", overwrite=True)
        np.testing.assert_allclose(np.load(tmp_path / "one.npy")[0], h[i], rtol=1e-4, atol=1e-5)
    assert rows(tmp_path / "one.csv") == [["file"], ["x.png"]]
    assert sorted(p.name for p in tmp_path.glob("*h.*") if p.is_file()) == ["h.csv", "h.npy"]

    embed(run, images, tmp_path / "s.safetensors", batch_size=7)
    tensors = load_file(tmp_path / "s.safetensors")
    assert torch.equal(tensors["features"], torch.from_numpy(h))
    assert rows(tmp_path / "s.csv") == rows(tmp_path / "h.csv")
    assert tensors["labels"].tolist() == ["abc".index(label) for _, label in names]


def test_features_are_those_that_evaluation_sees(run, tmp_path):
    digits = load_data("digits")
    digits.test.images = digits.test.images[:20]
    digits.test.labels = digits.test.labels[:20]
    for i, pixels in enumerate(digits.test.images[:, 0].numpy()):
        Image.fromarray(pixels).resize((9, 9), Image.NEAREST).save(tmp_path / f"{i:02}.png")
    embed(run, tmp_path, tmp_path / "h.npy")
    plain = load_data(tmp_path, None, 8)
    encoder = load_encoder(read_checkpoint(run / "checkpoints/last.pt"))
    expected, _ = encode(encoder, plain.train, 8, torch.device("cpu"), channels=1)
    np.testing.assert_allclose(np.load(tmp_path / "h.npy"), expected, rtol=1e-4, atol=1e-5)


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from ssl_fast import embed as module
view, left = module.plain_view, [3]
def plain_view(*args):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return view(*args)
module.plain_view = plain_view
module.embed(*sys.argv[1:4], batch_size=7)
"""


def test_a_killed_call_goes_on(run, images, tmp_path, monkeypatch):
    out, whole = tmp_path / "h.safetensors", tmp_path / "whole.safetensors"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, str(run), str(images), str(out)]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert not out.exists() and json.loads((tmp_path / ".h.safetensors.json").read_text())["done"] == 21
    with (tmp_path / ".h.safetensors.partial").open("ab") as file:
        file.write(b"half a row that no journal knows of")
    seen, view = [], embed_module.plain_view
    monkeypatch.setattr(embed_module, "plain_view", lambda x, size: seen.append(len(x)) or view(x, size))
    result = embed(run, images, out, batch_size=7)
    assert seen == [7, 2] and result["images"] == 29 and result["unreadable"] == 1
    embed(run, images, whole, batch_size=7)
    assert out.read_bytes() == whole.read_bytes() and rows(tmp_path / "h.csv") == rows(tmp_path / "whole.csv")
    assert not list(tmp_path.glob(".h*"))


def test_what_changed_since_the_break_starts_anew(run, images, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    def broken():
        calls = iter([embed_module.plain_view] * 2 + [stop])
        with monkeypatch.context() as patch:
            patch.setattr(embed_module, "plain_view", lambda *args: next(calls)(*args))
            with pytest.raises(KeyboardInterrupt):
                embed(run, images, tmp_path / "h.npy", batch_size=7)

    broken()
    Image.new("L", (9, 9), 77).save(images / "a" / "01.png")
    embed(run, images, tmp_path / "h.npy", batch_size=7)
    embed(run, images, tmp_path / "new.npy", batch_size=7)
    assert (tmp_path / "h.npy").read_bytes() == (tmp_path / "new.npy").read_bytes()
    (tmp_path / "h.npy").unlink()
    (tmp_path / "h.csv").unlink()
    broken()
    (tmp_path / ".h.npy.partial").write_bytes(b"cut short")  # by a disk that lost it
    embed(run, images, tmp_path / "h.npy", batch_size=7)
    assert (tmp_path / "h.npy").read_bytes() == (tmp_path / "new.npy").read_bytes()


def test_what_cannot_be_embedded(run, images, tmp_path, capsys):
    (tmp_path / "there.npy").touch()
    (tmp_path / "mine.csv").touch()
    (tmp_path / "empty").mkdir()
    for part in ("train", "val"):
        (tmp_path / "parts" / part).mkdir(parents=True)
    for data, out, error, message in (
        (images, "h.txt", ValueError, "out: got .*h.txt', allowed: a file ending in .npy or .safetensors"),
        (images, "there.npy", FileExistsError, "there.npy exists; add overwrite=true"),
        (images, "mine.npy", FileExistsError, "mine.csv exists; add overwrite=true"),
        ("digits", "h.npy", FileNotFoundError, "data: got 'digits', allowed: a folder of images"),
        (tmp_path / "empty", "h.npy", ValueError, "data: no images in"),
        (tmp_path / "parts", "h.npy", ValueError, "holds train and val, allowed: one of them; give .*parts/train"),
    ):
        with pytest.raises(error, match=message):
            embed(run, data, tmp_path / out)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        embed(run, images, tmp_path / "h.npy", batch_size=0)
    with pytest.raises(TypeError, match="overwrite: got 'no', allowed: True, False"):
        embed(run, images, tmp_path / "h.npy", overwrite="no")
    assert not list(tmp_path.glob("*h.*"))
    assert main(["embed", f"checkpoint={run}", f"data={images}", f"out={tmp_path / 'h.npy'}"]) == 0
    assert "unreadable   1" in capsys.readouterr().out and (tmp_path / "h.npy").exists()
