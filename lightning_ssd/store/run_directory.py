"""The directory of one run's live store: made, locked, recognised when its run is dead, and removed by its owner."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass

from lightning_ssd.errors import StoreError
from lightning_ssd.sizes import fmt

_PREFIX = "ssd-run-"
_LOCK = "lock"


@dataclass(frozen=True)
class DeadRun:
    """What a run that ended without cleaning up has left behind."""

    path: str
    nbytes: int


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


def dead_runs(root: str) -> list[DeadRun]:
    """Run directories under ``root`` whose lock nobody holds."""
    found = []
    for entry in sorted(os.scandir(root), key=lambda e: e.name) if os.path.isdir(root) else []:
        if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
            with suppress(OSError):  # alive, not ours, or gone while we looked
                fd = _lock(os.path.join(entry.path, _LOCK), create=False)
                os.close(fd)
                found.append(DeadRun(entry.path, _nbytes(entry.path)))
    return found


def warn_of_dead_runs(root: str) -> None:
    """Say once what dead runs have left under ``root``; nothing is removed."""
    dead = dead_runs(root)
    if dead:
        total = sum(run.nbytes for run in dead)
        warnings.warn(
            f"{len(dead)} earlier run(s) ended without cleaning up and hold {fmt(total)} in {root!r}; "
            f"remove them with: rm -r {' '.join(run.path for run in dead)}",
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


def _nbytes(path: str) -> int:
    return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(path))


def _lock(path: str, *, create: bool) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _remove(path: str) -> None:
    # Only what we created: plain files with our endings, then the directory if that left it empty.
    if not os.path.isdir(path):
        return  # the user was faster
    for entry in list(os.scandir(path)):
        if entry.name == _LOCK or entry.name.endswith(".safetensors"):
            os.unlink(entry.path)
    try:
        os.rmdir(path)
    except OSError as error:
        warnings.warn(f"{path!r} holds files that this run did not make, it stays: {error.strerror}", stacklevel=2)
