"""Checkpoint directories as a whole: recognised, published in one step, recovered, removed.

[Note: staging] A checkpoint is written into a hidden sibling of its target, ``.NAME.tmp-PID-RANDOM``. One system call
then gives it the target's name. The writer holds a lock (``flock``) on the staging directory. The lock ends with the
process, so a staging directory that can be locked is stale, and the next save removes it. A process that replaces or
removes a checkpoint renames it to a hidden name and holds its lock until the last file is removed, so nobody takes it
for stale. Where the file system cannot exchange two names, the old checkpoint has the name ``.NAME.old-PID-RANDOM``
between two renames. If the process dies there, `recover` gives the old name back.

[Note: by descriptor] Names are given relative to open directories (`lightning_ssd.io.folder`). Another user who may
write to the parent directory of a checkpoint can replace what a path leads to, but not what a descriptor is open on.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from lightning_ssd.checkpoint.discard import NOT_EMPTY, NOT_THERE, Recycle, discard_contents, rmdir
from lightning_ssd.checkpoint.manifest import FORMAT, MANIFEST
from lightning_ssd.errors import CheckpointError, IOFailure, as_io_failure, with_remedy
from lightning_ssd.io.deadline import in_time
from lightning_ssd.io.folder import Folder, close_fd

INNER_NBYTES = 1 + 255 + 1 + 150
"""Longest that the name of a checkpoint and that of a file in it add to the path of their folder, with slashes."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_TRIES = 100
"""How often a new directory may be removed by others, who take it for stale, before it is an error."""

_OLD = re.compile(r"\.old-\d+-[0-9a-f]{8,}$")


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a directory that `save` made; a symlink to one is."""
    try:
        with Folder.open(os.fspath(path)) as folder:
            return _is_checkpoint(folder)
    except OSError as error:
        if error.errno in NOT_THERE and not isinstance(error, IOFailure):
            return False
        with as_io_failure(os.fspath(path), what="open"):
            raise


def _is_checkpoint(folder: Folder) -> bool:
    try:
        fd = folder.open_file(MANIFEST, os.O_RDONLY)
    except OSError as error:
        if error.errno in (*NOT_THERE, errno.ENXIO):
            return False
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return False
        return f'"format":"{FORMAT}"'.encode() in os.pread(fd, 256, 0)
    except OSError as error:
        where = os.path.join(folder.path, MANIFEST)
        raise IOFailure(error.errno or errno.EIO, where, 0, 256, "read") from error
    finally:
        close_fd(fd)


def remove(path: str | os.PathLike[str], recycle: Recycle | None = None) -> None:
    """Remove a checkpoint. Files in it that we did not write stay, in a directory of the same name if it is free.

    Args:
        path: The checkpoint, or a symlink to one, of which only the link is removed.
        recycle: Called with each unit file that nothing else links; see `Recycle`.

    Raises:
        CheckpointError: If ``path`` is no checkpoint of ours, or could not be removed.
    """
    target = os.path.abspath(os.fspath(path))
    if not is_checkpoint(target):
        raise CheckpointError(f"{target!r} is not a checkpoint of lightning_ssd and is not removed")
    try:
        _remove(target, recycle)
    except OSError as error:
        why = with_remedy(error)
        raise CheckpointError(f"checkpoint {target!r} could not be removed: {why}; the others are whole") from error


def _remove(target: str, recycle: Recycle | None) -> None:
    folder, name = os.path.split(target)
    with Folder.open(folder) as parent:
        if stat.S_ISLNK(parent.stat(name).st_mode):
            parent.unlink(name)
            return
        with claimed(parent, name) as found:
            if found is None:
                raise CheckpointError(f"{target!r} is not a checkpoint of lightning_ssd and is not removed")
            aside = sibling(name, "tmp")
            parent.rename(name, aside)
            discard(parent, aside, found, name, recycle)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    with Folder.open(path) as folder:
        folder.sync()


def recover(target: str) -> None:
    """Give a checkpoint its name back if a process died while replacing it; see [Note: staging]."""
    folder, name = os.path.split(target)
    if os.path.lexists(target) or not os.path.isdir(folder):
        return
    with Folder.open(folder) as parent:
        for aside in _siblings(parent, name, "old"):
            with locked(parent, aside) as mine:
                if mine is not None and _is_checkpoint(mine) and not parent.has(name):
                    parent.rename(aside, name)


@contextmanager
def staging(target: str, recycle: Recycle | None = None) -> Iterator[Folder]:
    """Give an empty, locked sibling of ``target``, and publish it under that name on leaving; see [Note: staging].

    Raises:
        CheckpointError: If ``target`` exists and is not ours to replace, or another process saves to it too.
    """
    recover(target)
    check_replaceable(target)
    folder, name = os.path.split(target)
    make_folders(folder)
    with Folder.open(folder) as parent, staged_beside(parent, name) as (staged, old):
        yield staged
        aside = _publish(parent, staged, name, old)
        # If this fails, the old one is not removed: on the disk it may still have the name.
        parent.sync()
        if old is not None:
            discard(parent, aside, old, name, recycle)


@contextmanager
def staged_beside(parent: Folder, name: str) -> Iterator[tuple[Folder, Folder | None]]:
    """Give an empty folder under a hidden name, and the checkpoint that has the name ``name``, if one has; both locked.

    If the folder still has its hidden name when an error leaves this, it is removed.

    Raises:
        CheckpointError: The checkpoint is another user's, or another process saves to it too.
    """
    with claimed(parent, name) as old:
        clean_stale(parent, name)
        with make_locked(parent, partial(sibling, name, "tmp")) as staged:
            hidden = os.path.basename(staged.path)
            try:
                _require_own(old, staged)
                yield staged, old
            except BaseException:
                with suppress(OSError):  # the next save removes what cannot be removed now
                    if parent.is_at(hidden, staged):
                        discard_contents(staged)
                        rmdir(parent, hidden, staged)
                raise


def check_replaceable(target: str) -> None:
    """Refuse a target at which a directory of the user's would be replaced.

    Raises:
        CheckpointError: If a directory of that name is neither empty nor a checkpoint of ours.
    """
    if os.path.islink(target) or not os.path.isdir(target) or is_checkpoint(target):
        return
    with as_io_failure(target, what="listing"), os.scandir(target) as found:
        first = next(found, None)
    if first is not None:
        raise CheckpointError(
            f"{target!r} is a directory that lightning_ssd did not write (it holds {first.name!r}) and is not "
            "replaced; choose another name or remove it yourself"
        )


def moved_aside_name(target: str) -> str | None:
    """New name for a plain file at ``target``, such as another strategy's ``last.ckpt``; None if there is no file."""
    if os.path.islink(target) or not os.path.lexists(target) or os.path.isdir(target):
        return None
    return free_name(f"{target}.replaced")


