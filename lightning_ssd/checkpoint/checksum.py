"""CRC32C of bytes, in pieces of 1 MiB."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_ssd.kernels.api import crc32c
from lightning_ssd.sizes import MiB

PIECE_NBYTES = MiB
"""Bytes of the data section that one checksum of the manifest covers."""

Bytes = bytes | bytearray | memoryview | npt.NDArray[np.uint8]
"""Anything whose bytes can be read where they lie."""


def checksum(data: Bytes, initial: int = 0) -> int:
    """CRC32C of ``data``, continuing from the checksum ``initial`` of the bytes before it."""
    view = np.frombuffer(data, dtype=np.uint8)
    return crc32c(view.ctypes.data, view.nbytes, initial) if view.nbytes else initial


def num_pieces(nbytes: int) -> int:
    """Checksums that cover ``nbytes`` bytes."""
    return -(-nbytes // PIECE_NBYTES)
