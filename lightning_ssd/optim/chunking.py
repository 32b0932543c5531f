"""How an update is cut into chunks, and the memory for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lightning_ssd.kernels.bits import BLOCK_NUMEL
from lightning_ssd.memory.plan import CHUNK_STEP_NUMEL
from lightning_ssd.memory.pool import Pool
from lightning_ssd.optim.state_tensors import UpdateTensors
from lightning_ssd.sizes import round_up
from lightning_ssd.store.chunk_buffer import ChunkBuffer
from lightning_ssd.store.layout import UnitLayout, chunks

CHUNKS_PER_UNIT = 16
"""A unit is cut into at least this many chunks, unless they would be too small."""


class Chunking(NamedTuple):
    """How the update of one unit is cut.

    Attributes:
        ranges: Elements of each chunk.
        depth: Chunks in memory at a time.
        sizes: Kinds that stream, and bytes of a chunk of each.
        pool: Memory for chunks.
        buffer_nbytes: Bytes of the buffer for one chunk.
    """

    ranges: list[tuple[int, int]]
    depth: int
    sizes: list[tuple[str, int]]
    pool: Pool
    buffer_nbytes: int

    def lend(self, unit: str, make_room: Callable[[], bool]) -> ChunkBuffer:
        """A buffer for one chunk of ``unit``; see `Pool.lend`."""
        return ChunkBuffer(self.pool, self.sizes, unit, nbytes=self.buffer_nbytes, make_room=make_room)


class UpdatePools:
    """Memory for updates.

    Args:
        pool: ``depth`` chunk buffers of equal size.
        chunk_numel: Elements of a chunk, a multiple of 2**19.
        depth: Chunks in memory at a time.
    """

    def __init__(self, pool: Pool, *, chunk_numel: int, depth: int) -> None:
        self._pool = pool
        self._chunk_numel = chunk_numel
        self._depth = depth
        self._buffer_nbytes = pool.nbytes // depth
        self._larger: Pool | None = None
        self._blocks: Pool | None = None

    def chunking(self, layout: UnitLayout, tensors: UpdateTensors) -> Chunking:
        """How the update of a unit is cut; ``layout`` is that of its parameters."""
        # A chunk of each kind is a multiple of 512 KiB. Many chunks: nothing is computed while the first is read.
        step = CHUNK_STEP_NUMEL * (2 if any(state.layout.itemsize == 1 for state in tensors.streamed) else 1)
        most = layout.numel // CHUNKS_PER_UNIT // step * step
        numel = min(max(min(self._chunk_numel, most), step), max(layout.numel, 1))
        ranges = list(chunks(layout.numel, numel))
        if tensors.by_block:
            ranges = without_cut_blocks(layout, ranges)
            numel = max((end - begin for begin, end in ranges), default=numel)
        sizes = [(state.kind, state.layout.itemsize * numel) for state in tensors.streamed]
        depth = min(self._depth, len(ranges))
        nbytes = sum(round_up(nbytes) for _, nbytes in sizes)
        if nbytes <= self._buffer_nbytes:
            return Chunking(ranges, depth, sizes, self._pool, self._buffer_nbytes)
        # The plan was for another rule: that of another optimizer, or of the one that this one replaced.
        depth = max(min(depth, self._pool.nbytes // nbytes), 1)
        return Chunking(ranges, depth, sizes, self.pool_for(nbytes), nbytes)

    def pool_for(self, nbytes: int) -> Pool:
        """The pool for updates, or a larger one where that is too small.

        It is if the optimizer class makes states that it did not make when it was tried, if the optimizer replaced
        another one after setup, or if blocks keep a unit from being cut.
        """
        if nbytes <= self._pool.nbytes:
            return self._pool
        if self._larger is None or self._larger.nbytes < nbytes:
            self._larger = Pool(nbytes, "update, beside the plan")
        return self._larger

    def lend_blocks(self, unit: str, tensors: UpdateTensors, make_room: Callable[[], bool]) -> ChunkBuffer:
        """A buffer for all of what is by block; that of the update before may still be written."""
        sizes = [(state.kind, max(state.layout.data_nbytes, 1)) for state in tensors.by_block]
        nbytes = sum(round_up(nbytes) for _, nbytes in sizes)
        if self._blocks is None or self._blocks.nbytes < 2 * nbytes:
            self._blocks = Pool(2 * nbytes, "numbers of blocks in an update")
        return ChunkBuffer(self._blocks, sizes, unit, make_room=make_room)


def without_cut_blocks(layout: UnitLayout, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """``ranges``, joined where one ends within a block of a parameter."""
    joined: list[tuple[int, int]] = []
    begin = 0
    for _, end in ranges:
        if all(segment.offset % BLOCK_NUMEL == 0 for segment in layout.segments(end, end + 1)):
            joined.append((begin, end))
            begin = end
    return joined
