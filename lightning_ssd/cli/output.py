"""What commands write: lines on stdout, progress and errors on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

from lightning_ssd.sizes import fmt


def line(text: str = "") -> None:
    """Write one line of the result."""
    sys.stdout.write(f"{text}\n")


def error_line(text: str) -> None:
    """Write one line for the person at the terminal."""
    sys.stderr.write(f"{text}\n")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write rows in columns; the first column is text, the others are aligned to the right."""
    lines = [tuple(titles), *(tuple(row) for row in rows)]
    widths = [max(len(row[i]) for row in lines) for i in range(len(titles))]
    for row in lines:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        line("  ".join(cells).rstrip())


class ProgressLine:
    """Bytes done of bytes in all, redrawn on stderr at most five times a second, and only on a terminal."""

    def __init__(self, verb: str) -> None:
        """Say ``verb`` (such as "verified") in front of the numbers."""
        self._verb = verb
        self._shown_s = 0.0
        self._width = 0

    def __call__(self, done_nbytes: int, total_nbytes: int) -> None:
        """Show the progress."""
        now_s = time.monotonic()
        if not sys.stderr.isatty() or now_s - self._shown_s < 0.2:
            return
        self._shown_s = now_s
        text = f"{self._verb} {fmt(done_nbytes)} of {fmt(total_nbytes)} ({done_nbytes / max(total_nbytes, 1):.0%})"
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)

    def finish(self) -> None:
        """Take the line off the terminal."""
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
