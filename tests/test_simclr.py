"""SimCLR against Algorithm 1 written out, its encoders, and its loss curve against that of the dense loss."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ssl_fast.backbones import build_encoder
from ssl_fast.methods import SimCLR
from ssl_fast.train import train


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Dense(nn.Module):
    """NT-Xent with all similarities at once."""

    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

    def forward(self, z1, z2):
        z = F.normalize(torch.cat([z1, z2]))
        logits = (z @ z.T / self.temperature).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)))


def algorithm_1(z1, z2, temperature):
    """The paper's loops: rows 2k-1 and 2k are the two views of image k."""
    z = [row for pair in zip(z1, z2, strict=True) for row in pair]

    def s(i, j):
        return float(z[i] @ z[j] / (z[i].norm() * z[j].norm()))

    def loss(i, j):
        others = sum(math.exp(s(i, k) / temperature) for k in range(len(z)) if k != i)
        return -math.log(math.exp(s(i, j) / temperature) / others)

    return sum(loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k) for k in range(len(z1))) / len(z)


def test_forward_is_algorithm_1():
    torch.manual_seed(0)
    model = SimCLR(nn.Flatten(), features=12, dim=5, temperature=0.3).double()
    views = torch.randn(2, 4, 3, 2, 2).double()
    z1, z2 = model.head(model.encoder(views.flatten(0, 1))).detach().chunk(2)
    assert model(*views).item() == pytest.approx(algorithm_1(z1, z2, 0.3), rel=1e-12)


@pytest.mark.parametrize("head, width, layers", [("nonlinear", 5, 2), ("linear", 5, 1), ("none", 12, 0)])
def test_heads(head, width, layers):
    model = SimCLR(nn.Flatten(), features=12, dim=5, head=head)
    assert model.head(torch.randn(4, 12)).shape == (4, width)
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == layers


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"head": "mlp"}, "head: got 'mlp', allowed: nonlinear, linear, none"),
        ({"dim": True}, "dim: got True, allowed: a whole number >= 1, such as 128"),
        ({"features": None}, "features: got None, allowed: a whole number >= 1"),
        ({"temperature": float("inf")}, "temperature: got inf, allowed: a float above 0 and finite"),
        ({"encoder": "resnet18"}, "encoder: got 'resnet18', allowed: an nn.Module"),
        ({"loss": "nt_xent"}, "loss: got 'nt_xent', allowed: None, or a loss of z"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SimCLR(**{"encoder": nn.Flatten(), "features": 12, **arguments})


def curve(out, loss=None, steps=50):
    """Losses of the first steps. A smooth encoder: kinks would turn rounding into chaos within 30 steps."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Tanh(),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.Tanh(), nn.Flatten(),
    )  # fmt: skip
    settings = {"optimizer": "sgd", "lr": 0.03, "warmup_epochs": 0, "log_every": 1, "knn_every": 0}
    train(out, "digits", model=encoder, epochs=3, batch_size=64, loss=loss, **settings)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row][:steps], dtype=torch.float64)


def test_loss_curve_is_that_of_the_dense_loss(tmp_path):
    ours, dense = curve(tmp_path / "ours"), curve(tmp_path / "dense", Dense(0.5))
    other = curve(tmp_path / "other", Dense(0.501))
    assert len(ours) == 50 and ours[-1] < ours[0] - 0.3
    assert (ours - dense).abs().max() < 5e-6  # ten units in the last place of a loss near 4.7; 2 were seen
    assert (ours - other).abs().max() > 1e-3  # the test would see a temperature off by 0.2%


@pytest.mark.parametrize(
    "name, size, channels, width",
    [
        ("convnet", 8, 1, 128),
        ("resnet18", 32, 3, 512),
        ("mobilenet_v3_small", 64, 3, 1024),
        ("densenet121", 32, 1, 1024),
    ],
)
def test_named_encoders(name, size, channels, width):
    encoder, features = build_encoder(name, size, channels)
    assert features == width and encoder(torch.randn(2, channels, size, size)).shape == (2, width)


def test_timm_encoder():
    pytest.importorskip("timm")
    encoder, features = build_encoder("timm/resnet18", 32, 1)
    assert features == 512 and isinstance(encoder.maxpool, nn.Identity) and encoder.conv1.in_channels == 1


def test_small_stem_keeps_the_resolution():
    small, _ = build_encoder("resnet18", 32)
    assert small.conv1.kernel_size == (3, 3) and small.conv1.stride == (1, 1) and isinstance(small.maxpool, nn.Identity)
    assert build_encoder("resnet18", 32, stem="imagenet")[0].conv1.kernel_size == (7, 7)
    assert build_encoder("resnet18", 96)[0].conv1.kernel_size == (7, 7)
    assert build_encoder("resnet18", 96, stem="small")[0].conv1.kernel_size == (3, 3)


@pytest.mark.parametrize(
    "model, stem, message",
    [
        ("resnet81", "auto", r"model: got 'resnet81', did you mean 'resnet\d+'\?"),
        ("resnet18", "tiny", "stem: got 'tiny', allowed: auto, small, imagenet"),
        ("mobilenet_v3_small", "small", "has no ResNet stem"),
        ("googlenet", "auto", "auxiliary classifiers"),
        ("vit_b_16", "auto", "does not take images of shape"),
        (nn.Conv2d(3, 8, 3), "auto", r"returned \(2, 8, 30, 30\).*AdaptiveAvgPool2d"),
        (nn.Conv2d(1, 8, 3), "auto", "Conv2d does not take images"),
    ],
)
def test_encoders_that_do_not_fit(model, stem, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(model, 32, 3, stem)


def test_width_leaves_the_module_as_it_was():
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout()).train()
    build_encoder(encoder, 2, 3)
    assert encoder.training and encoder[1].num_batches_tracked == 0
