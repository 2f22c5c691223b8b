"""What follows a model by its operations, torch.compile, torch.export, torch.jit.trace and ONNX, gets graphs of the
norms that take a batch of any size."""

from __future__ import annotations

import io

import pytest
import torch
from common import DEVICE
from test_batch_norm import random
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import ssl_fast.nn as fast

NORMS = {
    "layer": (lambda: fast.LayerNorm(6, activation="relu"), (5, 6)),
    "layer2d": (lambda: fast.LayerNorm2d(4, activation="gelu"), (4, 5, 6)),
    "batch": (lambda: fast.BatchNorm2d(4), (4, 5, 6)),
    "batch_of_its_own": (lambda: fast.BatchNorm2d(4, track_running_stats=False), (4, 5, 6)),
    "splits": (lambda: fast.BatchNorm2d(4, num_splits=2), (4, 5, 6)),
    "instance": (lambda: fast.InstanceNorm2d(4, activation="relu"), (4, 5, 6)),
    "instance_tracking": (lambda: fast.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 5, 6)),
}
BATCHES = (8, 10, 14)  # even, for "splits"; none a number of channels, which torch.compile would take for the same


def each_norm(test):
    test = pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))(test)
    return pytest.mark.parametrize("name", NORMS)(test)


def made(name: str, training: bool) -> tuple[nn.Module, tuple[int, ...]]:
    module, shape = NORMS[name]
    return module().to(DEVICE).train(training), shape


@each_norm
def test_one_compiled_graph_serves_every_batch(name, training):
    norm, shape = made(name, training)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(norm, fullgraph=True, dynamic=True, backend=graphs)
    counts = []
    for n in BATCHES:
        x = random((n, *shape)).requires_grad_()
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y, norm(x))
        counts.append(graphs.frame_count)
    assert len(set(counts)) == 1, counts


@each_norm
def test_export_takes_any_batch(name, training):
    norm, shape = made(name, training)
    batch = torch.export.Dim("batch", min=2, max=64) * (2 if name == "splits" else 1)
    program = torch.export.export(norm, (random((8, *shape)),), dynamic_shapes=({0: batch},))
    for n in BATCHES:
        x = random((n, *shape), seed=n)
        torch.testing.assert_close(program.module()(x), norm(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@each_norm
def test_a_trace_is_of_torchs_own_operators_and_takes_any_batch(name, training):
    norm, shape = made(name, training)
    first = 2 if name == "splits" else 1
    traced = torch.jit.trace(norm, random((first, *shape)))  # gradients and its own check are on
    assert "ssl_fast::" not in str(traced.inlined_graph)
    torch.jit.save(traced, file := io.BytesIO())
    file.seek(0)
    traced = torch.jit.load(file)
    for n in BATCHES:
        x = random((n, *shape), seed=n)
        torch.testing.assert_close(traced(x), norm(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dynamo", (True, False))
@pytest.mark.parametrize("name", NORMS)
def test_onnx_takes_any_batch(name, dynamo):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    norm, shape = made(name, False)
    norm, x = norm.cpu(), random((8, *shape)).cpu()
    if dynamo:
        program = torch.onnx.export(norm, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        file = program.model_proto.SerializeToString()
    else:
        torch.onnx.export(
            norm, (x,), stream := io.BytesIO(), dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}}
        )
        file = stream.getvalue()
    session = runtime.InferenceSession(file)
    for n in (1, *BATCHES):
        x = random((n, *shape), seed=n).cpu()
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), norm(x), atol=1e-5, rtol=1e-5)
