"""The drop-ins give the values and gradients of what they replace. `make test` installs the peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_fast import EMA, CLIPLoss, InfoNCE, NTXentLoss, SupConLoss, update_momentum

TOLERANCE = 1e-5


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(ours: Callable[..., Any], theirs: Callable[..., Any], *inputs: Tensor) -> None:
    """Loss and gradients of every floating input, relative to the norm of the whole tensor."""
    results = []
    for loss in (ours, theirs):
        given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        value = loss(*given)
        results.append([value, *torch.autograd.grad(value.sum(), [x for x in given if x.requires_grad])])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= TOLERANCE * b.norm(), (a - b).norm() / b.norm()


@pytest.mark.parametrize("t", (0.07, 0.5))
@pytest.mark.parametrize("N", (1, 2, 31, 200))
def test_lightly(N, t):
    lightly = pytest.importorskip("lightly.loss")
    z1, z2 = rows(N, 33), rows(N, 33, seed=1)
    if N > 1:
        check(NTXentLoss(t), lightly.NTXentLoss(t), z1, z2)
        check(NTXentLoss(t, decoupled=True), lightly.DCLLoss(t), z1, z2)
    bank = F.normalize(rows(50, 33, seed=2))
    ours, theirs = NTXentLoss(t, memory_bank_size=(50, 33)), lightly.NTXentLoss(t, memory_bank_size=(50, 33))
    ours.memory_bank.keys.copy_(bank)
    theirs.memory_bank.bank = bank.clone()
    check(lambda z1, z2: ours(z1, z2), lambda z1, z2: theirs(z1, z2), z1, z2)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_info_nce_pytorch(reduction):
    peer = pytest.importorskip("info_nce")
    q, k, unpaired, paired = rows(20, 17), rows(20, 17, seed=1), rows(43, 17, seed=2), rows(20, 5, 17, seed=3)
    check(InfoNCE(0.07, reduction), peer.InfoNCE(0.07, reduction), q, k)
    check(InfoNCE(0.07, reduction), peer.InfoNCE(0.07, reduction), q, k, unpaired)
    modes = 0.07, reduction, "paired"
    check(InfoNCE(*modes), peer.InfoNCE(*modes), q, k, paired)
    assert torch.allclose(InfoNCE()(q, k), peer.InfoNCE()(q, k))  # the same defaults


def test_open_clip():
    peer = pytest.importorskip("open_clip.loss")
    image, text = F.normalize(rows(70, 24)), F.normalize(rows(70, 24, seed=1))
    for scale in (1.0, 14.3, 100.0):
        check(CLIPLoss(), peer.ClipLoss(), image, text, torch.tensor(scale))
    theirs = peer.ClipLoss()(image, text, torch.tensor(5.0), output_dict=True)
    ours = CLIPLoss()(image, text, torch.tensor(5.0), output_dict=True)
    assert ours.keys() == theirs.keys()
    biased = [loss(image, text, torch.tensor(5.0), torch.tensor(-2.0)) for loss in (CLIPLoss(), peer.ClipLoss())]
    assert torch.allclose(*biased)


@pytest.mark.parametrize("classes", (2, 7, 60))
def test_pytorch_metric_learning(classes):
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    z = rows(64, 20)
    labels = torch.randint(0, classes, (64,), generator=torch.Generator().manual_seed(1))
    check(SupConLoss(0.1), peer.SupConLoss(0.1), z, labels)


def test_where_pytorch_metric_learning_leaves_equation_2():
    """What SupConLoss' docstring says of a row whose loss is 0, and of a batch of one class."""
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    z = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0.1], [-1, -0.1]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    of_rows = SupConLoss(0.05, reduction="none")(z, labels)
    assert (of_rows[:2] < 1e-12).all() and (of_rows[2:] > 0.1).all()
    torch.testing.assert_close(SupConLoss(0.05)(z, labels), of_rows.mean())
    torch.testing.assert_close(peer.SupConLoss(0.05)(z, labels), of_rows[2:].mean())
    same = torch.zeros_like(labels)
    assert peer.SupConLoss(0.05)(z, same) == 0 and SupConLoss(0.05)(z, same) > 1


def networks(count: int) -> list[nn.Module]:
    """Of one structure, with weights and statistics of their own."""
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 5))
        model(torch.randn(4, 3, 6, 6))
        made.append(model)
    return made


def test_lightlys_update_momentum():
    peer = pytest.importorskip("lightly.models.utils")
    model, ours, theirs = networks(3)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(20):
        update_momentum(model, ours, m=0.99)
        peer.update_momentum(model, theirs, m=0.99)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("exclude_buffers", (False, True))
def test_timms_model_ema(exclude_buffers):
    peer = pytest.importorskip("timm.utils")
    start, *models = networks(20)
    ours = EMA(start, 0.99, buffers="copy" if exclude_buffers else "ema")
    theirs = peer.ModelEmaV3(start, decay=0.99, exclude_buffers=exclude_buffers)
    for model in models:
        ours.update(model)
        theirs.update(model)
    for a, b in zip(ours.module.state_dict().values(), theirs.module.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
