"""Files of generations: created, written, read with their checksums compared, and mapped."""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from lightning_ssd.errors import IOFailure, ResidencyError, SSDOffloadError, StoreError, as_io_failure, gone
from lightning_ssd.io.engine import Engine, Transfer
from lightning_ssd.io.folder import closing_fd
from lightning_ssd.io.scratch import write_all
from lightning_ssd.kernels.api import crc32c_each, is_native
from lightning_ssd.memory.mapped_file import map_file
from lightning_ssd.store.disks import Disk, Disks
from lightning_ssd.store.generation import CheckedRead, Generation
from lightning_ssd.store.layout import CHECK_NBYTES, UnitLayout
from lightning_ssd.store.spare_files import SpareFiles
from lightning_ssd.trace.recorder import Lane, Trace


class GenerationFiles:
    """Files of generations, current or not.

    Args:
        disks: Where they are.
        engine: Moves the bytes.
        verify: Whether every read is compared with the checksums of what was written.
        trace: Gets spans of reads and writes.

    Attributes:
        engine: Moves the bytes; another one inside `StateStore.writable`.
        verify: As given.
        spare: Files to be written again.
        is_inherited: This is a forked process: it reads and writes nothing, and maps only what its parent let it see.
    """

    def __init__(self, disks: Disks, engine: Engine, *, verify: bool, trace: Trace) -> None:
        self._disks = disks
        self.engine = engine
        self.verify = verify
        self.spare = SpareFiles(disks)
        self.is_inherited = False
        self._trace = trace
        # Without the native kernel a checksum takes ten times as long as the transfer.
        self._computes_checks = verify or is_native()
        self._mapped: weakref.WeakKeyDictionary[mmap.mmap, Generation] = weakref.WeakKeyDictionary()

    def begin(self, layouts: Sequence[UnitLayout]) -> list[Generation]:
        """New files, one per layout, with header and reserved space; their data sections are still to be written.

        Raises:
            StoreError: The disk is full. No file is left behind, as after the other errors.
            IOFailure: The disk failed.
            DeadlineError: The disk did not answer.
            ResidencyError: This is a forked process.
        """
        if not layouts:
            return []
        for layout in layouts:
            self.require_own(layout)
        places = [self._disks.new_path(f"{layout.unit[-80:]}.{layout.kind[:80]}") for layout in layouts]
        patience, path = self.engine.patience, places[0][1]
        with ExitStack() as undo:
            begun = []
            for layout, (disk, _) in zip(layouts, places, strict=True):
                begun.append(Generation(layout, self.spare.take(layout.file_nbytes, disk)))
                undo.callback(self.retire, begun[-1])
            made = dict(zip(begun, places, strict=True))
            reused = {generation: generation.file.path for generation in begun if generation.has_file}
            # One call for all: each call within the deadline waits for another thread.
            if len(reused) < len(begun):
                patience.call(partial(_create, made), path, "making a file")
            for generation in reused:  # messages about its bytes say the new name
                generation.file.path = made[generation][1]
            if reused:
                naming = patience.start(partial(_name, reused), path, "naming a file")
                for generation in reused:
                    generation.naming = naming
            undo.pop_all()
        return begun

    def retire(self, generation: Generation) -> None:
        """Reuse or unlink the file of a generation that is not needed any more; does nothing if it has none.

        Raises:
            IOFailure: The disk failed.
        """
        if generation.has_file and not self.is_inherited:
            with suppress(SSDOffloadError):  # what it fails with does not matter any more
                generation.end_naming()
            # A private mapping, too, shows what is written to its file later.
            is_seen = generation.is_inherited or generation.is_misnamed or generation in self._mapped.values()
            self.spare.retire(generation.file, is_seen=is_seen)

    def read(self, generation: Generation, offset: int, address: int, nbytes: int, keep: object) -> Transfer:
        """See `StateStore.read`."""
        where = generation.layout.data_begin + offset
        transfer = self.engine.read(generation.file, where, address, nbytes, keep=keep)
        self._trace.follow(Lane.READ, generation.layout.kind, generation.layout.unit, nbytes, transfer)
        return CheckedRead(transfer, generation, offset, address, nbytes) if self.verify else transfer

    def write(self, generation: Generation, offset: int, address: int, nbytes: int, keep: object) -> Transfer:
        """See `StateStore.write`."""
        # Not beside the renaming: it locks the file, so if one of the two hung, the other would, and the process.
        generation.end_naming()
        if self._computes_checks:
            checks = crc32c_each(address, nbytes, CHECK_NBYTES)
            first = offset // CHECK_NBYTES
            generation.checks[first : first + len(checks)] = checks
        where = generation.layout.data_begin + offset
        transfer = self.engine.write(generation.file, where, address, nbytes, keep=keep)
        self._trace.follow(Lane.WRITE, generation.layout.kind, generation.layout.unit, nbytes, transfer)
        return transfer

    def map(self, generation: Generation, *, private: bool) -> mmap.mmap:
        """See `StateStore.map`; the generation has a file."""
        if not private:
            generation.is_mapped = True
            generation.checks = [None] * len(generation.checks)  # the mapping may write to it
        path = generation.file.path
        with self._naming_missing(generation):
            if self.is_inherited and not generation.file.closed:  # the name may be gone, or another file's
                fd = os.dup(generation.file.tail_fd)
            else:
                fd = generation.file.open_again(os.O_RDWR)
        with closing_fd(fd):
            memory = map_file(fd, generation.file.nbytes, path, generation.layout.about, private=private)
        self._mapped[memory] = generation
        return memory

    def stat(self, generation: Generation) -> os.stat_result:
        """See `StateStore.stat`."""
        with self._naming_missing(generation):
            return generation.file.stat()

    def require_own(self, layout: UnitLayout) -> None:
        """Refuse to read or write in a forked process.

        Raises:
            ResidencyError: This is one.
        """
        if self.is_inherited:
            raise ResidencyError(
                f"the {layout.kind} of unit {layout.unit!r} cannot be read or written in a forked process: its files "
                "and memory are those of the process that trains; do it there"
            )

    def pass_on(self, generations: Iterable[Generation]) -> None:
        """Never write again to the files of ``generations`` and of mappings: a process forked next may read them."""
        for generation in (*generations, *self._mapped.values()):
            generation.is_inherited = True

    @contextmanager
    def _naming_missing(self, generation: Generation) -> Iterator[None]:
        """Turn the error for a file that is not there into one that says why: its directory or its run is gone."""
        try:
            yield
        except StoreError:
            raise self._missing(generation) from None
        except IOFailure as error:
            if error.errno != errno.ENOENT:
                raise
            raise self._missing(generation) from None

    def _missing(self, generation: Generation) -> StoreError:
        folder = os.path.dirname(generation.file.path)
        if any(disk.directory.is_open and disk.path == folder for disk in self._disks.all):
            return gone(folder)
        return StoreError(
            f"the {generation.layout.kind} of unit {generation.layout.unit!r} is gone: its run is over and another "
            "one has begun"
        )


def _create(places: Mapping[Generation, tuple[Disk, str]]) -> None:
    """Make the files of those generations that have none, with their headers."""
    for generation, (disk, path) in places.items():
        if not generation.has_file:
            generation.file = disk.create(path, generation.layout.file_nbytes)
            write_all(generation.file, generation.layout.header)


def _name(old_paths: Mapping[Generation, str]) -> None:
    """Give files that are used again their new names and headers."""
    waiting = dict(old_paths)
    try:
        for generation, old_path in old_paths.items():
            del waiting[generation]
            with as_io_failure(generation.file.path, what="naming a file"):
                generation.file.take_name(old_path)
                write_all(generation.file, generation.layout.header)
    finally:
        for generation, old_path in waiting.items():  # after a failure: they have their old names
            generation.file.path = old_path
