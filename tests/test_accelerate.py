"""Accelerated models against the same models untouched, in fp64, and everything that must stay as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ssl_fast
from ssl_fast import accelerate as package_accelerate
from ssl_fast.accelerate import Report, accelerate, restore

torchvision = pytest.importorskip("torchvision")
resnet = torchvision.models.resnet


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def passes(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after a step in training and one in eval."""
    result = {}
    for mode in (True, False):
        model.train(mode).zero_grad()
        leaves = [x.clone().requires_grad_() for x in inputs]
        torch.manual_seed(0)
        y = model(*(x.clone() for x in leaves))
        y.square().mean().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        result |= {f"y {mode}": y.detach(), f"dx {mode}": leaves[0].grad, f"gradients {mode}": torch.cat(gradients)}
        if mode:  # as a momentum encoder
            with torch.no_grad():
                result["no grad"] = model(*(x.clone() for x in inputs))
    return result | {f"buffer {name}": b.double() for name, b in model.named_buffers()}


def equal(ours: nn.Module, eager: nn.Module, *inputs: Tensor, tolerance: float = 1e-10) -> None:
    got, want = passes(ours, inputs), passes(eager, inputs)
    assert got.keys() == want.keys()
    for name, truth in want.items():
        difference = (got[name] - truth).norm().item()
        assert difference <= tolerance * (truth.norm().item() + 1e-3), f"{name}: {difference:.2e} of {truth.norm():.2e}"


def same_names(ours: nn.Module, eager: nn.Module) -> None:
    assert list(ours.state_dict()) == list(eager.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in eager.named_modules()]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in eager.named_parameters()]


def timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=7, **arguments)


def simclr() -> nn.Module:
    from ssl_fast.backbones import build_encoder

    return ssl_fast.SimCLR(*build_encoder("resnet18", 32), dim=16)


# How many norms are fused with an activation, with a residual too, and swapped alone.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "resnet18": (torchvision.models.resnet18, 9, 8, 3),
    "resnet50": (torchvision.models.resnet50, 33, 16, 4),
    "vgg11_bn": (lambda: torchvision.models.vgg11_bn().features[:11], 3, 0, 0),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(dropout=0), 5, 0, 29),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16), 11, 0, 0),
    "timm resnet18": (timm("resnet18"), 9, 8, 3),
    "timm resnet26d": (timm("resnet26d"), 19, 8, 4),
    "timm seresnet, drop path": (timm("seresnet18", drop_path_rate=0.1), 9, 0, 11),
    "timm mobilenetv3": (timm("mobilenetv3_small_050"), 5, 0, 29),
    "simclr": (simclr, 10, 8, 3),
}


def kinds(report: Report) -> tuple[int, int, int]:
    residual = sum(what.startswith("add") for what in report.fused.values())
    return len(report.fused) - residual, residual, len(report.swapped)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_what_they_were(name: str) -> None:
    make, *expected = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    eager, parameters, modules = copy.deepcopy(model), list(model.parameters()), list(model.modules())
    report = accelerate(model)
    assert kinds(report) == tuple(expected) and not report.left, report
    assert all(a is b for a, b in zip(parameters, report.model.parameters(), strict=True))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    same_names(report.model, eager)
    equal(
        report.model,
        eager,
        *((image(3, 3, 8, 8), image(3, 3, 8, 8, seed=1)) if name == "simclr" else (image(4, 3, 32, 32),)),
    )


# ---- models whose forwards call the norms themselves


class Custom(nn.Module):
    """Convolutions a and b, norms n and m, an activation, and a forward made of them."""

    def __init__(self, forward: Callable[..., Tensor], act: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.n, self.m = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True) if act is None else act
        self.calls, self.extra = forward, 1000
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.calls(self, x)


def add_in_place(s: Custom, x: Tensor) -> Tensor:
    out = s.n(s.a(x))
    out += x
    return s.act(out)


def add_to_another(s: Custom, x: Tensor) -> Tensor:
    y = s.b(x)
    kept = y * 1
    kept += s.n(s.a(x))
    return F.relu(kept) + s.m(kept)


def another_name(s: Custom, x: Tensor) -> Tensor:
    out = alias = s.b(x)
    out += s.a(x)
    return F.relu(s.n(out)) * alias


def twice_before_the_sum(s: Custom, x: Tensor) -> Tensor:
    first = s.n(s.a(x))
    second = s.n(s.b(x))
    return F.relu(first + x) + second


