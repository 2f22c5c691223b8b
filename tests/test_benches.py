"""What the benches promise: a row for everything public, rows that survive, a README that shows no other numbers."""

import ast
import contextlib
import csv
import gzip
import importlib
import itertools
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Collection
from functools import partial
from inspect import isclass, isroutine
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import matplotlib
import pytest
import torch
from common import NeverWaits
from torch.utils._python_dispatch import TorchDispatchMode

import ssl_fast
from benches import (
    bench_accelerate,
    bench_ema,
    bench_info_nce,
    bench_large_batch,
    bench_nt_xent,
    bench_simclr,
    common,
    compare_findings,
    compare_norms,
    compare_steps,
    compare_views,
    evidence,
    machine,
    memory,
    once,
    plot,
    processes,
    results,
    timing,
)
from ssl_fast import bench as bench_module
from ssl_fast import functional, nn
from ssl_fast.cli import main
from ssl_fast.data import load_data
from ssl_fast.evaluate import knn_on
from ssl_fast.optim import LARS, warmup_cosine
from ssl_fast.run import read_rows

ROOT = Path(__file__).parents[1]

ONCE_A_RUN = "called once a run, or once a command"
REPORTED = "what a call that is timed returns"
# A module of which nothing is in a bench, or what of another is not.
NOTHING_TO_TIME = {
    "BarlowTwins": "an encoder, a head and BarlowTwinsLoss, which is timed",
    "__version__": "a string",
    "cosine_momentum": "a number a step",
    "functional": "a module, whose functions are listed themselves",
    "functional.barlow_twins": "what BarlowTwinsLoss calls",
    "functional.clip": "what CLIPLoss calls",
    "functional.info_nce": "what InfoNCE calls",
    "functional.sup_con": "what SupConLoss calls",
    "nn.SyncBatchNorm": "what convert_sync_batchnorm returns, which is timed",
    "accelerate.Report": REPORTED,
    "accelerate.Site": REPORTED,
    "accelerate.activation_of": ONCE_A_RUN,
    "accelerate.hooked": ONCE_A_RUN,
    "accelerate.norm_act": ONCE_A_RUN,
    "accelerate.obstacle": ONCE_A_RUN,
    "accelerate.passed_by": ONCE_A_RUN,
    "accelerate.restore": ONCE_A_RUN,
    "arguments": ONCE_A_RUN,
    "augment.normalise": "a part of plain_view",
    "augment.plain_view": "the evaluation's view, without a draw: a resize of torch's",
    "augment.policy_named": ONCE_A_RUN,
    "augment.seed_of": "a number a call",
    "bench.bench": "what starts the benches",
    "bench.check_device": ONCE_A_RUN,
    "bench.run_group": "waits for a command",
    "bench.stems": ONCE_A_RUN,
    "cached.check_micro_batch": "compares two numbers",
    "cached.check_rows_of_head": "compares two numbers",
    "cached.fewest_rows": "compares a few numbers",
    "cli": ONCE_A_RUN,
    "data.ImageData": "holds what Loader reads",
    "data.ahead": "a part of Loader, which is timed",
    "data.in_order": "a range of indices",
    "demo.demo": "training runs, and pictures of them",
    "embed": "an encoder's forward passes, which bench_conv_bn times, and files",
    "evaluate": "forward passes, and the searches and probes that have lines of their own",
    "export": ONCE_A_RUN,
    "features": "an encoder's forward passes, which bench_conv_bn times",
    "finetune": "training steps of a user's network by torch's optimizers",
    "fold.FoldReport": REPORTED,
    "fold.FoldedLinear": "torch's Linear, with a check of its input's rank",
    "fold.eval_mode": ONCE_A_RUN,
    "fold.verify": "two forward passes, once",
    "folder": "files, and their decoding by Pillow or nvJPEG",
    "info": ONCE_A_RUN,
    "knn.knn_accuracy": "nearest_neighbours, which is timed, and a count of votes",
    "knn.knn_k": "a number",
    "memory.format_memory": "a text",
    "memory.free_memory": "asks the system, once a run",
    "methods.METHODS": "a table of names",
    "methods.Method": "a recipe of train",
    "methods.barlow_twins.projector": "builds a head, once",
    "methods.moco.moco_v1": "MoCo, which is timed, with other defaults",
    "online": "a linear layer's step beside an encoder's",
    "optim.build_optimizer": ONCE_A_RUN,
    "optim.warmup_cosine": "a number a step",
    "optim.warmup_steps": "a number a step",
    "plan": "counts on fake tensors, once before a run",
    "plots": "pictures, at a run's end",
    "probe": "scikit-learn's regression, or SGD on one linear layer",
    "progress.Console": "prints lines",
    "progress.Interruption": "answers Ctrl-C",
    "progress.Progress": "prints a line",
    "progress.console": "prints lines",
    "progress.counted": "prints a line",
    "report": "a page, at a run's end",
    "run": "files, seeds and checkpoints, which are the disk's time",
    "sync_batch_norm.sync_batch_norm": "what the modules of convert_sync_batchnorm call, which are timed",
}


def defined_in(module: ModuleType) -> dict[str, Any]:
    """By name: its `__all__`, or the functions and classes that it defines and does not hide."""
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and (isclass(v) or isroutine(v))}
    names = getattr(module, "__all__", [k for k, v in own.items() if v.__module__ == module.__name__])
    return {name: getattr(module, name) for name in names}


def everything_public() -> dict[str, dict[str, Any]]:
    """By module, without what an earlier one has: the package's front first. The home pages of `ops` and the launchers
    of `kernels` are public by that front alone."""
    modules = [ssl_fast, functional, nn]
    for found in pkgutil.walk_packages(ssl_fast.__path__, "ssl_fast."):
        if "._" not in found.name and found.name.split(".")[1] not in ("ops", "kernels"):
            modules.append(importlib.import_module(found.name))
    seen: set[int] = set()
    public: dict[str, dict[str, Any]] = {}
    for module in dict.fromkeys(modules):
        fresh = {name: value for name, value in defined_in(module).items() if id(value) not in seen}
        seen |= set(map(id, fresh.values()))
        public[module.__name__.removeprefix("ssl_fast").removeprefix(".")] = fresh
    return public


