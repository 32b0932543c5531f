"""A run's checkpoint as one file, made of links in the store, whose bytes are compared with their checksums.

What is read is dropped as it is written, so that host memory does not grow with the model.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_ssd.checkpoint.dictionary import own_entries, without_empty_loader_states
from lightning_ssd.checkpoint.directory import free_name, is_checkpoint
from lightning_ssd.checkpoint.link_file import mark_in
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.progress import byte_bar
from lightning_ssd.checkpoint.writer import write_pickle
from lightning_ssd.convert.export import ReadPages, Spill, Writer, os_errors, plain_dictionary, without_decoded
from lightning_ssd.convert.export_staging import remove_unfinished, staged_file
from lightning_ssd.io.folder import Folder
from lightning_ssd.saving.link_staging import discard_links, settle


def save_file(directory: str, path: str) -> None:
    """Write a checkpoint of a run as one file in the form of plain Lightning, from which our runs resume to the bit.

    The file has the mode that the umask gives, as in plain Lightning. What killed saves of this name left is removed.

    Args:
        directory: The checkpoint.
        path: Of the file. A file of that name is replaced, with the links that belong to it; a checkpoint directory is
            renamed to ``NAME.replaced``.

    Raises:
        CheckpointError: If it could not be saved; what had the name is then untouched.
        CorruptionError: A byte of the checkpoint differs from what was written to it.
    """
    target = os.path.abspath(path)
    folder, name = os.path.split(target)
    with os_errors(target), byte_bar(f"saving {name!r}") as bar:
        os.makedirs(folder, exist_ok=True)
        with (
            Folder.open(folder) as parent,
            CheckpointReader(directory) as reader,
            tempfile.TemporaryFile(dir=folder) as spilled,
        ):
            remove_unfinished(parent, name)
            settle(parent, name)
            reader.verify_files()  # the file has no checksums, so damage could not be found later
            spill = Spill(spilled.fileno())
            own = without_decoded(own_entries(reader), spill)
            content = without_empty_loader_states(plain_dictionary(reader, spill, False))
            with staged_file(target) as (fd, take_name):
                writer = Writer(fd, ReadPages(reader, spill, bar))
                write_pickle(writer, {**content, **own}, is_result=True)
                writer.finish()
                with _replacing(parent, name):
                    take_name()
                os.fchmod(fd, 0o666 & ~_umask())


@contextmanager
def _replacing(parent: Folder, name: str) -> Iterator[None]:
    """Inside, a file takes the name; a directory that has it is renamed before, and links of a file removed after."""
    target = os.path.join(parent.path, name)
    mark = mark_in(parent, name)
    aside = free_name(f"{target}.replaced") if is_checkpoint(target) and not os.path.islink(target) else None
    if aside is not None:
        parent.rename(name, os.path.basename(aside))
    try:
        yield
    except BaseException:
        if aside is not None and not parent.has(name):
            parent.rename(os.path.basename(aside), name)
        raise
    parent.sync()
    if mark is not None:
        discard_links(parent, name, mark.id)
    if aside is not None:
        warnings.warn(f"a checkpoint directory had the checkpoint's name and is now {aside!r}", stacklevel=2)


def _umask() -> int:
    """The mask of this process for new files; asking `os.umask` would change it for other threads meanwhile."""
    with open("/proc/self/status") as status:
        return next((int(line.split()[1], 8) for line in status if line.startswith("Umask:")), 0o077)
