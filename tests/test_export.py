"""Each format is read back by the program it is for, and gives the encoder's h."""

import json

import pytest
import timm
import torch
import torchvision
from common import checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ssl_fast import export as export_module
from ssl_fast.cli import main
from ssl_fast.export import export
from ssl_fast.features import load_encoder
from ssl_fast.run import read_checkpoint

FORMATS = {"torch_export": "h.pt2", "onnx": "h.onnx"}


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


def encoder_of(run):
    return load_encoder(read_checkpoint(run / "checkpoints/last.pt")).eval()


def close(h, expected):
    torch.testing.assert_close(torch.as_tensor(h), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["simclr", "moco_v2"])
def test_torchvision_and_timm_load_the_state_dict_without_renaming(method, tmp_path):
    run = checkpoint(tmp_path / "run", "resnet18", 32, 3, method, stem="imagenet")
    result = export(run, "safetensors", tmp_path / "h.safetensors")
    weights, images = load_file(tmp_path / "h.safetensors"), torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = encoder_of(run)(images)
    network = torchvision.models.resnet18()
    keys = network.load_state_dict(weights, strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"] and not keys.unexpected_keys
    network.fc = nn.Identity()
    with torch.no_grad():
        assert torch.equal(network.eval()(images), expected)
    network = timm.create_model("resnet18", num_classes=0)
    network.load_state_dict(weights)
    with torch.no_grad():
        close(network.eval()(images), expected)
    with safe_open(tmp_path / "h.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts.pop("format") == "pt"
    assert {key: json.loads(value) for key, value in facts.items()} == {k: v for k, v in result.items() if k in facts}
    assert result["features"] == 512 and result["input"] == ["N", 3, 32, 32] and result["mean"] == [0.485, 0.456, 0.406]


def test_a_timm_network_loads_its_own(tmp_path):
    run = checkpoint(tmp_path / "run", "timm/test_vit", 160, 3)
    export(run, "safetensors", tmp_path / "h.safetensors")
    network, images = timm.create_model("test_vit", num_classes=0), torch.rand(1, 3, 160, 160)
    network.load_state_dict(load_file(tmp_path / "h.safetensors"))
    with torch.no_grad():
        assert torch.equal(network.eval()(images), encoder_of(run)(images))


def test_graphs_are_folded_and_take_any_batch(run, tmp_path):
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    for format in ("torch_export", "onnx"):
        assert export(run, format, tmp_path / FORMATS[format])["features"] == 128
    extra = {"features": ""}
    graph = torch.export.load(tmp_path / "h.pt2", extra_files=extra)
    assert extra["features"] == "128" and not any("batch_norm" in str(node.target) for node in graph.graph.nodes)
    session = runtime.InferenceSession(tmp_path / "h.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["std"]) == [0.226]
    assert not any("BatchNorm" in node.op_type for node in onnx.load(tmp_path / "h.onnx").graph.node)
    for count in (1, 2, 5):
        images = torch.rand(count, 1, 8, 8)
        with torch.no_grad():
            expected = encoder_of(run)(images)
        close(graph.module()(images), expected)
        close(session.run(["h"], {"images": images.numpy()})[0], expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.onnx", "h.pt2"]


def test_what_cannot_be_exported(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "there.onnx").touch()
    for format, out, error, message in (
        (
            "onx",
            "h.onnx",
            ValueError,
            "format: got 'onx', did you mean 'onnx'. allowed: safetensors, torch_export, onn",
        ),
        ("onnx", "h.pt", ValueError, "out: got .* with format=onnx, allowed: a file ending in .onnx"),
        ("onnx", "there.onnx", FileExistsError, "there.onnx exists; add overwrite=true"),
    ):
        with pytest.raises(error, match=message):
            export(run, format, tmp_path / out)
    monkeypatch.setitem(export_module.WRITERS, "safetensors", lambda *args: args[2].write_text("half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run, "safetensors", tmp_path / "h.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["there.onnx"]
    monkeypatch.undo()

    def import_module(name):
        if name == "onnxscript":
            raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr("ssl_fast._extras.importlib.import_module", import_module)
    assert main(["export", f"checkpoint={run}", "format=onnx", f"out={tmp_path / 'h.onnx'}"]) == 1
    assert 'needs onnxscript, which is not installed: pip install "ssl_fast[export]"' in capsys.readouterr().err