def without_gradient(s: Custom, x: Tensor) -> Tensor:
    with torch.no_grad():
        keys = s.act(s.n(s.a(x)))
    return s.b(x) * keys


def autocast(s: Custom, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=True):
        return s.act(s.n(s.a(x)))


def checkpointed(s: Custom, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda x: s.act(s.n(s.a(x))), x, use_reentrant=False)


def random_depth(s: Custom, x: Tensor) -> Tensor:
    return s.act(s.n(s.a(x))) if torch.rand(()) < 2 else x


def counted(s: Custom, x: Tensor) -> Tensor:
    s.extra += 1
    return s.act(s.n(s.a(x)))


def counted_in_place(s: Custom, x: Tensor) -> Tensor:
    s.count += 1
    return s.act(s.n(s.a(x)))


def branches(s: Custom, x: Tensor) -> Tensor:
    out = s.n(s.a(x))
    shortcut = s.m(s.b(x))
    return torch.relu(shortcut + out)


FORWARDS: dict[str, tuple[Callable[[Custom, Tensor], Tensor], dict[str, str]]] = {
    "module": (lambda s, x: s.act(s.n(s.a(x))), {"n": "relu"}),
    "functions": (lambda s, x: F.relu(s.m(s.b(torch.relu(s.n(s.a(x))))), inplace=True), {"n": "relu", "m": "relu"}),
    "methods": (lambda s, x: s.m(s.b(s.n(s.a(x)).relu())).relu_(), {"n": "relu", "m": "relu"}),
    "silu": (lambda s, x: F.silu(s.n(s.a(x))), {"n": "silu"}),
    "leaky_relu": (lambda s, x: F.leaky_relu(s.n(s.a(x))), {"n": "leaky_relu"}),
    "residual": (lambda s, x: F.relu(s.n(s.a(x)) + x), {"n": "add, relu"}),
    "residual first": (lambda s, x: F.relu(torch.add(x, s.n(s.a(x)))), {"n": "add, relu"}),
    "residual in place": (add_in_place, {"n": "add, relu"}),
    "residual of another shape": (lambda s, x: s.act(s.n(s.a(x)) + s.b(x).mean((2, 3), keepdim=True)),
                                  {"n": "add, relu"}),
    "two norms summed": (branches, {"n": "add, relu"}),
    "input at hand": (lambda s, x: F.relu(s.n(x) + x), {"n": "add, relu"}),
    "shared activation": (lambda s, x: s.act(s.b(s.act(s.n(s.a(s.act(x)))))), {"n": "relu"}),
    "shared norm": (lambda s, x: s.n(s.b(s.act(s.n(s.a(x))))), {"n": "relu"}),
    "norm used twice": (lambda s, x: F.relu(y := s.n(s.a(x))) + y, {}),
    "norm added to itself": (lambda s, x: F.relu((y := s.n(s.a(x))) + y), {}),
    "sum used twice": (lambda s, x: F.relu(y := s.n(s.a(x)) + x) + s.m(y), {}),
    "added in place to another": (add_to_another, {}),
    "another name for what is added to": (another_name, {"n": "relu"}),
    "input used before the sum": (lambda s, x: F.relu(s.n(y := s.a(x)) + y.relu()), {}),
    "norm called again, then summed": (lambda s, x: F.relu(s.n(s.a(x)) + s.n(s.b(x))), {"n": "add, relu"}),
    "norm called again before the sum": (twice_before_the_sum, {}),
    "number": (lambda s, x: F.relu(s.n(s.a(x)) + 1), {}),
    "scaled": (lambda s, x: F.relu(torch.add(s.n(s.a(x)), x, alpha=2)), {}),
    "another slope": (lambda s, x: F.leaky_relu(s.n(s.a(x)), 0.2), {}),
    "no_grad": (without_gradient, {}),
    "autocast": (autocast, {}),
    "checkpoint": (checkpointed, {}),
    "random": (random_depth, {}),
    "sets an attribute": (counted, {}),
    "sets a buffer": (counted_in_place, {}),
    "makes a tensor": (lambda s, x: F.relu(s.n(s.a(x)) + torch.arange(5)), {}),
    "depends on gradients": (lambda s, x: F.relu(s.n(s.a(x)) if torch.is_grad_enabled() else s.n(x)), {}),
    "depends on the mode": (lambda s, x: s.act(s.n(s.a(x))) if s.training else s.act(s.n(x)), {}),
    "depends on the values": (lambda s, x: s.act(s.n(s.a(x))) if x.sum() > 0 else s.n(x), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_are_what_they_were(name: str) -> None:
    forward, expected = FORWARDS[name]
    torch.manual_seed(0)
    model = Custom(forward).double()
    eager, unchanged = copy.deepcopy(model), copy.deepcopy(model)
    report = accelerate(model)
    assert report.fused == {norm: f"{what}, in report.model" for norm, what in expected.items()}, report
    assert (report.model is model) == (not expected)
    assert not report.left and all(report.swapped.values())
    same_names(report.model, eager)
    equal(report.model, eager, image(3, 4, 5, 5))
    model.load_state_dict(unchanged.state_dict())
    equal(model, copy.deepcopy(unchanged), image(3, 4, 5, 5))


REASONS = {
    "norm used twice": "its output is used 2 times",
    "sum used twice": "its sum is used 2 times",
    "added in place to another": "added in place to another tensor",
    "input used before the sum": "its input is used elsewhere before its sum",
    "number": "followed by the addition of 1",
    "another slope": "no supported activation follows",
    "no_grad": "torch.fx cannot trace Custom: it sets no_grad, autocast or checkpointing",
    "autocast": "torch.fx cannot trace Custom: it sets no_grad, autocast or checkpointing",
    "checkpoint": "torch.fx cannot trace Custom: it sets no_grad, autocast or checkpointing",
    "random": "torch.fx does not see that Custom sets attributes or draws random numbers",
    "sets an attribute": "torch.fx does not see that Custom sets attributes",
    "sets a buffer": "torch.fx does not see that Custom sets attributes",
    "makes a tensor": "torch.fx cannot trace Custom: it makes a tensor",
    "depends on gradients": "the calls of Custom depend on more than its input",
    "depends on the mode": "the calls of Custom depend on more than its input",
    "depends on the values": "torch.fx cannot trace Custom: symbolically traced variables cannot be used as inputs to",
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name: str) -> None:
    report = accelerate(model := Custom(FORWARDS[name][0]))
    assert model.extra == 1000 and model.count == 0
    assert report.swapped["n"].startswith(REASONS[name]) and REASONS[name] in str(report)


def test_an_input_changed_in_place_before_the_sum() -> None:
    """Which autograd refuses, but not eval."""
    torch.manual_seed(0)
    model = Custom(lambda s, x: F.relu(s.n(y := s.a(x)) + F.relu_(y))).double()
    report = accelerate(copied := copy.deepcopy(model))
    assert not report.fused
    for mode in (True, False):
        with torch.no_grad():
            x = image(3, 4, 5, 5)
            assert torch.allclose(report.model.train(mode)(x), model.train(mode)(x), rtol=1e-10), copied


def test_without_torch_fx_or_fusing() -> None:
    model = Custom(FORWARDS["module"][0])
    report = accelerate(model, trace=False)
    assert report.model is model and not report.fused and "trace=False" in report.swapped["n"]
    report = accelerate(model := nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), fuse=False)
    assert type(model) is nn.Sequential and report.swapped == {"0": "fuse=False"}


# ---- sequences


class LeftAlone(nn.BatchNorm1d):
    pass


def patched() -> nn.Module:
    norm = nn.BatchNorm1d(6)
    norm.forward = norm.forward  # type: ignore[method-assign]
    return norm


def parametrised() -> nn.Module:
    norm = nn.BatchNorm1d(6)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


def test_sequences() -> None:
    relu, norm = nn.ReLU(inplace=True), nn.BatchNorm1d(6)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), relu, nn.Linear(6, 6), nn.BatchNorm1d(6), relu),
        nn.Sequential(nn.Linear(6, 6), norm, nn.SiLU(), nn.Linear(6, 6), norm),
        nn.Sequential(nn.BatchNorm1d(6), nn.LeakyReLU(), nn.BatchNorm1d(6), nn.GELU(), relu),
        nn.Sequential(nn.BatchNorm1d(6), nn.LeakyReLU(0.2), nn.BatchNorm1d(6), nn.GELU("tanh")),
        nn.Sequential(nn.BatchNorm1d(6), nn.ReLU6(), nn.BatchNorm1d(6), nn.Hardswish(), nn.BatchNorm1d(6), nn.Tanh()),
        nn.Sequential(LeftAlone(6), nn.ReLU(), patched(), nn.ReLU(), parametrised(), nn.ReLU()),
        nn.Sequential(nn.SyncBatchNorm(6), nn.ReLU(), ssl_fast.nn.BatchNorm1d(6, activation="relu"), nn.ReLU()),
    ).double()  # fmt: skip
    eager = copy.deepcopy(model)
    report = package_accelerate(model)
    assert report.model is model and report.changed == 11 + 4
    assert report.fused == {
        "0.1": "relu", "0.4": "relu", "1.1": "silu", "2.0": "leaky_relu", "2.2": "gelu", "6.0": "relu",
    }  # fmt: skip
    assert report.swapped == {
        "3.0": "followed by LeakyReLU(negative_slope=0.2)",
        "3.2": "followed by GELU(approximate='tanh')",
        "4.0": "followed by ReLU6",
        "4.2": "followed by Hardswish",
        "4.4": "followed by Tanh",
        "6.2": "it has an activation of its own, relu",
    }
    assert report.left == {
        "5.0": "LeftAlone is a subclass that is not known",
        "5.2": "its forward was replaced",
        "5.4": "it is parametrised",
    }
    equal(model, eager, image(5, 6))
    with torch.no_grad():  # one module after the other
        x = y = image(5, 6)
        for ours, theirs in zip(model.eval(), eager.eval(), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                x, y = a(x.clone()), b(y.clone())
                assert torch.allclose(x, y, rtol=1e-10)


def test_hooks_see_what_they_saw() -> None:
    """On a norm, on an activation, on a block; registered before and after."""

    def watch(model: nn.Module, seen: list[Any]) -> None:
        for name in ("layer1.0.bn1", "layer2.0.relu", "relu", "layer3.0"):
            model.get_submodule(name).register_forward_hook(
                lambda _, inputs, y, name=name: seen.append((name, inputs[0].clone(), y.clone()))
            )
        model.layer4[0].bn2.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
        model.layer4[0].relu.register_full_backward_hook(lambda _, gx, gy: seen.append(("gradient", gx[0].clone())))

    torch.manual_seed(0)
    eager = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]).double()
    for before in (True, False):
        model, theirs = copy.deepcopy(eager), copy.deepcopy(eager)
        for block in (model.layer4[0], theirs.layer4[0]):
            block.relu.inplace = False  # which a backward hook needs
        seen: tuple[list[Any], list[Any]] = ([], [])
        watch(theirs, seen[1])
        if before:
            watch(model, seen[0])
        report = accelerate(model)
        if before:
            assert report.swapped["layer1.0.bn1"] == "it has hooks"
            assert report.swapped["layer2.0.bn2"] == report.swapped["bn1"] == "the ReLU has hooks"
            assert "layer1.0.bn2" in report.fused and "layer3.0.bn1" in report.fused
        else:
            watch(model, seen[0])
        equal(model, theirs, image(2, 3, 32, 32))
        assert [s[0] for s in seen[0]] == [s[0] for s in seen[1]] and len(seen[0]) > 10
        for ours, want in zip(*seen, strict=True):
            assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(ours[1:], want[1:], strict=True))


