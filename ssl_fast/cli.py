"""`ssl-fast COMMAND key=value ...`: the functions of the package, with their own names and arguments."""

from __future__ import annotations

import inspect
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from ssl_fast import info
from ssl_fast._extras import nearest
from ssl_fast.arguments import instead_of, method_arguments
from ssl_fast.augment import Policy
from ssl_fast.bench import bench
from ssl_fast.demo import demo
from ssl_fast.embed import embed
from ssl_fast.evaluate import evaluate
from ssl_fast.export import export
from ssl_fast.plan import Plan, plan
from ssl_fast.progress import console
from ssl_fast.report import report
from ssl_fast.run import read_args
from ssl_fast.train import train


def show_info() -> None:
    """Every op by backend, and why one is not there; versions, CPU and GPU."""
    info.main()


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": train,
    "evaluate": evaluate,
    "embed": embed,
    "export": export,
    "report": report,
    "plan": plan,
    "bench": bench,
    "demo": demo,
    "info": show_info,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 after an error, 2 for a wrong command line, 130 after Ctrl-C."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}, {nearest(name, list(COMMANDS))}allowed: {', '.join(COMMANDS)}", 2)
    command = COMMANDS[name]
    if any(word in ("-h", "--help", "help") for word in words):
        names = "[name ...] " if _takes_names(command) else ""
        print(f"ssl-fast {name} {names}key=value ...\n\n{inspect.getdoc(command)}\n\nDefaults: {_defaults(command)}")
        return 0
    try:
        named, arguments = _parse(command, words)
    except (ValueError, OSError, ImportError) as error:
        return _fail(f"{name}: {error}", 2)
    try:
        with console():
            result = command(*named, **arguments)
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        return _fail(f"{name}: {error}", 1)
    if isinstance(result, Plan):
        print(result)
    elif isinstance(result, dict) and command is not demo and os.environ.get("RANK", "0") == "0":
        print("\n".join(f"{key:12} {value}" for key, value in result.items()))
    return 0


def _parse(command: Callable[..., Any], words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The names that stand alone, and the keys with their values."""
    pairs: dict[str, str] = {}
    words = _joined(command, words)
    names = [w for w in words if _takes_names(command) and "=" not in w and not w.startswith("-")]
    for word in words:
        key, equals, value = word.partition("=")
        if word in names:
            continue
        if equals and not value:
            raise ValueError(f"{key}: got nothing after '=', allowed: a value{_left_out(command, key)}")
        if not equals:
            raise ValueError(f"got {word!r}, allowed: key=value, such as {_example(command, word)}")
        pairs[key.removeprefix("--")] = value
    allowed = _allowed(command, pairs.get("method", "simclr"))
    for key in pairs:
        if key not in allowed:
            raise ValueError(f"unknown key {key!r}, {instead_of(key, list(allowed))}")
    given = {key: _convert(key, value, allowed[key].annotation) for key, value in pairs.items()}
    if command is train and given.get("resume"):
        given = _of_the_run(given, allowed) | given
    for key, parameter in allowed.items():
        if parameter.default is parameter.empty and key not in given:
            raise ValueError(f"{key}= is missing; `ssl-fast {command.__name__} --help` explains every key")
    return names, given


def _joined(command: Callable[..., Any], words: list[str]) -> list[str]:
    """`--quick` as --quick=true, and `--device cpu` as --device=cpu."""
    parameters = inspect.signature(command, eval_str=True).parameters
    flags = {f"--{key}" for key, p in parameters.items() if bool in _kinds(p.annotation)}
    joined: list[str] = []
    for word in words:
        last = joined[-1] if joined else ""
        if last.startswith("--") and "=" not in last + word and not word.startswith("-"):
            joined[-1] += f"={word}"
        else:
            joined.append(f"{word}=true" if word in flags else word)
    return joined


def _takes_names(command: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(command).parameters.values())


def _allowed(command: Callable[..., Any], method: str) -> dict[str, inspect.Parameter]:
    """What a command line can give: the parameters of the command and of its method that plain values fill."""
    parameters = dict(inspect.signature(command, eval_str=True).parameters)
    if parameters.pop("method_args", None):
        parameters |= method_arguments(method)

    def fills(kind: Any) -> bool:
        return kind in (bool, int, float, str) or typing.get_origin(kind) is Literal

    given = {k: p for k, p in parameters.items() if p.kind is not p.VAR_POSITIONAL}
    return {k: p for k, p in given.items() if any(map(fills, _kinds(p.annotation)))}


def _of_the_run(given: dict[str, Any], allowed: dict[str, inspect.Parameter]) -> dict[str, Any]:
    """The arguments of the run to resume, so that `out=... resume=true` is enough."""
    if "out" not in given:
        return {}
    out = Path(given["out"]).expanduser()
    if given["resume"] == "auto" and not (out / "args.yaml").exists():
        return {}
    saved = read_args(out)
    if isinstance(saved["augment"], dict):
        second = saved["augment"].pop("second", None)
        saved["augment"] = Policy(**saved["augment"], second=second and Policy(**second))
    return {key: value for key, value in saved.items() if key in _allowed(train, saved["method"])}


def _convert(key: str, raw: str, annotation: Any) -> Any:
    """A word of the command line as the first type of the annotation that reads it."""
    readers: dict[Any, Callable[[str], Any]] = {
        NoneType: {"none": None}.__getitem__,
        bool: {"true": True, "false": False}.__getitem__,
        int: int,
        float: float,
        str: str,
    }
    words = [word for kind in _kinds(annotation) for word in typing.get_args(kind)]  # of a Literal
    if raw in words:
        return raw
    kinds = [kind for kind in readers if kind in _kinds(annotation)]
    for kind in kinds:
        try:
            return readers[kind](raw.lower() if kind in (NoneType, bool) else raw)
        except (KeyError, ValueError):
            continue
    names = {NoneType: "none", bool: "true or false", int: "a whole number", float: "a number"}
    allowed = [*(names[kind] for kind in reversed(kinds)), *words]
    raise ValueError(f"{key}: got {raw!r}, allowed: {' or '.join(allowed)}")


def _left_out(command: Callable[..., Any], key: str) -> str:
    parameter = inspect.signature(command).parameters.get(key)
    required = parameter is not None and parameter.default is parameter.empty
    return "" if required else f"; leave {key}= out for its default"


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; a Literal is one."""
    return (annotation,) if typing.get_origin(annotation) is Literal else typing.get_args(annotation) or (annotation,)


def _example(command: Callable[..., Any], word: str) -> str:
    allowed = _allowed(command, "simclr")
    key = word.lstrip("-")
    return f"{key}=..." if key in allowed else f"{next(iter(allowed), 'key')}=..."


def _defaults(command: Callable[..., Any]) -> str:
    allowed = _allowed(command, "simclr")
    pairs = [f"{k}={str(p.default).lower()}" for k, p in allowed.items() if p.default is not p.empty]
    return " ".join(pairs) or "no keys"


def _overview() -> str:
    lines = [f"  {name:10}{(inspect.getdoc(f) or '').splitlines()[0]}" for name, f in COMMANDS.items()]
    return "\n".join(["ssl-fast COMMAND key=value ...", "", *lines, "", "ssl-fast COMMAND --help lists the keys."])


def _fail(message: str, status: int) -> int:
    print(f"ssl-fast: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
