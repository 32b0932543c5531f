"""What an export writes before it has its name: a hidden, locked file or folder beside the target.

``.NAME.export-PID-RANDOM``, as in [Note: staging]: the lock (``flock`` on the file or folder itself) dies with the
process, so what can be locked belongs to nobody, and `lightning_ssd.cli.stale_files` may remove it.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from lightning_ssd.checkpoint.directory import make_locked
from lightning_ssd.checkpoint.writer import new_file
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.folder import Folder, try_lock

_FILE_BEGIN = b"PK\x03\x04"  # torch's files are zip archives
_WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors|__\d+_\d+\.distcp|\.metadata(\.tmp)?")


@contextmanager
def file_beside(target: str) -> Iterator[tuple[int, Callable[[], None]]]:
    """A new locked file: its descriptor, and what gives it the name ``target``. Without that it is gone on leaving."""
    folder, name = os.path.split(target)
    with Folder.open(folder) as parent:
        is_locked = False
        while not is_locked:
            own = _name(name)
            try:
                with new_file(os.path.join(folder, own), parent) as fd:
                    is_locked = _lock(parent, own, fd)
                    if is_locked:
                        yield fd, partial(_take_name, parent, own, name, fd)
            finally:
                with suppress(FileNotFoundError):
                    parent.unlink(own)


def _take_name(parent: Folder, own: str, name: str, fd: int) -> None:
    if not parent.is_at(own, fd):
        raise CheckpointError(f"{os.path.join(parent.path, own)!r} was removed by somebody else while it was written")
    os.replace(own, name, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)


@contextmanager
def folder_beside(target: str) -> Iterator[Folder]:
    """A new locked folder. It is gone on leaving unless `publish` has given it its name."""
    folder, name = os.path.split(target)
    os.makedirs(folder, exist_ok=True)
    with Folder.open(folder) as parent, make_locked(parent, lambda: _name(name)) as made:
        try:
            yield made
        finally:
            own = os.path.basename(made.path)
            if parent.is_at(own, made):
                with suppress(OSError):
                    discard_export(parent, own, made)


def publish(made: Folder, target: str) -> None:
    """Give a folder of `folder_beside` its name.

    Raises:
        CheckpointError: If somebody else has taken that, or the folder, away.
    """
    with Folder.open(os.path.dirname(target)) as parent:
        own = os.path.basename(made.path)
        if not parent.is_at(own, made):
            raise CheckpointError(f"{made.path!r} was removed by somebody else while it was written")
        parent.rename(own, os.path.basename(target))


def _name(target: str) -> str:
    return f".{target}.export-{os.getpid()}-{secrets.token_hex(8)}"


def _lock(parent: Folder, name: str, fd: int) -> bool:
    """Whether it is ours; False if somebody took it for dead, between making and locking, and removed it."""
    mine = try_lock(fd)
    return mine is None or (mine and parent.is_at(name, fd))  # None: no locks here, and so nobody who removes


def is_unfinished_export(found: Folder) -> bool:
    """Whether a file or folder, by its looks, is what an export writes; its name is the caller's matter."""
    about = os.fstat(found.fd)
    if stat.S_ISREG(about.st_mode):
        # Of one that was killed at once there may be nothing yet.
        return _is_private(about) and _FILE_BEGIN.startswith(os.pread(found.fd, len(_FILE_BEGIN), 0))
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
        return False
    entries = {name: found.stat(name) for name in found.names()}
    weights = [name for name in entries if _WEIGHTS.fullmatch(name)]
    # Copied configuration may have any name, but comes after weights, and is as private. Torch writes with the umask.
    return (not entries or bool(weights)) and all(
        _is_private(each) or (name in weights and _is_file(each)) for name, each in entries.items()
    )


def discard_export(parent: Folder, name: str, found: Folder) -> None:
    """Remove what `is_unfinished_export` has found, while its lock is held.

    Raises:
        OSError: If something could not be removed.
    """
    if not stat.S_ISDIR(os.fstat(found.fd).st_mode):
        parent.unlink(name)
        return
    for each in found.names():
        found.unlink(each)
    parent.rmdir(name)


def _is_file(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1


def _is_private(found: os.stat_result) -> bool:
    return _is_file(found) and not found.st_mode & 0o077