def used_in(source: str) -> set[int]:
    """What code uses of the package: the identities of names that it imports, and of attributes of its modules."""
    tree, bound = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in (name for name in node.names if name.name.split(".")[0] == "ssl_fast"):
                bound[name.asname or "ssl_fast"] = sys.modules[name.name if name.asname else "ssl_fast"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ssl_fast":
            scope: dict[str, Any] = {}
            exec(ast.unparse(node), scope)
            bound |= {name.asname or name.name: scope[name.asname or name.name] for name in node.names}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in bound:
            found.add(id(bound[node.id]))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(id(getattr(bound.get(node.value.id), node.attr, None)))
    return found


def orphans(public: dict[str, dict[str, Any]], timed: set[int], reasons: Collection[str]) -> tuple[set[str], set[str]]:
    """What is in no bench and has no reason, and the reasons that nothing needs."""
    found, needed = set(), set()
    for module, names in public.items():
        whole = not any(id(value) in timed for value in names.values())  # a reason for all of it will do
        for name, value in names.items():
            key = f"{module}.{name}".removeprefix(".")
            if id(value) not in timed:
                needed.add(covered := module if whole and module in reasons else key)
                found |= {covered} - set(reasons)
    return found, set(reasons) - needed


def test_everything_public_is_in_a_bench():
    """In one that writes rows: by what is used, not by names that happen to be alike."""
    sources = [path.read_text() for path in (ROOT / "benches").glob("*.py")]
    writing = [source for source in sources if re.search(r"(common\.main|results\.save)\(", source)]
    found, needless = orphans(everything_public(), set().union(*map(used_in, writing)), NOTHING_TO_TIME)
    assert not found, f"no bench has {sorted(found)}: add them, or a reason to NOTHING_TO_TIME"
    assert not needless, f"{sorted(needless)} need no reason"


def test_an_orphan_is_found():
    public = everything_public()
    assert {"LARS", "warmup_cosine"} <= public["optim"].keys() and {"Loader"} <= public["data"].keys()
    assert {"EMA", "NTXentLoss"} <= public[""].keys() and "EMA" not in public.get("ops.ema", {})
    code = "import ssl_fast.nn as fast\nfrom ssl_fast.optim import LARS as own\nown(x)\nfast.LayerNorm\nKeyQueue"
    timed = used_in(code)
    assert {id(LARS), id(nn.LayerNorm)} <= timed and id(ssl_fast.KeyQueue) not in timed
    some = {"": {"KeyQueue": ssl_fast.KeyQueue}, "optim": {"LARS": LARS, "warmup_cosine": warmup_cosine}}
    assert orphans(some, timed, {"optim.LARS"}) == ({"KeyQueue", "optim.warmup_cosine"}, {"optim.LARS"})
    assert orphans(some, timed, {"optim"})[0] == {"KeyQueue", "optim.warmup_cosine"}  # part of it is timed
    assert orphans(some, set(), {"optim", "KeyQueue"}) == (set(), set())


def test_every_bench_has_rows():
    """The orphans' test reads code alone: what it finds has been run, too."""
    measured = {row["op"] for row in csv.DictReader(results.RESULTS.open())}
    tables = {module.setup(*case).op for module in common.setups().values() for case in module.cases(True)}
    others = {"large_batch", "live_batch_norm", "ranks", "two_views step", "accelerate"}
    assert tables | others <= measured


class Small(TorchDispatchMode):
    """Refuses what threads would share."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor) or result.is_meta or result.numel() < 10_000, func
        return result


@pytest.mark.parametrize("stem", common.setups())
def test_a_setup_computes_nothing(stem):
    """A fork of its process has none of OpenMP's threads, and waits for them for ever."""
    module = common.setups()[stem]
    for case in [*module.cases(True), *module.cases(False)]:
        with Small():
            keys = [provider.key for provider in module.setup(*case).providers]
        assert len(keys) == len(set(keys)) > 1


@pytest.mark.parametrize("stem", common.setups())
def test_every_row_of_ours_has_a_floor(stem):
    """But for what uses memory, and not time, to the full."""
    module = common.setups()[stem]
    for case in [*module.cases(True), *module.cases(False)]:
        table = module.setup(*case)
        names = {provider.name for provider in table.providers}
        for provider in table.providers:
            if not table.shape.startswith("step of "):
                assert provider.work and (provider.floor or table.providers[0].name) in names, (table.shape, provider)


def test_the_flop_of_networks():
    """Forward and backward by hand; the first layer has no gradient of its input, and groups have no products between
    them."""

    layers = torch.nn

    def network(groups):
        convolutions = layers.Conv2d(3, 8, 3), layers.Conv2d(8, 12, 3, groups=groups)
        return layers.Sequential(*convolutions, layers.Flatten(), layers.Linear(12 * 36, 5))

    for groups in (1, 4):
        first, second, last = 2 * 2 * 8 * 3 * 9 * 64, 2 * 2 * 12 * 8 // groups * 9 * 36, 2 * 2 * 12 * 36 * 5
        make = partial(network, groups)
        assert common.flop_of(make, 2, 3, 10, 10) == first + second + last
        assert common.flop_of(make, 2, 3, 10, 10, backward=True) == 2 * first + 3 * (second + last)


def test_floors_of_whole_steps():
    """Of MoCo by hand: two encoders of which one learns, and two products with the queue."""
    module = common.setups()["moco"]
    network = module.untrained(1)
    query = common.flop_of(lambda: torch.nn.Sequential(network.encoder, network.head).to("meta"), 32, 1, 8, 8)
    stem = 2 * 32 * 32 * 9 * 8 * 8
    assert module.flop_of_a_step(32, 1024, 8) == (3 * query - stem) + query + 4 * 32 * 1024 * 128
    parameters, works = bench_simclr.work_of("resnet18", 32, 8)
    assert parameters == sum(p.numel() for p in bench_simclr.untrained("resnet18").parameters())
    assert works[""] == works["encoder"] + works["loss"] and works["loss"] == 4 * 16**2 * 128
    assert works["optimizer"] / works["ema"] == 20 / 12 and works["data"] == 2 * 8 * 3 * 32 * 32 * 4


TABLE = """
import json
import time
import torch
from benches import common

def step(megabytes):
    return lambda: torch.ones(megabytes << 18).sum()

def too_much():
    raise torch.OutOfMemoryError("out of memory")

def compiled():
    seconds = iter((2.1,))  # of the first call, more than a quick run waits for a second one
    return lambda: time.sleep(next(seconds, 0))

table = common.Table("op", "shape", bytes=1e6, flop=common.SQUARE)
table.providers = [
    common.Provider("copy_", lambda: step(1), work=1.0),
    common.Provider("ours", lambda: step(64), work=2.0, error=lambda: 1e-7),
    common.Provider("theirs", too_much),
    common.Provider("compiled", compiled, compiled=True),
    common.Provider("network", lambda: step(1), work=0.5, floor=common.PRODUCT),
    common.square_product(),
]
print(json.dumps(common.measure(table, 0.0, quick=True)[0]))
"""


@pytest.mark.parametrize("provider", ["plain PyTorch", "ssl_fast"])
def test_each_library_makes_views_in_the_step_of_simclr(provider):
    make, _, _ = bench_simclr.libraries(8)[provider]()
    view1, view2 = make(torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8))
    assert view1.shape == view2.shape == (3, 3, 8, 8) and not torch.equal(view1, view2)


@pytest.mark.parametrize("provider", [compare_steps.OURS, *compare_steps.WORKERS])
def test_whole_steps_count_images_and_waiting(provider):
    lap = compare_steps.run_steps("ConvNet, 32 -> 32", provider, batch=4, ahead=1, timed=2)
    assert lap["images_per_s"] > 0 and 0 < lap["data_wait"] < 1


def test_views_of_torchvision_take_the_place_of_ours_in_training(tmp_path):
    rows = [compare_views.trained(views, 0, "digits", tmp_path, 2, "digits") for views in ("torchvision", "ssl_fast")]
    assert rows[0]["random"] == rows[1]["random"] and all(0.5 < row["kNN"] <= 1 for row in rows)
    ends = [[row["loss"] for row in read_rows(path) if "loss" in row] for path in tmp_path.glob("*/metrics.jsonl")]
    assert len(ends) == 2 and ends[0] != ends[1]
    rows += [{**row, "seed": 1, "kNN": row["kNN"] / 2} for row in rows]
    text = compare_views.page(rows, "title")
    assert "| torchvision | " in text and "| seed 1 |" in text and "no larger than" in text
    assert "LARGER than" in compare_views.page([{**rows[0], "kNN": 0.1}, rows[1]], "title")


@pytest.mark.parametrize("name", [name for name in compare_norms.NORMS if name != "none"])
def test_a_norm_is_compared_over_the_axes_that_it_is_said_to_have(name):
    norm = compare_norms.NORMS[name]
    dims = [i for i, axis in enumerate("NCHW") if axis in norm.axes.split(", ")]
    sizes = (6, 5, 4, 3)
    # Means that differ along every axis: over fewer axes than it says, or more, the sets would not come out normal.
    x = torch.randn(sizes) + sum(5 * torch.randn([n if i == j else 1 for j in range(4)]) for i, n in enumerate(sizes))
    layer = norm.build(5)
    y = layer(x.contiguous(memory_format=torch.channels_last)).detach()
    expected = (x - x.mean(dims, keepdim=True)) * (x.var(dims, correction=0, keepdim=True) + layer.eps).rsqrt()
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    ours = type(layer).__module__.startswith("ssl_fast.")
    assert ours == (name != "layer norm of an image") and type(layer).__name__ in norm.layer
    assert sum(p.numel() for p in layer.parameters()) == 2 * 5


def test_norms_are_compared_from_the_same_weights_and_with_the_untrained_network(tmp_path):
    nets = {name: compare_norms.encoder(name, 1, 3) for name in compare_norms.NORMS}
    convolutions = [[p for p in net.parameters() if p.dim() == 4] for net in nets.values()]
    assert all(len(own) == 4 and all(map(torch.equal, own, convolutions[0])) for own in convolutions)

    row = compare_norms.trained("layer norm of a pixel", 3, tmp_path, 1)
    untrained = knn_on(nets["layer norm of a pixel"], load_data("digits"), torch.device("cpu"))["knn"]
    assert row["untrained"] == pytest.approx(untrained) and row["seed"] == 3 and row["seconds"] > 0
    logged = [line["loss"] for line in read_rows(next(tmp_path.glob("*/metrics.jsonl"))) if "loss" in line]
    assert len(logged) == 5 and row["loss"] == pytest.approx(sum(logged) / 5)

    rows = [{**row, "norm": name, "seed": seed, "kNN": seed / 4} for name in nets for seed in (2, 3)]
    text = compare_norms.block(rows, compare_norms.measured(0.0), "title")
    shown = f"{100 * untrained:.2f} ± 0.00 +[|] 62.50 ± 17.68"
    for name, norm in compare_norms.NORMS.items():
        assert re.search(rf"^[|] {name} +[|] {norm.axes} .* [|] {shown} .*\d +[|]$", text, re.MULTILINE)
    kept = [float(line.split("|")[-2]) for line in text.splitlines() if "±" in line]
    assert len(kept) == 5 and min(kept) == kept[-1] > 0  # without a norm
    page = compare_norms.PAGE.read_text()
    assert text in plot.with_blocks(page, {"compared": lambda: text})
    assert all(f"| {norm.axes} |" in page for name, norm in compare_norms.NORMS.items() if name != "none")


