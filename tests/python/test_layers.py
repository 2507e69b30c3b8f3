"""Imports point one way. The tables are the layers of the design; a new folder or module joins one.

csrc:     base <- sys <- cuda <- {mem, io} <- {store, device} <- stream <- bind;
          optim sees base only, kernels see optim and cuda and are seen by bind
offload:  {policy, errors, trace} <- _native <- tiers <- {runtime, optim} <- checkpoint <- api
          <- {integrations, cli}; planner sees policy and errors, report sees trace and planner
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Folder under csrc -> the other folders its files may include.
CSRC_LAYERS: dict[str, set[str]] = {
    "base": set(),
    "sys": {"base"},
    "cuda": {"base", "sys"},
    "mem": {"base", "sys", "cuda"},
    "io": {"base", "sys"},
    "optim": {"base"},
    "store": {"base", "sys", "mem", "io"},
    "kernels": {"base", "sys", "cuda", "optim"},
    "device": {"base", "sys", "cuda", "mem"},
    "stream": {"base", "sys", "mem", "io", "store", "device", "optim"},
    "bind": {"base", "sys", "mem", "io", "store", "device", "optim", "kernels", "stream"},
}

# Module or package under offload -> the other ones it may import.
FACTS = {"policy", "errors", "trace"}
UP_TO_TIERS = FACTS | {"_native", "tiers"}
UP_TO_CHECKPOINT = UP_TO_TIERS | {"planner", "runtime", "optim", "checkpoint"}
UP_TO_API = UP_TO_CHECKPOINT | {"report", "api"}
PYTHON_LAYERS: dict[str, set[str]] = {
    "policy": {"errors"},
    "errors": set(),
    "trace": set(),
    "_native": FACTS,
    "tiers": FACTS | {"_native", "planner"},  # it holds the plan it obeys
    "planner": {"policy", "errors"},
    "report": {"trace", "planner"},
    "runtime": UP_TO_TIERS | {"planner"},
    "optim": UP_TO_TIERS,
    "checkpoint": UP_TO_CHECKPOINT - {"checkpoint"},
    "api": UP_TO_CHECKPOINT | {"report"},
    "integrations": UP_TO_API,
    "cli": UP_TO_API,
    "__main__": {"cli"},
}
PYTHON_LAYERS["__init__"] = set(PYTHON_LAYERS)  # the facade: it only re-exports
WITHOUT_TORCH = {"planner", "policy", "errors"}

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
PYTHON_HEADERS = ("pybind11/", "Python.h")
TORCH_HEADERS = ("torch/", "ATen/", "c10/")


def csrc_violations(layer: str, text: str) -> Iterator[str]:
    """What the includes in `text`, a source of csrc/`layer`, break."""
    for quoted, angled in INCLUDE.findall(text):
        name = quoted or angled
        if name.startswith(TORCH_HEADERS):
            yield f"{name}: the native core does not know torch"
        if name.startswith(PYTHON_HEADERS) and layer != "bind":
            yield f"{name}: only bind knows Python"
        if not quoted:
            continue
        target, slash, _ = quoted.partition("/")
        if not slash or target not in CSRC_LAYERS:
            yield f'"{quoted}": quoted includes are relative to csrc and name a known layer'
        elif target not in CSRC_LAYERS[layer] | {layer}:
            yield f'"{quoted}": {layer} may include {sorted(CSRC_LAYERS[layer])}'


def imported_modules(tree: ast.Module, package: str) -> Iterator[str]:
    """Every absolute module name that `tree`, a module of `package`, may import.

    `from a import b` gives a.b: b may be a module. Imports for typing only count as well.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def python_violations(path: Path, text: str) -> Iterator[str]:
    """What the imports in `text`, the module at `path` (relative to the root), break."""
    parts = path.with_suffix("").parts  # ("offload", "tiers", "mover")
    layer = parts[1]
    package = ".".join(parts[:-1])
    for name in imported_modules(ast.parse(text), package):
        top, _, rest = name.partition(".")
        if top == "torch" and layer in WITHOUT_TORCH:
            yield f"imports {name}: {layer} does not see torch"
        if top != "offload":
            continue
        target = rest.partition(".")[0]
        if target not in PYTHON_LAYERS:
            yield f"imports {name}: name the module that defines it, not the package"
        elif target not in PYTHON_LAYERS[layer] | {layer}:
            yield f"imports {name}: {layer} may import {sorted(PYTHON_LAYERS[layer])}"


