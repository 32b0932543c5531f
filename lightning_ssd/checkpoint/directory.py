"""Checkpoint directories as a whole: recognised, opened without leaving them, published at once, removed.

[Note: staging] A checkpoint is written into a hidden sibling of its target, ``.NAME.tmp-PID-RANDOM``, and takes the
target's name in one system call. The writer holds a lock (``flock``) on that directory; the lock dies with the process,
so a staging directory that can be locked belongs to nobody and is removed by the next save. Whoever replaces or removes
a checkpoint holds its lock as well, until the last file of it is gone: under its hidden name it is taken for no dead
save's. Where the file system cannot exchange two names, the old checkpoint is called ``.NAME.old-PID-RANDOM`` for a
moment; if the process dies in that moment, `recover` gives it its name back.

[Note: by descriptor] Names are given relative to open directories (`lightning_ssd.io.folder`): another user who may
write to a folder around a checkpoint can exchange what has a path there, and everything would be done elsewhere.
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
"""New directories that others may take for stale before we give up: in some places, as /proc, none can be made."""

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
        why = with_remedy(error)
        raise CheckpointError(f"checkpoint {target!r} could not be removed: {why}; the others are whole") from error


def _remove(target: str, recycle: Recycle | None) -> None:
    folder, name = os.path.split(target)
    with Folder.open(folder) as parent:
        if stat.S_ISLNK(parent.stat(name).st_mode):
            parent.unlink(name)
            return
        with _claimed(parent, name) as found:
            if found is None:
                raise CheckpointError(f"{target!r} is not a checkpoint of lightning_ssd and is not removed")
            aside = sibling(name, "tmp")
            parent.rename(name, aside)
            _discard(parent, aside, found, name, recycle)


def sync_directory(place: str | Folder) -> None:
    """Make the names in a directory durable."""
    if isinstance(place, Folder):
        place.sync()
        return
    with Folder.open(place) as folder:
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
    """An empty, locked sibling of ``target`` that is published under its name on leaving; see [Note: staging].

    Raises:
        CheckpointError: If ``target`` exists and is not ours to replace, or another process saves to it too.
    """
    recover(target)
    check_replaceable(target)
    folder, name = os.path.split(target)
    _make_folders(folder)
    with Folder.open(folder) as parent, _claimed(parent, name) as old:
        _clean_stale(parent, name)
        with _make_staging(parent, name) as staged:
            try:
                _require_own(old, staged)
                yield staged
                aside = _publish(parent, staged, name, old)
            except BaseException:
                own = os.path.basename(staged.path)
                with suppress(OSError):  # what cannot be removed now, the next save removes
                    if parent.is_at(own, staged):  # it has not taken its name yet
                        discard_contents(staged)
                        rmdir(parent, own, staged)
                raise
            # If this fails, the old one stays where it is: the disk may still have it under the name.
            sync_directory(parent)
            if old is not None:
                _discard(parent, aside, old, name, recycle)


def check_replaceable(target: str) -> None:
    """Check that nothing of the user's would be lost by writing a checkpoint named ``target``.

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
    """The name that a plain file (such as another strategy's ``last.ckpt``) gets when a checkpoint takes its own."""
    if os.path.islink(target) or not os.path.lexists(target) or os.path.isdir(target):
        return None
    number = 0
    while os.path.lexists(name := f"{target}.replaced" + (f"-{number}" if number else "")):
        number += 1
    return name


@contextmanager
def _claimed(parent: Folder, name: str) -> Iterator[Folder | None]:
    """The checkpoint of that name, locked: nobody else replaces or removes it meanwhile. None if there is none.

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
            raise _told(os.path.join(parent.path, name), "is being saved or removed by another process")
        else:
            yield found


def _told(target: str, what: str) -> CheckpointError:
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
    """Let ``staged`` take the name; return the name under which the checkpoint is now that had it.

    A symlink that had it is removed, a plain file is renamed.
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
            raise _told(target, "was saved by another process in the meantime") from error
    if not parent.is_at(name, staged):
        raise CheckpointError(f"{target!r} was exchanged by somebody else while it was saved")
    return aside