def test_norms_that_were_trained_are_kept(tmp_path, monkeypatch):
    page, called, interrupted = tmp_path / "norms.md", [], {("instance norm", 1)}
    page.write_text("before\n<!-- compared -->\nold\n<!-- /compared -->\nafter\n")

    def trained(name, seed, out, epochs):
        if (name, seed) in interrupted:
            raise KeyboardInterrupt
        called.append((name, seed))
        return {"norm": name, "seed": seed, "loss": 5.0, "untrained": 0.5, "kNN": 0.75, "seconds": 2.0}

    monkeypatch.setattr(compare_norms, "PAGE", page)
    monkeypatch.setattr(compare_norms, "trained", trained)
    steps = {name: {"ms a step": 1.5, "MB kept": 2.5} for name in compare_norms.NORMS}
    monkeypatch.setattr(compare_norms, "measured", lambda seconds: steps)
    monkeypatch.setattr(sys, "argv", ["compare_norms", f"out={tmp_path}"])
    with pytest.raises(KeyboardInterrupt):
        compare_norms.main()
    assert len(called) == 8 and "old" in page.read_text()

    interrupted.clear()
    compare_norms.main()
    assert len(called) == len(set(called)) == 15  # none a second time
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "seeds 0, 1, 2" in text

    monkeypatch.setattr(sys, "argv", ["compare_norms", f"out={tmp_path}", "--quick"])
    compare_norms.main()
    assert page.read_text() == text and "seeds 0;" in (tmp_path / "1_epochs" / "norms.md").read_text()


def test_a_table_is_measured(tmp_path):
    command = [sys.executable, "-c", TABLE]  # measure() forks its process, which must not have computed anything
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    floor, ours, theirs, compiled, network, product = json.loads(output.splitlines()[-1])
    assert timing.summary([1.0, 2.0, 9.0]) == {"ms": 2.0, "ms_p20": 1.4, "ms_p80": pytest.approx(6.2)}  # none is beyond
    assert ours["ms_p20"] <= ours["ms"] <= ours["ms_p80"] and ours["to"] == "copy_" and ours["error"] == 1e-7
    assert ours["ratio"] == pytest.approx(ours["ms"] / floor["ms"]) == pytest.approx(2 * ours["x_floor"])
    assert ours["gb_per_s"] == pytest.approx(2e6 / ours["ms"] / 1e6) and "tflops" not in ours
    assert network["x_floor"] == pytest.approx(2 * network["ms"] / product["ms"]) and network["to"] == "copy_"
    assert network["tflops"] * network["x_floor"] == pytest.approx(product["tflops"])
    assert "gb_per_s" not in network and "extra_mb" in network and "extra_mb" not in product
    if machine.DEVICE == "cpu":
        assert 60 < ours["extra_mb"] < 80
    assert "ms" not in theirs and theirs["provider"] == "theirs"  # the others are measured
    assert compiled["ms_p80"] < 2000

    path = tmp_path / "rows.csv"
    path.write_text("op,shape,dtype,provider,allocator,device,ms\nop,other,float32,ours,default,here,3\n")
    results.save([floor, ours, theirs], path=path)
    results.save([ours], path=path)
    rows = list(csv.DictReader(path.open()))
    assert [(r["shape"], r["provider"]) for r in rows] == [("other", "ours"), ("shape", "ours")]
    assert rows[0]["ms"] == "3" and rows[0]["x_floor"] == "" and rows[1]["commit"] and rows[1]["date"]


WITHOUT_MEMORY = """
import json, sys
import torch
from benches import common

def step(megabytes):
    return lambda: torch.ones(megabytes << 18).sum()

def too_much():
    raise torch.OutOfMemoryError("out of memory")

lacking = sys.argv[1]
found = [common.Provider("plain", lambda: step(1), work=1.0, floor=common.PRODUCT),
         common.Provider("ssl_fast", lambda: step(1), work=1.0, floor=common.PRODUCT),
         common.Provider(common.PRODUCT, lambda: step(1), work=1.0, floor=common.PRODUCT)]
for p in found:
    p.build = too_much if p.name == lacking else p.build
print(json.dumps(common.measure(common.Table("op", "shape", found, flop=1e9), 0.0, quick=True)[0]))
"""


@pytest.mark.parametrize("lacking", ["plain", common.PRODUCT])
def test_what_others_are_held_against_may_run_out_of_memory(lacking):
    """Their times are there all the same."""
    command = [sys.executable, "-c", WITHOUT_MEMORY, lacking]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    rows = {row["provider"]: row for row in json.loads(output.splitlines()[-1])}
    assert "ms" not in rows[lacking] and all("ms" in row for name, row in rows.items() if name != lacking)
    assert ("ratio" in rows["ssl_fast"]) == (lacking != "plain")
    assert ("x_floor" in rows["ssl_fast"]) == (lacking != common.PRODUCT)


def test_the_floor_of_large_batches_is_in_blocks(monkeypatch):
    """Of the same product, to the last row."""
    monkeypatch.setattr(common, "LARGEST_PRODUCT", 4 * 7 * 3)
    outputs = common.product_of(8, 7, 5).build()()
    assert [tuple(block.shape) for block in outputs] == [(3, 7), (3, 7), (2, 7)]


def test_the_truth_of_nt_xent_is_dense():
    z1, z2 = (z.detach().double().requires_grad_() for z in bench_nt_xent.embeddings(600, 5, "bfloat16"))
    dense = torch.autograd.grad(bench_nt_xent.dense(z1, z2), z1)
    assert common.relative_error([bench_nt_xent.truth(600, 5, "bfloat16")], dense) < 1e-14


KILLED = """
import os, signal, sys, time
from benches import common, results

def setup(name):
    def build():
        if name == "killed":
            os.kill(os.getppid(), signal.SIGKILL)  # of the case's process: this is a fork for the memory
        if name == "wrong":
            os._exit(3)
        if name == "slow":
            print("slow", flush=True)
            time.sleep(60)
        if name == "stopped":
            os.killpg(0, signal.SIGINT)  # as Ctrl-C does
            time.sleep(60)
        return lambda: None
    return common.Table("op", name, [common.Provider("ours", build)])

results.ROOT = results.Path(sys.argv.pop())
results.QUICK_RESULTS, results.RESULTS = (results.ROOT / name for name in ("rows.csv", "tracked.csv"))
sys.argv.append("--quick")
sys.modules["__main__"].__spec__ = common.__spec__
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background ignores
cases = [(name,) for name in sys.argv.pop(1).split()]
common.main("About.", lambda quick: cases, setup)
"""