def test_hooks_of_every_module_see_what_they_saw() -> None:
    torch.manual_seed(0)
    eager = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    model = accelerate(copy.deepcopy(eager)).model

    def activations(m: nn.Module) -> int:
        seen: list[nn.Module] = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        try:
            m(image(2, 3, 32, 32).float())
        finally:
            handle.remove()
        return sum(type(module) is nn.ReLU for module in seen)

    assert activations(model) == activations(eager) == 9


def test_hooks_around_a_norm_keep_torch_fx_out() -> None:
    model = nn.Sequential(Custom(FORWARDS["module"][0]), nn.Identity())
    model[0].register_forward_hook(lambda *_: None)
    report = accelerate(model)
    assert report.model is model and report.swapped["0.n"] == "torch.fx does not see the hooks of 0"


# ---- undoing, doing again, copying


def snapshot(model: nn.Module) -> list[Any]:
    return [(m, type(m), {k: v for k, v in vars(m).items()}) for m in model.modules()]


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "blocks": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), resnet.BasicBlock(4, 4)).double(),
        "traced": nn.Sequential(nn.Conv2d(3, 4, 3), Custom(branches), nn.BatchNorm2d(4), nn.ReLU()).double(),
        "resnet": resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1]).double(),
        "densenet": torchvision.models.DenseNet(4, (2, 1), 8).double(),
    }


