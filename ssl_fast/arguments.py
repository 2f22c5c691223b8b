"""The arguments of a run: what is allowed, and how args.yaml holds them."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_fast._checks import check_flags, is_number, whole
from ssl_fast._extras import nearest, require
from ssl_fast.augment import Policy, policy_named
from ssl_fast.cached import CachedStep
from ssl_fast.methods import METHODS
from ssl_fast.optim import DEFAULTS, SCHEDULES


def method_arguments(method: str) -> dict[str, inspect.Parameter]:
    """The arguments beyond encoder and features that `train(method=...)` hands to a method."""
    if method not in list(METHODS):
        raise ValueError(f"method: got {method!r}, {nearest(method, list(METHODS))}allowed: {', '.join(METHODS)}")
    parameters = inspect.signature(METHODS[method].build, eval_str=True).parameters
    return {name: p for name, p in parameters.items() if name not in ("encoder", "features")}


def check_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments of `train` and return them as args.yaml holds them."""
    for module in ("yaml", "tqdm", "matplotlib"):
        require(module, "ssl_fast.train")
    config = {k: v for k, v in given.items() if k not in ("out", "resume", "overwrite", "method_args")}
    extra, known = given["method_args"], method_arguments(given["method"])
    for name in extra:
        if name not in known:
            raise TypeError(f"train: unknown argument {name!r}, {instead_of(name, [*config, *known])}")
    config |= {name: extra.get(name, p.default) for name, p in known.items()}

    at_least = {
        "epochs": 1,
        "batch_size": 2,
        "log_every": 1,
        "knn_every": 0,
        "probe_every": 0,
        "save_every": 0,
        "keep_every": 0,
        "seed": 0,
    }
    at_least |= {"num_workers": 0} if config["num_workers"] is not None else {}
    for key, low in at_least.items():
        whole(key, config[key], low)
    check_flags(accelerate=config["accelerate"], checkpoint_stages=config["checkpoint_stages"])
    if config["seed"] >= 2**32:
        raise ValueError(f"seed: got {config['seed']}, allowed: a whole number below 2**32")
    for key in ("lr", "weight_decay", "warmup_epochs"):
        if config[key] is not None and not (is_number(config[key]) and 0 <= config[key] < math.inf):
            raise ValueError(f"{key}: got {config[key]!r}, allowed: a finite number >= 0")
    micro_batch, memory = config["micro_batch"], config["memory"]
    if micro_batch is not None:
        CachedStep(micro_batch, memory)
    if memory is not None and micro_batch != "auto":
        raise ValueError(
            f"memory: got {memory!r} with micro_batch={micro_batch}, allowed: with micro_batch='auto', whose budget it "
            "is"
        )
    for key, allowed in (
        ("optimizer", ["auto", *DEFAULTS]),
        ("schedule", ["auto", *SCHEDULES]),
        ("precision", ["fp32", "bf16"]),
    ):
        if config[key] not in allowed:
            raise ValueError(
                f"{key}: got {config[key]!r}, {nearest(str(config[key]), allowed)}allowed: {', '.join(allowed)}"
            )
    if config["augment"] != "auto":
        policy_named(config["augment"])
    return {key: plain(value) for key, value in config.items()}


def check_warmup(config: dict[str, Any]) -> None:
    """Of a run that begins: those of earlier versions go on as they were."""
    if config["warmup_epochs"] is not None and config["warmup_epochs"] > config["epochs"]:
        raise ValueError(
            f"warmup_epochs: got {config['warmup_epochs']} with epochs={config['epochs']}, allowed: at most epochs; "
            "the learning rate would never reach lr"
        )


def defaults(function: Callable[..., Any], method: str) -> dict[str, Any]:
    """The defaults of `train` and of a method, as args.yaml holds them: what a run had before they were arguments."""
    parameters = {**inspect.signature(function).parameters, **method_arguments(method)}
    return {name: plain(p.default) for name, p in parameters.items() if p.default is not p.empty}


def instead_of(name: str, allowed: list[str]) -> str:
    """What to say of an argument that is not there: the nearest name, and those that are."""
    if re.search("accum|grad_?acc|update_freq|iter_size", name):
        return (
            "which a contrastive loss does not have: each image would meet the negatives of its own part of the batch "
            "alone, and the sum of those losses is another loss. Give the whole batch_size, and micro_batch=N or auto: "
            "the encoder sees N images at once, the loss all of them"
        )
    return f"{nearest(name, allowed)}allowed: {', '.join(allowed)}"


def plain(value: Any) -> Any:
    """A value as YAML holds it; a module by the name of its class."""
    if isinstance(value, Policy):
        return {k: plain(list(v) if isinstance(v, tuple) else v) for k, v in vars(value).items()}
    if isinstance(value, list):
        return value
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else f"<{type(value).__qualname__}>"