def run_killed(cases, folder):
    command = [sys.executable, "-c", KILLED, cases, str(folder)]
    options = {"cwd": ROOT, "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}, "start_new_session": True}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_ctrl_c_keeps_the_rows_so_far(tmp_path):
    """And is no failure of a provider."""
    found = run_killed("good stopped other", tmp_path)
    assert found.returncode == -signal.SIGINT and "without rows" not in found.stderr
    assert [row["shape"] for row in csv.DictReader((tmp_path / "rows.csv").open())] == ["good"]


def test_a_bench_that_is_told_to_end_leaves_no_process(tmp_path):
    """And keeps the rows so far."""
    command = [sys.executable, "-c", KILLED, "good slow", str(tmp_path)]
    options = {"cwd": ROOT, "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}, "start_new_session": True}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    try:
        next(line for line in process.stdout if "slow" in line)  # of the case's process, which this is not
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert [row["shape"] for row in csv.DictReader((tmp_path / "rows.csv").open())] == ["good"]


def test_a_case_whose_process_ends_is_said_and_the_others_go_on(tmp_path):
    """As where the system takes back the memory of one."""
    found = run_killed("killed wrong good", tmp_path)
    assert found.returncode == 1 and "without rows: op, killed, allocator default; op, wrong" in found.stderr
    assert "op, killed, allocator default: signal 9 ended it" in found.stderr
    assert "op, wrong, allocator default, ours, float32: failed, as shown above" in found.stderr
    assert [row["shape"] for row in csv.DictReader((tmp_path / "rows.csv").open())] == ["good"]


BROKEN = """
import signal, sys
from benches import common, results

def setup(lacking, when):
    def broken(name):
        def fail(at):
            if (name, at) == (lacking, when):
                raise NotImplementedError("no kernel\\nof float32")
        def build():
            calls = iter("call call later later later later".split())
            def step():
                fail(next(calls, "late"))
            fail("build")
            fail("compile")
            return step
        def error():
            fail("error")
            return 1e-7
        return common.Provider(name, build, work=1.0, error=error, compiled=when == "compile")
    providers = [broken(name) for name in ("copy_", "theirs", "ours")]
    return common.Table("op", f"{lacking} {when}", providers, bytes=1e6)

results.ROOT = results.Path(sys.argv.pop())
results.QUICK_RESULTS, results.RESULTS = (results.ROOT / name for name in ("rows.csv", "tracked.csv"))
sys.argv.append("--quick")
sys.modules["__main__"].__spec__ = common.__spec__
cases = [(name, when) for when in sys.argv.pop(1).split() for name in ("copy_", "theirs")]
common.main("About.", lambda quick: cases, setup)
"""


def test_a_provider_that_fails_has_no_row_and_the_others_do(tmp_path):
    """Wherever it fails; a ratio to it is empty."""
    moments = ("build", "compile", "call", "later", "error")
    command = [sys.executable, "-c", BROKEN, " ".join(moments), str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    said = found.stderr.splitlines()
    for lacking, when in itertools.product(("copy_", "theirs"), moments):
        own = {row["provider"]: row for row in rows if row["shape"] == f"{lacking} {when}"}
        assert own.keys() == {"copy_", "theirs", "ours"} - {lacking}, (lacking, when)
        assert all(row["ms"] and row["error"] and row["to"] == "copy_" for row in own.values())
        assert {bool(row["ratio"] and row["x_floor"]) for row in own.values()} == {lacking != "copy_"}
        name = f"op, {lacking} {when}, allocator default, {lacking}, float32"
        assert said.count(f"{name}: NotImplementedError: no kernel of float32") == 1
        assert name in said[-1]
    assert found.returncode == 1 and len(said) == 11 and said[-1].startswith("without rows: ")


def test_large_batches_go_on_where_a_provider_fails(monkeypatch, capsys):
    """One that a signal ends has run out of memory; without the first row there are no ratios."""
    ends = {"plain PyTorch": ChildProcessError(), "our loss": ChildProcessError(9, "ended by a signal")}

    def apart(work, module, words):
        if end := ends.get(json.loads(words[1])[0]):
            raise end
        return {"ms": 1.0, "extra_mb": 2.0}

    saved = []
    monkeypatch.setattr(processes, "apart", apart)
    monkeypatch.setattr(results, "save", lambda rows, quick: saved.extend(rows))
    failed = bench_large_batch.steps((64,), "1GiB", 64, 0.0, True, set())
    assert len(failed) == 1 and failed[0].startswith("large_batch, ") and failed[0].endswith(", plain PyTorch")
    assert f"{failed[0]}: failed, as shown above" in capsys.readouterr().err
    assert [(row["provider"], row.get("ms")) for row in saved] == [
        ("our loss", None), ("our loss, accelerate", 1.0), ("cached step", 1.0)
    ]  # fmt: skip
    assert not any("ratio" in row for row in saved)


def test_a_gpus_memory_is_given_back_before_the_next_provider(monkeypatch):
    """What the frames of its error hold too."""
    kept: list[weakref.ref] = []

    def too_much():
        large = torch.ones(9)
        large.cycle = large
        kept.append(weakref.ref(large))
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(machine, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: kept.append(kept[0]()))
    assert memory.first_call(too_much) is None
    assert kept[1:] == [None]


class Gpu:
    """A clock of the host and one of a GPU, which works off what the host has launched; in ms."""

    def __init__(self) -> None:
        self.host = self.busy_until = 0.0

    def launch(self, by_host: float, by_gpu: float) -> None:
        self.host += by_host
        self.busy_until = max(self.busy_until, self.host) + by_gpu

    def synchronize(self) -> None:
        self.host = max(self.host, self.busy_until)

    def event(self, enable_timing):
        def record() -> None:
            own.at = max(self.host, self.busy_until)

        own = SimpleNamespace(at=0.0, record=record, synchronize=self.synchronize)
        own.elapsed_time = lambda other: other.at - own.at
        return own


def test_short_kernels_do_not_wait_for_their_launches(monkeypatch):
    """On a GPU; a whole call has a column of its own."""
    gpu = Gpu()
    monkeypatch.setattr(machine, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.launch(0.0, cycles / 2e6))
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(memory, "take_workspaces", lambda: None)
    monkeypatch.setattr(timing, "_empty_l2", lambda: gpu.launch(0.005, 0.1))
    monkeypatch.setattr(memory, "extra_memory", lambda step: float(bool(step())))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: gpu.host / 1e3))

    def kernels(count):
        return lambda: lambda: [gpu.launch(0.005, 0.01) for _ in range(count)]

    table = common.Table("op", "shape", bytes=1e6)
    table.providers = [common.Provider("copy_", kernels(1), work=1.0), common.Provider("ours", kernels(40), work=40.0)]
    (floor, ours), _ = common.measure(table, 0.03)
    assert ours["ms"] == pytest.approx(0.4)
    assert ours["ratio"] == pytest.approx(40) and ours["x_floor"] == pytest.approx(1)
    assert ours["ms_call"] == pytest.approx(0.405) and floor["ms_call"] == pytest.approx(0.015)
    launched = [common.Provider("launches", lambda: lambda: [gpu.launch(0.02, 0.01) for _ in range(40)])]
    (row,), _ = common.measure(common.Table("op", "shape", launched), 0.03)
    assert row["ms"] == pytest.approx(0.4) and row["ms_call"] == pytest.approx(0.81)


def test_a_table_is_resumed_where_rows_of_it_lack(monkeypatch, tmp_path):
    path = tmp_path / "rows.csv"
    table = common.Table("op", "shape", [common.Provider("ours", int), common.Provider("theirs", int, "bfloat16")])
    rows = [{"op": "op", "shape": "shape", "dtype": p.dtype, "provider": p.name} for p in table.providers]
    rows = [row | {"allocator": "default"} for row in rows]
    assert not common.saved(table, "default", path=path)
    results.save(rows[:1], path=path)
    assert not common.saved(table, "default", path=path)
    results.save(rows, path=path)
    assert common.saved(table, "default", path=path) and not common.saved(table, "warm", path=path)
    here = results.conditions() | {"commit": "another"}
    monkeypatch.setattr(results, "conditions", lambda: here)
    assert not common.saved(table, "default", path=path)


@pytest.mark.parametrize(
    "words, message",
    [
        ("nt_xnt", "op: got 'nt_xnt', did you mean 'nt_xent'? allowed: accelerate, barlow_twins"),
        ("ema device=tpu", "device: got 'tpu', allowed here: cpu"),
        ("ema speed=high", "unknown key 'speed'"),
        ("ema --device tpu --quick", "device: got 'tpu', allowed here: cpu"),
        ("--quick ema --device", "got '--device', allowed: key=value, such as device=..."),
        ("ema -q", "got '-q', allowed: key=value, such as device=..."),
    ],
)
def test_bench_refuses(words, message, capsys):
    assert main(["bench", *words.split()]) in (1, 2)
    assert message in capsys.readouterr().err


def test_an_installed_package_has_no_benches(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_module, "ROOT", tmp_path)
    assert main(["bench"]) == 1
    assert "clone it and run `ssl-fast bench`" in capsys.readouterr().err


def test_bench_runs_each_op_and_says_what_failed(monkeypatch, tmp_path, capfd):
    (tmp_path / "benches").mkdir()
    (tmp_path / "benches/bench_good.py").write_text("import sys; print('row of', *sys.argv[1:])")
    (tmp_path / "benches/bench_bad.py").write_text("raise SystemExit(3)")
    interrupt = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    (tmp_path / "benches/bench_stopped.py").write_text(interrupt)
    monkeypatch.setattr(bench_module, "ROOT", tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background ignores
    for words in ("good quick=true", "good --quick", "--quick --device cpu good"):
        assert main(["bench", *words.split()]) == 0
        assert "row of --quick" in capfd.readouterr().out
    assert main(["bench", "bad", "good"]) == 1
    output = capfd.readouterr()
    assert "failed, as said above: bad" in output.err and "row of" in output.out
    assert main(["bench", "stopped"]) == 130
    signal.signal(signal.SIGINT, before)


def test_evidence_goes_on_where_it_stopped(monkeypatch, tmp_path):
    def python(code):
        return [sys.executable, "-c", code]

    steps = {"good": python("import time; time.sleep(1)"), "bad": python("raise SystemExit(1)")}
    steps |= {"absent": ["no-such-tool"], "slow": python("import time; time.sleep(60)"), "last": python("")}
    monkeypatch.setattr(evidence, "steps_of", lambda part, out: steps)
    monkeypatch.setattr(evidence, "MINUTES", 6 / 60)

    def states():
        return {k: v["state"] for k, v in json.loads((tmp_path / "tests.json").read_text()).items()}

    first = {"good": "ok", "bad": "failed"}
    assert evidence.run("tests", tmp_path) == evidence.MORE and states() == first
    assert evidence.run("tests", tmp_path) == evidence.MORE  # even alone it takes too long, and what is left is nothing
    assert states() == {**first, "slow": "no time"}
    assert evidence.run("tests", tmp_path) == 1 and states()["last"] == "ok"
    summary = (tmp_path / "summary.md").read_text()
    assert len(list(tmp_path.iterdir())) == 3 and "- bad: failed\n- slow: no time\n" in summary
    assert "## tests: 2 of 5 passed, 0 not run, 1 whose tool is not installed" in summary
    assert all(str(value) in summary for value in results.conditions().values())


@pytest.mark.parametrize("part, into_the_last", [("tests", 80), ("bench", 32)])
def test_a_part_ends_within_its_minutes(part, into_the_last, monkeypatch, tmp_path):
    """The pages of new rows included."""
    clock, ran = [0.0], []

    def run_group(command, seconds, **_):
        wanted = float(command[1])
        ran.append((command[1:], min(wanted, seconds)))
        clock[0] += ran[-1][1]
        results.RESULTS.write_text(results.RESULTS.read_text() + "another\n")
        if wanted > seconds:
            raise subprocess.TimeoutExpired(command, seconds)
        return 0

    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.csv")
    results.RESULTS.write_text("commit\n")
    (out := tmp_path / "out").mkdir()
    monkeypatch.setattr(evidence, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(evidence, "run_group", run_group)
    monkeypatch.setattr(evidence, "PAGES", ["true", "1000", "pages"])
    monkeypatch.setattr(evidence, "steps_of", lambda part, out: {name: ["true", "200", name] for name in "abc"})
    assert evidence.run(part, out) == evidence.MORE
    pages = [(["1000", "pages"], 48)] if part == "bench" else []
    assert ran == [(["200", "a"], 200), (["200", "b"], 200), (["200", "c"], into_the_last), *pages] and clock[0] == 480
    ran.clear()
    assert evidence.run(part, out) == int(part == "bench") and ran[0] == (["200", "c"], 200)  # as no pages are drawn


def test_a_part_leaves_at_most_eight_files(tmp_path):
    """Its state and its log, the summary, the Makefile's word of the machine, the rows; and what those steps write that
    are told where."""
    for part in evidence.PARTS:
        steps = evidence.steps_of(part, tmp_path)
        told = sorted(name for name, command in steps.items() if str(tmp_path) in command)
        expected = {"train": ["profile of moco", "profile of simclr"], "bench": ["accelerate"]}
        assert told == expected.get(part, [])
    files_of_a_profile, files_of_curves = 2, len(bench_accelerate.MODELS)
    assert 4 + max(2 * files_of_a_profile, 1 + files_of_curves) <= 8


@pytest.mark.parametrize("statuses, status", [([0, 0, 0, 0], 0), ([1, 0, 0, 0], 1), ([1, 0, evidence.MORE, 0], 75)])
def test_all_parts_one_after_the_other(statuses, status, monkeypatch, tmp_path, capsys):
    def run(part, out):
        ran.append((part, out))
        evidence.summarise(out)
        return statuses[len(ran) - 1]

    ran: list[tuple[str, Path]] = []
    monkeypatch.setattr(evidence, "run", run)
    monkeypatch.setattr(sys, "argv", ["evidence", "all", str(tmp_path / "new" / "out")])
    assert evidence.main() == status
    assert ran == [(part, tmp_path / "new" / "out") for part in ("tests", "train", "bench", "sanitize")]
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("## ")] == [
        "## tests", "## train", "## bench", "## sanitize"
    ]  # fmt: skip


def test_the_sanitizer_of_the_toolkit_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert evidence.sanitizer() == "compute-sanitizer"
    assert evidence.not_installed({"memcheck": [evidence.sanitizer()]}) == {"memcheck"}
    (tmp_path / "bin").mkdir()
    (tool := tmp_path / "bin/compute-sanitizer").write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert evidence.sanitizer() == str(tool) and not evidence.not_installed({"memcheck": [str(tool)]})


def test_evidence_is_of_one_commit(monkeypatch, tmp_path):
    """What passed at it is left out; what did not, or had no tool, is tried again."""
    repaired, tool, out = tmp_path / "repaired", tmp_path / "tool", tmp_path / "out"
    out.mkdir()
    steps = {"good": ["true"], "bad": ["test", "-e", str(repaired)], "absent": [str(tool)]}
    monkeypatch.setattr(evidence, "steps_of", lambda part, out: steps)

    def at(commit, *expected):
        """The exit status, and which steps ran."""
        here = results.conditions() | {"commit": commit}
        monkeypatch.setattr(results, "conditions", lambda: here)
        (out / "tests.log").write_text("")
        status = evidence.run("tests", out)
        ran = [line.split()[1] for line in (out / "tests.log").read_text().splitlines() if line.startswith("$")]
        assert all(line in (out / "summary.md").read_text() for line in expected)
        return status, ran

    lacks = "0 not run, 1 whose tool is not installed"
    assert at("a", f"1 of 3 passed, {lacks}", "- bad: failed", "- absent: tool is not installed") == (
        1,
        ["true", "test"],
    )
    repaired.touch()
    assert at("a", f"2 of 3 passed, {lacks}") == (0, ["test"])  # what has no tool here is no failure
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert at("a", "3 of 3 passed, 0 not run") == (0, [str(tool)])
    assert at("a") == (0, [])
    assert at("b") == (0, ["true", "test", str(tool)])
    repaired.unlink()
    assert at("c", "2 of 3 passed") == (1, ["true", "test", str(tool)])
    repaired.touch()

    def cut(path, text):
        path.write_bytes(text[:5].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "summarise", lambda out: None)
    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        evidence.run("tests", out)
    assert evidence.tried("tests", out)["bad"]["state"] == "failed"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_two_changed_trees_are_not_one(monkeypatch, tmp_path):
    """Nor is a tree without git taken for another; a copy is told what it is of."""
    (tmp_path / "benches").mkdir()
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "benches/results.csv")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    source = tmp_path / "benches/some.py"
    source.write_text("1")
    unknown = results._commit()
    assert unknown.startswith("unknown-dirty-")
    source.write_text("2")
    assert results._commit() != unknown
    monkeypatch.setenv("SSL_FAST_COMMIT", "1234567")
    assert results._commit() == "1234567"
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    clean = results._commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    changed = set()
    for text in "34":
        source.write_text(text)
        changed.add(results._commit())
    assert len(changed) == 2 and all(commit.startswith(f"{clean}-dirty-") for commit in changed)
    (tmp_path / "tests").mkdir()
    before = evidence.code()
    (tmp_path / "tests/test_it.py").write_text("5")
    assert evidence.code() != before


def test_evidence_counts_new_rows_as_progress(monkeypatch, tmp_path):
    """A bench that is longer than a part is cut, and goes on."""
    rows = tmp_path / "results.csv"
    rows.write_text("commit\n")
    commit = results.conditions()["commit"]
    code = f"n=$(wc -l < {rows}); echo {commit} >> {rows}; [ $n = 2 ] || sleep 60"
    monkeypatch.setattr(evidence, "steps_of", lambda part, out: {"long": ["sh", "-c", code]})
    monkeypatch.setattr(evidence, "MINUTES", 1 / 60)
    monkeypatch.setattr(results, "RESULTS", rows)
    drawn = tmp_path / "drawn"
    monkeypatch.setattr(evidence, "PAGES", ["cp", str(rows), str(drawn)])
    assert evidence.run("bench", tmp_path) == evidence.MORE
    for copy in (drawn, tmp_path / "rows.csv"):  # of the rows so far too
        assert copy.read_text() == rows.read_text() == f"commit\n{commit}\n"
    assert evidence.run("bench", tmp_path) == 0
    assert drawn.read_text() == rows.read_text() == f"commit\n{commit}\n{commit}\n"
    drawn.unlink()
    assert evidence.run("bench", tmp_path) == 0 and not drawn.exists()  # nothing new to show


def test_evidence_resumes_the_benches_that_can(tmp_path):
    for name, command in evidence.steps_of("bench", tmp_path).items():
        source = (ROOT / f"benches/{command[2].removeprefix('benches.')}.py").read_text()
        assert ("--resume" in command) == ("common.main(" in source or '"--resume"' in source), name


def test_evidence_takes_what_shows_most_first(monkeypatch, tmp_path):
    """And leaves nothing out."""
    benches, tests = (evidence.steps_of(part, tmp_path) for part in ("bench", "tests"))
    assert list(benches)[: len(evidence.HEADLINES)] == [f"{stem} {text}" for stem, text in evidence.HEADLINES]
    assert {*bench_module.stems()} == {*list(benches)[len(evidence.HEADLINES) :]}
    assert {f"test_{path.stem.removeprefix('test_')}" for path in (ROOT / "tests").glob("test_*.py")} == tests.keys()
    assert list(tests)[0] == "test_nt_xent" and list(tests)[-1] == "test_aot"
    assert str(tmp_path) in benches["accelerate"]
    for stem, text in evidence.HEADLINES:
        module = common.setups()[stem]
        monkeypatch.setattr(module, "DEVICE", "cuda")
        assert 1 <= sum(text in json.dumps(case) for case in module.cases(False)) <= 2, (stem, text)


@pytest.mark.parametrize(
    "words, ran",
    [
        ("", ["vit_s_16 float32 warm", "vit_s_16 bfloat16 default", "vit_s_16 bfloat16 warm"]),
        ("--only float32", ["vit_s_16 float32 warm"]),
        ("--only resnet50", []),
    ],
)
def test_the_bench_of_accelerate_resumes(words, ran, monkeypatch, tmp_path):
    """It leaves out the rows of this commit, and keeps their curves."""
    found, losses = [], 3 * [0.5]
    conditions = results.conditions()
    monkeypatch.setattr(bench_accelerate, "MODELS", {"vit_s_16": "vit_small_patch16_224"})
    monkeypatch.setattr(bench_accelerate, "DEVICE", "cpu")
    monkeypatch.setattr(results, "conditions", lambda: conditions)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "rows.csv")
    monkeypatch.chdir(tmp_path)

    def child(allocator, what, *given):
        if what == "bench":
            name, dtype, batch, pixels = given[:4]
            found.append(f"{name} {dtype} {allocator}")
            table = bench_accelerate.table_of(name, dtype, batch, pixels)
            row = {"op": table.op, "shape": table.shape, "ms": 1.0, "curve": losses}
            return [row | {"provider": p.name, "dtype": p.dtype} for p in table.providers]
        return losses if what == "truth" else 1.0

    monkeypatch.setattr(bench_accelerate, "child", child)
    cut = child("default", "bench", "vit_s_16", "float32", *bench_accelerate.cases(False)[0][2:])
    rows = [row | {"allocator": "default"} for row in cut]
    results.save(rows)
    bench_accelerate.write_curves(Path("out"), "vit_s_16", rows)
    found.clear()
    monkeypatch.setattr(sys, "argv", ["bench_accelerate", "--resume", *words.split()])
    bench_accelerate.main()
    assert found == ran
    curves = list(csv.reader((tmp_path / "out/accelerate_vit_s_16.csv").open()))
    assert len(curves) == len(set(map(tuple, curves))) == 1 + (1 + len(ran)) * 2 * 3
    found.clear()
    monkeypatch.setattr(sys, "argv", ["bench_accelerate", *words.split()])
    bench_accelerate.main()
    assert len(found) == len(ran) + (words != "--only resnet50")
    assert len(list(csv.reader((tmp_path / "out/accelerate_vit_s_16.csv").open()))) == len(curves)


