"""The numbers by which the house is judged (HOUSE.md, section 8), from the source alone.

python tests/helpers/house.py [REPOSITORY]
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path


def numbers(repository: Path) -> dict[str, object]:
    """Lines, large files and packages, assertions about None, callables that are handed to constructors."""
    package = repository / "lightning_ssd"
    files = {path.relative_to(package): path.read_text() for path in sorted(package.rglob("*.py"))}
    lines = {str(path): text.count("\n") for path, text in files.items()}
    packages: dict[str, int] = {}
    for path, text in files.items():
        packages[path.parts[0]] = packages.get(path.parts[0], 0) + text.count("\n")
    trees = [ast.parse(text) for text in files.values()]
    return {
        "lines": sum(lines.values()),
        "files over 400 lines": {path: n for path, n in lines.items() if n > 400},
        "packages over 3,000 lines": {name: n for name, n in packages.items() if n > 3000},
        "functions over 40 lines": sum(map(_num_long_functions, trees)),
        "assert x is not None": sum(text.count(" is not None\n") for text in map(_asserts, files.values())),
        "parameters and attributes annotated Callable": sum(map(_num_callables, trees)),
    }


def _asserts(text: str) -> str:
    return "".join(f"{line}\n" for line in text.splitlines() if line.strip().startswith("assert "))


def _num_long_functions(tree: ast.AST) -> int:
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return sum((f.end_lineno or f.lineno) - f.body[0].lineno > 40 for f in functions)


def _num_callables(tree: ast.AST) -> int:
    """Of constructors and of attributes; functions that take a function for the time of the call do not count."""
    found = 0
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and "Callable" in ast.unparse(node.annotation):
                found += 1
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                arguments = [*node.args.args, *node.args.kwonlyargs]
                found += sum(a.annotation is not None and "Callable" in ast.unparse(a.annotation) for a in arguments)
    return found


if __name__ == "__main__":
    for name, value in numbers(Path(sys.argv[1] if len(sys.argv) > 1 else ".")).items():
        print(f"{name}: {value}")
