"""What this machine can show of the package, offline, in parts: `python -m benches.evidence PART [OUT]`.

    tests     every test file
    train     whole SimCLR and MoCo steps: the same bits twice, as CUDA graphs, TF32 on and off, profiles
    bench     every bench, rows to benches/results.csv and to OUT, and the pages that show them
    sanitize  every kernel of ours at small shapes under compute-sanitizer's memcheck and racecheck
    all       these, one after the other

A part ends within 8 minutes. What it did not come to is done by the next call, which leaves out what OUT/PART.json has
of this code; once all was tried, a call tries again what did not pass. Each leaves that file, a log, and at most five
files more. OUT/summary.md is the page to read. The exit status is 0 where all passed that this machine has the tools
for, 1 where something did not, and 75 where there is more to do.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ssl_fast
from benches import common, results, timing
from benches.machine import DEVICE
from benches.results import ROOT
from ssl_fast.backbones import ConvNet
from ssl_fast.bench import run_group, stems

MINUTES = 8
MORE = 75
WHOLE_STEPS = ("simclr", "moco")
# Whose tests compile and launch kernels, and those that take long and need no GPU.
OPS = ("nt_xent", "info_nce", "info_nce_one_pass", "batch_norm", "layer_norm", "ema", "barlow_twins", "two_views",
       "conv_bn", "instance_norm", "moco", "simclr", "knn", "op", "all_ops")  # fmt: skip
SLOW_TESTS = ("benches", "packaging", "nvcc", "aot")
# Of a bench, the cases that docs/kernels.md and the README speak of, then every case of every bench.
HEADLINES = (
    ("nt_xent", "[32768, 128]"),
    ("nt_xent", "[4096, 768]"),
    ("info_nce", '"info_nce"'),
    ("batch_norm", '"64x256x56x56", "bfloat16", "channels_last"'),
    ("layer_norm", '"12608x768", "bfloat16"'),
    ("ema", '1, "float32"]'),
    ("simclr", "resnet50"),
    ("two_views", '"256 -> 224", "no blur"'),
    ("barlow_twins", "[2048, 8192]"),
    ("conv_bn", '"resnet50", "bfloat16", "channels_last", 64'),
    ("instance_norm", '"32x64x128x128", "bfloat16", "contiguous"'),
)
BENCHES = ("nt_xent", "info_nce", "moco", "simclr", "ema", "batch_norm", "layer_norm", "barlow_twins", "two_views",
           "knn", "optim", "instance_norm", "modules", "accelerate", "large_batch", "conv_bn", "ranks")  # fmt: skip
# A process each, under compute-sanitizer, where one takes long to start.
SANITIZED = {
    "losses": ("nt_xent", "info_nce", "barlow_twins", "moco"),
    "norms": ("batch_norm", "instance_norm", "layer_norm"),
    "weights and views": ("ema", "conv_bn", "two_views", "knn"),
}
PAGES = [sys.executable, "-m", "benches.plot"]
Steps = dict[str, list[str]]


# ---- the parts, as commands by name


def steps_of(part: str, out: Path) -> Steps:
    """What shows most comes first: a machine may be taken away before the last."""
    python = [sys.executable, "-m"]
    if part == "tests":
        stems_of_all = [file.stem.removeprefix("test_") for file in sorted((ROOT / "tests").glob("test_*.py"))]
        pytest = {stem: [*python, "pytest", "-q", "-rfE", f"tests/test_{stem}.py"] for stem in stems_of_all}
        return {f"test_{stem}": pytest[stem] + spread() * (stem in OPS) for stem in first_of(pytest, OPS, SLOW_TESTS)}
    if part == "sanitize":
        # Errors of kernels alone: PyTorch asks the driver for things that it need not have.
        options = ["--error-exitcode", "9", "--report-api-errors", "no"]
        return {
            f"{tool} of {name}": [sanitizer(), "--tool", tool, *options, *python, "benches.once", *stems]
            for tool in ("memcheck", "racecheck")
            for name, stems in SANITIZED.items()
        }
    if part == "bench":
        whole = {stem: [*python, f"benches.bench_{stem}", "--resume"] for stem in first_of(stems(), BENCHES)}
        whole["ranks"].remove("--resume")  # it has no other cases
        whole["accelerate"] += ["--out", str(out)]
        return {f"{stem} {text}": [*whole[stem], "--only", text] for stem, text in HEADLINES} | whole
    checks = {name: [*python, "benches.evidence", "check", name] for name in CHECKS}
    profiles = {f"profile of {stem}": [*python, f"benches.bench_{stem}", "--profile", str(out)] for stem in WHOLE_STEPS}
    return checks | profiles


def first_of(names: Iterable[str], first: Iterable[str], last: Iterable[str] = ()) -> list[str]:
    """All of the names, some in front and some at the end."""
    return [*first, *(name for name in names if name not in {*first, *last}), *last]


def spread() -> list[str]:
    """What makes pytest take a file in several processes, where they have cores: on a GPU most of it is compiling."""
    processes = min(8, (os.cpu_count() or 1) // 2)
    return ["-n", str(processes)] if processes > 1 and find_spec("xdist") else []


def sanitizer() -> str:
    """Where CUDA's toolkit has it, or else its name."""
    name, toolkit = "compute-sanitizer", os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{toolkit}/bin") or name


