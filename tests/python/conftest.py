"""Shared fixtures, and which marked tests run: see the markers in pyproject.toml."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from offload.planner import UnitSpec, smallest_device_budget
from offload.policy import Policy
from offload.runtime.resources import Resources


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help='where wrapped models compute, as Policy.device: "simulated:latest", say',
    )
    parser.addoption(
        "--update", default="cpu", help="with --device: where updates run, as Policy.update"
    )
    parser.addoption("--slow", action="store_true", help="run the tests marked slow")
    parser.addoption(
        "--nvme", type=Path, metavar="DIR", help="run the tests marked nvme, on files in DIR"
    )


@pytest.fixture(autouse=True)
def on_the_device(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --device: wrapped models compute there, with room for three of their largest units.

    Where updates run there, it is the least device budget.
    """
    device, update = pytestconfig.getoption("--device"), pytestconfig.getoption("--update")
    if device == "cpu":
        return
    plan = Resources.__init__

    def plan_with_device(self: Resources, policy: Policy, specs: Sequence[UnitSpec]) -> None:
        flat = [unit.param_bytes + unit.grad_bytes for unit in specs if not unit.nested]
        nested = [unit.param_bytes + unit.grad_bytes for unit in specs if unit.nested]
        nbytes = 3 * max(flat, default=0) + sum(nested)
        if update != "cpu":
            nbytes = smallest_device_budget(specs, updates=True)
        budget = dataclasses.replace(policy.budget, device=nbytes)
        plan(self, dataclasses.replace(policy, device=device, budget=budget, update=update), specs)

    monkeypatch.setattr(Resources, "__init__", plan_with_device)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "slow: give --slow"
    if config.getoption("--nvme") is None:
        reasons["nvme"] = "measures a disk: give --nvme DIR"
    if config.getoption("--device") != "cpu":
        reasons["own_device"] = "says itself where models compute: give no --device"
    if any("gpu" in item.keywords for item in items) and not has_cuda():
        reasons["gpu"] = "no CUDA device"
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


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
