"""nt_xent against autograd of the dense fp64 expression, on every backend that runs here."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from common import DEVICE, FLOOR, assert_close, backends, error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

import ssl_fast
from benches.bench_nt_xent import dense_logits
from ssl_fast import NTXentLoss
from ssl_fast.functional import nt_xent
from ssl_fast.ops.nt_xent import nt_xent_bwd, nt_xent_fwd

BACKENDS = backends(nt_xent_fwd, torch.float32)
SIZES_N = (1, 2, 3, 63, 65, 257, 1000)
SIZES_D = (1, 3, 64, 123, 128, 130, 768)
TEMPERATURES = (0.005, 0.01, 0.07, 0.5, 1.0, 10.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Each size, width, temperature and dtype several times, in combinations that differ.
CASES = [
    (N, SIZES_D[(i + k) % 7], TEMPERATURES[(2 * i + k) % 6], DTYPES[(i + k // 2) % 4], (i + k) % 5 != 0)
    for i, N in enumerate(SIZES_N)
    for k in range(12)
]
# The interpreter is slow: on a CPU Triton gets a share of the small ones, and one of each larger kind.
INTERPRETED = [c for c in CASES if c[0] * c[1] <= 9000 and c[3] != torch.float64][::2] + [
    (130, 64, 0.07, torch.float32, True),
    (33, 768, 0.5, torch.bfloat16, True),
]


def dense(z1: Tensor, z2: Tensor, t: Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps of the rows, as anyone would write them in PyTorch."""
    logits, target = dense_logits(z1, z2, t, normalize)
    return F.cross_entropy(logits, target, reduction="none"), torch.logsumexp(logits, 1)


def oracle(z1: Tensor, z2: Tensor, t: Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """The same, the positive kept apart: softmax minus one-hot loses the gradient of confident pairs even in fp64."""
    logits, target = dense_logits(z1, z2, t, normalize)
    positive = logits.gather(1, target[:, None])
    gap = torch.logsumexp(logits.scatter(1, target[:, None], -torch.inf), 1) - positive[:, 0]
    return torch.logaddexp(gap, torch.zeros_like(gap)), torch.logsumexp(logits, 1)


def results(fn, z1, z2, t, g, h):
    """loss, lse and the gradients of (g . loss + h . lse) for z1, z2 and t, with fn run in the dtype it is given."""
    z1, z2, t = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (z1, z2, t))
    loss, lse = fn(z1, z2, t)
    gradients = torch.autograd.grad((loss * g).sum() + (lse * h).sum(), (z1, z2, t))
    return dict(zip(("loss", "lse", "dz1", "dz2", "dt"), (loss.detach(), lse.detach(), *gradients), strict=True))


def check(z1: Tensor, z2: Tensor, t: float, normalize: bool, backend: str, h_scale: float = 0.3) -> None:
    dtype, N, M = z1.dtype, len(z1), 2 * len(z1)
    generator = torch.Generator().manual_seed(1)
    g = (torch.rand(M, generator=generator, dtype=torch.float64) / M).to(z1.device)
    h = h_scale * (torch.rand(M, generator=generator, dtype=torch.float64) / M).to(z1.device)
    low = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = torch.tensor(t, dtype=low, device=z1.device)

    def ours(z1, z2, t):
        with ssl_fast.backend(backend):
            return nt_xent(z1, z2, t, normalize=normalize, reduction="none", return_lse=True)

    truth = results(
        lambda *x: (dense if N == 1 else oracle)(*x, normalize), z1.double(), z2.double(), temperature.double(), g, h
    )
    plain = results(lambda *x: dense(*x, normalize), z1, z2, temperature.to(dtype), g.to(dtype), h.to(dtype))
    value = results(ours, z1, z2, temperature, g.to(low), h.to(low))
    # A gradient that is zero but for rounding (N = 1, D = 1) has no scale of its own: its terms are of this size.
    norm = torch.cat([z1, z2]).double().norm(dim=1).min() if normalize else 1.0
    terms = g.abs().max() / (t * norm)
    for name in truth:
        if name == "dt" and normalize:  # a sum of terms of both signs, each up to (g + h) / t^2
            off, theirs = ((x["dt"].double() - truth["dt"]).abs() for x in (value, plain))
            assert off <= 2 * theirs + FLOOR[dtype] * (g.abs() + h.abs()).sum() / t**2, (off, theirs)
        elif truth[name].abs().max() < 1e-12:
            assert (value[name].abs().max() <= FLOOR[dtype] * terms + 2 * plain[name].abs().max()).item(), name
        else:
            assert_close(f"{name} of {backend}", value[name], truth[name], plain[name], dtype)


