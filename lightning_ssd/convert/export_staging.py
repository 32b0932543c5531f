"""Staging of exports: a hidden, locked file or folder next to the target, ``.NAME.export-PID-RANDOM``.

As in [Note: staging], the lock (``flock`` on the file or folder itself) ends with the process. So a file or folder that
can be locked is stale, and `lightning_ssd.cli.stale_files` may remove it.
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
def staged_file(target: str) -> Iterator[tuple[int, Callable[[], None]]]:
    """A new locked file: its descriptor, and a call that renames it to ``target``. If not renamed, it is removed."""
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


def remove_unfinished(parent: Folder, name: str) -> None:
    """Remove the unfinished files of this name that dead processes have left."""
    pattern = re.compile(re.escape(f".{name}.export-") + r"\d+-[0-9a-f]{8,}")
    for stale in filter(pattern.fullmatch, parent.names()):
        with suppress(FileNotFoundError), Folder(parent.open_file(stale, os.O_RDONLY), stale) as found:
            if stat.S_ISREG(os.fstat(found.fd).st_mode) and is_unfinished_export(found) and found.try_lock():
                parent.unlink(stale)


@contextmanager
def staged_folder(target: str) -> Iterator[Folder]:
    """A new locked folder; removed on leaving unless `publish` has renamed it."""
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
    """Rename a folder of `staged_folder` to ``target``.

    Raises:
        CheckpointError: If somebody else has removed or replaced the folder.
    """
    with Folder.open(os.path.dirname(target)) as parent:
        own = os.path.basename(made.path)
        if not parent.is_at(own, made):
            raise CheckpointError(f"{made.path!r} was removed by somebody else while it was written")
        parent.rename(own, os.path.basename(target))


def _name(target: str) -> str:
    return f".{target}.export-{os.getpid()}-{secrets.token_hex(8)}"


def _lock(parent: Folder, name: str, fd: int) -> bool:
    """Whether the lock is ours; False if another process took the file for stale before it was locked."""
    mine = try_lock(fd)
    return mine is None or (
        mine and parent.is_at(name, fd)
    )  # None: no locks on this file system, so nobody removes stale files


def is_unfinished_export(found: Folder) -> bool:
    """Whether a file or folder holds what an export writes; the caller checks the name."""
    about = os.fstat(found.fd)
    if stat.S_ISREG(about.st_mode):
        # An export that was killed early may have written nothing.
        return _is_private(about) and _FILE_BEGIN.startswith(os.pread(found.fd, len(_FILE_BEGIN), 0))
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
        return False
    entries = {name: found.stat(name) for name in found.names()}
    weights = [name for name in entries if _WEIGHTS.fullmatch(name)]
    # Copied configuration may have any name, but is written after weights, with mode 0600. Torch uses the umask.
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
