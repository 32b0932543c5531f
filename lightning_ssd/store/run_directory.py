"""The run directory: where the files of one run are. It is locked while the run is alive, and removed at its end.

Only what a run creates is ever removed: regular files with our suffixes, the lock, and the directory if it is empty
then. Every access goes through descriptors (`lightning_ssd.io.folder`): not through a symlink or a path that another
user can change, and never to files of another user.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shlex
import socket
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lightning_ssd.errors import IOFailure, StoreError, gone
from lightning_ssd.io.folder import Folder, close_fd, device_of, is_regular
from lightning_ssd.sizes import fmt

_PREFIX = "ssd-run-"
_LOCK = "lock"
_NAME = re.compile(r"(\.new-)?ssd-run-\d{8}-\d{6}-\d+-(\d{6}|[0-9a-f]{16})")
_DATA_SUFFIXES = (".safetensors", ".spill")
_PROBE = re.compile(r"\.direct-probe-\w+")
_ABOUT_NBYTES = 512
INNER_NBYTES = 1 + 63 + 1 + 190
"""Most bytes that the names of a run directory and of a file in it add to the path of ``root``, with slashes."""

_UNBORN_S = 3600.0
"""Age from which a directory with its first, hidden name counts as dead. A younger one may not be locked yet."""


@dataclass(frozen=True)
class DeadRun:
    """The run directory of a run that is not alive.

    Attributes:
        path: The directory.
        nbytes: Bytes on disk that removing it frees; files that a checkpoint links are not counted.
        age_s: Seconds since something in it was changed.
        host: Name of the machine that created it; another machine may not see its lock on a network disk.
        is_kept: The run was told to keep it (``keep_store=True``).
        has_ended: The run came to its end and kept the directory; it was not killed.
    """

    path: str
    nbytes: int
    age_s: float
    host: str
    is_kept: bool = False
    has_ended: bool = False


class RunDirectory:
    """The directory of this run, locked until `close`.

    Attributes:
        path: Its path; its mode is 0700.
        folder: The same directory, open.
    """

    def __init__(self, root: str, *, keep: bool = False) -> None:
        """Create and lock the directory.

        Args:
            root: The directory to create it in, created if needed.
            keep: Note in it that it stays when the run ends, killed or not.

        Raises:
            StoreError: ``root`` cannot be created or written.
        """
        # Nobody can guess the name and create something there first.
        name = f"{_PREFIX}{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(8)}"
        self.path = os.path.join(root, name)
        self._pid = os.getpid()
        try:
            os.makedirs(root, exist_ok=True)
            self._root = Folder.open(root)
            try:
                self.folder, self._lock_fd = _make(self._root, name, keep=keep)
            except BaseException:
                self._root.close()
                raise
        except OSError as error:
            raise StoreError(
                f"cannot make a run directory in nvme_path={root!r}: {error.strerror}; "
                "choose a directory on a local disk that this user may write to"
            ) from error

    @property
    def is_open(self) -> bool:
        """Whether `close` was not called."""
        return self._lock_fd >= 0

    @property
    def device(self) -> int:
        """Device number of its file system.

        Raises:
            StoreError: The directory was removed.
        """
        try:
            return device_of(self.path)
        except IOFailure as error:
            if error.errno != errno.ENOENT:
                raise
            raise gone(self.path) from error

    def close(self, *, remove: bool) -> None:
        """Unlock the directory; with ``remove`` delete it, else note in it that the run ended and kept it.

        A second call does nothing. In a forked child nothing is deleted or noted: the run is the parent's.

        Raises:
            OSError: Something could not be removed.
        """
        if self._lock_fd < 0:
            return
        try:
            if os.getpid() != self._pid:
                return
            if remove:
                self._remove()
            else:
                with suppress(OSError):  # the user removed it, or the disk is full: then it counts as a dead run's
                    _describe(self._lock_fd, keep=True, ended=True)
        finally:
            close_fd(self._lock_fd)
            self._lock_fd = -1
            self.folder.close()
            self._root.close()

    def _remove(self) -> None:
        try:
            _remove_contents(self.folder)
            _remove_empty(self._root, self.folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            warnings.warn(
                f"{self.path!r} holds files that this run did not make, it stays: {error.strerror}", stacklevel=2
            )


def is_run_directory(name: str) -> bool:
    """Whether a directory of that name is, by its name, a run directory, alive or dead."""
    return _NAME.fullmatch(name) is not None


def dead_runs(root: str) -> list[DeadRun]:
    """Run directories under ``root`` that no process holds locked, without those that a run kept when it ended."""
    try:
        names = sorted(os.listdir(root))
    except OSError:  # none yet, or not ours to list
        return []
    found = (dead_run(os.path.join(root, name)) for name in names if is_run_directory(name))
    return [run for run in found if run is not None and not run.has_ended]


def dead_run(path: str) -> DeadRun | None:
    """The dead run at ``path``; None if it is alive, another user's, or no run directory."""
    with suppress(OSError), _held(path, shared=True) as held:  # it may be removed meanwhile
        if held is not None:
            folder, lock_fd = held
            nbytes, changed_s = _extent(folder)
            about = _about(lock_fd)
            age_s = max(time.time() - changed_s, 0.0)
            kept = (about.get("keep") is True, about.get("ended") is True)
            return DeadRun(path, nbytes, age_s, str(about.get("host", "")), *kept)
    return None