def test_csrc_includes_point_one_way() -> None:
    sources = [path for ending in ("*.cc", "*.cu", "*.h") for path in (ROOT / "csrc").rglob(ending)]
    assert sources
    found = []
    for path in sources:
        layer = path.relative_to(ROOT / "csrc").parts[0]
        assert layer in CSRC_LAYERS, f"csrc/{layer} is new: add it to CSRC_LAYERS in {__file__}"
        found += [
            f"{path.relative_to(ROOT)}: {why}" for why in csrc_violations(layer, path.read_text())
        ]
    assert not found, "\n".join(found)


def test_python_imports_point_one_way() -> None:
    sources = [path for ending in ("*.py", "*.pyi") for path in (ROOT / "offload").rglob(ending)]
    assert sources
    found = []
    for path in (source.relative_to(ROOT) for source in sources):
        layer = path.with_suffix("").parts[1]
        assert layer in PYTHON_LAYERS, (
            f"offload/{layer} is new: add it to PYTHON_LAYERS in {__file__}"
        )
        found += [f"{path}: {why}" for why in python_violations(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("table", [CSRC_LAYERS, PYTHON_LAYERS], ids=["csrc", "offload"])
def test_layer_tables_have_no_cycle(table: dict[str, set[str]]) -> None:
    left = {layer: set(below) for layer, below in table.items()}
    left.get("__init__", set()).discard("__init__")
    while left:
        free = {layer for layer, below in left.items() if not below & left.keys()}
        assert free, f"a cycle among {sorted(left)}"
        left = {layer: below for layer, below in left.items() if layer not in free}


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("base", '#include "sys/file.h"'),
        ("mem", '#include "io/io_engine.h"'),
        ("io", '# include "mem/host_arena.h"'),
        ("optim", '#include "sys/file.h"'),
        ("store", '#include "stream/pipeline.h"'),
        ("stream", '#include "bind/module.h"'),
        ("io", '#include "io_engine.h"'),
        ("io", "#include <pybind11/pybind11.h>"),
        ("bind", "#include <torch/extension.h>"),
    ],
)
def test_csrc_check_catches(layer: str, line: str) -> None:
    assert list(csrc_violations(layer, f"// A comment.\n{line}\n"))


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("io", '#include "io/io_engine.h"'),
        ("io", '#include "base/status.h"'),
        ("stream", '#include "optim/adamw.h"'),
        ("bind", "#include <pybind11/pybind11.h>"),
        ("base", "#include <vector>"),
    ],
)
def test_csrc_check_allows(layer: str, line: str) -> None:
    assert not list(csrc_violations(layer, f"{line}\n"))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("offload/policy.py", "import offload.api"),
        ("offload/policy.py", "from . import tiers"),
        ("offload/planner/cost.py", "import torch.nn"),
        ("offload/planner/cost.py", "from torch import Tensor"),
        ("offload/planner/cost.py", "from ..trace import AccessTrace"),
        ("offload/tiers/mover.py", "from offload.runtime.unit import Unit"),
        ("offload/tiers/__init__.py", "from ..runtime import Unit"),
        ("offload/optim/adamw.py", "from offload import runtime"),
        ("offload/optim/adamw.py", "def late():\n    from ..runtime.unit import Unit"),
        ("offload/runtime/unit.py", "from offload.optim import AdamW"),
        ("offload/report.py", "from offload.runtime import unit"),
        ("offload/cli.py", "import offload.integrations"),
        ("offload/checkpoint.py", "from offload import wrap"),
    ],
)
def test_python_check_catches(path: str, line: str) -> None:
    assert list(python_violations(Path(path), f"import os\n{line}\n"))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("offload/__init__.py", "from .api import wrap\nfrom offload.optim import AdamW"),
        ("offload/planner/cost.py", "from ..policy import Policy\nfrom . import spec"),
        ("offload/runtime/unit.py", "import torch\nfrom offload._native import HostArena"),
        ("offload/runtime/hooks/forward.py", "from ...tiers.mover import Mover"),
        ("offload/checkpoint.py", "from offload import optim, runtime"),
        ("offload/__main__.py", "from offload.cli import main"),
    ],
)
def test_python_check_allows(path: str, line: str) -> None:
    assert not list(python_violations(Path(path), f"{line}\n"))
