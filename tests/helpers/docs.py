"""Code of the documents that tests run."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
_BLOCK = re.compile(r"^```python run\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def runnable_blocks(page: str) -> Iterator[tuple[int, str]]:
    """Line on which each block of a page begins, counted from 1, and its code."""
    text = (DOCS / page).read_text()
    for found in _BLOCK.finditer(text):
        yield text.count("\n", 0, found.start(1)) + 1, found[1]


@functools.cache
def engine_of_the_docs() -> Any:
    """The class of the disk engine that the page about extending has as its example."""
    page, name = "design/extending.md", "OneThreadEngine"
    (code,) = (code for _, code in runnable_blocks(page) if f"class {name}:" in code)
    namespace: dict[str, Any] = {"__name__": page}
    exec(compile(code, page, "exec"), namespace)
    return namespace[name]
