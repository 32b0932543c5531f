"""A checkpoint in the form ``links`` as a whole: published, settled after a kill, removed.

[Note: commit] The folder is staged as in [Note: staging], with the small file inside it. When both are durable, the
folder takes its name, ``x.ckpt.links``, and then the file is moved out of it to ``x.ckpt``: that one move makes the
checkpoint. If a checkpoint has the name already, the new folder is called ``x.ckpt.links.new`` until the move has
replaced the old file; then the old folder is hidden and discarded, and the new one takes its name. So at any moment
``x.ckpt`` is the old file or the new one, and the folder with its id is beside it. Removing begins with the move back.

A folder with the file inside it is therefore no checkpoint, and may be discarded. One without it, whose id the file
``x.ckpt`` does not have, may belong to a file that the user moved away: it is renamed and never discarded.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lightning_ssd.checkpoint.directory import (
    check_replaceable,
    claimed,
    discard,
    free_name,
    is_checkpoint,
    make_folders,
    recover,
    remove,
    sibling,
    staged_beside,
)
from lightning_ssd.checkpoint.discard import Recycle
from lightning_ssd.checkpoint.link_file import LINKS, NEW, find_links, folder_id, mark_in, mark_is, mark_of
from lightning_ssd.checkpoint.manifest import LINK_FILE
from lightning_ssd.errors import CheckpointError, with_remedy
from lightning_ssd.io.folder import Folder


@contextmanager
def staging_links(target: str, recycle: Recycle | None = None) -> Iterator[Folder]:
    """Give an empty, locked folder; on leaving, publish it and the small file in it; see [Note: commit].

    Raises:
        CheckpointError: If ``target`` exists and is not ours to replace, or another process saves to it too.
    """
    recover(target)
    check_replaceable(target)
    check_replaceable(target + LINKS)
    folder, name = os.path.split(target)
    links = name + LINKS
    make_folders(folder)
    with Folder.open(folder) as parent:
        settle(parent, name, recycle)
        with staged_beside(parent, links) as (staged, old):
            yield staged
            mark, hidden = mark_in(parent, name), os.path.basename(staged.path)
            try:
                _publish(parent, staged, links if old is None else name + NEW)
                _commit(parent, staged, name)
            except BaseException:
                _hide(parent, staged, hidden)
                raise
            # A move between two folders is durable when both are synced.
            staged.sync()
            parent.sync()
            if old is not None:
                _retire(parent, old, links, None if mark is None else mark.id, recycle, follower=name + NEW)


def settle(parent: Folder, name: str, recycle: Recycle | None = None) -> None:
    """Finish, or undo, what a process has begun that died while it replaced the checkpoint ``name``.

    Raises:
        CheckpointError: Another process is replacing it now.
    """
    links, new = name + LINKS, name + NEW
    with claimed(parent, new) as later:
        if later is None:
            return
        mark = mark_in(parent, name)
        if mark is None or folder_id(later) != mark.id:
            _retire(parent, later, new, None, recycle)
            return
        with claimed(parent, links) as old:
            # The dead process may not have made its move durable: a power cut would bring the old file back.
            later.sync()
            parent.sync()
            if old is None:
                parent.rename(new, links)
            else:
                # The file of the old folder was replaced, so that nothing refers to it.
                _retire(parent, old, links, folder_id(old), recycle, follower=new)


def is_replaced(parent: Folder, name: str, links: Folder) -> bool:
    """Whether ``links`` is the folder of a file ``name`` that a process replaced, and died before it discarded it."""
    if os.path.basename(links.path) != name + LINKS:
        return False
    try:
        with parent.folder(name + NEW) as later:
            return mark_is(parent, name, folder_id(later) or "-")
    except OSError:
        return False


def remove_checkpoint(path: str | os.PathLike[str], recycle: Recycle | None = None) -> bool:
    """Remove a checkpoint directory, or a file of links and its folder. A folder that is not there is not missed.

    Args:
        path: The checkpoint, or a symlink to one, of which only the link is removed.
        recycle: Called with each unit file that nothing else links; see `Recycle`.

    Returns:
        False if the path is neither, and nothing was done.

    Raises:
        CheckpointError: It could not be removed, or another process uses it.
    """
    target = os.path.abspath(os.fspath(path))
    if is_checkpoint(target):
        remove(target, recycle)
        return True
    if mark_of(target) is None:
        return False
    try:
        _remove_links(target, recycle)
    except OSError as error:
        why = with_remedy(error)
        raise CheckpointError(f"checkpoint {target!r} could not be removed: {why}; the others are whole") from error
    return True


def _remove_links(target: str, recycle: Recycle | None) -> None:
    folder, name = os.path.split(target)
    with Folder.open(folder) as parent:
        if stat.S_ISLNK(parent.stat(name).st_mode):
            parent.unlink(name)
            return
        mark = mark_in(parent, name)
        try:
            links = None if mark is None else find_links(target, mark)
        except CheckpointError:
            links = None
        if mark is None or links is None:
            parent.unlink(name)
            return
        with links, claimed(parent, os.path.basename(links.path)) as found:
            if found is None or folder_id(found) != mark.id:
                raise CheckpointError(f"{links.path!r} was replaced while {target!r} was removed")
            parent.move(name, found, LINK_FILE)
            found.sync()
            parent.sync()
            _retire(parent, found, os.path.basename(links.path), mark.id, recycle)


def discard_links(parent: Folder, name: str, checkpoint_id: str, recycle: Recycle | None = None) -> None:
    """Discard the folder of a file ``name`` that has been replaced by one without links."""
    for links in (name + LINKS, name + NEW):
        with claimed(parent, links) as found:
            if found is not None and folder_id(found) == checkpoint_id:
                _retire(parent, found, links, checkpoint_id, recycle)


def _publish(parent: Folder, staged: Folder, name: str) -> None:
    own = os.path.basename(staged.path)
    if not parent.is_at(own, staged):
        raise CheckpointError(f"{staged.path!r} was removed or renamed by somebody else while it was written")
    parent.rename(own, name)
    staged.path = os.path.join(parent.path, name)
    # Before the file refers to the folder, the folder must have a name that lasts.
    parent.sync()
    if not parent.is_at(name, staged):
        raise CheckpointError(f"{staged.path!r} was exchanged by somebody else while it was saved")


def _commit(parent: Folder, staged: Folder, name: str) -> None:
    """Move the file to its name. A checkpoint directory of that name is renamed, another file is replaced."""
    target = os.path.join(parent.path, name)
    aside = None
    if not os.path.islink(target) and is_checkpoint(target):
        aside = free_name(f"{target}.replaced")
        parent.rename(name, os.path.basename(aside))
    elif os.path.isdir(target) and not os.path.islink(target):
        parent.rmdir(name)  # empty, as was checked
    staged.move(LINK_FILE, parent, name)
    if aside is not None:
        warnings.warn(f"a checkpoint directory had the checkpoint's name and is now {aside!r}", stacklevel=2)


def _hide(parent: Folder, staged: Folder, hidden: str) -> None:
    """Give ``staged`` its hidden name back, under which it is removed, unless the file has been moved out of it."""
    own = os.path.basename(staged.path)
    with suppress(OSError):  # the next save removes what cannot be hidden now
        if own != hidden and parent.is_at(own, staged) and staged.has(LINK_FILE):
            parent.rename(own, hidden)


def _retire(
    parent: Folder, found: Folder, name: str, known_id: str | None, recycle: Recycle | None, follower: str = ""
) -> None:
    """Discard a folder of links that no file refers to, or keep it under another name if one may.

    Args:
        parent: The folder it is in.
        found: It, locked.
        name: Its name.
        known_id: The id of the file that had referred to it, and was replaced or removed.
        recycle: See `Recycle`.
        follower: The folder that takes its name, if one does.
    """
    if found.has(LINK_FILE) or folder_id(found) == known_id:
        aside = sibling(name, "tmp")
        parent.rename(name, aside)
        if follower:
            parent.rename(follower, name)
        discard(parent, aside, found, name, recycle)
        return
    kept = free_name(os.path.join(parent.path, f"{name}.kept"))
    parent.rename(name, os.path.basename(kept))
    if follower:
        parent.rename(follower, name)
    warnings.warn(
        f"the folder of links {found.path!r} does not belong to the file beside it, perhaps to one that was moved "
        f"away, and is now {kept!r}; remove it if you need it no more",
        stacklevel=2,
    )
