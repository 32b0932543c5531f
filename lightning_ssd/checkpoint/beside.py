"""What an export writes before it has its name: a hidden, locked file or folder beside the target.

``.NAME.export-PID-RANDOM``, as in [Note: staging]: the lock (``flock`` on the file or folder itself) dies with the
process, so what can be locked belongs to nobody, and `lightning_ssd.checkpoint.leftovers` may remove it.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lightning_ssd.checkpoint.directory import try_lock
from lightning_ssd.checkpoint.writer import new_file

_FILE_BEGIN = b"PK\x03\x04"  # torch's files are zip archives
_WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors|__\d+_\d+\.distcp|\.metadata(\.tmp)?")


@contextmanager
def file_beside(target: str) -> Iterator[tuple[int, str]]:
    """A new locked file: descriptor and path. It is gone on leaving unless it was renamed."""
    is_locked = False
    while not is_locked:
        path = _name(target)
        try:
            with new_file(path) as fd:
                is_locked = _lock(fd, path)
                if is_locked:
                    yield fd, path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)


@contextmanager
def folder_beside(target: str) -> Iterator[str]:
    """A new locked folder. It is gone on leaving unless it was renamed."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    path, lock = _make_folder(target)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make_folder(target: str) -> tuple[str, int]:
    while True:
        path = _name(target)
        os.mkdir(path, 0o700)
        with suppress(FileNotFoundError):  # somebody took it for dead before it was locked: then another one
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            if _lock(lock, path):
                return path, lock
            os.close(lock)


def _name(target: str) -> str:
    parent, name = os.path.split(target)
    return os.path.join(parent, f".{name}.export-{os.getpid()}-{os.urandom(4).hex()}")


def _lock(fd: int, path: str) -> bool:
    """Whether it is ours; False if somebody took it for dead, between making and locking, and removed it."""
    mine = try_lock(fd)
    return mine is None or (mine and os.path.lexists(path))  # None: no locks here, and so nobody who removes


def is_unfinished_export(path: str) -> bool:
    """Whether a file or folder, by its looks, is what an export writes; its name is the caller's matter."""
    found = os.lstat(path)
    if stat.S_ISREG(found.st_mode):
        return _is_private(found) and _begins_as_torch_file(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        return False
    with os.scandir(path) as inside:
        entries = {entry.name: entry.stat(follow_symlinks=False) for entry in inside}
    weights = [name for name in entries if _WEIGHTS.fullmatch(name)]
    # Copied configuration may have any name, but comes after weights, and is as private. Torch writes with the umask.
    return (not entries or bool(weights)) and all(
        _is_private(each) or (name in weights and _is_file(each)) for name, each in entries.items()
    )


def discard_export(path: str) -> None:
    """Remove what `is_unfinished_export` has found, while its lock is held.

    Raises:
        OSError: If something could not be removed.
    """
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        os.unlink(path)
        return
    for name in os.listdir(path):
        os.unlink(os.path.join(path, name))
    os.rmdir(path)


def _is_file(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1


def _is_private(found: os.stat_result) -> bool:
    return _is_file(found) and not found.st_mode & 0o077


def _begins_as_torch_file(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        begin = os.pread(fd, len(_FILE_BEGIN), 0)
    finally:
        os.close(fd)
    return _FILE_BEGIN.startswith(begin)  # of one that was killed at once there may be nothing yet
