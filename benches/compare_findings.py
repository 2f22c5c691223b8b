"""What the papers found, in small: h beats z, the kind of head, few labels, the batch, on Fashion-MNIST, several seeds.

    python -m benches.compare_findings                 writes docs/findings.md
    python -m benches.compare_findings root=FOLDER     the idx files of Fashion-MNIST; default where Debian puts them

The findings are those of SimCLR (Chen et al. 2020, arXiv 2002.05709): figure 8 (a nonlinear head beats a linear one,
which beats none; h beats z), figure 9 (large batches help at few epochs), table 7 (1% and 10% of the labels). All runs
of a seed start from the same weights and see the images in the same order. Every run that ends is a line of
OUT/results.jsonl; those that are there are left out by the next call, and a run that was broken off goes on.

Keys: root=none, out=out/findings, images=10000 (the first of the training set), epochs=8, seeds=3. `--quick` takes 2000
images, 400 for testing, one epoch and one seed, and leaves docs/ alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benches import machine, results
from benches.compare_methods import subset
from ssl_fast.backbones import ConvNet
from ssl_fast.data import ImageData, load_data
from ssl_fast.evaluate import evaluate
from ssl_fast.features import encode, load_encoder
from ssl_fast.knn import KNN_T, knn_accuracy, knn_k
from ssl_fast.probe import linear_probe
from ssl_fast.report import load_head
from ssl_fast.run import read_checkpoint, read_rows, seed_everything, write_atomically
from ssl_fast.train import train

PAGE = Path(__file__).parents[1] / "docs" / "findings.md"
WIDTH = 16  # of the ConvNet, whose h has 64 features
CPU = torch.device("cpu")

Row = dict[str, Any]


def settings(batch: int = 256, head: str = "nonlinear") -> Row:
    # SGD: LARS, SimCLR's optimizer at 4096 images, hardly moves in so few steps. The rate is linear in the batch, as in
    # figure 9.
    return {"head": head, "batch_size": batch, "optimizer": "sgd", "lr": 0.06 * batch / 256}


HEADS = {head: settings(head=head) for head in ("nonlinear", "linear", "none")}
BATCHES = {f"batch {batch}": settings(batch) for batch in (32, 1024)}
RUNS = HEADS | BATCHES
FRACTIONS = (0.01, 0.1)
FINETUNE_EPOCHS = 60  # the paper takes 30 of 10%, which are few for random weights

# A claim, and the two figures (run, column) that it compares.
CLAIMS = [
    *(
        (f"{claim}: {name}", (better[0], better[1] + how), (worse[0], worse[1] + how))
        for claim, better, worse in (
            ("h beats z, nonlinear head", ("nonlinear", "h "), ("nonlinear", "z ")),
            ("h beats z, linear head", ("linear", "h "), ("linear", "z ")),
            ("nonlinear head beats linear head", ("nonlinear", "h "), ("linear", "h ")),
            ("linear head beats no head", ("linear", "h "), ("none", "h ")),
            ("pretrained beats random weights", ("nonlinear", "h "), ("random", "h ")),
            ("a batch of 256 beats 32", ("nonlinear", "h "), ("batch 32", "h ")),
            ("a batch of 1024 beats 256", ("batch 1024", "h "), ("nonlinear", "h ")),
        )
        for how, name in (("linear", "linear probe"), ("kNN", "kNN"))
    ),
    *(
        (f"pretrained beats from scratch, {f:.0%} of the labels", (f"fine-tuned {f}", "accuracy"),
         (f"from scratch {f}", "accuracy"))
        for f in FRACTIONS
    ),
]  # fmt: skip


def encoder(seed: int) -> ConvNet:
    seed_everything(seed)
    return ConvNet(1, WIDTH)


def scores(encoder: nn.Module, data: ImageData, head: nn.Module | None = None) -> Row:
    """kNN and linear probe on h, and on z where there is a head."""
    assert data.bank and data.test
    (bank, y), (test, y_test) = (encode(encoder, split, data.size, CPU) for split in (data.bank, data.test))
    row: Row = {}
    for key, through in {"h": nn.Identity(), **({"z": head.eval()} if head else {})}.items():
        with torch.no_grad():
            features: list[Tensor] = [through(bank), through(test)]
        row[f"{key} kNN"] = knn_accuracy(features[0], y, features[1], y_test, k=knn_k(len(bank)))
        row[f"{key} linear"] = linear_probe(features[0], y, features[1], y_test, "logistic")
    return row


def pretrain(name: str, seed: int, data: ImageData, source: str, out: Path, epochs: int) -> Row:
    if name == "random":
        return scores(encoder(seed), data)
    folder = out / f"{name.replace(' ', '_')}_seed_{seed}"
    given = dict(RUNS[name])
    given["batch_size"] = min(given["batch_size"], len(data.train) // 2)  # of --quick
    train(folder, source, model=encoder(seed), epochs=epochs, seed=seed, knn_every=0, probe_every=0,
          resume="auto", **given)  # fmt: skip
    saved = read_checkpoint(folder / "checkpoints" / "last.pt")
    trained = load_encoder(saved, encoder(seed))
    return scores(trained, data, None if name == "none" else load_head(saved, trained))


def few_labels(kind: str, seed: int, out: Path, fraction: float, epochs: int) -> Row:
    """The whole encoder trained on a share of the labels: from the weights of the nonlinear head's run, or random."""
    initial = "random" if kind == "from scratch" else "checkpoint"
    scores = evaluate(out / f"nonlinear_seed_{seed}", protocol="finetune", label_fraction=fraction, initial=initial,
                      epochs=epochs, seed=seed, model=encoder(seed))  # fmt: skip
    return {"accuracy": scores["finetune"]}


