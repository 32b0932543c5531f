"""The contract of the disk transport: a store file, one asynchronous transfer, an engine. Bytes only; no torch."""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from typing import Literal, Protocol

from lightning_ssd.errors import ConfigurationError, as_io_failure
from lightning_ssd.io.deadline import InFlight, Patience
from lightning_ssd.io.folder import Folder, close_fd
from lightning_ssd.sizes import BLOCK_NBYTES, parse_nbytes


@dataclass(frozen=True)
class IOOptions:
    """How bytes travel between disk and host memory. Plain values; `validate` checks them, the constructor does not.

    Attributes:
        engine: Which engine; "auto" takes the fastest that works here.
        depth: Pieces in flight at most, over all transfers of an engine.
        block_nbytes: Size of a piece; larger transfers are split. A multiple of 4096.
        num_threads: Threads of the "posix" and "python" engines.
        direct: O_DIRECT; "auto" uses it where the file system has it, "on" refuses to run without.
        deadline_s: How long a disk that does not answer is waited for before `DeadlineError` is raised, transfers and
            syncs alike.
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
        ConfigurationError: Names the first option that cannot be honoured and what it may be.
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
    """What an engine has moved since it was made. Bytes are the callers' (logical), of transfers that succeeded.

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


class File:
    """An open store file of exact length. Close it only when no transfer on it is in flight.

    Attributes:
        path: Where the file is (as last renamed).
        nbytes: Its exact length.
        direct_fd: For whole 4096-byte blocks: O_DIRECT, or buffered where refused or not asked for; -1 once closed.
        tail_fd: Buffered, for the bytes past the last 4096 boundary; -1 once closed.
        is_direct: Whether ``direct_fd`` is O_DIRECT.
        writable: Whether it was opened for writing.
        folder: The directory that ``path`` is in, where it was given: names are looked up in this very one.
    """

    def __init__(
        self, path: str, nbytes: int, *, direct_fd: int, tail_fd: int, writable: bool, folder: Folder | None = None
    ) -> None:
        self.path = path
        self.folder = folder
        self.nbytes = nbytes
        self.direct_fd = direct_fd
        self.tail_fd = tail_fd
        self.is_direct = direct_fd != tail_fd
        self.writable = writable
        self._abandoned: list[InFlight] = []  # transfers that nobody waits for any more

    @classmethod
    def create(cls, path: str | os.PathLike[str], nbytes: int, *, direct: bool, folder: Folder | None = None) -> File:
        """Create a new file of exactly ``nbytes`` with its space reserved.

        Args:
            path: Must not exist yet.
            nbytes: Length, above 0.
            direct: Use O_DIRECT where the file system has it.
            folder: The directory it is in, open.

        Raises:
            IOFailure: No space, no permission, or the path exists. Nothing is left behind.
        """
        if nbytes <= 0:
            raise ValueError(f"a store file needs a positive length, got {nbytes}")
        path = os.fspath(path)
        with as_io_failure(path, 0, nbytes, "create"):
            tail_fd = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, folder)
            try:
                _reserve(tail_fd, nbytes)
                direct_fd = _open_direct(path, os.O_RDWR, direct, tail_fd, folder)
            except BaseException:
                close_fd(tail_fd)
                _unlink(path, folder)
                raise
        return cls(path, nbytes, direct_fd=direct_fd, tail_fd=tail_fd, writable=True, folder=folder)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, direct: bool, writable: bool, folder: Folder | None = None) -> File:
        """Open an existing file; its length is what the file system says now.

        Args:
            path: The file.
            direct: Use O_DIRECT where the file system has it.
            writable: Open for reading and writing, else for reading.
            folder: The directory it is in, open.

        Raises:
            IOFailure: The file cannot be opened.
        """
        path = os.fspath(path)
        mode = os.O_RDWR if writable else os.O_RDONLY
        with as_io_failure(path, 0, 0, "open"):
            tail_fd = _open(path, mode, folder)
            try:
                nbytes = os.fstat(tail_fd).st_size
                direct_fd = _open_direct(path, mode, direct, tail_fd, folder)
            except BaseException:
                close_fd(tail_fd)
                raise
        return cls(path, nbytes, direct_fd=direct_fd, tail_fd=tail_fd, writable=writable, folder=folder)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.tail_fd < 0

    def sync(self) -> None:
        """Make what was written durable (fdatasync).

        Raises:
            IOFailure: The disk refused; what was written since the last sync may be lost.
        """
        if self.closed:
            raise ValueError(f"{self.path!r} is closed")
        with as_io_failure(self.path, 0, self.nbytes, "sync"):
            os.fdatasync(self.tail_fd)  # sync: waits for the disk

    def rename(self, new_path: str | os.PathLike[str], folder: Folder | None = None) -> None:
        """Move the file inside its file system, replacing what ``new_path`` names; open descriptors stay valid.

        Args:
            new_path: Where to.
            folder: The directory of ``new_path``, open. Default: that of the file.
        """
        new_path, folder = os.fspath(new_path), folder or self.folder
        with as_io_failure(self.path, 0, self.nbytes, "rename"):
            os.rename(
                _name(self.path, self.folder),
                _name(new_path, folder),
                src_dir_fd=None if self.folder is None else self.folder.fd,
                dst_dir_fd=None if folder is None else folder.fd,
            )
        self.path, self.folder = new_path, folder

    def unlink(self) -> None:
        """Remove its name; the file lives as long as it is open or mapped."""
        with as_io_failure(self.path, what="unlink"):
            _unlink(self.path, self.folder)

    def open_again(self, flags: int) -> int:
        """Another descriptor of the file by its name, also after `close`; the caller's to close."""
        with as_io_failure(self.path, what="open"):
            return _open(self.path, flags, self.folder)

    def stat(self) -> os.stat_result:
        """About the file that has the name."""
        with as_io_failure(self.path, what="stat"):
            if self.folder is None:
                return os.stat(self.path, follow_symlinks=False)
            return self.folder.stat(_name(self.path, self.folder))

    def date(self, mtime_ns: int) -> None:
        """Set the time of the last change, in nanoseconds since 1970."""
        times = (self.stat().st_atime_ns, mtime_ns)
        where = None if self.folder is None else self.folder.fd
        with as_io_failure(self.path, what="utime"):
            os.utime(_name(self.path, self.folder), ns=times, dir_fd=where, follow_symlinks=False)

    def give_up(self, transfer: InFlight) -> None:
        """Nobody waits for ``transfer`` any more; until it is over, it may still use the descriptors."""
        self._abandoned.append(transfer)

    @property
    def hangs(self) -> bool:
        """Whether a transfer that was given up is still in flight: nothing else may be written to the file."""
        self._abandoned = [transfer for transfer in self._abandoned if not transfer.done()]
        return bool(self._abandoned)

    def close(self) -> None:
        """Close the descriptors; a second call does nothing. Where a transfer `hangs` they stay open."""
        direct_fd, tail_fd = self.direct_fd, self.tail_fd
        self.direct_fd = self.tail_fd = -1
        if self.hangs:
            return  # used again for another file, the numbers would lead what is still to be handed to the system there
        for fd in {tail_fd, direct_fd} - {-1}:
            close_fd(fd)

    def __repr__(self) -> str:
        return f"File({self.path!r}, {self.nbytes} bytes, {'direct' if self.is_direct else 'buffered'})"


