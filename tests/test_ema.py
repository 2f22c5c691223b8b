"""ema_update_ and EMA: every backend against fp64, what they take and refuse, the CUDA kernel's code on the host."""

from __future__ import annotations

import copy
import ctypes
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from common import DEVICE, assert_close, backends
from torch import Tensor, nn

import ssl_fast
from ssl_fast import EMA, cosine_momentum, ema_update_, update_momentum
from ssl_fast.ops import ema

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOMENTA = (0.0, 0.3, 0.9, 0.999, 1.0)
# Around the kernel's packs (4, 8) and chunk (4096), none at all, and ResNet-50's first weight.
SIZES = (1, 3, 8, 0, 127, 4095, 4096, 4097, 9408, 3 * 4096 + 1)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

gpu = pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str = DEVICE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def oracle(target: Tensor, source: Tensor, momentum: float) -> Tensor:
    return momentum * target.double() + (1 - momentum) * source.double()


def check(targets: list[Tensor], before: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    for i, (target, old, source) in enumerate(zip(targets, before, sources, strict=True)):
        truth = oracle(old, source, momentum)
        plain = torch.lerp(old, source.to(old.dtype), 1 - momentum)
        assert_close(f"target {i} at momentum {momentum}", target, truth, plain, target.dtype)
        if momentum in (0, 1):
            assert torch.equal(target, (source if momentum == 0 else old).to(target.dtype))


CASES = [(dtype, backend) for dtype in FLOATS for backend in backends(ema._update, dtype)]


@pytest.mark.parametrize("kind", ("float", "fp64 tensor", "fp32 tensor"))
@pytest.mark.parametrize("dtype, backend", CASES)
def test_against_fp64(dtype: torch.dtype, backend: str, kind: str) -> None:
    slow = backend == "triton" and INTERPRETED
    for momentum in (0.3, 0.999) if slow else MOMENTA:
        weight = momentum if kind == "float" else torch.tensor(momentum, dtype=getattr(torch, f"float{kind[2:4]}"))
        rounded = float(weight)
        weight = weight.to(DEVICE) if isinstance(weight, Tensor) else weight
        for source_dtype in FLOATS if not slow else (torch.float32, dtype):
            sizes = SIZES[:-2] if slow else SIZES
            targets = [draw((n,), dtype, n) for n in sizes]
            sources = [draw((n,), source_dtype, n + 1) for n in sizes]
            before = [t.clone() for t in targets]
            with ssl_fast.backend(backend):
                ema_update_(targets, sources, weight)
            check(targets, before, sources, rounded)


@pytest.mark.parametrize("backend", backends(ema._update, torch.float32))
def test_one_call_takes_any_mix_of_layouts(backend: str) -> None:
    def tensors(seed: int) -> list[Tensor]:
        image = draw((6, 5, 7, 3), torch.float32, seed)
        return [
            image.contiguous(memory_format=torch.channels_last),
            draw((6, 5, 7, 3), torch.bfloat16, seed + 1),  # its source is channels_last
            draw((40, 30), torch.float32, seed + 2).T,
            draw((40, 30), torch.float16, seed + 3)[::2, ::3],
            draw((9001,), torch.float32, seed + 4)[1:],  # off the 16-byte grid
            draw((), torch.float64, seed + 5),
            draw((64, 64, 1, 1), torch.float32, seed + 6).to(memory_format=torch.channels_last),
        ]

    targets, sources = tensors(0), tensors(100)
    sources[1] = sources[1].contiguous(memory_format=torch.channels_last)
    sources[6] = sources[6].contiguous()
    before = [t.clone() for t in targets]
    strides = [t.stride() for t in targets]
    with ssl_fast.backend(backend):
        ema_update_(targets, sources, 0.9)
    check(targets, before, sources, 0.9)
    assert [t.stride() for t in targets] == strides


@pytest.mark.parametrize("backend", backends(ema._update, torch.float32))
@pytest.mark.parametrize("rounding", ("nearest", "stochastic"))
def test_tensors_may_start_anywhere(rounding: str, backend: str) -> None:
    offsets = (1, 2) if backend == "triton" and INTERPRETED else (1, 2, 3, 4, 7, 8)
    chosen = list(itertools.product(FLOATS, FLOATS, offsets, (0, 1)))
    targets = [draw((75,), to, i)[offset:] for i, (to, _, offset, _) in enumerate(chosen)]
    sources = [draw((75 + more - offset,), d, i + 1)[more:] for i, (_, d, offset, more) in enumerate(chosen)]
    before = [t.clone() for t in targets]
    with ssl_fast.backend(backend):
        ema_update_(targets, sources, 0.9, rounding=rounding)
    if rounding == "nearest":
        return check(targets, before, sources, 0.9)
    for target, old, source in zip(targets, before, sources, strict=True):  # at most one step of its dtype away
        exact = 0.9 * old.double() + 0.1 * source.double()
        assert ((target.double() - exact).abs() <= torch.finfo(target.dtype).eps * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("backend", backends(ema._update, torch.float32))
def test_more_tensors_than_one_table_holds(backend: str) -> None:
    count = 50 if backend == "triton" and INTERPRETED else 1700
    targets = [draw((1 + i % 5,), torch.float32, i) for i in range(count)]
    sources = [draw((1 + i % 5,), torch.float32, i + 1) for i in range(count)]
    before = [t.clone() for t in targets]
    with ssl_fast.backend(backend):
        ema_update_(targets, sources, 0.99)
    check(targets, before, sources, 0.99)


def test_no_tensors() -> None:
    ema_update_([], [], 0.9)


@pytest.mark.parametrize("backend", backends(ema._update, torch.float32))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_one_call_averages_copies_and_rounds(dtype: torch.dtype, backend: str) -> None:
    """What EMA asks of the operator: masters with their roundings, averages, and tensors that are copied."""
    masters = [draw((4, 3, 5, 5), torch.float32, i).contiguous(memory_format=torch.channels_last) for i in range(2)]
    masters.append(draw((5001,), torch.float32, 2))
    masters.append(draw((9, 9), torch.float32, 3))
    copies = [torch.full_like(m, 7, dtype=dtype) for m in masters]
    copies[1] = copies[1].contiguous()  # in another layout than its master
    copies[3] = torch.full((18, 18), 7, dtype=dtype, device=DEVICE)[::2, ::2]
    averages = [draw((40,), torch.float64, 4), draw((0,), torch.float32, 5)]
    integers = [
        torch.zeros(n, dtype=d, device=DEVICE) for n, d in ((3, torch.int64), (77, torch.bool), (4099, torch.uint8))
    ]
    nan = [torch.full((5,), float("nan"), device=DEVICE)]
    targets = [*masters, *averages, *integers, *nan]
    sources = [draw(tuple(m.shape), dtype, 10 + i) for i, m in enumerate(masters)]
    sources += [draw(tuple(a.shape), a.dtype, 20) for a in averages]
    sources += [torch.arange(len(i), device=DEVICE).to(i.dtype) for i in integers]
    sources += [draw((5,), torch.float16, 30)]  # copied over NaN, from another dtype
    before = [t.clone() for t in targets[:6]]
    with ssl_fast.backend(backend):
        ema._update(targets, sources, torch.tensor(0.9, dtype=torch.float64), 6, copies, None)
    check(targets[:6], before, sources[:6], 0.9)
    assert all(torch.equal(c, m.to(dtype)) for c, m in zip(copies, masters, strict=True))
    assert all(map(torch.equal, integers, sources[6:9]))
    assert torch.equal(nan[0], sources[9].float())


# ---- rounding


@pytest.mark.parametrize("backend", [b for b in backends(ema._update, torch.float32) if b != "reference"])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_stochastic_rounding_is_that_of_the_reference(dtype: torch.dtype, backend: str) -> None:
    values = draw((2000,), torch.float64, 0) * torch.logspace(-12, 2, 2000, dtype=torch.float64, device=DEVICE)
    values[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    sources = [values.to(dtype), values[:70].float(), values[:11].double()]
    starts = [torch.zeros(3, device=DEVICE), *[torch.full((len(s),), 0.7).to(DEVICE, dtype) for s in sources]]
    sources = [starts[0], *sources]
    seed = torch.tensor(2**40 + 12345, device=DEVICE)
    # momentum 0 leaves no room for differences in the arithmetic: fp32 and fp64 sources meet 16-bit targets
    for momentum in (0.0, 0.5):
        results = []
        for name in ("reference", backend):
            targets = [t.clone() for t in starts]
            with ssl_fast.backend(name):
                ema._update(targets, sources, torch.tensor(momentum, dtype=torch.float64), 4, [], seed)
            results.append(targets)
        for ours, theirs, source in zip(*results, sources, strict=True):
            same = (ours == theirs) | (ours.isnan() & theirs.isnan()) | source.isinf()  # 1 * inf + 0 * 0.7 may be NaN
            assert same.double().mean() > (0.999 if momentum else 0.99999)


@pytest.mark.parametrize("backend", backends(ema._update, torch.float32))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("value", (1.0 + 2**-12, -3.3e-6, 2.0**-26, 65503.0, 0.0))
def test_stochastic_rounding_keeps_the_mean_and_takes_a_neighbour(
    value: float, dtype: torch.dtype, backend: str
) -> None:
    if backend == "triton" and INTERPRETED and value < 0.0:
        pytest.skip("interpreted: few cases")
    n = 10_000
    target, source = torch.zeros(n, dtype=dtype, device=DEVICE), torch.full((n,), value, device=DEVICE)
    with ssl_fast.backend(backend):
        ema._update([target], [source], torch.tensor(0.0), 1, [], torch.tensor(7, device=DEVICE))
    near = source[0].to(dtype).double().item()
    if near == value:
        assert (target == value).all()
        return
    # From x to the nearest value and from there to the next one on the other side of x, whose bits differ by one.
    bits = source[0].to(dtype).view(torch.int16)
    away = (abs(value) > abs(near)) * 2 - 1
    other = (bits + away).view(dtype).double().item()
    assert {x.item() for x in target.unique()} == {near, other}
    assert abs(target.double().mean().item() - source[0].double().item()) < 4 * abs(other - near) / 2 / n**0.5


def test_stochastic_rounding_follows_the_generator_and_differs_by_tensor() -> None:
    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        targets = [torch.ones(999, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
        for _ in range(2):
            ema_update_(targets, [torch.full((999,), 2.0, device=DEVICE)] * 2, 0.999, rounding="stochastic")
        return targets

    first, again, other = run(0), run(0), run(1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], first[1])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_after_2000_steps_at_0_999_a_16_bit_average_is_where_fp64_is(dtype: torch.dtype) -> None:
    """From 1 towards 1.25 by 2,000 updates: fp64 covers 0.865 of the way, a plain 16-bit average nothing of it."""
    start, end = (nn.Parameter(torch.full((10_000,), x, device=DEVICE, dtype=dtype)) for x in (1.0, 1.25))
    model = nn.ParameterList([start])
    averages = {rounding: EMA(model, 0.999, rounding=rounding) for rounding in ("nearest", "stochastic")}
    plain = start.detach().clone()
    moved = nn.ParameterList([end])
    for _ in range(2000):
        for average in averages.values():
            average.update(moved)
        ema_update_([plain], [end], 0.999)
    covered = 0.25 * (1 - 0.999**2000)
    assert (plain == 1).all()
    master, rounded = averages["nearest"].masters.get_buffer("0"), averages["nearest"].module[0]
    assert ((master - 1) / covered - 1).abs().max() < 0.01
    assert rounded.dtype == dtype and torch.equal(rounded, master.to(dtype))
    assert not averages["stochastic"].masters._buffers
    assert abs((averages["stochastic"].module[0].double().mean() - 1) / covered - 1) < 0.01


def test_fp32_targets_arrive_where_fp64_does_from_16_bit_sources() -> None:
    target, source = torch.ones(8, device=DEVICE), torch.full((8,), 1.125, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(2000):
        ema_update_([target], [source], 0.999)
    assert torch.allclose(target.double(), torch.tensor(1.125 - 0.125 * 0.999**2000, device=DEVICE).double(), rtol=1e-6)


def test_modules() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4)).to(DEVICE)
    average = copy.deepcopy(encoder)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p))
        encoder[1].running_mean.add_(1)
    before = [p.clone() for p in average.parameters()]
    pointers = [p.data_ptr() for p in average.parameters()]
    ema_update_(average, encoder, 0.9)
    check(list(average.parameters()), before, list(encoder.parameters()), 0.9)
    assert [p.data_ptr() for p in average.parameters()] == pointers
    assert torch.equal(average[1].running_mean, torch.zeros(8, device=DEVICE))


def test_a_target_listed_twice_is_updated_once() -> None:
    target = torch.ones(3, device=DEVICE)
    ema_update_([target, target], [torch.zeros_like(target), torch.full_like(target, 9)], 0.5)
    assert torch.equal(target, torch.full_like(target, 0.5))


@pytest.mark.parametrize("backend", backends(ema._update, torch.float32))
def test_a_graph_that_holds_the_old_value_notices(backend: str) -> None:
    weight = torch.ones(3, device=DEVICE, requires_grad=True)
    loss = (weight**3).sum()
    with ssl_fast.backend(backend):
        ema_update_([weight], [torch.zeros_like(weight)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(ema._update.reason("native", "cpu", torch.float32) is not None, reason="no native library")
def test_the_portable_code() -> None:
    environment = {**os.environ, "SSL_FAST_CPU_CAPABILITY": "portable"}
    chosen = "native and (fp64 or layouts or start_anywhere or copies_and_rounds or that_of_the_reference)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout


def test_two_runs_are_equal_to_the_bit() -> None:
    targets, sources = [draw((n,), torch.float32, n) for n in SIZES], [draw((n,), torch.bfloat16, n) for n in SIZES]
    again = [t.clone() for t in targets]
    ema_update_(targets, sources, 0.996)
    ema_update_(again, sources, 0.996)
    assert all(map(torch.equal, targets, again))


def test_opcheck_and_compile() -> None:
    targets, sources = [draw((5, 3), torch.float32, 0)], [draw((5, 3), torch.bfloat16, 1)]
    arguments = targets, sources, torch.tensor(0.9), 1, [draw((5, 3), torch.bfloat16, 2)], None
    torch.library.opcheck(torch.ops.ssl_fast.ema_update_.default, arguments)
    before = [t.clone() for t in targets]
    torch.compile(ema_update_, fullgraph=True, backend="aot_eager")(targets, sources, 0.9)
    check(targets, before, sources, 0.9)


BAD = {
    "momentum: got 1.5": (lambda t, s: (t, s, 1.5), ValueError),
    "momentum: got nan": (lambda t, s: (t, s, float("nan")), ValueError),
    "momentum: got '0.9'": (lambda t, s: (t, s, "0.9"), TypeError),
    r"momentum: got torch.bfloat16 of shape \(\)": (lambda t, s: (t, s, torch.tensor(0.9).bfloat16()), TypeError),
    r"momentum: got torch.float32 of shape \(2,\)": (lambda t, s: (t, s, torch.ones(2)), TypeError),
    "momentum: got device meta": (lambda t, s: (t, s, torch.ones((), device="meta")), ValueError),
    "sources: got 1 tensors": (lambda t, s: (t, s[:1], 0.9), ValueError),
    r"sources\[1\]: got shape \(1,\), allowed: the shape of its target, \(4,\)": (
        lambda t, s: (t, [s[0], s[1][:1]], 0.9),
        ValueError,
    ),
    r"targets\[1\]: got torch.int64": (lambda t, s: ([t[0], t[1].long()], s, 0.9), TypeError),
    r"sources\[0\]: got device meta": (lambda t, s: (t, [s[0].to("meta"), s[1]], 0.9), ValueError),
    "targets, sources: got list and NoneType": (lambda t, s: (t, None, 0.9), TypeError),
    "momentum: got True": (lambda t, s: (t, s, True), TypeError),
    "targets, sources: got list and Linear, allowed: two modules": (lambda t, s: (t, nn.Linear(2, 2), 0.9), TypeError),
    "targets, sources: got Tensor and Tensor": (lambda t, s: (t[0], s[0], 0.9), TypeError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named_and_changes_nothing(message: str) -> None:
    arguments, error = BAD[message]
    targets, sources = [draw((4,), torch.float32, i) for i in range(2)], [draw((4,), torch.float32, 9)] * 2
    before = [t.clone() for t in targets]
    with pytest.raises(error, match=message):
        ema_update_(*arguments(targets, sources))
    assert all(map(torch.equal, targets, before))


def test_modules_of_different_structure() -> None:
    with pytest.raises(ValueError, match="sources: got a module without the parameter 'bias' of targets"):
        ema_update_(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.9)
    with pytest.raises(ValueError, match=r"sources parameter 'weight': got shape \(2, 3\)"):
        ema_update_(nn.Linear(2, 2), nn.Linear(3, 2), 0.9)
    three = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, n), nn.Linear(n, 2, bias=n == 2)) for n in (2, 3)]
    with pytest.raises(ValueError, match=r"sources parameter '1.weight': got shape \(3, 2\)"):  # the first of four
        ema_update_(*three, 0.9)
    first, second = (nn.Sequential(nn.Linear(2, 2, bias=i == 1), nn.Linear(2, 2, bias=i == 0)) for i in range(2))
    with pytest.raises(ValueError, match=r"targets: got a module without the parameter '0.bias' of sources, [^;]*$"):
        ema_update_(first, second, 0.9)
    with pytest.raises(ValueError, match="rounding: got 'up', allowed: 'nearest', 'stochastic'"):
        ema_update_(nn.Linear(2, 2), nn.Linear(2, 2), 0.9, rounding="up")


@pytest.mark.parametrize("backend", backends(ema._update, torch.float32))
def test_a_momentum_of_one_element_and_targets_without_dimensions(backend: str) -> None:
    targets = [torch.ones((), device=DEVICE), torch.ones(2, device=DEVICE, dtype=torch.bfloat16)]
    with ssl_fast.backend(backend):
        ema_update_(targets, [torch.zeros_like(t) for t in targets], torch.tensor([0.5], device=DEVICE))
        with pytest.raises(ValueError, match=r"targets\[1\]: got an expanded tensor"):
            ema_update_([targets[0], targets[1][:1].expand(4)], [targets[0] * 0, torch.zeros(4)], 0.5)
    assert all((t == 0.5).all() for t in targets)


def test_a_momentum_tensor_is_not_checked() -> None:
    target = torch.ones(2, device=DEVICE)
    ema_update_([target], [torch.zeros_like(target)], torch.tensor(2.0, device=DEVICE))
    assert (target == 2).all()


def test_update_momentum_has_lightlys_order() -> None:
    model, average = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = [oracle(a, p, 0.9) for a, p in zip(average.parameters(), model.parameters(), strict=True)]
    update_momentum(model, average, 0.9)
    assert all(torch.allclose(a.double(), e) for a, e in zip(average.parameters(), expected, strict=True))


# ---- EMA


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 6), nn.Linear(6, 6)
    )
    model.add_module("tied", nn.Linear(6, 6, bias=False))
    model.tied.weight = model[5].weight
    model[4].weight.requires_grad_(False)
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]), persistent=False)
    return model.to(DEVICE, memory_format=torch.channels_last)


