"""Output of the commands: results on stdout, errors on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence


def line(text: str = "") -> None:
    """Write one line of the result, or several; see `shown`."""
    sys.stdout.write("\n".join(map(shown, text.split("\n"))) + "\n")


def error_line(text: str) -> None:
    """Write one line for the person at the terminal, or several; see `shown`."""
    sys.stderr.write("\n".join(map(shown, text.split("\n"))) + "\n")


def shown(text: str) -> str:
    """``text`` with what would act on a terminal escaped: names in a checkpoint are whatever its author chose."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write rows in columns; the first column is text, the others are aligned to the right."""
    lines = [tuple(titles), *(tuple(map(shown, row)) for row in rows)]
    widths = [max(len(row[i]) for row in lines) for i in range(len(titles))]
    for row in lines:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        line("  ".join(cells).rstrip())


def fmt_age(seconds: float) -> str:
    """A time span for people, in the unit that fits: ``'3 h'``."""
    for nseconds, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= nseconds:
            return f"{int(seconds // nseconds)} {unit}"
    return f"{int(seconds)} s"
