"""The slow, obvious engine: a thread pool over preadv and pwrite. Every other engine is tested against it."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections import deque
from dataclasses import dataclass

from lightning_ssd.errors import DeadlineError, IOFailure
from lightning_ssd.io.deadline import Over, Patience
from lightning_ssd.io.engine import IOOptions, IOStats, check_process, check_request
from lightning_ssd.io.file import File
from lightning_ssd.sizes import BLOCK_NBYTES, parse_nbytes, round_down, round_up


class PythonEngine:
    """`Engine` in plain Python, with at most ``num_threads`` pieces in flight."""

    name = "python"

    def __init__(self, options: IOOptions, *, reason: str = "asked for") -> None:
        self.reason = reason
        self._block_nbytes = parse_nbytes(options.block_nbytes)
        self.patience = Patience(options.deadline_s)
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)  # a piece was queued, or the engine closes
        self._pieces: deque[_Piece] = deque()
        self._closing = False
        self._pid = os.getpid()
        self._meters = {False: _Meter(), True: _Meter()}  # by is_write
        num_threads = min(options.num_threads, options.depth)
        self._threads = [
            _Worker(target=self._work, name=f"lightning-ssd-io-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def read(self, file: File, offset: int, address: int, nbytes: int, *, keep: object = None) -> PythonTransfer:
        """See `Engine.read`."""
        return self._start(file, offset, address, nbytes, keep, is_write=False)

    def write(self, file: File, offset: int, address: int, nbytes: int, *, keep: object = None) -> PythonTransfer:
        """See `Engine.write`."""
        return self._start(file, offset, address, nbytes, keep, is_write=True)

    def register_memory(self, address: int, nbytes: int) -> bool:
        """See `Engine.register_memory`; not supported."""
        return False

    def stats(self) -> IOStats:
        """See `Engine.stats`."""
        with self._lock:
            reads, writes = self._meters[False], self._meters[True]
            now = time.monotonic()
            return IOStats(
                read_nbytes=reads.nbytes,
                written_nbytes=writes.nbytes,
                num_reads=reads.num_done,
                num_writes=writes.num_done,
                read_busy_s=reads.busy_s(now),
                write_busy_s=writes.busy_s(now),
            )

    def close(self) -> None:
        """See `Engine.close`."""
        self.patience.close()
        if os.getpid() != self._pid:
            return  # a forked child has none of the threads, and one may have held the lock at the fork
        with self._lock:
            self._closing = True
            self._wake.notify_all()
        for thread in self._threads:  # sync: waits for the disk
            self.patience.wait(thread)

    def _start(
        self, file: File, offset: int, address: int, nbytes: int, keep: object, *, is_write: bool
    ) -> PythonTransfer:
        check_request(file, offset, address, nbytes, is_write=is_write)
        check_process(self._pid)
        starts = range(0, nbytes, self._block_nbytes)
        transfer = PythonTransfer(
            file, offset, nbytes, num_pieces=len(starts), keep=keep, patience=self.patience, is_write=is_write
        )
        pieces = [
            _Piece(
                transfer=transfer,
                is_write=is_write,
                direct_fd=file.direct_fd,
                tail_fd=file.tail_fd,
                offset=offset + start,
                address=address + start,
                nbytes=min(self._block_nbytes, nbytes - start),
            )
            for start in starts
        ]
        with self._lock:
            if self._closing:
                raise ValueError("the engine is closed")
            self._meters[is_write].start(time.monotonic())
            self._pieces.extend(pieces)
            self._wake.notify(len(pieces))
        return transfer

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._pieces and not self._closing:
                    self._wake.wait()
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
                failed = piece.transfer.failure is not None
                piece.transfer.begin()
            failure = None if failed else piece.run()
            with self._lock:
                piece.transfer.failure = piece.transfer.failure or failure
                piece.transfer.num_pieces_left -= 1
                if piece.transfer.num_pieces_left == 0:
                    meter = self._meters[piece.is_write]
                    meter.stop(time.monotonic(), piece.transfer.nbytes, ok=piece.transfer.failure is None)
                    piece.transfer.finish()
            del piece  # an idle worker must not keep the transfer and the caller's memory alive


class PythonTransfer:
    """`Transfer` of `PythonEngine`. The engine's lock guards ``failure`` and ``num_pieces_left``."""

    def __init__(
        self,
        file: File,
        offset: int,
        nbytes: int,
        *,
        num_pieces: int,
        keep: object,
        patience: Patience,
        is_write: bool,
    ) -> None:
        self.path = file.path
        self.offset = offset
        self.nbytes = nbytes
        self.num_pieces_left = num_pieces
        self.failure: Failure | None = None
        self._what = "write" if is_write else "read"
        self._file = file
        self._keep = keep
        self._patience = patience
        self._over = Over()
        self._begin_s: float | None = None
        self._end_s: float | None = None

    def done(self) -> bool:
        """See `Transfer.done`."""
        return self._over.is_set()

    def wait(self, deadline_s: float | None = None) -> None:
        """See `Transfer.wait`."""
        if not self._patience.wait(self._over, deadline_s):  # sync: waits for the disk
            self._file.give_up(self._over)
            raise DeadlineError(errno.ETIMEDOUT, self.path, self.offset, self.nbytes, self._what)
        if self.failure is not None:
            raise IOFailure(self.failure.errno, self.path, self.failure.offset, self.failure.nbytes, self._what)

    def times(self) -> tuple[float, float | None] | None:
        """See `Transfer.times`."""
        return None if self._begin_s is None else (self._begin_s, self._end_s)

    def begin(self, at_s: float | None = None) -> None:
        """Note when it began, by default now; only the first call counts."""
        if self._begin_s is None:
            self._begin_s = time.perf_counter() if at_s is None else at_s

    def finish(self) -> None:
        """Drop the caller's memory and wake waiting threads; called once, by the engine."""
        self._end_s = time.perf_counter()
        self.begin(self._end_s)
        self._keep = None
        self._over.set()


