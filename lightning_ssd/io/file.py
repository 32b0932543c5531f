"""A store file: of exact length, with one descriptor for whole blocks and one for the bytes after them."""

from __future__ import annotations

import ctypes
import errno
import os

from lightning_ssd.errors import as_io_failure
from lightning_ssd.io.deadline import InFlight
from lightning_ssd.io.folder import Folder, close_fd

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


class File:
    """An open store file of exact length. Close it only when no transfer on it is in flight.

    Attributes:
        path: Where the file is, also after `rename`.
        nbytes: Its exact length.
        direct_fd: For whole 4096-byte blocks: O_DIRECT, or buffered if refused or not asked for; -1 once closed.
        tail_fd: Buffered, for the bytes past the last 4096 boundary; -1 once closed.
        is_direct: Whether ``direct_fd`` is O_DIRECT.
        writable: Whether it was opened for writing.
        folder: The open directory that ``path`` is in, if it was given: names are looked up relative to it.
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
        self._abandoned: list[InFlight] = []  # transfers that were given up

    @classmethod
    def create(cls, path: str | os.PathLike[str], nbytes: int, *, direct: bool, folder: Folder | None = None) -> File:
        """Create a new file of exactly ``nbytes`` with its space reserved.

        Args:
            path: Must not exist yet.
            nbytes: Length, above 0.
            direct: Use O_DIRECT if the file system supports it.
            folder: The open directory it is in.

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
        """Open an existing file.

        Args:
            path: The file.
            direct: Use O_DIRECT if the file system supports it.
            writable: Open for reading and writing, else for reading.
            folder: The open directory it is in.

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
            new_path: The new path.
            folder: The open directory of ``new_path``. Default: that of the file.

        Raises:
            IOFailure: It cannot be moved.
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

    def take_name(self, old_path: str) -> None:
        """Give the file, which is at ``old_path`` in its folder still, the name that ``path`` says already.

        Raises:
            IOFailure: It cannot be moved; ``path`` is ``old_path`` again.
        """
        path = self.path
        try:
            with as_io_failure(old_path, 0, self.nbytes, "rename"):
                where = None if self.folder is None else self.folder.fd
                os.rename(_name(old_path, self.folder), _name(path, self.folder), src_dir_fd=where, dst_dir_fd=where)
        except BaseException:
            self.path = old_path
            raise

    def unlink(self) -> None:
        """Remove its name; the file exists as long as it is open or mapped.

        Raises:
            IOFailure: The name cannot be removed.
        """
        with as_io_failure(self.path, what="unlink"):
            _unlink(self.path, self.folder)

    def open_again(self, flags: int) -> int:
        """Open the file once more by its name, also after `close`; the caller closes the descriptor.

        Raises:
            IOFailure: It cannot be opened.
        """
        with as_io_failure(self.path, what="open"):
            return _open(self.path, flags, self.folder)

    def stat(self) -> os.stat_result:
        """The status of the file that has the name now.

        Raises:
            IOFailure: There is none, or the disk failed.
        """
        with as_io_failure(self.path, what="stat"):
            if self.folder is None:
                return os.stat(self.path, follow_symlinks=False)
            return self.folder.stat(_name(self.path, self.folder))

    def date(self, mtime_ns: int) -> None:
        """Set the time of the last change, in nanoseconds since 1970.

        Raises:
            IOFailure: The disk refused.
        """
        times = (self.stat().st_atime_ns, mtime_ns)
        where = None if self.folder is None else self.folder.fd
        with as_io_failure(self.path, what="utime"):
            os.utime(_name(self.path, self.folder), ns=times, dir_fd=where, follow_symlinks=False)

    def give_up(self, transfer: InFlight) -> None:
        """Note that ``transfer`` is not waited for any more. Until it is over, it may still use the descriptors."""
        self._abandoned.append(transfer)

    @property
    def hangs(self) -> bool:
        """Whether a transfer that was given up is still in flight: nothing else may be written to the file."""
        self._abandoned = [transfer for transfer in self._abandoned if not transfer.done()]
        return bool(self._abandoned)

    def close(self) -> None:
        """Close the descriptors; a second call does nothing. If a transfer `hangs`, they stay open."""
        direct_fd, tail_fd = self.direct_fd, self.tail_fd
        self.direct_fd = self.tail_fd = -1
        if self.hangs:
            return  # the kernel would give the numbers to another file, and the transfer's next piece would go there
        for fd in {tail_fd, direct_fd} - {-1}:
            close_fd(fd)

    def __repr__(self) -> str:
        return f"File({self.path!r}, {self.nbytes} bytes, {'direct' if self.is_direct else 'buffered'})"


def _reserve(fd: int, nbytes: int) -> None:
    """Give a file its length and reserve its space; only the length if the file system cannot reserve."""
    # Not os.posix_fallocate: if the file system cannot reserve, glibc writes every block instead.
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
    """A descriptor with O_DIRECT, or ``tail_fd`` if that is refused or not asked for."""
    if not direct:
        return tail_fd
    try:
        return _open(path, mode | os.O_DIRECT, folder)
    except OSError as error:
        if error.errno in _NO_DIRECT:
            return tail_fd
        raise
