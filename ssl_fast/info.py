"""`python -m ssl_fast.info`: what runs here, op by backend, and why not where it does not."""

from __future__ import annotations

import platform

import torch

import ssl_fast
from ssl_fast import _op


def report() -> str:
    """The versions, the device, and for each op and backend "yes" with its dtypes, or the reason why not."""
    lines = [
        f"ssl_fast {ssl_fast.__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"Triton {_version('triton')}",
        f"CPU: {cpu_name()}, {torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}",
    ]
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        lines.append(f"GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    else:
        lines.append("GPU: none visible to torch")
    width = max(len(name) for name in _op.OPS) + 2
    for device in devices:
        lines += ["", f"on {device} tensors, in the order tried:"]
        for name, op in _op.OPS.items():
            for backend in _op.BACKENDS:
                lines.append(f"  {name:{width}}{backend:11}{_state(op, backend, device)}")
    if "cuda" not in devices:
        lines += ["", "on cuda tensors:"]
        lines += [f"  {name:{width}}{_gpu_state(op)}" for name, op in _op.OPS.items()]
    return "\n".join(lines)


def _state(op: _op.Op, backend: str, device: str) -> str:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    runs = [d for d in dtypes if op.reason(backend, device, d) is None]
    if not runs:
        return f"no: {op.reason(backend, device, torch.float32)}"
    return "yes: " + ", ".join(str(d).removeprefix("torch.") for d in runs)


def _gpu_state(op: _op.Op) -> str:
    kinds = [kind for kind, there in (("triton", op.triton), ("CUDA C++", "cuda" in op.native)) if there]
    return f"{', '.join(kinds) or 'reference'}: {op.gpu}"


def _version(module: str) -> str:
    try:
        return __import__(module).__version__
    except ImportError:
        return "not installed"


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    print(report())


if __name__ == "__main__":
    main()