def run(part: str, out: Path) -> int:
    """Every step of a part that is not done yet, while there is time; the pages of new rows."""
    begun, budget = time.monotonic(), 60 * MINUTES
    if part == "bench":
        before, pages = results.RESULTS.read_bytes(), budget / 10
        status = run_steps(part, out, begun, budget - pages)
        shutil.copy(results.RESULTS, out / "rows.csv")
        if results.RESULTS.read_bytes() == before:
            return status
        drawn = _logged(PAGES, out / "bench.log", pages)  # which tests hold to the rows
        print(f"README.md and docs of the new rows: {drawn}", flush=True)
        return status or int(drawn != "ok")
    return run_steps(part, out, begun, budget)


def run_steps(part: str, out: Path, begun: float, budget: float) -> int:
    """The exit status."""
    path, log = out / f"{part}.json", out / f"{part}.log"
    steps = steps_of(part, out)
    done, absent = tried(part, out), not_installed(steps)
    if steps.keys() <= done.keys() | absent:
        done = {name: step for name, step in done.items() if step["state"] == "ok"}
    summarise(out)
    for number, (name, command) in enumerate(steps.items(), 1):
        if name in done or name in absent:
            continue
        print(f"{part} {number}/{len(steps)}: {name}", flush=True)
        start, rows = time.monotonic(), rows_of_this_commit()
        state = _logged(command, log, begun + budget - start)
        # The next call has all of its time for this step, or goes on where the bench was cut.
        if state == "no time" and (start - begun > budget / 10 or rows_of_this_commit() > rows):
            print(f"run `PART={part}` again: {len(steps.keys() - done.keys() - absent)} of {len(steps)} to do")
            return MORE
        seconds = round(time.monotonic() - start)
        done[name] = {"state": state, "seconds": seconds, "code": code()}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(done, indent=1))
        partial.replace(path)
        summarise(out)
    return int(any(name not in absent and done[name]["state"] != "ok" for name in steps))


def tried(part: str, out: Path) -> dict[str, dict[str, Any]]:
    """What was tried of a part with this code."""
    path = out / f"{part}.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    return {name: step for name, step in done.items() if step.get("code") == code()}


def code() -> str:
    """What results are of: the commit, or what a changed tree holds, and the tests."""
    return f"{results.conditions()['commit']}, tests {results.digest('tests')}"


def not_installed(steps: Steps) -> set[str]:
    """The steps whose tool this machine lacks."""
    return {name for name, command in steps.items() if shutil.which(command[0]) is None}


def rows_of_this_commit() -> int:
    with results.RESULTS.open(newline="") as file:
        return sum(row["commit"] == results.conditions()["commit"] for row in csv.DictReader(file))


def _logged(command: list[str], log: Path, seconds: float) -> str:
    with log.open("a") as file:
        print(f"\n$ {' '.join(command)}", file=file, flush=True)
        try:
            return "failed" if run_group(command, seconds, stdout=file, stderr=subprocess.STDOUT) else "ok"
        except subprocess.TimeoutExpired:
            return "no time"


