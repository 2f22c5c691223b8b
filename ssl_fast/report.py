"""`report`: the pictures of a run, and one HTML file that shows all there is of it."""

from __future__ import annotations

import base64
import html
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_fast._checks import a_path
from ssl_fast.arguments import method_arguments
from ssl_fast.backbones import _width
from ssl_fast.data import ImageData, Split, load_data
from ssl_fast.features import encode, load_encoder
from ssl_fast.fold import eval_mode
from ssl_fast.folder import ImageFiles
from ssl_fast.methods import METHODS
from ssl_fast.plots import (
    neighbours,
    pca,
    plot_curves,
    plot_filters,
    plot_fractions,
    plot_neighbours,
    plot_points,
    umap,
)
from ssl_fast.run import pick_device, read_args, read_checkpoint, read_rows, write_atomically

log = logging.getLogger("ssl_fast")

LIMIT = 3000  # images in a picture
CAPTIONS = {
    "curves": "Loss, accuracy of kNN and of the online linear probe, the collapse meter, and the learning rate",
    "fractions": "Accuracy against the share of the labels; mean and standard deviation over seeds",
    "pca": "First two principal components of h, and of z behind the projection head",
    "umap": "UMAP of h and of z",
    "neighbours": "Images, each beside its nearest by the cosine of h; green: of the same class, red: of another",
    "views": "Images of the first batch, and the two views that the run made of each",
    "filters": "Kernels of the first convolution; grey is zero",
}
STYLE = """
:root { color-scheme: light dark } body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto;
padding: 0 1rem } h2 { margin-top: 2.5rem } table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #8884; vertical-align: top }
figure { margin: 1.5rem 0 } img { max-width: 100%; background: white } figcaption { color: #888 }
"""


