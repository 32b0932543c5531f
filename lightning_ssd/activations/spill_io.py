"""Transfers between host buffers and spill files, in bounded memory.

Every transfer is checked, and neither memory nor disk space is returned while a transfer may still use it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from lightning_ssd.activations.late_writes import LateWrite, LateWrites
from lightning_ssd.activations.spill_files import Extent, SpillFiles
from lightning_ssd.activations.spill_state import HostBuffer, PieceTransfer, SpillState
from lightning_ssd.device.streams import Streams
from lightning_ssd.errors import DeadlineError, IOFailure, SSDOffloadError
from lightning_ssd.io.engine import Engine, Transfer
from lightning_ssd.memory.budget import SharedBudget
from lightning_ssd.memory.pool import Pool
from lightning_ssd.trace.recorder import Lane, Trace


class SpillIO:
    """Reads and writes pieces, and owns the memory that is in flight. Not thread-safe: the store has a lock.

    Args:
        engine: Moves the bytes.
        files: Disk space.
        pool: Lends buffers for pieces.
        images: Lends the counted memory, registered with the device; None allocates it.
        streams: Copies between host buffers and the device.
        budget: Bounds the counted memory of saved inputs.
        verify: Compute a checksum of what is written.
        trace: Gets the transfers, and the waits for them.

    Attributes:
        writing_nbytes: Counted memory that is being written.
        read_ahead: States with pieces that were read ahead, the last started last.
    """

    def __init__(
        self,
        engine: Engine,
        files: SpillFiles,
        pool: Pool,
        *,
        images: Pool | None,
        streams: Streams,
        budget: SharedBudget,
        verify: bool,
        trace: Trace,
    ) -> None:
        self.budget = budget
        self.writing_nbytes = 0
        self.streams = streams
        self.verify = verify
        self.read_ahead: dict[SpillState, None] = {}
        self._trace = trace
        self._engine = engine
        self._files = files
        self._pool = pool
        self._images = images
        self._late_writes = LateWrites()
        self._copying: deque[HostBuffer] = deque()  # released while a copy was under way, the oldest first
        self._writes: deque[PieceTransfer] = deque()  # in flight, the oldest first
        self._abandoned: list[PieceTransfer] = []  # in flight, and nobody waits for them
        self._ended_extents: list[Extent] = []  # to be returned once nothing is in flight on them

    def try_counted_buffer(self, nbytes: int) -> HostBuffer | None:
        """Memory of the budget for all aligned bytes of an input; None if there is no room now."""
        self._collect_copied()
        limit = self.budget.saved_inputs_limit_nbytes
        if limit is not None and self.budget.held_saved_inputs_nbytes + nbytes > limit:
            return None
        lent = None
        if self._images is not None:
            image = self._images.try_lend(nbytes, "a saved input")
            if image is None:
                return None
            lent = self._images, image
        self.budget.held_saved_inputs_nbytes += nbytes
        return HostBuffer(nbytes, lent=lent, is_counted=True)

    def try_pool_buffer(self, nbytes: int, unit: str) -> HostBuffer | None:
        """Memory of the pool for a piece; None if there is none now."""
        self._collect_copied()
        buffer = self._pool.try_lend(nbytes, f"an input of unit {unit!r}")
        return None if buffer is None else HostBuffer(nbytes, lent=(self._pool, buffer))

    def pool_buffer(self, nbytes: int, unit: str) -> HostBuffer:
        """Memory of the pool for a piece; waits for writes, then abandons reads ahead."""
        buffer = self._pool.lend(nbytes, f"an input of unit {unit!r}", self._make_room)
        return HostBuffer(nbytes, lent=(self._pool, buffer))

    def _make_room(self) -> bool:
        """Return a buffer to the pool; False if nothing that has one will end."""
        if self.finish_copy():
            return True
        if self._writes:
            self.finish(self._writes.popleft())
            return True
        if self.read_ahead:
            self.abandon(self.take_pieces(next(reversed(self.read_ahead))))
        return self.drop_abandoned()

    def release(self, buffer: HostBuffer) -> None:
        """Return memory on which no transfer is in flight, as soon as it is idle."""
        if not buffer.is_idle:
            self._copying.append(buffer)
            return
        if buffer.is_counted:
            self.budget.held_saved_inputs_nbytes -= buffer.nbytes
        buffer.release()

    def finish_copy(self) -> bool:
        """Wait for the copy of the first of released buffers that are not idle; False if there is none."""
        if not self._copying:
            return False
        buffer = self._copying.popleft()
        buffer.wait_for_copy()
        self.release(buffer)
        return True

    def _collect_copied(self) -> None:
        while self._copying and self._copying[0].is_idle:
            self.release(self._copying.popleft())

    def release_host_copy(self, state: SpillState) -> None:
        """Return the host copy of ``state``, if it has one."""
        if state.host_copy is not None:
            buffer, state.host_copy = state.host_copy, None
            self.release(buffer)

    def take_extent(self, nbytes: int, unit: str) -> Extent:
        """Reserve disk space for an input of ``unit``.

        Raises:
            IOFailure: The disk is full, or failed; names the unit.
        """
        with _naming(unit, "making room on disk"):
            return self._files.take(nbytes, unit)

    def give_back_extent(self, extent: Extent) -> None:
        """Return disk space, now or as soon as no transfer is in flight on it."""
        if extent.num_writes or extent.num_reads:
            self._ended_extents.append(extent)
        else:
            self._files.give_back(extent)

    def write(self, extent: Extent, begin: int, buffer: HostBuffer) -> None:
        """Start to write a piece; its memory is returned when it is written. Pieces of an extent come in order.

        A piece that is on its way from the device is written when it is there; nobody waits for that here.
        """
        if buffer.copied is None:
            self._checksum(extent, buffer)
        self._writes.append(self._start(extent, begin, buffer, is_write=True))
        extent.num_writes += 1
        if buffer.is_counted:
            self.writing_nbytes += buffer.nbytes

    def read(self, extent: Extent, begin: int, buffer: HostBuffer) -> PieceTransfer:
        """Start to read a piece; `finish` or `abandon` must follow."""
        piece = self._start(extent, begin, buffer, is_write=False)
        extent.num_reads += 1
        return piece

    def _checksum(self, extent: Extent, buffer: HostBuffer) -> None:
        if self.verify:
            extent.checksum = buffer.checksum(extent.checksum)

    def _start(self, extent: Extent, begin: int, buffer: HostBuffer, *, is_write: bool) -> PieceTransfer:
        start = partial(self._begin_transfer, extent, begin, buffer, is_write)
        try:
            if is_write and buffer.copied is not None:
                transfer: Transfer = self._late_writes.add(LateWrite(buffer.copied, start))
            else:
                transfer = start()
        except BaseException:
            self.release(buffer)
            raise
        lane = Lane.WRITE if is_write else Lane.READ
        self._trace.follow(lane, "saved input", extent.unit, buffer.nbytes, transfer)
        return PieceTransfer(extent, begin, buffer, transfer, is_write)

    def _begin_transfer(self, extent: Extent, begin: int, buffer: HostBuffer, is_write: bool) -> Transfer:
        """Give a piece to the engine; of a late write, on the thread that has waited for it."""
        if is_write and buffer.copied is not None:
            self._checksum(extent, buffer)
        start = self._engine.write if is_write else self._engine.read
        address = buffer.bytes.data_ptr()
        return start(extent.file, extent.offset + begin, address, buffer.nbytes, keep=buffer.bytes)

    def finish(self, piece: PieceTransfer) -> None:
        """Wait for a transfer. The buffer of a read is the caller's afterwards, unless this raises.

        Raises:
            IOFailure: The transfer failed; names the unit and the file.
        """
        unit = piece.extent.unit
        what = "writing an input to disk" if piece.is_write else "reading an input from disk"
        try:
            with _naming(unit, what), self._trace.span(Lane.WAIT, "wait for saved inputs", unit):
                piece.transfer.wait()  # sync: the disk
        except DeadlineError:
            self._abandoned.append(piece)  # still in flight, and still owns its memory
            raise
        except IOFailure as error:
            if piece.is_write:
                piece.extent.error = _without_traceback(error)
            self._end(piece, keeps_buffer=False)
            raise
        self._end(piece, keeps_buffer=not piece.is_write)

    def finish_writes(self, extent: Extent) -> None:
        """Wait until all pieces of an extent are written.

        Raises:
            IOFailure: A write failed, now or before.
        """
        while extent.num_writes and self._writes:
            self.finish(self._writes.popleft())
        if extent.error is not None:
            raise _without_traceback(extent.error)

    def finish_counted_write(self) -> bool:
        """Wait until some counted memory is written and free; False if none is being written."""
        while self.writing_nbytes and self._writes:
            piece = self._writes.popleft()
            is_counted = piece.buffer.is_counted
            self.finish(piece)
            if is_counted:
                return True
        return False

    def abandon(self, pieces: Iterable[PieceTransfer]) -> None:
        """Nobody wants these transfers any more: their memory returns when they are over."""
        self._abandoned.extend(pieces)

    def take_pieces(self, state: SpillState) -> list[PieceTransfer]:
        """The pieces of ``state`` that were read ahead; they are the caller's now."""
        self.read_ahead.pop(state, None)
        pieces, state.pieces = state.pieces, []
        return pieces

    def drop_abandoned(self) -> bool:
        """Wait for one abandoned transfer; False if there is none, or it does not end."""
        if not self._abandoned:
            return False
        return self._drop(self._abandoned.pop(0))

    def _drop(self, piece: PieceTransfer) -> bool:
        """Wait for a transfer and return its memory, whether it succeeds or not; False if it does not end."""
        with suppress(SSDOffloadError):
            piece.transfer.wait()  # sync: the disk
        if not piece.transfer.done():
            self._abandoned.append(piece)
            return False
        self._end(piece, keeps_buffer=False)
        return True

    def collect(self) -> None:
        """Take back the memory and disk space of transfers that are over.

        Raises:
            IOFailure: A write failed.
        """
        pieces, self._abandoned = self._abandoned, []
        for piece in pieces:
            if piece.transfer.done():
                self._end(piece, keeps_buffer=False)
            else:
                self._abandoned.append(piece)
        extents, self._ended_extents = self._ended_extents, []
        for extent in extents:
            self.give_back_extent(extent)
        while self._writes and self._writes[0].transfer.done():
            self.finish(self._writes.popleft())
        self._collect_copied()

    def close(self) -> None:
        """Wait for all transfers and copies, whether they succeed or not, and close the files."""
        pieces = [*self._writes, *self._abandoned]
        self._writes.clear()
        self._abandoned.clear()
        for piece in pieces:
            self._drop(piece)
        while self.finish_copy():
            pass
        self._late_writes.close()
        self._ended_extents.clear()
        self._files.close()

    def _end(self, piece: PieceTransfer, *, keeps_buffer: bool) -> None:
        """A transfer is over: stop counting it, and return its buffer unless the caller keeps it."""
        if piece.is_write:
            piece.extent.num_writes -= 1
            if piece.buffer.is_counted:
                self.writing_nbytes -= piece.buffer.nbytes
        else:
            piece.extent.num_reads -= 1
        if not keeps_buffer:
            self.release(piece.buffer)


@contextmanager
def _naming(unit: str, what: str) -> Iterator[None]:
    """Name the unit in errors of the disk."""
    try:
        yield
    except IOFailure as error:
        what = f"unit {unit!r}: {what}; transfer"
        kind = DeadlineError if isinstance(error, DeadlineError) else IOFailure
        raise kind(error.errno or 0, error.path, error.offset, error.nbytes, what) from error


def _without_traceback(error: IOFailure) -> IOFailure:
    """A copy. The traceback of ``error`` would keep the tensors of the failed calls alive."""
    again = IOFailure(error.errno or 0, error.path, error.offset, error.nbytes)
    again.args = error.args
    return again
