"""Disk space for saved inputs: unlinked, preallocated files, cut into extents that are used again. Sizes in bytes."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_ssd.errors import IOFailure
from lightning_ssd.io.file import File
from lightning_ssd.io.scratch import Scratch
from lightning_ssd.memory.pool import with_span
from lightning_ssd.sizes import GiB, MiB, round_up

MIN_FILE_NBYTES = 64 * MiB
MAX_FILE_NBYTES = GiB
"""The files of a disk double from the smallest to the largest size, unless one extent needs more."""


@dataclass(eq=False)
class Extent:
    """A range of one spill file that holds one saved input, and the transfers in flight on it.

    Attributes:
        file: The spill file.
        offset: Where the range begins, a multiple of 4096.
        nbytes: Its length, a multiple of 4096.
        unit: The unit whose input it holds, for messages.
        num_writes: Writes in flight.
        num_reads: Reads in flight.
        error: What a write failed with: the bytes are not valid.
        checksum: CRC32C of what was written, if checksums are kept.
    """

    file: File
    offset: int
    nbytes: int
    unit: str
    num_writes: int = 0
    num_reads: int = 0
    error: IOFailure | None = None
    checksum: int = 0


@dataclass
class _SpillFile:
    disk: int
    file: File
    free: list[tuple[int, int]] = field(default_factory=list)  # (offset, nbytes) by offset; neighbours are joined


class SpillFiles:
    """Extents on one or several disks, first fit. No file exists before the first extent is taken.

    Args:
        disks: Used in turn.
        name: Prefix of the files' names, for messages; the files have no directory entry while they are open.
    """

    def __init__(self, disks: Sequence[Scratch], name: str) -> None:
        self._disks = list(disks)
        self._name = name
        self._files: list[_SpillFile] = []
        self._numbers = itertools.count()
        self._turns = itertools.count()

    def take(self, nbytes: int, unit: str) -> Extent:
        """Reserve an extent of ``nbytes`` for an input of ``unit``.

        Raises:
            IOFailure: The disk is full, or failed.
        """
        nbytes = round_up(nbytes)
        disk = next(self._turns) % len(self._disks)
        here = [spill for spill in self._files if spill.disk == disk]
        for spill in here:
            for i, (offset, free_nbytes) in enumerate(spill.free):
                if free_nbytes >= nbytes:
                    spill.free[i : i + 1] = [(offset + nbytes, free_nbytes - nbytes)] if free_nbytes > nbytes else []
                    return Extent(spill.file, offset, nbytes, unit)
        reserved_nbytes = sum(spill.file.nbytes for spill in here)
        spill = self._create(disk, max(nbytes, min(max(reserved_nbytes, MIN_FILE_NBYTES), MAX_FILE_NBYTES)), nbytes)
        if spill.file.nbytes > nbytes:
            spill.free = [(nbytes, spill.file.nbytes - nbytes)]
        return Extent(spill.file, 0, nbytes, unit)

    def give_back(self, extent: Extent) -> None:
        """Return an extent. No transfer on it may be in flight."""
        spill = next(spill for spill in self._files if spill.file is extent.file)
        spill.free = with_span(spill.free, extent.offset, extent.nbytes)

    def close(self) -> None:
        """Close the files, which frees their space. No transfer may be in flight."""
        for spill in self._files:
            spill.file.close()
        self._files = []

    def _create(self, disk: int, nbytes: int, needed: int) -> _SpillFile:
        """A file of ``nbytes``; of the ``needed`` bytes only, if the disk has no room for more."""
        name = f"{self._name}-{next(self._numbers):04d}.spill"
        try:
            file = self._disks[disk].make(name, nbytes, direct=True)
        except IOFailure as error:
            if error.errno != errno.ENOSPC or nbytes == needed:
                raise
            file = self._disks[disk].make(name, needed, direct=True)
        spill = _SpillFile(disk, file)
        self._files.append(spill)
        return spill
