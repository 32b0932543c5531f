"""What happened in which order: named events with their times, kept only while somebody listens."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One thing that happened. ``at_s`` is `time.perf_counter`."""

    name: str
    what: str
    at_s: float


class Trace:
    """Collects events between `start` and `stop`; costs one attribute test while off. Safe to use from many threads."""

    def __init__(self) -> None:
        self.is_on = False
        self._events: list[Event] = []
        self._lock = threading.Lock()

    def start(self) -> None:
        """Forget earlier events and collect new ones."""
        with self._lock:
            self._events = []
            self.is_on = True

    def stop(self) -> list[Event]:
        """Stop collecting; return what was collected, in order."""
        with self._lock:
            self.is_on = False
            return list(self._events)

    def mark(self, name: str, what: str) -> None:
        """Record that ``name`` happened to ``what`` now."""
        if self.is_on:
            with self._lock:
                self._events.append(Event(name, what, time.perf_counter()))
