"""An engine for tests that makes another one slow, failing, torn, corrupt, or reordered, by a rule."""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_ssd.errors import IOFailure
from lightning_ssd.io.deadline import Patience
from lightning_ssd.io.engine import Engine, IOStats, Transfer, check_request
from lightning_ssd.io.file import File
from lightning_ssd.io.python_engine import Failure, PythonTransfer


@dataclass(frozen=True)
class Operation:
    """What a rule decides on.

    Attributes:
        index: Number of operations the engine was given before this one.
        is_write: Write or read.
        path: The file.
        offset: Byte offset in the file.
        nbytes: Bytes asked for.
    """

    index: int
    is_write: bool
    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Fault:
    """What happens to one operation, in this order. The default is nothing.

    Attributes:
        hold: It does not start until `FaultyEngine.release`. Releasing in another order reorders completions.
        delay_s: It starts this much later. A buffer used too early then shows wrong bytes, as on a slow disk.
        error: errno it fails with; 0 for success.
        moved_nbytes: With an error: bytes that are moved before it fails (a short read, a torn write).
        is_torn: Only ``moved_nbytes`` are moved, and it succeeds all the same: a disk that lies.
        flip_bit: Of a read: this bit of what was read is inverted.
    """

    hold: bool = False
    delay_s: float = 0.0
    error: int = 0
    moved_nbytes: int = 0
    is_torn: bool = False
    flip_bit: int | None = None


Rule = Callable[[Operation], Fault | None]


@dataclass(frozen=True)
class When:
    """One line of a script: the fault for the operations that match.

    Attributes:
        fault: What happens to them.
        path: Pattern of the whole path, as in `fnmatch`.
        is_write: Only writes, or only reads.
        nth: Only the nth match of the three above, from 0.
    """

    fault: Fault
    path: str = "*"
    is_write: bool | None = None
    nth: int | None = None


def script(lines: Sequence[When]) -> Rule:
    """A rule from ``lines``: the first that matches decides."""
    counts = [0] * len(lines)

    def decide(operation: Operation) -> Fault | None:
        chosen: Fault | None = None
        for i, line in enumerate(lines):
            if line.is_write not in (None, operation.is_write) or not fnmatch.fnmatch(operation.path, line.path):
                continue
            if line.nth in (None, counts[i]) and chosen is None:
                chosen = line.fault
            counts[i] += 1
        return chosen

    return decide


class FaultyEngine:
    """`Engine` that asks ``rule`` before each operation and hands it to ``inner``, which it owns.

    An operation with a fault has a thread of its own: do not script many thousands.
    """

    name = "faulty"

    def __init__(self, inner: Engine, rule: Rule | Sequence[When], *, deadline_s: float = 120.0) -> None:
        self.reason = f"faulty: a test wants faults over {inner.name}"
        self._inner = inner
        self._rule = rule if callable(rule) else script(rule)
        self.patience = Patience(deadline_s)
        self._lock = threading.Lock()
        self._num_operations = 0
        self._held: dict[int, threading.Event] = {}
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._closing = threading.Event()  # ends delays

    def read(self, file: File, offset: int, address: int, nbytes: int, *, keep: object = None) -> Transfer:
        """See `Engine.read`."""
        return self._start(file, offset, address, nbytes, keep, is_write=False)

    def write(self, file: File, offset: int, address: int, nbytes: int, *, keep: object = None) -> Transfer:
        """See `Engine.write`."""
        return self._start(file, offset, address, nbytes, keep, is_write=True)

    def register_memory(self, address: int, nbytes: int) -> bool:
        """See `Engine.register_memory`."""
        return self._inner.register_memory(address, nbytes)

    def stats(self) -> IOStats:
        """Those of the inner engine: what really moved."""
        return self._inner.stats()

    def held(self) -> list[int]:
        """Indices of the operations that wait for `release`, in order of arrival."""
        with self._lock:
            return sorted(self._held)

    def release(self, *indices: int) -> None:
        """Let held operations start; all of them when none is named."""
        with self._lock:
            for index in indices or tuple(self._held):
                self._held.pop(index).set()

    def close(self) -> None:
        """Release what is held, cut delays short, wait for everything, and close the inner engine."""
        self.patience.close()
        with self._lock:
            self._closed = True
        self._closing.set()
        self.release()
        for thread in self._threads:
            thread.join()  # sync: waits for the faulty operations
        self._inner.close()

    def _start(self, file: File, offset: int, address: int, nbytes: int, keep: object, *, is_write: bool) -> Transfer:
        check_request(file, offset, address, nbytes, is_write=is_write)
        with self._lock:
            if self._closed:
                raise ValueError("the engine is closed")
            operation = Operation(self._num_operations, is_write, file.path, offset, nbytes)
            self._num_operations += 1
            fault = self._rule(operation)
            move = self._inner.write if is_write else self._inner.read
            if fault is None:
                return move(file, offset, address, nbytes, keep=keep)
            transfer = PythonTransfer(
                file, offset, nbytes, num_pieces=1, keep=keep, patience=self.patience, is_write=is_write
            )
            gate = threading.Event()
            if fault.hold:
                self._held[operation.index] = gate
            else:
                gate.set()
            thread = threading.Thread(
                target=self._run,
                args=(transfer, fault, gate, lambda moved: move(file, offset, address, moved), address),
                name=f"lightning-ssd-faulty-{operation.index}",
                daemon=True,
            )
            self._threads.append(thread)
            thread.start()
        return transfer

    def _run(
        self,
        transfer: PythonTransfer,
        fault: Fault,
        gate: threading.Event,
        move: Callable[[int], Transfer],
        address: int,
    ) -> None:
        gate.wait()  # sync: waits for release
        self._closing.wait(fault.delay_s)
        nbytes = fault.moved_nbytes if fault.error or fault.is_torn else transfer.nbytes
        try:
            if nbytes > 0:
                _wait_within(transfer, move(nbytes))
            if fault.flip_bit is not None:
                flipped = ctypes.c_uint8.from_address(address + fault.flip_bit // 8)
                flipped.value ^= 1 << fault.flip_bit % 8
        except ValueError:  # held until its file was closed
            transfer.failure = Failure(errno.EBADF, transfer.offset, transfer.nbytes)
        except IOFailure as error:
            transfer.failure = Failure(error.errno or errno.EIO, error.offset, error.nbytes)
        else:
            if fault.error:
                transfer.failure = Failure(fault.error, transfer.offset, transfer.nbytes)
        transfer.finish()


def _wait_within(transfer: PythonTransfer, inner: Transfer) -> None:
    """Wait for ``inner``, however it ends; the disk has worked on ``transfer`` since it began."""
    try:
        inner.wait()
    finally:
        times = inner.times()
        transfer.begin(times and times[0])
