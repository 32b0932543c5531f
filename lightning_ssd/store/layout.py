"""Where every byte of one kind of one unit is, on disk and in memory. Pure arithmetic: sizes and offsets in bytes.

All tensors of a kind have one dtype, and every kind of a unit has them in the same order. So element ``i`` of the unit
is element ``i`` of each of its files, and a range of elements is one contiguous range of bytes in each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lightning_ssd.errors import listed
from lightning_ssd.sizes import BLOCK_NBYTES, round_up
from lightning_ssd.store.safetensors_header import ITEMSIZE, TensorEntry, encode_header
from lightning_ssd.store.strides import Stride

CHECK_NBYTES = 1 << 20
"""Bytes of the data section under one CRC32C."""

MEMORY_ALIGNMENT = 64
"""Alignment of a tensor in a buffer, as of torch's own allocator, so that compute takes the same code paths."""


@dataclass(frozen=True)
class Shape:
    """Name, shape and, where they are not those of the shape, strides of one parameter; [Note: strides]."""

    name: str
    shape: tuple[int, ...]
    stride: Stride | None = None

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Segment:
    """The part of one parameter that lies in a range of a unit's elements."""

    index: int  # which parameter of the unit
    begin: int  # first element, counted in the unit
    end: int
    offset: int  # first element, counted in the parameter

    @property
    def numel(self) -> int:
        """Elements."""
        return self.end - self.begin


@dataclass(frozen=True)
class UnitLayout:
    """One kind of one unit: the file that holds it and the buffer that it is read into.

    Attributes:
        unit: Name of the unit.
        kind: What the tensors are: ``param``, ``master``, ``exp_avg``, ...
        dtype: Safetensors dtype of every tensor.
        entries: One per parameter, in file order; offsets count from the data section.
        header: Bytes before the data section, a multiple of 4096.
        numel: Elements of all parameters.
        places: Byte offset of each parameter in the buffer, a multiple of 64. It is its offset in the data section if
            that is aligned; the other parameters are copied behind the last block after a read.
        buffer_nbytes: Bytes of the buffer, a multiple of 4096.
    """

    unit: str
    kind: str
    dtype: str
    entries: tuple[TensorEntry, ...]
    header: bytes
    numel: int
    places: tuple[int, ...]
    buffer_nbytes: int

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZE[self.dtype]

    @property
    def data_begin(self) -> int:
        """Offset of the data section in the file."""
        return len(self.header)

    @property
    def data_nbytes(self) -> int:
        """Bytes of the data section."""
        return self.numel * self.itemsize

    @property
    def file_nbytes(self) -> int:
        """Bytes of the file."""
        return self.data_begin + self.data_nbytes

    def about(self, offset: int) -> str:
        """Names of what is in the block at byte ``offset`` of the file, for messages."""
        found = [
            e.name
            for e in self.entries
            if e.begin <= offset + BLOCK_NBYTES - self.data_begin and e.end > offset - self.data_begin
        ]
        return f"{self.kind} of unit {self.unit!r}, parameter {listed(found, 2)}"

    def segments(self, begin: int, end: int) -> Iterator[Segment]:
        """The parts of parameters in elements ``[begin, end)`` of the unit; empty parameters have none."""
        for index, entry in enumerate(self.entries):
            first, last = entry.begin // self.itemsize, entry.end // self.itemsize
            low, high = max(first, begin), min(last, end)
            if low < high:
                yield Segment(index, low, high, low - first)


def file_order(shapes: Iterable[Shape], itemsize: int) -> list[Shape]:
    """The order of parameters in a unit's files: first those whose size keeps the next one aligned."""
    return sorted(shapes, key=lambda shape: shape.numel * itemsize % MEMORY_ALIGNMENT != 0)


def lay_out(unit: str, kind: str, shapes: Sequence[Shape], dtype: str) -> UnitLayout:
    """Lay out one kind of a unit.

    Args:
        unit: Name of the unit.
        kind: Name of the kind.
        shapes: Its tensors, in file order.
        dtype: Their safetensors dtype.

    Raises:
        CheckpointError: Two parameters have one name, or a size is out of range.
    """
    itemsize = ITEMSIZE[dtype]
    entries: list[TensorEntry] = []
    position = 0
    for shape in shapes:
        end = position + shape.numel * itemsize
        entries.append(TensorEntry(shape.name, dtype, shape.shape, position, end, shape.stride))
        position = end
    header = encode_header(entries, {"unit": unit, "kind": kind, "format": "pt"})
    places, buffer_nbytes = _places(entries, position)
    return UnitLayout(unit, kind, dtype, tuple(entries), header, position // itemsize, places, buffer_nbytes)


def suffix_of(kind: str) -> str:
    """The suffix of ``kind`` that names its optimizer among several over the same parameters; empty for the first."""
    _, mark, number = kind.partition("@")
    return mark + number


def chunks(numel: int, chunk_numel: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``chunk_numel`` elements that cover ``[0, numel)``."""
    for begin in range(0, numel, chunk_numel):
        yield begin, min(begin + chunk_numel, numel)


def _places(entries: Sequence[TensorEntry], data_nbytes: int) -> tuple[tuple[int, ...], int]:
    places = []
    moved_to = round_up(data_nbytes)
    for entry in entries:
        if entry.begin % MEMORY_ALIGNMENT == 0 or entry.nbytes == 0:
            places.append(entry.begin)
        else:
            places.append(moved_to)
            moved_to = round_up(moved_to + entry.nbytes, MEMORY_ALIGNMENT)
    return tuple(places), max(round_up(moved_to), BLOCK_NBYTES)
