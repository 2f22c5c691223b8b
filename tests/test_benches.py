"""What the benches promise: a row for everything public, rows that survive, a README that shows no other numbers."""

import ast
import csv
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ssl_fast
from benches import common, evidence, plot
from ssl_fast import bench as bench_module
from ssl_fast import functional, nn
from ssl_fast.cli import main

ROOT = Path(__file__).parents[1]

NOTHING_TO_TIME = {
    "backend": "chooses what is timed",
    "cosine_momentum": "a number a step",
    "functional": "a module whose functions are listed themselves",
    "nn": "a module whose classes are listed themselves",
    "__version__": "a string",
    "BarlowTwins": "an encoder, a head and BarlowTwinsLoss, which is timed",
    "SyncBatchNorm": "what convert_sync_batchnorm returns, which is timed",
    "barlow_twins": "what BarlowTwinsLoss calls",
    "clip": "what CLIPLoss calls",
    "sup_con": "what SupConLoss calls",
}


def names_in(path: Path) -> set[str]:
    """Every name that a file's code uses, its texts and comments left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.name)
    return found


def test_everything_public_is_in_a_bench():
    timed = set().union(*map(names_in, (ROOT / "benches").glob("bench_*.py")))
    public = {*ssl_fast.__all__, *functional.__all__, *nn.__all__}
    orphans = public - timed - NOTHING_TO_TIME.keys()
    assert not orphans, f"no bench has {sorted(orphans)}: add them, or a reason to NOTHING_TO_TIME"
    assert not (needless := NOTHING_TO_TIME.keys() - public), f"{sorted(needless)} need no reason"


class Small(TorchDispatchMode):
    """Refuses what threads would share."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor) or result.numel() < 10_000, func
        return result


@pytest.mark.parametrize("stem", common.setups())
def test_a_setup_computes_nothing(stem):
    """A fork of its process has none of OpenMP's threads, and waits for them for ever."""
    module = common.setups()[stem]
    for case in [*module.cases(True), *module.cases(False)]:
        with Small():
            keys = [provider.key for provider in module.setup(*case).providers]
        assert len(keys) == len(set(keys)) > 1


TABLE = """
import json
import torch
from benches import common

def step(megabytes):
    return lambda: torch.ones(megabytes << 18).sum()

def too_much():
    raise torch.OutOfMemoryError("out of memory")

table = common.Table("op", "shape", bytes=1e6)
table.providers = [
    common.Provider("copy_", lambda: step(1), work=1.0),
    common.Provider("ours", lambda: step(64), work=2.0, error=lambda: 1e-7),
    common.Provider("theirs", too_much),
]
print(json.dumps(common.measure(table, 0.0)))
"""


def test_a_table_is_measured(tmp_path):
    command = [sys.executable, "-c", TABLE]  # measure() forks its process, which must not have computed anything
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    floor, ours, theirs = json.loads(output.splitlines()[-1])
    assert ours["ms_p20"] <= ours["ms"] <= ours["ms_p80"] and ours["to"] == "copy_" and ours["error"] == 1e-7
    assert ours["ratio"] == pytest.approx(ours["ms"] / floor["ms"]) == pytest.approx(2 * ours["x_floor"])
    assert ours["gb_per_s"] == pytest.approx(2e6 / ours["ms"] / 1e6)
    if common.DEVICE == "cpu":
        assert 60 < ours["extra_mb"] < 80
    assert "ms" not in theirs and theirs["provider"] == "theirs"  # the others are measured

    path = tmp_path / "rows.csv"
    path.write_text("op,shape,dtype,provider,allocator,device,ms\nop,other,float32,ours,default,here,3\n")
    common.save([floor, ours, theirs], path=path)
    common.save([ours], path=path)
    rows = list(csv.DictReader(path.open()))
    assert [(r["shape"], r["provider"]) for r in rows] == [("other", "ours"), ("shape", "ours")]
    assert rows[0]["ms"] == "3" and rows[0]["x_floor"] == "" and rows[1]["commit"] and rows[1]["date"]


@pytest.mark.parametrize(
    "words, message",
    [
        ("nt_xnt", "op: got 'nt_xnt', did you mean 'nt_xent'? allowed: accelerate, barlow_twins"),
        ("ema device=tpu", "device: got 'tpu', allowed here: cpu"),
        ("ema speed=high", "unknown key 'speed'"),
        ("ema --quick", "got '--quick', allowed: key=value, such as quick=..."),
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
    assert main(["bench", "good", "quick=true"]) == 0
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

    first = {"good": "ok", "bad": "failed", "absent": "no-such-tool is not installed"}
    assert evidence.run("tests", tmp_path) == evidence.MORE and states() == first
    assert evidence.run("tests", tmp_path) == evidence.MORE  # even alone it takes too long, and what is left is nothing
    assert states() == {**first, "slow": "no time"}
    assert evidence.run("tests", tmp_path) == 1 and states()["last"] == "ok"
    assert len(list(tmp_path.iterdir())) == 3 and "- bad: failed" in (tmp_path / "summary.md").read_text()


# ---- the README


def measured_section() -> tuple[str, str]:
    """What `benches.plot` writes, and the text around it."""
    section = plot.README.read_text().split("\n## Measured\n")[1].split("\n## ")[0]
    blocks = re.compile(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", re.DOTALL)
    return "".join(block[0] for block in blocks.finditer(section)), blocks.sub("", section)


def test_the_readme_shows_what_was_measured():
    """Its tables are those that benches/results.csv gives: no number of them is written by hand."""
    readme = plot.README.read_text()
    assert readme == plot.updated(readme) == plot.updated(plot.updated(readme))
    wrong = re.sub(r"(\| \d+\.\d)(\d*) ", r"\g<1>9\2 ", readme, count=1)
    assert wrong != readme != plot.updated(wrong + " ") and plot.updated(wrong) == readme


def test_no_number_of_the_readme_stands_outside_of_the_tables():
    tables, text = measured_section()
    assert tables.count("\n|") > 100
    measured = re.findall(r"[\d.]+ ?(?:ms|MB|GB/s|TFLOP/s|images/s|x faster|times|%)", text)
    assert not measured, f"{measured}: results.csv gives the tables, and the text beside them quotes no figure"


def test_figures_of_the_tables_are_in_the_csv():
    cells = {cell for row in csv.reader(common.RESULTS.open()) for cell in row}
    shown = [line.split("|")[5].strip() for line in plot.loss_block().splitlines() if line.startswith("| NT-Xent")]
    assert shown and set(shown) <= cells | {"out of memory"}


def test_pictures_come_out_the_same(tmp_path):
    """Twice to the byte, and those of docs/ are the rows' own."""
    (tmp_path / "again").mkdir()
    for path, again in zip(plot.draw(tmp_path), plot.draw(tmp_path / "again"), strict=True):
        assert path.read_bytes() == again.read_bytes(), path.name
        assert (plot.DOCS / path.name).exists() and path.stat().st_size < 200_000


def test_every_provider_can_be_timed_by_pytest():
    """`pytest benches/` lists them; `make test` does not collect them."""
    assert "benches" not in (ROOT / "pyproject.toml").read_text().split("testpaths")[1].splitlines()[0]
    assert len(list(common.setups()["moco"].setup(*common.setups()["moco"].cases(True)[0]).providers)) == 2
