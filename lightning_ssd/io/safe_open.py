"""Open files that another user may have put there: no symlink leads out of a directory, no FIFO is waited for."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from lightning_ssd.errors import CheckpointError, remedy
from lightning_ssd.io.folder import close_fd

_MAX_PATH_PARTS = 8


def check_relative_path(path: str, where: str) -> tuple[str, ...]:
    """Parts of a path that stays inside its directory whatever the directory holds.

    Raises:
        CheckpointError: If it is absolute, empty, or has a part such as ``..``.
    """
    parts = tuple(path.split("/"))
    plain = all(part not in ("", ".", "..") and "\0" not in part and "\\" not in part for part in parts)
    with suppress(UnicodeEncodeError):
        path.encode()
        if plain and len(parts) <= _MAX_PATH_PARTS:
            return parts
    raise CheckpointError(f"{where}: the path {path!r:.200} is not a plain relative path inside the directory")


def open_inside(directory_fd: int, path: str, where: str) -> int:
    """Open a regular file for reading by a relative path of which no part may be a symlink.

    Raises:
        CheckpointError: If the path leads outside, through a symlink, to something else than a file, or nowhere.
    """
    parts = check_relative_path(path, where)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.dup(directory_fd)
    try:
        for part in parts[:-1]:
            inner = os.open(part, flags | os.O_DIRECTORY, dir_fd=fd)
            close_fd(fd)
            fd = inner
        # Without O_NONBLOCK a FIFO put in the file's place would hold us for ever.
        opened = os.open(parts[-1], flags | os.O_NONBLOCK, dir_fd=fd)
    except OSError as error:
        what = "is a symlink or leads through one" if error.errno in (errno.ELOOP, errno.ENOTDIR) else error.strerror
        raise CheckpointError(f"{where}: cannot open {path!r}: {what}") from error
    finally:
        close_fd(fd)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        close_fd(opened)
        raise CheckpointError(f"{where}: {path!r} is not a regular file")
    return opened


def open_folder(path: str) -> int:
    """Open a directory by the path that the user gave, which may lead through symlinks.

    Raises:
        CheckpointError: If it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot open the directory {path!r}: {error.strerror}") from error


@contextmanager
def open_regular(path: str, where: str) -> Iterator[IO[bytes]]:
    """A plain file by the path that the user gave, which may lead through symlinks; a FIFO is not waited for.

    Raises:
        CheckpointError: If it is something else, or cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        way_out = (
            "name a file that is there" if error.errno in (errno.ENOENT, errno.ELOOP) else remedy(error.errno or 0)
        )
        raise CheckpointError(f"{where} cannot be opened: {error.strerror}; {way_out}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        close_fd(fd)
        raise CheckpointError(f"{where} is not a regular file")
    with os.fdopen(fd, "rb") as file:
        yield file
