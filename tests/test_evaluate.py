"""The probes, fine-tuning with a share of the labels and frozen layers, and the evaluation of a run."""

import copy

import numpy
import pytest
import torch
import torchvision
from common import checkpoint
from PIL import Image
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info
from torch import nn

from ssl_fast import finetune as finetune_module
from ssl_fast.backbones import ConvNet, build_encoder
from ssl_fast.data import load_data
from ssl_fast.evaluate import embedding_std, encode, evaluate, folded
from ssl_fast.finetune import balanced_subset, finetune, freeze_through, subset
from ssl_fast.knn import knn_accuracy
from ssl_fast.methods import METHODS
from ssl_fast.probe import linear_probe
from ssl_fast.train import train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def clusters(n, classes=3, dim=8, noise=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    return centres[labels] + noise * torch.randn(n, dim, generator=generator), labels


@pytest.mark.parametrize("probe", ["sgd", "logistic"])
def test_linear_probe_separates_what_is_linear(probe):
    train, test = clusters(90, noise=0.2), clusters(30, noise=0.2, seed=1)
    assert linear_probe(*train, *test, probe) == 1
    features, labels = clusters(300, noise=1.5)
    expected = linear_probe(features[:200], labels[:200], features[200:], labels[200:], probe)
    assert expected < 1
    features[:, 3] = 7.0  # a feature that says nothing, and has no deviation
    scaled = 1e4 * features * torch.logspace(-3, 3, 8) - 5
    constant, same = (linear_probe(x[:200], labels[:200], x[200:], labels[200:], probe) for x in (features, scaled))
    assert constant == pytest.approx(same, abs=0.02)
    labels = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(0))
    assert linear_probe(features[:200], labels[:200], features[200:], labels[200:], probe) < 0.6


def test_the_probe_by_sgd_is_as_good_as_logistic_regression_and_leaves_the_random_numbers():
    (train, y), (test, test_y) = clusters(600, 6, 16, 2.0), clusters(400, 6, 16, 2.0, seed=1)
    state = torch.get_rng_state()
    found = [linear_probe(train, y, test, test_y, probe) for probe in ("sgd", "logistic")]
    assert found[0] == linear_probe(train, y, test, test_y, "sgd") and torch.equal(state, torch.get_rng_state())
    assert found[1] < 0.95 and found[0] == pytest.approx(found[1], abs=0.03)
    assert linear_probe(train, y, test, test_y, "sgd", epochs=1, lr=1e-4) < found[0]
    with pytest.raises(ValueError, match="probe: got 'sdg', did you mean 'sgd'"):
        linear_probe(train, y, test, test_y, "sdg")
    with pytest.raises(FloatingPointError, match="lower lr"):
        linear_probe(train, y, test, test_y, "sgd", lr=3e38)


def test_logistic_regression_takes_one_thread_and_gives_the_others_back(monkeypatch):
    seen, fit = [], LogisticRegression.fit
    monkeypatch.setattr(
        LogisticRegression, "fit", lambda *args, **kw: seen.extend(threadpool_info()) or fit(*args, **kw)
    )
    torch.set_num_threads(2)
    train, test = clusters(90), clusters(30, seed=1)
    linear_probe(*train, *test, "logistic")
    assert {pool["num_threads"] for pool in seen} == {1} and torch.get_num_threads() == 2


@pytest.mark.parametrize("dim", [16, 256])
def test_embedding_std(dim):
    torch.manual_seed(0)
    assert embedding_std(torch.randn(2000, dim)) == pytest.approx(dim**-0.5, rel=0.02)
    assert embedding_std(torch.ones(50, dim) * torch.rand(50, 1)) < 1e-6


def test_encode_leaves_every_module_in_its_mode():
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5)).train()
    encoder[1].eval()
    split = load_data("digits").test
    h, labels = encode(encoder, split, 8, CPU, batch_size=100)
    assert h.shape == (360, 64) and torch.equal(labels, split.labels)
    assert encoder.training and encoder[2].training and not encoder[1].training
    torch.testing.assert_close(h, encode(encoder, split, 8, CPU, batch_size=360)[0])


