"""The engines of the native module, "uring" and "posix", as `Engine`. Their threads need no interpreter lock."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

from lightning_ssd.errors import DeadlineError, IOFailure
from lightning_ssd.io.deadline import Patience, leave_behind
from lightning_ssd.io.engine import IOOptions, IOStats, check_process, check_request
from lightning_ssd.io.file import File
from lightning_ssd.sizes import parse_nbytes

if TYPE_CHECKING:
    from lightning_ssd._native import IOEngine, IOTransfer


def make_uring_engine(options: IOOptions, *, reason: str) -> NativeEngine:
    """The engine over io_uring: one thread, ``depth`` pieces in flight.

    Raises:
        OSError: io_uring is missing, forbidden or too old.
    """
    from lightning_ssd import _native

    native = _native.make_uring_engine(block_nbytes=parse_nbytes(options.block_nbytes), depth=options.depth)
    return NativeEngine("uring", native, options, reason=reason)


def make_posix_engine(options: IOOptions, *, reason: str) -> NativeEngine:
    """The engine over pread and pwrite: ``num_threads`` pieces in flight, but never more than ``depth``."""
    from lightning_ssd import _native

    num_threads = min(options.num_threads, options.depth)
    native = _native.make_posix_engine(block_nbytes=parse_nbytes(options.block_nbytes), num_threads=num_threads)
    return NativeEngine("posix", native, options, reason=reason)


class NativeEngine:
    """`Engine` over an engine of the native module."""

    def __init__(self, name: str, native: IOEngine, options: IOOptions, *, reason: str) -> None:
        self.name = name
        self.reason = reason
        self._native = native
        self.patience = Patience(options.deadline_s)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._in_flight: list[NativeTransfer] = []  # they keep memory alive, whether or not anyone waits

    def read(self, file: File, offset: int, address: int, nbytes: int, *, keep: object = None) -> NativeTransfer:
        """See `Engine.read`."""
        return self._start(file, offset, address, nbytes, keep, is_write=False)

    def write(self, file: File, offset: int, address: int, nbytes: int, *, keep: object = None) -> NativeTransfer:
        """See `Engine.write`."""
        return self._start(file, offset, address, nbytes, keep, is_write=True)

    def register_memory(self, address: int, nbytes: int) -> bool:
        """See `Engine.register_memory`."""
        return self._native.register_memory(address, nbytes)

    def stats(self) -> IOStats:
        """See `Engine.stats`."""
        self._drop_finished()
        return IOStats(*self._native.stats())

    def close(self) -> None:
        """See `Engine.close`."""
        self.patience.close()
        if os.getpid() == self._pid and not all([transfer.is_over_in_time() for transfer in self._in_flight]):
            leave_behind(self)  # with the memory that its transfers use
            return
        self._native.close()  # sync: waits for the disk, which has answered
        self._drop_finished()

    def _start(
        self, file: File, offset: int, address: int, nbytes: int, keep: object, *, is_write: bool
    ) -> NativeTransfer:
        check_request(file, offset, address, nbytes, is_write=is_write)
        check_process(self._pid)
        self._drop_finished()
        native = self._native.start(is_write, file.direct_fd, file.tail_fd, offset, address, nbytes)
        transfer = NativeTransfer(native, file, offset, nbytes, keep, self.patience, is_write=is_write)
        with self._lock:
            self._in_flight.append(transfer)
        return transfer

    def _drop_finished(self) -> None:
        """Drop transfers that are over.

        Not done by the native thread that completes them: to drop a Python object it would have to wait for the
        interpreter lock, and the disk would wait for it.
        """
        with self._lock:
            self._in_flight = [transfer for transfer in self._in_flight if not transfer.done()]


class NativeTransfer:
    """`Transfer` of `NativeEngine`."""

    def __init__(
        self,
        native: IOTransfer,
        file: File,
        offset: int,
        nbytes: int,
        keep: object,
        patience: Patience,
        *,
        is_write: bool,
    ) -> None:
        self.path = file.path
        self.offset = offset
        self.nbytes = nbytes
        self._what = "write" if is_write else "read"
        self._native = native
        self._file = file
        self._keep = keep
        self._patience = patience

    def done(self) -> bool:
        """See `Transfer.done`."""
        if not self._native.done():
            return False
        self._keep = None
        return True

    def wait(self, deadline_s: float | None = None) -> None:
        """See `Transfer.wait`."""
        if not self.is_over_in_time(deadline_s):
            raise DeadlineError(errno.ETIMEDOUT, self.path, self.offset, self.nbytes, self._what)
        self._keep = None
        failure = self._native.failure()
        if failure is not None:
            code, offset, nbytes = failure
            raise IOFailure(code, self.path, offset, nbytes, self._what)

    def is_over_in_time(self, deadline_s: float | None = None) -> bool:
        """Wait for it; False if time ran out, and then it is given up."""
        if self._patience.wait(self._native, deadline_s):  # sync: waits for the disk
            return True
        self._file.give_up(self._native)
        return False

    def times(self) -> tuple[float, float | None] | None:
        """See `Transfer.times`."""
        return self._native.times()
