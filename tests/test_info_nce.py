"""info_nce, clip and sup_con against autograd of dense fp64 expressions, on every backend that runs here."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import DEVICE, FLOOR, NeverWaits, assert_close, backends, tensors
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

import ssl_fast
from ssl_fast import BarlowTwinsLoss, CLIPLoss, InfoNCE, KeyQueue, NTXentLoss, SupConLoss
from ssl_fast.functional import barlow_twins, clip, info_nce, nt_xent, sup_con
from ssl_fast.ops import info_nce as home
from ssl_fast.ops._info_nce_sup_con import sup_con_fwd

ROOT = Path(__file__).parents[1]
BACKENDS = backends(home.info_nce_fwd, torch.float32)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = ((1, 1, 3), (2, 3, 1), (3, 65, 64), (63, 1, 123), (65, 257, 130), (257, 64, 768), (193, 1000, 128))  # N, K, D
TEMPERATURES = (0.005, 0.07, 0.01, 0.5, 0.1, 10.0)


# ---- oracles: what anyone would write in PyTorch, but the positive kept apart: softmax - 1 loses confident pairs


def from_logits(pos: Tensor, negatives: Tensor) -> Tensor:
    """Losses (N,) from logits of the positives (N,) and of the negatives (N, K), -inf where left out."""
    if (negatives == -torch.inf).all(1).any():  # a row without negatives, whose log-sum-exp has no gradient
        return torch.logsumexp(torch.cat([pos[:, None], negatives], 1), 1) - pos
    d = torch.logsumexp(negatives, 1) - pos
    return torch.logaddexp(d, torch.zeros_like(d))


def unit(x: Tensor, normalize: bool = True) -> Tensor:
    return F.normalize(x, dim=-1) if normalize else x


def dense_info_nce(q, k, negatives, t, *, paired=None, in_batch=False, normalize=True, ids=None, key_ids=None):
    """logits of the positive (N,) and of all negatives (N, K)."""
    q, k = unit(q, normalize), unit(k, normalize)
    parts = []
    if in_batch:
        out = torch.eye(len(q), dtype=torch.bool, device=q.device)
        if ids is not None:
            out = out | (ids[:, None] == ids)
        parts.append((q @ k.T / t).masked_fill(out, -torch.inf))
    if negatives is not None:
        s = q @ unit(negatives, normalize).T / t
        parts.append(s if ids is None else s.masked_fill(ids[:, None] == key_ids, -torch.inf))
    if paired is not None:
        parts.append((q[:, None] * unit(paired, normalize)).sum(-1) / t)
    return (q * k).sum(1) / t, torch.cat(parts, 1)


def dense_clip(image, text, t, ids=None):
    s = image @ text.T / t
    pos = s.diagonal()
    out = torch.eye(len(s), dtype=torch.bool, device=s.device)
    if ids is not None:
        out = out | (ids[:, None] == ids)
    s = s.masked_fill(out, -torch.inf)
    return (from_logits(pos, s) + from_logits(pos, s.T)) / 2


def dense_sup_con(z, labels, t, normalize=True):
    z = unit(z, normalize)
    eye = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / t).masked_fill(eye, -torch.inf)
    alike = (labels[:, None] == labels) & ~eye
    count = alike.sum(1)
    positives = torch.where(alike, logits, 0).sum(1) / count.clamp(min=1)
    if len(z) == 1:
        return positives
    return torch.where(count > 0, torch.logsumexp(logits, 1) - positives, 0)


# ---- the rule


def run(fn: Callable[..., Tensor], inputs: list[Tensor], g: Tensor) -> list[Tensor]:
    """The losses and the gradients of (g . losses) for every input that has one."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    loss = fn(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return [loss.detach(), *torch.autograd.grad((loss * g.to(loss.dtype)).sum(), wanted)]


def check(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor], backend: str, t: float
) -> None:
    """`inputs` end with the temperature. Error against fp64 at most twice that of plain PyTorch, plus the floor."""
    dtype = inputs[0].dtype
    generator = torch.Generator().manual_seed(1)
    N = len(inputs[0])
    g = (torch.rand(N, generator=generator, dtype=torch.float64) / N).to(DEVICE)

    def forced(*x: Tensor) -> Tensor:
        with ssl_fast.backend(backend):
            return ours(*x)

    value = run(forced, inputs, g)
    truth = run(theirs, [x.double().requires_grad_(x.requires_grad) for x in inputs], g)
    plain = run(theirs, [x.to(dtype).requires_grad_(x.requires_grad) for x in inputs], g)
    terms = g.abs().max() / t
    for k, (a, b, c) in enumerate(zip(value, truth, plain, strict=True)):
        name = f"{'loss' if k == 0 else f'gradient {k}'} of {backend}"
        if k and b.dim() == 0:  # the temperature's: a sum of terms of both signs, each up to g / t^2
            off, reference = (a.double() - b).abs(), (c.double() - b).abs()
            assert off <= 2 * reference + FLOOR[dtype] * g.abs().sum() / t**2, (name, off, reference)
        elif b.abs().max() < 1e-12:
            assert a.abs().max() <= FLOOR[dtype] * terms + 2 * c.abs().max(), name
        else:
            assert_close(name, a, b, c, dtype)


def temperature(t: float, dtype: torch.dtype) -> Tensor:
    low = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.tensor(t, dtype=low, device=DEVICE, requires_grad=True)


def cases() -> list[Any]:
    found = []
    for backend in BACKENDS:
        for i, (N, K, D) in enumerate(SIZES):
            for k in range(4):
                dtype, t = DTYPES[(i + k) % 4], TEMPERATURES[(2 * i + 3 * k) % 6]
                slow = backend == "triton" and DEVICE == "cpu"  # interpreted: some of the small ones
                if home.info_nce_fwd.reason(backend, DEVICE, dtype) or (slow and (N * K > 4200 or k > 1)):
                    continue
                name = f"{backend}-N{N}-K{K}-D{D}-t{t}-{str(dtype)[6:]}"
                found.append(pytest.param(backend, N, K, D, t, dtype, id=name))
    return found


