"""What tensors hold, summed up, to see whether somebody wrote to them: ``p.data`` has no version that would tell."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_ssd.kernels.api import crc32c, is_native
from lightning_ssd.store.strides import flatten, stride_of

Fingerprint: TypeAlias = "tuple[int, ...] | DeviceSums"

_CHUNK_NUMEL = 1 << 17
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def fingerprint(tensors: Iterable[Tensor]) -> Fingerprint:
    """A checksum of each tensor that is not empty; the host does not wait for those of a device until it compares."""
    filled = [tensor.detach() for tensor in tensors if tensor.numel()]
    if filled and filled[0].device.type != "cpu":
        return DeviceSums(torch.stack([_sum(tensor) for tensor in filled]))
    return tuple(map(_checksum, filled))


class DeviceSums:
    """Checksums on a device.

    Args:
        sums: 1D int64.
    """

    def __init__(self, sums: Tensor) -> None:
        self._sums = sums

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeviceSums) and torch.equal(self._sums, other._sums)  # sync: compute

    __hash__ = None  # type: ignore[assignment]


def _sum(tensor: Tensor) -> Tensor:
    """The sum, modulo 2^64, of the elements' bits, each times an odd number that depends on its place.

    So a change of one element always shows, and of several but for one case in about 2^64. 0D int64 on the device.
    """
    flat = flatten(tensor, tensor.shape, stride_of(tensor)).contiguous()
    bits = flat.view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, bits.numel(), _CHUNK_NUMEL):
        piece = bits[begin : begin + _CHUNK_NUMEL].to(torch.int64)
        total += _weights(begin, piece.numel(), tensor.device).mul_(piece).sum()
    return total


def _weights(begin: int, numel: int, device: torch.device) -> Tensor:
    """Numbers without structure, as those of SplitMix (Steele, Lea and Flood, OOPSLA 2014); they are odd."""
    mixed = torch.arange(begin + 1, begin + 1 + numel, device=device).mul_(-0x61C8864680B583EB)
    mixed = mixed.bitwise_xor_(mixed >> 30).mul_(-0x40A7B892E31B1A47)
    mixed = mixed.bitwise_xor_(mixed >> 27).mul_(-0x6B2FB644ECCEEE15)
    return mixed.bitwise_xor_(mixed >> 31).bitwise_or_(1)


def _checksum(tensor: Tensor) -> int:
    host = flatten(tensor.cpu(), tensor.shape, stride_of(tensor)).contiguous()  # in the order of its memory
    if is_native():
        return crc32c(host.data_ptr(), host.nbytes)
    return zlib.crc32((ctypes.c_char * host.nbytes).from_address(host.data_ptr()))