@pytest.mark.parametrize(
    "words, message",
    [
        ("nope", "PART: got 'nope', allowed: tests, train"),
        ("check nope", "check: got 'nope', allowed: same bits twice"),
        ("check", "check: got '', allowed: same bits twice"),
    ],
)
def test_evidence_refuses(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evidence", *words.split()])
    assert evidence.main() == 2 and message in capsys.readouterr().err


SANITIZED = """
import importlib
import sys
import torch
from triton.runtime.interpreter import InterpretedFunction
from benches import evidence, once, results
from ssl_fast import _op

launched, ran = set(), set()
implementation = _op.Op._implementation

def found(op, deciding, asked):
    tensor = deciding if isinstance(deciding, torch.Tensor) else deciding[0]
    backend, call = implementation(op, deciding, asked)
    ran.add((backend, op.name, tensor.dtype))
    return backend, call

def launch(kernel, grid):
    launched.add(kernel.fn.__module__ + " " + kernel.fn.__name__)
    return lambda *arguments, **options: None

_op.Op._implementation, InterpretedFunction.__getitem__ = found, launch
for op in _op.OPS.values():
    op.native = {"cpu": op.native["cuda"]} if "cuda" in op.native else {}  # what a GPU would have
for stem in dict.fromkeys(stem for stems in evidence.SANITIZED.values() for stem in stems):
    once.once(stem)
for op in _op.OPS.values():
    for dtype in op.native.get("cpu", ()):
        assert ("native", op.name, dtype) in ran, f"no {op.name} on {dtype} by the C++ kernels"
    assert not op.triton or any(("triton", op.name, dtype) in ran for dtype in op.triton_dtypes), op.name
kernels = set()
for path in (results.ROOT / "kernels").glob("*.py"):
    module = importlib.import_module("ssl_fast.kernels." + path.stem)
    kernels |= {module.__name__ + " " + name for name, value in vars(module).items()
                if name.endswith("_kernel") and value.fn.__module__ == module.__name__}
assert len(kernels) > 30 and kernels == launched, kernels ^ launched
"""


def test_every_kernel_is_sanitized():
    """Of both backends: C++ in each dtype that it takes on a GPU, and all that is launched of Triton."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", SANITIZED], cwd=ROOT, env=environment, check=True, timeout=600)


def test_once_refuses(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["once", "nope"])
    assert once.main() == 2 and "STEM: got 'nope', allowed: barlow_twins" in capsys.readouterr().err


@pytest.mark.parametrize("kind", evidence.WHOLE_STEPS)
def test_whole_steps_never_wait_for_the_device(kind, monkeypatch):
    """Forward, backward and the optimizer: what a CUDA graph captures."""
    monkeypatch.setattr(evidence, "DEVICE", "meta")
    (step, _), views = evidence.trainer(kind), evidence.views()
    step(views)
    with NeverWaits():
        step(views)


def test_runs_of_the_same_bits_are_so_in_all_of_their_state(monkeypatch, capsys):
    """A statistic that differs is no less than a loss that does."""
    monkeypatch.setattr(evidence, "WHOLE_STEPS", ("simclr",))
    evidence.same_bits()
    assert re.search(r"simclr, float32: losses .* and \d\d tensors twice", capsys.readouterr().out)
    made, trainer = [], evidence.trainer

    def another_mean(*arguments):
        step, model = trainer(*arguments)
        model.encoder.blocks[0][1].running_mean += len(made)
        made.append(model)
        return step, model

    monkeypatch.setattr(evidence, "trainer", another_mean)
    with pytest.raises(AssertionError, match="running_mean"):
        evidence.same_bits()


@pytest.mark.parametrize("ours, holds", [(1.9e-3, True), (2.1e-3, False)])
def test_the_error_of_fp32_products_is_held_to_plain_pytorchs(ours, holds, monkeypatch, capsys):
    """Whatever PyTorch's switch says."""
    table = common.Table("nt_xent", "shape")
    for name, error in (("ssl_fast", ours), ("dense PyTorch", 1e-3)):
        table.providers.append(common.Provider(name, lambda: lambda: None, error=lambda error=error: error))
    monkeypatch.setattr(common, "setups", lambda: {"nt_xent": SimpleNamespace(setup=lambda *case: table)})
    monkeypatch.setattr(evidence, "PRODUCTS", {"nt_xent": [(8, 8)]})
    before = torch.get_float32_matmul_precision()
    try:
        with contextlib.nullcontext() if holds else pytest.raises(AssertionError, match="highest"):
            evidence.tf32()
    finally:
        torch.set_float32_matmul_precision(before)
    said = capsys.readouterr().out
    assert "highest nt_xent shape, ssl_fast: " in said and ("high nt_xent shape, dense" in said) == holds


GROUP = """
import signal, subprocess, sys, time
from ssl_fast.bench import run_group

class Popen(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        time.sleep(float(sys.argv[1]))  # as on a busy machine, where what was started is first to run

subprocess.Popen = Popen
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored
print(run_group(["sh", "-c", "trap '' TERM; sleep 60 & echo $!; trap - TERM; sleep 60"]))
"""


@pytest.mark.parametrize("late", [0, 0.5])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_bench_ends_with_what_started_it(signum, late):
    command = [sys.executable, "-c", GROUP, str(late)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = Path("/proc", process.stdout.readline().strip(), "status")

    def alive():
        try:
            return "State:\tZ" not in child.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False

    assert alive()
    process.send_signal(signum)
    assert process.wait(30) == (-signum if signum == signal.SIGINT else 128 + signum)
    deadline = time.monotonic() + 5
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()


RANKS = """
import sys
from benches import bench_ranks, machine

machine.DEVICE = "cuda"  # as on a machine with a GPU
sys.argv = ["bench_ranks", "--worker", "0", "1", sys.argv[1], "64", "32"]
bench_ranks.main()
print(machine.device_name())
"""


def test_the_bench_of_ranks_is_of_the_cpu(tmp_path):
    command = [sys.executable, "-c", RANKS, str(tmp_path)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    found, device = output.splitlines()[-2:]
    assert json.loads(found)["gather"]["ms"] > 0 and machine.cpu_name() in device


# ---- the peers

# By the package that is imported: what the README calls it.
PEERS = {"info_nce": "info-nce-pytorch", "pytorch_metric_learning": "pytorch-metric-learning", "inf_cl": "inf-cl"}
PEERS |= {"ema_pytorch": "ema-pytorch", "sklearn": "scikit-learn", "liger_kernel": "Liger"}


def test_every_peer_is_in_the_readme():
    own = {"torch", "ssl_fast", "benches", "pytest", "matplotlib", "triton", *sys.stdlib_module_names}
    found = set()
    for path in (ROOT / "benches").glob("bench_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            found |= {module.split(".")[0] for module in modules} - own
    assert {"lightly", "inf_cl", "memeff", "liger_kernel", "apex", "ema_pytorch", "timm"} <= found
    line = plot.README.read_text().split("\nPeers have rows")[1].split("\n\n")[0]
    assert all(re.search(rf"\b{PEERS.get(peer, peer)}\b", line) for peer in found), sorted(found)


def test_blockwise_peers_are_offered_on_a_gpu_alone(monkeypatch):
    """And give the loss of CLIP, as they define theirs."""
    from torch.nn import functional as F

    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):  # a loss a row, of one direction
        assert q.shape[1] % head_dim == 0
        return F.cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")

    class MemoryEfficientCLIPLoss:
        def __init__(self, temperature, normalized_inputs=False, stable=True):
            assert normalized_inputs and not stable
            self.temperature = temperature

        def __call__(self, x, y):
            ways = cal_flash_loss(x, y, scale=1 / self.temperature, head_dim=1), cal_flash_loss(y, x, None, 1 / 0.07, 1)
            return sum(ways).mean() / 2

    monkeypatch.setitem(sys.modules, "inf_cl", SimpleNamespace(cal_flash_loss=cal_flash_loss))
    memeff = SimpleNamespace(MemoryEfficientCLIPLoss=MemoryEfficientCLIPLoss)
    monkeypatch.setitem(sys.modules, "memeff", memeff)
    monkeypatch.setattr(bench_info_nce, "DEVICE", "cpu")
    assert not {"inf-cl", "memeff"} & bench_info_nce.clip_losses().keys()
    monkeypatch.setattr(bench_info_nce, "DEVICE", "cuda")
    losses = bench_info_nce.clip_losses()
    for width in (64, 512):
        a, b = (F.normalize(torch.randn(9, width)) for _ in range(2))
        for name in ("inf-cl", "memeff"):
            torch.testing.assert_close(losses[name](a, b), bench_info_nce.dense_clip(a, b))


def test_ema_pytorch_averages_as_ours_does():
    """The tensors that it is given, at every step."""
    EMA = pytest.importorskip("ema_pytorch").EMA
    targets, sources = ([torch.randn(3, 2), torch.randn(5)] for _ in range(2))
    exact = [(t.double(), s.double()) for t, s in zip(targets, sources, strict=True)]
    step, updated = bench_ema.of_ema_pytorch(EMA, targets, sources)
    for count in range(1, 13):
        step()
        kept = bench_ema.MOMENTUM**count
        for found, given, source, (t, s) in zip(updated, targets, sources, exact, strict=True):
            assert found.data_ptr() == given.data_ptr() and torch.equal(source.double(), s)
            torch.testing.assert_close(given, (kept * t + (1 - kept) * s).float())
    for dtype in ("float32", "bfloat16"):
        (provider,) = (p for p in bench_ema.setup("tiny", 1, dtype).providers if p.name == "ema-pytorch")
        assert provider.error() < (1e-6 if dtype == "float32" else 4e-3)


def test_a_peer_that_is_not_installed_has_no_provider(monkeypatch):
    monkeypatch.setitem(sys.modules, "ema_pytorch", None)
    monkeypatch.setattr(common, "ABSENT", {})
    names = [provider.name for provider in bench_ema.setup("tiny", 1, "float32").providers]
    assert "ema-pytorch" not in names and "ssl_fast EMA" in names
    assert isinstance(common.ABSENT["ema-pytorch"], ImportError)


PEERLESS = """
import sys
from benches import common, results

def setup(shape):
    with common.peer("absent"):
        import no_such_module
    with common.peer("of another torch"):
        raise AttributeError("no such operator")
    return common.Table("op", shape, [common.Provider("ours", lambda: lambda: None)])

results.ROOT = results.Path(sys.argv.pop())
results.QUICK_RESULTS, results.RESULTS = (results.ROOT / name for name in ("rows.csv", "tracked.csv"))
sys.argv.append("--quick")
sys.modules["__main__"].__spec__ = common.__spec__
common.main("About.", lambda quick: [("one",), ("two",)], setup)
"""


def test_peers_without_rows_are_said_once(tmp_path):
    """One that is not installed is no failure; one that is, and does not work, is."""
    command, environment = [sys.executable, "-c", PEERLESS, str(tmp_path)], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert [row["shape"] for row in csv.DictReader((tmp_path / "rows.csv").open())] == ["one", "two"]
    assert sorted(found.stderr.splitlines()[:-1]) == [
        "absent has no rows: ModuleNotFoundError: No module named 'no_such_module'",
        "of another torch has no rows: AttributeError: no such operator",
    ]
    assert found.stderr.splitlines()[-1] == "without rows: of another torch" and found.returncode == 1


# ---- the README


def test_the_readme_shows_what_was_measured():
    """Its tables are those that benches/results.csv gives: no number of them is written by hand."""
    readme = plot.README.read_text()
    assert readme == plot.updated(readme) == plot.updated(plot.updated(readme))
    kernels = plot.KERNELS.read_text()
    assert kernels == plot.kernel_page(kernels)
    assert all(f"| {op} " in plot.place_block() for op in plot.WORK)  # measured, or said not to be
    wrong = re.sub(r"(\| \d+\.\d)(\d*) ", r"\g<1>9\2 ", readme, count=1)
    assert wrong != readme != plot.updated(wrong + " ") and plot.updated(wrong) == readme


def test_the_flop_of_norms_is_what_the_page_adds_up():
    """Which the roofline takes."""
    page = plot.KERNELS.read_text()
    sums = re.findall(r"(batch_norm|BN\+ReLU|layer_norm|instance_norm)[^:]*: ((?:\d+ \+ )+\d+) = (\d+)", page)
    assert {op: int(total) for op, _, total in sums} == {k: v for k, v in plot.FLOP_OF_A_NUMBER.items() if k != "ema"}
    assert all(sum(map(int, terms.split(" + "))) == int(total) for _, terms, total in sums)
    table = {line.split()[1]: line.split("|")[2] for line in page.splitlines() if line.endswith("copies |")}
    for op in ("batch_norm", "layer_norm", "instance_norm"):
        assert f" {plot.FLOP_OF_A_NUMBER[op]} a number" in table[op]
    row = {"op": "batch_norm", "dtype": "float32", "gb_per_s": "28"}
    assert plot.roof_point(row | {"shape": "BN+add+ReLU"}) == pytest.approx((20 / 7 / 4, 0.02))
    assert plot.roof_point(row | {"shape": "rows BN+ReLU"})[0] == 23 / 5 / 4


def test_every_picture_is_on_a_page():
    """And every page has its pictures."""
    linked = set()
    for page in (plot.README, *plot.DOCS.glob("*.md")):
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name} shows {target}, which is not there"
            linked.add((page.parent / target).name)
    pictures = {path.name for path in plot.DOCS.iterdir() if path.suffix in (".png", ".svg")}
    assert "simclr_profile.png" in pictures and pictures <= linked, pictures - linked


UNITS = (
    r"(?:[mµun]?s|sec(?:ond)?s?|min(?:ute)?s?|hours?|[kKMGT]i?B|[kKMGT]?bytes|[MGT]B/s|im(?:age|g)s?/s|"
    r"[GMT]?(?:FLOP|flop)(?:/s|S)?|[x×]|-?fold|times|%|percent)"
)
FIGURE = re.compile(rf"(?<![\w.=-])\d[\d.,]*(?:e[+-]?\d+)?[ \u00a0]?{UNITS}(?!\w)")  # not the value of an argument


def test_no_number_of_the_readme_stands_outside_of_the_tables():
    tables = re.compile(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", re.DOTALL)
    text, count = tables.subn("", plot.README.read_text())
    assert count == 7
    measured = FIGURE.findall(text.replace("1% and 10% of the labels", ""))
    assert not measured, f"{measured}: results.csv gives the tables, and the text beside them quotes no figure"
    quoted = ("7.5 ms", "77.8x", "77.8×", "9.9 GB", "12 MiB", "3.3 TFLOPS", "10 µs", "1.5 seconds", "3 min", "2.5-fold")
    quoted += ("2 times", "30%", "1.2 TB/s", "40 images/s", "300 Gflop/s", "1,096 MB")
    assert [FIGURE.fullmatch(figure) is not None for figure in quoted] == [True] * len(quoted)
    assert not FIGURE.findall("memory=24GiB, N=4096 x 128, ResNet-50, 4 files, step 3 is")


def test_figures_of_the_tables_are_in_the_csv():
    cells = {cell for row in csv.reader(results.RESULTS.open()) for cell in row}
    shown = [line.split("|")[5].strip() for line in plot.loss_block().splitlines() if line.startswith("| NT-Xent")]
    assert shown and set(shown) <= cells | {"out of memory"}


def test_pages_leave_out_the_floors_of_whole_steps(monkeypatch, tmp_path):
    rows = list(csv.DictReader(results.RESULTS.open()))
    steps = [row for row in rows if row["op"] in ("simclr", "simclr encoder", "moco", "conv_bn")]
    floors = [row | {"provider": common.PRODUCT, "dtype": "other", "x_floor": "1", "ratio": "0.01"} for row in steps]
    monkeypatch.setattr(results, "RESULTS", tmp_path / "rows.csv")
    with results.RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows + floors)
    readme = plot.README.read_text()
    assert plot.updated(readme) == readme
    assert (plot.DOCS / "simclr.svg").exists() and plot.draw(tmp_path)
    assert f">{common.PRODUCT}<" not in (tmp_path / "simclr.svg").read_text()


@pytest.mark.parametrize("op", ["simclr", "simclr loss", "moco", "batch_norm", "layer_norm", "conv_bn", "nt_xent",
                                "two_views", "two_views step", "large_batch", "ema"])  # fmt: skip
def test_pages_show_what_ran_out_of_memory(op, monkeypatch, tmp_path):
    """Each provider of an op in turn, at all of its shapes; and one that failed has no row there, and no such word."""
    rows = list(csv.DictReader(results.RESULTS.open()))
    measured = ("ms", "ms_p20", "ms_p80", "ratio", "x_floor", "tflops", "gb_per_s", "data_wait", "extra_mb", "error")
    readme = plot.README.read_text()
    monkeypatch.setattr(results, "RESULTS", tmp_path / "rows.csv")
    monkeypatch.setattr(plot, "draw_axes", lambda path: None)  # which is of no rows, and takes seconds
    on_no_page = {*plot.FLOORS, "ssl_fast, forward alone"}

    def shown(rows):
        with results.RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, results.COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        return plot.place_block() + plot.large_block() + plot.updated(readme)

    ends = shown(rows).count(plot.OUT_OF_MEMORY)
    for provider in dict.fromkeys(row["provider"] for row in rows if row["op"] == op):
        others = [row for row in rows if (row["op"], row["provider"]) != (op, provider)]
        page = shown(row if row in others else row | dict.fromkeys(measured, "") for row in rows)
        plot.draw(tmp_path)
        told = page.count(plot.OUT_OF_MEMORY) > ends
        assert told or op.startswith("simclr ") or provider in on_no_page, provider
        assert shown(others).count(plot.OUT_OF_MEMORY) <= ends, provider


@pytest.mark.parametrize("whole", [False, True])
def test_pages_show_a_device_of_which_not_all_is_there(whole, monkeypatch, tmp_path):
    """After the first cases of a bench, or where the plain loss ran out of memory at the largest batch."""
    rows = list(csv.DictReader(results.RESULTS.open()))
    few = [row | {"device": "another"} for row in rows if row["device"] == rows[-1]["device"]]
    if not whole:
        few = [r for r in few if (r["op"], r["dtype"]) in (("nt_xent", "float32"), ("batch_norm", "bfloat16"))]
    for row in few:
        if row["provider"] == "dense PyTorch" and "N=16384" in row["shape"]:
            row |= dict.fromkeys(("ms", "ms_p20", "ms_p80", "ratio", "x_floor", "tflops"), "")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "rows.csv")
    with results.RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows + few)
    assert "\nanother, " in plot.updated(plot.README.read_text()) and "\nanother, " in plot.place_block()
    assert plot.draw(tmp_path)


