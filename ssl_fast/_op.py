"""class Op: the schema, reference, backends and choice of one operation. The only dispatch code in the project."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack as _peek_interpreter_stack
from torch.autograd import forward_ad as _forward_ad

BACKENDS = ("native", "triton", "reference")  # the order in which an op tries them
HALF_AND_FLOAT = (torch.float16, torch.bfloat16, torch.float32)
UNMEASURED = "not yet measured on a GPU"

OPS: dict[str, Op] = {}

# Public ops live in `ssl_fast`. C++ implements the same schemas in `ssl_fast_native`, so that the choice between
# backends stays here and the schema is written once.
_PUBLIC = torch.library.Library("ssl_fast", "FRAGMENT")
_NATIVE = torch.library.Library("ssl_fast_native", "FRAGMENT")


def _checked(name: str | None, where: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{where}: got {name!r}, allowed: {', '.join(BACKENDS)}, or unset to choose automatically")
    return name


_forced: str | None = _checked(os.environ.get("SSL_FAST_BACKEND") or None, "SSL_FAST_BACKEND")


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run every op in the block on one backend: "native" (C++ or CUDA C++), "triton" or "reference".

    None returns to the automatic choice. An op that cannot run there raises and says why. The setting is one for the
    process, like torch.backends; a backward pass uses the backend of its forward even after the block has ended.

    Example:
        >>> with ssl_fast.backend("reference"):
        ...     loss = ssl_fast.functional.nt_xent(z1, z2, 0.5)
    """
    global _forced
    before, _forced = _forced, _checked(name, "backend")
    try:
        yield
    finally:
        _forced = before


