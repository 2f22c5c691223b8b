"""Folding against fp64, with one norm corrupted at a time; where other tools go wrong; refresh, unfold, export."""

import copy
import io
import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
from common import assert_close, backends, error, tensors
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_weights as torch_conv
from torch.nn.utils import parametrizations
from torch.nn.utils.fusion import fuse_linear_bn_weights as torch_linear

import ssl_fast
from benches import fold_models
from ssl_fast.accelerate import obstacle
from ssl_fast.fold import FoldedLinear, fold_conv_bn, verify
from ssl_fast.functional import fuse_conv_bn_weights, fuse_linear_bn_weights
from ssl_fast.ops import conv_bn

NORMS = nn.modules.batchnorm._BatchNorm
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomised(model, seed=0):
    """In eval mode with statistics and affine that are not the defaults."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, NORMS):
            if norm.affine:
                with torch.no_grad():
                    norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
                    norm.bias.copy_(torch.randn(norm.num_features, generator=generator) * 0.3)
            if norm.track_running_stats:
                norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) * 0.5)
                norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return model.eval()


def calibrated(model, x, seed=0):
    """Statistics of a batch, so that an error in any norm shows in the output."""
    model = randomised(model, seed)
    norms = [m for m in model.modules() if isinstance(m, NORMS)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def left(model):
    return [name for name, m in model.named_modules() if isinstance(m, NORMS)]


def check(model, x, folds=None, examples=False, **options):
    """The model folds whole, and its error against fp64 is at most twice its own."""
    state = copy.deepcopy(model.state_dict())
    folded = fold_conv_bn(model, x if examples else None, **options)
    assert not left(folded) if folds is None else len(folded.fold_report.folded) == folds
    with torch.no_grad():
        truth, plain = copy.deepcopy(model).double()(x.double()), model(x)
    assert_close("folded", folded(x), truth, plain, x.dtype)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    return folded


# ---- the operator


def operands(transposed, groups, dtype, channels_last=False):
    out, into = 4 * groups, 3 * groups
    shape = (into, out // groups, 3, 5) if transposed else (out, into // groups, 3, 5)
    weight, bias, mean, gamma, beta = tensors(shape, (out,), (out,), (out,), (out,), dtype=dtype)
    if channels_last:
        weight = weight.to(memory_format=torch.channels_last)
    return weight.detach(), bias.detach(), mean.detach(), mean.detach().abs() + 0.1, gamma.detach(), beta.detach()


@pytest.mark.parametrize("backend", backends(conv_bn._fold, torch.float32))
def test_one_call_folds_a_table_of_layers_of_every_kind(backend):
    """Every dtype to every dtype, absent vectors, grouped and transposed weights in both layouts, and copies."""
    cases = [(operands(t, g, d, cl), t) for t, g, cl, d in itertools.product((0, 1), (1, 2), (0, 1), DTYPES[:2])]
    cases += [(operands(0, 1, d), 0) for d in (torch.float64, torch.float16, torch.float16)]  # the last to fp16
    absent = torch.empty(0)
    sources, biases, norms, groups, targets, wanted = [], [], [], [], [], []
    for i, ((w, b, mean, var, gamma, beta), transposed) in enumerate(cases):
        b, gamma, beta = (None if i % 3 == k else t for k, t in enumerate((b, gamma, beta)))
        group = len(mean) // w.shape[1] if transposed else 0
        into = w.unflatten(0, (group, -1)).transpose(0, 1).flatten(1, 2) if transposed else w.movedim(0, 1)
        scale = (1 if gamma is None else gamma.double()) / (var.double() + 1e-3 * i).sqrt()
        by_channel = scale.view(-1, *(1,) * (w.dim() - 2))
        folded = into.double() * by_channel
        folded = folded.unflatten(1, (group, -1)).transpose(0, 1).flatten(0, 1) if transposed else folded.movedim(0, 1)
        shift = ((0 if b is None else b.double()) - mean.double()) * scale + (0 if beta is None else beta.double())
        wanted.append((folded, shift))
        sources.append(w)
        biases.append(absent if b is None else b)
        norms += [absent if t is None else t for t in (mean, var, gamma, beta)]
        groups.append(group)
        targets.append((torch.empty_like(w, dtype=DTYPES[i % 4]), torch.empty(len(mean), dtype=DTYPES[(i + 1) % 4])))
    copies = [torch.tensor(7), torch.randn(3000), torch.randn(5, 3).t(), torch.tensor([True, False])]
    copied = [torch.zeros_like(t, dtype=torch.bfloat16 if i == 1 else None) for i, t in enumerate(copies)]
    with ssl_fast.backend(backend):
        conv_bn.fold_(
            [*(t for t, _ in targets), *(t for _, t in targets), *copied], [*sources, *biases, *copies], norms,
            [1e-3 * i for i in range(len(cases))], groups,
        )  # fmt: skip
    for target, truth in zip(targets, wanted, strict=True):
        for t, true in zip(target, truth, strict=True):
            if t.dtype == torch.float64:  # PyTorch's own square root may be off by a bit
                assert error(t, true) < 1e-15
            else:
                assert torch.equal(t, true.to(t.dtype))  # rounded once
    for c, t in zip(copied, copies, strict=True):
        assert torch.equal(c, t.to(c.dtype))


def test_the_functions_are_those_of_torch_and_more_exact():
    (w, b, mean, var, gamma, beta), eps = operands(0, 2, torch.float32), 1e-5
    truth = torch_conv(*(t.double() for t in (w, b, mean, var)), eps, gamma.double(), beta.double())
    for ours, plain, true in zip(
        fuse_conv_bn_weights(w, b, mean, var, eps, gamma, beta), torch_conv(w, b, mean, var, eps, gamma, beta), truth,
        strict=True,
    ):  # fmt: skip
        assert torch.equal(ours, true.float()) and error(plain, true) < 1e-6
        assert isinstance(ours, nn.Parameter) and not ours.requires_grad
    assert fuse_conv_bn_weights(w.requires_grad_(), None, mean, var, eps, None, None)[0].requires_grad
    linear, truth = w.detach()[:, :, 0, 0], torch_linear(w.double()[:, :, 0, 0], b, mean, var, eps, gamma, beta)
    assert error(fuse_linear_bn_weights(linear, b, mean, var, eps, gamma, beta)[0], truth[0]) < 1e-6
    with pytest.raises(TypeError):
        torch_linear(linear, b, mean, var, eps, None, None)
    assert torch.equal(
        fuse_linear_bn_weights(linear, b, mean, var, eps, None, None)[1],
        ((b.double() - mean.double()) / (var.double() + eps).sqrt()).float(),
    )


def test_what_the_functions_refuse():
    (w, b, mean, var, gamma, beta), eps = operands(0, 1, torch.float32), 1e-5
    for arguments, message in (
        ((w, b, mean[1:], var, eps, gamma, beta), r"conv_w: got shape \(4, 3, 3, 5\), allowed: its output channels"),
        ((w, b[1:], mean, var, eps, gamma, beta), r"conv_b: got shape \(3,\), allowed: \(4,\)"),
        ((w, b, mean, var, eps, gamma, beta[:1]), "bn_b: got shape"),
        ((w.long(), b, mean, var, eps, gamma, beta), "conv_w: got torch.int64"),
        ((w, b, None, var, eps, gamma, beta), "bn_rm: got NoneType, allowed: a tensor; a norm without running"),
        ((w, b, mean, var.to("meta"), eps, gamma, beta), "bn_rv: got device meta"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            fuse_conv_bn_weights(*arguments)


# ---- layers


def build(layer, norm, *rest):
    return randomised(nn.Sequential(layer, norm, *rest))


CONVS = [
    (kind, dims, groups) for kind in ("Conv", "ConvTranspose") for dims in (1, 2, 3) for groups in (1, 2)
]  # fmt: skip


@pytest.mark.parametrize("affine", (True, False))
@pytest.mark.parametrize("kind, dims, groups", CONVS)
def test_every_convolution(kind, dims, groups, affine):
    layer = getattr(nn, f"{kind}{dims}d")(4, 6, 3, stride=2, padding=1, groups=groups, bias=affine)
    norm = getattr(nn, f"BatchNorm{dims}d")(6, affine=affine)
    check(build(layer, norm), torch.randn(2, 4, *(7,) * dims))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_ours_with_activation_and_residual(dtype):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.norm = ssl_fast.nn.BatchNorm2d(4, activation="relu")
            self.last = nn.Conv2d(4, 4, 1)
            self.silu = ssl_fast.nn.BatchNorm2d(4, activation="silu")

        def forward(self, x):
            return self.silu(self.last(self.norm(self.conv(x), residual=x)), activation="gelu")

    check(randomised(Block()).to(dtype), torch.randn(2, 4, 5, 5).to(dtype))


OLD = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        pytest.param(nn.utils.weight_norm, marks=OLD),
        pytest.param(nn.utils.spectral_norm, marks=OLD),
    ],
)
def test_parametrised_weights_are_materialised(wrap):
    model = build(wrap(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6))
    with torch.no_grad():
        model(torch.randn(1, 4, 5, 5))  # else the old weight_norm holds a tensor that cannot be copied
    folded = check(model, torch.randn(2, 4, 5, 5))
    assert type(folded[0]) is nn.Conv2d and sorted(folded.state_dict()) == ["0.bias", "0.weight"]
    assert not folded.refresh()
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(1.5)
    assert folded.refresh()
    assert error(folded(torch.ones(1, 4, 5, 5)), model(torch.ones(1, 4, 5, 5))) < 1e-5


# ---- where torch.fx's fuse goes wrong


class Shared(nn.Module):
    """A convolution in front of two norms, or in front of one norm and once by itself."""

    def __init__(self, norms=2):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(norms))

    def forward(self, x):
        for norm in self.norms:
            x = self.relu(norm(self.conv(x)))
        return x if len(self.norms) == 2 else self.conv(x)


def test_a_shared_convolution_is_folded_for_each_norm_or_left():
    x = torch.randn(2, 4, 6, 6)
    folded = check(randomised(Shared()), x)
    assert type(folded.conv) is nn.Identity and type(folded.norms[1]) is nn.Conv2d
    report = check(randomised(Shared(1)), x, folds=0).fold_report
    assert report.left == {"norms.0": "conv is called elsewhere too, not always in front of this norm"}
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model.append(model[1])  # a norm after two convolutions
    check(randomised(model), x)
    twice = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    check(randomised(nn.Sequential(twice, nn.ReLU(), twice)), x)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model.extend([model[0], model[3]])  # crosswise
    check(randomised(model), x, folds=0)


def test_linear_and_norm_fold_where_the_norm_is_of_rows():
    model, rows, sequence = build(nn.Linear(8, 16), nn.BatchNorm1d(16)), torch.randn(5, 8), torch.randn(5, 16, 8)
    assert "pass example_inputs" in check(model, sequence, folds=0).fold_report.left["1"]
    assert "has [3] dimensions, not 2" in check(model, sequence, folds=0, examples=True).fold_report.left["1"]
    folded = check(model, rows, examples=True)
    assert type(folded[0]) is FoldedLinear
    with pytest.raises(AssertionError, match="another number of dimensions than 2"):
        folded(sequence)
    check(build(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16, affine=False)), rows, examples=True)
    image = check(build(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), torch.randn(2, 4, 8))
    with pytest.raises(AssertionError, match="dimensions than 3"):
        image(torch.randn(4, 8))


def test_a_fold_is_not_stale_when_the_weights_change():
    model, x = randomised(Shared()), torch.randn(2, 4, 6, 6)
    folded = fold_conv_bn(model)
    with torch.no_grad():
        model.conv.weight.add_(1)
        model.norms[1].running_var.mul_(2)
    assert folded.verify(x) > 0.1
    assert folded.refresh() and not folded.refresh()
    assert folded.verify(x) < 1e-5 * model(x).abs().max()
    model.conv.weight.data.add_(1)  # which has no version
    assert not folded.refresh() and folded.refresh(force=True)
    assert folded.verify(x) < 1e-5 * model(x).abs().max()


@pytest.mark.parametrize("optimizer", (torch.optim.SGD, torch.optim.AdamW))
def test_a_fused_optimizer_which_counts_no_versions_is_noticed(optimizer):
    model, x = randomised(Shared()), torch.randn(2, 4, 6, 6)
    folded = fold_conv_bn(model)
    model(x).sum().backward()
    optimizer(model.parameters(), lr=0.1, fused=True).step()
    assert folded.refresh() and not folded.refresh() and folded.verify(x) < 1e-4 * model(x).abs().max()


def test_tied_weights_and_eps_and_sparse_buffers_are_brought_up_to_date():
    model, x = build(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)), torch.randn(2, 4, 6, 6)
    model[3].weight = model[0].weight
    model.register_buffer("adjacent", torch.eye(3).to_sparse())
    folded = fold_conv_bn(model)
    assert not folded.refresh()
    with torch.no_grad():
        model[0].weight.add_(1)
        model.adjacent.mul_(2)
    assert folded.refresh() and folded.verify(x) < 1e-5 * model(x).abs().max()
    assert torch.equal(folded.adjacent.to_dense(), 2 * torch.eye(3))
    model[1].eps = 1.0
    assert folded.refresh() and folded.verify(x) < 1e-5 * model(x).abs().max()
    assert fold_conv_bn(model, inplace=True).unfold() is model


@pytest.mark.parametrize("index", (0, 1, 2))
def test_a_source_with_another_module_is_to_be_folded_again(index):
    model = build(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    folded = fold_conv_bn(model)
    model[index] = (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GELU())[index].eval()
    for force in (False, True):
        with pytest.raises(RuntimeError, match="the source has other modules than when it was folded; fold it again"):
            folded.refresh(force=force)
    assert not left(fold_conv_bn(folded.unfold()))


@pytest.mark.parametrize("inference", (False, True))
def test_a_refresh_that_would_overflow_changes_nothing(inference):
    model = build(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).half()
    with torch.inference_mode(inference):
        folded = fold_conv_bn(model)
        before = {name: t.clone() for name, t in folded.state_dict().items()}
    with torch.no_grad():
        model[1].running_var.zero_()
        model[0].weight.fill_(1e4)
        model[2].weight.zero_()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the norm folded into '0' leaves the range of float16"):
            folded.refresh()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), folded.state_dict().values(), strict=True))
    model[1].running_var.fill_(1)
    assert folded.refresh() and torch.equal(folded[0].weight, fold_conv_bn(model)[0].weight)


# ---- what is left, and why


class Net(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.call = forward

    def forward(self, x):
        return self.call(self, x)


def hooked_norm():
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda *_: None)
    return norm


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


def pair(forward, conv=None, norm=None):
    return Net(forward, conv=conv or nn.Conv2d(4, 4, 3, padding=1), norm=norm or nn.BatchNorm2d(4))


LEFT = {
    "used 2 times": pair(lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x))),
    "its input is that of Net": pair(lambda m, x: m.norm(x).relu() + m.conv(x)),
    "BN -> conv": pair(lambda m, x: m.conv(m.norm(x))),
    "comes from ReLU": nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
    "comes from relu": pair(lambda m, x: m.norm(m.conv(x).relu())),
    "it has hooks": pair(lambda m, x: m.norm(m.conv(x)), norm=hooked_norm()),
    "reads its parameters": pair(lambda m, x: m.norm(m.conv(x)) + m.conv.weight.mean()),
    "no running statistics": pair(lambda m, x: m.norm(m.conv(x)), norm=nn.BatchNorm2d(4, track_running_stats=False)),
    "Standardised has a forward": pair(lambda m, x: m.norm(m.conv(x)), conv=Standardised(4, 4, 3)),
    "its residual too": pair(
        lambda m, x: (lambda y: m.norm(y, residual=y))(m.conv(x)), norm=ssl_fast.nn.BatchNorm2d(4)
    ),
    "not called in eval mode": pair(lambda m, x: m.conv(x)),
    "looks at what its modules are": pair(
        lambda m, x: m.norm(m.conv(x)) + (m.conv.bias is None), conv=nn.Conv2d(4, 4, 1, bias=False)
    ),
    "forward of Net looks": pair(
        lambda m, x: (lambda y: y.relu() if isinstance(m.norm, NORMS) else y)(m.norm(m.conv(x)))
    ),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_is_reported_with_the_reason(reason):
    report = check(randomised(LEFT[reason]), torch.randn(2, 4, 6, 6), folds=0).fold_report
    assert reason in next(iter(report.left.values())) and reason in str(report)


def test_a_16_bit_weight_that_would_overflow_is_left():
    model = build(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, eps=0)).half()
    model[1].running_var.fill_(1e-7)
    model[1].float()
    with torch.no_grad():
        model[0].weight.fill_(100)
        model[1].weight.fill_(1)
    assert "leaves the range of torch.float16" in fold_conv_bn(model).fold_report.left["1"]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv(x)))
        y = F.relu(self.bn2(self.last(y)) + x)
        return F.relu(self.bn3(y))


def test_accelerated_models_fold_and_what_is_left_stays_fused():
    x = torch.randn(2, 4, 6, 6)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    folded = check(ssl_fast.accelerate(randomised(model)).model, x, folds=1)
    assert obstacle(folded[3], folded[4]) is None and "is not one of" in obstacle(folded[1], folded[2])
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), *model)
    check(ssl_fast.accelerate(randomised(model)).model, x, folds=1)
    report = ssl_fast.accelerate(randomised(Residual()))
    assert len(report.fused) == 3
    folded = check(report.model, x, folds=2)
    assert folded.found == (("bn3", "relu", False),)
    assert copy.deepcopy(folded).verify(x) < 1e-5 > pickle.loads(pickle.dumps(folded))(x).sub(folded(x)).abs().max()


# ---- models that torch.fx cannot trace


class Branching(nn.Module):
    def __init__(self, bypass=False):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.bypass = bypass

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.block(x) + self.block[0](x) if self.bypass else self.block(x)


def test_a_model_that_cannot_be_traced_is_refused_or_folded_in_parts():
    x = torch.randn(2, 4, 6, 6)
    with pytest.raises(ValueError, match="torch.fx cannot trace Branching.*; pass example_inputs"):
        fold_conv_bn(randomised(Branching()))
    check(randomised(Branching()), x, examples=True)
    folded = check(randomised(Branching(bypass=True)), x, folds=0, examples=True)
    assert "elsewhere" in folded.fold_report.left["block.1"]
    inside = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Branching())
    report = check(randomised(inside), x, folds=1).fold_report
    assert "cannot trace Branching" in report.left["2.block.1"]
    check(inside, x, examples=True)


@pytest.mark.parametrize("default, chosen", [(False, True), ("full", "raw"), (None, torch.rand(2, 1, 6, 6))])
def test_what_an_optional_argument_decides_is_not_folded(default, chosen):
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, option=default):
            y = self.conv(self.block(x))
            if default is None:
                return self.norm(y if option is None else y * option)
            return self.norm(y) if option == default else y

    model, x = randomised(Optional()), torch.randn(2, 4, 6, 6)
    if default == "full":
        with pytest.raises(ValueError, match="with its optional arguments given, .*; pass example_inputs"):
            fold_conv_bn(model)
    folded = check(model, x, folds=1, examples=default == "full")
    assert list(folded.fold_report.left) == ["norm"]
    torch.testing.assert_close(folded(x, chosen), model(x, chosen))


# ---- refusals


def test_bad_input_is_refused_and_changes_nothing():
    model = randomised(Shared())
    model.norms[1].train()
    with pytest.raises(ValueError, match=r"got norms.1 in training mode, .* or pass allow_training=True"):
        fold_conv_bn(model)
    folded = fold_conv_bn(model.train(), allow_training=True)
    assert model.training and model.norms[0].training and not any(m.training for m in folded.modules())
    assert verify(model, folded, torch.randn(2, 4, 6, 6)) < 1e-4 and model.training
    model.eval()
    for inplace in (True, False):
        with pytest.raises(ValueError, match="example_inputs: the model does not run on them: Given groups=1"):
            fold_conv_bn(model, torch.randn(2, 3, 6, 6), inplace=inplace)
    with pytest.raises(TypeError, match="model: got int"):
        fold_conv_bn(3)
    with pytest.raises(TypeError, match=r"got a folded model, .* refresh\(\) or unfold\(\)"):
        fold_conv_bn(folded)
    with pytest.raises(TypeError, match="pass model.module"):
        fold_conv_bn(nn.DataParallel(model))
    with pytest.raises(RuntimeError, match="train: got True for a folded model"):
        folded.train()
    with pytest.raises(ValueError, match="outputs of shapes"):
        verify(model, nn.Flatten(), torch.randn(2, 4, 6, 6))
    unknown = randomised(pair(lambda m, x: SimpleNamespace(y=m.norm(m.conv(x)))))  # to torch.utils._pytree
    with pytest.raises(TypeError, match="its outputs hold no tensor that can be compared"):
        verify(unknown, unknown, torch.randn(2, 4, 6, 6))
    with pytest.raises(TypeError, match="its outputs hold no tensor that can be compared"):
        fold_conv_bn(unknown, torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("inplace", (False, True))
def test_a_forward_that_counts_its_calls_is_folded_without_one(inplace):
    def forward(m, x):
        m.n += 1
        return m.norm(m.conv(x)) * m.n

    model, x = randomised(pair(forward)), torch.randn(2, 4, 6, 6)
    model.register_buffer("n", torch.zeros(()))
    folded = fold_conv_bn(model, x, inplace=inplace)
    assert len(folded.fold_report.folded) == 1 and folded.n == model.n == 0


class Listed(nn.Module):
    """What is called is no submodule's, or draws random numbers."""

    def __init__(self, random=False):
        super().__init__()
        self.conv, self.norm, self.random = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), random
        self.calls = [self.conv, self.norm]

    def forward(self, x):
        if self.random:
            return self.norm(self.conv(x)) + torch.rand(x.shape)
        return self.calls[1](self.calls[0](x))


