"""Pieces between host memory and spill files: bounded memory, every result checked, nothing returned too early."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_ssd.activations.spill_files import Extent, SpillFiles
from lightning_ssd.errors import DeadlineError, IOFailure, SSDOffloadError
from lightning_ssd.io.engine import Engine, Transfer
from lightning_ssd.kernels.api import crc32c
from lightning_ssd.memory.budget import SharedBudget
from lightning_ssd.memory.device_copies import DeviceCopies
from lightning_ssd.memory.pool import Buffer, Pool
from lightning_ssd.sizes import BLOCK_NBYTES
from lightning_ssd.trace.recorder import Lane, Trace


class HostBuffer:
    """Host memory of whole blocks: a buffer of a pool, or ours alone.

    Attributes:
        bytes: 1D uint8, 4096-aligned.
        is_lent: It goes back to a pool, so no tensor may stay on it.
        is_counted: It is part of the budget.
    """

    def __init__(self, nbytes: int, *, lent: tuple[Pool, Buffer] | None = None, is_counted: bool) -> None:
        self._lent = lent
        self._copied: torch.cuda.Event | None = None  # a copy to or from a device that may still run
        self.is_lent = lent is not None
        self.is_counted = is_counted
        if lent is not None:
            self.bytes = lent[1].tensor(0, torch.uint8, (nbytes,))
        else:
            raw = torch.empty(nbytes + BLOCK_NBYTES, dtype=torch.uint8, device="cpu")
            begin = -raw.data_ptr() % BLOCK_NBYTES
            self.bytes = raw[begin : begin + nbytes]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.bytes.numel()

    def checksum(self, initial: int) -> int:
        """CRC32C of its bytes, going on from that of those before."""
        return crc32c(self.bytes.data_ptr(), self.nbytes, initial)

    def fill(self, begin: int, data: Tensor, data_begin: int, copies: DeviceCopies) -> None:
        """Take what it holds of an image from byte ``begin`` on; ``data``, on any device, starts at ``data_begin``."""
        first = max(begin, data_begin)
        last = min(begin + self.nbytes, data_begin + data.numel())
        part = data[first - data_begin : last - data_begin]
        self._copied = copies.to_host(part, self.bytes[first - begin : last - begin])
        ctypes.memset(self.bytes.data_ptr(), 0, first - begin)
        ctypes.memset(self.bytes.data_ptr() + last - begin, 0, begin + self.nbytes - last)

    def copy_to(self, image: Tensor, copies: DeviceCopies) -> None:
        """Copy all of it to ``image``, which is 1D uint8 on any device."""
        self._copied = copies.to_device(self.bytes, image)

    def wait_for_copy(self) -> None:
        """Until this, neither the disk nor a new owner may have it."""
        if self._copied is not None:
            self._copied.synchronize()  # sync: waits for the copy stream
            self._copied = None

    def release(self) -> None:
        """Let go of it. No transfer on it may be in flight."""
        self.wait_for_copy()
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        if self._lent is not None:
            pool, buffer = self._lent
            self._lent = None
            pool.give_back(buffer)


@dataclass(eq=False)
class Slot:
    """Disk space of one image, and what is in flight on it.

    Attributes:
        extent: Where.
        unit: Whose input it is, for messages.
        num_writes: Writes in flight.
        num_reads: Reads in flight.
        error: Why its bytes are not what they should be.
        checksum: CRC32C of the image, if that is wanted.
    """

    extent: Extent
    unit: str
    num_writes: int = 0
    num_reads: int = 0
    error: IOFailure | None = None
    checksum: int = 0


@dataclass(eq=False)
class PieceTransfer:
    """A transfer between memory and the piece of an image that starts at byte ``begin`` of it."""

    slot: Slot
    begin: int
    memory: HostBuffer
    transfer: Transfer
    is_write: bool


@dataclass(eq=False)
class SpillState:
    """What an entry has taken, to be returned when it is gone; outlives it.

    Attributes:
        counted_nbytes: Of its own values in memory, as far as nobody else holds them.
        slot: Disk space that its image was written to, or is being.
        image: Its image in memory.
        image_read: The read that fills ``image``.
        pieces: Pieces of the image that were read ahead, from its begin.
    """

    counted_nbytes: int = 0
    slot: Slot | None = None
    image: HostBuffer | None = None
    image_read: PieceTransfer | None = None
    pieces: list[PieceTransfer] = field(default_factory=list)


class SpillIO:
    """Moves pieces, and owns the memory that is in flight.

    Args:
        engine: Moves the bytes.
        files: Where to.
        pool: Lends buffers for pieces.
        images: Lends memory of the budget; None takes it from torch.
        budget: Bounds `held_nbytes`.
        verify: Keep checksums of what is written.
        trace: Gets the transfers, and what waits for them.

    Attributes:
        leaving_nbytes: Of `held_nbytes`, what is being written.
        copies: The way to the device and back.
        verify: Checksums are kept.
    """

    def __init__(
        self,
        engine: Engine,
        files: SpillFiles,
        pool: Pool,
        *,
        images: Pool | None,
        budget: SharedBudget,
        verify: bool,
        trace: Trace,
    ) -> None:
        self._budget = budget
        self.leaving_nbytes = 0
        self.copies = DeviceCopies()
        self.verify = verify
        self._trace = trace
        self._engine = engine
        self._files = files
        self._pool = pool
        self._images = images
        self._writes: deque[PieceTransfer] = deque()  # in flight, the oldest first
        self._unwanted: list[PieceTransfer] = []  # in flight, and nobody waits for them
        self._unwanted_slots: list[Slot] = []  # something is in flight on them

    # -- memory --------------------------------------------------------------------------------------------------

    @property
    def budget_nbytes(self) -> int | None:
        """Bound of `held_nbytes` now, None for no bound."""
        return self._budget.saved_inputs_limit_nbytes

    @property
    def held_nbytes(self) -> int:
        """What is taken of the budget."""
        return self._budget.held_saved_inputs_nbytes

    @held_nbytes.setter
    def held_nbytes(self, nbytes: int) -> None:
        self._budget.held_saved_inputs_nbytes = nbytes

    def memory(self, nbytes: int) -> HostBuffer | None:
        """Memory of the budget for a whole image, None if there is no room now."""
        budget = self.budget_nbytes
        if budget is not None and self.held_nbytes + nbytes > budget:
            return None
        lent = None
        if self._images is not None:
            buffer = self._images.try_lend(nbytes, "kept inputs")
            if buffer is None:
                return None
            lent = (self._images, buffer)
        self.held_nbytes += nbytes
        return HostBuffer(nbytes, lent=lent, is_counted=True)

    def try_buffer(self, nbytes: int, unit: str) -> HostBuffer | None:
        """Memory for a piece, beside the budget; None if there is none now."""
        buffer = self._pool.try_lend(nbytes, f"an input of unit {unit!r}")
        return None if buffer is None else HostBuffer(nbytes, lent=(self._pool, buffer), is_counted=False)

    def buffer(self, nbytes: int, unit: str, cancel: Callable[[], bool]) -> HostBuffer:
        """Memory for a piece; waits for writes, then calls ``cancel`` to have reads given up."""

        def make_room() -> bool:
            if self._writes:
                self.finish(self._writes.popleft())
                return True
            return cancel()

        buffer = self._pool.lend(nbytes, f"an input of unit {unit!r}", make_room)
        return HostBuffer(nbytes, lent=(self._pool, buffer), is_counted=False)

    def release(self, memory: HostBuffer) -> None:
        """Return memory on which nothing is in flight."""
        if memory.is_counted:
            self.held_nbytes -= memory.nbytes
        memory.release()

    def release_image(self, place: SpillState) -> None:
        """Return the image of ``place``, if it has one."""
        if place.image is not None:
            image, place.image = place.image, None
            self.release(image)

    # -- disk space ----------------------------------------------------------------------------------------------

    def take_slot(self, nbytes: int, unit: str) -> Slot:
        """Disk space for an image."""
        with _naming(unit, "making room on disk"):
            return Slot(self._files.take(nbytes), unit)

    def give_back_slot(self, slot: Slot) -> None:
        """Return disk space, as soon as nothing is in flight on it."""
        if slot.num_writes or slot.num_reads:
            self._unwanted_slots.append(slot)
        else:
            self._files.give_back(slot.extent)

    # -- transfers -----------------------------------------------------------------------------------------------

    def write(self, slot: Slot, begin: int, memory: HostBuffer) -> None:
        """Start to write a piece, and return its memory once it is written. Pieces of a slot come in order."""
        memory.wait_for_copy()
        if self.verify:
            slot.checksum = memory.checksum(slot.checksum)
        self._writes.append(self._start(slot, begin, memory, is_write=True))
        if memory.is_counted:
            self.leaving_nbytes += memory.nbytes

    def read(self, slot: Slot, begin: int, memory: HostBuffer) -> PieceTransfer:
        """Start to read a piece; `finish` or `give_up` must follow."""
        return self._start(slot, begin, memory, is_write=False)

    def _start(self, slot: Slot, begin: int, memory: HostBuffer, *, is_write: bool) -> PieceTransfer:
        start = self._engine.write if is_write else self._engine.read
        extent = slot.extent
        try:
            address = memory.bytes.data_ptr()
            transfer = start(extent.file, extent.offset + begin, address, memory.nbytes, keep=memory.bytes)
        except BaseException:
            self.release(memory)
            raise
        if is_write:
            slot.num_writes += 1
        else:
            slot.num_reads += 1
        self._trace.follow(Lane.WRITE if is_write else Lane.READ, "kept input", slot.unit, memory.nbytes, transfer)
        return PieceTransfer(slot, begin, memory, transfer, is_write)

    def finish(self, move: PieceTransfer) -> None:
        """Wait for a transfer. Memory that was read into is the caller's then, unless this raises.

        Raises:
            IOFailure: The transfer failed; names the unit and the file.
        """
        what = "writing an input to disk" if move.is_write else "reading an input from disk"
        try:
            with _naming(move.slot.unit, what), self._trace.span(Lane.WAIT, "wait for kept inputs", move.slot.unit):
                move.transfer.wait()  # sync: the disk
        except DeadlineError:
            self._unwanted.append(move)  # still in flight, and still owns its memory
            raise
        except IOFailure as error:
            if move.is_write:
                move.slot.error = _without_traceback(error)
            self._end(move, keeps_memory=False)
            raise
        self._end(move, keeps_memory=not move.is_write)

    def finish_writes(self, slot: Slot) -> None:
        """Wait until all of a slot is written.

        Raises:
            IOFailure: A write failed, now or before.
        """
        while slot.num_writes and self._writes:
            self.finish(self._writes.popleft())
        if slot.error is not None:
            raise _without_traceback(slot.error)

    def finish_leaving(self) -> bool:
        """Wait until some memory of the budget is written and free; False if none is being written."""
        while self.leaving_nbytes and self._writes:
            move = self._writes.popleft()
            is_counted = move.memory.is_counted
            self.finish(move)
            if is_counted:
                return True
        return False

    def give_up(self, moves: Iterable[PieceTransfer]) -> None:
        """Nobody wants these transfers any more: their memory returns when they are over."""
        self._unwanted.extend(moves)

    def drop(self, moves: Iterable[PieceTransfer]) -> None:
        """Wait for transfers that nobody wants any more and return their memory, whatever became of them."""
        for move in moves:
            with suppress(SSDOffloadError):
                move.transfer.wait()  # sync: the disk
            if move.transfer.done():
                self._end(move, keeps_memory=False)
            else:
                self._unwanted.append(move)

    def drop_unwanted(self) -> bool:
        """Wait for one that was given up; False if there is none, or it does not end."""
        if not self._unwanted:
            return False
        before = len(self._unwanted)
        self.drop([self._unwanted.pop(0)])
        return len(self._unwanted) < before

    def collect(self) -> None:
        """Take back what is over.

        Raises:
            IOFailure: A write failed.
        """
        still = [move for move in self._unwanted if not move.transfer.done()]
        over = [move for move in self._unwanted if move not in still]
        self._unwanted = still
        for move in over:
            self._end(move, keeps_memory=False)
        slots, self._unwanted_slots = self._unwanted_slots, []
        for slot in slots:
            self.give_back_slot(slot)
        while self._writes and self._writes[0].transfer.done():
            self.finish(self._writes.popleft())

    def close(self) -> None:
        """Wait for everything and close the files; what failed no longer matters."""
        moves = [*self._writes, *self._unwanted]
        self._writes.clear()
        self._unwanted.clear()
        self.drop(moves)
        self._unwanted_slots.clear()
        self._files.close()

    def _end(self, move: PieceTransfer, *, keeps_memory: bool) -> None:
        if move.is_write:
            move.slot.num_writes -= 1
            if move.memory.is_counted:
                self.leaving_nbytes -= move.memory.nbytes
        else:
            move.slot.num_reads -= 1
        if not keeps_memory:
            self.release(move.memory)


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
    # One that has been raised holds the tensors that the failed calls had in hand, as long as it is kept.
    again = IOFailure(error.errno or 0, error.path, error.offset, error.nbytes)
    again.args = error.args
    return again