def remove_dead_run(path: str, *, kept: bool = False) -> bool:
    """Remove the directory of a dead run. Files that no run creates stay, and then the directory does.

    Args:
        path: The directory.
        kept: Remove it also if its run was to keep it.

    Returns:
        Whether it was removed; False if its run is alive, another user's, kept, or gone.

    Raises:
        OSError: Something could not be removed.
    """
    # Locked until all is gone: to others the run is alive meanwhile.
    with _held(path, shared=False) as held:
        if held is None or (_about(held[1]).get("keep") is True and not kept):
            return False
        with Folder.open(os.path.dirname(path)) as root:
            if not root.is_at(os.path.basename(path), held[0]):
                return False
            _remove_contents(held[0])
            _remove_empty(root, held[0])
        return True


def warn_of_dead_runs(root: str) -> None:
    """Warn of the dead runs under ``root``, if any; nothing is removed."""
    dead = dead_runs(root)
    if dead:
        total = sum(run.nbytes for run in dead)
        warnings.warn(
            f"{len(dead)} earlier run(s) ended without cleaning up and hold {fmt(total)} in {root!r}; "
            f"see and remove them with: lightning-ssd clean {shlex.quote(root)}",
            stacklevel=2,
        )


def _make(root: Folder, name: str, *, keep: bool) -> tuple[Folder, int]:
    """Create and open a run directory, and its lock file, which is locked before the directory gets its name."""
    hidden = f".new-{name}"
    folder = root.make(hidden)
    lock_fd = -1
    try:
        lock_fd = _lock(folder, os.O_CREAT | os.O_EXCL, shared=False)
        _describe(lock_fd, keep=keep)
        root.rename(hidden, name)
        if not root.is_at(name, folder):
            raise OSError(errno.EPERM, "another user moved it away", os.path.join(root.path, name))
    except BaseException:
        with suppress(OSError):
            folder.unlink(_LOCK)
        for left in (hidden, name):
            with suppress(OSError):
                root.rmdir(left)
        if lock_fd >= 0:
            close_fd(lock_fd)
        folder.close()
        raise
    folder.path = os.path.join(root.path, name)
    return folder, lock_fd


def _describe(lock_fd: int, *, keep: bool, ended: bool = False) -> None:
    """Write into the lock file who runs, and whether the directory is kept."""
    about = {"pid": os.getpid(), "host": socket.gethostname(), "keep": keep, "ended": ended}
    os.lseek(lock_fd, 0, os.SEEK_SET)
    os.write(lock_fd, json.dumps(about).ljust(_ABOUT_NBYTES).encode())  # of fixed length: it replaces the old text


def _about(lock_fd: int) -> dict[str, Any]:
    """What a run wrote into its lock file; empty if its disk was full, or it was killed before."""
    try:
        found = json.loads(os.pread(lock_fd, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _lock(folder: Folder, flags: int, *, shared: bool) -> int:
    """Open and lock the lock file.

    Raises:
        OSError: It is locked by another process, missing, removed meanwhile, or no regular file.
    """
    fd = folder.open_file(_LOCK, os.O_RDWR | flags)
    try:
        if not is_regular(fd):
            raise FileNotFoundError(errno.ENOENT, "the lock is not a plain file", folder.path)
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if not os.fstat(fd).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "the lock was removed by its owner", folder.path)
    except OSError:
        close_fd(fd)
        raise
    return fd


@contextmanager
def _held(path: str, *, shared: bool) -> Iterator[tuple[Folder, int] | None]:
    """Inside, a dead run's directory and lock file, open and locked; None if it is alive, another user's, or none."""
    with ExitStack() as stack:
        held: tuple[Folder, int] | None = None
        with suppress(OSError):
            root = stack.enter_context(Folder.open(os.path.dirname(path)))
            folder = stack.enter_context(root.folder(os.path.basename(path)))
            if is_run_directory(os.path.basename(path)) and _may_be_dead(path, os.fstat(folder.fd)):
                lock_fd = _lock(folder, 0, shared=shared)
                stack.callback(close_fd, lock_fd)
                held = folder, lock_fd
        yield held


def _may_be_dead(path: str, found: os.stat_result) -> bool:
    # A new run that has not locked its lock file yet would find it locked by us.
    is_unborn = os.path.basename(path).startswith(".") and time.time() - found.st_mtime < _UNBORN_S
    return found.st_uid == os.geteuid() and not is_unborn


def _extent(folder: Folder) -> tuple[int, float]:
    """Bytes on disk that removing the contents frees, and the time of the last change in seconds since 1970."""
    found = [os.fstat(folder.fd), *map(folder.stat, folder.names())]
    nbytes = sum(each.st_blocks * 512 for each in found[1:] if each.st_nlink == 1)
    return nbytes, max(each.st_mtime for each in found)


def _remove_contents(folder: Folder) -> None:
    """Remove what a run creates, the lock file last: without it the rest could not be recognised."""
    names = folder.names()
    for name in names:
        mode = folder.stat(name).st_mode
        if name.endswith(_DATA_SUFFIXES) and stat.S_ISREG(mode):
            folder.unlink(name)
        elif _PROBE.fullmatch(name) and stat.S_ISDIR(mode):
            # In it `io.select.use_direct` tried O_DIRECT, when the run was killed.
            with folder.folder(name) as probe, suppress(FileNotFoundError):
                probe.unlink("probe")
            folder.rmdir(name)
    if _LOCK in names and stat.S_ISREG(folder.stat(_LOCK).st_mode):
        folder.unlink(_LOCK)


def _remove_empty(root: Folder, folder: Folder) -> None:
    """Remove the directory itself, unless another one has its name now."""
    name = os.path.basename(folder.path)
    if root.is_at(name, folder):
        root.rmdir(name)
