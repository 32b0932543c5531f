"""Disk space for values that wait: unlinked files, preallocated, cut into extents that are used again. Bytes."""

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
"""A disk's files double from the first to the second, unless one extent needs more."""


@dataclass(frozen=True)
class Extent:
    """A stretch of one file, at multiples of 4096."""

    file: File
    offset: int
    nbytes: int


@dataclass
class _SpillFile:
    disk: int
    file: File
    free: list[tuple[int, int]] = field(default_factory=list)  # (offset, nbytes), by offset, neighbours joined


class SpillFiles:
    """Extents on one or several disks, first fit. Nothing is on disk before the first is taken.

    Args:
        disks: Used in turn.
        name: What the files are called; they have no directory entry while they are used.
    """

    def __init__(self, disks: Sequence[Scratch], name: str) -> None:
        self._disks = list(disks)
        self._name = name
        self._files: list[_SpillFile] = []
        self._numbers = itertools.count()
        self._turns = itertools.count()

    def take(self, nbytes: int) -> Extent:
        """An extent of ``nbytes`` whose space is reserved.

        Raises:
            IOFailure: The disk is full, or failed.
        """
        nbytes = round_up(nbytes)
        disk = next(self._turns) % len(self._disks)
        here = [spill for spill in self._files if spill.disk == disk]
        for spill in here:
            for i, (offset, room) in enumerate(spill.free):
                if room >= nbytes:
                    spill.free[i : i + 1] = [(offset + nbytes, room - nbytes)] if room > nbytes else []
                    return Extent(spill.file, offset, nbytes)
        have = sum(spill.file.nbytes for spill in here)
        spill = self._create(disk, max(nbytes, min(max(have, MIN_FILE_NBYTES), MAX_FILE_NBYTES)), nbytes)
        if spill.file.nbytes > nbytes:
            spill.free = [(nbytes, spill.file.nbytes - nbytes)]
        return Extent(spill.file, 0, nbytes)

    def give_back(self, extent: Extent) -> None:
        """Return an extent. No transfer on it may be in flight."""
        spill = next(spill for spill in self._files if spill.file is extent.file)
        spill.free = with_span(spill.free, extent.offset, extent.nbytes)

    @property
    def nbytes(self) -> int:
        """Disk space that is reserved."""
        return sum(spill.file.nbytes for spill in self._files)

    @property
    def in_use_nbytes(self) -> int:
        """Of it, what is lent."""
        return self.nbytes - sum(room for spill in self._files for _, room in spill.free)

    def close(self) -> None:
        """Give the space back to the file system. No transfer may be in flight."""
        for spill in self._files:
            spill.file.close()
        self._files = []

    def _create(self, disk: int, nbytes: int, needed: int) -> _SpillFile:
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
