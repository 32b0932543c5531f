"""Checkpoint directories as a whole: recognised, opened without leaving them, published at once, removed.

[Note: staging] A checkpoint is written into a hidden sibling of its target, ``.NAME.tmp-PID-RANDOM``, and takes the
target's name in one system call. The writer holds a lock (``flock``) on that directory; the lock dies with the process,
so a staging directory that can be locked belongs to nobody and is removed by the next save. Where the file system
cannot exchange two names, the old checkpoint is called ``.NAME.old-PID-RANDOM`` for a moment; if the process dies in
that moment, `recover` gives it its name back.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from lightning_ssd.checkpoint.manifest import FORMAT, MANIFEST, ODD, REST, STATE, UNITS, check_relative_path
from lightning_ssd.errors import CheckpointError, IoError, naming

Recycle = Callable[[str], bool]
"""Called with the path of a unit file that nothing else links, before it is unlinked; True if it was moved away."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES)
_OLD = re.compile(r"\.old-\d+-[0-9a-f]{8}$")
UNIT_FILE = re.compile(r"\d{5,}-[^/]*\.safetensors")


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a directory that `save` made; a symlink to one is."""
    manifest = os.path.join(os.fspath(path), MANIFEST)
    try:
        if not stat.S_ISREG(os.lstat(manifest).st_mode):
            return False
        fd = os.open(manifest, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return False
        raise
    try:
        return f'"format":"{FORMAT}"'.encode() in os.pread(fd, 256, 0)
    except OSError as error:
        raise IoError(error.errno or errno.EIO, manifest, 0, 256, "read") from error
    finally:
        os.close(fd)


def remove(path: str | os.PathLike[str], recycle: Recycle | None = None) -> None:
    """Remove a checkpoint. Files in it that are not ours are kept, under the same name if they are all that is left.

    Args:
        path: The checkpoint, or a symlink to one, of which only the link is removed.
        recycle: Takes unit files that nothing else links instead of having them unlinked.

    Raises:
        CheckpointError: If ``path`` is no checkpoint of ours, or could not be removed; it is then whole, or hidden.
    """
    target = os.path.abspath(os.fspath(path))
    if not is_checkpoint(target):
        raise CheckpointError(f"{target!r} is not a checkpoint of lightning_ssd and is not removed")
    try:
        _remove(target, recycle)
    except OSError as error:
        raise CheckpointError(f"checkpoint {target!r} could not be removed: {error}; the others are whole") from error


def _remove(target: str, recycle: Recycle | None) -> None:
    if os.path.islink(target):
        os.unlink(target)
        return
    aside = _sibling(target, "tmp")
    os.rename(target, aside)
    _discard(aside, target, recycle)


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
            os.close(fd)
            fd = inner
        # Without O_NONBLOCK a FIFO put in the file's place would hold us for ever.
        opened = os.open(parts[-1], flags | os.O_NONBLOCK, dir_fd=fd)
    except OSError as error:
        what = "is a symlink or leads through one" if error.errno in (errno.ELOOP, errno.ENOTDIR) else error.strerror
        raise CheckpointError(f"{where}: cannot open {path!r}: {what}") from error
    finally:
        os.close(fd)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise CheckpointError(f"{where}: {path!r} is not a regular file")
    return opened


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def recover(target: str) -> None:
    """Give a checkpoint its name back if a process died while replacing it; see [Note: staging]."""
    if os.path.lexists(target):
        return
    for aside in _siblings(target, "old"):
        with locked(aside) as mine:
            if mine and is_checkpoint(aside) and not os.path.lexists(target):
                os.rename(aside, target)


@contextmanager
def staging(target: str, recycle: Recycle | None = None) -> Iterator[str]:
    """An empty, locked sibling of ``target`` that is published under its name on leaving; see [Note: staging].

    Raises:
        CheckpointError: If ``target`` exists and is not ours to replace.
    """
    recover(target)
    check_replaceable(target)
    _clean_stale(target)
    path, lock = _make_staging(target)
    try:
        published = False
        try:
            yield path
            old = _publish(path, target)
            published = True
        finally:
            if not published and os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
        # If this fails, the old one stays where it is: the disk may still have it under the name.
        sync_directory(os.path.dirname(target))
        if old is not None:
            _discard(old, target, recycle)
    finally:
        os.close(lock)


def check_replaceable(target: str) -> None:
    """Check that nothing of the user's would be lost by writing a checkpoint named ``target``.

    Raises:
        CheckpointError: If a directory of that name is neither empty nor a checkpoint of ours.
    """
    if os.path.islink(target) or not os.path.isdir(target) or is_checkpoint(target):
        return
    with os.scandir(target) as found:
        first = next(found, None)
    if first is not None:
        raise CheckpointError(
            f"{target!r} is a directory that lightning_ssd did not write (it holds {first.name!r}) and is not "
            "replaced; choose another name or remove it yourself"
        )


def moved_aside_name(target: str) -> str | None:
    """The name that a plain file (such as another strategy's ``last.ckpt``) gets when a checkpoint takes its own."""
    if os.path.islink(target) or not os.path.lexists(target) or os.path.isdir(target):
        return None
    number = 0
    while os.path.lexists(name := f"{target}.replaced" + (f"-{number}" if number else "")):
        number += 1
    return name


def _publish(path: str, target: str) -> str | None:
    """Let ``path`` take the name ``target``; return where the checkpoint is now that had it.

    A symlink that had it is removed, a plain file is renamed.
    """
    file_name = moved_aside_name(target)
    if file_name is not None:
        os.rename(target, file_name)
    elif os.path.islink(target):
        os.unlink(target)
    if is_checkpoint(target):
        return _replace(path, target)
    os.rename(path, target)
    return None


def _replace(path: str, target: str) -> str:
    """Exchange a new checkpoint with the old one; return where the old one is now."""
    if _exchange(path, target):
        return path
    old = _sibling(target, "old")
    os.rename(target, old)
    os.rename(path, target)
    # A power cut must not leave the old one under a name that `recover` does not know, and the new one without its own.
    sync_directory(os.path.dirname(target))
    aside = _sibling(target, "tmp")
    os.rename(old, aside)
    return aside


def _exchange(first: str, second: str) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), first, None, second)