def step(model: nn.Module, seed: int) -> None:
    """Other weights and statistics, as a training step would leave them; what is frozen stays."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*filter(lambda p: p.requires_grad, model.parameters()), model[1].running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        model[1].num_batches_tracked.add_(1)


@pytest.mark.parametrize("buffers", ("ema", "copy", "none"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_ema_follows_a_model(dtype: torch.dtype, buffers: str) -> None:
    model = network().to(dtype)
    model(torch.randn(2, 3, 6, 6, device=DEVICE, dtype=dtype)).sum().backward()
    average = EMA(model, 0.9, buffers=buffers)
    start = {n: t.detach().double() for n, t in average.module.state_dict().items()}
    expected = dict(start)
    pointers = [t.data_ptr() for t in average.module.state_dict().values()]
    for seed in range(5):
        step(model, seed)
        average.update(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, value in model.state_dict().items():
            value = value.double()
            if name in parameters or (buffers == "ema" and "running" in name):
                expected[name] = 0.9 * expected[name] + 0.1 * value
            elif buffers != "none":
                expected[name] = value
    for name, tensor in average.module.state_dict().items():
        assert_close(name, tensor, expected[name], None, dtype)
        assert tensor.dtype == model.state_dict()[name].dtype
    assert torch.equal(average.module[4].weight, model[4].weight)  # frozen
    assert average.module.tied.weight is average.module[5].weight
    assert average.module.mask[1] == -float("inf")
    assert average.module[0].weight.stride() == model[0].weight.stride()
    assert [t.data_ptr() for t in average.module.state_dict().values()] == pointers
    assert all(not p.requires_grad and p.grad is None for p in average.parameters())
    assert average.num_updates == 5
    output = average.eval()(torch.randn(2, 3, 6, 6, device=DEVICE, dtype=dtype))
    assert output.dtype == dtype and not output.requires_grad and not average.module.training


def test_ema_of_a_model_without_tensors_counts() -> None:
    average = EMA(nn.ReLU())
    average.update(nn.ReLU())
    assert average.num_updates == 1


@pytest.mark.parametrize("rounding", ("nearest", "stochastic"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_ema_resumes_to_the_bit(dtype: torch.dtype, rounding: str) -> None:
    def build() -> EMA:
        return EMA(network().to(dtype), schedule=cosine_momentum(10, 0.9), rounding=rounding)

    model, straight = network().to(dtype), build()
    for seed in range(4):
        step(model, seed)
        straight.update(model)
    resumed = build()
    resumed.update(network().to(dtype))  # a state of its own, to be replaced
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    pickled = pickle.loads(pickle.dumps(straight))
    for seed in range(4, 7):
        step(model, seed)
        for average in (straight, resumed, pickled):
            average.update(model)
    assert straight.num_updates == 7
    for other in (resumed, pickled):
        assert all(
            torch.equal(a, b) for a, b in zip(straight.state_dict().values(), other.state_dict().values(), strict=True)
        )


def test_the_cosine_schedule_is_byols() -> None:
    schedule = cosine_momentum(100)
    values = [schedule(torch.tensor(k)).item() for k in (0, 50, 100, 150)]
    assert values == pytest.approx([0.996, 0.998, 1, 1], abs=1e-15) and schedule(50).item() == values[1]
    model = nn.Linear(3, 3).to(DEVICE)
    average = EMA(model, schedule=cosine_momentum(4, 0.5))
    expected = model.weight.detach().double().clone()
    for k in range(6):
        with torch.no_grad():
            model.weight.fill_(k)
        average.update(model)
        m = 1 - 0.5 * (torch.cos(torch.tensor(torch.pi * min(k / 4, 1), dtype=torch.float64)) + 1) / 2
        expected = m * expected + (1 - m) * k
    assert torch.allclose(average.module.weight.double(), expected, rtol=1e-6)


def test_ema_takes_a_momentum_tensor_and_a_schedule_of_floats() -> None:
    momentum, model = torch.tensor(1.0, device=DEVICE), nn.Linear(3, 3).to(DEVICE)
    by_tensor, by_schedule = EMA(model, momentum), EMA(model, schedule=lambda step: 0.5 if step < 1 else 1)
    with torch.no_grad():
        model.weight.add_(1)
    momentum.fill_(0.5)
    for average in (by_tensor, by_schedule):
        average.update(model)
        assert torch.allclose(average.module.weight, model.weight - 0.5, atol=1e-6)
    with pytest.raises(ValueError, match="schedule: got 3, allowed"):
        EMA(model, schedule=lambda step: 3).update(model)


def test_what_is_written_to_a_16_bit_average_counts() -> None:
    """A checkpoint loaded into .module, or a forward's own statistics: the masters take them over and keep the rest."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(DEVICE, torch.bfloat16)
    average = EMA(model, 0.999)
    with torch.no_grad():
        model[0].weight.add_(1)
    for _ in range(3):
        average.update(model)
    masters = {n: m.clone() for n, m in average.masters.named_buffers()}
    average.to(DEVICE)
    average.module[0].bias.fill_(3)
    model[0].bias.data.fill_(3)
    average.update(model)
    assert (average.masters.get_buffer("0/bias") == 3).all()
    weight = average.masters.get_buffer("0/weight")
    assert torch.allclose(weight, oracle(masters["0/weight"], model[0].weight, 0.999).float(), rtol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_averages_own_forward_counts(dtype: torch.dtype) -> None:
    """torch's batch norm moves its statistics without telling autograd."""
    model = nn.BatchNorm1d(4).to(DEVICE, dtype)
    average = EMA(model, 0.99)
    for seed in range(20):
        average(draw((64, 4), dtype, seed) + 3)
        average.update(model)
    assert (average.module.running_mean.float() > 2).all()


def test_a_mask_is_copied() -> None:
    model = nn.Linear(2, 2).to(DEVICE)
    model.register_buffer("mask", torch.full((3, 3), -torch.inf, device=DEVICE).triu(1))
    average = EMA(model)
    average.update(model)
    assert torch.equal(average.module.mask, model.mask)
    model.mask = torch.zeros(4, 4, device=DEVICE)
    with pytest.raises(ValueError, match="model buffer 'mask': got shape .* buffers='none' leaves buffers alone"):
        average.update(model)


def test_an_ema_narrowed_later_keeps_masters_in_fp32() -> None:
    model = nn.Linear(4, 4).to(DEVICE)
    average = EMA(model, 0.999).half()
    with torch.no_grad():
        model.weight.add_(1)
    for _ in range(10):
        average.update(model.half())
    assert {m.dtype for m in average.masters.buffers()} == {torch.float32}
    assert average.module.weight.dtype == torch.float16
    assert average.num_updates == 10
    average.float().update(model)
    assert not average.masters._buffers and average.module.weight.dtype == torch.float32
    other = copy.deepcopy(model).bfloat16()
    by_hand = EMA(other)
    by_hand.module.half()
    by_hand.update(other)  # whose dtype is another 16-bit one
    assert by_hand.module.weight.dtype == torch.float16


def test_ema_survives_new_parameters_of_the_same_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to(DEVICE)
    average = EMA(model, 0.0)
    average.update(model)
    model[1] = nn.Linear(2, 2).to(DEVICE)
    average.update(model)
    assert torch.equal(average.module[1].weight, model[1].weight)


def untie(model: nn.Module) -> None:
    model.tied.weight = nn.Parameter(model.tied.weight.detach().clone())


def widen(model: nn.Module) -> None:
    model[4] = nn.Linear(8 * 16, 7, device=DEVICE)


def drop_statistics(model: nn.Module) -> None:
    model[1] = nn.BatchNorm2d(8, track_running_stats=False, device=DEVICE)


def narrow_count(model: nn.Module) -> None:
    model[1].num_batches_tracked = model[1].num_batches_tracked.int()


def move_head(model: nn.Module) -> None:
    model[4].to("meta")


def parametrise(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model[4])


STRUCTURES: dict[str, Callable[[nn.Module], object]] = {
    "EMA.module: got a module without the parameter 'tied.weight' of model": untie,
    "model: got a module without the parameter '4.weight' of EMA.module": parametrise,
    "model: got a module without the buffer '1.running_mean'": drop_statistics,
    r"model parameter '4.weight': got shape \(7, 128\), allowed: .* \(6, 128\)": widen,
    "without the parameter '0.weight' .*model._orig_mod": lambda model: torch.compile(model, backend="eager"),
    "model parameter '4.weight': got device meta": move_head,
    "model buffer '1.num_batches_tracked': got torch.int32": narrow_count,
}


@pytest.mark.parametrize("message", STRUCTURES)
def test_ema_refuses_another_structure_and_stays_whole(message: str) -> None:
    average, fitting, model = EMA(network()), network(), network()
    average.update(fitting)
    before = {n: t.clone() for n, t in average.state_dict().items()}
    other = STRUCTURES[message](model) or model
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=message):
            average.update(other)
    assert all(torch.equal(average.state_dict()[n], t) for n, t in before.items())
    average.update(fitting)
    assert average.num_updates == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(momentum=1.1), "momentum: got 1.1"),
        (dict(momentum=-0.1), "momentum: got -0.1"),
        (dict(buffers="average"), "buffers: got 'average', allowed: 'none', 'copy', 'ema'"),
        (dict(rounding="up"), "rounding: got 'up'"),
        (dict(schedule=0.9), "schedule: got 0.9"),
    ],
)
def test_ema_names_a_bad_argument(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        EMA(nn.Linear(2, 2), **arguments)
    with pytest.raises(TypeError, match="model: got list"):
        EMA([])
    with pytest.raises(ValueError, match="steps: got 0"):
        cosine_momentum(0)
    with pytest.raises(ValueError, match="end: got 2"):
        cosine_momentum(5, end=2)
    with pytest.raises(ValueError, match="model: got parameters that are not initialised"):
        EMA(nn.LazyLinear(3))
    with torch.inference_mode(), pytest.raises(ValueError, match="model: got tensors of torch.inference_mode"):
        EMA(nn.Linear(2, 2))
    normed = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    normed(torch.ones(1, 2))
    with pytest.raises(ValueError, match="model: got Linear, which copy.deepcopy refuses"):
        EMA(normed)


# ---- the kernel's code, compiled for the host

HOST = """
#include "ema.h"
using namespace ssl_fast::ema;

static int launch(const Table& table, double momentum, const int64_t* seed) {
  for (uint32_t chunk = 0; chunk < table.chunks; ++chunk) {
    for (int thread = 0; thread < kThreads; ++thread) update(table, chunk, thread, {0, &momentum, false}, seed);
  }
  return table.chunks > 0;
}

extern "C" int run(int count, void** targets, const DType* to, void** sources, const DType* from, const int64_t* numel,
                   int averaged, void** copies, const DType* narrow, double momentum, const int64_t* seed) {
  static Table table;
  table = Table();
  int launches = 0;
  for (int i = 0; i < count; ++i) {
    const Pair pair{targets[i], sources[i], (uint16_t*)copies[i], numel[i], 0, to[i], from[i], narrow[i], i < averaged};
    if (table.add(pair)) continue;
    launches += launch(table, momentum, seed);
    table.next();
    if (!table.add(pair)) return -1;
  }
  return launches + launch(table, momentum, seed);
}

extern "C" int pair_of(int count, const int64_t* numel, uint32_t chunk) {
  static Table table;
  table = Table();
  for (int i = 0; i < count; ++i) {
    if (!table.add({nullptr, nullptr, nullptr, numel[i]})) return -1;
  }
  return chunk < table.chunks ? table.pair_of(chunk) : -2;
}
"""
CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.uint8: 4}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("ema")
    (folder / "host.cpp").write_text(HOST)
    root, include = Path(__file__).parents[1], Path(torch.__file__).parent / "include"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root / 'csrc'}", f"-I{include}"]
    subprocess.run([*command, str(folder / "host.cpp"), "-o", str(folder / "host.so")], check=True)
    return ctypes.CDLL(str(folder / "host.so"))


