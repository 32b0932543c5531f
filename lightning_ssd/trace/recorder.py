"""What happened in which order and how long it took: events and spans, kept only while somebody listens.

All times are seconds of `time.perf_counter`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol


class Lane(Enum):
    """What is busy during a span; the value is its name for people.

    A thread does what its innermost span says: one that waits inside an update does not update meanwhile.
    """

    READ = "disk read"  # transfers: the time is the disk's, whoever asked
    WRITE = "disk write"  # likewise
    COPY = "copy"  # between host and device, or inside the host
    COMPUTE = "compute"  # forward, recompute, backward
    UPDATE = "update"  # the optimizer's step
    WAIT = "wait"  # a thread stands still; the span's name says what for


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    name: str
    what: str
    at_s: float


@dataclass(frozen=True)
class Span:
    """One thing that took time.

    Attributes:
        lane: What was busy.
        name: What was done, or waited for.
        what: To what, such as the name of a unit.
        begin_s: When it began.
        end_s: When it ended; the end of the trace, if it ended later.
        thread: Name and system id of the thread that did it; of a transfer, that asked for it.
        nbytes: Bytes moved; 0 where none were, or nobody counted.
        is_transfer: It ran by itself, and its thread went on.
        is_over: It ended before the trace did.
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
        spans: What began in between, in that order.
        num_steps: Optimizer steps in it; 0 if nobody counted.
    """

    begin_s: float
    end_s: float
    thread: str
    spans: tuple[Span, ...]
    num_steps: int = 0


class Timed(Protocol):
    """What knows, at some time, when it ran; such as `lightning_ssd.io.engine.Transfer`."""

    def times(self) -> tuple[float, float | None] | None:
        """Begin and end; the end is None until it is over, all is None until it has begun."""
        ...


class OpenSpan:
    """A span that has begun. It ends with its ``with`` block, or by `end`, in the thread that began it."""

    __slots__ = ("_begin_s", "_end_s")

    def __init__(self, begin_s: float, end_s: float | None = None) -> None:
        self._begin_s = begin_s
        self._end_s = end_s

    def end(self) -> None:
        """It is over. Only the first call counts."""
        if self._end_s is None:
            self._end_s = time.perf_counter()

    def times(self) -> tuple[float, float | None]:
        """See `Timed.times`."""
        return self._begin_s, self._end_s

    def __enter__(self) -> OpenSpan:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


_OFF = OpenSpan(0.0, 0.0)
"""What everybody gets while nobody listens: ending it changes nothing."""


class Trace:
    """Collects events and spans between `start` and `stop`; costs one attribute test while off.

    Safe to use from many threads.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._begin_s = 0.0
        self._end_s = 0.0
        self._thread = ""
        self._events: list[Event] = []
        self._kept: list[_Kept] = []
        self._lock = threading.Lock()

    def start(self) -> None:
        """Forget what was collected, and collect anew."""
        with self._lock:
            self._events = []
            self._kept = []
            self._thread = _this_thread()
            self._begin_s = time.perf_counter()
            self.is_on = True

    def stop(self) -> list[Event]:
        """Stop collecting; return the events, in order. The spans are had from `collect`."""
        with self._lock:
            if self.is_on:
                self._end_s = time.perf_counter()
            self.is_on = False
            return list(self._events)

    def mark(self, name: str, what: str) -> None:
        """Record that ``name`` happened to ``what`` now."""
        if self.is_on:
            with self._lock:
                self._events.append(Event(name, what, time.perf_counter()))

    def span(self, lane: Lane, name: str, what: str, nbytes: int = 0) -> OpenSpan:
        """Record that ``name`` is done to ``what`` from now on, by this thread.

        The span ends with its ``with`` block, or where `OpenSpan.end` is called. Spans of a thread must nest.
        """
        if not self.is_on:
            return _OFF
        span = OpenSpan(time.perf_counter())
        self._keep(_Kept(lane, name, what, nbytes, _this_thread(), span, is_transfer=False))
        return span

    def follow(self, lane: Lane, name: str, what: str, nbytes: int, transfer: Timed) -> None:
        """Record a transfer that was started just now; it is asked for its times when the trace is collected."""
        if self.is_on:
            self._keep(_Kept(lane, name, what, nbytes, _this_thread(), transfer, is_transfer=True))

    def collect(self) -> Recording:
        """The spans between start and stop, or up to now; forgets them, and with them the transfers."""
        with self._lock:
            kept, self._kept = self._kept, []
            end_s = time.perf_counter() if self.is_on else self._end_s
        spans = [span for record in kept if (span := record.until(end_s)) is not None]
        spans.sort(key=lambda span: (span.begin_s, -span.end_s))
        return Recording(self._begin_s, end_s, self._thread, tuple(spans))

    def _keep(self, record: _Kept) -> None:
        with self._lock:
            self._kept.append(record)


class _Kept(NamedTuple):
    """A span whose times are not taken yet."""

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
