"""kNN and probe against plain definitions, and the evaluation of a run."""

import math

import pytest
import torch
from PIL import Image
from torch import nn

from ssl_fast.data import load_data
from ssl_fast.evaluate import embedding_std, encode, evaluate, folded, knn_accuracy, knn_k, linear_probe
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


def naive_knn(bank, bank_labels, queries, query_labels, k, t):
    right = 0
    for q, label in zip(queries, query_labels, strict=True):
        s = [(float(torch.cosine_similarity(q, b, 0)), int(y)) for b, y in zip(bank, bank_labels, strict=True)]
        votes = {}
        for similarity, y in sorted(s, reverse=True)[:k]:
            votes[y] = votes.get(y, 0) + math.exp(similarity / t)
        right += max(votes, key=votes.get) == label
    return right / len(queries)


@pytest.mark.parametrize("k, t", [(1, 0.07), (5, 0.07), (20, 0.5), (60, 0.07)])
def test_knn_is_the_weighted_vote_in_any_block_size(k, t):
    bank, test = clusters(60, noise=1.5), clusters(31, noise=1.5, seed=1)
    expected = naive_knn(*bank, *test, k, t)
    assert 0.4 < expected < 1
    for block in (1000, 60, 7):
        assert knn_accuracy(*bank, *test, k=k, temperature=t, block=block) == pytest.approx(expected)


def test_knn_with_a_tiny_temperature_and_a_wrong_k():
    bank = clusters(30, noise=0.1)
    assert knn_accuracy(*bank, *bank, k=5, temperature=1e-3) == 1
    with pytest.raises(ValueError, match="k: got 31, allowed: 1 to 30"):
        knn_accuracy(*bank, *bank, k=31)
    assert [knn_k(n) for n in (5, 9_999, 10_000)] == [5, 20, 200]


def test_linear_probe_separates_what_is_linear():
    assert linear_probe(*clusters(90, noise=0.2), *clusters(30, noise=0.2, seed=1)) == 1
    features, _ = clusters(300)
    labels = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(0))
    assert linear_probe(features[:200], labels[:200], features[200:], labels[200:]) < 0.6


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
    assert len(runs) == 8 and all(list(model.fold_report.folded) == ["1"] for model in runs)
    assert len(set(runs[:6])) == 1  # folded once, then refreshed
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
    first = evaluate(out)
    assert first == evaluate(out / "checkpoints" / "last.pt")
    assert first["step"] == 10 and first["knn"] > 0.9 and first["linear"] > 0.9 and first["data"] == "digits"
    assert evaluate(out, protocol="knn").keys() == {"checkpoint", "data", "step", "knn", "knn_k", "knn_t"}


def test_evaluate_is_what_the_run_recorded(out):
    result = train(out, "digits", model="convnet", epochs=2, batch_size=256, optimizer="sgd", lr=0.06, resume=True)
    assert evaluate(out, protocol="knn")["knn"] == pytest.approx(result["knn"], abs=1e-6)


def test_what_cannot_be_evaluated(out, tmp_path):
    with pytest.raises(ValueError, match="protocol: got 'knm', allowed: knn, linear"):
        evaluate(out, protocol="knm")
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
    with pytest.raises(ValueError, match="weights do not fit this model"):
        evaluate(tmp_path, model=encoder(9))
    assert 0 < evaluate(tmp_path, model=encoder(8), protocol="knn")["knn"] <= 1