class Transfer(Protocol):
    """One asynchronous disk operation, with its error inside. It completes whether or not anyone waits."""

    def done(self) -> bool:
        """Whether it is over, well or badly; once True, the engine no longer touches the memory."""
        ...

    def wait(self, deadline_s: float | None = None) -> None:
        """Block until the operation is over. May be called again; a failed transfer raises its error every time.

        Args:
            deadline_s: Seconds to wait at most; None takes the engine's `IOOptions.deadline_s`.

        Raises:
            IOFailure: The operation failed; names the path, and offset and bytes of the piece that did.
            DeadlineError: Time ran out. The operation is still in flight and still owns the memory.
        """
        ...

    def times(self) -> tuple[float, float | None] | None:
        """When its first piece was handed to the disk and its last one came back, in seconds of `time.perf_counter`.

        Both are known once it is over, also if it failed. Before, the end is None; while it is queued, so is the whole.
        """
        ...


class Engine(Protocol):
    """Moves bytes between files and host memory. Safe to use from many threads; not usable after a fork.

    ``offset`` and ``address`` are multiples of 4096; ``nbytes`` is any positive number inside the file. A read may fill
    memory up to the next multiple of 4096 and is complete at ``nbytes``; end of file before that is EIO. A write sends
    whole blocks through ``File.direct_fd`` and the rest through ``File.tail_fd``. ``keep`` is held until the
    operation is over, and let go when that is noticed: in `Transfer.done` or `Transfer.wait`, or at the next use of the
    engine. Misuse (alignment, range, closed file or engine) raises ValueError at once.

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
        """Tell the engine about memory that most transfers use, so that it is pinned once and not for each of them.

        Call at most once; the memory must outlive the engine. Returns False where the engine or the system does not
        do it: everything works the same, for a little more CPU time.
        """
        ...

    def stats(self) -> IOStats:
        """What was moved so far."""
        ...

    def close(self) -> None:
        """Wait for everything in flight, then end the threads; does nothing a second time, or in a forked child.

        What hangs is not waited for longer than `patience`: then the engine stays, with the memory that is in flight,
        until the process ends.
        """
        ...


def check_request(file: File, offset: int, address: int, nbytes: int, *, is_write: bool) -> None:
    """Refuse a request that is a mistake of the caller.

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
    """Refuse to use an engine after a fork: its threads stayed with the parent, so a transfer would never end.

    Raises:
        ValueError: If ``made_in`` is not this process.
    """
    if os.getpid() != made_in:
        raise ValueError("the engine was made before a fork and its threads are not in this process; make another here")


_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


def _reserve(fd: int, nbytes: int) -> None:
    # Not os.posix_fallocate: where the file system cannot reserve, glibc imitates it by writing every block.
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            os.ftruncate(fd, nbytes)
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _name(path: str, folder: Folder | None) -> str:
    return path if folder is None else os.path.basename(path)


def _open(path: str, flags: int, folder: Folder | None) -> int:
    return (
        os.open(path, flags | os.O_CLOEXEC, 0o600) if folder is None else folder.open_file(_name(path, folder), flags)
    )


def _unlink(path: str, folder: Folder | None) -> None:
    if folder is None:
        os.unlink(path)
    else:
        folder.unlink(os.path.basename(path))


def _open_direct(path: str, mode: int, direct: bool, tail_fd: int, folder: Folder | None) -> int:
    if not direct:
        return tail_fd
    try:
        return _open(path, mode | os.O_DIRECT, folder)
    except OSError as error:
        if error.errno in _NO_DIRECT:
            return tail_fd
        raise
