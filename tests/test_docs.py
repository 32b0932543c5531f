"""What the documents say is so: snippets run, names exist, links lead somewhere, the options are those of the code."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from lightning_ssd.strategy.settings import Options, argument_docs

# Used by name, not by argument: sessions end with the test, and small models train on one thread.
from tests.helpers.fixtures import _sessions_end  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_ssd"
DOCS = ROOT / "docs"
ARCHITECTURE = (DOCS / "design" / "architecture.md").read_text()

BLOCK = re.compile(r"^```python run\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REFERENCE = re.compile(r"`([\w./]+\.(?:py|cpp|hpp|pyi))(?:::([\w.]+))?`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)")


def runnable_blocks(text: str) -> Iterator[tuple[int, str]]:
    """Line on which each block begins, counted from 1, and its code."""
    for found in BLOCK.finditer(text):
        yield text.count("\n", 0, found.start(1)) + 1, found[1]


def has_name(tree: ast.AST, name: str) -> bool:
    """Whether a module defines ``name``, which may be ``Class.method``."""
    head, _, rest = name.partition(".")
    for node in ast.iter_child_nodes(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = {getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)}
        if head in names and (not rest or has_name(node, rest)):
            return True
    return False


def test_snippets_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, as somebody would who reads the guide from the top."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_SSD_PATH", raising=False)
    guide = DOCS / "guide.md"
    blocks = list(runnable_blocks(guide.read_text()))
    assert len(blocks) > 5
    namespace: dict[str, object] = {"__name__": "guide"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning has advice on every small run
        for line, code in blocks:
            exec(compile("\n" * (line - 1) + code, str(guide), "exec"), namespace)


@pytest.mark.parametrize(("file", "name"), sorted(set(REFERENCE.findall(ARCHITECTURE))))
def test_names_in_the_architecture_exist(file: str, name: str) -> None:
    """A bare file name, such as `plan.py` in a row about its package, may lie in any folder."""
    path = next((p for p in (PACKAGE / file, ROOT / file) if p.is_file()), None)
    if path is None and "/" not in file:
        path = next(iter(PACKAGE.rglob(file)), None)
    assert path is not None, f"{file} does not exist"
    assert not name or has_name(ast.parse(path.read_text()), name), f"{file} has no {name}"


def test_notes_that_the_architecture_cites_are_written() -> None:
    written = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    cited = set(re.findall(r"\[Note: [^\]]+\]", ARCHITECTURE))
    assert cited
    for note in cited:
        assert note in written, f"{note} is nowhere in the package"


@pytest.mark.parametrize("page", [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def option_rows() -> list[str]:
    """The README's table of options, from `Options`."""
    entries = re.findall(r"^ *(\w+): (\S.*(?:\n(?! *\w+: ).*)*)", argument_docs(), re.MULTILINE)
    documented = {name: " ".join(text.split()).replace("``", "`") for name, text in entries}
    rows = []
    for field in fields(Options):
        default = {"min_unit_numel": "1_000_000", "io": "IOOptions()"}.get(field.name) or repr(field.default)
        rows.append(f"| `{field.name}` | `{default.replace(chr(39), chr(34))}` | {documented[field.name]} |")
    return rows


def test_the_table_of_options_is_that_of_the_code() -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| `\w+` \| `", line)]
    expected = option_rows()
    assert rows == expected, "the README's table must be:\n" + "\n".join(expected)