def test_a_fold_in_place_is_whole_or_none():
    for model in (randomised(Listed()), randomised(Listed(random=True))):
        x = torch.randn(2, 4, 5, 5)
        modules, versions = list(model.modules()), [t._version for t in model.state_dict().values()]
        if model.random:
            with pytest.raises(RuntimeError, match="it draws random numbers in eval mode"):
                fold_conv_bn(model, x, inplace=True)
        else:
            check(model, x)  # a copy has a list of its own
            expected = model(x)
            assert "elsewhere than as submodules" in fold_conv_bn(model, inplace=True).fold_report.left["norm"]
            assert torch.equal(model(x), expected)
            model.unfold()
        assert list(model.modules()) == modules and type(model) is Listed
        assert [t._version for t in model.state_dict().values()] == versions


def test_in_place_and_back():
    model, x = randomised(Shared()), torch.randn(2, 4, 6, 6)
    before, modules, expected = type(model), list(model.modules()), model(x)
    folded = fold_conv_bn(model, inplace=True)
    assert folded is model and isinstance(model, before) and not left(model)
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        modules[1].bias.add_(1)
    assert model.refresh() and (model(x) - expected).abs().max() > 0.1
    assert model.unfold() is model and type(model) is before and list(model.modules()) == modules
    assert not hasattr(model, "fold_report")
    assert fold_conv_bn(model).unfold() is model
    model.train()
    model.relu.eval()
    modes = [m.training for m in model.modules()]
    assert [m.training for m in fold_conv_bn(model, inplace=True, allow_training=True).unfold().modules()] == modes