def _sibling(target: str, role: str) -> str:
    parent, name = os.path.split(target)
    return os.path.join(parent, f".{name}.{role}-{os.getpid()}-{os.urandom(4).hex()}")


def _siblings(target: str, role: str) -> list[str]:
    parent, name = os.path.split(target)
    pattern = re.compile(re.escape(f".{name}.{role}-") + r"\d+-[0-9a-f]{8}")
    with suppress(FileNotFoundError), os.scandir(parent) as found:
        return [e.path for e in found if pattern.fullmatch(e.name) and _is_own_directory(e)]
    return []


def _is_own_directory(entry: os.DirEntry[str]) -> bool:
    # In a directory that many may write to, another user could put one there and exchange what is in it under us.
    try:
        return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def _make_staging(target: str) -> tuple[str, int]:
    """A new staging directory and the descriptor that holds its lock."""
    _make_folders(os.path.dirname(target))
    while True:
        path = _sibling(target, "tmp")
        os.mkdir(path, 0o700)
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError:
            os.rmdir(path)
            raise
        # Another process may take the directory for stale between mkdir and flock, and remove it: then try again.
        locked = try_lock(lock)
        if locked is None or (locked and os.path.isdir(path)):
            return path, lock
        os.close(lock)


def _make_folders(path: str) -> None:
    """Make what is missing of a path, durably: a checkpoint is no safer than the folders that lead to it."""
    if not os.path.isdir(path):
        parent = os.path.dirname(path)
        _make_folders(parent)
        with suppress(FileExistsError):
            os.mkdir(path)
        sync_directory(parent)


def _clean_stale(target: str) -> None:
    """Remove what dead processes left behind while writing or removing this checkpoint."""
    for path in _siblings(target, "tmp"):
        with locked(path) as mine:
            if mine:
                _discard(path, target, None)
    for path in _siblings(target, "old"):
        with locked(path) as mine:
            if mine and os.path.lexists(target):
                _discard(path, target, None)


@contextmanager
def locked(path: str) -> Iterator[bool]:
    """Hold the lock of a directory or file, if nobody else does and the file system has locks."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        yield try_lock(fd) is True
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool | None:
    """Whether the lock was free and is ours now; None where directories cannot be locked (some network disks)."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _discard(path: str, target: str, recycle: Recycle | None) -> None:
    """Remove a staging directory or a checkpoint that was renamed aside; what is not ours gets the name ``target``."""
    discard_contents(path, recycle)
    if os.path.isdir(path):
        sync_directory(path)  # that the manifest is gone, before the name comes back
        os.rename(path, target if not os.path.lexists(target) else f"{target}.kept-{os.urandom(4).hex()}")


def discard_contents(path: str, recycle: Recycle | None = None) -> None:
    """Remove what we write into a checkpoint, and its directories if that leaves them empty."""
    # Whoever renamed it aside may have died before that was durable: a power cut would bring the old name back.
    sync_directory(os.path.dirname(path))
    units = os.path.join(path, UNITS)
    # The manifest goes first: what is left of a checkpoint must not look like one.
    for name in (MANIFEST, STATE, REST, ODD):
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(path, name))
    if _OLD.search(path):
        sync_directory(path)  # or a power cut may leave its manifest, but not its units, and `recover` would trust it
    if os.path.isdir(units) and not os.path.islink(units):
        for name in os.listdir(units):
            if UNIT_FILE.fullmatch(name):
                _discard_file(os.path.join(units, name), recycle)
    for directory in (units, path):
        with suppress(FileNotFoundError):
            try:
                os.rmdir(directory)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise


def _discard_file(path: str, recycle: Recycle | None) -> None:
    with suppress(FileNotFoundError):
        if recycle is not None and os.lstat(path).st_nlink == 1 and recycle(path):
            return
        os.unlink(path)