@pytest.mark.parametrize("keys", ("queue", "learned", "in_batch"))
@pytest.mark.parametrize(("backend", "N", "K", "D", "t", "dtype"), cases())
def test_info_nce_against_fp64(backend, N, K, D, t, dtype, keys):
    q, k, negatives = tensors((N, D), (N, D), (K, D), dtype=dtype, seed=N)
    k = (q + k).detach().requires_grad_()
    normalize = (N + K) % 3 != 0
    if not normalize:  # logits of order 1 to 10
        q, k, negatives = ((x * (3 * t) ** 0.5 / D**0.25).detach().requires_grad_() for x in (q, k, negatives))
    if keys == "in_batch":
        check(
            lambda q, k, t: info_nce(q, k, None, t, normalize=normalize, reduction="none"),
            lambda q, k, t: from_logits(*dense_info_nce(q, k, None, t, in_batch=True, normalize=normalize)),
            [q, k, temperature(t, dtype)], backend, t,
        )  # fmt: skip
        return
    if keys == "queue":
        negatives = negatives.detach()
    check(
        lambda q, k, n, t: info_nce(q, k, n, t, normalize=normalize, reduction="none"),
        lambda q, k, n, t: from_logits(*dense_info_nce(q, k, n, t, normalize=normalize)),
        [q, k, negatives, temperature(t, dtype)], backend, t,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_all_kinds_of_negatives_at_once_with_groups(backend, dtype):
    N, K, M, D = 35, 70, 5, 24
    q, k, negatives, paired = tensors((N, D), (N, D), (K, D), (N, M, D), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (N,), generator=generator).to(DEVICE) * 2**40
    key_ids = torch.randint(0, 9, (K,), generator=generator).to(DEVICE) * 2**40
    torch.testing.assert_close(  # of any integer type
        info_nce(q, k, negatives, group_ids=ids, negative_group_ids=key_ids),
        info_nce(
            q, k, negatives, group_ids=(ids // 2**40).int(), negative_group_ids=(key_ids // 2**40).to(torch.uint8)
        ),
    )
    for learned in (True, False):
        n = negatives.detach().requires_grad_(learned)
        check(
            lambda q, k, n, p, t: info_nce(
                q, k, n, t, paired_negative_keys=p, in_batch=True, group_ids=ids, negative_group_ids=key_ids,
                reduction="none",
            ),
            lambda q, k, n, p, t: from_logits(
                *dense_info_nce(q, k, n, t, paired=p, in_batch=True, ids=ids, key_ids=key_ids)
            ),
            [q, k, n, paired, temperature(0.1, dtype)], backend, 0.1,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "N", "K", "D", "t", "dtype"), [c for c in cases() if c.values[1] * c.values[3] < 50000]
)
def test_clip_against_fp64(backend, N, K, D, t, dtype):
    image, text = tensors((N, D), (N, D), dtype=dtype, seed=N)
    image, text = (F.normalize(x.detach().float()).to(dtype).requires_grad_() for x in (image, image + text))
    check(
        lambda a, b, t: clip(a, b, 1 / t, reduction="none"),
        dense_clip,
        [image, text, temperature(t, dtype)],
        backend,
        t,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_with_groups(backend):
    image, text = tensors((70, 16), (70, 16), dtype=torch.float32)
    ids = torch.arange(70, device=DEVICE) // 3
    check(
        lambda a, b, t: clip(a, b, 1 / t, reduction="none", normalize=True, group_ids=ids),
        lambda a, b, t: dense_clip(unit(a), unit(b), t, ids),
        [image, text, temperature(0.2, torch.float32)], backend, 0.2,
    )  # fmt: skip


@pytest.mark.parametrize("classes", (1, 3, 40))
@pytest.mark.parametrize(
    ("backend", "N", "K", "D", "t", "dtype"), [c for c in cases() if c.values[1] * c.values[3] < 50000]
)
def test_sup_con_against_fp64(backend, N, K, D, t, dtype, classes):
    (z,) = tensors((N, D), dtype=dtype, seed=N)
    labels = torch.randint(0, classes, (N,), generator=torch.Generator().manual_seed(N)).to(DEVICE) - 2**40
    check(
        lambda z, t: sup_con(z, labels, t, reduction="none"),
        lambda z, t: dense_sup_con(z, labels, t),
        [z, temperature(t, dtype)], backend, t,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_confident_classes_keep_their_gradient(backend, dtype):
    """Classes far apart, each in a cone: P and the positives' share nearly cancel, so they must meet unrounded."""
    centres, noise = tensors((4, 48), (64, 48), dtype=torch.float64)
    labels = torch.arange(64, device=DEVICE) % 4
    z = (F.normalize(centres)[labels] + 0.01 * noise).detach().to(dtype).requires_grad_()
    check(
        lambda z, t: sup_con(z, labels, t, reduction="none"),
        lambda z, t: dense_sup_con(z, labels, t),
        [z, temperature(0.07, dtype)], backend, 0.07,
    )  # fmt: skip


def dense_pairs(z1: Tensor, z2: Tensor, t: Tensor) -> Tensor:
    """NT-Xent's losses (2N,) of rows as they are."""
    z, pair = torch.cat([z1, z2]), torch.arange(len(z1), device=z1.device).repeat(2)
    s = z @ z.T / t
    positives = s.diagonal(len(z1)).repeat(2)
    return from_logits(positives, s.masked_fill(pair[:, None] == pair, -torch.inf))


# What a loss is given in a cone, and whether the keys learn.
IN_A_CONE = {
    "clip": (lambda a, b, t: clip(a, b, 1 / t, reduction="none"), dense_clip, True),
    "info_nce": (
        lambda a, b, t: info_nce(a, b, None, t, normalize=False, reduction="none"),
        lambda a, b, t: from_logits(*dense_info_nce(a, b, None, t, in_batch=True, normalize=False)),
        True,
    ),
    "info_nce of given keys": (
        lambda a, b, t: info_nce(a, b, None, t, normalize=False, reduction="none"),
        lambda a, b, t: from_logits(*dense_info_nce(a, b, None, t, in_batch=True, normalize=False)),
        False,
    ),
    "nt_xent": (
        lambda a, b, t: nt_xent(
            a, b, t, normalize=False, reduction="none", group_ids=torch.arange(len(a), device=a.device)
        ),
        dense_pairs,
        True,
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("loss", IN_A_CONE)
def test_a_cone_keeps_its_gradient_in_16_bits(loss, dtype, backend):
    """Where all rows are nearly one, what the positive adds nearly cancels what the negatives add: rounded before they
    meet, little of their difference is left."""
    ours, theirs, learned = IN_A_CONE[loss]
    cone, a, b = tensors((1, 64), (48, 64), (48, 64), dtype=torch.float64)
    a, b = (F.normalize(cone + 0.05 * x).detach().to(dtype) for x in (a, b))
    a, b = a.requires_grad_(), b.requires_grad_(learned)
    g = torch.full((96 if loss == "nt_xent" else 48,), 1 / 48, device=DEVICE, dtype=torch.float64)
    with ssl_fast.backend(backend):
        value = run(lambda *x: ours(*x, torch.tensor(0.1, device=DEVICE)), [a, b], g)
    truth = run(lambda *x: theirs(*x, 0.1), [x.double().requires_grad_(x.requires_grad) for x in (a, b)], g)
    for found, wanted in zip(value[1:], truth[1:], strict=True):
        assert_close(f"gradient of {loss}", found, wanted, None, dtype)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's chunks")
def test_chunks_of_rows_with_triton(monkeypatch):
    """More rows than the chunked paths hold at a time: those of columns, of a gradient for y, and of wide rows."""
    from ssl_fast.kernels import _common

    monkeypatch.setattr(_common, "CHUNK_BYTES", 1)  # as few rows as a chunk may have, 128
    dtype, N, K, t = torch.float16, 131, 70, 0.1
    a, b = tensors((N, 20), (N, 20), dtype=dtype)
    labels = torch.arange(N, device=DEVICE) % 9
    ours = [
        lambda a, b, t: clip(a, b, 1 / t, normalize=True, reduction="none", group_ids=labels),
        lambda a, t: sup_con(a, labels, t, reduction="none"),
    ]
    theirs = [lambda a, b, t: dense_clip(unit(a), unit(b), t, labels), lambda a, t: dense_sup_con(a, labels, t)]
    check(ours[0], theirs[0], [a, b, temperature(t, dtype)], "triton", t)
    check(ours[1], theirs[1], [a, temperature(t, dtype)], "triton", t)
    q, k, queue = (x.detach() for x in tensors((N, 260), (N, 260), (K, 260), dtype=dtype))
    check(
        lambda q, k, n, t: info_nce(q, k, n, t, reduction="none"),
        lambda q, k, n, t: from_logits(*dense_info_nce(q, k, n, t)),
        [q.requires_grad_(), k, queue, temperature(t, dtype)], "triton", t,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", (0.01, 0.07))
def test_hard_rows(backend, t):
    """Duplicates, a narrow cone, a zero row, strided views."""
    q, k, n, cone = tensors((40, 33), (40, 33), (90, 33), (1, 33), dtype=torch.float32)
    q, k, n = ((cone * 30 + x).detach() for x in (q, k, n))
    q[3] = 0
    n[5] = 0
    n[7:9] = k[2]
    k[11] = q[11]
    for learned in (False, True):
        inputs = [q.requires_grad_(), k.requires_grad_(), n.requires_grad_(learned), temperature(t, torch.float32)]
        check(
            lambda q, k, n, t: info_nce(q, k, n, t, reduction="none"),
            lambda q, k, n, t: from_logits(*dense_info_nce(q, k, n, t)),
            inputs, backend, t,
        )  # fmt: skip
        whole = info_nce(*(x.detach() for x in inputs[:3]), t)
        with ssl_fast.backend(backend):
            strided = info_nce(*(x.detach().T.contiguous().T for x in inputs[:3]), t)
        torch.testing.assert_close(strided, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend):
    """Unnormalised rows with logits in the thousands: finite, and as exact as softmax."""
    q, k, n = (x.detach().requires_grad_() for x in tensors((20, 64), (20, 64), (50, 64), dtype=torch.float32, scale=8))
    for negatives in (n, n.detach()):
        check(
            lambda q, k, n, t: info_nce(q, k, n, t, normalize=False, reduction="none"),
            lambda q, k, n, t: from_logits(*dense_info_nce(q, k, n, t, normalize=False)),
            [q, k, negatives, temperature(0.1, torch.float32)], backend, 0.1,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_belongs_and_bad_temperatures_give_nan(backend):
    q, k, n = (x.detach() for x in tensors((5, 8), (5, 8), (9, 8), dtype=torch.float32))
    with ssl_fast.backend(backend):
        for t in (float("nan"), 0.0, -1.0):
            t = torch.tensor(t, device=DEVICE)
            assert info_nce(q, k, n, t).isnan()
            assert info_nce(q.requires_grad_(), k, n, t).isnan()
            assert sup_con(q, torch.zeros(5, dtype=torch.long, device=DEVICE), t).isnan()
        q = q.detach().clone()
        q[2] = float("nan")
        assert torch.equal(info_nce(q, k, n, reduction="none").isnan().cpu(), torch.arange(5) == 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_to_the_bit(backend):
    N, K, D = (40, 70, 20) if backend == "triton" and DEVICE == "cpu" else (257, 900, 64)
    q, k, n = tensors((N, D), (N, D), (K, D), dtype=torch.float32)
    labels = torch.arange(N, device=DEVICE) % 7
    steps: list[Callable[[], Tensor]] = [
        lambda: info_nce(q, k, n.detach()),
        lambda: info_nce(q, k, n),
        lambda: clip(q, k, 10.0, normalize=True),
        lambda: sup_con(q, labels),
    ]
    with ssl_fast.backend(backend):
        for step in steps:
            first, second = (torch.autograd.grad(step(), q)[0] for _ in range(2))
            assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_opcheck(backend):
    dtype = torch.float64 if home.info_nce_fwd.reason(backend, DEVICE, torch.float64) is None else torch.float32
    q, k, n = tensors((6, 5), (6, 5), (11, 5), dtype=dtype)
    t = temperature(0.3, dtype)
    labels = torch.tensor([0, 1, 0, 1, 2, 0], device=DEVICE)
    if dtype == torch.float64:
        with ssl_fast.backend(backend):
            assert torch.autograd.gradcheck(lambda *x: info_nce(*x, in_batch=True), (q, k, n, t))
            assert torch.autograd.gradcheck(lambda q, k, t: info_nce(q, k, n.detach(), t), (q, k, t))
            assert torch.autograd.gradcheck(lambda q, k, t: clip(q, k, t, normalize=True), (q, k, t))
            assert torch.autograd.gradcheck(lambda z, t: sup_con(z, labels, t), (q, t))
    q, k, n, t = (x.detach() for x in (q, k, n, t))
    ids, key_ids = torch.arange(6, device=DEVICE) % 5, torch.arange(11, device=DEVICE) % 4
    named, kwargs = torch.ops.ssl_fast, {"backend": backend}
    g, h = torch.rand(6, device=DEVICE, dtype=dtype), torch.rand(11, device=DEVICE, dtype=dtype)
    for columns in (True, False):
        args = (q, n, t, ids, key_ids, 0, True)
        stats = home.info_nce_fwd(*args, columns, backend=backend)
        opcheck(named.info_nce_fwd.default, (*args, columns), kwargs)
        back = (g, h if columns else None, q, n, t, *stats, ids, key_ids, 0, True)
        opcheck(named.info_nce_bwd.default, back, kwargs)
    opcheck(named.info_nce_one_pass.default, (q, n, t, None, None, None, True), kwargs)
    for classes, others in ((labels, None), (None, ids)):
        stats = sup_con_fwd(q, classes, others, t, True, backend=backend)
        opcheck(named.sup_con_fwd.default, (q, classes, others, t, True), kwargs)
        h = None if classes is None else g
        opcheck(named.sup_con_bwd.default, (g, h, q, classes, others, t, stats, True), kwargs)


def test_compiled_in_one_graph_with_a_dynamic_batch():
    def losses(q, k, n, labels, t):
        return (
            info_nce(q, k, n, t) + info_nce(q, k, None, t) + clip(q, k, 1 / t, normalize=True) + sup_con(q, labels, t)
        )

    compiled = torch.compile(losses, fullgraph=True, dynamic=True)
    for N in (6, 9, 17):
        q, k, n = tensors((N, 8), (N, 8), (3 * N, 8), dtype=torch.float32)
        labels = torch.arange(N, device=DEVICE) % 3
        for keys in (n, n.detach()):
            t = temperature(0.3, torch.float32)
            expected = torch.autograd.grad(losses(q, k, keys, labels, t), (q, k, t))
            actual = torch.autograd.grad(compiled(q, k, keys, labels, t), (q, k, t))
            torch.testing.assert_close(actual, expected)


def test_compiled_in_one_graph_where_a_tensor_has_two_places():
    """torch.compile cannot take one tensor twice into an autograd.Function; users give one as ids of both sides, or as
    both views."""

    def losses(q, k, n, ids, queue_ids, t):
        with_ids = {"group_ids": ids}
        return (
            clip(q, k, 1 / t, **with_ids) + info_nce(q, k, None, t, **with_ids) + nt_xent(q, k, t, **with_ids)
            + info_nce(q, k, n, t, negative_group_ids=queue_ids, **with_ids) + info_nce(q, q, q, t)
            + info_nce(q, k, n, t, in_batch=True, negative_group_ids=ids, **with_ids)
            + clip(q, q, 1 / t) + nt_xent(q, q, t)
        )  # fmt: skip

    q, k, n = tensors((6, 8), (6, 8), (6, 8), dtype=torch.float32)
    ids, queue_ids, t = torch.arange(6) % 4, torch.arange(6) % 5, temperature(0.3, torch.float32)
    inputs = q, k, n, ids.to(DEVICE), queue_ids.to(DEVICE), t
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(losses(*inputs), (q, k, n, t))
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), (q, k, n, t)), expected)


# ---- options


def test_options_against_their_formulas():
    N, K, D, t = 9, 14, 6, 0.2
    q, k, n = tensors((N, D), (N, D), (K, D), dtype=torch.float64)
    pos, negatives = dense_info_nce(q, k, n, t)
    logits = torch.cat([pos[:, None], negatives], 1)
    target = torch.zeros(N, dtype=torch.long, device=DEVICE)
    weight = torch.rand(N, dtype=torch.float64, device=DEVICE)
    keys = {"temperature": t, "reduction": "none"}
    plain = F.cross_entropy(logits, target, reduction="none")
    same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # noqa: E731
    same(info_nce(q, k, n, **keys), plain)
    smooth = F.cross_entropy(logits, target, reduction="none", label_smoothing=0.1)
    same(info_nce(q, k, n, label_smoothing=0.1, **keys), smooth)
    in_batch, others = dense_info_nce(q, k, None, t, in_batch=True)
    batch_logits = torch.cat([in_batch[:, None], others[others > -torch.inf].view(N, N - 1)], 1)
    smooth = F.cross_entropy(batch_logits, target, reduction="none", label_smoothing=0.3)
    same(info_nce(q, k, label_smoothing=0.3, **keys), smooth)
    same(info_nce(q, k, n, decoupled=True, **keys), torch.logsumexp(negatives, 1) - pos)
    same(info_nce(q, k, n, t, sample_weight=weight), (plain * weight).sum() / weight.sum())
    same(info_nce(q, k, n, t, reduction="sum", sample_weight=weight), (plain * weight).sum())
    same(info_nce(q, k, n, t), plain.mean())
    same(info_nce(q, k, n, t, return_lse=True)[1], torch.logsumexp(logits, 1))
    tau = 0.05
    Ng = (negatives.exp().sum(1) - K * tau * pos.exp()) / (1 - tau)
    Ng = Ng.clamp(min=K * torch.e ** (-1 / t))
    debiased = -(pos.exp() / (pos.exp() + Ng)).log()
    same(info_nce(q, k, n, tau_plus=tau, **keys), debiased)
    truth = torch.autograd.grad(debiased.sum(), q, retain_graph=True)[0]
    same(torch.autograd.grad(info_nce(q, k, n, t, tau_plus=tau, reduction="sum"), q)[0], truth)
    ids, key_ids = torch.arange(N, device=DEVICE) % 4, torch.arange(K, device=DEVICE) % 5
    left = (ids[:, None] != key_ids).sum(1).double()
    masked = negatives.masked_fill(ids[:, None] == key_ids, -torch.inf)
    Ng = ((masked.exp().sum(1) - left * tau * pos.exp()) / (1 - tau)).clamp(min=0)
    Ng = torch.maximum(Ng, left * torch.e ** (-1 / t))
    same(
        info_nce(q, k, n, tau_plus=tau, group_ids=ids, negative_group_ids=key_ids, **keys),
        -(pos.exp() / (pos.exp() + Ng)).log(),
    )


def test_options_of_clip_and_sup_con_against_their_formulas():
    N, D, t, tau = 9, 6, 0.2, 0.05
    image, text = tensors((N, D), (N, D), dtype=torch.float64)
    ids = torch.arange(N, device=DEVICE) % 6
    same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # noqa: E731
    keys = {"normalize": True, "reduction": "none"}
    s = unit(image) @ unit(text).T / t
    pos = s.diagonal()
    for group_ids in (None, ids):
        out = torch.eye(N, dtype=torch.bool, device=DEVICE) if group_ids is None else ids[:, None] == ids
        both = [x.masked_fill(out, -torch.inf) for x in (s, s.T)]
        given = {"group_ids": group_ids, **keys}
        alone = [torch.logsumexp(x, 1) - pos for x in both]
        same(clip(image, text, 1 / t, decoupled=True, **given), sum(alone) / 2)
        left = (~out).sum(1).double()
        sums = [((x.exp().sum(1) - left * tau * pos.exp()) / (1 - tau)).clamp(min=0) for x in both]
        sums = [torch.maximum(x, left * torch.e ** (-1 / t)) for x in sums]
        debiased = sum((1 + x / pos.exp()).log() for x in sums) / 2
        loss, lse = clip(image, text, 1 / t, tau_plus=tau, return_lse=True, **given)
        same(loss, debiased)
        same(lse, torch.stack([torch.logaddexp(torch.logsumexp(x, 1), pos) for x in both]))
        gradients = [torch.autograd.grad(x.sum(), (image, text), retain_graph=True) for x in (loss, debiased)]
        for ours, theirs in zip(*gradients, strict=True):
            same(ours, theirs)

    for labels in (ids, torch.zeros_like(ids)):  # all alike: no negatives, no loss
        logits, alike = unit(image) @ unit(image).T / t, labels[:, None] == labels
        lse = torch.logsumexp(logits.masked_fill(alike, -torch.inf), 1)
        alike = alike & ~torch.eye(N, dtype=torch.bool, device=DEVICE)
        counted = alike.any(1) & lse.isfinite()
        expected = (lse - (logits * alike).sum(1) / alike.sum(1).clamp(min=1))[counted]
        loss, ours = sup_con(image, labels, t, reduction="none", decoupled=True, return_lse=True)
        same(ours, lse)
        same(loss[counted], expected)
        assert (loss[~counted] == 0).all()
        same(sup_con(image, labels, t, decoupled=True), expected.mean() if len(expected) else torch.zeros_like(loss[0]))
        ours, theirs = (torch.autograd.grad(x.sum(), image, retain_graph=True)[0] for x in (loss, expected))
        same(ours, theirs)
    assert sup_con(image.view(3, 3, D), temperature=t, return_lse=True)[1].shape == (3, 3)

    logits, own = unit(image) @ unit(image).T / t, torch.eye(N, dtype=torch.bool, device=DEVICE)
    alike = (ids[:, None] == ids) & ~own
    target = 0.7 * alike.double() / alike.sum(1, keepdim=True).clamp(min=1) + 0.3 * (~own).double() / (N - 1)
    for decoupled in (False, True):  # which changes the denominators alone
        lse = torch.logsumexp(logits.masked_fill(own | alike if decoupled else own, -torch.inf), 1)
        expected = torch.where(alike.any(1), lse - (logits * target).sum(1), 0)
        loss = sup_con(image, ids, t, reduction="none", label_smoothing=0.3, decoupled=decoupled)
        same(loss, expected)
        if not decoupled:
            smoothed = F.cross_entropy(logits.masked_fill(own, -1e9), target, reduction="none")
            same(loss, torch.where(alike.any(1), smoothed, 0))
        ours, theirs = (torch.autograd.grad(x.sum(), image, retain_graph=True)[0] for x in (loss, expected))
        same(ours, theirs)
    assert sup_con(image.detach().clone().fill_(torch.nan), ids, t).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opposite_rows_with_a_large_upstream_gradient(backend):
    """Similarities of -1 at the lowest temperature of the fixed shift, under GradScaler's 2^16."""
    a = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).repeat(3, 1).to(DEVICE).requires_grad_()
    b = (-a.detach()).requires_grad_()
    with ssl_fast.backend(backend):
        for loss in (clip(a, b, 40.0, normalize=True), info_nce(a, b, b, 0.025), sup_con(torch.cat([a, b]).flip(0)[:4],
                     torch.arange(4, device=DEVICE) // 2, 0.025)):  # fmt: skip
            assert torch.autograd.grad(loss * 2**16, a)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_similarities(backend):
    """A temperature's gradient is a difference of similarities: a shift of 1 would round those of 1e-8 away."""
    q, k, n = (
        x.detach().requires_grad_() for x in tensors((30, 16), (30, 16), (40, 16), dtype=torch.float32, scale=1e-4)
    )
    t = temperature(0.05, torch.float32)
    losses = [
        (lambda q, k, n, t: info_nce(q, k, n, t, normalize=False, reduction="none"),
         lambda q, k, n, t: from_logits(*dense_info_nce(q, k, n, t, normalize=False))),
        (lambda q, k, _, t: clip(q, k, 1 / t, reduction="none"), lambda q, k, _, t: dense_clip(q, k, t)),
    ]  # fmt: skip
    for ours, theirs in losses:
        with ssl_fast.backend(backend):
            value = torch.autograd.grad(ours(q, k, n, t).sum(), t)[0]
        wide = [x.detach().double().requires_grad_() for x in (q, k, n, t)]
        truth = torch.autograd.grad(theirs(*wide).sum(), wide[3])[0]
        torch.testing.assert_close(value.double(), truth, rtol=1e-3, atol=0)


def test_a_row_without_negatives_is_no_loss_when_decoupled():
    q, k, n = tensors((3, 5), (3, 5), (4, 5), dtype=torch.float32)
    ids, key_ids = torch.tensor([0, 1, 2], device=DEVICE), torch.zeros(4, dtype=torch.long, device=DEVICE)
    loss = info_nce(q, k, n, decoupled=True, group_ids=ids, negative_group_ids=key_ids, reduction="none")
    assert loss[0] == 0 and loss[1:].isfinite().all()
    assert torch.autograd.grad(loss.sum(), q)[0][0].abs().max() == 0


def test_a_queue_may_be_written_over_where_only_the_temperature_learns():
    q, k, n = (x.detach() for x in tensors((3, 5), (3, 5), (4, 5), dtype=torch.float32))
    t = temperature(0.1, torch.float32)
    expected = torch.autograd.grad(info_nce(q, k, n, t), t)[0]
    loss = info_nce(q, k, n, t)
    n.zero_()
    assert torch.equal(torch.autograd.grad(loss, t)[0], expected)


def test_debiased_rows_at_the_floor_have_finite_gradients():
    q = torch.eye(4, 8, device=DEVICE).requires_grad_()
    negatives = -torch.eye(4, 8, device=DEVICE)
    loss = info_nce(q, q.detach(), negatives, 0.01, tau_plus=0.5)
    assert torch.autograd.grad(loss, q)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_nt_xent_with_groups_and_decoupled(backend, dtype):
    """Through the log-sum-exp over the rows of other ids, whose matrix is symmetric."""
    z1, z2 = tensors((33, 20), (33, 20), dtype=dtype)
    for ids in (torch.arange(33, device=DEVICE), torch.arange(33, device=DEVICE) % 11):

        def theirs(z1, z2, t, ids=ids):
            z, both = unit(torch.cat([z1, z2])), ids.repeat(2)
            negatives = (z @ z.T / t).masked_fill(both[:, None] == both, -torch.inf)
            return (torch.logsumexp(negatives, 1) - (z * z.roll(33, 0)).sum(1) / t)[:33]

        check(
            lambda z1, z2, t, ids=ids: nt_xent(z1, z2, t, reduction="none", decoupled=True, group_ids=ids)[:33],
            theirs, [z1, z2, temperature(0.1, dtype)], backend, 0.1,
        )  # fmt: skip


def test_options_of_nt_xent_against_their_formulas():
    N, D, t = 7, 6, 0.2
    z1, z2 = tensors((N, D), (N, D), dtype=torch.float64)
    z = unit(torch.cat([z1, z2]))
    logits = (z @ z.T / t).masked_fill(torch.eye(2 * N, dtype=torch.bool, device=DEVICE), -torch.inf)
    target = torch.arange(2 * N, device=DEVICE).roll(N)
    keys = {"temperature": t, "reduction": "none"}
    same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # noqa: E731
    finite = logits[logits > -torch.inf].view(2 * N, 2 * N - 1)
    column = target - (target > torch.arange(2 * N, device=DEVICE)).long()
    smooth = F.cross_entropy(finite, column, reduction="none", label_smoothing=0.2)
    same(nt_xent(z1, z2, label_smoothing=0.2, **keys), smooth)
    weight = torch.rand(N, dtype=torch.float64, device=DEVICE)
    plain = F.cross_entropy(logits, target, reduction="none")
    both = weight.repeat(2)
    same(nt_xent(z1, z2, t, sample_weight=weight), (plain * both).sum() / both.sum())
    lse = nt_xent(z1, z2, t, sample_weight=weight, return_lse=True)[1]
    same(lse, torch.logsumexp(logits, 1))
    pos = logits.gather(1, target[:, None])[:, 0]
    Ng = ((logits.exp().sum(1) - pos.exp()) - (2 * N - 2) * 0.1 * pos.exp()) / 0.9
    Ng = Ng.clamp(min=(2 * N - 2) * torch.e ** (-1 / t))
    same(nt_xent(z1, z2, tau_plus=0.1, **keys), (1 + Ng / pos.exp()).log())


# ---- the memory bank


def test_a_queue_wraps_at_any_batch_size_and_is_in_the_state_dict():
    queue = KeyQueue(5, 2, normalize=False).to(DEVICE)
    rows = torch.arange(40.0, device=DEVICE).view(20, 2)
    expected, at = queue.keys.clone(), 0
    for start, stop in ((0, 3), (3, 6), (6, 13), (13, 13), (13, 18)):
        queue.enqueue(rows[start:stop])
        for row in rows[start:stop]:
            expected[at], at = row, (at + 1) % 5
        assert torch.equal(queue.keys, expected) and queue.pointer == at
    other = KeyQueue(5, 2).to(DEVICE)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.keys, expected) and other.pointer == at
    other = KeyQueue(5, 2).to(DEVICE)
    other.enqueue(rows[3:6])
    assert torch.equal(other.keys[:3], F.normalize(rows[3:6])) and "normalize=False" in repr(queue)
    other.half().enqueue(torch.tensor([[1e5, 0.0], [0.0, 0.0]], device=DEVICE))  # normalised before it is rounded
    assert torch.equal(other.float().keys[3:], torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=DEVICE))
    with pytest.raises(ValueError, match=r"keys: got shape \(3, 4\) of torch.float32, allowed: a tensor \(N, 2\)"):
        queue.enqueue(torch.ones(3, 4, device=DEVICE))
    with pytest.raises(ValueError, match=r"keys: got shape \(3, 2\) of torch.int64, allowed: .* floating-point dtype"):
        queue.enqueue(torch.ones(3, 2, device=DEVICE).long())
    with pytest.raises(ValueError, match="size: got 0"):
        KeyQueue(0, 2)


def test_a_memory_bank_is_enqueued_after_the_loss_and_only_in_training():
    z1, z2 = tensors((6, 8), (6, 8), dtype=torch.float32)
    criterion = NTXentLoss(0.1, memory_bank_size=(16, 8)).to(DEVICE)
    bank = criterion.memory_bank.keys.clone()
    loss = criterion(z1, z2.detach())
    torch.testing.assert_close(loss, info_nce(z1, z2, bank, 0.1))
    assert torch.equal(criterion.memory_bank.keys[:6], F.normalize(z2.detach()))
    assert torch.equal(criterion.memory_bank.keys[6:], bank[6:])
    assert {"memory_bank.keys", "memory_bank.pointer"} <= criterion.state_dict().keys()
    loss.backward()  # though the bank has moved on
    before = criterion.memory_bank.keys.clone()
    criterion(z1.detach(), z2.detach())
    assert torch.equal(criterion.memory_bank.keys, before)


def test_numbers_of_any_kind_are_numbers():
    q, k = tensors((4, 3), (4, 3), dtype=torch.float32)
    for ten in (np.float32(10), np.float64(10), 10, Fraction(10), torch.tensor(10)):
        torch.testing.assert_close(clip(q, k, ten), clip(q, k, 10.0))
        torch.testing.assert_close(nt_xent(q, k, ten), nt_xent(q, k, 10.0))
        torch.testing.assert_close(SupConLoss(ten)(q, IDS.to(DEVICE)), sup_con(q, IDS.to(DEVICE), 10.0))
    for bias in (0.5, Fraction(1, 2), np.float32(2), torch.ones(1)):
        assert clip(q, k, 10.0, bias) == clip(q, k, 10.0)
    for quarter in (np.float32(0.25), Fraction(1, 4)):
        for name in ("label_smoothing", "tau_plus"):
            torch.testing.assert_close(nt_xent(q, k, **{name: quarter}), nt_xent(q, k, **{name: 0.25}))
        torch.testing.assert_close(BarlowTwinsLoss(quarter)(q, k), barlow_twins(q, k, 0.25))
        torch.testing.assert_close(BarlowTwinsLoss(eps=quarter)(q, k), barlow_twins(q, k, eps=0.25))


@pytest.mark.parametrize("loss", [NTXentLoss, InfoNCE, CLIPLoss, SupConLoss, BarlowTwinsLoss])
def test_modules_refuse_values_when_they_are_made(loss):
    for name, value, message in (
        ("strategy", "tree", "'tree', allowed: 'gather', 'ring'"),
        ("gather_distributed", "no", "'no', allowed: True, False"),
        ("decoupled", "no", "'no', allowed: True, False"),
        ("normalize", "no", "'no', allowed: True, False"),
        ("return_lse", "no", "'no', allowed: True, False"),
        ("label_smoothing", True, "True, allowed: a number from 0 to 1"),
        ("reduction", None, "None, allowed: 'mean', 'sum', 'none'"),
    ):
        if loss is not BarlowTwinsLoss or name in ("strategy", "gather_distributed"):
            with pytest.raises((ValueError, TypeError), match=f"{name}: got {message}"):
                loss(**{name: value})


def test_options_of_a_call_replace_those_of_its_module():
    q, k = tensors((8, 12), (8, 12), dtype=torch.float32)
    ids = torch.arange(8, device=DEVICE) % 3
    assert InfoNCE(normalize=False)(q, k, normalize=True, reduction="sum") == info_nce(q, k, reduction="sum")
    assert SupConLoss(reduction="sum")(q, ids, reduction="mean") == sup_con(q, ids)


def test_clip_module_takes_open_clips_arguments():
    image, text = (F.normalize(x.detach()) for x in tensors((12, 16), (12, 16), dtype=torch.float32))
    scale, bias = torch.tensor(14.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    criterion = CLIPLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
    out = criterion(image.to(DEVICE), text.to(DEVICE), scale, bias, output_dict=True)
    logits, labels = scale * image @ text.T, torch.arange(12, device=DEVICE)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(out["contrastive_loss"], expected)
    grads = torch.autograd.grad(out["contrastive_loss"], (scale, bias))
    torch.testing.assert_close(grads[0], torch.autograd.grad(expected, scale)[0])
    assert grads[1] == 0
    smooth = (
        F.cross_entropy(logits, labels, label_smoothing=0.2) + F.cross_entropy(logits.T, labels, label_smoothing=0.2)
    ) / 2
    torch.testing.assert_close(clip(image, text, scale, label_smoothing=0.2), smooth)


def test_sup_con_of_views_and_of_rows_without_positives():
    (z,) = tensors((6, 3, 10), dtype=torch.float64)
    flat = z.flatten(0, 1)
    instance = torch.arange(6, device=DEVICE).repeat_interleave(3)
    torch.testing.assert_close(sup_con(z, temperature=0.2), dense_sup_con(flat, instance, 0.2).mean())
    labels = torch.tensor([0, 1, 0, 2, 3, 2], device=DEVICE)
    torch.testing.assert_close(SupConLoss(0.2)(z, labels), dense_sup_con(flat, labels.repeat_interleave(3), 0.2).mean())
    rows = dense_sup_con(z[:, 0], labels, 0.2)
    torch.testing.assert_close(sup_con(z[:, 0], labels, 0.2), rows[rows > 0].mean())
    alone = sup_con(z[:, 0], torch.arange(6, device=DEVICE), 0.2)
    assert alone == 0 and torch.autograd.grad(alone, z)[0].abs().max() == 0
    weight = torch.rand(6, dtype=torch.float64, device=DEVICE)
    has = rows > 0
    expected = (rows * weight)[has].sum() / weight[has].sum()
    torch.testing.assert_close(sup_con(z[:, 0], labels, 0.2, sample_weight=weight), expected)


def test_a_queue_may_be_written_over_before_backward():
    q, k, n = tensors((8, 12), (8, 12), (40, 12), dtype=torch.float32)
    queue = n.detach().clone()
    expected = torch.autograd.grad(info_nce(q, k.detach(), queue), q)[0]
    loss = info_nce(q, k.detach(), queue)
    queue.zero_()
    assert torch.equal(torch.autograd.grad(loss, q)[0], expected)


def test_nothing_of_the_queue_is_kept():
    q, k, n = tensors((8, 12), (8, 12), (40, 12), dtype=torch.float32)
    queue = n.detach().clone()
    seen = weakref.ref(queue)
    loss = info_nce(q, k.detach(), queue)
    del queue
    gc.collect()
    assert seen() is None
    loss.backward()


def test_modules_print_and_pass_their_options_on():
    q, k, n = tensors((8, 12), (8, 12), (40, 12), dtype=torch.float32)
    assert "temperature=0.07" in repr(InfoNCE(0.07)) and "learned" in repr(
        SupConLoss(torch.nn.Parameter(torch.ones(())))
    )
    torch.testing.assert_close(InfoNCE(0.07, in_batch=True)(q, k, n), info_nce(q, k, n, 0.07, in_batch=True))
    paired = n.view(8, 5, 12)
    torch.testing.assert_close(
        InfoNCE(0.07, negative_mode="paired")(q, k, paired), info_nce(q, k, None, 0.07, paired_negative_keys=paired)
    )


def test_autocast_casts_as_for_a_matrix_product():
    q, k, n = tensors((8, 12), (8, 12), (40, 12), dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = info_nce(q, k, n)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce(*(x.bfloat16() for x in (q, k, n))))


def test_autocast_rounds_no_similarity():
    """Neither those of each query's own negatives, nor the sums that smoothing takes beside the operators."""
    q, k, n, paired = tensors((8, 12), (8, 12), (40, 12), (8, 5, 12), dtype=torch.float32)
    low = [x.bfloat16() for x in (q, k, n)]
    for options in ({}, {"label_smoothing": 0.3}):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = info_nce(q, k, n, paired_negative_keys=paired, in_batch=True, **options)
        expected = info_nce(*low, paired_negative_keys=paired.bfloat16(), in_batch=True, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        gradients = [torch.autograd.grad(x, (q, paired)) for x in (loss, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


Q, IDS = torch.ones(4, 3), torch.arange(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: info_nce(Q, Q[:2]), r"positive_key: got shape \(2, 3\), allowed: the shape of query, \(4, 3\)"),
        (lambda: info_nce(Q, Q, Q[:, :2]), r"negative_keys: got shape \(4, 2\), allowed: \(K, 3\)"),
        (lambda: info_nce(Q, Q, Q[:0]), r"negative_keys: got shape \(0, 3\), allowed: \(K, 3\)"),
        (lambda: info_nce(Q, Q, paired_negative_keys=Q), r"paired_negative_keys: got shape \(4, 3\), allowed: \(N, M"),
        (lambda: info_nce(Q, Q, in_batch=False), "negative_keys: got None with in_batch=False"),
        (lambda: info_nce(Q, Q, temperature=0.0), "temperature: got 0.0, allowed: a float above 0"),
        (lambda: info_nce(Q, Q, tau_plus=1.0), "tau_plus: got 1.0, allowed: at least 0 and below 1"),
        (lambda: info_nce(Q, Q, label_smoothing=-0.1), "label_smoothing: got -0.1, allowed: a number from 0 to 1"),
        (lambda: info_nce(Q, Q, group_ids=torch.ones(4)), r"group_ids: got torch.float32 \(4,\), allowed"),
        (lambda: info_nce(Q, Q, sample_weight=torch.ones(3)), r"sample_weight: got torch.float32 \(3,\)"),
        (lambda: info_nce(Q, Q, Q, group_ids=torch.ones(4).long()), "negative_group_ids: got None"),
        (lambda: info_nce(Q.long(), Q), "query: got torch.int64, allowed: float16"),
        (lambda: info_nce(Q, Q, paired_negative_keys=Q[:, None], group_ids=Q[:, 0].long()), "group_ids: got ids with"),
        (lambda: info_nce(Q, Q, negative_group_ids=torch.ones(4).long()), "negative_group_ids: got ids without"),
        (lambda: clip(Q, Q, "a"), "logit_scale: got 'a', allowed: a float above 0"),
        (lambda: clip(Q, Q, torch.ones(2)), r"logit_scale: got torch.float32 of shape \(2,\), allowed: a float"),
        (lambda: InfoNCE(negative_mode="pared"), "negative_mode: got 'pared', allowed: 'unpaired', 'paired'"),
        (lambda: clip(Q, Q, -1.0), "logit_scale: got -1.0, allowed: a float above 0"),
        (lambda: CLIPLoss(world_size=2)(Q, Q, 10.0), "world_size: got 2, allowed: 1"),
        (lambda: sup_con(Q), r"labels: got None with embeddings \(M, D\)"),
        (lambda: sup_con(Q, torch.ones(3).long()), r"labels: got torch.int64 \(3,\)"),
        (lambda: sup_con(Q[0], torch.ones(3).long()), r"embeddings: got shape \(3,\), allowed: \(N, D\)"),
        (lambda: info_nce(Q, Q, Q[:0]), r"negative_keys: got shape \(0, 3\), allowed: \(K, 3\), K >= 1"),
        (lambda: info_nce(Q, Q, paired_negative_keys=Q[:, None].double()), "paired_negative_keys: got torch.float64"),
        (lambda: info_nce(Q, Q, paired_negative_keys=Q[:, None].to("meta")), "paired_negative_keys: got device meta"),
        (lambda: info_nce(Q, Q, group_ids=torch.ones(4, dtype=torch.cfloat)), "group_ids: got torch.complex64"),
        (lambda: info_nce(Q, Q, sample_weight=torch.ones(4, dtype=torch.cfloat)), "sample_weight: got torch.complex64"),
        (lambda: nt_xent(Q, Q, decoupled="no"), "decoupled: got 'no', allowed: True, False"),
        (lambda: sup_con(Q, torch.ones(4).long(), decoupled=1), "decoupled: got 1, allowed: True, False"),
        (lambda: nt_xent(Q, Q, label_smoothing=None), "label_smoothing: got None, allowed: a number from 0"),
        (lambda: clip(Q, Q, 1.0, tau_plus="0.1"), "tau_plus: got '0.1', allowed: at least 0"),
        (lambda: clip(Q, Q, 1.0, torch.ones(3)), r"logit_bias: got torch.float32 of shape \(3,\), allowed: a number"),
        (lambda: clip(Q, Q, 1.0, "b"), "logit_bias: got 'b', allowed: a number"),
        (lambda: NTXentLoss(foo=1), "foo: got an option that NTXentLoss does not have, allowed: temperature, memory_b"),
        (lambda: NTXentLoss(in_batch=True), "in_batch: got an option that NTXentLoss does not have"),
        (lambda: NTXentLoss(0.1, (8, 3), foo=1), "foo: got an option that NTXentLoss does not have.*: .*in_batch"),
        (lambda: InfoNCE(foo=1), "foo: got an option that InfoNCE does not have, allowed: temp.*, in_batch, normalize"),
        (lambda: InfoNCE(temprature=1), "temprature: got an option .* have, did you mean 'temperature'[?] allowed: "),
        (lambda: CLIPLoss(worldsize=2), "worldsize: got an option .* have, did you mean 'world_size'[?] allowed: "),
        (lambda: SupConLoss(group_ids=None), "group_ids: got an option that SupConLoss does not have"),
        (lambda: BarlowTwinsLoss(foo=1), "foo: got an option that BarlowTwinsLoss does not have, allowed: lambda"),
        (lambda: clip(Q, Q, torch.tensor(2 + 3j)), r"logit_scale: got torch.complex64 of shape \(\), allowed: a float"),
        (lambda: clip(Q, Q, 2 + 3j), r"logit_scale: got \(2\+3j\), allowed: a float above 0"),
        (lambda: clip(Q, Q, torch.tensor(True)), "logit_scale: got torch.bool of shape"),
        (lambda: clip(Q, Q, 10**400), "logit_scale: got 10+, allowed: a float above 0"),
        (lambda: clip(Q, Q, 1.0, True), "logit_bias: got True, allowed: a number"),
        (lambda: clip(Q, Q, torch.ones(()).to("meta")), "logit_scale: got device meta, which holds no value, .*, cpu"),
        (lambda: nt_xent(Q, Q, torch.ones(()).to("meta")), "temperature: got device meta, which holds no value"),
        (lambda: nt_xent(Q, Q, torch.tensor(1j)), "temperature: got torch.complex64 of shape"),
        (lambda: nt_xent(Q, Q, 1e300), "temperature: got 1e[+]300, allowed: a float above 0 and finite, in fp32 too"),
        (lambda: nt_xent(Q, Q, group="world"), "group: got 'world', allowed: what torch.distributed.new_group returns"),
        (lambda: nt_xent(Q, Q, 10**400), "temperature: got 10+, allowed: a float above 0 and finite"),
        (lambda: nt_xent(Q, Q, normalize="no"), "normalize: got 'no', allowed: True, False"),
        (lambda: info_nce(Q, Q, normalize=1), "normalize: got 1, allowed: True, False"),
        (lambda: clip(Q, Q, 1.0, normalize="no"), "normalize: got 'no', allowed: True, False"),
        (lambda: sup_con(Q, IDS, normalize=None), "normalize: got None, allowed: True, False"),
        (lambda: nt_xent(Q, Q, return_lse="no"), "return_lse: got 'no', allowed: True, False"),
        (lambda: clip(Q, Q, 1.0, return_lse="no"), "return_lse: got 'no', allowed: True, False"),
        (lambda: sup_con(Q, IDS, return_lse="no"), "return_lse: got 'no', allowed: True, False"),
        (lambda: info_nce(Q, Q, Q, in_batch="no"), "in_batch: got 'no', allowed: True, False"),
        (lambda: info_nce(Q, Q, label_smoothing=True), "label_smoothing: got True, allowed: a number from 0 to 1"),
        (lambda: nt_xent(Q, Q, reduction=None), "reduction: got None, allowed: 'mean', 'sum', 'none'"),
        (lambda: info_nce(Q, Q, paired_negative_keys=Q[:, None][:, :0]), r"= \(4, M, 3\), M >= 1; leave it out where"),
        (lambda: sup_con(Q, IDS.float()), r"labels: got torch.float32 \(4,\), .*; cast whole numbers with .long\(\)"),
        (lambda: sup_con(Q, [0, 1, 2, 3]), r"labels: got list, allowed: a tensor of integers, .*; take torch.as_t"),
        (lambda: CLIPLoss(world_size="2"), "world_size: got '2', allowed: a whole number >= 1"),
        (lambda: KeyQueue(8, 3, normalize="no"), "normalize: got 'no', allowed: True, False"),
        (lambda: barlow_twins(Q, Q, 10**400), "lambda_param: got 10+, allowed: a finite number >= 0"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


MEMORY = """
import json, math, sys
import torch
import ssl_fast
from benches.memory import extra_memory
from ssl_fast.functional import clip, info_nce, nt_xent, sup_con
from torch.nn import functional as F

device = "cuda" if torch.cuda.is_available() else "cpu"

def dense(a, b):
    logits = F.normalize(a) @ F.normalize(b).T / 0.1
    return F.cross_entropy(logits, torch.arange(len(a), device=device))

losses = {
    "nt_xent": lambda a, b: nt_xent(a, b, 0.1),
    "in_batch": lambda a, b: info_nce(a, b),
    "queue": lambda a, b: info_nce(a, b.detach(), b.detach()),
    "clip": lambda a, b: clip(a, b, 10.0, normalize=True),
    "sup_con": lambda a, b: sup_con(a, torch.arange(len(a), device=device) % 50),
    "dense": dense,
}
for backend in sys.argv[1:]:
    for name, loss in losses.items():
        points = []
        for N in (512, 512, 1024, 2048, 4096):  # the first warms up
            a, b = (torch.randn(N, 256, device=device, requires_grad=True) for _ in range(2))
            with ssl_fast.backend(backend):
                points.append(extra_memory(lambda: loss(a, b).backward()))
        grown = [math.log2(points[-1] / p) / k for k, p in ((1, points[-2]), (2, points[-3]))]
        print(json.dumps([backend, name, points, max(grown)]), flush=True)
"""


@pytest.mark.skipif(DEVICE == "cpu" and sys.platform != "linux", reason="reads /proc")
def test_memory_is_linear_in_the_batch():
    """Peak memory of a step at N = 512 to 4096: its exponent is 1, and that of a loss with a matrix is 2.

    Rows of 256, because the kernel counts a process's pages to a few hundred kB only.
    """
    chosen = [b for b in BACKENDS if b != "triton" or DEVICE == "cuda"]
    # Every allocation of some size is mapped and given back, so that each step's peak shows.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, *chosen], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        backend, name, points, exponent = json.loads(line)
        assert exponent > 1.7 if name == "dense" else exponent < 1.35, (backend, name, points, exponent)


@pytest.mark.parametrize("learned", [False, True])
def test_rows_without_a_negative_in_any_source_have_no_gradient(learned):
    q, k, n = (torch.randn(rows, 5, device=DEVICE, requires_grad=True) for rows in (4, 4, 3))
    t = torch.tensor(0.2, device=DEVICE, requires_grad=True)
    same = {"group_ids": torch.zeros(4).long(), "negative_group_ids": torch.zeros(3).long()}
    same = {name: ids.to(DEVICE) for name, ids in same.items()}
    loss = info_nce(q, k, n if learned else n.detach(), t, in_batch=True, **same)
    loss.backward()
    assert loss == 0
    for x in (q, k, t, n) if learned else (q, k, t):
        assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize("tau", [0.01, 0.05, 0.1])
def test_debiased_rows_at_the_bound_have_finite_gradients(tau):
    """Within ulps of log(n tau), above which there is something left, n tau e^-d may round to 1."""
    n = torch.arange(2.0, 400)
    near = [(n * tau).log()]
    for _ in range(12):
        near = [near[0].nextafter(torch.tensor(-9.0)), *near, near[-1].nextafter(torch.tensor(9.0))]
    d = torch.stack(near).requires_grad_()
    pos = (n.log() - d.detach()).requires_grad_()
    loss = home._losses._debiased(d, pos, torch.tensor(1.0), n, tau)
    gradients = torch.autograd.grad(loss.sum(), (d, pos))
    assert all(x.isfinite().all() for x in (loss, *gradients))


def test_debiased_losses_do_not_hide_nan():
    q, k, n = (torch.randn(rows, 5, device=DEVICE) for rows in (4, 4, 3))
    below = torch.tensor(-0.1, device=DEVICE)
    assert info_nce(q, k, n, below, tau_plus=0.1).isnan()
    assert nt_xent(q, k, below.clamp(min=0), tau_plus=0.1).isnan()
    assert clip(q, k, 1 / below, tau_plus=0.1).isnan()
    n[1] = torch.nan
    assert info_nce(q, k, n, 0.1, tau_plus=0.1).isnan()


@pytest.mark.parametrize(
    "loss, option",
    [
        *itertools.product(
            ("nt_xent", "info_nce", "queue", "clip"),
            ("tau_plus", "decoupled", "label_smoothing", "sample_weight", "group_ids"),
        ),
        *(("sup_con", option) for option in ("decoupled", "label_smoothing", "sample_weight")),
    ],
)
def test_losses_never_wait_for_the_device(loss, option):
    """Nor their backward: a CUDA graph captures them."""
    a, b = (torch.empty(8, 4, device="meta", requires_grad=True) for _ in range(2))
    ids, bank = torch.empty(8, dtype=torch.long, device="meta"), torch.empty(16, 4, device="meta")
    values = {"tau_plus": 0.1, "decoupled": True, "label_smoothing": 0.1}
    values |= {"sample_weight": torch.empty(8, device="meta"), "group_ids": ids}
    options = {option: values[option]}
    queued = {"negative_group_ids": ids.repeat(2)} if option == "group_ids" else {}
    losses = {
        "nt_xent": lambda: nt_xent(a, b, **options),
        "info_nce": lambda: info_nce(a, b, **options),
        "queue": lambda: info_nce(a, b, bank, **options, **queued),
        "clip": lambda: clip(a, b, 10.0, **options),
        "sup_con": lambda: sup_con(a, ids, **options),
    }
    with NeverWaits():
        losses[loss]().backward()
