"""The arguments of a run: what is allowed, and how args.yaml holds them."""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssl_fast._extras import nearest, require
from ssl_fast.augment import Policy, policy_named
from ssl_fast.methods import METHODS
from ssl_fast.optim import DEFAULTS, SCHEDULES


def method_arguments(method: str) -> dict[str, inspect.Parameter]:
    """The arguments beyond encoder and features that `train(method=...)` hands to a method."""
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, {nearest(method, list(METHODS))}allowed: {', '.join(METHODS)}")
    parameters = inspect.signature(METHODS[method].build, eval_str=True).parameters
    return {name: p for name, p in parameters.items() if name not in ("encoder", "features")}


def check_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments of `train` and return them as args.yaml holds them."""
    for module in ("yaml", "tqdm", "matplotlib", "kornia"):
        require(module, "ssl_fast.train")
    config = {k: v for k, v in given.items() if k not in ("out", "resume", "overwrite", "method_args")}
    extra, known = given["method_args"], method_arguments(given["method"])
    for name in extra:
        if name not in known:
            allowed = [*config, *known]
            raise TypeError(f"train: unknown argument {name!r}, {nearest(name, allowed)}allowed: {', '.join(allowed)}")
    config |= {name: extra.get(name, p.default) for name, p in known.items()}

    at_least = {
        "epochs": 1,
        "batch_size": 2,
        "log_every": 1,
        "knn_every": 0,
        "save_every": 0,
        "keep_every": 0,
        "seed": 0,
    }
    at_least |= {"num_workers": 0} if config["num_workers"] is not None else {}
    for key, low in at_least.items():
        if not isinstance(config[key], int) or config[key] < low:
            raise ValueError(f"{key}: got {config[key]!r}, allowed: a whole number >= {low}")
    if config["seed"] >= 2**63:
        raise ValueError(f"seed: got {config['seed']}, allowed: a whole number below 2**63")
    for key in ("lr", "weight_decay", "warmup_epochs"):
        if config[key] is not None and not 0 <= config[key] < math.inf:
            raise ValueError(f"{key}: got {config[key]!r}, allowed: a finite number >= 0")
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


def plain(value: Any) -> Any:
    """A value as YAML holds it; a module by the name of its class."""
    if isinstance(value, Policy):
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(value).items()}
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else f"<{type(value).__qualname__}>"
