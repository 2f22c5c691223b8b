"""What this machine can show of the package, offline, in parts: `python -m benches.evidence PART [OUT]`.

    tests     every test file
    sanitize  every op of ours at its quick shapes under compute-sanitizer's memcheck and racecheck
    bench     every bench, rows to benches/results.csv and to OUT
    train     whole SimCLR and MoCo steps: the same bits twice, as CUDA graphs, TF32 on and off, a profile
    all       these, one after the other

A part ends within 8 minutes. What it did not come to is done by the next call, which leaves out what is in
OUT/PART.json; each leaves that, a log, and at most three files more. OUT/summary.md is the page to read. The exit
status is 0, 1 where something failed, and 75 where there is more to do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import ssl_fast
from benches import common
from benches.bench_nt_xent import dense, embeddings
from benches.common import DEVICE, ROOT
from ssl_fast.backbones import ConvNet
from ssl_fast.bench import stems

MINUTES = 8
MORE = 75
Steps = dict[str, list[str]]


# ---- the parts, as commands by name


def steps_of(part: str, out: Path) -> Steps:
    python = [sys.executable, "-m"]
    if part == "tests":
        files = sorted((ROOT / "tests").glob("test_*.py"))
        return {file.stem: [*python, "pytest", "-q", "-rfE", str(file)] for file in files}
    if part == "sanitize":
        found = {}
        for tool in ("memcheck", "racecheck"):
            for stem in common.setups():
                checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
                found[f"{tool} {stem}"] = [*checked, *python, "benches.evidence", "once", stem]
        return found
    if part == "bench":
        return {stem: [*python, f"benches.bench_{stem}"] for stem in stems()}
    checks = {name: [*python, "benches.evidence", "check", name] for name in CHECKS}
    return {**checks, "profile": [*python, "benches.bench_simclr", "--profile", str(out)]}


def run(part: str, out: Path) -> int:
    """Every step of a part that is not done yet, while there is time."""
    done_path, log = out / f"{part}.json", out / f"{part}.log"
    done = json.loads(done_path.read_text()) if done_path.exists() else {}
    begun, budget = time.monotonic(), 60 * MINUTES
    steps = steps_of(part, out)
    for number, (name, command) in enumerate(steps.items(), 1):
        if name in done:
            continue
        if shutil.which(command[0]) is None:
            done[name] = {"state": f"{command[0]} is not installed"}
        else:
            print(f"{part} {number}/{len(steps)}: {name}", flush=True)
            start = time.monotonic()
            state = _logged(command, log, begun + budget - start)
            if state == "no time" and start - begun > budget / 10:  # the next call has all of it for this step
                print(f"run `PART={part}` again: {len(steps) - len(done)} of {len(steps)} to do")
                return MORE
            done[name] = {"state": state, "seconds": round(time.monotonic() - start)}
        done_path.write_text(json.dumps(done, indent=1))
        summarise(out)
    if part == "bench":
        shutil.copy(common.RESULTS, out / "rows.csv")
    return int(any(step["state"] in ("failed", "no time") for step in done.values()))


def _logged(command: list[str], log: Path, seconds: float) -> str:
    with log.open("a") as file:
        print(f"\n$ {' '.join(command)}", file=file, flush=True)
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return "ok" if process.wait(seconds) == 0 else "failed"
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return "no time"
            raise


def summarise(out: Path) -> None:
    """One page: what ran, what failed, what is missing."""
    lines = ["# Evidence", "", ", ".join(f"{key} {value}" for key, value in common.conditions().items()), ""]
    for part in PARTS:
        path = out / f"{part}.json"
        done = json.loads(path.read_text()) if path.exists() else {}
        states = [step["state"] for step in done.values()]
        count = len(steps_of(part, out))
        lines += [f"## {part}: {states.count('ok')} of {count} passed, {count - len(done)} not run", ""]
        lines += [f"- {name}: {step['state']}" for name, step in done.items() if step["state"] != "ok"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")


# ---- whole steps


def trainer(kind: str) -> Callable[[Tensor], Tensor]:
    """A step of SGD on views (2, N, 1, 16, 16) that are on the device; returns the loss."""
    torch.manual_seed(0)
    if kind == "simclr":
        model: nn.Module = ssl_fast.SimCLR(ConvNet(1), 128, temperature=0.1)
    else:
        model = ssl_fast.MoCo(ConvNet(1), dim=64, K=512, features=128)
    ssl_fast.accelerate(model.to(DEVICE))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=torch.tensor(0.05, device=DEVICE), momentum=0.9)

    def step(views: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(*views)
        loss.backward()
        optimizer.step()
        return loss.detach().clone()

    return step


def views() -> Tensor:
    return torch.randn(2, 64, 1, 16, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def same_bits() -> None:
    """Two runs of five steps."""
    for kind in ("simclr", "moco"):
        first, second = ([float(step(views())) for _ in range(5)] for step in (trainer(kind), trainer(kind)))
        assert first == second, (kind, first, second)
        print(f"{kind}: losses {first} twice")


def graphs() -> None:
    """A whole step captured, replayed, and held against the same steps without a graph."""
    if DEVICE == "cpu":
        print("no GPU: nothing to capture")
        return
    for kind in ("simclr", "moco"):
        plain, captured, x = trainer(kind), trainer(kind), views()
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
        assert all(abs(a - b) < 1e-3 * abs(b) for a, b in zip(found, expected, strict=True)), (kind, found, expected)
        print(f"{kind}: losses {found} replayed, {expected} without a graph")


def tf32() -> None:
    """NT-Xent's time and error in fp32, as PyTorch's switch says."""
    z1, z2 = embeddings(1024, 128, "float32")
    doubles = [z.detach().double().requires_grad_() for z in (z1, z2)]
    truth = torch.autograd.grad(dense(*doubles), doubles[0])
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        for name, loss in (("ssl_fast", ssl_fast.NTXentLoss(0.1)), ("dense PyTorch", dense)):
            value = torch.autograd.grad(loss(z1, z2), z1)
            times = common.interleave({name: lambda loss=loss: loss(z1, z2).backward()}, seconds=0.5)[name]
            off = common.relative_error(value, truth)
            print(f"{precision} {name}: {common.timing(times)['ms']:.4g} ms, error {off:.3g}")
            assert off < (1e-5 if precision == "highest" else 5e-3), (precision, name, off)


CHECKS = {"same bits twice": same_bits, "CUDA graphs": graphs, "TF32 on and off": tf32}
PARTS = ("tests", "sanitize", "bench", "train")


def once(stem: str) -> None:
    """Ours at the quick shapes, one call each."""
    module = common.setups()[stem]
    for case in module.cases(True):
        for provider in module.setup(*case).providers:
            if provider.name.startswith("ssl_fast"):
                provider.build()()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    words = sys.argv[1:]
    if words[:1] == ["check"]:
        CHECKS[words[1]]()
        return 0
    if words[:1] == ["once"]:
        once(words[1])
        return 0
    if not words or words[0] not in (*PARTS, "all"):
        given = words[0] if words else ""
        print(f"PART: got {given!r}, allowed: {', '.join(PARTS)}, all\n\n{__doc__}", file=sys.stderr)
        return 2
    out = Path(words[1] if len(words) > 1 else "out/gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    statuses = [run(part, out) for part in (PARTS if words[0] == "all" else words[:1])]
    print((out / "summary.md").read_text())
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
