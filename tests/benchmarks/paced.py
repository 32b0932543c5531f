"""A disk that takes its time: transfers of a faster one are over when a slower one of given rates would be done."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning_ssd.session.session as session_module
from lightning_ssd.io.deadline import Patience
from lightning_ssd.io.engine import Engine, IOOptions, IOStats, Transfer
from lightning_ssd.io.file import File
from tests.benchmarks.bounds import Rates


class PacedTransfer:
    """See `Transfer`; it is over at ``due_s`` of `time.perf_counter`, or later if the disk was late."""

    def __init__(self, inner: Transfer, begin_s: float, due_s: float) -> None:
        self._inner = inner
        self._begin_s = begin_s
        self._due_s = due_s

    def done(self) -> bool:
        """See `Transfer.done`."""
        return self._inner.done() and time.perf_counter() >= self._due_s

    def wait(self, deadline_s: float | None = None) -> None:
        """See `Transfer.wait`."""
        try:
            self._inner.wait(deadline_s)
        finally:
            time.sleep(max(self._due_s - time.perf_counter(), 0))

    def times(self) -> tuple[float, float | None] | None:
        """See `Transfer.times`."""
        if time.perf_counter() < self._begin_s:
            return None
        return self._begin_s, self._due_s if self.done() else None


class PacedEngine:
    """See `Engine`; one transfer after another, in the order in which they were started."""

    def __init__(self, inner: Engine, rates: Rates) -> None:
        self.name = f"paced {inner.name}"
        self.reason = f"a benchmark paces {inner.name} to {rates.read_gbps:.2f} and {rates.write_gbps:.2f} GB/s"
        self.patience: Patience = inner.patience
        self._inner = inner
        self._rates = rates
        self._lock = threading.Lock()
        self._free_at = 0.0

    def read(self, file: File, offset: int, address: int, nbytes: int, *, keep: object = None) -> Transfer:
        """See `Engine.read`."""
        return self._paced(self._inner.read(file, offset, address, nbytes, keep=keep), self._rates.disk_s(nbytes, 0))

    def write(self, file: File, offset: int, address: int, nbytes: int, *, keep: object = None) -> Transfer:
        """See `Engine.write`."""
        return self._paced(self._inner.write(file, offset, address, nbytes, keep=keep), self._rates.disk_s(0, nbytes))

    def register_memory(self, address: int, nbytes: int) -> bool:
        """See `Engine.register_memory`."""
        return self._inner.register_memory(address, nbytes)

    def stats(self) -> IOStats:
        """See `Engine.stats`."""
        return self._inner.stats()

    def close(self) -> None:
        """See `Engine.close`."""
        self._inner.close()

    def _paced(self, transfer: Transfer, seconds: float) -> Transfer:
        with self._lock:
            begin = max(time.perf_counter(), self._free_at)
            self._free_at = begin + seconds
        return PacedTransfer(transfer, begin, self._free_at)


@contextmanager
def paced(rates: Rates) -> Iterator[None]:
    """Sessions that begin meanwhile have a paced disk."""
    make: Any = session_module.make_engine

    def make_paced(options: IOOptions) -> Engine:
        return PacedEngine(make(options), rates)

    session_module.make_engine = make_paced
    try:
        yield
    finally:
        session_module.make_engine = make
