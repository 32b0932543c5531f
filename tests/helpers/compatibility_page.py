"""Makes docs/compatibility.md from the tests: ``python -m tests.helpers.compatibility_page``.

A row is a mark ``@pytest.mark.compatibility("area", "what")`` at a test, or a pattern of
`tests.strategy.test_compatibility` or `tests.strategy.test_habits`; so there is no row that no test proves. The
packages are those of `python -m tests.packages`.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.packages_table import packages_table

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "compatibility.md"
PACKAGES = REPOSITORY / "docs" / "results" / "packages.jsonl"
AREAS = (
    "Trainer", "Loops", "LightningModule", "Models", "Optimizers", "Precision", "Callbacks", "Checkpoints", "Loggers",
    "Profilers", "Tuner", "torch.compile", "Namespaces", "Refused",
)  # fmt: skip

HEAD = """# Compatibility with Lightning

Made by `python -m tests.helpers.compatibility_page` from the tests; do not edit it.

Each row is proved by the test beside it, which trains with plain Lightning (`strategy="auto"`) and with
`strategy="ssd_offload"` and compares losses, logged values, weights and checkpoints. Patterns of
`test_compatibility.py` and `test_habits.py` are trained in the smallest memory and with all of it, `torch.load` opens
their checkpoints, and plain Lightning resumes from them. What the area *Refused* lists stops at setup, with an error
that says what to do.
"""


def rows() -> dict[str, list[tuple[str, str]]]:
    """Area -> what is proved, and by which test."""
    from tests.strategy import test_compatibility, test_habits

    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for tests in (test_compatibility, test_habits):
        test = f"strategy/{tests.__name__.rpartition('.')[2]}.py::test_is_as_in_plain_lightning"
        for pattern in tests.PATTERNS.values():
            found[pattern.area].append((pattern.what, test))
    for file in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        text = file.read_text()
        if "compatibility(" in text:
            for area, what, test in _marks(ast.parse(text)):
                found[area].append((what, f"{file.relative_to(REPOSITORY / 'tests')}::{test}"))
    return found


def _marks(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for mark in node.decorator_list:
                called = mark.func if isinstance(mark, ast.Call) else None
                if isinstance(called, ast.Attribute) and called.attr == "compatibility":
                    area, what = (ast.literal_eval(argument) for argument in mark.args)
                    yield area, what, node.name


def page() -> str:
    """The text of the page.

    Raises:
        KeyError: A row is of an area that the page does not have.
    """
    found = rows()
    unknown = set(found) - set(AREAS)
    if unknown:
        raise KeyError(f"areas {sorted(unknown)} are not in {AREAS}")
    text = [HEAD, f"{sum(map(len, found.values()))} rows.\n"]
    for area in AREAS:
        if found.get(area):
            lines = [f"| {_cell(what)} | `{test}` |" for what, test in found[area]]
            text.append("\n".join([f"## {area}\n", "| what | test |", "|---|---|", *lines]) + "\n")
    text.append(packages_table(PACKAGES))
    return "\n".join(text)


def _cell(what: str) -> str:
    name, equals, value = what.partition("=")
    return f"`{what}`" if equals and name.isidentifier() and value else what.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE}\n")