def test_pictures_come_out_the_same(tmp_path):
    """Twice to the byte, and those of docs/ are the rows' own."""
    (tmp_path / "again").mkdir()
    for path, again in zip(plot.draw(tmp_path), plot.draw(tmp_path / "again"), strict=True):
        assert path.read_bytes() == again.read_bytes(), path.name
        assert path.stat().st_size < 200_000
        kept = (plot.DOCS / path.name).read_bytes()
        drawn_here = f"Matplotlib v{matplotlib.__version__},".encode() in kept  # another's lines may differ in a digit
        assert not drawn_here or kept == path.read_bytes(), f"{path.name} is not of the rows: python -m benches.plot"


def test_every_provider_can_be_timed_by_pytest():
    """`pytest benches/` lists them, each by a name of its own; `make test` does not collect them."""
    from benches.test_benches import providers

    assert "benches" not in (ROOT / "pyproject.toml").read_text().split("testpaths")[1].splitlines()[0]
    names = [parameters.id for parameters in providers()]
    tables = [module.setup(*case) for module in common.setups().values() for case in module.cases(True)]
    assert len(set(names)) == len(names) == sum(len(table.providers) for table in tables)


@pytest.mark.parametrize(
    "device, status, said",
    [("cpu", 0, "test_bench[knn-"), ("tpu", 4, "device: got 'tpu', allowed here: cpu")],
)
def test_pytest_takes_a_device(device, status, said):
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "benches/", "-k", "knn", "--device", device]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == status and said in found.stdout + found.stderr


