"""Copy a checkpoint to another place, usually another file system. The copy is verified and can be resumed.

The copy is written into a hidden, locked sibling of its target, ``.NAME.copy-0-CHECKSUM``; CHECKSUM is the manifest's.
So a second copy of the same checkpoint to the same name finds the directory, and keeps each MiB whose checksum matches.
The directory takes the target's name after every byte has been read back and compared.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from lightning_ssd.checkpoint.checksum import PIECE_NBYTES, checksum
from lightning_ssd.checkpoint.directory import sync_directory
from lightning_ssd.checkpoint.discard import UNIT_FILE
from lightning_ssd.checkpoint.link_file import LINKS, folder_id, mark_of
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.manifest import MANIFEST, UNITS, FileRecord
from lightning_ssd.checkpoint.manifest_json import decode_manifest
from lightning_ssd.checkpoint.writer import FLUSH_NBYTES, Progress, StreamWriter
from lightning_ssd.convert.export_staging import staged_file
from lightning_ssd.errors import CheckpointError, CorruptionError, naming
from lightning_ssd.io.folder import Folder, close_fd, closing_fd
from lightning_ssd.sizes import fmt
from lightning_ssd.store.mapped_safetensors import read_exactly

_WAIT_S = 1.0


@dataclass(frozen=True)
class CopyReport:
    """What copying did.

    Attributes:
        nbytes_copied: Bytes that were copied.
        nbytes_reused: Bytes that an earlier, interrupted copy had written and whose checksums match.
    """

    nbytes_copied: int
    nbytes_reused: int


def copy_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], progress: Progress | None = None
) -> CopyReport:
    """Copy a checkpoint through a buffer of 1 MiB. After an interruption, the same call resumes the copy.

    Of a file of links, its folder is copied and compared, and then the file: see [Note: links].

    Args:
        source: The checkpoint.
        target: The copy's file or directory; must not exist.
        progress: Called with bytes done and bytes in all: each byte counts when it is copied and when it is read back.

    Raises:
        CheckpointError: If it could not be copied. What was copied stays for the next call.
        CorruptionError: If the source, or what was read back, is not what the manifest says.
    """
    to = os.path.abspath(os.fspath(target))
    if os.path.lexists(to):
        raise CheckpointError(f"{to!r} exists; choose a name that does not")
    mark = mark_of(os.fspath(source))
    if mark is None:
        return _copy_directory(source, to, progress)
    done = CopyReport(0, 0)
    if not _has_links(to + LINKS, mark.id):  # else they were copied, and the process died before it copied the file
        done = _copy_directory(source, to + LINKS, progress)
    with open(os.fspath(source), "rb") as file, staged_file(to) as (fd, take_name), naming(to):
        writer = StreamWriter(fd)
        shutil.copyfileobj(file, writer)
        writer.finish()
        take_name()
    sync_directory(os.path.dirname(to))
    return CopyReport(done.nbytes_copied + writer.nbytes, done.nbytes_reused)


def _has_links(path: str, checkpoint_id: str) -> bool:
    if not os.path.isdir(path):
        return False
    with Folder.open(path) as folder:
        return folder_id(folder) == checkpoint_id


def _copy_directory(source: str | os.PathLike[str], to: str, progress: Progress | None) -> CopyReport:
    if os.path.lexists(to):
        raise CheckpointError(f"{to!r} exists; choose a name that does not")
    try:
        with CheckpointReader(source) as reader, ExitStack() as stack:
            text = _manifest_of(reader)
            parent, made = stack.enter_context(_unfinished(to, checksum(text)))
            job = _Job(reader, made, progress)
            _require_free(made, reader.manifest.nbytes)
            with made.folder(UNITS) as units:
                for record in reader.manifest.files:
                    job.copy_unit(record, units)
                units.sync()
            job.copy_small_files(text)
            made.sync()
            # Compare every byte once more; the page cache was emptied, so they come from the disk.
            with CheckpointReader(f"/proc/self/fd/{made.fd}") as copied:  # what was written, whatever has its path now
                copied.directory = made.path
                copied.verify(lambda done, _: job.report(read_back=done))
            _publish(parent, made, os.path.basename(to))
            parent.sync()
    except OSError as error:
        raise CheckpointError(
            f"{to!r} could not be written: {error}; call the same again to resume the copy, or remove it with "
            "lightning-ssd clean"
        ) from error
    return CopyReport(job.nbytes_copied, job.nbytes_reused)


def _manifest_of(reader: CheckpointReader) -> bytes:
    """The manifest's own text, which must not have changed since it was read."""
    fd = reader.open_file(MANIFEST)
    with os.fdopen(fd, "rb") as file:
        text = file.read()
    if decode_manifest(text, os.path.join(reader.directory, MANIFEST)) != reader.manifest:
        raise CheckpointError(f"{reader.directory!r} was replaced while it was read")
    return text


@contextmanager
def _unfinished(target: str, mark: int) -> Iterator[tuple[Folder, Folder]]:
    """The folder around it, and the directory in which the copy grows, old or new, locked."""
    folder, name = os.path.split(target)
    os.makedirs(folder, exist_ok=True)
    with Folder.open(folder) as parent, _own(parent, f".{name}.copy-0-{mark:08x}", target) as made:
        if not made.has(UNITS):
            made.make(UNITS).close()
        yield parent, made