def pair(N: int, D: int, dtype: torch.dtype, normalize: bool, t: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N * 1000 + D)
    z1 = torch.randn(N, D, generator=generator, dtype=torch.float64)
    z2 = z1 + torch.randn(N, D, generator=generator, dtype=torch.float64)
    if not normalize:  # logits of order 1 to 10, as a user who normalises outside has
        z1, z2 = (z * (t * 3) ** 0.5 / D**0.25 for z in (z1, z2))
    return z1.to(DEVICE, dtype), z2.to(DEVICE, dtype)


def identify(case) -> str:
    N, D, t, dtype, normalize = case
    return f"N{N}-D{D}-t{t}-{str(dtype)[6:]}{'' if normalize else '-raw'}"


def cases():
    for backend in BACKENDS:
        for case in INTERPRETED if backend == "triton" and DEVICE == "cpu" else CASES:
            if nt_xent_fwd.reason(backend, DEVICE, case[3]) is None:
                yield pytest.param(case, backend, id=f"{backend}-{identify(case)}")


@pytest.mark.parametrize(("case", "backend"), list(cases()))
def test_against_fp64(case, backend):
    N, D, t, dtype, normalize = case
    check(*pair(N, D, dtype, normalize, t), t, normalize, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", (0.01, 0.07, 0.5))
def test_duplicate_rows(backend, t):
    z1, z2 = pair(40, 32, torch.float32, True)
    z1[1::2], z2[1::2] = z1[::2], z2[::2]
    check(z1, z2, t, True, backend)
    check(z1, z1, t, True, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_narrow_cone(backend, dtype):
    """Every network at initialisation: rows nearly parallel, many small equal probabilities make the gradient."""
    z1, z2 = pair(65, 64, torch.float32, True)
    axis = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 30
    check((z1 + axis).to(dtype), (z2 + axis).to(dtype), 0.1, True, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_row(backend):
    """F.normalize divides by 1e-12 there; the gradient is as large, so its row is held apart from the others."""
    z1, z2 = pair(33, 16, torch.float32, True)
    z1[5] = 0
    rest = torch.arange(33, device=DEVICE) != 5

    def gradient(fn, z1, z2):
        z1 = z1.clone().requires_grad_()
        return torch.autograd.grad(fn(z1, z2, torch.tensor(0.5, dtype=z1.dtype, device=DEVICE))[0].mean(), z1)[0]

    truth = gradient(dense, z1.double(), z2.double())
    with ssl_fast.backend(backend):
        value = gradient(lambda a, b, t: nt_xent(a, b, t, reduction="none", return_lse=True), z1, z2)
    assert error(value[5], truth[5]) < 1e-5
    assert error(value[rest], truth[rest]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend):
    wide = torch.randn(30, 2, 3, 48, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    z1, z2 = wide[:, 0, 1, ::2], wide[:, 1, 2, 1::2]
    assert not z1.is_contiguous()
    check(z1, z2, 0.2, True, backend)
    check(wide[0, 0, 0].expand(5, 48), wide[:5, 1, 1], 0.2, True, backend)
    column = torch.randn(24, 20, generator=torch.Generator().manual_seed(4)).to(DEVICE).T
    check(column, column.flip(0), 0.2, False, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_confident_pairs(backend, dtype):
    """Positive probability 0.997: in 16 bits a positive left inside the product loses half of the gradient."""
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(64, 128, generator=generator)
    z2 = z1 + 0.55 * torch.randn(64, 128, generator=generator)
    z1, z2 = z1.to(DEVICE, dtype), z2.to(DEVICE, dtype)
    t = 0.07

    def gradient(fn, z1, z2):
        z1 = z1.clone().requires_grad_()
        loss = fn(z1, z2)
        return torch.exp(-loss).mean().item(), torch.autograd.grad(loss.mean(), z1)[0]

    p, truth = gradient(
        lambda a, b: dense(a, b, torch.tensor(t, dtype=a.dtype, device=DEVICE))[0], z1.double(), z2.double()
    )
    assert 0.99 < p < 0.9995, p
    with ssl_fast.backend(backend):
        _, value = gradient(lambda a, b: nt_xent(a.to(dtype), b.to(dtype), t, reduction="none"), z1.float(), z2.float())
    assert error(value, truth) < 2e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend):
    """Unnormalised rows, logits up to 600 and rows with none above 6: no one shift serves both."""
    z1, z2 = pair(40, 24, torch.float32, True)
    z1, z2 = (z * torch.linspace(0.1, 1.5, 40, device=DEVICE)[:, None] for z in (z1, z2))
    assert 400 < dense_logits(z1, z2, 0.1, False)[0].max() < 1000
    check(z1, z2, 0.1, False, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", ("nan row", "t = 0", "t < 0", "t = nan"))
def test_values_on_the_device_give_nan(backend, bad):
    z1, z2 = pair(20, 8, torch.float32, True)
    t = torch.tensor({"t = 0": 0.0, "t < 0": -0.5, "t = nan": torch.nan}.get(bad, 0.5), device=DEVICE)
    if bad == "nan row":
        z1[3] = torch.nan
    z1.requires_grad_()
    with ssl_fast.backend(backend):
        loss = nt_xent(z1, z2, t)
        loss.backward()
    assert loss.isnan() and z1.grad.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_two_runs_are_equal_to_the_bit(backend, dtype):
    z1, z2 = pair(65 if backend == "triton" and DEVICE == "cpu" else 700, 40, dtype, True)
    M = 2 * len(z1)
    t = torch.tensor(0.2, device=DEVICE)
    g = torch.full((M,), 1 / M, device=DEVICE)

    def run():
        loss, lse, q, r = nt_xent_fwd(z1, z2, t, True, 0, backend=backend)
        return loss, lse, q, r, *nt_xent_bwd(g, torch.zeros_like(g), z1, z2, t, lse, q, True, backend=backend)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.skipif("native" not in BACKENDS or DEVICE != "cpu", reason="instruction sets of CPUs")
@pytest.mark.parametrize("capability", ("portable", "avx2", "avx512", "avx512_bf16_emulated", "amx_emulated"))
def test_other_instruction_sets(capability):
    """What runs natively here, again: with fewer lanes, and in bf16 by instructions that are done in software."""
    files = [__file__, str(Path(__file__).with_name("test_info_nce.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "native and not float16"]
    environment = {**os.environ, "SSL_FAST_CPU_CAPABILITY": capability}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout


@pytest.mark.skipif("native" not in BACKENDS or DEVICE != "cpu", reason="a promise of the C++ kernels on a CPU")
def test_threads_do_not_change_a_bit():
    z1, z2 = pair(700, 40, torch.float32, True)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            z = z1.clone().requires_grad_()
            loss = nt_xent(z, z2, 0.2)
            outputs.append((loss.detach(), *torch.autograd.grad(loss, z)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other, strict=True))


@pytest.mark.parametrize("forward", BACKENDS)
@pytest.mark.parametrize("backward", BACKENDS)
def test_backends_share_what_is_saved(forward, backward):
    z1, z2 = pair(20, 16, torch.float32, True)
    t, g, h = torch.tensor(0.1, device=DEVICE), torch.rand(40, device=DEVICE), torch.rand(40, device=DEVICE)
    _, lse, q, _ = nt_xent_fwd(z1, z2, t, True, 0, backend=forward)
    mixed = nt_xent_bwd(g, h, z1, z2, t, lse, q, True, backend=backward)
    _, lse, q, _ = nt_xent_fwd(z1, z2, t, True, 0, backend="reference")
    plain = nt_xent_bwd(g, h, z1, z2, t, lse, q, True, backend="reference")
    assert max(error(a, b) for a, b in zip(mixed, plain, strict=True)) < 1e-5


@pytest.mark.parametrize("normalize", (True, False))
def test_gradcheck(normalize):
    z1, z2 = (z.requires_grad_() for z in pair(4, 5, torch.float64, True))
    t = torch.tensor(0.3, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def fn(z1, z2, t):
        return nt_xent(z1, z2, t, normalize=normalize, reduction="none", return_lse=True)

    assert torch.autograd.gradcheck(fn, (z1, z2, t))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(backend, dtype):
    z1, z2 = pair(5, 16, dtype, True)
    t = torch.tensor(0.5, device=DEVICE)
    loss, lse, q, _ = nt_xent_fwd(z1, z2, t, True, 0, backend=backend)
    opcheck(torch.ops.ssl_fast.nt_xent_fwd.default, (z1, z2, t, True, 1), {"backend": backend})
    opcheck(torch.ops.ssl_fast.nt_xent_bwd.default, (loss, lse, z1, z2, t, lse, q, True), {"backend": backend})


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_with_a_dynamic_batch(backend):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    criterion = NTXentLoss(torch.nn.Parameter(torch.tensor(0.2, device=DEVICE)))
    compiled = torch.compile(criterion, backend=counting, fullgraph=True, dynamic=True)
    with ssl_fast.backend(backend):
        for N in (6, 9, 17):
            z1, z2 = pair(N, 16, torch.float32, True)
            got, want = (torch.autograd.grad(c(z := z1.clone().requires_grad_(), z2), z) for c in (compiled, criterion))
            assert error(got[0], want[0]) < 1e-6
    assert len(graphs) == 1


def test_inductor():
    torch._dynamo.reset()
    z1, z2 = pair(9, 16, torch.float32, True)
    z1.requires_grad_()
    t = torch.tensor(0.2, requires_grad=True, device=DEVICE)
    compiled = torch.compile(nt_xent, fullgraph=True, dynamic=True)
    got, want = (torch.autograd.grad(fn(z1, z2, t), (z1, t)) for fn in (compiled, nt_xent))
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-6


def test_reductions_and_lse():
    z1, z2 = pair(10, 8, torch.float32, True)
    rows, lse = nt_xent(z1, z2, 0.3, reduction="none", return_lse=True)
    assert rows.shape == lse.shape == (20,)
    torch.testing.assert_close(nt_xent(z1, z2, 0.3), rows.mean())
    torch.testing.assert_close(nt_xent(z1, z2, 0.3, reduction="sum"), rows.sum())


def test_half_inputs_give_an_fp32_loss():
    z1, z2 = pair(10, 8, torch.bfloat16, True)
    assert nt_xent(z1, z2).dtype == torch.float32


def test_autocast_casts_as_a_product_does():
    z1, z2 = pair(30, 16, torch.float32, True)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = nt_xent(z1, z2)
    assert torch.equal(inside, nt_xent(z1.bfloat16(), z2.bfloat16()))


def test_backward_keeps_the_forward_backend():
    z1, z2 = (z.requires_grad_() for z in pair(5, 8, torch.float32, True))
    with ssl_fast.backend("reference"):
        inside = nt_xent(z1, z2)
        expected = torch.autograd.grad(inside, z1, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(inside, z1)[0], expected)


def test_only_what_is_asked_for_gets_a_gradient():
    z1, z2 = pair(5, 8, torch.float32, True)
    t = torch.tensor(0.4, device=DEVICE, requires_grad=True)
    nt_xent(z1, z2, t).backward()
    assert t.grad is not None and z1.grad is None
    z2.requires_grad_()
    nt_xent(z1, z2).backward()
    assert z2.grad is not None and z1.grad is None


def test_a_second_derivative_raises():
    """Autograd would return zero for it, and a gradient penalty would silently do nothing."""
    z1, z2 = pair(6, 8, torch.float32, True)
    z1.requires_grad_()
    loss = nt_xent(z1, z2)
    (gradient,) = torch.autograd.grad(loss, z1, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(nt_xent(z1, z2), z1)[0])
    with pytest.raises(RuntimeError, match="the gradient of a contrastive loss was differentiated"):
        (loss + gradient.pow(2).sum()).backward()


@pytest.mark.skipif(
    sys.platform != "linux" or nt_xent_fwd.reason("native", "cpu", torch.float32) is not None,
    reason="needs RLIMIT_AS and the C++ library",
)
@pytest.mark.parametrize("threads", (1, 2))
def test_a_failed_allocation_is_an_error_and_no_more(threads):
    """Neither a hang, of threads that wait for the one that failed, nor a crash at the next call."""
    code = f"""
import resource, torch
from ssl_fast.functional import nt_xent
torch.set_num_threads({threads})
small = torch.randn(400, 64, requires_grad=True)
expected = torch.autograd.grad(nt_xent(small, small.detach().roll(1)), small)[0]
large = torch.randn(400, 20000, requires_grad=True)
failures = 0
for megabytes in (20, 70, 80, 90, 100, 110, 120):
    loss = nt_xent(large, large.detach())
    used = int(open('/proc/self/statm').read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))
    try:
        torch.autograd.grad(loss, large)
    except (RuntimeError, MemoryError):  # the latter by torch 2.11
        failures += 1
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = torch.autograd.grad(nt_xent(small, small.detach().roll(1)), small)[0]
    assert torch.equal(again, expected)
print(failures)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and int(result.stdout) >= 2, result.stdout + result.stderr


def test_memory_is_linear_in_the_batch():
    """What autograd keeps: the inputs themselves and a few numbers a row, never a matrix."""
    kept = []
    for N in (64, 128, 256):
        sizes = []
        z1, z2 = (z.requires_grad_() for z in pair(N, 16, torch.float32, True))
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            nt_xent(z1, z2, 0.5)
        kept.append(sum(sizes))
    assert kept[0] < 2 * 64 * (16 + 8)
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0])


def test_nothing_holds_the_inputs_after_the_step():
    """A cycle would keep them until the garbage collector comes by, which looks like a leak."""
    z1, z2 = pair(8, 8, torch.float32, True)
    z = z1.clone().requires_grad_()
    alive = weakref.ref(z)
    gc.disable()
    try:
        loss = nt_xent(z, z2)
        loss.backward()
        del z, loss
        assert alive() is None
    finally:
        gc.enable()


@settings(max_examples=25, deadline=None)
@given(N=st.integers(1, 90), D=st.integers(1, 70), t=st.floats(0.02, 5), seed=st.integers(0, 1000))
def test_any_size(N, D, t, seed):
    generator = torch.Generator().manual_seed(seed)
    z1, z2 = (torch.randn(N, D, generator=generator).to(DEVICE) for _ in range(2))
    for backend in BACKENDS:
        if backend != "triton" or DEVICE == "cuda":  # too many to interpret
            check(z1, z2, t, True, backend)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (lambda z: (z, z[:3]), ValueError, r"z2: got shape \(3, 8\), allowed: the shape of z1, \(4, 8\)"),
        (lambda z: (z, z[:, :5]), ValueError, r"z2: got shape \(4, 5\)"),
        (lambda z: (z[:0], z[:0]), ValueError, "z1: got an empty batch"),
        (lambda z: (z[:, :0], z[:, :0]), ValueError, r"z1: got shape \(4, 0\)"),
        (lambda z: (z[0], z[0]), ValueError, r"z1: got shape \(8,\), allowed: \(N, D\)"),
        (lambda z: (z.long(), z.long()), TypeError, "z1: got torch.int64, allowed: float16"),
        (lambda z: (z, z.bfloat16()), TypeError, "z2: got torch.bfloat16, allowed: the dtype of z1"),
        (lambda z: (z.tolist(), z), TypeError, "z1: got list"),
        (lambda z: (z, z, 0.0), ValueError, "temperature: got 0.0, allowed: a float above 0"),
        (lambda z: (z, z, -1), ValueError, "temperature: got -1"),
        (lambda z: (z, z, float("nan")), ValueError, "temperature: got nan"),
        (lambda z: (z, z, torch.ones(2)), ValueError, r"temperature: got torch.float32 of shape \(2,\)"),
        (lambda z: (z, z, torch.tensor(1j)), ValueError, "temperature: got torch.complex64"),
        (lambda z: (z, z, "0.5"), TypeError, "temperature: got '0.5', allowed: a float above 0"),
        (lambda z: (z, z, True), TypeError, "temperature: got True"),
        (lambda z: (z, z, 1e-40), ValueError, "temperature: got 1e-40"),
    ],
)
def test_bad_input_is_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        nt_xent(*arguments(torch.randn(4, 8)))


def test_bad_options_are_named():
    z = torch.randn(4, 8)
    with pytest.raises(ValueError, match="reduction: got 'avg', allowed: 'mean', 'sum', 'none'"):
        nt_xent(z, z, reduction="avg")
    with pytest.raises(ValueError, match="temperature: got 0"):
        NTXentLoss(temperature=0)
    with pytest.raises(ValueError, match="reduction: got 'avg'"):
        NTXentLoss(reduction="avg")
    with pytest.raises(ValueError, match=r"temperature: got torch.float32 of shape \(2,\)"):
        NTXentLoss(torch.ones(2))
    with pytest.raises(ValueError, match="memory_bank_size: got 64"):
        NTXentLoss(memory_bank_size=64)
