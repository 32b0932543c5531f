"""Brings saved inputs back: reads them ahead of time, and makes tensors of them on their device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from lightning_ssd.activations.saved_input import SavedInput
from lightning_ssd.activations.spill_files import Extent
from lightning_ssd.activations.spill_io import HostBuffer, SpillIO, SpillState
from lightning_ssd.errors import CorruptionError, SSDOffloadError
from lightning_ssd.trace.recorder import Trace


class Reloader:
    """Reads saved inputs from disk: into counted memory where there is room, else through buffers of the pool.

    Args:
        io: Reads the pieces.
        piece_nbytes: Size of a piece.
        trace: Gets the events ``preload`` and ``load``.
    """

    def __init__(self, io: SpillIO, piece_nbytes: int, trace: Trace) -> None:
        self._io = io
        self._piece_nbytes = piece_nbytes
        self._trace = trace

    def load(self, saved: SavedInput, *, again: bool) -> Tensor:
        """A tensor with the values of ``saved``.

        Args:
            saved: What to load.
            again: Another frame will load it too, so its host copy stays if there is room for one.
        """
        if saved.has_values:
            return saved.values.detach()
        state, layout = saved.state, saved.layout
        if state.extent is not None:
            self._io.finish_writes(state.extent)
            if again and state.host_copy is None and not state.pieces:
                self._start_host_copy(saved, state.extent)
        if state.host_copy is None:
            return layout.tensor_on(self._read_by_pieces(saved))
        host_copy = self._finished_host_copy(saved, state.host_copy)
        if self._io.copies.is_off_host(layout.device):
            data = _allocate(saved)
            host_copy.copy_to(data, self._io.copies)
        else:
            data = host_copy.bytes
        if state.extent is not None and not again:
            self._io.release_host_copy(state)
        return layout.tensor_on(data)

    def read_ahead(self, saved: SavedInput) -> bool:
        """Start to read ``saved`` if it is on disk only; False if there is no room for all of it now."""
        state, extent = saved.state, saved.state.extent
        if extent is None or extent.error is not None or state.host_copy is not None:
            return True
        if extent.num_writes or state.pieces:
            return False
        if self._start_host_copy(saved, extent):
            return True
        for begin in range(0, saved.layout.aligned_nbytes, self._piece_nbytes):
            buffer = self._io.try_pool_buffer(self._nbytes_at(saved, begin), saved.unit)
            if buffer is None:
                return False
            if begin == 0:
                self._trace.mark("preload", saved.unit)
            state.pieces.append(self._io.read(extent, begin, buffer))
            self._io.read_ahead[state] = None
        return True

    def abandon(self, state: SpillState) -> None:
        """Nobody wants what was read ahead."""
        self._io.abandon(self._io.take_pieces(state))
        if state.host_copy_read is not None:
            self._io.abandon([state.host_copy_read])
            state.host_copy = state.host_copy_read = None

    def _start_host_copy(self, saved: SavedInput, extent: Extent) -> bool:
        """Start to read all of ``saved`` into counted memory; False if there is no room."""
        buffer = self._io.try_counted_buffer(saved.layout.aligned_nbytes)
        if buffer is None:
            return False
        self._trace.mark("preload", saved.unit)
        saved.state.host_copy_read = self._io.read(extent, 0, buffer)
        saved.state.host_copy = buffer
        return True

    def _finished_host_copy(self, saved: SavedInput, host_copy: HostBuffer) -> HostBuffer:
        """``host_copy``, the one of ``saved``, once it is read and verified."""
        state, read = saved.state, saved.state.host_copy_read
        if read is not None:
            state.host_copy = state.host_copy_read = None  # a read that fails returns the memory itself
            self._io.finish(read)
            state.host_copy = host_copy
            self._trace.mark("load", saved.unit)
            if self._io.verify:
                _require_checksum(saved, read.extent, host_copy.checksum(0))
        return host_copy

    def _read_by_pieces(self, saved: SavedInput) -> Tensor:
        """The aligned bytes of ``saved`` on its device, read by pieces; the first may have been read ahead."""
        io, extent, nbytes = self._io, saved.state.extent, saved.layout.aligned_nbytes
        if extent is None:
            raise SSDOffloadError(f"unit {saved.unit!r}: an input saved for recompute was lost when the disk failed")
        pieces = deque(io.take_pieces(saved.state))
        data = _allocate(saved)
        begin = sum(piece.buffer.nbytes for piece in pieces)
        checksum = 0
        try:
            while begin < nbytes or pieces:
                while begin < nbytes:
                    piece_nbytes = self._nbytes_at(saved, begin)
                    buffer = io.try_pool_buffer(piece_nbytes, saved.unit)
                    if buffer is None and pieces:
                        break  # one of ours is about to be free
                    pieces.append(io.read(extent, begin, buffer or io.pool_buffer(piece_nbytes, saved.unit)))
                    begin += piece_nbytes
                piece = pieces.popleft()
                io.finish(piece)
                checksum = piece.buffer.checksum(checksum) if io.verify else 0
                piece.buffer.copy_to(data[piece.begin : piece.begin + piece.buffer.nbytes], io.copies)
                io.release(piece.buffer)
        except BaseException:
            io.abandon(pieces)
            raise
        self._trace.mark("load", saved.unit)
        if io.verify:
            _require_checksum(saved, extent, checksum)
        return data

    def _nbytes_at(self, saved: SavedInput, begin: int) -> int:
        """Size of the piece that starts at ``begin``."""
        return min(self._piece_nbytes, saved.layout.aligned_nbytes - begin)


def _allocate(saved: SavedInput) -> Tensor:
    """Memory for the aligned bytes of ``saved`` on its device. It belongs to compute, and does not count."""
    if saved.layout.device.type == "cpu":
        return HostBuffer(saved.layout.aligned_nbytes).bytes
    return torch.empty(saved.layout.aligned_nbytes, dtype=torch.uint8, device=saved.layout.device)


def _require_checksum(saved: SavedInput, extent: Extent, checksum: int) -> None:
    if checksum != extent.checksum:
        raise CorruptionError(
            f"unit {saved.unit!r}: an input saved for recompute came back changed from bytes {extent.offset} to "
            f"{extent.offset + extent.nbytes} of {extent.file.path!r}; the disk or the memory is not reliable"
        )
