"""What tensors hold, summed up, to see whether somebody wrote to them: ``p.data`` has no version that would tell."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterable

from torch import Tensor

from lightning_ssd.kernels.api import crc32c, is_native
from lightning_ssd.store.strides import flatten, stride_of


def fingerprint(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """A checksum of each tensor that is not empty."""
    return tuple(_checksum(tensor.detach()) for tensor in tensors if tensor.numel())


def _checksum(tensor: Tensor) -> int:
    host = flatten(tensor.cpu(), tensor.shape, stride_of(tensor)).contiguous()  # in the order of its memory
    if is_native():
        return crc32c(host.data_ptr(), host.nbytes)
    return zlib.crc32((ctypes.c_char * host.nbytes).from_address(host.data_ptr()))
