"""Checks that arguments of many functions share. A message names the argument, its value and what is allowed."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def is_number(value: object) -> TypeGuard[float]:
    """A real number of Python, NumPy or any other kind; True and False are none."""
    return isinstance(value, (float, int, numbers.Real)) and not isinstance(value, bool)


def as_float(number: Any) -> float:
    """Of a number of any kind, infinite where it is too large for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def whole(name: str, value: Any, least: int = 1, hint: str = "") -> int:
    """A whole number of any kind, as an int."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: got {value!r}, allowed: a whole number >= {least}{hint}")
    return int(value)


def check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: got {value!r}, allowed: True, False")


def a_path(name: str, value: Any, allowed: str) -> Path:
    """A path with the home folder in it; "" would be the current folder."""
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError(f"{name}: got {value!r}, allowed: {allowed}")
    return Path(value).expanduser()


def check_callable(name: str, value: object, allowed: str) -> None:
    if not callable(value):
        raise TypeError(f"{name}: got {value!r}, allowed: {allowed}")


def with_plain_numbers(function: Function) -> Function:
    """A function that gets numbers of NumPy and others as Python's own: neither args.yaml nor a checkpoint of plain
    values holds the others."""

    def plain(value: Any) -> Any:
        if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
            return value
        return int(value) if isinstance(value, numbers.Integral) else float(value)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return cast(Function, run)
