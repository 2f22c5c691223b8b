"""Nearest neighbours against all similarities in fp64, in any order of the bank and any block size."""

import math

import pytest
import torch
from torch.nn import functional as F

from ssl_fast.knn import knn_accuracy, knn_k, nearest_neighbours


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


@pytest.mark.parametrize("order", ["as drawn", "best last", "best first", "by class"])
@pytest.mark.parametrize(
    "bank_size, k, block", [(1, 1, 4096), (37, 37, 16), (211, 5, 16), (1501, 20, 64), (1501, 200, 1)]
)
def test_neighbours_are_those_of_all_similarities(order, bank_size, k, block):
    bank, labels = clusters(bank_size, dim=13, noise=1.5)
    queries = clusters(67, dim=13, noise=1.5, seed=1)[0]
    similar = F.cosine_similarity(queries[:1], bank)
    keys = {"as drawn": torch.arange(bank_size), "best last": similar, "best first": -similar, "by class": labels}
    bank = bank[keys[order].argsort()]
    truth = F.normalize(queries.double()) @ F.normalize(bank.double()).T
    expected = truth.topk(k)
    cosine, index = nearest_neighbours(bank.double(), queries, k, block)
    assert torch.equal(index, expected.indices)
    torch.testing.assert_close(cosine, expected.values)
    cosine, index = nearest_neighbours(bank, queries, k, block)  # fp32 may swap those that are equal in it
    assert index.dtype == torch.int64 and all(len(set(row)) == k for row in index.tolist())
    torch.testing.assert_close(truth.gather(1, index), expected.values, rtol=0, atol=1e-6)
    torch.testing.assert_close(cosine.double(), expected.values, rtol=0, atol=1e-6)


def test_neighbours_among_equal_rows_and_of_16_bit_features():
    bank = torch.ones(100, 4)
    cosine, index = nearest_neighbours(bank, torch.ones(3, 4), 7, block=16)
    assert torch.equal(cosine, torch.ones(3, 7)) and all(len(set(row)) == 7 for row in index.tolist())
    bank, queries = clusters(90)[0].bfloat16(), clusters(9, seed=1)[0].bfloat16()
    assert torch.equal(nearest_neighbours(bank, queries, 3)[1], nearest_neighbours(bank.float(), queries.float(), 3)[1])
    assert nearest_neighbours(bank, queries[:0], 3)[1].shape == (0, 3)


@pytest.mark.parametrize("order", ["as drawn", "best last", "all equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_does_not_grow_with_the_bank(order, dtype):
    """Every tensor that the vote makes is a few tiles at most: neither (Q, B) similarities nor a copy of the bank."""
    largest = 0

    bank, queries = torch.randn(40_000, 8), torch.randn(50, 8)
    if order == "best last":
        queries = queries[:1] + 0.1 * queries
        bank = bank[F.cosine_similarity(queries[:1], bank).argsort()]
    bank, queries = (bank.to(dtype), queries.to(dtype)) if order != "all equal" else (bank * 0 + 1, queries * 0 + 1)
    labels = torch.arange(40_000) % 7
    own = {x.untyped_storage().data_ptr() for x in (bank, queries, labels)}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in own:
                    largest = max(largest, leaf.untyped_storage().nbytes())
            return result

    with Watch():
        knn_accuracy(bank, labels, queries, labels[:50], k=5, block=256)
    # Of 8 MB that all similarities take, and 1.3 MB the bank. Where all are equal, all of a tile takes part, by its row
    # and column of 8 bytes each.
    assert 0 < largest <= 4 * 64 * (256 + 16) * (4 if order == "all equal" else 2)


@pytest.mark.parametrize("k, t", [(1, 0.07), (5, 0.07), (20, 0.5), (60, 0.07)])
def test_knn_is_the_weighted_vote_in_any_block_size(k, t):
    bank, test = clusters(60, noise=1.5), clusters(31, noise=1.5, seed=1)
    expected = naive_knn(*bank, *test, k, t)
    assert 0.4 < expected < 1
    for block in (1000, 60, 7):
        assert knn_accuracy(*bank, *test, k=k, temperature=t, block=block) == pytest.approx(expected)


def test_knn_with_a_tiny_temperature_and_what_does_not_fit():
    bank = clusters(30, noise=0.1)
    assert knn_accuracy(*bank, *bank, k=5, temperature=1e-3) == 1
    with pytest.raises(ValueError, match="k: got 31, allowed: 1 to 30"):
        knn_accuracy(*bank, *bank, k=31)
    with pytest.raises(ValueError, match="k: got '5', allowed: 1 to 30"):
        knn_accuracy(*bank, *bank, k="5")
    for t in (0, float("nan"), "0.1"):
        with pytest.raises(ValueError, match=f"temperature: got {t!r}, allowed: a number above 0"):
            knn_accuracy(*bank, *bank, temperature=t)
    with pytest.raises(ValueError, match=r"query_labels: got shape \(29,\), allowed: \(30,\), one of each row"):
        knn_accuracy(*bank, bank[0], bank[1][1:])
    with pytest.raises(ValueError, match=r"bank, queries: got shapes \(30, 8\) and \(30, 7\)"):
        nearest_neighbours(bank[0], bank[0][:, 1:])
    assert [knn_k(n) for n in (5, 9_999, 10_000)] == [5, 20, 200]
