"""Shared fixtures, and which marked tests run: see the markers in pyproject.toml."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from computing_on import has_cuda, is_cuda, on_device

from offload.errors import UnsupportedError

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself then


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help='where models compute, as Policy.device: "simulated:latest" or "cuda", say; '
        "several, separated by commas, share each model out",
    )
    parser.addoption(
        "--update", default="cpu", help="with --device: where updates run, as Policy.update"
    )
    parser.addoption("--slow", action="store_true", help="run the tests marked slow")
    parser.addoption(
        "--nvme", type=Path, metavar="DIR", help="run the tests marked nvme, on files in DIR"
    )


@pytest.fixture(autouse=True)
def on_the_device(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With --device: wrapped models compute there, with room for three of their largest units.

    Where updates run there, it is the least device budget.
    """
    device, update = pytestconfig.getoption("--device"), pytestconfig.getoption("--update")
    if device == "cpu":
        yield
        return
    with on_device(device, monkeypatch, update):
        yield


@pytest.fixture
def on_cuda(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models compute on the CUDA device, as with --device cuda; of tests marked gpu."""
    if is_cuda(pytestconfig.getoption("--device")):
        yield
        return
    with on_device("cuda", monkeypatch):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """With --device cuda, skip what is refused there by name."""
    try:
        return (yield)
    except UnsupportedError as error:
        if is_cuda(pyfuncitem.config.getoption("--device")) and "on cuda" in str(error):
            pytest.skip(str(error))
        raise


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "slow: give --slow"
    if config.getoption("--nvme") is None:
        reasons["nvme"] = "measures a disk: give --nvme DIR"
    device = config.getoption("--device")
    if device != "cpu":
        reasons["own_device"] = "says itself where models compute: give no --device"
    if config.getoption("--update") != "cpu":
        reasons["cpu_updates"] = "says what updates on the CPU need: give no --update"
    if is_cuda(device) and not has_cuda():
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"--device {device}: no CUDA device"))
    if any("gpu" in item.keywords for item in items) and not has_cuda():
        reasons["gpu"] = "no CUDA device"
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache out of the tests, and the tests out of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def nvme_dir(pytestconfig: pytest.Config) -> Path:
    """The folder of a real disk that tests marked nvme write to."""
    folder = pytestconfig.getoption("--nvme")
    assert isinstance(folder, Path), "only tests marked nvme may use nvme_dir"
    return folder
