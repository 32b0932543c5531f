"""Imports point one way (STYLE.md, rule 1): a package may import only what stands above it in `ORDER`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lightning_ssd"
# Names on one line do not import each other, but for the leaves in the first, which are too small to need an order.
ORDER = (
    "errors sizes paths trace _extension _native _autoload links",
    "kernels",
    "io",
    "memory",
    "codec data",
    "store",
    "device",
    "creation cut",
    "units",
    "optim activations",
    "step",
    "checkpoint",
    "saving",
    "convert",
    "session",
    "strategy",
    "cli",
    "__init__ __main__",
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names.split()}
KNOWS_LIGHTNING = ("strategy", "cli")
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
ONLY_COMPUTES = ("layout.py", "plan.py", "budget.py", "execution_order.py")
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(file: Path) -> set[str]:
    """Absolute names of the modules that ``file`` imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the whole name, it is searched for"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    layer = file.relative_to(PACKAGE).with_suffix("").parts[0]
    roots = {name.partition(".")[0] for name in imports_of(file)}
    ours = {name.split(".")[1] for name in imports_of(file) if name.startswith("lightning_ssd.")}
    assert layer in RANK, f"give {layer} its place in ORDER"
    for other in ours - {layer}:
        assert other in RANK, f"import {other} from the module that defines it"
        assert RANK[other] < RANK[layer] or RANK[other] == 0, f"{layer} must not import {other}"
    assert "tests" not in roots
    assert layer in KNOWS_LIGHTNING or not roots & LIGHTNING
    assert file.name not in ONLY_COMPUTES or not roots & {"torch", "os"}


def test_every_file_is_looked_at() -> None:
    assert {file.parent.name for file in FILES} >= {"lightning_ssd", "io", "memory", "store", "strategy"}
