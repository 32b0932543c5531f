"""Write a training state as a checkpoint directory: hard links to generations, small files, the manifest last.

Order: unit files (linked, or copied where a link is impossible), buffers, state, manifest; then all of them and their
directories are synced; then one rename. A process that dies on the way leaves the previous checkpoint unchanged.

[Note: failed sync] After a failed sync Linux marks the pages clean, and the next sync of the file succeeds although the
bytes never reached the disk. So a generation whose sync failed once is never linked: a later save copies it and
compares its bytes with the checksums of what was written.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lightning_ssd.checkpoint.checksum import PIECE_NBYTES, checksum
from lightning_ssd.checkpoint.contents import CheckpointContent
from lightning_ssd.checkpoint.directory import moved_aside_name, sibling, staging
from lightning_ssd.checkpoint.discard import Recycle
from lightning_ssd.checkpoint.link_file import LINKS, LinkMark
from lightning_ssd.checkpoint.manifest import (
    BUFFERS,
    EXTRA_TENSORS,
    LINK_FILE,
    MANIFEST,
    STATE,
    UNITS,
    FileRecord,
    Manifest,
    OptimizerRecord,
    SmallFile,
    version_for,
)
from lightning_ssd.checkpoint.manifest_json import ENCODED, decode_manifest, encode_manifest
from lightning_ssd.checkpoint.progress import byte_bar
from lightning_ssd.checkpoint.state_dict import require_whole
from lightning_ssd.checkpoint.unit_file import ComposedFile, UnitFile
from lightning_ssd.checkpoint.values import encode_optimizer
from lightning_ssd.checkpoint.writer import (
    FLUSH_NBYTES,
    Progress,
    StreamWriter,
    is_plain,
    lay_out_tensors,
    new_file,
    write_pickle,
    write_tensors,
)
from lightning_ssd.codec import float32
from lightning_ssd.codec.encodings import is_encoded
from lightning_ssd.errors import CheckpointError, CorruptionError, listed, naming, with_remedy
from lightning_ssd.io.deadline import sync as sync_disk
from lightning_ssd.io.folder import Folder, closing_fd, is_own_file
from lightning_ssd.paths import too_long
from lightning_ssd.saving.link_staging import staging_links
from lightning_ssd.saving.linked_dictionary import LinkedContents, linked_dictionary
from lightning_ssd.store.mapped_safetensors import read_exactly

_NUM_SYNCS = 16
_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class SaveReport:
    """What saving did.

    Attributes:
        nbytes_linked: Bytes of unit files that were hard-linked.
        nbytes_written: Bytes that were written.
        moved_aside: New name of a plain file that had the checkpoint's name, or None.
    """

    nbytes_linked: int
    nbytes_written: int
    moved_aside: str | None


def write_checkpoint(
    directory: str | os.PathLike[str],
    content: CheckpointContent,
    *,
    with_file: bool = False,
    recycle: Recycle | None = None,
    unsynced: set[str] | None = None,
    progress: Progress | None = None,
) -> SaveReport:
    """Write a checkpoint. One of that name is replaced in one step, after the new one is durable.

    Args:
        directory: The target. A plain file of that name is renamed to ``NAME.replaced``, a symlink is replaced.
        content: What it holds.
        with_file: The target is to be a small file that torch loads, and the directory ``NAME.links`` beside it; see
            [Note: links]. Then a plain file of the target's name is replaced, a directory renamed.
        recycle: Called with unit files of a replaced checkpoint that nothing else links; see `discard.Recycle`.
        unsynced: Paths of generations whose sync failed; this save adds to it. The caller passes the same set to each
            save; see [Note: failed sync].
        progress: Called with bytes done and bytes in all. Default: a bar on stderr, if it takes more than a moment.

    Raises:
        CheckpointError: If it could not be saved. The previous one is still whole (or the new one, if only the removal
            of the previous one failed).
        CorruptionError: If a generation that had to be copied does not match its checksums.
    """
    target = os.path.abspath(os.fspath(directory))
    _require_short(target)
    moved_aside = None if with_file else moved_aside_name(target)
    place = staging_links if with_file else staging
    total_nbytes = sum(file.nbytes for file in content.files)
    try:
        with byte_bar(f"saving {os.path.basename(target)!r}") as bar, place(target, recycle) as staged:
            job = _Job(progress or bar, total_nbytes, set() if unsynced is None else unsynced)
            manifest = _write_content(staged, content, job, target)
            if with_file:
                _write_link_file(staged, content, manifest, job, os.path.basename(target))
            _make_durable(staged, (*manifest.small_files, MANIFEST, *([LINK_FILE] if with_file else [])))
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {target!r} could not be saved: {with_remedy(error)}; one of that name that was there is still "
            "whole"
        ) from error
    return SaveReport(job.nbytes_linked, job.nbytes_written, moved_aside)


def _require_short(target: str) -> None:
    folder, name = os.path.split(target)
    reason = too_long(os.path.join(folder, sibling(name + LINKS, "tmp")))  # the longest name that it has in a while
    if reason:
        raise CheckpointError(
            f"checkpoint {target!r} cannot be saved, its path is too long: {reason}; shorten its name"
        )


def _write_content(staged: Folder, content: CheckpointContent, job: _Job, target: str) -> Manifest:
    records = _place_units(staged, content.files, job)
    has_encoded = is_encoded(record.kind for record in records)
    optimizers, small = _write_small_files(staged, content, job)
    manifest = Manifest(
        step=content.step,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=_versions(),
        codec=ENCODED if has_encoded else float32.NAME,
        world_size=1,
        files=records,
        dtypes=content.dtypes,
        aliases=content.aliases,
        optimizers=optimizers,
        small_files=small,
        names=None if content.names is None else tuple(content.names),
        version=version_for(records),
        id=secrets.token_hex(16),
    )
    require_whole(manifest, content.buffers, target)
    _write_manifest(staged, manifest, job)
    return manifest


def _write_link_file(staged: Folder, content: CheckpointContent, manifest: Manifest, job: _Job, name: str) -> None:
    mark = LinkMark(manifest.id, name + LINKS)
    with new_file(os.path.join(staged.path, LINK_FILE), staged) as fd:
        writer = StreamWriter(fd)
        write_pickle(writer, linked_dictionary(LinkedContents(mark, manifest, content)))
    job.report(written=writer.nbytes)


@dataclass
class _Job:
    """Bytes on their way."""

    progress: Progress
    total_nbytes: int
    unsynced: set[str]
    nbytes_linked: int = 0
    nbytes_written: int = 0

    def report(self, written: int = 0, linked: int = 0) -> None:
        self.nbytes_written += written
        self.nbytes_linked += linked
        self.progress(min(self.nbytes_linked + self.nbytes_written, self.total_nbytes), self.total_nbytes)


def _place_units(staged: Folder, files: Sequence[UnitFile | ComposedFile], job: _Job) -> tuple[FileRecord, ...]:
    with staged.make(UNITS) as units:
        generations = [file for file in files if isinstance(file, UnitFile) and file.source not in job.unsynced]
        _sync_sources(generations, os.fstat(units.fd).st_dev, job.unsynced)
        return _place_each(units, files, job)


def _place_each(units: Folder, files: Sequence[UnitFile | ComposedFile], job: _Job) -> tuple[FileRecord, ...]:
    records: list[FileRecord] = []
    for index, file in enumerate(files):
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", f"{file.unit}.{file.kind}")[:120]
        name = f"{index:05d}-{plain}.safetensors"
        to = os.path.join(units.path, name)
        if isinstance(file, ComposedFile):
            checksums: tuple[int, ...] | None = file.write(to, job.report, units)
        else:
            checksums = _place(file, units, to, job)
        renamed = {} if isinstance(file, ComposedFile) else file.renamed
        layout = (file.nbytes, file.unit, file.kind, file.data_begin, file.entries)
        records.append(FileRecord(f"{UNITS}/{name}", *layout, checksums, renamed))
    return tuple(records)


def _sync_sources(files: Sequence[UnitFile], device: int, unsynced: set[str]) -> None:
    """Sync the generations that will be linked, before the first link, as a link dirties the inode again.

    The path of each generation whose sync fails is added to ``unsynced``; the first error is raised.
    """

    def sync(file: UnitFile) -> None:
        with closing_fd(file.open_source()) as fd:
            found = os.fstat(fd)
            # A generation with a link is in a checkpoint and was synced then; generations are immutable.
            if found.st_nlink == 1 and found.st_dev == device:
                try:
                    sync_disk(fd, os.fdatasync)
                except OSError as error:
                    unsynced.add(file.source)
                    error.filename = file.source
                    raise

    # In parallel: the disk merges the flushes.
    with ThreadPoolExecutor(_NUM_SYNCS, thread_name_prefix="checkpoint-sync") as pool:
        futures = [pool.submit(copy_context().run, sync, file) for file in files if file.linkable]
    for future in futures:
        future.result()


def _place(file: UnitFile, units: Folder, to: str, job: _Job) -> tuple[int, ...] | None:
    """Link or copy one generation; return the checksums of the file in the checkpoint.

    A file that belongs to another user, or that others may write to, is copied: they could change it later.
    """
    with closing_fd(file.open_source()) as fd:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != file.nbytes:
            raise CheckpointError(
                f"{file.kind} of unit {file.unit!r}: {file.source!r} has {found.st_size} bytes, "
                f"its header and data have {file.nbytes}"
            )
        if file.source in job.unsynced and file.linkable and file.checksums is None:
            raise CheckpointError(
                f"{file.kind} of unit {file.unit!r}: {file.source!r} could not be made durable before, and has no "
                "checksums to tell whether it is whole; resume from the last checkpoint, on another disk"
            )
        may_link = file.linkable and file.source not in job.unsynced and is_own_file(found, units)
        if may_link and _link(file, units, to, found):
            job.report(linked=file.nbytes)
            return file.checksums
        return _copy(fd, file, units, to, job)


def _link(file: UnitFile, units: Folder, to: str, found: os.stat_result) -> bool:
    name = os.path.basename(to)
    try:
        file.link_source(units, name)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    # The path may lead to another generation by now, if the store recycled the file.
    if not os.path.samestat(units.stat(name), found):
        raise CheckpointError(f"{file.source!r} was replaced while a checkpoint linked it")
    return True


def _copy(fd: int, file: UnitFile, units: Folder, to: str, job: _Job) -> tuple[int, ...]:
    """Copy through one buffer of 1 MiB, comparing with the checksums of a generation that cannot have changed."""
    expected = file.checksums if file.linkable else None
    checksums: list[int] = []
    with new_file(to, units) as out:
        if file.nbytes:
            os.posix_fallocate(out, 0, file.nbytes)
        writer = StreamWriter(out)
        offset = 0
        while offset < file.nbytes:
            # The first piece is the header, so that the others are the manifest's pieces of the data section.
            nbytes = file.data_begin if offset == 0 else min(PIECE_NBYTES, file.nbytes - offset)
            piece = read_exactly(fd, nbytes, offset, file.source)
            if offset:
                checksums.append(checksum(piece))
                _compare(checksums, expected, file, offset)
            writer.write(piece)
            offset += nbytes
            job.report(written=nbytes)
            if offset % FLUSH_NBYTES < PIECE_NBYTES:
                os.posix_fadvise(fd, 0, offset, os.POSIX_FADV_DONTNEED)
        writer.finish()
    return tuple(checksums)


def _compare(checksums: list[int], expected: tuple[int, ...] | None, file: UnitFile, offset: int) -> None:
    index = len(checksums) - 1
    if expected is None or (index < len(expected) and expected[index] == checksums[index]):
        return
    begin = index * PIECE_NBYTES
    names = listed(entry.name for entry in file.entries if entry.begin < begin + PIECE_NBYTES and entry.end > begin)
    raise CorruptionError(
        f"{file.kind} of unit {file.unit!r} is damaged on disk: the 1 MiB at offset {offset} of {file.source!r} "
        f"({names}) has another checksum than when it was written"
    )


def _write_small_files(
    staged: Folder, content: CheckpointContent, job: _Job
) -> tuple[tuple[OptimizerRecord, ...], dict[str, SmallFile]]:
    """Write buffers and state; return the encoded optimizer records and what was written."""
    pickled: dict[str, Any] = {}
    encoded = tuple(encode_optimizer(record, index, pickled) for index, record in enumerate(content.optimizers))
    extra = {name: tensor for name, tensor in content.buffers.items() if not is_plain(tensor)}
    small: dict[str, SmallFile] = {}
    with _small_file(staged, BUFFERS, small, job) as writer:
        plain = {name: tensor for name, tensor in content.buffers.items() if name not in extra}
        write_tensors(writer, lay_out_tensors(plain), plain.__getitem__)
    with _small_file(staged, STATE, small, job) as writer:
        write_pickle(writer, {"state": dict(content.state), "hyper": pickled})
    if extra:
        with _small_file(staged, EXTRA_TENSORS, small, job) as writer:
            write_pickle(writer, {name: tensor.detach() for name, tensor in extra.items()})
    return encoded, small


@contextmanager
def _small_file(staged: Folder, name: str, small: dict[str, SmallFile], job: _Job) -> Iterator[StreamWriter]:
    """A file that is entered in ``small`` on leaving."""
    with new_file(os.path.join(staged.path, name), staged) as fd:
        writer = StreamWriter(fd, checksummed=True)
        yield writer
    small[name] = SmallFile(writer.nbytes, writer.checksum)
    job.report(written=writer.nbytes)


def _write_manifest(staged: Folder, manifest: Manifest, job: _Job) -> None:
    text = encode_manifest(manifest)
    # A name or number that the reader refuses is an error now, not at resume.
    decode_manifest(text, "the manifest to be written")
    with new_file(os.path.join(staged.path, MANIFEST), staged) as fd:
        StreamWriter(fd).write(text)
    job.report(written=len(text))


def _make_durable(staged: Folder, names: Iterable[str]) -> None:
    """Sync the small files and the directories, all at the end: the file system then commits them together."""
    for name in names:
        with closing_fd(staged.open_file(name, os.O_RDONLY)) as fd, naming(os.path.join(staged.path, name)):
            sync_disk(fd, os.fsync)
    with staged.folder(UNITS) as units:
        units.sync()
    staged.sync()


def _versions() -> dict[str, str]:
    try:
        own = version("lightning-ssd")
    except PackageNotFoundError:
        own = "not installed"
    return {"lightning_ssd": own, "torch": torch.__version__}