def test_evaluation_runs_folded_and_goes_on_where_a_fold_cannot_be_refreshed(tmp_path, monkeypatch):
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    runs = []
    monkeypatch.setattr(
        "ssl_fast.evaluate.encode", lambda model, *args, **kw: runs.append(model) or encode(model, *args, **kw)
    )
    train(tmp_path, "digits", model=encoder, epochs=2, batch_size=700, knn_every=1)
    evaluate(tmp_path, protocol="knn", model=encoder)
    assert len(runs) == 5 and all(list(model.fold_report.folded) == ["1"] for model in runs)
    assert len(set(runs[:3])) == 1  # folded once, then refreshed
    data = load_data("digits")
    encoder[2] = nn.GELU()
    again = folded(folded(encoder, data, CPU), data, CPU)
    encoder[2] = nn.ReLU()
    new = folded(again, data, CPU)
    assert again.unfold() is new.unfold() is encoder and new is not again and type(new[2]) is nn.ReLU
    assert folded(nn.Flatten(), data, CPU).fold_report.summary == "fold_conv_bn: 0 norms folded, 0 left"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.set_num_threads(1)
    train(folder, "digits", model="convnet", epochs=2, batch_size=256, optimizer="sgd", lr=0.06)
    return folder


def test_two_evaluations_give_the_same_figures(out):
    settings = {"protocol": "knn,linear,finetune", "label_fraction": 0.05, "seeds": 2, "epochs": 2, "probe": "sgd"}
    first = evaluate(out, **settings)
    torch.rand(1)
    again = evaluate(out / "checkpoints" / "last.pt", **settings, out=out / "elsewhere")
    paths = [first.pop("subsets"), again.pop("subsets")]
    assert first == again and first["step"] == 10 and first["images"] == 70 and first["classes"] == 10
    for p in ("knn", "linear", "finetune"):
        values = torch.tensor(first[f"{p}_seeds"], dtype=torch.float64)
        assert first[p] == pytest.approx(values.mean()) and first[f"{p}_std"] == pytest.approx(values.std())
    assert paths[0] == [str(out / "evaluation" / f"digits_0.05_seed{s}.npy") for s in (0, 1)]
    labels = load_data("digits").bank.labels
    for s in (0, 1):
        indices = torch.from_numpy(numpy.load(paths[1][s]))
        assert torch.equal(indices, balanced_subset(labels, 0.05, s)) and (labels[indices].bincount() == 7).all()


def test_evaluation_of_all_labels(out):
    found = evaluate(out)
    assert found["knn"] > 0.9 and found["linear"] > 0.9 and found["probe"] == "logistic"
    several = evaluate(out, protocol="knn", seeds=3)
    assert several["knn_seeds"] == [found["knn"]] * 3 and several["knn_std"] == 0
    keys = {"checkpoint", "data", "step", "initial", "classes", "images", "knn", "knn_k", "knn_t"}
    assert evaluate(out, protocol="knn").keys() == keys and not {"subsets", "finetune"} & found.keys()


