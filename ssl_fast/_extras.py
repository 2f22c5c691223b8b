"""Optional dependencies, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any

PIP_NAMES = {"sklearn": "scikit-learn", "yaml": "PyYAML", "PIL": "Pillow", "umap": "umap-learn"}


def require(module: str, purpose: str, extra: str = "train") -> Any:
    """Import and return a module of an optional extra.

    Raises:
        ImportError: naming the purpose, the package and the pip command, where the module is not installed.

    Example:
        >>> yaml = require("yaml", "ssl_fast.train")
    """
    root = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != root:
            raise
        name = PIP_NAMES.get(root, root)
        raise ImportError(f'{purpose} needs {name}, which is not installed: pip install "ssl_fast[{extra}]"') from error


def nearest(name: object, allowed: list[str]) -> str:
    """ "did you mean 'x'? " for a misspelt name, or nothing."""
    import difflib

    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5) if isinstance(name, str) else []
    return f"did you mean {close[0]!r}? " if close else ""
