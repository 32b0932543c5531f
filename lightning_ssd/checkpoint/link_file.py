"""The small file of a checkpoint in the form ``links``, and the folder beside it that has the bytes of its tensors.

[Note: links] ``x.ckpt`` is a torch archive with Lightning's dictionary. Its tensors are calls of
`lightning_ssd.links.linked`, which map them from files in ``x.ckpt.links``. That folder is a whole checkpoint by itself
(`lightning_ssd.saving.write`); our own runs and commands read it and not the file. Both carry the same random id.
The first entry of the dictionary is a call too, so the beginning of the file tells the id and the folder's name. A
file that somebody loaded and saved again has tensors in place of the calls, and is not taken for one of these.

The folder is looked for beside the file: by the file's name now, by the name when it was saved, then by the id among
all folders of links there. So both may be renamed or moved together.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from urllib.parse import quote_from_bytes, unquote_to_bytes

from lightning_ssd.checkpoint.discard import NOT_THERE
from lightning_ssd.checkpoint.manifest import MANIFEST
from lightning_ssd.errors import CheckpointError, as_io_failure
from lightning_ssd.io.folder import Folder, closing_fd

LINKS = ".links"
"""What the name of the folder has behind the name of the file."""

NEW = ".links.new"
"""The same while a save replaces a checkpoint; see [Note: commit]."""

KEY = "ssd_offload_links"
"""First key of the dictionary; its value is the id."""

_HEAD_NBYTES = 4096
_NO_FILE = (*NOT_THERE, errno.ENXIO)
_CALL = re.compile(rb"clightning_ssd\.links\nlinked\n.{0,16}?X(.{4})(lightning-ssd-links 1 )", re.DOTALL)
_TEXT = re.compile(r"lightning-ssd-links 1 ([0-9a-f]{32}) (\S+)", re.ASCII)
_ID = re.compile(rb'"format":"lightning-ssd-checkpoint",[^{}]{0,64}"id":"([0-9a-f]{32})"')


@dataclass(frozen=True)
class LinkMark:
    """What the beginning of a file of links says.

    Attributes:
        id: The checkpoint's.
        folder: Name of the folder when it was saved.
    """

    id: str
    folder: str

    def __str__(self) -> str:
        # Names are bytes, and need not be text.
        return f"lightning-ssd-links 1 {self.id} {quote_from_bytes(os.fsencode(self.folder))}"

    @classmethod
    def parse(cls, text: str) -> LinkMark:
        """The mark of a text that `__str__` gave.

        Raises:
            CheckpointError: It is another text, or the folder's name leads elsewhere.
        """
        found = _TEXT.fullmatch(text)
        folder = "" if found is None else os.fsdecode(unquote_to_bytes(found[2]))
        if found is None or folder in ("", ".", "..") or "/" in folder or "\0" in folder:
            raise CheckpointError(f"{text!r:.300} is not the name of a folder of links beside the file")
        return cls(found[1], folder)


def mark_of(path: str) -> LinkMark | None:
    """The mark of a file; None if it is no file, or holds its tensors itself.

    Raises:
        CheckpointError: Its mark is malformed.
        IOFailure: It can be opened and not read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with closing_fd(fd), as_io_failure(path, 0, _HEAD_NBYTES, "read"):
        return _read_mark(fd)


def mark_in(parent: Folder, name: str) -> LinkMark | None:
    """As `mark_of`, of a file in an open directory; a symlink has none."""
    try:
        fd = parent.open_file(name, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    with closing_fd(fd):
        return _read_mark(fd)


def mark_is(parent: Folder, name: str, checkpoint_id: str) -> bool:
    """Whether a file in an open directory is the one that needs the folder of this id."""
    try:
        mark = mark_in(parent, name)
    except CheckpointError:
        return False
    return mark is not None and mark.id == checkpoint_id


def links_of(path: str) -> str | None:
    """Path of the folder that has the tensors of a file; None if the file holds them itself.

    Raises:
        CheckpointError: The folder is not there, or belongs to another checkpoint.
    """
    mark = mark_of(path)
    if mark is None:
        return None
    real = os.path.realpath(path)
    with find_links(real, mark) as links:
        return links.path


def find_links(path: str, mark: LinkMark) -> Folder:
    """The folder of a file's tensors, open; ``path`` is where the file is.

    Raises:
        CheckpointError: The folder is not there, or belongs to another checkpoint.
    """
    folder, name = os.path.split(os.path.abspath(path))
    with Folder.open(folder) as parent:
        for _ in range(2):  # between two looks a save may give the folder its final name
            for candidate in _candidates(parent, name, mark):
                found = _open_if(parent, candidate, mark.id)
                if found is not None:
                    return found
        others = [each for each in dict.fromkeys((name + LINKS, mark.folder)) if parent.has(each)]
    if others:
        raise CheckpointError(
            f"{path!r} needs the folder of links it was saved with; {others[0]!r} beside it is not that folder, but of "
            "another checkpoint, damaged or a symlink: put the folder back that belongs to the file"
        )
    raise CheckpointError(
        f"{path!r} holds no tensors itself: they are in the folder {name + LINKS!r} beside it, which is missing; move "
        "or copy both together, or make one file of them with `lightning-ssd export`"
    )


def folder_id(folder: Folder) -> str | None:
    """The id of a checkpoint's directory; None if it is none, or has no id."""
    try:
        fd = folder.open_file(MANIFEST, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    with closing_fd(fd):
        found = _ID.search(os.pread(fd, 256, 0)) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    return None if found is None else found[1].decode()


def _read_mark(fd: int) -> LinkMark | None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return None
    head = os.pread(fd, _HEAD_NBYTES, 0)
    found = _CALL.search(head)
    if found is None:
        return None
    begin = found.start(2)
    text = head[begin : begin + int.from_bytes(found[1], "little")]
    return LinkMark.parse(text.decode(errors="replace"))


def _candidates(parent: Folder, name: str, mark: LinkMark) -> Iterator[str]:
    yield from dict.fromkeys((name + LINKS, name + NEW, mark.folder))
    yield from (each for each in parent.names() if LINKS in each and not each.startswith("."))


def _open_if(parent: Folder, name: str, checkpoint_id: str) -> Folder | None:
    with suppress(OSError), ExitStack() as undo:
        found = undo.enter_context(parent.folder(name))  # a symlink is an error
        if folder_id(found) == checkpoint_id:
            undo.pop_all()
            return found
    return None