@functools.cache
def native_reason(device: str) -> str | None:
    """Load the C++ library for a device type; None when it is there, else why it is not."""
    if device not in ("cpu", "cuda"):
        return f"no C++ library for {device} tensors"
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible"
    folder, stem = Path(__file__).parent, f"_C_{device}"
    library = next(folder.glob(f"{stem}*.so"), None)
    if library is None:
        return _build_record().get(stem) or (
            f"{stem} was not built; install with `pip install --no-build-isolation .` where torch, a C++ compiler"
            + (" and nvcc are found" if device == "cuda" else " is found")
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


def _build_record() -> dict[str, str]:
    """What setup.py wrote about libraries it could not build."""
    import json

    record = Path(__file__).with_name("_build.json")
    return json.loads(record.read_text()) if record.exists() else {}


@functools.cache
def triton_reason(device: str) -> str | None:
    """None when Triton kernels run on a device type, else why they do not."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton has no CPU backend (TRITON_INTERPRET=1 interprets the kernels, for tests)"
    if device not in ("cpu", "cuda"):
        return f"the kernels are for CUDA, not {device}"
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None


class Op:
    """One operator of ssl_fast: `torch.ops.ssl_fast.<name>`.

    Args:
        schema: the operator's schema as torch.library takes it, "name(Tensor x, ...) -> ...".
        reference: the pure torch definition; runs on any device and dtype.
        fake: the shape function, for torch.compile and export.
        native: the dtypes that the C++ implementation takes, by device type.
        triton: "module:launcher", imported at the first call.
        triton_dtypes: the dtypes that the launcher takes.
        decides: the argument whose device and dtype decide the backend.
        gpu: on which GPU the op was measured.

    A dtype or device that a backend does not declare falls back to the next one, or raises with the reason where the
    backend was asked for by name. The choice is cached per (device, dtype).
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        *,
        fake: Callable[..., Any],
        native: Mapping[str, Sequence[torch.dtype]] | None = None,
        triton: str | None = None,
        triton_dtypes: Sequence[torch.dtype] = HALF_AND_FLOAT,
        decides: str,
        gpu: str = UNMEASURED,
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.reference = reference
        self.native = dict(native or {})
        self.triton = triton
        self.triton_dtypes = tuple(triton_dtypes)
        self.gpu = gpu
        self._implementations: dict[tuple[torch.device, torch.dtype, str], tuple[str, Callable[..., Any]]] = {}

        arguments, returns = schema.rsplit(" -> ", 1)
        _PUBLIC.define(f'{arguments[:-1]}, *, str backend="auto") -> {returns}')
        _NATIVE.define(schema)
        _PUBLIC.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ssl_fast::{self.name}", lambda *args, backend="auto": fake(*args), lib=_PUBLIC)
        self._overload = getattr(torch.ops.ssl_fast, self.name).default
        names = [argument.name for argument in self._overload._schema.arguments]
        self._decides = names.index(decides)
        OPS[self.name] = self

    def __call__(self, *args: Any, backend: str = "auto") -> Any:
        if _traced():
            return self._overload(*args, backend=backend)
        return self._implementation(args[self._decides], backend)[1](*args)

    def backend_for(self, tensor: Tensor) -> str:
        """The backend to run on a tensor now, for a forward to hand to its backward."""
        if torch.compiler.is_compiling():  # resolved when the compiled graph runs; a forced one is kept as a constant
            return _forced or "auto"
        return self._implementation(tensor, "auto")[0]

    def chosen(self, tensor: Tensor) -> tuple[str, Callable[..., Any]]:
        """backend_for(tensor), and the operator on it: what a small forward calls at least cost."""
        if not _traced():
            return self._implementation(tensor, "auto")
        backend = self.backend_for(tensor)
        return backend, functools.partial(self._overload, backend=backend)

    def reason(self, backend: str, device: str, dtype: torch.dtype) -> str | None:
        """None when a backend runs a dtype on a device type, else why it does not."""
        if backend == "reference":
            return None
        if backend == "native":
            dtypes = self.native.get(device)
            missing = f"no C++ implementation for {device}" if dtypes is None else native_reason(device)
        else:
            dtypes = self.triton_dtypes
            missing = "no Triton implementation" if self.triton is None else triton_reason(device)
        if missing or dtype in (dtypes or ()):
            return missing
        allowed = ", ".join(_short(d) for d in dtypes or ())
        return f"takes {allowed}, not {_short(dtype)}"

    def _run(self, *args: Any, backend: str = "auto") -> Any:
        return self._implementation(args[self._decides], backend)[1](*args)

    def _implementation(self, deciding: Any, asked: str) -> tuple[str, Callable[..., Any]]:
        tensor = deciding if isinstance(deciding, Tensor) else deciding[0]
        if asked == "auto" and _forced is not None:
            asked = _forced
        key = (tensor.device, tensor.dtype, asked)
        found = self._implementations.get(key)
        if found is None:
            device, dtype = tensor.device.type, tensor.dtype
            name = self._choose(device, dtype) if asked == "auto" else asked
            reason = self.reason(name, device, dtype)
            if reason:
                raise RuntimeError(
                    f"backend {name!r} cannot run {self.name} on {_short(dtype)} {device} tensors: {reason}. "
                    "Leave the choice to ssl_fast (unset SSL_FAST_BACKEND), or see `python -m ssl_fast.info`"
                )
            found = self._implementations[key] = (name, self._load(name))
        return found

    def _choose(self, device: str, dtype: torch.dtype) -> str:
        automatic = [b for b in BACKENDS if not (b == "triton" and device == "cpu")]  # interpreted: for tests alone
        return next(b for b in automatic if self.reason(b, device, dtype) is None)

    def _load(self, backend: str) -> Callable[..., Any]:
        if backend == "reference":
            return without_autocast(self.reference)
        if backend == "native":
            return getattr(torch.ops.ssl_fast_native, self.name).default._op  # type: ignore[no-any-return]
        module, launcher = self.triton.split(":")  # type: ignore[union-attr]
        return without_autocast(getattr(importlib.import_module(module), launcher))


def _traced() -> bool:
    """The dispatcher is for those who trace: compile, export, fake tensors, vmap. It costs 6 us a call, and more where
    it has to convert a long list of tensors."""
    return torch.compiler.is_compiling() or _len_torch_dispatch_stack() > 0 or _peek_interpreter_stack() is not None


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def transforming() -> bool:
    """Whether torch.func, forward-mode differentiation, torch.jit.trace or an export to ONNX looks on: they follow a
    reference, operation by operation, and know neither the operators nor an autograd.Function."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    if _forward_ad._current_level >= 0 or _peek_interpreter_stack() is not None:
        return True
    return torch._C._get_tracing_state() is not None


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast, where it is on for a tensor's device, casts to in front of a matrix product."""
    if not _is_any_autocast_enabled():  # asking by device type costs as much as everything else that is checked
        return None
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """An op has decided its dtypes; autocast must not round the products inside it again."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not _is_any_autocast_enabled():
            return function(*args)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args)

    return run


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
