"""What dead processes left beside checkpoints: found by name, lock and content, and removed on request.

The names and locks are those of [Note: staging]; `copy` keeps its unfinished directory under a third role, to go on
with it, and exports write a file or a folder under a fourth. A directory in which anything lies that we do not write
there is none of ours, whatever it is called.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from lightning_ssd.checkpoint.beside import discard_export, is_unfinished_export
from lightning_ssd.checkpoint.directory import UNIT_FILE, discard_contents, locked
from lightning_ssd.checkpoint.manifest import MANIFEST, ODD, REST, STATE, UNITS

_NAME = re.compile(r"\.(?P<target>.+)\.(?P<role>tmp|old|copy|export)-\d+-[0-9a-f]{8}")
_WHAT = {
    "tmp": "unfinished save",
    "old": "replaced checkpoint",
    "copy": "unfinished copy",
    "export": "unfinished export",
}


@dataclass(frozen=True)
class Leftover:
    """A directory, or a file of an export, that no living process works on.

    Attributes:
        path: The directory or file.
        what: What it was to become.
        nbytes: Bytes on disk that removing it frees; files that something else links are not counted.
        age_s: Seconds since something in it was changed.
        is_needed: It is the only copy of a checkpoint whose replacing was interrupted; reading that by its own name
            brings it back.
    """

    path: str
    what: str
    nbytes: int
    age_s: float
    is_needed: bool


def leftover(path: str) -> Leftover | None:
    """What is known of one directory or file; None if it is no leftover of ours, or a process holds it."""
    role = _role(path)
    if role is None:
        return None
    with suppress(OSError), locked(path) as mine:  # gone or changed while we looked
        if mine and _is_ours(path, role[1]):
            return _look(path, *role)
    return None


def remove_leftover(path: str) -> bool:
    """Remove a leftover; False if it is none any more, or the only copy of a checkpoint.

    Raises:
        OSError: If something could not be removed.
    """
    role = _role(path)
    if role is None:
        return False
    with locked(path) as mine:
        if not mine or not _is_ours(path, role[1]) or _look(path, *role).is_needed:
            return False
        if role[1] == "export":
            discard_export(path)
        else:
            discard_contents(path)
        return not os.path.lexists(path)


def _role(path: str) -> tuple[str, str] | None:
    """Target and role by the name."""
    folder, name = os.path.split(path)
    found = _NAME.fullmatch(name)
    return None if found is None else (os.path.join(folder, found["target"]), found["role"])


def could_be_left_over(name: str) -> bool:
    """Whether a file or directory of that name is worth a look with `leftover`."""
    return _NAME.fullmatch(name) is not None


def _is_ours(path: str, role: str) -> bool:
    if role == "export":
        return is_unfinished_export(path)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return False
    for entry in _entries(path):
        is_file, is_directory = entry.is_file(follow_symlinks=False), entry.is_dir(follow_symlinks=False)
        inside = os.path.dirname(entry.path) != path
        known = UNIT_FILE.fullmatch(entry.name) is not None if inside else entry.name in (MANIFEST, STATE, REST, ODD)
        if not (is_file and known) and not (is_directory and not inside and entry.name == UNITS):
            return False
    return True


def _look(path: str, target: str, role: str) -> Leftover:
    found = [os.lstat(path), *(entry.stat(follow_symlinks=False) for entry in _entries(path))]
    nbytes = sum(each.st_blocks * 512 for each in found if each.st_nlink == 1)
    age_s = max(time.time() - max(each.st_mtime for each in found), 0.0)
    return Leftover(path, _WHAT[role], nbytes, age_s, role == "old" and not os.path.lexists(target))


def _entries(path: str) -> Iterator[os.DirEntry[str]]:
    """What is in the directory and in its ``units``; nothing for a file."""
    if not os.path.isdir(path):
        return
    with os.scandir(path) as found:
        for entry in found:
            yield entry
            if entry.name == UNITS and entry.is_dir(follow_symlinks=False):
                with os.scandir(entry.path) as inside:
                    yield from inside
