"""The header of a safetensors file: names, dtypes, shapes and byte ranges. Pure arithmetic in bytes; opens nothing.

A file is: 8 bytes of header length (little endian), a JSON header, and the data section: the tensors one after the
other without holes. We pad the header with spaces, so that the data section starts on a 4096-byte boundary, which
direct I/O needs. A file may come from anywhere, so every number is checked before it is used.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from lightning_ssd.errors import CheckpointError
from lightning_ssd.sizes import round_up
from lightning_ssd.store.strides import Stride, flatten, is_dense, memory_shape, unflatten

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_NBYTES = 100_000_000
"""Longest JSON header that the format's own library accepts, in bytes."""

PREFIX_NBYTES = 8
"""Bytes of the header length at the begin of a file."""

ITEMSIZE: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 2)
    | dict.fromkeys(("U32", "I32", "F32"), 4)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 8)
)
"""Bytes per element of each safetensors dtype that we read; dtypes of less than a byte are not supported."""

_METADATA = "__metadata__"
_STRIDES = "lightning_ssd.strides"
_MAX_COUNT = 2**63
_MAX_DIMS = 64


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: Of the tensor.
        dtype: Its safetensors dtype.
        shape: Its shape.
        begin: Offset of its first byte in the data section.
        end: Offset behind its last byte.
        stride: Its strides in elements, if its elements lie in another order than that of its shape; [Note: strides].
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    stride: Stride | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.nbytes // ITEMSIZE[self.dtype]

    def flatten(self, tensor: Tensor) -> Tensor:
        """``tensor``, of as many elements, 1D in the order of the file; a view if it has the strides."""
        return flatten(tensor, self.shape, self.stride)

    def unflatten(self, flat: Tensor) -> Tensor:
        """``flat``, 1D in the order of the file, with the shape and the strides of the tensor."""
        return unflatten(flat, self.shape, self.stride)


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    Attributes:
        entries: The tensors by name, in file order.
        metadata: What the file says about itself.
        data_begin: Offset of the data section in the file.
    """

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_begin: int

    @property
    def data_nbytes(self) -> int:
        """Bytes of the data section."""
        return max((entry.end for entry in self.entries.values()), default=0)


def encode_header(entries: Iterable[TensorEntry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes before the data section of a file with ``entries``; their number is a multiple of 4096.

    Raises:
        CheckpointError: The entries leave a hole, overlap, repeat a name, or disagree with dtype and shape.
    """
    where = "header to be written"
    ordered = sorted(entries, key=lambda entry: (entry.begin, entry.end))
    content: dict[str, object] = {}
    strided = {entry.name: [entry.shape, entry.stride] for entry in ordered if entry.stride is not None}
    told = {**(metadata or {}), **({_STRIDES: json.dumps(strided)} if strided else {})}
    if told:
        content[_METADATA] = told
    for entry in ordered:
        if entry.name in content or entry.name == _METADATA:
            raise CheckpointError(f"{where}: the name {entry.name!r} is taken twice")
        check_entry(entry, where)
        content[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape if entry.stride is None else memory_shape(entry.shape, entry.stride)),
            "data_offsets": [entry.begin, entry.end],
        }
    check_contiguous(ordered, where)
    try:
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: a name is not valid Unicode: {error}") from error
    data_begin = round_up(PREFIX_NBYTES + len(text))
    if data_begin - PREFIX_NBYTES > MAX_HEADER_NBYTES:
        raise CheckpointError(f"{where}: {len(text)} bytes for {len(ordered)} tensors; readers stop at 100 MB")
    return (data_begin - PREFIX_NBYTES).to_bytes(PREFIX_NBYTES, "little") + text.ljust(data_begin - PREFIX_NBYTES)


def decode_data_begin(first_bytes: bytes, file_nbytes: int, where: str = "safetensors file") -> int:
    """Offset of the data section: how many bytes of the file `decode_header` needs.

    Args:
        first_bytes: At least the first 8 bytes of the file.
        file_nbytes: Bytes of the whole file.
        where: What messages call the file.

    Raises:
        CheckpointError: The file is too short for the header it announces.
    """
    if file_nbytes < PREFIX_NBYTES or len(first_bytes) < PREFIX_NBYTES:
        raise CheckpointError(f"{where}: {file_nbytes} bytes are too few for a safetensors file")
    header_nbytes = int.from_bytes(first_bytes[:PREFIX_NBYTES], "little")
    if header_nbytes > MAX_HEADER_NBYTES or PREFIX_NBYTES + header_nbytes > file_nbytes:
        raise CheckpointError(
            f"{where}: announces a header of {header_nbytes} bytes; the file has {file_nbytes} bytes and a header "
            f"may have {MAX_HEADER_NBYTES}; the file is truncated or no safetensors file"
        )
    return PREFIX_NBYTES + header_nbytes


def decode_header(first_bytes: bytes, file_nbytes: int, where: str = "safetensors file") -> Header:
    """Check and read a header.

    Args:
        first_bytes: The file from its first byte up to at least its data section (see `decode_data_begin`).
        file_nbytes: Bytes of the whole file.
        where: What messages call the file.

    Raises:
        CheckpointError: The header is not exactly as the format says.
    """
    data_begin = decode_data_begin(first_bytes, file_nbytes, where)
    if len(first_bytes) < data_begin:
        raise CheckpointError(f"{where}: the header ends at byte {data_begin}, only {len(first_bytes)} were read")
    text = first_bytes[PREFIX_NBYTES:data_begin]
    if not text.startswith(b"{"):
        raise CheckpointError(f"{where}: the header does not start with '{{'; not a safetensors file")
    content = parse_json_object(text, where)
    metadata = content.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: {_METADATA} must map text to text")
    strided = _decode_strides(metadata, where)
    entries = sorted(
        (_decode_entry(name, value, strided.get(name), where) for name, value in content.items()),
        key=lambda e: (e.begin, e.end),
    )
    data_nbytes = check_contiguous(entries, where)
    if data_begin + data_nbytes != file_nbytes:
        last = f", the last being {entries[-1].name!r}" if entries else ""
        raise CheckpointError(
            f"{where}: header of {data_begin} bytes and {len(entries)} tensors of {data_nbytes} bytes{last} make "
            f"{data_begin + data_nbytes} bytes, the file has {file_nbytes}"
        )
    return Header(MappingProxyType({entry.name: entry for entry in entries}), MappingProxyType(metadata), data_begin)


