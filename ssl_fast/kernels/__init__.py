"""Source checkouts only: the Triton kernels are in <root>/kernels, which setup.py installs in place of this folder."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