def cell(values: list[float], factor: float = 100) -> str:
    """Mean and standard deviation; of accuracies in per cent."""
    if not values:
        return ""
    spread = f" ± {factor * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{round(factor * statistics.mean(values), 2) + 0.0:.2f}{spread}"  # -0.0 + 0.0 is 0.0


def summary(rows: list[Row], names: dict[str, str], columns: tuple[str, ...]) -> str:
    """Mean and spread over the seeds of each run, as a table; `names` gives the title of each run."""
    lines = []
    for name, title in names.items():
        of_run = [row for row in rows if row["run"] == name]
        lines.append({"": title} | {c: cell([row[c] for row in of_run if c in row]) for c in columns})
    return results.table(lines, ("", *columns))


def verdict(rows: list[Row], claim: str, better: tuple[str, str], worse: tuple[str, str]) -> Row:
    """A claim, as differences between two figures (run, column) of the same seed."""
    found = {(row["run"], row["seed"]): row for row in rows}
    pairs = [
        (found[better[0], seed][better[1]], found[worse[0], seed][worse[1]])
        for seed in sorted({row["seed"] for row in rows})
        if (better[0], seed) in found and (worse[0], seed) in found
    ]
    gains = [a - b for a, b in pairs]
    ahead, behind = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    says = (
        "not run"
        if not gains
        else "holds"
        if ahead == len(gains)
        else "does not hold"
        if behind == len(gains)
        else "not settled"
    )
    return {"claim": claim, "difference": cell(gains), "seeds ahead": f"{ahead} of {len(gains)}", "here": says}