@pytest.mark.parametrize("name", ["blocks", "traced", "resnet"])
def test_a_second_call_changes_nothing_and_restore_everything_back(name: str) -> None:
    model = networks()[name]
    eager, before = copy.deepcopy(model), snapshot(model)
    first = accelerate(model)
    once = snapshot(model)
    assert first.changed and snapshot(model) != before
    second = accelerate(model)
    assert second.changed == 0 and snapshot(model) == once and second.fused == first.fused
    again = accelerate(first.model)
    assert again.model is first.model and again.changed == 0 and again.fused.keys() == first.fused.keys()
    assert "no change" in str(again)
    twin = copy.deepcopy(first.model)
    assert first.restore() is model and first.model is model and snapshot(model) == before
    assert snapshot(restore(model)) == before
    assert [type(m) for m in restore(twin).modules()] == [type(m) for m in eager.modules()]
    equal(twin, model, image(3, 3, 32, 32))
    before = snapshot(model)
    assert accelerate(model).fused == second.fused
    restore(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["blocks", "traced", "resnet", "densenet"])
def test_copies_and_pickles_stay_accelerated(name: str) -> None:
    model = accelerate(networks()[name]).model
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    want = passes(model, (image(2, 3, 32, 32),))
    for twin in copies:
        assert kinds(accelerate(twin)) == kinds(accelerate(model)) and accelerate(twin).model is twin
        assert [type(m).__name__ for m in twin.modules()] == [type(m).__name__ for m in model.modules()]
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        got = passes(twin, (image(2, 3, 32, 32),))
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    model = networks()["traced"]
    before = snapshot(model)

    def fail(*_: Any) -> None:
        assert snapshot(model) != before
        raise MemoryError

    monkeypatch.setattr(sys.modules["ssl_fast.accelerate"], "_traced", fail)
    with pytest.raises(MemoryError):
        accelerate(model)
    assert snapshot(model) == before
    with pytest.raises(TypeError, match="model: got Tensor, allowed: a torch.nn.Module"):
        accelerate(torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fuse: got 'no', allowed: True, False"):
        accelerate(model, fuse="no")  # type: ignore[arg-type]
    assert snapshot(model) == before


def test_mode_hooks_optimizer_and_state_dict_stay() -> None:
    model = networks()["resnet"].eval()
    model.layer1.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.layer1[0].register_forward_hook(lambda *_: calls.append("block"))
    report = accelerate(model)
    assert [m.training for m in model.modules()] == modes
    assert isinstance(model, resnet.ResNet) and isinstance(model.layer1[0], resnet.Bottleneck)
    assert all(isinstance(m, nn.BatchNorm2d) for name, m in model.named_modules() if name in report.fused)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    model(image(2, 3, 32, 32)).sum().backward()
    assert calls == ["block", "model"]
    before = model.bn1.weight.clone()
    optimizer.step()
    assert not torch.equal(model.bn1.weight, before)


def test_a_subclass_of_a_known_class_that_calls_things_otherwise_is_left_to_torch_fx() -> None:
    class Same(resnet.BasicBlock):
        extra = 1

    class Other(resnet.BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn1(self.conv1(x))) + self.bn2(self.conv2(x))

    same, other = nn.Sequential(Same(4, 4)).double(), nn.Sequential(Other(4, 4)).double()
    eager = copy.deepcopy(other)
    assert accelerate(same).fused == {"0.bn1": "relu", "0.bn2": "add, relu"} and isinstance(same[0], Same)
    report = accelerate(other)
    assert type(other[0]) is Other and report.fused == {"0.bn1": "relu, in report.model"}
    equal(report.model, eager, image(2, 4, 5, 5))


def test_less_is_kept_for_the_backward() -> None:
    def kept(model: nn.Module) -> tuple[int, int]:
        """Bytes that operators save, and of the memory behind them, which the next convolution shares."""
        saved: list[int] = []
        memory: dict[int, int] = {}
        weights = {weight.data_ptr() for weight in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() in weights:
                return tensor
            saved.append(tensor.nbytes)
            memory[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(4, 3, 64, 64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        assert y.requires_grad
        return sum(saved), sum(memory.values())

    model = torchvision.models.resnet18()
    (saved, memory), _ = kept(model), accelerate(model)
    saved_now, memory_now = kept(model)
    assert saved_now < 0.75 * saved and memory_now <= memory


def test_compile_takes_the_whole_graph() -> None:
    small = torchvision.models.resnet18()
    small.layer2, small.layer3, small.layer4, small.fc = nn.Identity(), nn.Identity(), nn.Identity(), nn.Linear(64, 4)
    for model in (small, Custom(branches)):
        eager = copy.deepcopy(model)
        compiled = torch.compile(accelerate(model).model, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 4 if isinstance(model, Custom) else 3, 16, 16)
        y, want = compiled(x), eager(x)
        assert torch.allclose(y, want, atol=1e-4)
        y.square().sum().backward()
        want.square().sum().backward()
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= 1e-2 * q.grad.norm() + 1e-4


def test_report_prints_a_table() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), LeftAlone(4))
    report = accelerate(model)
    assert str(report).splitlines() == [
        "accelerate: 1 norms fused, 0 swapped alone, 1 left",
        "  1  fused    relu",
        "  3  left     LeftAlone is a subclass that is not known",
    ]


class Optional(nn.Module):
    """A forward whose branch a graph would take for ever."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, skip=None):
        y = F.relu(self.bn(self.conv(x)))
        return y if skip is None else y + skip


def test_what_is_added_may_be_a_number_at_another_call() -> None:
    class Shift(Custom):
        def forward(self, x: Tensor, shift: Any) -> Tensor:  # type: ignore[override]
            return F.relu(self.n(self.a(x)) + shift)

    eager = Shift(lambda s, x: x)
    model, x = accelerate(copy.deepcopy(eager)).model, image(2, 4, 5, 5).float()
    assert model is not eager
    for shift in (x, 0.5, torch.tensor(2.0)):
        assert torch.allclose(model(x, shift), eager(x, shift), atol=1e-5)


def test_a_forward_with_optional_arguments_is_not_rebuilt():
    model = Optional()
    report = accelerate(model)
    assert report.model is model and "skip" in str(report)
    assert model(torch.ones(2, 3, 4, 4)).shape == (2, 4, 4, 4)


class _Tiny:
    """The smallest models of each kind that still have every block."""

    @staticmethod
    def vit() -> nn.Module:
        return torchvision.models.VisionTransformer(32, 16, 2, 2, 12, 24, num_classes=3)

    @staticmethod
    def convnext() -> nn.Module:
        from torchvision.models.convnext import CNBlockConfig, ConvNeXt

        return ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=3)

    @staticmethod
    def timm_vit() -> nn.Module:
        timm = pytest.importorskip("timm")
        return timm.models.VisionTransformer(32, 16, num_classes=3, embed_dim=12, depth=2, num_heads=2)

    @staticmethod
    def timm_convnext() -> nn.Module:
        timm = pytest.importorskip("timm")
        return timm.models.ConvNeXt(num_classes=3, depths=(1, 1, 1, 1), dims=(8, 8, 12, 12))


@pytest.mark.parametrize("name", ["vit", "convnext", "timm_vit", "timm_convnext"])
def test_layer_norms_are_swapped(name: str) -> None:
    eager = getattr(_Tiny, name)().double()
    for p in eager.parameters():
        nn.init.normal_(p, std=0.3)
    mine = copy.deepcopy(eager)
    classes = [type(m) for m in mine.modules()]
    report = accelerate(mine)
    norms = [n for n, m in eager.named_modules() if isinstance(m, nn.LayerNorm)]
    assert norms and list(report.swapped) == norms and not report.left and not report.fused
    assert report.changed == len(norms) and report.model is mine and "a layer norm" in str(report)
    ours = (ssl_fast.nn.LayerNorm, ssl_fast.nn.LayerNorm2d)
    assert all(isinstance(mine.get_submodule(n), ours) for n in norms)
    if "convnext" in name:
        assert any(isinstance(m, ssl_fast.nn.LayerNorm2d) for m in mine.modules())
    for layout in (torch.contiguous_format, torch.channels_last):
        equal(mine, eager, image(2, 3, 32, 32).to(memory_format=layout))
    again = pickle.loads(pickle.dumps(mine))
    assert [type(m) for m in again.modules()] == [type(m) for m in mine.modules()]
    assert accelerate(mine).changed == 0
    assert [type(m) for m in report.restore().modules()] == classes


def test_layer_norms_that_do_more_are_left() -> None:
    timm = pytest.importorskip("timm")

    class Mine(nn.LayerNorm):
        pass

    model = nn.Sequential(Mine(4), timm.layers.LayerNormFp32(4), timm.layers.LayerNorm(4), timm.layers.LayerNorm(4))
    model[2]._fast_norm = True
    report = accelerate(model)
    assert list(report.left) == ["0", "1", "2"] and list(report.swapped) == ["3"]
    assert "fast_norm" in report.left["2"] and "LayerNormFp32 is a subclass" in report.left["1"]