def test_a_copy_of_a_model_folded_in_place_has_modules_of_its_own():
    model, x = randomised(Shared()), torch.randn(2, 4, 6, 6)
    conv, expected = model.conv, model(x)
    twin = copy.deepcopy(fold_conv_bn(model, inplace=True)).half()
    assert conv.weight.dtype == torch.float32 and twin.refresh() and twin.norms[0].weight.dtype == torch.float16
    assert twin.unfold().conv is not model.unfold().conv is conv and twin.norms[0].weight.dtype == torch.float16
    assert torch.equal(model(x), expected) and error(twin.float()(x), expected) < 1e-2


# ---- the folded model as a module


def test_copies_files_and_dtypes():
    model, x = randomised(Shared()), torch.randn(2, 4, 6, 6)
    folded = fold_conv_bn(model)
    twin = copy.deepcopy(folded)
    with torch.no_grad():
        model.conv.weight.add_(1)
    assert twin.refresh() and twin.verify(x) < 1e-4 < folded.verify(x)
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(folded)), torch.load(file, weights_only=False)):
        assert torch.equal(loaded(x), folded(x)) and loaded.fold_report.folded == folded.fold_report.folded
        with pytest.raises(RuntimeError, match="refresh: got a model from a file"):
            loaded.refresh()
    assert folded.bfloat16().refresh()  # from fp32, rounded once
    fresh = fold_conv_bn(model)
    assert torch.equal(folded.norms[1].weight, fresh.norms[1].weight.bfloat16())
    assert model.conv.weight.dtype == torch.float32 and not any(p.requires_grad for p in folded.parameters())


