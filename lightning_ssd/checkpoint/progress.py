"""A progress bar in bytes, by tqdm, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from tqdm import tqdm

from lightning_ssd.checkpoint.writer import Progress

_REDRAW_S, _LINE_S = 0.2, 5.0
"""Seconds between two updates on a terminal, and between two lines in a log."""

_DELAY_S = 1.0
"""Seconds before a bar appears on a terminal."""


@contextmanager
def byte_bar(what: str) -> Iterator[Progress]:
    """A bar that ``what`` opens, such as ``"verified"``; off the screen on leaving."""
    stream = sys.stderr  # None where the process was started without one
    is_terminal = stream is not None and stream.isatty()
    with _Bar(
        desc=what,
        total=0,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        mininterval=_REDRAW_S if is_terminal else _LINE_S,
        delay=_DELAY_S if is_terminal else _LINE_S,
        leave=False,
        dynamic_ncols=True,
        file=_Quiet(stream),
        disable=stream is None,
    ) as bar:

        def show(done_nbytes: int, total_nbytes: int) -> None:
            bar.total = total_nbytes
            bar.update(done_nbytes - bar.n)

        yield show


class _Bar(tqdm):
    monitor_interval = 0  # no thread that outlives the bar


class _Quiet:
    """A stream that ignores its failures, so that no save fails because the disk of its log is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()
