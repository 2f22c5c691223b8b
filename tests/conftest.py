"""Without a GPU the Triton kernels are interpreted; memory that an op leaves unwritten reads as NaN."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before any is imported


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch fills fresh tensors with NaN in deterministic mode, in C++ as in Python."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