def test_refresh_after_each_training_step_is_a_fresh_fold_to_the_bit():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip
    x, folded = torch.randn(16, 3, 8, 8), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    folded = fold_conv_bn(model, x, allow_training=True)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(16) % 4).backward()
        optimizer.step()
        assert folded.refresh()
        fresh = fold_conv_bn(model, x, allow_training=True)
        assert len(fresh.fold_report.folded) == 2 and model.training
        for (name, a), b in zip(folded.state_dict().items(), fresh.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert folded.verify(x) < 1e-5


def test_channels_last_is_kept():
    model = randomised(Shared()).to(memory_format=torch.channels_last)
    folded = fold_conv_bn(model)
    assert folded.norms[0].weight.is_contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.contiguous_format)  # other strides than the folded ones
    assert folded.refresh() and folded.verify(torch.randn(2, 4, 6, 6)) < 1e-4


def graph_operators(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_exported_graphs_hold_no_norm():
    model, x = randomised(Shared()), torch.randn(2, 4, 6, 6)
    folded = fold_conv_bn(model)
    assert any("batch_norm" in name for name in graph_operators(torch.export.export(model, (x,))))
    program = torch.export.export(folded, (x,))
    assert not any("batch_norm" in name for name in graph_operators(program))
    assert torch.equal(program.module()(x), folded(x))
    linear = fold_conv_bn(build(nn.Linear(8, 16), nn.BatchNorm1d(16)), torch.randn(5, 8))
    assert not any("batch_norm" in n for n in graph_operators(torch.export.export(linear, (torch.randn(5, 8),))))


LEGACY = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


@LEGACY
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("model", ["shared", "accelerated"])
def test_onnx_graphs_hold_no_norm_and_give_the_same(model, dynamo, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Shared() if model == "shared" else ssl_fast.accelerate(Residual()).model
    folded, x = fold_conv_bn(randomised(model)), torch.randn(2, 4, 6, 6)
    torch.onnx.export(folded, (x,), tmp_path / "model.onnx", dynamo=dynamo)
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Conv" in operators and "BatchNormalization" not in operators
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(y), folded(x), atol=1e-5)


@LEGACY
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_a_fused_norm_that_is_left_exports_by_tracing_too(activation):
    runtime = pytest.importorskip("onnxruntime")

    def forward(m, x):
        return m.tokens(m.norm(m.conv(x).relu(), residual=x), residual=x)

    norm, tokens = ssl_fast.nn.BatchNorm2d(4, activation=activation), ssl_fast.nn.LayerNorm2d(4, activation=activation)
    folded = fold_conv_bn(randomised(Net(forward, conv=nn.Conv2d(4, 4, 1), norm=norm, tokens=tokens)))
    assert list(folded.fold_report.left) == ["norm"]
    file = io.BytesIO()
    torch.onnx.export(
        folded, (torch.randn(2, 4, 6, 6),), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "N"}}
    )
    session = runtime.InferenceSession(file.getvalue())
    for count in (1, 2, 5):
        x = torch.randn(count, 4, 6, 6)
        assert torch.allclose(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), folded(x), atol=1e-5)


