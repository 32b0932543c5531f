"""What took how long: spans, recorded between `Trace.start` and `Trace.stop`.

All times are seconds of `time.perf_counter`. Recorded or not, each span is a label in a running `torch.profiler`. What
happens to a unit is logged by ``lightning_ssd.units`` at level DEBUG.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

_LOGGER = logging.getLogger("lightning_ssd.units")
LABEL = "ssd_offload::"
"""What labels in a profile of torch begin with."""


class Lane(Enum):
    """The resource that is busy during a span; the value is its name in summaries and files.

    Of nested spans of a thread the innermost counts: a thread that waits inside an update is waiting.
    """

    READ = "disk read"  # transfers: from when the disk begins to when it is done
    WRITE = "disk write"
    COPY = "copy"  # between host and device, or within the host
    COMPUTE = "compute"  # forward, recompute, backward
    UPDATE = "update"  # the optimizer's step
    WAIT = "wait"  # a thread waits; the span's name says what for


@dataclass(frozen=True)
class Span:
    """Something that took time.

    Attributes:
        lane: The resource that was busy.
        name: What was done, or waited for.
        what: What it was done to, such as the name of a unit.
        begin_s: When it began.
        end_s: When it ended, or when the trace was stopped.
        thread: Name and system id of the thread that did it; of a transfer, of the thread that started it.
        nbytes: Bytes moved; 0 if none were moved, or they were not counted.
        is_transfer: It ran asynchronously to its thread.
        is_over: It ended before the trace was stopped.
    """

    lane: Lane
    name: str
    what: str
    begin_s: float
    end_s: float
    thread: str
    nbytes: int = 0
    is_transfer: bool = False
    is_over: bool = True


@dataclass(frozen=True)
class Recording:
    """The spans between `Trace.start` and `Trace.stop`.

    Attributes:
        begin_s: When the trace was started.
        end_s: When it was stopped.
        thread: Who started it, as in `Span.thread`.
        spans: Those that began in between, in that order.
        num_steps: Optimizer steps in it; 0 if they were not counted.
    """

    begin_s: float
    end_s: float
    thread: str
    spans: tuple[Span, ...]
    num_steps: int = 0


class Timed(Protocol):
    """Something that is asked later when it ran, such as a `lightning_ssd.io.engine.Transfer`."""

    def times(self) -> tuple[float, float | None] | None:
        """When it began and ended. The end is None until it is over; all is None until it has begun."""
        ...


class OpenSpan:
    """A span that has begun. It ends with its ``with`` block, or by `end`, in the thread that began it."""

    __slots__ = ("_begin_s", "_end_s", "_label")

    def __init__(
        self, begin_s: float, end_s: float | None = None, label: AbstractContextManager[object] | None = None
    ) -> None:
        self._begin_s = begin_s
        self._end_s = end_s
        self._label = label
        if label is not None:
            label.__enter__()

    def end(self) -> None:
        """End it now. Only the first call counts."""
        if self._end_s is None:
            self._end_s = time.perf_counter()
            if self._label is not None:
                self._label.__exit__(None, None, None)

    def times(self) -> tuple[float, float | None]:
        """See `Timed.times`."""
        return self._begin_s, self._end_s

    def __enter__(self) -> OpenSpan:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


_OFF = OpenSpan(0.0, 0.0)
"""The span that every caller gets while neither a trace nor a profiler runs: ending it changes nothing."""

_NO_LABEL = nullcontext()


class Trace:
    """Records spans between `start` and `stop`; costs a few attribute tests while off.

    Safe to use from many threads.
    """

    def __init__(self) -> None:
        from torch.autograd import profiler  # not above: `lightning-ssd trace` reads traces without torch

        self._profiler = profiler
        self.is_on = False
        self._begin_s = 0.0
        self._end_s = 0.0
        self._thread = ""
        self._records: list[_Record] = []
        self._lock = threading.Lock()

    def start(self) -> None:
        """Drop what was recorded, and record from now on."""
        with self._lock:
            self._records = []
            self._thread = _this_thread()
            self._begin_s = time.perf_counter()
            self.is_on = True

    def stop(self) -> None:
        """Stop recording; `collect` returns the spans."""
        with self._lock:
            if self.is_on:
                self._end_s = time.perf_counter()
            self.is_on = False

    def mark(self, name: str, what: str) -> None:
        """Log that ``name`` happened to ``what`` now."""
        _LOGGER.debug("%s %s", name, what)

    def span(self, lane: Lane, name: str, what: str, nbytes: int = 0) -> OpenSpan:
        """Record that this thread does ``name`` to ``what`` from now on; label it in a running profile of torch.

        The span ends with its ``with`` block, or where `OpenSpan.end` is called. Spans of a thread must nest.
        """
        label = self.label(name, what) if self._profiler._is_profiler_enabled else None
        if not self.is_on:
            return _OFF if label is None else OpenSpan(time.perf_counter(), label=label)
        span = OpenSpan(time.perf_counter(), label=label)
        self._add(_Record(lane, name, what, nbytes, _this_thread(), span, is_transfer=False))
        return span

    def label(self, name: str, what: str) -> AbstractContextManager[object]:
        """Label a ``with`` block in a running profile of torch, without recording a span."""
        if not self._profiler._is_profiler_enabled:
            return _NO_LABEL
        import torch

        # Not `record_function`: that is an operator, and modes that count a forward's operators would see it.
        label: AbstractContextManager[object] = torch._C._profiler._RecordFunctionFast(f"{LABEL}{name} {what}".rstrip())
        return label

    def follow(self, lane: Lane, name: str, what: str, nbytes: int, transfer: Timed) -> None:
        """Record a transfer that was started just now; `collect` asks it for its times."""
        if self.is_on:
            self._add(_Record(lane, name, what, nbytes, _this_thread(), transfer, is_transfer=True))

    def collect(self) -> Recording:
        """Return the spans between start and stop, or up to now, and drop them, and with them the transfers."""
        with self._lock:
            records, self._records = self._records, []
            end_s = time.perf_counter() if self.is_on else self._end_s
        spans = [span for record in records if (span := record.until(end_s)) is not None]
        spans.sort(key=lambda span: (span.begin_s, -span.end_s))
        return Recording(self._begin_s, end_s, self._thread, tuple(spans))

    def _add(self, record: _Record) -> None:
        with self._lock:
            self._records.append(record)


class _Record(NamedTuple):
    """A span whose times are not known yet."""

    lane: Lane
    name: str
    what: str
    nbytes: int
    thread: str
    timed: Timed
    is_transfer: bool

    def until(self, at_s: float) -> Span | None:
        """The span, cut at ``at_s``; None if it had not begun by then."""
        times = self.timed.times()
        if times is None or times[0] >= at_s:
            return None
        begin_s, end_s = times
        is_over = end_s is not None and end_s <= at_s
        last_s = end_s if end_s is not None and is_over else at_s
        return Span(
            self.lane, self.name, self.what, begin_s, last_s, self.thread, self.nbytes, self.is_transfer, is_over
        )


def _this_thread() -> str:
    # With its id: names need not be unique, and this one is shown by `top -H` too.
    thread = threading.current_thread()
    return f"{thread.name} {thread.native_id}"
