"""Remove what we write into a checkpoint directory, and nothing else."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress

from lightning_ssd.checkpoint.manifest import OWN_FILES, UNITS
from lightning_ssd.io.folder import Folder

Recycle = Callable[[str, Folder], bool]
"""Called with the path of a unit file that nothing else links, and the open directory it is in, before it is unlinked;
True if it was moved away."""

UNIT_FILE = re.compile(r"\d{5,}-[^/]*\.safetensors")
"""Names of unit files."""

NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES)
NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
"""Errors of a name that leads to no directory or file that we may open, and of a directory that holds something."""


def discard_contents(found: Folder, recycle: Recycle | None = None, *, is_old: bool = False) -> None:
    """Remove what we write into a checkpoint."""
    # The manifest first, so that a half-removed directory is no checkpoint.
    for name in OWN_FILES:
        with suppress(FileNotFoundError):
            found.unlink(name)
    if is_old:
        found.sync()  # else a power cut may bring back the manifest without its units, which `recover` would publish
    try:
        units = found.folder(UNITS)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        return
    with units:
        for name in units.names():
            if UNIT_FILE.fullmatch(name):
                _discard_file(units, name, recycle)
    rmdir(found, UNITS)


def rmdir(parent: Folder, name: str, found: Folder | None = None) -> bool:
    """Remove a directory if it is empty and still is ``found``; return whether the name no longer leads to it."""
    if found is not None and not parent.is_at(name, found):
        return True
    try:
        parent.rmdir(name)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (*NOT_EMPTY, errno.ENOTDIR):
            raise
        return False
    return True


def _discard_file(units: Folder, name: str, recycle: Recycle | None) -> None:
    with suppress(FileNotFoundError):
        if recycle is not None and units.stat(name).st_nlink == 1 and recycle(os.path.join(units.path, name), units):
            return
        units.unlink(name)
