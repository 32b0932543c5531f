"""The directory of one run's live store: made, locked, recognised when its run is dead, and removed by its owner.

What is removed, by the owner or after its death, is what a run makes: plain files with our endings, the lock, and the
directory if that left it empty. Nothing is reached through a symlink, and nothing of another user's is touched.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from lightning_ssd.errors import StoreError
from lightning_ssd.sizes import fmt

_PREFIX = "ssd-run-"
_LOCK = "lock"
_NAME = re.compile(r"(\.new-)?ssd-run-\d{8}-\d{6}-\d+-\d{6}")
_DATA_SUFFIXES = (".safetensors", ".spill")
_PROBE = re.compile(r"\.direct-probe-\w+")
_UNBORN_S = 3600.0
"""Age at which a directory that never got its name, and so may not have been locked yet, is taken for dead."""


@dataclass(frozen=True)
class DeadRun:
    """What a run that ended without cleaning up has left behind.

    Attributes:
        path: The directory.
        nbytes: Bytes on disk that removing it frees; files that a checkpoint links stay and are not counted.
        age_s: Seconds since something in it was changed.
        host: Name of the machine that made it; a lock on a network disk may not be seen from another one.
    """

    path: str
    nbytes: int
    age_s: float
    host: str


class RunDirectory:
    """One directory under ``root``, held by a lock as long as this object is open.

    Attributes:
        path: The directory, mode 0700.
    """

    def __init__(self, root: str) -> None:
        """Create and lock the directory.

        Raises:
            StoreError: If ``root`` cannot be created or written.
        """
        name = f"{_PREFIX}{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns() % 10**6:06d}"
        self.path = os.path.join(root, name)
        try:
            os.makedirs(root, exist_ok=True)
            self._lock_fd = _make(self.path)
        except OSError as error:
            raise StoreError(
                f"cannot make a run directory in nvme_path={root!r}: {error.strerror}; "
                "choose a directory on a local disk that this user may write to"
            ) from error

    def close(self, *, remove: bool) -> None:
        """Give up the lock; with ``remove`` delete the directory. A second call does nothing."""
        if self._lock_fd < 0:
            return
        try:
            if remove:
                _remove(self.path)
        finally:
            os.close(self._lock_fd)
            self._lock_fd = -1


def is_run_directory(name: str) -> bool:
    """Whether a directory of that name is a run's, alive or dead, as far as a name can tell."""
    return _NAME.fullmatch(name) is not None


def dead_runs(root: str) -> list[DeadRun]:
    """Run directories under ``root`` whose lock nobody holds."""
    found = []
    for entry in sorted(os.scandir(root), key=lambda e: e.name) if os.path.isdir(root) else []:
        if is_run_directory(entry.name) and entry.is_dir(follow_symlinks=False):
            with suppress(OSError):  # gone while we looked
                run = dead_run(entry.path)
                if run is not None:
                    found.append(run)
    return found


def dead_run(path: str) -> DeadRun | None:
    """What is known of one run directory, None if it is alive, not ours, or no run directory."""
    with _held(path) as fds:
        if fds is None:
            return None
        nbytes, changed_s = _extent(fds[0])
        return DeadRun(path, nbytes, max(time.time() - changed_s, 0.0), _host(fds[1]))


def remove_dead_run(path: str) -> bool:
    """Remove what a dead run left behind; False if it is alive, not ours, or gone. Files that are not ours stay.

    Raises:
        OSError: If something could not be removed.
    """
    with _held(path) as fds:
        if fds is None:
            return False
        _remove_contents(fds[0])
        os.rmdir(path)
        return True


def warn_of_dead_runs(root: str) -> None:
    """Say once what dead runs have left under ``root``; nothing is removed."""
    dead = dead_runs(root)
    if dead:
        total = sum(run.nbytes for run in dead)
        warnings.warn(
            f"{len(dead)} earlier run(s) ended without cleaning up and hold {fmt(total)} in {root!r}; "
            f"see and remove them with: lightning-ssd clean {shlex.quote(root)}",
            stacklevel=2,
        )


def _make(path: str) -> int:
    """Make the directory with its lock held from the moment on at which it can be seen; the lock's descriptor."""
    folder, name = os.path.split(path)
    hidden = os.path.join(folder, f".new-{name}")
    os.mkdir(hidden, 0o700)
    lock_fd = -1
    try:
        lock_fd = _lock(os.path.join(hidden, _LOCK), create=True)
        os.write(lock_fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        os.rename(hidden, path)
    except BaseException:
        if lock_fd >= 0:
            os.close(lock_fd)
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return lock_fd


def _lock(path: str, *, create: bool, dir_fd: int | None = None) -> int:
    # A symlink or FIFO in the lock's place would be another's file, or hold us for ever.
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)
    fd = os.open(path, flags, 0o600, dir_fd=dir_fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FileNotFoundError(f"{path!r} is not a plain file")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(fd).st_nlink:
            raise FileNotFoundError(f"{path!r} was removed by its owner")
    except OSError:
        os.close(fd)
        raise
    return fd


@contextmanager
def _held(path: str) -> Iterator[tuple[int, int] | None]:
    """Hold a dead run's directory and lock, as descriptors; None if it is alive, another user's, or no run's."""
    fds: list[int] = []
    try:
        try:
            fds.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
            if is_run_directory(os.path.basename(path)) and _may_be_dead(path, os.fstat(fds[0])):
                fds.append(_lock(_LOCK, create=False, dir_fd=fds[0]))
        except OSError:
            pass
        yield (fds[0], fds[1]) if len(fds) == 2 else None
    finally:
        for fd in fds:
            os.close(fd)


def _may_be_dead(path: str, found: os.stat_result) -> bool:
    # A run that is being made has not locked its lock yet; it would find ours.
    is_unborn = os.path.basename(path).startswith(".") and time.time() - found.st_mtime < _UNBORN_S
    return found.st_uid == os.geteuid() and not is_unborn


def _host(lock_fd: int) -> str:
    try:
        return str(json.loads(os.pread(lock_fd, 4096, 0))["host"])
    except (ValueError, KeyError, TypeError):  # its disk was full, or it died before it wrote
        return ""


def _extent(directory_fd: int) -> tuple[int, float]:
    """Bytes that removing the contents frees, and the time of the last change in seconds since 1970."""
    found = [os.fstat(directory_fd)]
    with os.scandir(directory_fd) as entries:
        found += [entry.stat(follow_symlinks=False) for entry in entries]
    nbytes = sum(each.st_blocks * 512 for each in found[1:] if each.st_nlink == 1)
    return nbytes, max(each.st_mtime for each in found)


def _remove(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return  # the user was faster
    try:
        _remove_contents(fd)
        os.rmdir(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        warnings.warn(f"{path!r} holds files that this run did not make, it stays: {error.strerror}", stacklevel=2)
    finally:
        os.close(fd)


def _remove_contents(directory_fd: int) -> None:
    """Remove what a run makes, the lock last: as long as it is there, what is left can be recognised."""
    with os.scandir(directory_fd) as entries:
        found = list(entries)
    for entry in found:
        if entry.name.endswith(_DATA_SUFFIXES) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.name, dir_fd=directory_fd)
        elif _PROBE.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            _remove_probe(entry.name, directory_fd)
    if any(entry.name == _LOCK and entry.is_file(follow_symlinks=False) for entry in found):
        os.unlink(_LOCK, dir_fd=directory_fd)


def _remove_probe(name: str, directory_fd: int) -> None:
    """Remove the directory in which a run tried what its disk can do, if it died at that."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        with suppress(FileNotFoundError):
            os.unlink("probe", dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=directory_fd)