def free_name(path: str) -> str:
    """``path``, or with a number behind it if that exists."""
    number = 0
    while os.path.lexists(name := path + (f"-{number}" if number else "")):
        number += 1
    return name


@contextmanager
def claimed(parent: Folder, name: str) -> Iterator[Folder | None]:
    """Lock the checkpoint of that name, so that no other process replaces or removes it. None if there is none.

    Raises:
        CheckpointError: If another process has it locked.
    """
    try:
        found = parent.folder(name)
    except OSError as error:
        if error.errno not in NOT_THERE or error.errno == errno.EACCES:
            raise
        yield None
        return
    with found:
        if not _is_checkpoint(found):
            yield None
        elif found.try_lock() is False or not parent.is_at(name, found):
            raise _in_use_error(os.path.join(parent.path, name), "is being saved or removed by another process")
        else:
            yield found


def _in_use_error(target: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {target!r} {what}; what it saves is whole and was not replaced. Give each run a directory of its "
        "own for its checkpoints (dirpath)"
    )


def _require_own(old: Folder | None, staged: Folder) -> None:
    """Refuse to replace another user's checkpoint; root may."""
    if old is None or os.geteuid() == 0:
        return
    owner = os.fstat(old.fd).st_uid
    if owner != os.fstat(staged.fd).st_uid:
        raise CheckpointError(f"{old.path!r} belongs to another user (uid {owner}) and is not replaced")


def _publish(parent: Folder, staged: Folder, name: str, old: Folder | None) -> str:
    """Give ``staged`` its final name; return the hidden name of the checkpoint that had it before, or nothing.

    A symlink of that name is removed, a plain file is renamed.
    """
    own, target = os.path.basename(staged.path), os.path.join(parent.path, name)
    if not parent.is_at(own, staged):
        raise CheckpointError(f"{staged.path!r} was removed or renamed by somebody else while it was written")
    if old is not None:
        aside = _replace(parent, own, name)
    else:
        aside = ""
        file_name = moved_aside_name(target)
        if file_name is not None:
            parent.rename(name, os.path.basename(file_name))
        elif os.path.islink(target):
            parent.unlink(name)
        try:
            parent.rename(own, name)
        except OSError as error:
            if error.errno not in NOT_EMPTY:
                raise
            raise _in_use_error(target, "was saved by another process in the meantime") from error
    if not parent.is_at(name, staged):
        raise CheckpointError(f"{target!r} was exchanged by somebody else while it was saved")
    return aside


