"""Writes ``docs/api.md``, the API reference, from docstrings: ``python -m tests.helpers.api_page``."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from docstring_parser import Docstring, DocstringStyle, parse

from tests.helpers.docs import DOCS

HEAD = """# API reference

Made from docstrings by `make docs`. What is here is public: it changes with a line in `CHANGELOG.md`. The rest may
change at any time. To add a rule, an engine or a format of your own: [extending](design/extending.md).
"""

# Title of a section, and what is in it: a path, and which of its methods are for users. Others are called by Lightning.
SECTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "For the Trainer": {
        "lightning_ssd.SSDOffloadStrategy": ("stats",),
        "lightning_ssd.IOOptions": (),
        "lightning_ssd.SSDOffloadPrecision": (),
        "lightning_ssd.SSDOffloadTrace": (),
    },
    "Parameters": {"lightning_ssd.gathered": ()},
    "Disk traffic": {"lightning_ssd.io.engine.IOStats": ()},
    "Checkpoints": {
        "lightning_ssd.checkpoint.load.CheckpointReader": ("kinds", "tensor", "value", "verify"),
        "lightning_ssd.convert.importing.open_source": (),
        "lightning_ssd.convert.match.match": (),
    },
    "Errors": {
        f"lightning_ssd.errors.{name}": ()
        for name in (
            *("SSDOffloadError", "ConfigurationError", "MemoryPlanError", "StoreError", "ResidencyError"),
            *("RecomputeError", "CorruptionError", "CheckpointError", "TraceError", "NonFiniteGradientError"),
            *("IOFailure", "DeadlineError"),
        )
    },
}


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, entries in SECTIONS.items():
        lines += [f"## {title}", ""]
        for path, methods in entries.items():
            module, _, name = path.rpartition(".")
            found = getattr(importlib.import_module(module), name)
            lines += _entry("###", path, name, found)
            for method in methods:
                lines += _entry("####", f"{name}.{method}", method, getattr(found, method))
    return "\n".join(lines).rstrip() + "\n"


def _entry(level: str, title: str, name: str, found: Any) -> Iterator[str]:
    """One class or function: heading, signature, and what its docstring says."""
    yield from (f"{level} `{title}`", "")
    is_error = inspect.isclass(found) and issubclass(found, BaseException)
    if is_error:
        yield from (f"Bases: {', '.join(f'`{base.__name__}`' for base in found.__bases__)}.", "")
    elif not isinstance(found, property):
        yield from ("```", f"{name}{_signature(found)}", "```", "")
    text = inspect.getdoc(found) or ""
    yield from _described(parse(text, style=DocstringStyle.GOOGLE))


def _signature(found: Any) -> str:
    parameters = [p for p in inspect.signature(found).parameters.values() if p.name != "self"]
    plain = [p.replace(annotation=p.empty) for p in parameters]
    whole = str(inspect.Signature(plain))
    if len(whole) <= 100:
        return whole
    star = next((i for i, p in enumerate(plain) if p.kind is p.KEYWORD_ONLY), None)
    rows = [str(p) for p in plain]
    if star is not None:
        rows.insert(star, "*")
    return "(\n" + "".join(f"    {row},\n" for row in rows) + ")"


def _described(doc: Docstring) -> Iterator[str]:
    for text in (doc.short_description, doc.long_description):
        if text:
            yield from (_markdown(text), "")
    if doc.params:
        yield from ("| name | meaning |", "|---|---|")
        yield from (f"| `{p.arg_name}` | {_row(p.description)} |" for p in doc.params)
        yield ""
    if doc.returns and doc.returns.description:
        yield from (f"Returns: {_row(doc.returns.description)}", "")
    for error in doc.raises:
        yield from (f"Raises `{error.type_name}`: {_row(error.description)}", "")


def _markdown(text: str) -> str:
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def _row(text: str | None) -> str:
    return _markdown(" ".join((text or "").split())).replace("|", "\\|")


if __name__ == "__main__":
    (DOCS / "api.md").write_text(page())
    sys.stdout.write(f"{DOCS / 'api.md'}\n")