def _replace(parent: Folder, own: str, name: str) -> str:
    """Exchange a new checkpoint with the old one; return the name of the old one now."""
    inside = f"/proc/self/fd/{parent.fd}"
    if in_time(lambda: _exchange(f"{inside}/{own}", f"{inside}/{name}"), inside, "rename"):
        return own
    old = sibling(name, "old")
    parent.rename(name, old)
    parent.rename(own, name)
    # A power cut must not leave the old one under a name that `recover` does not know, and the new one without its own.
    sync_directory(parent)
    aside = sibling(name, "tmp")
    parent.rename(old, aside)
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


def sibling(name: str, role: str) -> str:
    """A name beside ``name`` that nobody has; see [Note: staging]."""
    # Nobody can guess it and have something there first.
    return f".{name}.{role}-{os.getpid()}-{secrets.token_hex(8)}"


def _siblings(parent: Folder, name: str, role: str) -> list[str]:
    pattern = re.compile(re.escape(f".{name}.{role}-") + r"\d+-[0-9a-f]{8,}")
    with os.scandir(parent.fd) as found:
        return sorted(e.name for e in found if pattern.fullmatch(e.name) and _is_own_directory(e))


def _is_own_directory(entry: os.DirEntry[str]) -> bool:
    # In a directory that many may write to, another user could put one there and exchange what is in it under us.
    try:
        return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def _make_staging(parent: Folder, name: str) -> Folder:
    """A new staging directory, open and locked."""
    return make_locked(parent, lambda: sibling(name, "tmp"))


def make_locked(parent: Folder, new_name: Callable[[], str]) -> Folder:
    """A new directory, open and locked."""
    for tries_left in reversed(range(_TRIES)):
        name = new_name()
        try:
            made = parent.make(name)
        except FileNotFoundError:
            if not tries_left or not os.fstat(parent.fd).st_nlink:
                raise
            continue  # taken for stale between mkdir and open
        # Another process may take the directory for stale between mkdir and flock, and remove it: then try again.
        with ExitStack() as undo:
            undo.callback(made.close)
            is_locked = made.try_lock()
            if is_locked is None or (is_locked and parent.is_at(name, made)):
                undo.pop_all()
                return made
            with suppress(OSError):  # whoever has the lock may be faster
                rmdir(parent, name, made)
    raise CheckpointError(f"others remove each directory that is made in {parent.path!r}; choose another place")


def _make_folders(path: str) -> None:
    """Make what is missing of a path, durably: a checkpoint is no safer than the folders that lead to it."""
    if not os.path.isdir(path):
        parent = os.path.dirname(path)
        _make_folders(parent)
        with suppress(FileExistsError):
            os.mkdir(path)
        sync_directory(parent)


def _clean_stale(parent: Folder, name: str) -> None:
    """Remove what dead processes left behind while writing or removing this checkpoint."""
    for role in ("tmp", "old"):
        for aside in _siblings(parent, name, role):
            with locked(parent, aside) as mine:
                if mine is not None and (role == "tmp" or parent.has(name)):
                    _discard(parent, aside, mine, name, None)


@contextmanager
def locked(parent: Folder, name: str, *, shared: bool = False) -> Iterator[Folder | None]:
    """A directory whose lock nobody else holds, locked; None if that is not so, or it has no such name any more."""
    try:
        folder = parent.folder(name)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        yield None
        return
    with folder:
        yield folder if folder.try_lock(shared=shared) and parent.is_at(name, folder) else None


def _discard(parent: Folder, aside: str, found: Folder, name: str, recycle: Recycle | None) -> None:
    """Remove a staging directory or a checkpoint that was renamed aside; what is not ours gets the name ``name``."""
    # Whoever renamed it aside may have died before that was durable: a power cut would bring the old name back.
    sync_directory(parent)
    found.path = os.path.join(parent.path, aside)
    discard_contents(found, recycle, is_old=_OLD.search(aside) is not None)
    if not rmdir(parent, aside, found):
        sync_directory(found)  # that the manifest is gone, before the name comes back
        parent.rename(aside, f"{name}.kept-{secrets.token_hex(4)}" if parent.has(name) else name)