def summarise(out: Path) -> None:
    """One page: what ran, what failed, what is missing."""
    lines = ["# Evidence", "", ", ".join(f"{key} {value}" for key, value in results.conditions().items()), ""]
    for part in PARTS:
        steps, done = steps_of(part, out), tried(part, out)
        states = {name: step["state"] for name, step in done.items()}
        passed, absent = list(states.values()).count("ok"), not_installed(steps) - done.keys()
        states |= {name: f"{Path(steps[name][0]).name} is not installed" for name in steps if name in absent}
        head = f"## {part}: {passed} of {len(steps)} passed, {len(steps.keys() - done.keys() - absent)} not run"
        lines += [head + (f", {len(absent)} whose tool is not installed" if absent else ""), ""]
        lines += [f"- {name}: {state}" for name, state in states.items() if state != "ok"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")


# ---- whole steps


def trainer(kind: str, autocast: bool = False) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    """A step of SGD on views (2, N, 1, 16, 16) that are on the device, which returns the loss; and the model."""
    torch.manual_seed(0)
    if kind == "simclr":
        model: nn.Module = ssl_fast.SimCLR(ConvNet(1), 128, temperature=0.1)
    else:
        model = ssl_fast.MoCo(ConvNet(1), dim=64, K=512, features=128)
    ssl_fast.accelerate(model.to(DEVICE))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)

    def step(views: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = model(*views)
        loss.backward()
        optimizer.step()
        return loss.detach().clone()

    return step, model


def views() -> Tensor:
    return torch.randn(2, 64, 1, 16, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def each_kind() -> Iterable[tuple[str, Callable[[], tuple[Callable[[Tensor], Tensor], nn.Module]]]]:
    """In fp32, and under autocast, where the norms are others."""
    for kind, autocast in itertools.product(WHOLE_STEPS, (False, True)):
        yield f"{kind}, {'bfloat16 autocast' if autocast else 'float32'}", partial(trainer, kind, autocast)


def same_bits() -> None:
    """Two runs of five steps: losses, weights, statistics, the queue."""

    def run(step: Callable[[Tensor], Tensor], model: nn.Module) -> tuple[list[float], dict[str, Tensor]]:
        return [float(step(views())) for _ in range(5)], model.state_dict()

    for name, make in each_kind():
        (losses, state), (again, other) = run(*make()), run(*make())
        differ = [key for key, value in state.items() if not torch.equal(value, other[key])]
        assert losses == again and not differ, (name, losses, again, differ)
        print(f"{name}: losses {losses} and {len(state)} tensors twice")


def graphs() -> None:
    """A whole step captured, replayed, and held against the same steps without a graph."""
    if DEVICE == "cpu":
        print("no GPU: nothing to capture")
        return
    for name, make in each_kind():
        (plain, _), (captured, _), x = make(), make(), views()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                captured(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = captured(x)
        expected = [float(plain(x)) for _ in range(6)][3:]
        found = []
        for _ in range(3):
            graph.replay()
            found.append(float(loss))
        assert all(abs(a - b) < 1e-3 * abs(b) for a, b in zip(found, expected, strict=True)), (name, found, expected)
        print(f"{name}: losses {found} replayed, {expected} without a graph")


# Of benches: where the kernels multiply, and where cuBLAS does.
PRODUCTS: dict[str, list[tuple[Any, ...]]] = {
    "nt_xent": [(1024, 128), (1024, 768)],
    "info_nce": [("info_nce", 256, 4096, 128), ("info_nce", 256, 4096, 768), ("clip", 1024, 1024, 512),
                 ("sup_con", 1024, 1024, 128)],
    "barlow_twins": [(256, 1024), (1024, 256)],
}  # fmt: skip


def tf32() -> None:
    """Time and error of fp32 losses as PyTorch's switch says, ours beside plain PyTorch's."""
    modules = common.setups()
    for precision, stem in itertools.product(("highest", "high"), PRODUCTS):
        torch.set_float32_matmul_precision(precision)
        for case in PRODUCTS[stem]:
            table = modules[stem].setup(*case)
            ours, plain = (p for p in table.providers if p.error and p.dtype == "float32" and p.name in COMPARED)
            errors = {p.name: p.error() for p in (ours, plain) if p.error}
            times = timing.interleave({p.name: p.build() for p in (ours, plain)}, seconds=0.5)
            for name, off in errors.items():
                ms = timing.summary(times[name])["ms"]
                print(f"{precision} {table.op} {table.shape}, {name}: {ms:.4g} ms, error {off:.3g}", flush=True)
            limit = 2 * errors[plain.name] + (1e-5 if precision == "highest" else 1e-3)
            assert errors[ours.name] <= limit, (precision, table.shape, errors)


COMPARED = ("ssl_fast", "dense PyTorch", "mm + cat + cross_entropy")
CHECKS = {"same bits twice": same_bits, "CUDA graphs": graphs, "TF32 on and off": tf32}
PARTS = ("tests", "train", "bench", "sanitize")


def main() -> int:
    word, given = [*sys.argv[1:], "", ""][:2]
    if word == "check":
        if given not in CHECKS:
            return _refused(word, given, CHECKS)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        CHECKS[given]()
        return 0
    if word not in (*PARTS, "all"):
        return _refused("PART", word, (*PARTS, "all"))
    out = Path(given or "out/gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    statuses = [run(part, out) for part in (PARTS if word == "all" else (word,))]
    print((out / "summary.md").read_text())
    return max(statuses)


def _refused(what: str, given: str, allowed: Iterable[str]) -> int:
    print(f"{what}: got {given!r}, allowed: {', '.join(allowed)}\n\n{__doc__}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
