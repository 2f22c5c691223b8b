"""LARS against its equation in fp64, the schedule, and the parameter groups."""

import copy
import math

import pytest
import torch
from torch import nn

from ssl_fast.methods import METHODS
from ssl_fast.optim import LARS, SCHEDULES, build_optimizer, parameter_groups, warmup_cosine


def lars_of_the_docstring(w, v, g, lr, momentum, weight_decay, eta, adapt):
    u = g + weight_decay * w
    trust = eta * w.norm() / u.norm() if adapt and w.norm() > 0 and u.norm() > 0 else 1.0
    v = momentum * v + lr * trust * u
    return w - v, v


def test_lars_is_its_equation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    optimizer = LARS(parameter_groups(model, weight_decay=0.1), lr=1.0, momentum=0.9, eta=0.02)
    oracle = [(p.detach().clone(), torch.zeros_like(p), p.ndim > 1) for p in model.parameters()]
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 1.0 / (step + 1)
        model(torch.randn(9, 7).double()).square().mean().backward()
        oracle = [
            (*lars_of_the_docstring(w, v, p.grad, 1.0 / (step + 1), 0.9, 0.1 * adapt, 0.02, adapt), adapt)
            for p, (w, v, adapt) in zip(model.parameters(), oracle, strict=True)
        ]
        optimizer.step()
        optimizer.zero_grad()
    for p, (w, _, _) in zip(model.parameters(), oracle, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)


def test_lars_of_zero_weights_or_gradients_is_plain_momentum():
    zero, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([zero, still], lr=0.5).step()
    assert zero.eq(-0.5).all() and still.eq(1).all()


def test_lars_skips_what_has_no_gradient_and_returns_the_closure():
    w = nn.Parameter(torch.ones(2, 2))
    assert LARS([w], lr=0.5).step(lambda: 3.0) == 3.0
    assert w.eq(1).all()


def test_lars_state_dict_continues_exactly():
    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(4, 6)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    one = nn.Linear(6, 6)
    first = LARS(parameter_groups(one, 1e-4), lr=1.0)
    step(one, first)
    other = copy.deepcopy(one)
    second = LARS(parameter_groups(other, 1e-4), lr=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    step(one, first)
    step(other, second)
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": "0.1"},
        {"momentum": 1.0},
        {"momentum": None},
        {"eta": -1.0},
        {"weight_decay": -1.0},
    ],
)
def test_lars_names_the_wrong_argument(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
        LARS([nn.Parameter(torch.ones(1))], **{"lr": 0.1, **wrong})


def test_groups_leave_biases_and_normalisation_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    model[2].weight.requires_grad_(False)
    decayed, kept = parameter_groups(model, weight_decay=0.1)
    assert [p.shape for p in decayed["params"]] == [(2, 1, 3, 3)] and len(kept["params"]) == 4
    assert (decayed["weight_decay"], decayed["adapt"]) == (0.1, True)
    assert (kept["weight_decay"], kept["adapt"]) == (0.0, False)


@pytest.mark.parametrize("name, lr", [("lars", 0.6), ("sgd", 0.06), ("adamw", 1e-3)])
def test_learning_rate_scales_with_the_batch(name, lr):
    model = nn.Linear(2, 2)
    assert [g["lr"] for g in build_optimizer(model, name, 512).param_groups] == pytest.approx([lr, lr])
    assert build_optimizer(model, name, 512, lr=0.0).param_groups[0]["lr"] == 0


def test_schedule_warms_up_linearly_then_falls_as_a_cosine():
    factors = [warmup_cosine(step, total=110, warmup=10) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1 and factors[60] == pytest.approx(0.5) and 0 < factors[109] < 1e-3
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert warmup_cosine(0, total=1) == 1 and warmup_cosine(0, total=1, warmup=1) == 1


def test_barlow_twins_schedule_ends_at_a_thousandth():
    schedule, q = SCHEDULES[METHODS["barlow_twins"].schedule], 0.5 * (1 + math.cos(math.pi * 70 / 100))
    assert schedule(80, 110, 10) == pytest.approx(q + 0.001 * (1 - q))  # the authors' own formula
    assert [schedule(step, 110, 10) for step in (4, 10, 110)] == pytest.approx([0.5, 1, 0.001])