def run_on_host(
    host: ctypes.CDLL,
    targets: list[Tensor],
    sources: list[Tensor],
    momentum: float,
    averaged: int | None = None,
    copies: tuple[Tensor, ...] = (),
    seed: Tensor | None = None,
) -> int:
    n = len(targets)
    narrow = [*copies, *[None] * (n - len(copies))]
    pointers = [(ctypes.c_void_p * n)(*(t.data_ptr() for t in side)) for side in (targets, sources)]
    types = [(ctypes.c_uint8 * n)(*(CODE[t.dtype] for t in side)) for side in (targets, sources)]
    numel = (ctypes.c_int64 * n)(*(t.numel() for t in targets))
    return host.run(
        n, pointers[0], types[0], pointers[1], types[1], numel, n if averaged is None else averaged,
        (ctypes.c_void_p * n)(*(None if c is None else c.data_ptr() for c in narrow)),
        (ctypes.c_uint8 * n)(*(0 if c is None else CODE[c.dtype] for c in narrow)),
        ctypes.c_double(momentum), ctypes.c_void_p(None if seed is None else seed.data_ptr()),
    )  # fmt: skip


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("offset", [0, 1, 2, 8])
def test_kernel_code_writes_each_element_once_and_nothing_else(host: ctypes.CDLL, offset: int, momentum: float) -> None:
    pairs = [(to, source, n) for to in FLOATS for source in FLOATS for n in SIZES]
    buffers = [draw((n + 32,), to, i, "cpu") for i, (to, _, n) in enumerate(pairs)]
    before = [b.clone() for b in buffers]
    inside = [slice(offset, offset + n) for _, _, n in pairs]
    targets = [b[s] for b, s in zip(buffers, inside, strict=True)]
    sources = [draw((n,), source, i + 1, "cpu") for i, (_, source, n) in enumerate(pairs)]
    assert run_on_host(host, targets, sources, momentum) == 1
    check(targets, [b[s] for b, s in zip(before, inside, strict=True)], sources, momentum)
    for buffer, old, written in zip(buffers, before, inside, strict=True):
        buffer[written] = old[written]
        assert torch.equal(buffer, old)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_code_copies_and_rounds_like_the_operator(host: ctypes.CDLL, dtype: torch.dtype, offset: int) -> None:
    sizes = [5, 4096, 9000]
    masters = [draw((n + 1,), torch.float32, n, "cpu")[offset:] for n in sizes]
    random = [draw((n + 1,), dtype, n, "cpu")[offset:] for n in sizes]
    raw = [torch.zeros(n + 1, dtype=torch.uint8)[offset:] for n in sizes]
    sources = [
        draw((t.numel(),), d, i, "cpu") for i, (t, d) in enumerate(zip(masters + random, FLOATS + FLOATS, strict=False))
    ]
    sources += [torch.arange(t.numel()).to(torch.uint8) for t in raw]
    copies, seed = tuple(torch.zeros(n + 1, dtype=dtype)[offset:] for n in sizes), torch.tensor(-3)
    targets = [*masters, *random, *raw]
    expected = [t.clone() for t in targets]
    expected_copies = [c.clone() for c in copies]
    ema._reference(expected, sources, torch.tensor(0.9, dtype=torch.float64), 6, expected_copies, seed)
    assert run_on_host(host, targets, sources, 0.9, 6, copies, seed) == 1
    for i, (ours, theirs) in enumerate(zip([*targets, *copies], [*expected, *expected_copies], strict=True)):
        if ours.dtype == dtype:
            assert (ours == theirs).double().mean() > 0.999, i  # rounded from fp32 that may differ in its last bit
        assert torch.allclose(ours.double(), theirs.double(), atol=0.02), i


