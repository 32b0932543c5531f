"""Writes of what is on its way from the device: a thread waits for the copy, and gives the write to the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from lightning_ssd.device.streams import Event, WaitFor
from lightning_ssd.io.engine import Transfer


class LateWrite:
    """A write that begins when a copy is over; see `Transfer`.

    Args:
        copied: The end of the copy.
        start: Gives the write to the engine.
    """

    def __init__(self, copied: Event, start: Callable[[], Transfer]) -> None:
        self._copied = copied
        self._start = start
        self._has_begun = threading.Event()
        self._begun: Transfer | None = None  # from then on, unless ``_error`` is set
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Wait for the copy, and begin."""
        try:
            self._copied.wait(WaitFor.SPILL)  # sync: a copy, on a thread that only waits
            self._begun = self._start()
        except BaseException as error:  # raised by `wait`
            self._error = error
        finally:
            self._has_begun.set()

    def done(self) -> bool:
        """See `Transfer.done`."""
        return self._has_begun.is_set() and (self._begun is None or self._begun.done())

    def wait(self, deadline_s: float | None = None) -> None:
        """See `Transfer.wait`; the deadline is the disk's, and begins with the write."""
        self._has_begun.wait()  # sync: a copy
        if self._error is not None:
            raise self._error
        if self._begun is not None:
            self._begun.wait(deadline_s)  # sync: the disk

    def times(self) -> tuple[float, float | None] | None:
        """See `Transfer.times`."""
        return None if self._begun is None else self._begun.times()


class LateWrites:
    """Begins late writes, in the order in which they were added. Its thread starts with the first."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[LateWrite | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, write: LateWrite) -> LateWrite:
        """Begin ``write`` after all that were added before; returns it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lightning-ssd-spill", daemon=True)
            self._thread.start()
        self._waiting.put(write)
        return write

    def close(self) -> None:
        """Begin what was added, and end the thread."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (write := self._waiting.get()) is not None:
            write.begin()
            del write  # its memory is not kept until the next one