def check_entry(entry: TensorEntry, where: str) -> None:
    """Check that dtype, shape and byte range of one tensor agree.

    Raises:
        CheckpointError: They do not, or a number is out of range.
    """
    what = f"{where}: parameter {entry.name!r}"
    itemsize = ITEMSIZE.get(entry.dtype)
    if itemsize is None:
        raise CheckpointError(f"{what} has dtype {entry.dtype!r}; known are {', '.join(ITEMSIZE)}")
    if len(entry.shape) > _MAX_DIMS:
        raise CheckpointError(f"{what} has {len(entry.shape)} dimensions, at most {_MAX_DIMS} are allowed")
    # The other dimensions of an empty tensor must not overflow either: torch computes strides from them.
    extent = itemsize
    for size in entry.shape:
        if not 0 <= size < _MAX_COUNT:
            raise CheckpointError(f"{what} has a dimension of {size}")
        extent *= max(size, 1)
        if extent >= _MAX_COUNT:
            raise CheckpointError(f"{what} of shape {list(entry.shape)} has more than 2^63 bytes")
    need = 0 if 0 in entry.shape else extent
    if not 0 <= entry.begin <= entry.end < _MAX_COUNT or entry.end - entry.begin != need:
        raise CheckpointError(
            f"{what}: {entry.dtype} of shape {list(entry.shape)} needs {need} bytes, "
            f"its range [{entry.begin}, {entry.end}) is another"
        )
    if entry.stride is not None and not (
        len(entry.stride) == len(entry.shape)
        and all(0 <= step < _MAX_COUNT for step in entry.stride)
        and is_dense(entry.shape, entry.stride)
    ):
        raise CheckpointError(f"{what} of shape {list(entry.shape)} cannot have the strides {list(entry.stride)}")


def check_contiguous(ordered: Iterable[TensorEntry], where: str) -> int:
    """Check that tensors, sorted by offset, follow each other from 0 without hole or overlap; return their end.

    Raises:
        CheckpointError: They do not.
    """
    position = 0
    for entry in ordered:
        if entry.begin != position:
            fault = "a hole before it" if entry.begin > position else "an overlap with the one before it"
            raise CheckpointError(
                f"{where}: parameter {entry.name!r} begins at {entry.begin}, not at {position}: {fault}"
            )
        position = entry.end
    return position


def is_count(value: object) -> bool:
    """Whether a JSON value is an integer in [0, 2^63); a boolean is not."""
    return type(value) is int and 0 <= value < _MAX_COUNT


def is_counts(value: object) -> bool:
    """Whether a JSON value is a list of such integers."""
    return isinstance(value, list) and all(map(is_count, value))


def parse_json_object(text: bytes, where: str) -> dict[str, object]:
    """Parse a JSON object strictly: UTF-8, no repeated name, no NaN, nesting and integers bounded.

    Raises:
        CheckpointError: The text is anything else.
    """

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(items)
        if len(found) != len(items):
            twice, _ = Counter(name for name, _ in items).most_common(1)[0]
            raise CheckpointError(f"{where}: the name {twice!r} appears twice")
        return found

    def constant(name: str) -> object:
        raise CheckpointError(f"{where}: {name} is not JSON")

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON in UTF-8: {error}") from error
    if b"\\u" in text and not _is_unicode(content):
        raise CheckpointError(f"{where}: holds half of a surrogate pair, or is nested too deep")
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(content).__name__}, not an object")
    return content


def _is_unicode(content: object) -> bool:
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _decode_strides(metadata: Mapping[str, str], where: str) -> dict[str, tuple[tuple[int, ...], Stride]]:
    """Shape and strides of the tensors whose elements lie in another order than that of the shape."""
    found: dict[str, tuple[tuple[int, ...], Stride]] = {}
    for name, value in parse_json_object(metadata.get(_STRIDES, "{}").encode(), where).items():
        if not isinstance(value, list) or len(value) != 2 or not all(map(is_counts, value)):
            raise CheckpointError(f"{where}: parameter {name!r}: {_STRIDES} must give shape and strides, in counts")
        found[name] = tuple(value[0]), tuple(value[1])
    return found


def _decode_entry(name: str, value: object, strided: tuple[tuple[int, ...], Stride] | None, where: str) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: parameter {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise CheckpointError(f"{where}: parameter {name!r}: dtype {dtype!r} is not text")
    if not is_counts(shape):
        raise CheckpointError(f"{where}: parameter {name!r}: shape must be a list of counts below 2^63")
    if not is_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: parameter {name!r}: data_offsets must be two counts below 2^63")
    own_shape, stride = (tuple(shape), None) if strided is None else strided
    entry = TensorEntry(name, dtype, own_shape, offsets[0], offsets[1], stride)
    check_entry(entry, where)
    if stride is not None and memory_shape(own_shape, stride) != tuple(shape):
        raise CheckpointError(f"{where}: parameter {name!r}: {_STRIDES} and shape {shape} disagree")
    return entry
