"""barlow_twins against autograd of the dense fp64 expression; over processes in test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from common import DEVICE, assert_close, backends, tensors
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from ssl_fast import BarlowTwins, BarlowTwinsLoss
from ssl_fast.functional import barlow_twins
from ssl_fast.ops import barlow_twins as home

SHAPES = [(2, 1), (3, 7), (64, 16), (257, 130), (7, 50), (2, 33), (150, 301), (30, 5)]  # by columns and by rows


def dense(z_a: Tensor, z_b: Tensor, weight: float = 5e-3) -> Tensor:
    """The paper's pseudocode."""
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    C = a.T @ b / len(z_a)
    on = C.diagonal()
    off = C.masked_fill(torch.eye(len(C), dtype=torch.bool, device=C.device), 0)
    return (1 - on).square().sum() + weight * off.square().sum()


def results(loss, z_a, z_b, *weight) -> dict[str, Tensor]:
    z_a, z_b = (z.detach().clone().requires_grad_() for z in (z_a, z_b))
    value = loss(z_a, z_b, *weight)
    return dict(zip(("loss", "dz_a", "dz_b"), (value, *torch.autograd.grad(value, (z_a, z_b))), strict=True))


def views(N: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    z_a, noise = tensors((N, D), (N, D), dtype=torch.float64, seed=N + D)
    return tuple((z * 3 + 1).detach().to(dtype) for z in (z_a, z_a + noise))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize(("N", "D"), SHAPES)
def test_against_fp64(N, D, dtype):
    z_a, z_b = views(N, D, dtype)
    truth = results(dense, z_a.double(), z_b.double(), 0.1)
    value, plain = results(barlow_twins, z_a, z_b, 0.1), results(dense, z_a, z_b, 0.1)
    for name in truth:
        if truth[name].norm() < 1e-9 * D:  # two rows, standardised, are -1 and 1 whatever they were
            assert value[name].norm() <= 2 * plain[name].norm() + 1e-3 * D
        else:
            loose = truth[name] * (1 + 1e-10) if N == 2 else plain[name]  # nothing is left of fp64's digits there
            assert_close(name, value[name], truth[name], loose if dtype == torch.float64 else plain[name], dtype)


@pytest.mark.parametrize(("N", "D"), [(40, 90), (90, 40)])
def test_in_several_tiles(N, D, monkeypatch):
    monkeypatch.setattr(home, "_pieces", lambda count, *_: (slice(i, min(i + 17, count)) for i in range(0, count, 17)))
    z_a, z_b = views(N, D, torch.float64)
    truth, value = (results(loss, z_a, z_b) for loss in (dense, barlow_twins))
    for name in truth:
        assert_close(name, value[name], truth[name], None, torch.float64)


def test_confident_pairs_and_decorrelated_features():
    """Where C is nearly the identity, what is left beside its diagonal is still right."""
    z = torch.linalg.qr(torch.randn(256, 64, dtype=torch.float64, device=DEVICE)).Q
    noise = 1e-3 * torch.randn(256, 64, dtype=torch.float64, device=DEVICE) / 16
    for N in (256, 32):  # by columns, by rows
        z_a, z_b = (x[:N].float() for x in (z, z + noise))
        truth = results(dense, z_a.double(), z_b.double())
        value = results(barlow_twins, z_a, z_b)
        plain = results(dense, z_a, z_b)
        for name in truth:
            assert_close(name, value[name], truth[name], plain[name], torch.float32)


@pytest.mark.parametrize(("N", "D"), [(512, 32), (2048, 128)])
def test_confident_pairs_in_16_bits(N, D):
    """1 - C_dd is far smaller than a rounding of what it is made of."""
    torch.manual_seed(0)
    z = torch.linalg.qr(torch.randn(N, D, dtype=torch.float64, device=DEVICE)).Q * N**0.5
    z_a, z_b = (x.bfloat16() for x in (z, z + 0.01 * torch.randn_like(z)))
    truth, value, plain = (results(f, z_a.to(t), z_b.to(t)) for f, t in (
        (dense, torch.float64), (barlow_twins, torch.bfloat16), (dense, torch.bfloat16)))  # fmt: skip
    for name in truth:
        assert_close(name, value[name], truth[name], plain[name], torch.bfloat16)


class Alone:
    """A ring of one process."""

    rank, world, strategy = 0, 1, "ring"

    def __init__(self, total: int) -> None:
        self.total = total

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def meet(self, blocks: list[Tensor], visit) -> list[Tensor]:
        return visit(0, *blocks)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(("N", "D"), [(1024, 8), (2048, 128)])
def test_products_in_16_bits_by_rows(N, D, dtype, monkeypatch):
    """As a ring has them on a GPU: the squares of rounded operands lose the diagonal of rounded operands."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # where operands are rounded
    monkeypatch.setattr(home, "_operand", lambda x: x.float())  # which a CPU multiplies
    torch.manual_seed(0)
    z = torch.linalg.qr(torch.randn(N, D, dtype=torch.float64, device=DEVICE)).Q * N**0.5
    a, b = (x.to(dtype).double() for x in (z, z + 0.01 * torch.randn_like(z)))
    a, b = (F.batch_norm(x, None, None, training=True) for x in (a, b))

    def of_standardised(a, b):
        C = a.T @ b / N
        off = C - C.diagonal().diag()
        return (1 - C.diagonal()).square().sum() + 5e-3 * off.square().sum()

    def of_op(a, b):
        return home._BarlowTwins.apply(a.float(), b.float(), 5e-3, Alone(N), True, dtype)

    truth, value = results(of_standardised, a, b), results(of_op, a, b)
    for name in truth:
        assert_close(name, value[name], truth[name], truth[name] * (1 + 0.02), dtype)


def test_by_rows_of_few_features():
    """As a ring has them: what lies beside the diagonal is 1e-5 of the sum that it is taken from."""
    z = torch.linalg.qr(torch.randn(1024, 8, dtype=torch.float64, device=DEVICE)).Q
    a, b = (F.batch_norm(x.float(), None, None, training=True) for x in (z, z + 1e-3 * torch.randn_like(z)))
    squares = home.barlow_twins_rows(a, b, None, None, None, 1 / 1024, 0.1, False)[0]
    C = a.double().T @ b.double() / 1024
    beside = (C - C.diagonal().diag()).square().sum()
    assert beside < 1e-5 * squares and squares.dtype == torch.float64
    assert squares - C.diagonal().square().sum() == pytest.approx(beside.item(), rel=1e-2)


def test_both_ways_give_the_same():
    a, b = (F.batch_norm(z, None, None, training=True) for z in views(20, 23, torch.float64))
    on = (a * b).mean(0)
    options, on_columns, on_rows = (1 / 20, 0.3, True), (on - 1) / 10, (on - 1 - 0.3 * on) / 10
    rows = home.barlow_twins_rows(a, b, None, None, on_rows, *options)
    columns = home.barlow_twins_columns(a, b, on_columns, 0, *options)
    torch.testing.assert_close(rows[0] - on.square().sum(), columns[0])
    for k in (1, 2):
        torch.testing.assert_close(rows[k], columns[k])
    halves = [home.barlow_twins_rows(a[i], b[i], a, b, on_rows, *options) for i in (slice(9), slice(9, None))]
    torch.testing.assert_close(halves[0][0] + halves[1][0], rows[0])
    for k in (1, 2):  # each half owns its rows
        torch.testing.assert_close(torch.cat([half[k] for half in halves]), rows[k])
    halves = slice(0, 7), slice(7, None)
    parts = [home.barlow_twins_columns(a[:, i], b, on_columns[i], i.start, *options) for i in halves]
    torch.testing.assert_close(parts[0][0] + parts[1][0], columns[0])
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 1), columns[1])
    torch.testing.assert_close(parts[0][2] + parts[1][2], columns[2])
    assert torch.equal(home.barlow_twins_columns(a, b, None, 0, 1 / 20, 0.3, False)[0], columns[0])
    assert [g.numel() for g in home.barlow_twins_rows(a, b, None, None, None, 1 / 20, 0.3, False)[1:]] == [0, 0]


TRITON = [  # N, other rows or columns, D, dtype, precision
    (3, 0, 1, torch.float32, "ieee"),
    (70, 0, 33, torch.float32, "ieee"),
    (70, 0, 33, torch.float32, "tf32"),
    (33, 70, 17, torch.bfloat16, "ieee"),
    (5, 3, 65, torch.float16, "ieee"),
]


@pytest.mark.parametrize("gradients", (True, False))
@pytest.mark.parametrize(("N", "more", "D", "dtype", "precision"), TRITON)
def test_triton(N, more, D, dtype, precision, gradients):
    """Against the reference in fp64: tiles on and beside the diagonal, mirrored or not, of any strides."""
    if "triton" not in backends(home.barlow_twins_rows, dtype):
        pytest.skip(home.barlow_twins_rows.reason("triton", DEVICE, dtype))
    a, b, x, y = (z.detach().to(dtype) for z in tensors(*[(N, D)] * 2, *[(more, D)] * 2, dtype=torch.float64))
    (on,) = (z.detach() if gradients else None for z in tensors((D,), dtype=torch.float32))
    wide = torch.cat([a.T.contiguous().T, b, b[:, :more]], 1)  # the diagonal begins at D
    options = (1 / N, 0.3, gradients)
    calls = {
        home.barlow_twins_rows: (a, b.T.contiguous().T, *((x, y) if more else (None, None)), on, *options),
        home.barlow_twins_columns: (a, wide, on, D, *options),
    }
    before = torch.backends.cuda.matmul.fp32_precision
    for op, args in calls.items():
        truth = op.reference(*(z.double() if isinstance(z, Tensor) else z for z in args))
        plain = op.reference(*args)
        try:
            torch.backends.cuda.matmul.fp32_precision = precision
            found = op(*args, backend="triton")
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        for name, value, true, loose in zip(("squares", "da", "db"), found, truth, plain, strict=True):
            assert value.dtype == (torch.float64 if name == "squares" else torch.float32)
            assert_close(name, value, true, loose, torch.float16 if precision == "tf32" else dtype)


def test_parity_with_lightly():
    lightly = pytest.importorskip("lightly.loss")
    for N, D in ((32, 100), (100, 32)):
        z_a, z_b = views(N, D, torch.float32)
        ours = results(BarlowTwinsLoss(0.01), z_a, z_b)
        theirs = results(lightly.BarlowTwinsLoss(0.01), z_a, z_b)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("N", "D"), [(40, 130), (130, 40)])
def test_constant_columns(N, D):
    """Their variance is 0: they are 0 when standardised, and so is what C has of them."""
    z_a, z_b = views(N, D, torch.float64)
    z_a[:, 3], z_b[:, 3:5] = 7, -2
    truth = results(dense, z_a, z_b)
    value = results(barlow_twins, z_a.float(), z_b.float())
    plain = results(dense, z_a.float(), z_b.float())
    for name in truth:
        assert_close(name, value[name], truth[name], plain[name], torch.float32)


@pytest.mark.parametrize(("N", "D"), [(5, 12), (9, 4)])
def test_gradcheck_opcheck_and_strides(N, D):
    z_a, z_b = (z.requires_grad_() for z in views(N, D, torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: barlow_twins(a, b, 0.3), (z_a, z_b))
    a, b = (z.detach().float() for z in (z_a, z_b))
    named = torch.ops.ssl_fast
    for gradients in (False, True):
        on = a[0] if gradients else None
        for x in (None, b):
            opcheck(named.barlow_twins_rows.default, (a, b, x, x, on, 0.1, 0.3, gradients))
        opcheck(named.barlow_twins_columns.default, (a[:, 1:], b, on if on is None else on[1:], 1, 0.1, 0.3, gradients))
    strided = results(barlow_twins, a.T.contiguous().T, b.repeat(1, 2)[:, :D])
    plain = results(barlow_twins, a, b)
    assert all(torch.allclose(strided[name], plain[name], rtol=1e-4, atol=1e-6) for name in plain)


def test_two_runs_are_equal_to_the_bit_and_compile():
    for N, D in ((6, 40), (40, 6)):
        z_a, z_b = views(N, D, torch.float32)
        first, second = results(barlow_twins, z_a, z_b), results(barlow_twins, z_a, z_b)
        assert all(torch.equal(first[name], second[name]) for name in first)
        compiled = results(torch.compile(barlow_twins, backend="aot_eager", fullgraph=True), z_a, z_b)
        assert all(torch.allclose(first[name], compiled[name]) for name in first)


def test_autocast_and_second_derivatives():
    z_a, z_b = views(8, 20, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = barlow_twins(z_a, z_b)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, barlow_twins(z_a.bfloat16(), z_b.bfloat16()))
    z = z_a.requires_grad_()
    (grad,) = torch.autograd.grad(barlow_twins(z, z_b), z, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: barlow_twins(z[:1], z[:1]), "z_a: got 1 row, allowed: at least 2"),
        (lambda z: barlow_twins(z, z[:2]), r"z_b: got shape \(2, 4\)"),
        (lambda z: barlow_twins(z.long(), z.long()), "z_a: got torch.int64"),
        (lambda z: barlow_twins(z, z, -1.0), "lambda_param: got -1.0"),
        (lambda z: barlow_twins(z, z, eps=float("nan")), "eps: got nan"),
        (lambda z: BarlowTwinsLoss(True), "lambda_param: got True"),
        (lambda z: BarlowTwinsLoss(eps=-1), "eps: got -1"),
        (lambda z: BarlowTwins("resnet18", 4), "encoder: got 'resnet18', allowed: an nn.Module"),
        (lambda z: BarlowTwins(torch.nn.Flatten(), True), "features: got True, allowed: a whole number >= 1"),
        (lambda z: barlow_twins(z, z, strategy="tree"), "strategy: got 'tree'"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.randn(3, 4, device=DEVICE))


def test_the_module_prints():
    assert repr(BarlowTwinsLoss(0.01)) == "BarlowTwinsLoss(lambda_param=0.01)"
