"""A directory by its descriptor: every access goes to the directory that was opened, whatever has its path now.

If other users may write to the directory above, they can replace what has a path between two uses of that path. So
names are looked up relative to a descriptor, and no symlink is followed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from lightning_ssd.errors import as_io_failure
from lightning_ssd.io.deadline import in_time, require_answering, sync

T = TypeVar("T")

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Folder:
    """An open directory.

    Attributes:
        path: Its path when it was opened, for messages.
        fd: Its descriptor, -1 once closed.
    """

    def __init__(self, fd: int, path: str) -> None:
        """Own ``fd`` from now on."""
        self.fd = fd
        self.path = path

    @classmethod
    def open(cls, path: str) -> Folder:
        """Open a directory by a path of the user, which may lead through symlinks."""
        return cls(os.open(path or ".", _OPEN), path)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor, which releases its lock; a second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close_fd(fd)

    def folder(self, name: str) -> Folder:
        """Open a directory in this one; a symlink is an error."""
        return Folder(self.open_file(name, _OPEN), os.path.join(self.path, name))

    def make(self, name: str) -> Folder:
        """Create a directory with mode 0700 and open it.

        Raises:
            OSError: It exists, cannot be created, or another user has replaced it.
        """
        self._change(name, lambda: os.mkdir(name, 0o700, dir_fd=self.fd), "making a directory")
        try:
            made = self.folder(name)
            try:
                is_new = made.is_new()
            except BaseException:
                made.close()
                raise
        except OSError:
            with suppress(OSError):
                os.rmdir(name, dir_fd=self.fd)
            raise
        if not is_new:
            made.close()
            raise OSError(errno.EPERM, "another user put a directory in its place", os.path.join(self.path, name))
        return made

    def open_file(self, name: str, flags: int) -> int:
        """Open a file; a symlink is an error, and a FIFO is not waited for."""
        if self.fd < 0:
            raise FileNotFoundError(errno.ENOENT, "its directory was closed", os.path.join(self.path, name))
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        if flags & os.O_CREAT:
            return self._change(name, lambda: os.open(name, flags, 0o600, dir_fd=self.fd), "create")
        with self._naming(name):
            return os.open(name, flags, dir_fd=self.fd)

    def unlink(self, name: str) -> None:
        """Remove a file's name."""
        self._change(name, lambda: os.unlink(name, dir_fd=self.fd), "unlink")

    def rmdir(self, name: str) -> None:
        """Remove an empty directory."""
        self._change(name, lambda: os.rmdir(name, dir_fd=self.fd), "rmdir")

    def rename(self, name: str, new_name: str) -> None:
        """Rename a file or directory in this directory."""
        self._change(name, lambda: os.rename(name, new_name, src_dir_fd=self.fd, dst_dir_fd=self.fd), "rename")

    def move(self, name: str, to: Folder, new_name: str) -> None:
        """Move a file to another directory; a file of that name there is replaced."""

        def rename() -> None:
            os.rename(name, new_name, src_dir_fd=self.fd, dst_dir_fd=to.fd)

        self._change(name, rename, "rename")

    def stat(self, name: str) -> os.stat_result:
        """The status of what has the name; of a symlink itself."""
        with self._naming(name):
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def has(self, name: str) -> bool:
        """Whether anything has the name."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def is_at(self, name: str, inner: Folder | int) -> bool:
        """Whether ``name`` still names what was opened as ``inner``, a folder or a descriptor."""
        try:
            return os.path.samestat(self.stat(name), os.fstat(inner.fd if isinstance(inner, Folder) else inner))
        except FileNotFoundError:
            return False

    def is_new(self) -> bool:
        """Whether it is empty and belongs to this user, as after `make`."""
        return not os.listdir(self.fd) and (os.fstat(self.fd).st_uid == os.geteuid() or self._gives_its_owner())

    def names(self) -> list[str]:
        """The names in it, sorted."""
        return sorted(os.listdir(self.fd))

    def sync(self) -> None:
        """Make the names in it durable."""
        try:
            sync(self.fd, os.fsync)
        except OSError as error:
            error.filename = self.path
            raise

    def try_lock(self, *, shared: bool = False) -> bool | None:
        """See `try_lock`."""
        return try_lock(self.fd, shared=shared)

    def _gives_its_owner(self) -> bool:
        """Whether the file system gives all files one owner, whoever creates them, as network disks may."""
        name = f".owner-{secrets.token_hex(8)}"
        with closing_fd(self.open_file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)) as fd:
            with suppress(FileNotFoundError):
                self.unlink(name)
            return os.fstat(fd).st_uid == os.fstat(self.fd).st_uid

    def _change(self, name: str, call: Callable[[], T], what: str) -> T:
        """Make a system call that changes a name, in time; its error shows the whole path."""
        with self._naming(name):
            return in_time(call, os.path.join(self.path, name), what)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Let an error show the whole path; refuse if the disk hangs."""
        require_answering(os.path.join(self.path, name), "access")
        try:
            yield
        except OSError as error:
            error.filename = os.path.join(self.path, name)
            raise


def device_of(path: str) -> int:
    """Number of the file system of ``path``, which exists.

    Raises:
        IOFailure: The disk does not say.
    """
    with as_io_failure(path, what="stat"):
        return os.stat(path).st_dev


def close_fd(fd: int) -> None:
    """Close a descriptor and ignore errors, as of a disk that is gone; what must be durable was synced before."""
    with suppress(OSError):
        os.close(fd)


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Close a descriptor on leaving."""
    try:
        yield fd
    finally:
        close_fd(fd)


def try_lock(fd: int, *, shared: bool = False) -> bool | None:
    """Lock a descriptor without waiting: exclusively to change what it is, ``shared`` to read it.

    Returns:
        Whether it is locked now; None if the file system cannot lock directories, as some network disks.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_regular(fd: int) -> bool:
    """Whether a descriptor is of a regular file."""
    return stat.S_ISREG(os.fstat(fd).st_mode)


def is_own_file(found: os.stat_result, made: Folder) -> bool:
    """Whether a regular file has the owner of ``made``, a directory of ours, and nobody else may write to it."""
    is_ours = found.st_uid == os.fstat(made.fd).st_uid
    return stat.S_ISREG(found.st_mode) and is_ours and not found.st_mode & 0o022
