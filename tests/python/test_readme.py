"""What the documents promise is true: examples run, make targets exist, links lead somewhere.

Rule: each ```python block of the README stands alone. It runs in a namespace and a current folder
of its own; one that limits its process (setrlimit) runs in a process of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "csrc/**/*.md")
    for path in ROOT.glob(pattern)
)

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
MAKE = re.compile(r"(?:^|[$;&]\s*)make +([a-z][a-z-]*)", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def python_blocks(text: str) -> list[tuple[str, int, str]]:
    """(heading above, line number of the first line, source) of each python block."""
    found = []
    for match in BLOCK.finditer(text):
        if match.group(1) == "python":
            before = text[: match.start()]
            heading = re.findall(r"^#+ (.+)$", before, re.MULTILINE)[-1]
            found.append((heading, before.count("\n") + 2, match.group(2)))
    return found


def make_targets(text: str) -> set[str]:
    """Targets of the make commands in blocks and inline code."""
    code = [body for _, body in BLOCK.findall(text)]
    code += INLINE_CODE.findall(BLOCK.sub("", text))
    return {target for piece in code for target in MAKE.findall(piece)}


def anchors(text: str) -> set[str]:
    """The fragments that the headings of a document answer to."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def broken_links(document: Path, text: str) -> list[str]:
    """Relative links in `text`, the content of `document`, that lead nowhere."""
    broken = []
    for link in LINK.findall(BLOCK.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (
            fragment and fragment not in anchors(target.read_text() if name else text)
        ):
            broken.append(link)
    return broken


BLOCKS = python_blocks(README.read_text())


def test_readme_has_examples() -> None:
    assert len(BLOCKS) >= 8


@pytest.mark.parametrize(("heading", "line", "source"), BLOCKS, ids=[b[0] for b in BLOCKS])
def test_readme_example_runs(
    heading: str, line: int, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "\n" * (line - 1) + source  # tracebacks show the README's line numbers
    if "setrlimit" in source:
        script = tmp_path / "example.py"
        script.write_text(source)
        path = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
        run = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
        command = [sys.executable, "-W", "error", "-c", path + run]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return
    exec(compile(source, str(README), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    defined = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert make_targets(document.read_text()) <= defined


def test_readme_names_the_two_commands() -> None:
    assert {"demo", "test"} <= make_targets(README.read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    assert broken_links(document, document.read_text()) == []


def test_link_check_catches_a_missing_file_and_heading() -> None:
    text = "# One\n[a](missing.md) [b](#two) [c](#one) [d](LICENSE) [e](https://x.org/y)\n"
    assert broken_links(README, text) == ["missing.md", "#two"]


def test_make_check_reads_blocks_and_inline_code() -> None:
    text = "make nothing of it\n`make one ARGS=x`\n```console\n$ make two\n```\n"
    assert make_targets(text) == {"one", "two"}