def _own(parent: Folder, name: str, target: str) -> Folder:
    """The directory of that name, made if there is none, open and locked."""
    end_s = time.monotonic() + _WAIT_S
    while True:
        with suppress(FileExistsError):
            _make(parent, name)
        try:
            made = parent.folder(name)
        except FileNotFoundError:
            if time.monotonic() > end_s:
                raise
            continue  # ``lightning-ssd clean`` removed it before it was locked
        if os.fstat(made.fd).st_uid != os.geteuid():
            made.close()
            raise CheckpointError(f"{made.path!r} belongs to another user")
        is_locked = made.try_lock()
        if is_locked is None or (is_locked and parent.is_at(name, made)):
            return made
        made.close()
        if is_locked is False and time.monotonic() > end_s:
            raise CheckpointError(f"{target!r} is being copied to by another process")
        time.sleep(0.01)  # another process may hold the lock only to look at it


def _make(parent: Folder, name: str) -> None:
    try:
        parent.make(name).close()
    except FileNotFoundError:  # removed before it was opened
        if not os.fstat(parent.fd).st_nlink:
            raise


def _publish(parent: Folder, made: Folder, name: str) -> None:
    own = os.path.basename(made.path)
    if not parent.is_at(own, made):
        raise CheckpointError(f"{made.path!r} was removed by somebody else while it was written")
    if parent.has(name):
        raise CheckpointError(f"{os.path.join(parent.path, name)!r} was made by somebody else in the meantime")
    parent.rename(own, name)


def _require_free(made: Folder, nbytes: int) -> None:
    found = os.statvfs(made.fd)
    with made.folder(UNITS) as units:
        there = sum(units.stat(name).st_blocks * 512 for name in units.names())
    if found.f_bavail * found.f_frsize + there < nbytes:
        raise CheckpointError(
            f"the copy needs {fmt(nbytes)}, {made.path!r} has {fmt(there)} of it and its disk "
            f"{fmt(found.f_bavail * found.f_frsize)} free"
        )


class _Job:
    """One copy on its way."""

    def __init__(self, reader: CheckpointReader, made: Folder, progress: Progress | None) -> None:
        self._reader = reader
        self._made = made
        self._progress = progress
        self.nbytes_copied = 0
        self.nbytes_reused = 0

    def report(self, *, copied: int = 0, reused: int = 0, read_back: int = 0) -> None:
        self.nbytes_copied += copied
        self.nbytes_reused += reused
        if self._progress is not None:
            done = self.nbytes_copied + self.nbytes_reused + read_back
            total = 2 * self._reader.manifest.nbytes
            self._progress(min(done, total), total)

    def copy_unit(self, record: FileRecord, units: Folder) -> None:
        """Copy a unit file, piece by piece."""
        folder, _, name = record.path.partition("/")
        if folder != UNITS or not UNIT_FILE.fullmatch(name):
            raise CheckpointError(f"{self._reader.directory}: {record.path!r} is no name that a save gives")
        sums = record.checksums
        with ExitStack() as stack:
            source = stack.enter_context(closing_fd(self._reader.open_file(record.path)))
            target = stack.enter_context(closing_fd(_open_for_writing(units, name)))
            self._piece(source, target, 0, record.data_begin, None, record.path)
            for index, offset in enumerate(range(record.data_begin, record.nbytes, PIECE_NBYTES)):
                nbytes = min(PIECE_NBYTES, record.nbytes - offset)
                self._piece(source, target, offset, nbytes, None if sums is None else sums[index], record.path)
                if offset % FLUSH_NBYTES < PIECE_NBYTES:
                    _flush(source, target)
            os.ftruncate(target, record.nbytes)
            _flush(source, target)

    def copy_small_files(self, manifest: bytes) -> None:
        """Copy the small files, and last the manifest."""
        for name, small in self._reader.manifest.small_files.items():
            with (
                closing_fd(self._reader.open_file(name)) as source,
                closing_fd(_open_for_writing(self._made, name)) as target,
            ):
                for offset in range(0, small.nbytes, PIECE_NBYTES):
                    self._piece(source, target, offset, min(PIECE_NBYTES, small.nbytes - offset), None, name)
                os.ftruncate(target, small.nbytes)
                _flush(source, target)
        with closing_fd(_open_for_writing(self._made, MANIFEST)) as target:
            _write(target, manifest, 0)
            os.ftruncate(target, len(manifest))
            os.fsync(target)

    def _piece(self, source: int, target: int, offset: int, nbytes: int, expected: int | None, name: str) -> None:
        """Copy some bytes, unless they are there and known to be right."""
        is_there = expected is not None and os.fstat(target).st_size >= offset + nbytes
        if is_there and checksum(read_exactly(target, nbytes, offset, name)) == expected:
            self.report(reused=nbytes)
            return
        data = read_exactly(source, nbytes, offset, name)
        if expected is not None and checksum(data) != expected:
            raise CorruptionError(
                f"{self._reader.directory}: {name!r} is damaged in the {nbytes} bytes at offset {offset}; see "
                "lightning-ssd verify"
            )
        _write(target, data, offset)
        self.report(copied=nbytes)


def _open_for_writing(folder: Folder, name: str) -> int:
    """Open a file of the unfinished copy; a symlink, or a file with another link, is refused."""
    fd = folder.open_file(name, os.O_RDWR | os.O_CREAT)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        close_fd(fd)
        raise CheckpointError(f"{name!r} of the unfinished copy is no plain file of its own")
    return fd


def _write(fd: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written


def _flush(source: int, target: int) -> None:
    """Sync the target, and drop both files from the page cache."""
    os.fdatasync(target)
    for fd in (source, target):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
