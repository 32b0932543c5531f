"""Host buffers, and what a saved input has of them, of disk space and of device memory. Sizes in bytes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ssd.activations.spill_files import Extent
from lightning_ssd.device.streams import Event, Streams, WaitFor
from lightning_ssd.io.engine import Transfer
from lightning_ssd.kernels.api import crc32c
from lightning_ssd.memory.pool import Buffer, Pool
from lightning_ssd.sizes import BLOCK_NBYTES


class HostBuffer:
    """Host memory of whole blocks: of a pool, for a piece; or of its own, for all aligned bytes of a saved input.

    Args:
        nbytes: Its size, a multiple of 4096.
        lent: The pool that it comes from and goes back to, and its buffer there; None to allocate it.
        is_counted: It counts against the budget.

    Attributes:
        bytes: 1D uint8, 4096-aligned.
        copied: The end of the last copy between it and the device; None if there was none.
    """

    def __init__(self, nbytes: int, *, lent: tuple[Pool, Buffer] | None = None, is_counted: bool = False) -> None:
        self._lent = lent
        self.copied: Event | None = None
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
        """CRC32C of its bytes, continued from ``initial``, that of the bytes before."""
        return crc32c(self.bytes.data_ptr(), self.nbytes, initial)

    def fill(self, begin: int, data: Tensor, data_begin: int, streams: Streams, made: Event | None) -> None:
        """Copy the aligned bytes from index ``begin`` on into it; ``data``, on any device, starts at ``data_begin``.

        On a device compute has made them by ``made``; the caller holds ``data`` until `copied` is over.
        """
        first = max(begin, data_begin)
        last = min(begin + self.nbytes, data_begin + data.numel())
        part = data[first - data_begin : last - data_begin]
        self.copied = streams.to_host(part, self.bytes[first - begin : last - begin], made)
        ctypes.memset(self.bytes.data_ptr(), 0, first - begin)
        ctypes.memset(self.bytes.data_ptr() + last - begin, 0, begin + self.nbytes - last)

    def copy_to(self, data: Tensor, streams: Streams, free: Event) -> None:
        """Copy all of it to ``data``, which is 1D uint8 on any device, and which compute leaves alone from ``free`` on.

        See `Streams.to_device`.
        """
        after = [free] if self.copied is None else [free, self.copied]
        self.copied = streams.to_device(self.bytes, data, *after)

    @property
    def is_idle(self) -> bool:
        """Whether no copy is under way, so that the disk or a new owner may have the memory."""
        return self.copied is None or self.copied.query()

    def wait_for_copy(self) -> None:
        """Return when it is idle."""
        if self.copied is not None:
            self.copied.wait(WaitFor.INPUT_BUFFER)  # sync: a copy

    def release(self) -> None:
        """Free it, or return it to its pool; it is idle, and no transfer on it is in flight."""
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        if self._lent is not None:
            pool, buffer = self._lent
            self._lent = None
            pool.give_back(buffer)


@dataclass(eq=False)
class PieceTransfer:
    """A transfer between a buffer and the part of an extent that starts ``begin`` bytes into it."""

    extent: Extent
    begin: int
    buffer: HostBuffer
    transfer: Transfer
    is_write: bool


class Reload(NamedTuple):
    """Device memory, allocated by compute, into which a saved input is copied.

    Attributes:
        data: 1D uint8; compute must use ``copied`` before it is read or dropped.
        copied: The end of the copy.
    """

    data: Tensor
    copied: Event | None


@dataclass(eq=False)
class SpillState:
    """Memory and disk space that a saved input has. It outlives the input, so that both can be returned.

    Attributes:
        counted_nbytes: What its own values in memory count against the budget.
        device_nbytes: Device memory that was lent to it, so that its values stay there.
        extent: Where its aligned bytes were written to, or are being written.
        host_copy: Its aligned bytes in host memory.
        host_copy_read: The read that fills ``host_copy``, until it is over.
        pieces: Reads ahead of the first pieces, each into a buffer of the pool.
        reload: Its aligned bytes in new memory of the device, for the next frame that needs them.
    """

    counted_nbytes: int = 0
    device_nbytes: int = 0
    extent: Extent | None = None
    host_copy: HostBuffer | None = None
    host_copy_read: PieceTransfer | None = None
    pieces: list[PieceTransfer] = field(default_factory=list)
    reload: Reload | None = None