def test_random_weights_are_the_baseline_and_each_seed_has_its_own(out):
    found = evaluate(out, protocol="knn", initial="random", seeds=2)
    data, figures = load_data("digits"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        encoder, _ = build_encoder("convnet", 8, 1)
        h, y = encode(encoder, data.bank, 8, CPU)
        figures.append(knn_accuracy(h, y, *encode(encoder, data.test, 8, CPU), k=20))
    assert found["knn_seeds"] == pytest.approx(figures, abs=1 / 360) and len(set(figures)) == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_any_method_is_its_encoder(method, tmp_path):
    run = checkpoint(tmp_path / "run", method=method)
    saved = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    encoder = ConvNet(1)
    encoder.load_state_dict({k[8:]: v for k, v in saved["model"].items() if k.startswith("encoder.")})
    data = load_data("digits")
    bank, test = (encode(encoder, split, 8, CPU) for split in (data.bank, data.test))
    assert evaluate(run, protocol="knn")["knn"] == pytest.approx(knn_accuracy(*bank, *test), abs=1 / 360)


def test_subsets_are_balanced_nested_and_of_the_seed():
    labels = torch.arange(1000) % 7 % 5  # two classes twice as large
    small, large = balanced_subset(labels, 0.02, 3), balanced_subset(labels, 0.1, 3)
    assert (labels[small].bincount() == 4).all() and (labels[large].bincount() == 20).all()
    assert set(small.tolist()) < set(large.tolist()) and torch.equal(large, large.sort().values)
    assert not torch.equal(large, balanced_subset(labels, 0.1, 4))
    assert torch.equal(balanced_subset(labels, 1.0), torch.arange(1000))
    smallest = int(labels.bincount().min())
    with pytest.raises(ValueError, match=f"label_fraction: got 0.9, which is 180 .* class 2 has {smallest}, allowed: "):
        balanced_subset(labels, 0.9)
    with pytest.raises(ValueError, match=f"class wren has {smallest}"):
        balanced_subset(labels, 0.9, names=["tit", "robin", "wren", "finch", "dunnock"])
    with pytest.raises(ValueError, match="got 0.001, which is 0 images of each of the 5 .*allowed: 0.0026 to 0.7"):
        balanced_subset(labels, 0.001)
    assert len(balanced_subset(labels, 0.0026)) == 5
    for fraction in (0, 1.5, float("nan"), "1%"):
        with pytest.raises(ValueError, match="label_fraction: got .*allowed: above 0 and at most 1"):
            balanced_subset(labels, fraction)


def small_digits():
    data = load_data("digits")
    return subset(data.train, torch.arange(64)), subset(data.test, torch.arange(50)), data


@pytest.mark.parametrize("freeze, folds", [("none", 0), ("blocks.1", 2), ("blocks.2.0", 0), ("blocks", 4)])
def test_what_is_frozen_stays_and_the_rest_is_trained(freeze, folds, monkeypatch):
    torch.manual_seed(0)
    encoder, (train, test, data) = ConvNet(1, 4), small_digits()
    encoder(torch.rand(64, 1, 8, 8))
    before = copy.deepcopy(encoder).eval()
    monkeypatch.setattr(finetune_module, "_fold_frozen", lambda *args: None)
    plain = finetune(encoder, train, test, data, CPU, freeze=freeze, epochs=2)
    names, states = list(encoder.state_dict()), [m.state_dict().values() for m in (before, encoder)]
    last = max((i for i, name in enumerate(names) if f"{name}.".startswith(f"{freeze}.")), default=-1)
    for i, (name, was, now) in enumerate(zip(names, *states, strict=True)):
        assert torch.equal(was, now) == (i <= last), name
    monkeypatch.undo()
    encoder = copy.deepcopy(before)
    assert finetune(encoder, train, test, data, CPU, freeze=freeze, epochs=2) == pytest.approx(plain, abs=0.04)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in encoder.modules()) == 4 - folds
    x = torch.rand(5, 1, 8, 8)
    if freeze != "none" and freeze != "blocks.2.0":
        depth = {"blocks.1": 2, "blocks": 4}[freeze]
        torch.testing.assert_close(encoder.blocks[:depth](x), before.blocks[:depth](x))


def test_freezing_knows_the_stages_of_a_network():
    encoder = torchvision.models.resnet18()
    assert freeze_through(encoder, "layer1") == ["conv1", "bn1", "relu", "maxpool", "layer1"]
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert (
        not any(name.startswith(("conv1", "bn1", "layer1")) for name in trained) and "layer2.0.conv1.weight" in trained
    )
    assert freeze_through(encoder, "layer2.0")[-2:] == ["layer1", "layer2.0"]
    assert encoder.layer2[1].conv1.weight.requires_grad and not encoder.layer2[0].conv1.weight.requires_grad
    vit = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32)
    freeze_through(vit, "conv_proj")
    assert not vit.class_token.requires_grad and vit.encoder.layers[0].mlp[0].weight.requires_grad
    with pytest.raises(ValueError, match="freeze: got 'layer5', did you mean 'layer4'.*conv1, bn1, layer1, layer1.0"):
        freeze_through(encoder, "layer5")


def test_transfer_to_other_images_and_channels(out, tmp_path):
    for part, count in (("train", 6), ("test", 2)):
        for name, colour in (("blue", (0, 0, 200)), ("red", (250, 120, 90))):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 14 + i), colour).save(tmp_path / part / name / f"{i}.png")
    settings = {"protocol": "knn,finetune,transfer", "freeze": "blocks.0", "epochs": 30}
    found = evaluate(out, data=tmp_path, **settings)
    assert found["freeze"] == "blocks.0" and found["classes"] == 2 and found["images"] == 12
    assert found["knn"] == found["transfer"] == 1 and found == evaluate(out, data=tmp_path, **settings)
    (tmp_path / "test" / "red").rename(tmp_path / "red")
    with pytest.raises(
        ValueError, match="2 classes to learn from and 1 to test on.*add test images of class 'red', in"
    ):
        evaluate(out, data=tmp_path)


