"""The contract of the disk transport: its options, one asynchronous transfer, an engine. Bytes only; no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, Protocol

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.io.deadline import Patience
from lightning_ssd.io.file import File
from lightning_ssd.sizes import BLOCK_NBYTES, parse_nbytes


@dataclass(frozen=True)
class IOOptions:
    """Options of the transfers between disk and host memory. Plain values, checked by `validate`.

    Attributes:
        engine: Which engine; "auto" takes the fastest that works on this machine.
        depth: Most pieces in flight at once, over all transfers of an engine.
        block_nbytes: Bytes of a piece, a multiple of 4096; larger transfers are split.
        num_threads: Threads of the "posix" and "python" engines.
        direct: O_DIRECT; "auto" uses it where the file system supports it, "on" refuses to run without it.
        deadline_s: Seconds that a transfer or a sync may take before `DeadlineError` is raised.
    """

    engine: Literal["auto", "uring", "posix", "python"] = "auto"
    depth: int = 16
    block_nbytes: int | str = "4MiB"
    num_threads: int = 4
    direct: Literal["auto", "on", "off"] = "auto"
    deadline_s: float = 120.0


def validate(options: IOOptions) -> None:
    """Check every value of ``options``.

    Raises:
        ConfigurationError: Names the first option that is invalid and what it may be.
    """
    _require(
        options.engine in ("auto", "uring", "posix", "python"), "engine", options.engine, "auto, uring, posix, python"
    )
    _require(options.direct in ("auto", "on", "off"), "direct", options.direct, "auto, on, off")
    _require(1 <= options.depth <= 4096, "depth", options.depth, "1 to 4096")
    _require(1 <= options.num_threads <= 256, "num_threads", options.num_threads, "1 to 256")
    _require(options.deadline_s > 0, "deadline_s", options.deadline_s, "a number of seconds above 0")
    try:
        block_nbytes = parse_nbytes(options.block_nbytes)
    except ValueError as error:
        raise ConfigurationError(f"io option block_nbytes: {error}") from None
    in_range = BLOCK_NBYTES <= block_nbytes <= 1 << 30 and block_nbytes % BLOCK_NBYTES == 0
    _require(in_range, "block_nbytes", options.block_nbytes, f"a multiple of {BLOCK_NBYTES} up to 1GiB")


def _require(ok: bool, option: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigurationError(f"io option {option}={value!r} cannot work; it may be: {allowed}")


@dataclass(frozen=True)
class IOStats:
    """What an engine has moved since it was created. Bytes are those that callers asked for, in successful transfers.

    Attributes:
        read_nbytes: Bytes read.
        written_nbytes: Bytes written.
        num_reads: Read transfers that succeeded.
        num_writes: Write transfers that succeeded.
        read_busy_s: Seconds with at least one read in flight.
        write_busy_s: Seconds with at least one write in flight.
    """

    read_nbytes: int = 0
    written_nbytes: int = 0
    num_reads: int = 0
    num_writes: int = 0
    read_busy_s: float = 0.0
    write_busy_s: float = 0.0


class Transfer(Protocol):
    """One asynchronous read or write. It completes whether or not anyone waits, and keeps its error."""

    def done(self) -> bool:
        """Whether it has succeeded or failed; then the engine does not use the memory any more."""
        ...

    def wait(self, deadline_s: float | None = None) -> None:
        """Wait until the operation is over. May be called again; a failed transfer raises its error every time.

        Args:
            deadline_s: Seconds to wait at most; None takes the engine's `IOOptions.deadline_s`.

        Raises:
            IOFailure: The operation failed; names the path, and offset and bytes of the piece that did.
            DeadlineError: Time ran out. The operation is still in flight and still uses the memory.
        """
        ...

    def times(self) -> tuple[float, float | None] | None:
        """When its first piece began and its last piece ended, in seconds of `time.perf_counter`.

        While it is in flight the end is None; while it is queued the result is None. A failed transfer has both times.
        """
        ...


class Engine(Protocol):
    """Moves bytes between files and host memory. Safe to use from many threads; not usable after a fork.

    ``offset`` and ``address`` are multiples of 4096; ``nbytes`` is any positive number inside the file. A read may fill
    memory up to the next multiple of 4096; end of file before ``nbytes`` is EIO. A write sends whole blocks through
    ``File.direct_fd`` and the rest through ``File.tail_fd``. ``keep`` is held until the operation is over, and dropped
    in `Transfer.done` or `Transfer.wait`, or at the next use of the engine. Misuse (alignment, range, closed file or
    engine) raises ValueError at once.

    Attributes:
        name: Which engine this is.
        reason: Why it was chosen, one sentence.
        patience: How long its disks are waited for.
    """

    name: str
    reason: str
    patience: Patience

    def read(self, file: File, offset: int, address: int, nbytes: int, *, keep: object = None) -> Transfer:
        """Start reading ``nbytes`` at ``offset`` of ``file`` into memory at ``address``."""
        ...

    def write(self, file: File, offset: int, address: int, nbytes: int, *, keep: object = None) -> Transfer:
        """Start writing ``nbytes`` of memory at ``address`` to ``offset`` of ``file``."""
        ...

    def register_memory(self, address: int, nbytes: int) -> bool:
        """Pin memory that most transfers use, once instead of for each transfer.

        Call at most once; the memory must outlive the engine. Returns False if the engine or the system cannot do it:
        all works the same, with a little more CPU time.
        """
        ...

    def stats(self) -> IOStats:
        """What it has moved so far."""
        ...

    def close(self) -> None:
        """Wait for everything in flight, then end the threads; does nothing a second time, or in a forked child.

        If a transfer hangs, the engine and the memory in flight stay until the process ends.
        """
        ...


def check_request(file: File, offset: int, address: int, nbytes: int, *, is_write: bool) -> None:
    """Refuse a request that breaks the contract of `Engine`.

    Raises:
        ValueError: Names the argument and the rule it breaks.
    """
    if file.closed:
        raise ValueError(f"{file.path!r} is closed")
    if is_write and not file.writable:
        raise ValueError(f"{file.path!r} was opened for reading only")
    if offset % BLOCK_NBYTES or address % BLOCK_NBYTES or address <= 0:
        raise ValueError(f"offset {offset} and address {address:#x} must be multiples of {BLOCK_NBYTES}, address not 0")
    if nbytes <= 0 or offset < 0 or offset + nbytes > file.nbytes:
        raise ValueError(f"{nbytes} bytes at offset {offset} do not lie inside {file.path!r} of {file.nbytes} bytes")


def check_process(made_in: int) -> None:
    """Refuse to use an engine after a fork: the parent has its threads, so a transfer would never end.

    Raises:
        ValueError: This process is not ``made_in``, the one that created the engine.
    """
    if os.getpid() != made_in:
        raise ValueError("the engine was made before a fork and its threads are not in this process; make another here")
