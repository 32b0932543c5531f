"""What commands write: lines on stdout, progress and errors on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

from lightning_ssd.sizes import fmt

_REDRAW_S = 0.2
_NEXT_LINE_S = 10.0


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


class ProgressLine:
    """Bytes done of bytes in all, on stderr: redrawn five times a second on a terminal, else a line every 10 s."""

    def __init__(self, verb: str) -> None:
        """Say ``verb`` (such as "verified") in front of the numbers."""
        self._verb = verb
        self._is_terminal = sys.stderr.isatty()
        self._shown_s = time.monotonic() - (_REDRAW_S if self._is_terminal else 0.0)
        self._width = 0

    def __call__(self, done_nbytes: int, total_nbytes: int) -> None:
        """Show the progress."""
        now_s = time.monotonic()
        if now_s - self._shown_s < (_REDRAW_S if self._is_terminal else _NEXT_LINE_S):
            return
        self._shown_s = now_s
        text = f"{self._verb} {fmt(done_nbytes)} of {fmt(total_nbytes)} ({done_nbytes / max(total_nbytes, 1):.0%})"
        if not self._is_terminal:
            error_line(text)
            return
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)

    def finish(self) -> None:
        """Take the line off the terminal."""
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
