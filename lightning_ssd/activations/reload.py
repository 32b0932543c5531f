"""Brings saved inputs back: reads them ahead of time, and makes tensors of them on their device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from lightning_ssd.activations.saved_input import SavedInput
from lightning_ssd.activations.spill_files import Extent
from lightning_ssd.activations.spill_io import SpillIO
from lightning_ssd.activations.spill_state import HostBuffer, Reload, SpillState
from lightning_ssd.device.streams import Event
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
        if state.extent is not None and state.reload is None:
            self._io.finish_writes(state.extent)
            if again and state.host_copy is None and not state.pieces:
                self._start_host_copy(saved, state.extent)
        data = self._on_device(saved) if self._io.streams.is_off_host(layout.device) else self._on_host(saved)
        if state.extent is not None and not again:
            self._io.release_host_copy(state)
        return layout.tensor_on(data)

    def _on_host(self, saved: SavedInput) -> Tensor:
        """The aligned bytes of ``saved``; waits for the disk."""
        host_copy = saved.state.host_copy
        if host_copy is not None:
            return self._finished_host_copy(saved, host_copy).bytes
        data = HostBuffer(saved.layout.aligned_nbytes).bytes  # it belongs to compute, and does not count
        self._read_by_pieces(saved, data, self._io.streams.mark())
        return data

    def _on_device(self, saved: SavedInput) -> Tensor:
        """The aligned bytes of ``saved`` on its device, where compute waits for them."""
        reload, saved.state.reload = saved.state.reload, None
        if reload is None:
            reload = self._start_reload(saved)
        self._io.streams.use(reload.copied)
        return reload.data

    def reload_ahead(self, saved: SavedInput) -> None:
        """Start to copy ``saved``, which the next frame needs, to its device, if it is in host memory by now."""
        state, pieces = saved.state, saved.state.pieces
        if not self._io.streams.is_off_host(saved.layout.device) or saved.has_values or state.reload is not None:
            return
        if state.host_copy is not None:
            is_there = state.host_copy_read is None or state.host_copy_read.transfer.done()
        else:
            nbytes = sum(piece.buffer.nbytes for piece in pieces)
            is_there = nbytes == saved.layout.aligned_nbytes and all(piece.transfer.done() for piece in pieces)
        if is_there:
            state.reload = self._start_reload(saved)

    def _start_reload(self, saved: SavedInput) -> Reload:
        """Start to copy ``saved`` to memory that compute allocates now; waits for the disk if that still reads it."""
        layout, streams = saved.layout, self._io.streams
        data = torch.empty(layout.aligned_nbytes, dtype=torch.uint8, device=layout.device)
        free, host_copy = streams.mark(), saved.state.host_copy
        if host_copy is None:
            return Reload(data, self._read_by_pieces(saved, data, free))
        host_copy = self._finished_host_copy(saved, host_copy)
        host_copy.copy_to(data, streams, free)
        return Reload(data, host_copy.copied)

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
        if state.reload is not None:
            self._io.streams.use(state.reload.copied)  # what compute puts into its memory comes after the copy
            state.reload = None

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

    def _read_by_pieces(self, saved: SavedInput, data: Tensor, free: Event) -> Event | None:
        """Read the aligned bytes of ``saved`` into ``data`` by pieces; the first may have been read ahead.

        Args:
            saved: What to read.
            data: 1D uint8 where compute wants it.
            free: By then compute uses its memory for nothing else.

        Returns:
            The event after which ``data`` has the values; None if it has them.
        """
        io, extent, nbytes = self._io, saved.state.extent, saved.layout.aligned_nbytes
        if extent is None:
            raise SSDOffloadError(f"unit {saved.unit!r}: an input saved for recompute was lost when the disk failed")
        pieces = deque(io.take_pieces(saved.state))
        begin = sum(piece.buffer.nbytes for piece in pieces)
        checksum = 0
        copied: Event | None = None
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
                piece.buffer.copy_to(data[piece.begin : piece.begin + piece.buffer.nbytes], io.streams, free)
                copied = piece.buffer.copied
                io.release(piece.buffer)
            if io.verify:
                _require_checksum(saved, extent, checksum)
        except BaseException:
            io.abandon(pieces)
            io.streams.use(copied)  # ``data`` is dropped
            raise
        self._trace.mark("load", saved.unit)
        return copied

    def _nbytes_at(self, saved: SavedInput, begin: int) -> int:
        """Size of the piece that starts at ``begin``."""
        return min(self._piece_nbytes, saved.layout.aligned_nbytes - begin)


def _require_checksum(saved: SavedInput, extent: Extent, checksum: int) -> None:
    if checksum != extent.checksum:
        raise CorruptionError(
            f"unit {saved.unit!r}: an input saved for recompute came back changed from bytes {extent.offset} to "
            f"{extent.offset + extent.nbytes} of {extent.file.path!r}; the disk or the memory is not reliable"
        )