def page(rows: list[Row], title: str, images: int) -> str:
    """docs/findings.md."""
    claims = [verdict(rows, *claim) for claim in CLAIMS]
    heads = {"random": "random encoder", **{name: f"SimCLR, head {name}" for name in HEADS}}
    batches = {"batch 32": "32", "nonlinear": "256", "batch 1024": "1024"}
    labels = {f"{kind} {f}": f"{kind}, {f:.0%}" for f in FRACTIONS for kind in ("from scratch", "fine-tuned")}
    seconds = sum(row["seconds"] for row in rows)
    return f"""# The findings of the papers in small

    python -m benches.compare_findings      {seconds / 60:.0f} minutes on {torch.get_num_threads()} cores

This page is written by that command: per cent of the test images, mean and standard deviation over the seeds. All runs
of a seed start from the same weights and see the images in the same order; a difference is that of two runs of one
seed. A claim holds here where every seed says so, and does not where every seed says the opposite. So few epochs on so
few images show a direction at best.

{title}

{results.table(claims, ("claim", "difference", "seeds ahead", "here"))}

The head, and what is taken from the network: h before it, or z behind it (SimCLR's figure 8). kNN is weighted, with k =
{knn_k(images)} and t = {KNN_T}; the linear probe is logistic regression on standardised features.

{summary(rows, heads, ("h kNN", "h linear", "z kNN", "z linear"))}

With few labels (SimCLR's table 7): the whole encoder learns from 1% or 10% of the labels, as many of each class, from
the weights of the run with the nonlinear head or from random ones, by the same recipe (`ssl-fast evaluate
protocol=finetune`, {FINETUNE_EPOCHS} epochs).

{summary(rows, labels, ("accuracy",))}

Images a step, in as many epochs, at a rate linear in them (SimCLR's figure 9):

{summary(rows, batches, ("h kNN", "h linear"))}
"""


def jobs(data: ImageData, source: str, out: Path, epochs: int, seeds: int) -> dict[tuple[str, int], Callable[[], Row]]:
    """What gives the row of each run and seed, all runs of a seed before the next."""
    table: dict[tuple[str, int], Callable[[], Row]] = {}
    for seed in range(seeds):
        for name in ("random", *RUNS):
            table[name, seed] = partial(pretrain, name, seed, data, source, out, epochs)
        for fraction in FRACTIONS:
            for kind in ("from scratch", "fine-tuned"):
                table[f"{kind} {fraction}", seed] = partial(
                    few_labels, kind, seed, out, fraction, 1 if epochs == 1 else FINETUNE_EPOCHS
                )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument("--quick", action="store_true", help="2000 images, one epoch, one seed")
    args = parser.parse_args()
    given = {"root": None, "out": "out/findings", "images": "10000", "epochs": "8", "seeds": "3"}
    for word in args.keys:
        key, equals, value = word.partition("=")
        if key not in given or not equals:
            parser.error(f"got {word!r}, allowed: {', '.join(f'{k}=...' for k in given)}")
        given[key] = value
    images, epochs, seeds = (int(given[key] or 0) for key in ("images", "epochs", "seeds"))
    if args.quick:
        images, epochs, seeds = 2000, 1, 1

    out = Path(given["out"] or "") / f"{images}_images_{epochs}_epochs"
    out.mkdir(parents=True, exist_ok=True)
    source = subset(load_data("fashion_mnist", given["root"]), images, out / "data", 400 if args.quick else None)
    data = load_data(source)
    title = (
        f"Fashion-MNIST, the first {images} training images, {len(data.test or ())} test images; SimCLR, {epochs} "
        f"epochs, ConvNet of width {WIDTH}; {seeds} seeds; {machine.device_name()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {datetime.date.today().isoformat()}"
    )
    print(title, flush=True)
    path = out / "results.jsonl"
    rows = read_rows(path) if path.exists() else []
    for (name, seed), job in jobs(data, str(source), out, epochs, seeds).items():
        if any((row["run"], row["seed"]) == (name, seed) for row in rows):
            continue
        start = time.monotonic()
        row = {"run": name, "seed": seed, **job(), "seconds": round(time.monotonic() - start, 1)}
        rows.append(row)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        print(row, flush=True)
    rows = [row for row in rows if row["seed"] < seeds]
    (out / "findings.md").write_text(page(rows, title, images))
    if (images, seeds) == (10_000, 3):
        PAGE.write_text(page(rows, title, images))
    print("\n" + page(rows, title, images))


if __name__ == "__main__":
    main()
