"""Brings kept values back: reads images and pieces of them ahead of time, and makes tensors of them on their device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ssd.activations.saved_input import SavedInput
from lightning_ssd.activations.spill_io import HostBuffer, Slot, SpillIO, SpillState
from lightning_ssd.errors import CorruptionError, SSDOffloadError
from lightning_ssd.trace.recorder import Trace


class Reloader:
    """Reads entries from disk; into memory of the budget where there is room, else through the buffers of the pool.

    Args:
        shuttle: Moves the pieces.
        buffer_nbytes: Size of a piece.
        trace: Gets the events ``preload`` and ``load``.
        cancel: Has something read ahead given up; False if there is nothing.
    """

    def __init__(self, shuttle: SpillIO, buffer_nbytes: int, trace: Trace, cancel: Callable[[], bool]) -> None:
        self._shuttle = shuttle
        self._buffer_nbytes = buffer_nbytes
        self._trace = trace
        self._cancel = cancel

    def load(self, entry: SavedInput, *, again: bool) -> Tensor:
        """A tensor with the values of ``entry``; ``again``: another frame will ask for them too."""
        if entry.has_values:
            return entry.values.detach()
        place, form = entry.place, entry.form
        if place.slot is not None:
            self._shuttle.finish_writes(place.slot)
        if again and place.image is None and not place.pieces:
            self._read_image(entry)
        if place.image is None:
            return form.tensor_on(self._read_through(entry))
        image = self._finished(entry)
        if image.is_lent or self._shuttle.copies.is_off_host(form.device):
            data = _room(entry)
            image.copy_to(data, self._shuttle.copies)
        else:
            data = image.bytes
        if place.slot is not None and not again:
            self._shuttle.release_image(place)
        return form.tensor_on(data)

    def read_ahead(self, entry: SavedInput) -> bool:
        """Start to read ``entry`` if it is on disk; False if there is no room for all of it."""
        place = entry.place
        if place.slot is None or place.slot.error is not None or place.image is not None:
            return True
        if place.slot.num_writes or place.pieces:
            return False
        if self._read_image(entry):
            return True
        for begin in range(0, entry.form.nbytes, self._buffer_nbytes):
            memory = self._shuttle.try_buffer(self._piece_nbytes(entry, begin), entry.unit)
            if memory is None:
                return False
            if begin == 0:
                self._trace.mark("preload", entry.unit)
            place.pieces.append(self._shuttle.read(place.slot, begin, memory))
        return True

    def give_up(self, place: SpillState) -> None:
        """What was read ahead is not wanted any more."""
        self._shuttle.give_up(place.pieces)
        place.pieces = []
        if place.image_read is not None:
            self._shuttle.give_up([place.image_read])
            place.image = place.image_read = None

    def _read_image(self, entry: SavedInput) -> bool:
        """Start to read all of ``entry`` into memory of the budget; False if there is no room."""
        slot = entry.place.slot
        memory = None if slot is None else self._shuttle.memory(entry.form.nbytes)
        if slot is None or memory is None:
            return False
        self._trace.mark("preload", entry.unit)
        entry.place.image_read = self._shuttle.read(slot, 0, memory)
        entry.place.image = memory
        return True

    def _finished(self, entry: SavedInput) -> HostBuffer:
        """The image of ``entry``, once it is read."""
        place = entry.place
        image, read = place.image, place.image_read
        assert image is not None
        if read is not None:
            place.image = place.image_read = None  # not ours if the read has failed
            self._shuttle.finish(read)
            place.image = image
            self._trace.mark("load", entry.unit)
            if self._shuttle.verify:
                _require_same(entry, read.slot, image.checksum(0))
        return image

    def _read_through(self, entry: SavedInput) -> Tensor:
        """The image of ``entry`` on its device, by pieces; some may have been read ahead."""
        shuttle, slot = self._shuttle, entry.place.slot
        if slot is None:
            raise SSDOffloadError(f"unit {entry.unit!r}: an input kept for recompute was lost when the disk failed")
        pieces, entry.place.pieces = deque(entry.place.pieces), []
        data = _room(entry)
        begin = sum(piece.memory.nbytes for piece in pieces)
        checksum = 0
        try:
            while begin < entry.form.nbytes or pieces:
                while begin < entry.form.nbytes:
                    nbytes = self._piece_nbytes(entry, begin)
                    memory = shuttle.try_buffer(nbytes, entry.unit)
                    if memory is None and pieces:
                        break  # one of ours is about to be free
                    memory = memory or shuttle.buffer(nbytes, entry.unit, self._cancel)
                    pieces.append(shuttle.read(slot, begin, memory))
                    begin += nbytes
                piece = pieces.popleft()
                shuttle.finish(piece)
                checksum = piece.memory.checksum(checksum) if shuttle.verify else 0
                piece.memory.copy_to(data[piece.begin : piece.begin + piece.memory.nbytes], shuttle.copies)
                shuttle.release(piece.memory)
        except BaseException:
            shuttle.give_up(pieces)
            raise
        self._trace.mark("load", entry.unit)
        if shuttle.verify:
            _require_same(entry, slot, checksum)
        return data

    def _piece_nbytes(self, entry: SavedInput, begin: int) -> int:
        return min(self._buffer_nbytes, entry.form.nbytes - begin)


def _room(entry: SavedInput) -> Tensor:
    """Memory for the image of ``entry`` on its device: what compute works on, not ours."""
    if entry.form.device.type == "cpu":
        return HostBuffer(entry.form.nbytes, is_counted=False).bytes
    return torch.empty(entry.form.nbytes, dtype=torch.uint8, device=entry.form.device)


def _require_same(entry: SavedInput, slot: Slot, checksum: int) -> None:
    if checksum != slot.checksum:
        extent = slot.extent
        raise CorruptionError(
            f"unit {entry.unit!r}: an input kept for recompute came back changed from bytes {extent.offset} to "
            f"{extent.offset + extent.nbytes} of {extent.file.path!r}; the disk or the memory is not reliable"
        )