def test_evaluate_is_what_the_run_recorded(out):
    result = train(out, "digits", model="convnet", epochs=2, batch_size=256, optimizer="sgd", lr=0.06, resume=True)
    assert evaluate(out, protocol="knn")["knn"] == pytest.approx(result["knn"], abs=1e-6)


def test_what_cannot_be_evaluated(out, tmp_path):
    for settings, message in (
        ({"protocol": "knm"}, "protocol: got 'knm', did you mean 'knn'. allowed: knn, linear, finetune, transfer, or"),
        ({"initial": "scratch"}, "initial: got 'scratch', allowed: checkpoint, random"),
        ({"freeze": "blocks"}, "freeze: got 'blocks' without protocol=transfer"),
        ({"protocol": "transfer"}, "freeze: got 'none', .*allowed: a stage of ConvNet, blocks, blocks.0, blocks.1"),
        ({"seeds": 0}, "seeds: got 0, allowed: a whole number >= 1"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"batch_size": 0}, "batch_size: got 0, allowed: a whole number >= 1"),
        ({"num_workers": -1}, "num_workers: got -1, allowed: a whole number >= 0"),
        ({"probe": "sklearn", "protocol": "knn"}, "probe: got 'sklearn', allowed: auto, sgd, logistic"),
        ({"seed": None}, "seed: got None, allowed: a whole number >= 0"),
        ({"protocol": ["knn"]}, "protocol: got .'knn'., allowed: names in one string"),
        ({"checkpoint": None}, "checkpoint: got None, allowed: the folder of a run"),
        ({"seeds": True}, "seeds: got True, allowed: a whole number >= 1"),
        ({"lr": "fast"}, "lr: got 'fast', allowed: a finite number above 0"),
        ({"lr": -1.0}, "lr: got -1.0, allowed: a finite number above 0"),
        ({"label_fraction": 0.003}, "label_fraction: got 0.003, which is 0 images of each of the 10 classes"),
        ({"label_fraction": 0.99}, "label_fraction: got 0.99, which is 142 images .* class 8 has"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            evaluate(**{"checkpoint": out, **settings})
    assert not (out / "evaluation" / "digits_0.99_seed0.npy").exists()
    torch.save({"state_dict": {}, "arch": "resnet50"}, tmp_path / "moco.pt")
    with pytest.raises(ValueError, match="moco.pt is not a checkpoint of ssl_fast.train .*state_dict, arch"):
        evaluate(tmp_path / "moco.pt")
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"model": ConvNet(1)}, tmp_path / "pickled.pt")
    for name in ("text.pt", "pickled.pt"):
        with pytest.raises(
            ValueError, match=f"{name} is not a checkpoint of .* [(]it is not of tensors and plain valu"
        ):
            evaluate(tmp_path / name)
    saved = torch.load(out / "checkpoints" / "last.pt")
    for args, message in (
        ({"method": "byol"}, "checkpoint: its method is 'byol', allowed: simclr, moco_v1, moco_v2, barlow_twins"),
        (
            {"model": "resnet18"},
            "model: the checkpoint's weights do not fit this ResNet: .*the backbone that was tr",
        ),
    ):
        torch.save(saved | {"args": saved["args"] | args}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path / "other.pt", data="digits")
    with pytest.raises(FileNotFoundError, match="last.pt does not exist"):
        evaluate(tmp_path)
    for i in range(4):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="has no labels to evaluate with"):
        evaluate(out, data=tmp_path)


def test_a_module_without_a_name_has_to_be_given_again(tmp_path):
    def encoder(width):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width))

    train(tmp_path, "digits", model=encoder(8), epochs=1, batch_size=700, knn_every=0)
    with pytest.raises(ValueError, match="trained an nn.Module of class <Sequential>; pass such a module as model="):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match="weights do not fit this Sequential: 2 of 2 differ, such as 1.weight"):
        evaluate(tmp_path, model=encoder(9))
    given = encoder(8)
    before = given[1].weight.clone()
    evaluate(tmp_path, model=given, protocol="knn,finetune", epochs=1, label_fraction=0.05)
    assert torch.equal(given[1].weight, before)
    assert 0 < evaluate(tmp_path, model=encoder(8), protocol="knn")["knn"] <= 1
