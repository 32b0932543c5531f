"""Memory for a chunk of each kind of a unit while it is updated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.io.engine import Transfer
from lightning_ssd.memory.pool import Pool
from lightning_ssd.sizes import round_up
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.strides import Stride


class ChunkBuffer:
    """A buffer for one chunk of every kind, and the transfers under way on it.

    Args:
        pool: Lends the buffer.
        sizes: Kinds and their bytes.
        owner: The unit, for messages.
        nbytes: At least so many bytes are lent: buffers of equal size leave no gaps in the pool.
        make_room: See `Pool.lend`.
    """

    def __init__(
        self,
        pool: Pool,
        sizes: list[tuple[str, int]],
        owner: str,
        *,
        nbytes: int = 0,
        make_room: Callable[[], bool] | None = None,
    ) -> None:
        self._pool = pool
        self._transfers: list[Transfer] = []
        self._places: dict[str, tuple[int, int]] = {}  # offset and bytes of a kind
        end = 0
        for kind, size in sizes:
            self._places[kind] = (end, size)
            end += round_up(size)
        self._buffer = pool.lend(max(end, nbytes), f"update of unit {owner!r}", make_room)

    def add(
        self,
        start: Callable[..., Transfer],
        generation: Generation,
        kind: str,
        offset: int,
        nbytes: int,
        out: Tensor | None = None,
    ) -> None:
        """Start a transfer of bytes of a generation's data section: from or to ``out``, else the buffer's memory."""
        if not nbytes:  # a unit of parameters without elements
            return
        if out is None:
            address = self._buffer.address + self._places[kind][0]
            transfer = start(generation, offset, address, nbytes, keep=self._buffer.hold())
        else:
            transfer = start(generation, offset, out.data_ptr() + offset, nbytes, keep=out)
        self._transfers.append(transfer)

    def clear(self, kind: str) -> None:
        """Zeros, for a kind that has no generation yet."""
        self._buffer.fill(0, *self._places[kind])

    def tensor(
        self, kind: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0, stride: Stride | None = None
    ) -> Tensor:
        """A tensor at byte ``offset`` of the memory of ``kind``."""
        return self._buffer.tensor(self._places[kind][0] + offset, dtype, shape, stride)

    def wait(self) -> None:
        """Return when the transfers are over.

        Raises:
            IOFailure: One of them failed.
        """
        while self._transfers:
            self._transfers[0].wait()
            del self._transfers[0]

    def close(self) -> None:
        """Give the buffer back, after the transfers on it are over."""
        for transfer in self._transfers:
            with suppress(SSDOffloadError):  # reported by `wait`, or another error is on its way up
                transfer.wait()
        self._transfers.clear()
        self._pool.give_back(self._buffer)
