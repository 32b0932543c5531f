"""One written version of one kind of one unit, and reads that compare it with what was written."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_ssd.errors import CorruptionError
from lightning_ssd.io.engine import File, Transfer
from lightning_ssd.kernels.api import crc32c_each
from lightning_ssd.store.layout import CHECK_NBYTES, UnitLayout, chunks


@dataclass(eq=False)
class Generation:
    """One written version of one kind of one unit: one file, or memory that is kept, or both.

    Attributes:
        layout: What is where in the file.
        in_memory: One tensor per parameter, in file order, where the values are kept in memory; see [Note: kept].
        checks: CRC32C of each `CHECK_NBYTES` of the data section, None where not written yet or not known.
        is_mapped: Somebody may hold a view that writes to the file: never link it.
        damage: Why the values are unusable: an update of kept memory failed midway. Empty if they are whole.
        lineage: The same for generations between which there was no update, only writes of the user.
        is_inherited: A forked process may read the file: never write to it again.
        fingerprint: Checksums of the tensors as the user wrote them; None if an update wrote them.
    """

    layout: UnitLayout
    _file: File | None
    in_memory: tuple[Tensor, ...] | None = None
    checks: list[int | None] = field(default_factory=list)
    is_mapped: bool = False
    damage: str = ""
    lineage: object = field(default_factory=object)
    is_inherited: bool = False
    fingerprint: tuple[int, ...] | None = None

    @property
    def file(self) -> File:
        """The open file; what is kept has one after `StateStore.on_disk`."""
        assert self._file is not None, f"{self.layout.unit} {self.layout.kind}: not on disk"
        return self._file

    @file.setter
    def file(self, file: File) -> None:
        self._file = file

    @property
    def has_file(self) -> bool:
        """Whether the values are on disk."""
        return self._file is not None


class CheckedRead:
    """A read whose bytes are compared with the checksums of what was written, once, when it is waited for."""

    def __init__(self, transfer: Transfer, generation: Generation, offset: int, address: int, nbytes: int) -> None:
        self._transfer = transfer
        self._generation = generation
        self._offset = offset
        self._address = address
        self._nbytes = nbytes
        self._is_checked = False

    def done(self) -> bool:
        """See `Transfer.done`."""
        return self._transfer.done()

    def times(self) -> tuple[float, float | None] | None:
        """See `Transfer.times`."""
        return self._transfer.times()

    def wait(self, deadline_s: float | None = None) -> None:
        """See `Transfer.wait`.

        Raises:
            CorruptionError: The bytes are not those that were written; names unit, file, parameters and offset.
        """
        self._transfer.wait(deadline_s)
        if self._is_checked:
            return
        first = self._offset // CHECK_NBYTES
        expected = self._generation.checks[first : first - (-self._nbytes // CHECK_NBYTES)]
        if any(check is not None for check in expected):
            self._compare(expected)
        self._is_checked = True

    def _compare(self, expected: list[int | None]) -> None:
        found = crc32c_each(self._address, self._nbytes, CHECK_NBYTES)
        for (begin, end), ours, check in zip(chunks(self._nbytes, CHECK_NBYTES), found, expected, strict=True):
            whole = end - begin == min(CHECK_NBYTES, self._generation.layout.data_nbytes - self._offset - begin)
            if whole and check is not None and ours != check:
                raise CorruptionError(self._message(self._offset + begin))

    def _message(self, offset: int) -> str:
        layout = self._generation.layout
        names = [e.name for e in layout.entries if e.begin < offset + CHECK_NBYTES and e.end > offset]
        return (
            f"unit {layout.unit!r}, kind {layout.kind!r}: the {CHECK_NBYTES} bytes at offset {offset} of the data in "
            f"{self._generation.file.path!r} are not the bytes that were written (parameters {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}); the disk or its controller corrupts data: "
            "stop using it and resume from the last checkpoint"
        )
