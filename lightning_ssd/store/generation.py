"""One version of one kind of one unit, and reads of it that compare checksums."""

from __future__ import annotations

from torch import Tensor

from lightning_ssd.errors import CorruptionError, StoreError, listed
from lightning_ssd.io.deadline import Started
from lightning_ssd.io.engine import Transfer
from lightning_ssd.io.file import File
from lightning_ssd.kernels.api import crc32c_each
from lightning_ssd.store.layout import CHECK_NBYTES, UnitLayout, chunks


class Generation:
    """One version of one kind of one unit: in a file, in memory, or both.

    Args:
        layout: What is where in the file.
        file: The open file, None if the values are in memory only.
        in_memory: One tensor per parameter, in file order, if the values are in memory; see [Note: in memory].

    Attributes:
        layout: As given.
        in_memory: As given; None once the memory holds newer values.
        checks: CRC32C of each `CHECK_NBYTES` of the data section, None where not written yet or not known.
        is_mapped: A mapping may write to the file, so no checkpoint may link it.
        damage: Why the values are unusable (an update in memory failed midway), as a message. Empty if they are whole.
        lineage: One object for all generations between two updates, which differ by writes of the user only.
        is_inherited: A forked process may read the file, so it is never written again.
        fingerprint: Checksums of the tensors as the user wrote them; None if an update wrote them.
        naming: Gives the file its name and header until its data section is first written; None once that is over.
        is_misnamed: That failed, and the file is not used again.
    """

    def __init__(self, layout: UnitLayout, file: File | None, in_memory: tuple[Tensor, ...] | None = None) -> None:
        self.layout = layout
        self._file = file
        self.in_memory = in_memory
        self.checks: list[int | None] = [None] * -(-layout.data_nbytes // CHECK_NBYTES)
        self.is_mapped = False
        self.damage = ""
        self.lineage = object()
        self.is_inherited = False
        self.fingerprint: object | None = None
        self.naming: Started[None] | None = None
        self.is_misnamed = False

    @property
    def file(self) -> File:
        """The open file.

        Raises:
            StoreError: The values are in memory only; `StateStore.on_disk` writes a file of them.
        """
        if self._file is None:
            raise StoreError(f"the {self.layout.kind} of unit {self.layout.unit!r} is in memory and has no file")
        return self._file

    @file.setter
    def file(self, file: File) -> None:
        self._file = file

    @property
    def has_file(self) -> bool:
        """Whether the values are in a file."""
        return self._file is not None

    def end_naming(self) -> None:
        """Return when the file has its name and header.

        Raises:
            IOFailure: The disk failed.
            DeadlineError: The disk did not answer.
        """
        naming, self.naming = self.naming, None
        if naming is None:
            return
        try:
            naming.end()
        except BaseException:
            self.is_misnamed = True
            if not naming.done():
                self.file.give_up(naming)  # it may still write a header
            raise

    def detach(self) -> None:
        """Forget the file; the values are in memory."""
        self._file = None


class CheckedRead:
    """A read of whole pieces of `CHECK_NBYTES`, which the first `wait` compares with their checksums.

    Args:
        transfer: Reads the bytes.
        generation: What is read.
        offset: First byte, counted in the data section; a multiple of `CHECK_NBYTES`.
        address: Where the bytes arrive; the transfer keeps that memory.
        nbytes: How many.
    """

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
        """Compare pieces with their checksums, but for a last piece that was read in part."""
        found = crc32c_each(self._address, self._nbytes, CHECK_NBYTES)
        for (begin, end), ours, check in zip(chunks(self._nbytes, CHECK_NBYTES), found, expected, strict=True):
            is_whole = end - begin == min(CHECK_NBYTES, self._generation.layout.data_nbytes - self._offset - begin)
            if is_whole and check is not None and ours != check:
                raise CorruptionError(self._message(self._offset + begin))

    def _message(self, offset: int) -> str:
        layout = self._generation.layout
        names = listed(e.name for e in layout.entries if e.begin < offset + CHECK_NBYTES and e.end > offset)
        return (
            f"unit {layout.unit!r}, kind {layout.kind!r}: the {CHECK_NBYTES} bytes at offset {offset} of the data in "
            f"{self._generation.file.path!r} are not the bytes that were written (parameters {names}); the disk or "
            "its controller corrupts data: stop using it and resume from the last checkpoint"
        )
