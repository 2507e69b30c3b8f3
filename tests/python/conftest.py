"""Shared fixtures, and which marked tests run: see the markers in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow")
    parser.addoption(
        "--nvme", type=Path, metavar="DIR", help="run the tests marked nvme, on files in DIR"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "slow: give --slow"
    if config.getoption("--nvme") is None:
        reasons["nvme"] = "measures a disk: give --nvme DIR"
    if any("gpu" in item.keywords for item in items) and not has_cuda():
        reasons["gpu"] = "no CUDA device"
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def nvme_dir(pytestconfig: pytest.Config) -> Path:
    """The folder of a real disk that tests marked nvme write to."""
    folder = pytestconfig.getoption("--nvme")
    assert isinstance(folder, Path), "only tests marked nvme may use nvme_dir"
    return folder