@dataclass(frozen=True)
class Failure:
    """Why a transfer failed, and the range of the piece that did."""

    errno: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Piece:
    """A part of a transfer that one thread moves."""

    transfer: PythonTransfer
    is_write: bool
    direct_fd: int
    tail_fd: int
    offset: int
    address: int
    nbytes: int

    def run(self) -> Failure | None:
        """Move the bytes; returns the failure of this piece, if any."""
        try:
            self._move()
        except OSError as error:
            return Failure(error.errno or errno.EIO, self.offset, self.nbytes)
        return None

    def _move(self) -> None:
        body_nbytes = round_down(self.nbytes) if self.is_write else round_up(self.nbytes)
        done = 0
        while done < self.nbytes:
            # O_DIRECT cannot continue after a short result that ends off a block boundary; the buffered descriptor can.
            direct = done < body_nbytes and done % BLOCK_NBYTES == 0
            end = body_nbytes if direct else self.nbytes
            memory = (ctypes.c_char * (end - done)).from_address(self.address + done)
            moved = self._move_once(self.direct_fd if direct else self.tail_fd, memory, self.offset + done)
            if moved == 0:
                raise OSError(errno.EIO, "end of file inside the extent")
            done += moved

    def _move_once(self, fd: int, memory: ctypes.Array[ctypes.c_char], offset: int) -> int:
        while True:
            try:
                return os.pwritev(fd, [memory], offset) if self.is_write else os.preadv(fd, [memory], offset)
            except (BlockingIOError, InterruptedError):
                continue


class _Worker(threading.Thread):
    """A thread of the engine; an `InFlight` until it has ended."""

    def done(self) -> bool:
        return not self.is_alive()

    def wait_for(self, seconds: float) -> bool:
        self.join(seconds)
        return self.done()


class _Meter:
    """Bytes and busy time of reads or of writes, guarded by the engine's lock."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.num_done = 0
        self._num_in_flight = 0
        self._busy_s = 0.0
        self._busy_since = 0.0

    def start(self, now: float) -> None:
        if self._num_in_flight == 0:
            self._busy_since = now
        self._num_in_flight += 1

    def stop(self, now: float, nbytes: int, *, ok: bool) -> None:
        self._num_in_flight -= 1
        if self._num_in_flight == 0:
            self._busy_s += now - self._busy_since
        if ok:
            self.nbytes += nbytes
            self.num_done += 1

    def busy_s(self, now: float) -> float:
        """Seconds with something in flight, until ``now``."""
        return self._busy_s + (now - self._busy_since if self._num_in_flight else 0.0)