@pytest.mark.parametrize("count, launches", [(0, 0), (1, 1), (800, 1), (801, 2), (2500, 4)])
def test_kernel_code_takes_800_tensors_a_launch(host: ctypes.CDLL, count: int, launches: int) -> None:
    targets, sources = [torch.ones(1 + i % 7) for i in range(count)], [torch.zeros(1 + i % 7) for i in range(count)]
    assert run_on_host(host, targets, sources, 0.5) == launches
    assert all((t == 0.5).all() for t in targets)


def test_kernel_table_finds_tensors_past_32_bits(host: ctypes.CDLL) -> None:
    sizes = [5, 0, 2**33 + 1, 4096, 2**31]
    numel = (ctypes.c_int64 * len(sizes))(*sizes)
    first = 0
    for i in (i for i, n in enumerate(sizes) if n):
        last = first + -(-sizes[i] // 4096) - 1
        for chunk in (first, last):
            assert host.pair_of(len(sizes), numel, ctypes.c_uint32(chunk)) == i
        first = last + 1
    assert host.pair_of(len(sizes), numel, ctypes.c_uint32(first)) == -2
    assert host.pair_of(1, (ctypes.c_int64 * 1)(2**43), ctypes.c_uint32(0)) == -1  # more blocks than a grid has


# ---- on a GPU


@gpu
def test_one_launch_for_a_mix() -> None:
    targets = [draw((n,), dtype, n) for dtype in FLOATS for n in SIZES]
    sources = [t.float() for t in targets]
    with ssl_fast.backend("native"):
        ema_update_(targets, sources, 0.9)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ema_update_(targets, sources, 0.9)
            torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, [e.name for e in kernels]


@gpu
@pytest.mark.parametrize("backend", [b for b in backends(ema._update, torch.float32) if b != "reference"])
def test_cuda_graph_replays(backend: str) -> None:
    target, source, momentum = (
        torch.zeros(5000, device="cuda"),
        torch.ones(5000, device="cuda"),
        torch.full((), 0.5).cuda(),
    )
    with ssl_fast.backend(backend):
        ema_update_([target], [source], momentum)
        target.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ema_update_([target], [source], momentum)
    assert (target == 0).all()
    for _ in range(3):
        graph.replay()
    assert (target == 0.875).all()
    momentum.fill_(0)
    graph.replay()
    assert (target == 1).all()


@gpu
@pytest.mark.parametrize("rounding", ("nearest", "stochastic"))
def test_an_ema_in_a_cuda_graph_is_the_ema_outside(rounding: str) -> None:
    model = network().bfloat16()
    eager, captured = (EMA(model, schedule=cosine_momentum(9, 0.9), rounding=rounding) for _ in range(2))
    eager.update(model)
    captured.update(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.update(model)
    for seed in range(5):
        step(model, seed)
        eager.update(model)
        graph.replay()
    assert all(map(torch.equal, eager.state_dict().values(), captured.state_dict().values()))


def test_past_2_31_elements() -> None:
    n = 2**31 + 4097
    if DEVICE == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    if free < 5 * n:
        pytest.skip(f"needs {5 * n / 2**30:.0f} GiB of memory")
    if DEVICE == "cuda":
        target, source = (torch.zeros(n, dtype=torch.float16, device=DEVICE) for _ in range(2))
    else:  # pages that nobody writes to stay shared
        target, source = (torch.from_numpy(np.zeros(n, np.float16)) for _ in range(2))
    parts = [slice(i, i + 4097) for i in (0, 2**30, 2**31 - 4097, 2**31)]
    for part in parts:
        source[part] = 1
    ema_update_([target], [source], 0.5)
    assert all((target[part] == 0.5).all() for part in parts)
    assert target[2**31 - 4098] == 0