# ---- whole networks


def networks():
    torchvision = pytest.importorskip("torchvision")
    timm = pytest.importorskip("timm")
    models = torchvision.models
    return {
        "resnet18": lambda: models.resnet18(num_classes=10),
        "mobilenet_v3_small": lambda: models.mobilenet_v3_small(num_classes=10),
        "shufflenet": lambda: models.shufflenet_v2_x0_5(num_classes=10),
        "densenet": lambda: models.DenseNet(8, (2, 2), 16, num_classes=10),
        "resnet18, accelerated": lambda: ssl_fast.accelerate(models.resnet18(num_classes=10)).model,
        "timm efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=10),
        "timm resnet": lambda: timm.create_model("test_resnet", num_classes=10),
    }


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v3_small", "shufflenet", "densenet", "resnet18, accelerated", "timm efficientnet",
     "timm resnet"],
)  # fmt: skip
def test_networks_and_each_of_their_norms(name):
    torch.manual_seed(0)
    x, model = torch.randn(4, 3, 64, 64), networks()[name]()
    plain, ours, _ = fold_models.errors(model, draws=3)
    assert ours <= 2 * plain
    model = calibrated(model, x)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, NORMS)}
    folded = check(model, x, folds=len(norms) if name != "densenet" else 5)
    if name == "densenet":
        assert all("comes from" in why for why in folded.fold_report.left.values())
    with torch.no_grad():  # the test can fail: an error of a tenth in any one norm is more than it allows
        truth, plain = copy.deepcopy(model).double()(x.double()), model(x)
        for norm in norms.values():
            norm.running_var.mul_(1.1)
            folded.refresh()
            with pytest.raises(AssertionError, match="folded: error"):
                assert_close("folded", folded(x), truth, plain, torch.float32)
            norm.running_var.div_(1.1)


def test_the_table_of_networks_shows_what_folding_promises():
    """docs/fold_models.md: every network is there, none is further off, and what is left is what cannot be folded."""
    torchvision = pytest.importorskip("torchvision")
    rows, without = fold_models.read()
    names = {*torchvision.models.list_models(module=torchvision.models), *(f"timm {n}" for n in fold_models.TIMM)}
    assert {*rows, *without} == names
    for name, row in rows.items():
        assert float(row["ratio"]) <= 2, name
    before_conv = {*(f"densenet{n}" for n in (121, 161, 169, 201)), "maxvit_t", "timm densenet121", "timm resnetv2_50"}
    not_called, of_no_layer = {"googlenet", "inception_v3"}, {"timm mixnet_s", "timm repvgg_a0", "timm levit_128s"}
    assert {name for name, row in rows.items() if row["left"] != "0"} == before_conv | not_called | of_no_layer
    assert len({name for name in rows if name.startswith("timm")} - of_no_layer) >= 10
