"""A safetensors file, mapped: its tensors are views of the mapping, and pages are read on first access.

[Note: private mapping] The file is mapped once, MAP_PRIVATE: clean pages are the page cache's, not ours, and a write to
a tensor copies the page it hits and never reaches the file.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_ssd.errors import CheckpointError, IOFailure
from lightning_ssd.memory.mapped_file import watch_mapping
from lightning_ssd.sizes import round_down, round_up
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.safetensors_header import PREFIX_NBYTES, Header, TensorEntry, decode_data_begin, decode_header


def read_header(fd: int, where: str) -> Header:
    """Read and check the header of an open safetensors file.

    Raises:
        CheckpointError: If it is malformed or does not fit the file's size.
        IOFailure: If the disk failed.
    """
    file_nbytes = os.fstat(fd).st_size
    first_bytes = read_exactly(fd, min(PREFIX_NBYTES, file_nbytes), 0, where)
    data_begin = decode_data_begin(first_bytes, file_nbytes, where)
    return decode_header(read_exactly(fd, data_begin, 0, where), file_nbytes, where)


def read_exactly(fd: int, nbytes: int, offset: int, where: str) -> bytes:
    """Read ``nbytes`` bytes at ``offset``, in as many calls as it takes.

    Raises:
        CheckpointError: If the file ends before.
        IOFailure: If the disk failed.
    """
    pieces: list[bytes] = []
    missing = nbytes
    while missing:
        begin = offset + nbytes - missing
        try:
            piece = os.pread(fd, missing, begin)
        except OSError as error:
            raise IOFailure(error.errno or errno.EIO, where, begin, missing, "read") from error
        if not piece:
            raise CheckpointError(f"{where} ended at byte {begin} while it was read")
        pieces.append(piece)
        missing -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class MappedFile:
    """A checked, mapped safetensors file. Tensors it gave stay valid after `close`.

    Attributes:
        header: What the file holds.
        where: What messages call it.
        file: About the file, when it was mapped.
    """

    def __init__(self, fd: int, where: str) -> None:
        """Check and map the file behind ``fd``, which stays the caller's and may be closed afterwards.

        Raises:
            CheckpointError: If it is no well-formed safetensors file.
        """
        self.where = where
        self.file = os.fstat(fd)  # no other file can get its number while it is mapped
        self.header = read_header(fd, where)
        self._bytes: npt.NDArray[np.uint8] | None = map_bytes(fd, self.header.data_begin + self.header.data_nbytes)
        about = partial(_name_at, self.header)
        watch_mapping(self._bytes, self._bytes.ctypes.data, self._bytes.nbytes, where, about)

    def tensor(self, name: str) -> Tensor:
        """The tensor, in place, with a storage of its own; see [Note: private mapping].

        One that does not lie at a multiple of its item size (never in files of ours) is a copy in host memory.
        """
        if self._bytes is None:
            raise CheckpointError(f"{self.where} was closed")
        entry = self.header.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.where} holds no parameter {name!r}")
        return _view(self._bytes, self.header.data_begin, entry)

    def drop(self, name: str | None = None) -> None:
        """Free the memory of mapped pages of one tensor or all; values written through a tensor are lost."""
        if self._bytes is None:
            return
        begin, end = 0, self._bytes.nbytes
        if name is not None:
            entry = self.header.entries[name]
            begin, end = (self.header.data_begin + offset for offset in (entry.begin, entry.end))
        drop_pages(self._bytes.ctypes.data + begin, end - begin)

    def close(self) -> None:
        """Drop the mapping. It is unmapped when its last tensor is gone."""
        self._bytes = None


@dataclass(frozen=True)
class SeenFiles:
    """What mapped files were like before their bytes were compared with their checksums.

    Attributes:
        files: About each, by path.
    """

    files: Mapping[str, os.stat_result]

    def require_unchanged(self) -> None:
        """Refuse values from a file that was written to since. A removed or replaced file stays unchanged.

        Raises:
            CheckpointError: Names the file.
        """
        for path, before in self.files.items():
            with suppress(OSError):
                now = os.stat(path, follow_symlinks=False)
                times = (before.st_mtime_ns, before.st_size), (now.st_mtime_ns, now.st_size)
                if os.path.samestat(before, now) and times[0] != times[1]:
                    raise CheckpointError(
                        f"{path!r} was written to while a run resumed from it, so other values than those that were "
                        "compared with its checksums may be in use; see lightning-ssd verify, and resume again"
                    )


def map_bytes(fd: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Map an open file, privately; the mapping lives as long as the array or anything made from it."""
    # torch maps by path and keeps no descriptor, so thousands of files can be mapped at once; the path through /proc
    # reaches the very file that was checked, not another that took its name.
    with torch.inference_mode(False):
        storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{fd}", shared=False, nbytes=nbytes)
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
        array: npt.NDArray[np.uint8] = flat.numpy()
        return array


def drop_pages(address: int, nbytes: int) -> None:
    """Free the whole pages of a private file mapping; the next access reads them from the file again."""
    begin = round_up(address, mmap.PAGESIZE)
    end = round_down(address + nbytes, mmap.PAGESIZE)
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _name_at(header: Header, offset: int) -> str:
    """What lies at an offset of the file."""
    at = offset - header.data_begin
    # The page begins before the tensor that was looked at.
    hit = [e.name for e in header.entries.values() if e.begin < at + mmap.PAGESIZE and e.end > at]
    return ", ".join(map(repr, hit[:4])) or "a header"


def _view(data: npt.NDArray[np.uint8], data_begin: int, entry: TensorEntry) -> Tensor:
    dtype = dtype_of(entry.dtype)
    raw = data[data_begin + entry.begin : data_begin + entry.end]
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()
    with torch.inference_mode(False):
        return entry.unflatten(torch.from_numpy(raw).view(dtype))
