"""Stale files: what dead processes left next to checkpoints. Found by name, lock and content; removed on request.

Names and locks are those of [Note: staging]. An unfinished copy has the role ``copy``, an unfinished export the role
``export``. A directory that holds anything we do not write there is not ours, whatever its name. A folder of links
([Note: commit]) with the file inside it, or whose file was replaced, is stale too.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from lightning_ssd.checkpoint.directory import sibling
from lightning_ssd.checkpoint.discard import UNIT_FILE, discard_contents
from lightning_ssd.checkpoint.link_file import folder_id, mark_is
from lightning_ssd.checkpoint.manifest import LINK_FILE, OWN_FILES, UNITS
from lightning_ssd.convert.export_staging import discard_export, is_unfinished_export
from lightning_ssd.io.folder import Folder
from lightning_ssd.saving.link_staging import is_replaced

_NAME = re.compile(r"\.(?P<target>.+)\.(?P<role>tmp|old|copy|export)-\d+-[0-9a-f]{8,}", re.DOTALL)
_LINKS = re.compile(r"(?P<target>.+)\.(?P<role>links)(\.new)?", re.DOTALL)
_WHAT = {
    "tmp": "unfinished save",
    "old": "replaced checkpoint",
    "copy": "unfinished copy",
    "export": "unfinished export",
    "links": "links of no file",
}


@dataclass(frozen=True)
class StaleFile:
    """A directory, or a file of an export, that no living process has locked.

    Attributes:
        path: The directory or file.
        what: What it was to become.
        nbytes: Bytes on disk that removing it frees; files that something else links are not counted.
        age_s: Seconds since something in it was changed.
        kept_because: Why it must stay, or empty.
    """

    path: str
    what: str
    nbytes: int
    age_s: float
    kept_because: str


def find_stale(path: str) -> StaleFile | None:
    """What is known of one directory or file; None if it is no stale file of ours, or a process holds it."""
    role = _role(path)
    if role is None:
        return None
    with suppress(OSError), _held(path, role[1], shared=True) as held:  # gone or changed while we looked
        if held is not None and _is_ours(*held, *role):
            return _look(path, *held, *role)
    return None


def remove_stale(path: str) -> bool:
    """Remove a stale file or directory; False if it is none any more, or the only copy of a checkpoint.

    Raises:
        OSError: If something could not be removed.
    """
    role = _role(path)
    if role is None:
        return False
    # The lock is held until all is gone, and everything goes through what was locked: see [Note: by descriptor].
    with _held(path, role[1], shared=False) as held:
        if held is None or not _is_ours(*held, *role) or _look(path, *held, *role).kept_because:
            return False
        parent, found = held
        name = os.path.basename(path)
        if role[1] == "export":
            discard_export(parent, name, found)
        else:
            if role[1] == "links":
                hidden = sibling(name, "tmp")
                parent.rename(name, hidden)
                name = hidden
            parent.sync()  # or a power cut would bring back the name that it had before
            discard_contents(found, is_old=role[1] == "old")
            parent.rmdir(name)
        return True


@contextmanager
def _held(path: str, role: str, *, shared: bool) -> Iterator[tuple[Folder, Folder] | None]:
    """The folder around it, and the directory (or file) itself, locked; None if it is somebody else's, or gone."""
    folder, name = os.path.split(path)
    with ExitStack() as stack:
        try:
            parent = stack.enter_context(Folder.open(folder))
            # A file is held the same way; only what is done with a directory is not done with it.
            found = stack.enter_context(Folder(parent.open_file(name, os.O_RDONLY), path))
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        # The links of a checkpoint are not locked for a look: a run that replaces or removes it would find the lock.
        is_needed = role == "links" and _is_needed(parent, found)
        mine = not is_needed and found.try_lock(shared=shared) and parent.is_at(name, found)
        yield (parent, found) if mine else None


def _role(path: str) -> tuple[str, str] | None:
    """Target and role by the name."""
    folder, name = os.path.split(path)
    found = _NAME.fullmatch(name) or _LINKS.fullmatch(name)
    return None if found is None else (os.path.join(folder, found["target"]), found["role"])


def may_be_stale(name: str) -> bool:
    """Whether a file or directory of that name is worth a look with `find_stale`."""
    return _NAME.fullmatch(name) is not None


def _is_ours(parent: Folder, found: Folder, target: str, role: str) -> bool:
    if role == "export":
        return is_unfinished_export(found)
    about = os.fstat(found.fd)
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
        return False
    for name, inside, each in _entries(found):
        known = UNIT_FILE.fullmatch(name) is not None if inside else name in OWN_FILES
        is_units = not inside and name == UNITS and stat.S_ISDIR(each.st_mode)
        if not (stat.S_ISREG(each.st_mode) and known) and not is_units:
            return False
    return role != "links" or found.has(LINK_FILE) or (folder_id(found) is not None and not _is_needed(parent, found))


def _is_needed(parent: Folder, found: Folder) -> bool:
    """Whether a file refers to a folder of links."""
    own_id = folder_id(found)
    return own_id is not None and any(mark_is(parent, name, own_id) for name in parent.names())


def _look(path: str, parent: Folder, found: Folder, target: str, role: str) -> StaleFile:
    each = [os.fstat(found.fd), *(about for _, _, about in _entries(found))]
    nbytes = sum(about.st_blocks * 512 for about in each if about.st_nlink == 1)
    age_s = max(time.time() - max(about.st_mtime for about in each), 0.0)
    return StaleFile(path, _WHAT[role], nbytes, age_s, _why_kept(parent, found, os.path.basename(target), role))


def _why_kept(parent: Folder, found: Folder, target: str, role: str) -> str:
    if role == "old" and not parent.has(target):  # its replacement was interrupted; reading it by its name recovers it
        return "the only copy of a checkpoint: inspect it by its own name"
    if role == "links" and not found.has(LINK_FILE) and not is_replaced(parent, target, found):
        return "a file that was moved away may need it: remove it yourself if none does"
    return ""


def _entries(found: Folder) -> Iterator[tuple[str, bool, os.stat_result]]:
    """What is in the directory and in its ``units``: name, whether it is in ``units``, about it. Nothing for a file."""
    if not stat.S_ISDIR(os.fstat(found.fd).st_mode):
        return
    for name in found.names():
        about = found.stat(name)
        yield name, False, about
        if name == UNITS and stat.S_ISDIR(about.st_mode):
            with found.folder(name) as units:
                for unit in units.names():
                    yield unit, True, units.stat(unit)