def test_pytest_leaves_a_gpu_alone(monkeypatch):
    from benches.conftest import pytest_configure

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != "")
    for device, visible in ((None, "0"), ("cuda", "0"), ("cpu", "")):
        pytest_configure(SimpleNamespace(getoption=lambda name, device=device: device))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
    with pytest.raises(pytest.UsageError, match="device: got 'cuda', allowed here: cpu;"):
        pytest_configure(SimpleNamespace(getoption=lambda name: "cuda"))


def test_pytest_waits_for_the_device(monkeypatch):
    """What it would time on a GPU otherwise is the launches."""
    from benches.test_benches import test_bench

    done: list[str] = []
    provider = common.Provider("ours", lambda: lambda: done.append("launched"))

    class Benchmark:
        def pedantic(self, step, **_):
            step()

    monkeypatch.setattr(machine, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    test_bench(Benchmark(), common.Table("op", "shape", [provider]), provider)
    assert done == ["launched", "waited"]


def test_a_step_is_profiled(tmp_path):
    command = [sys.executable, "-m", "benches.bench_moco", "--quick", "--profile", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=300)
    with gzip.open(tmp_path / "moco_trace.json.gz") as file:
        assert any(event.get("name") == "aten::convolution" for event in json.load(file)["traceEvents"])
    assert (tmp_path / "moco_profile.png").stat().st_size > 10_000 and len(list(tmp_path.iterdir())) == 2


def test_a_finding_holds_where_every_seed_says_so():
    rows = [
        {"run": "nonlinear", "seed": 0, "seconds": 1, "h kNN": 0.8, "z kNN": 0.7, "h linear": 0.7, "z linear": 0.8},
        {"run": "nonlinear", "seed": 1, "seconds": 1, "h kNN": 0.9, "z kNN": 0.6, "h linear": 0.7, "z linear": 0.6},
        {"run": "random", "seed": 0, "seconds": 1, "h kNN": 0.9, "h linear": 0.5},  # the other seed is not there yet
    ]
    found = {row["claim"]: row for row in (compare_findings.verdict(rows, *claim) for claim in compare_findings.CLAIMS)}
    expected = {
        "h beats z, nonlinear head: kNN": ("20.00 ± 14.14", "2 of 2", "holds"),
        "h beats z, nonlinear head: linear probe": ("0.00 ± 14.14", "1 of 2", "not settled"),
        "pretrained beats random weights: kNN": ("-10.00", "0 of 1", "does not hold"),
        "linear head beats no head: kNN": ("", "0 of 0", "not run"),
    }
    for claim, values in expected.items():
        assert tuple(found[claim].values()) == (claim, *values)
    page = compare_findings.page(rows, "here", 100)
    assert re.search(r"random encoder +[|] 90.00 +[|] 50.00", page)
    assert re.search(r"head nonlinear +[|] 85.00 ± 7.07 +[|] 70.00 ± 0.00", page)
