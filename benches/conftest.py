"""`pytest benches/ --device cpu`, as `ssl-fast bench --device cpu`."""

from __future__ import annotations

import os

import pytest

from ssl_fast.bench import check_device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="of benches: cpu or cuda; without it the GPU where there is one")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("device")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the benches ask which there are
    try:
        check_device(device)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
