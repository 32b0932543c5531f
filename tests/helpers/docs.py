"""Code of the documents that tests run."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
_BLOCK = re.compile(r"^```python run\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MESSAGE = re.compile(r"^```message\n(?:(\w+Error|\w+Failure): )?(.*?)\n```$", re.MULTILINE | re.DOTALL)


def runnable_blocks(page: str) -> Iterator[tuple[int, str]]:
    """Line on which each block of a page begins, counted from 1, and its code."""
    text = (DOCS / page).read_text()
    for found in _BLOCK.finditer(text):
        yield text.count("\n", 0, found.start(1)) + 1, found[1]


def code_blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Line and code of each block in ``language`` that is not marked to be run."""
    text = page.read_text()
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, found.start(1)) + 1, found[1]


@functools.cache
def engine_of_the_docs() -> Any:
    """The class of the disk engine that the page about extending has as its example."""
    page, name = "design/extending.md", "OneThreadEngine"
    (code,) = (code for _, code in runnable_blocks(page) if f"class {name}:" in code)
    namespace: dict[str, Any] = {"__name__": page}
    exec(compile(code, page, "exec"), namespace)
    return namespace[name]


def quoted_messages(page: str) -> list[tuple[str, str]]:
    """Messages that a page quotes: the class of the error, which is empty for warnings and logs, and the text."""
    return _MESSAGE.findall((DOCS / page).read_text())


@functools.cache
def message_patterns(package: Path) -> list[re.Pattern[str]]:
    """All strings of the package that have 30 characters and more of their own, each as a pattern."""
    found = {
        pattern
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.JoinedStr, ast.BinOp, ast.Constant))
        and len((pattern := _pattern(node)).replace(_ANYTHING, "")) >= 30
    }
    return [re.compile(pattern, re.DOTALL) for pattern in sorted(found)]


_ANYTHING = "(?:.*)"


def _pattern(node: ast.AST) -> str:
    """What a string expression may come to, as a regular expression; anything where it is not written down."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_pattern, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _pattern(node.left) + _pattern(node.right)
    return _ANYTHING