def report(
    out: str | Path,
    *,
    model: nn.Module | None = None,
    data_dir: str | Path | None = None,
    device: str = "auto",
    num_workers: int = 0,
) -> dict[str, Any]:
    """Draw the pictures of a run from its last checkpoint, and write out/report.html: one file that needs no other.

    `train` does so at its end. Here it is for a run that is still going, was killed, or was evaluated since: what there
    is is shown, what is missing is named.

    Args:
        out: the folder of the run.
        model: the nn.Module that was trained, for runs whose model had no name.
        data_dir: where the files of a named data set are; default the run's own.
        device: "auto", "cpu", "cuda" or "cuda:N".
        num_workers: processes that decode images from a folder.

    Returns:
        A dict: `report`, the file's path, and `missing`, what could not be shown and why.

    Raises:
        FileNotFoundError, ValueError: for a folder that holds no run, or a device that is not there.

    Example:
        >>> report("out/digits")["report"]
    """
    out, chosen = a_path("out", out, "the path of a run's folder"), pick_device(device)
    if not (out / "args.yaml").is_file():
        raise FileNotFoundError(f"out: {out} holds no run, allowed: the folder that `train` was given as out")
    args, status = read_args(out), "not finished: no checkpoint yet"
    try:
        saved = read_checkpoint(out / "checkpoints" / "last.pt")
        status = describe(saved["step"], args["epochs"] * (saved["images"] // args["batch_size"]))
        images = load_data(args["data"], data_dir or args["data_dir"], saved["image_size"])
        encoder = load_encoder(saved, model).to(chosen)
        missing = draw(out, encoder, load_head(saved, encoder).to(chosen), images, chosen, num_workers)
    except Exception as error:  # no checkpoint, images that have moved, a module that was not given: the rest is shown
        log.debug("no new pictures", exc_info=True)
        missing = [f"new pictures of the encoder: {error}"]
    return {"report": str(write(out, status, missing)), "missing": "; ".join(missing) or "nothing"}


def describe(step: int, total: int) -> str:
    """How far a run is."""
    return f"finished after {total} steps" if step == total else f"not finished: a checkpoint of step {step} of {total}"


def draw(
    out: Path, encoder: nn.Module, head: nn.Module, images: ImageData, device: torch.device, num_workers: int = 0
) -> list[str]:
    """Write the pictures of an encoder and its head into out/plots; returns what could not be drawn, and why.

    They show up to LIMIT images, spread over those for testing, or over those for training where there are no labels.
    A picture that fails is left out: a run is not lost for it.
    """
    split = _spread(images.test or images.train, LIMIT)
    h, labels = encode(encoder, split, images.size, device, num_workers=num_workers)
    features = {"h": h}
    if not isinstance(head, nn.Identity):
        with torch.no_grad(), eval_mode(head):
            features["z"] = head(h).float()
    first = next((m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.in_channels in (1, 3)), None)

    def points(project: Callable[[Tensor], Tensor], name: str, path: Path) -> None:
        plot_points({f"{key} of {images.name}, {name}": project(f) for key, f in features.items()}, labels, path)

    def nearest(path: Path) -> None:
        shown, source = neighbours(h), split.images
        pixels = [source[i][0] if isinstance(source, ImageFiles) else source[i] for i in shown.flatten().tolist()]
        plot_neighbours(torch.stack(pixels).unflatten(0, shown.shape).cpu(), labels.cpu()[shown], path)

    def filters(path: Path) -> None:
        if first is None:
            raise ValueError("the encoder has no convolution on 1 or 3 channels")
        plot_filters(first.weight, path)

    drawn: dict[str, Callable[[Path], None]] = {
        "pca": lambda path: points(pca, "PCA", path),
        "umap": lambda path: points(umap, "UMAP", path),
        "neighbours": nearest,
        "filters": filters,
    }
    missing = []
    for name, picture in drawn.items():
        try:
            picture(out / "plots" / f"{name}.png")
        except Exception as error:
            log.debug("plots/%s.png is not drawn", name, exc_info=not isinstance(error, ImportError))
            missing.append(f"{name}: {error}")
    return missing


def write(out: Path, status: str, missing: list[str]) -> Path:
    """Write out/report.html from the files in the folder of a run; the curves are drawn anew."""
    args = read_args(out)
    rows = read_rows(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
    evaluations = read_rows(out / "evaluations.jsonl") if (out / "evaluations.jsonl").exists() else []
    evaluations = [row for i, row in enumerate(evaluations) if row not in evaluations[:i]]  # each has its figures once
    plot_curves(rows, out / "plots" / "curves.png")
    if any("label_fraction" in row for row in evaluations):
        plot_fractions(evaluations, out / "plots" / "fractions.png")
    title = f"{args['method']} on {args['data']}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(args['model'])}, {status}; {html.escape(str(out))}</p>",
    ]
    parts += ["<h2>Figures</h2>", _table(_figures(rows)) or "<p>None was recorded yet.</p>", _picture(out, "curves")]
    parts += ["<h2>Evaluations</h2>", _table(evaluations) or _no_evaluations(out), _picture(out, "fractions")]
    parts += ["<h2>Pictures</h2>", *(_picture(out, name) for name in list(CAPTIONS)[2:])]
    if missing:
        parts += ["<p>Not shown:</p><ul>", *(f"<li>{html.escape(note)}</li>" for note in missing), "</ul>"]
    parts += ["<h2>Arguments</h2>", _table([{"argument": k, "value": v} for k, v in args.items()])]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    path = out / "report.html"
    write_atomically(path, f"{head}<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n")
    return path


def _figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """First, best and last value of each metric."""
    best = {"loss": min, "knn": max, "probe": max}
    table = []
    for key in dict.fromkeys(key for row in rows for key in row if key not in ("step", "epoch")):
        values = [(row["step"], row[key]) for row in rows if key in row]
        line = {"figure": key, "first": values[0][1]}
        line["best"] = best[key](value for _, value in values) if key in best else ""
        table.append(line | {"last": values[-1][1], "at step": values[-1][0]})
    return table


def _no_evaluations(out: Path) -> str:
    return f"<p>None yet: <code>ssl-fast evaluate checkpoint={html.escape(str(out))}</code> adds them.</p>"


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows as an HTML table, with the columns of all of them; nothing where there are none."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[html.escape(_cell(row.get(key, ""))) for key in columns] for row in rows]
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return rows and f"<table><tr>{''.join(f'<th>{html.escape(c)}</th>' for c in columns)}</tr>{body}</table>" or ""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _picture(out: Path, name: str) -> str:
    path = out / "plots" / f"{name}.png"
    if not path.exists():
        return ""
    data, caption = base64.b64encode(path.read_bytes()).decode(), html.escape(CAPTIONS[name])
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def load_head(saved: dict[str, Any], encoder: nn.Module) -> nn.Module:
    """The projection head g of a checkpoint."""
    args, shape = saved["args"], (saved["channels"], saved["image_size"], saved["image_size"])
    given = {name: args[name] for name in method_arguments(args["method"]) if name in args and name != "loss"}
    head = METHODS[args["method"]].build(nn.Identity(), _width(encoder, args["model"], shape), **given).head
    head.load_state_dict({k.removeprefix("head."): v for k, v in saved["model"].items() if k.startswith("head.")})
    return head


def _spread(split: Split, limit: int) -> Split:
    """At most so many images, evenly over a split."""
    if len(split) <= limit:
        return split
    kept = torch.linspace(0, len(split) - 1, limit).long()
    images: Any = split.images
    files = ImageFiles([images.files[i] for i in kept], images.size) if isinstance(images, ImageFiles) else images[kept]
    return Split(files, None if split.labels is None else split.labels[kept])