def _replace(parent: Folder, own: str, name: str) -> str:
    """Exchange a new checkpoint with the old one; return the hidden name of the old one."""
    inside = f"/proc/self/fd/{parent.fd}"
    if in_time(lambda: _exchange(f"{inside}/{own}", f"{inside}/{name}"), inside, "rename"):
        return own
    old = sibling(name, "old")
    parent.rename(name, old)
    parent.rename(own, name)
    # Before the next rename both must be durable: after a power cut `recover` finds the old one by ``.old-`` only.
    parent.sync()
    aside = sibling(name, "tmp")
    parent.rename(old, aside)
    return aside


def _exchange(first: str, second: str) -> bool:
    """Exchange two names in one system call; False where the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), first, None, second)


def sibling(name: str, role: str) -> str:
    """A new hidden name for a sibling of ``name``; see [Note: staging]."""
    # Random, so that no other user can put something there first.
    return f".{name}.{role}-{os.getpid()}-{secrets.token_hex(8)}"


def _siblings(parent: Folder, name: str, role: str) -> list[str]:
    pattern = re.compile(re.escape(f".{name}.{role}-") + r"\d+-[0-9a-f]{8,}")
    with os.scandir(parent.fd) as found:
        return sorted(e.name for e in found if pattern.fullmatch(e.name) and _is_own_directory(e))


def _is_own_directory(entry: os.DirEntry[str]) -> bool:
    # Another user who may write here could make a directory of that name and replace its content while we work on it.
    try:
        return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def make_locked(parent: Folder, new_name: Callable[[], str]) -> Folder:
    """A new directory, open and locked."""
    for tries_left in reversed(range(_TRIES)):
        name = new_name()
        try:
            made = parent.make(name)
        except FileNotFoundError:
            if not tries_left or not os.fstat(parent.fd).st_nlink:
                raise
            continue  # another process took it for stale between mkdir and open
        # Another process may take the directory for stale between mkdir and flock and remove it: try again.
        with ExitStack() as undo:
            undo.callback(made.close)
            is_locked = made.try_lock()
            if is_locked is None or (is_locked and parent.is_at(name, made)):
                undo.pop_all()
                return made
            with suppress(OSError):  # the process that has the lock may remove it first
                rmdir(parent, name, made)
    raise CheckpointError(
        f"each of {_TRIES} new directories in {parent.path!r} was removed by other processes; choose another place"
    )


def make_folders(path: str) -> None:
    """Make the missing directories of a path, and sync each parent."""
    if not os.path.isdir(path):
        parent = os.path.dirname(path)
        make_folders(parent)
        with suppress(FileExistsError):
            os.mkdir(path)
        sync_directory(parent)


def clean_stale(parent: Folder, name: str) -> None:
    """Remove stale staging directories of this checkpoint."""
    for role in ("tmp", "old"):
        for aside in _siblings(parent, name, role):
            with locked(parent, aside) as mine:
                if mine is not None and (role == "tmp" or parent.has(name)):
                    discard(parent, aside, mine, name, None)


@contextmanager
def locked(parent: Folder, name: str) -> Iterator[Folder | None]:
    """Lock a directory; None if another process has its lock, or the name is gone."""
    try:
        folder = parent.folder(name)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        yield None
        return
    with folder:
        yield folder if folder.try_lock() and parent.is_at(name, folder) else None


def discard(parent: Folder, aside: str, found: Folder, name: str, recycle: Recycle | None) -> None:
    """Remove a staging directory or a hidden checkpoint. If files of the user stay in it, it is renamed to ``name``."""
    # The process that hid it may have died before the rename was durable: a power cut would bring the old name back.
    parent.sync()
    found.path = os.path.join(parent.path, aside)
    discard_contents(found, recycle, is_old=_OLD.search(aside) is not None)
    if not rmdir(parent, aside, found):
        found.sync()  # the manifest must be gone durably before the name comes back
        parent.rename(aside, f"{name}.kept-{secrets.token_hex(4)}" if parent.has(name) else name)
