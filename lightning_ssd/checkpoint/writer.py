"""Write files sequentially in bounded memory: checksummed on the way, dropped from the page cache afterwards."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from lightning_ssd.checkpoint.checksum import Bytes, checksum
from lightning_ssd.errors import CheckpointError, naming
from lightning_ssd.io.deadline import in_time, sync
from lightning_ssd.io.folder import Folder, closing_fd
from lightning_ssd.sizes import MiB
from lightning_ssd.store.decoded import values_of
from lightning_ssd.store.dtypes import TORCH_DTYPE, name_of
from lightning_ssd.store.safetensors_header import ITEMSIZE, TensorEntry, encode_header
from lightning_ssd.store.strides import stride_of

_save = torch.save

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

FLUSH_NBYTES = 64 * MiB
"""Written bytes after which the file is synced and dropped from the page cache, so that dirty pages stay bounded."""

_WRITE_NBYTES = 4 * MiB


class StreamWriter:
    """A file being written; a file object as far as ``torch.save`` is concerned.

    Attributes:
        nbytes: Bytes written.
        checksum: CRC32C of all of them, or 0 without ``checksummed``.
        error: Why a write failed, or None.
    """

    def __init__(self, fd: int, *, checksummed: bool = False) -> None:
        """Write to ``fd``, which stays the caller's."""
        self.nbytes = 0
        self.checksum = 0
        self.error: OSError | None = None
        self._fd = fd
        self._checksummed = checksummed
        self._flushed_nbytes = 0

    def write(self, data: Bytes) -> int:
        """Append all of ``data``."""
        view = np.frombuffer(data, dtype=np.uint8)
        try:
            for begin in range(0, view.nbytes, _WRITE_NBYTES):
                self._write_piece(view[begin : begin + _WRITE_NBYTES])
        except OSError as error:
            self.error = error
            raise
        return view.nbytes

    def flush(self) -> None:
        """Do nothing, as writes are not buffered; ``torch.save`` calls this method."""

    def finish(self) -> None:
        """Sync the file and drop it from the page cache."""
        sync(self._fd, os.fsync)
        self.drop()

    def drop(self) -> None:
        """Drop what is synced from the page cache; called every 64 MiB."""
        os.posix_fadvise(self._fd, self._flushed_nbytes, self.nbytes - self._flushed_nbytes, os.POSIX_FADV_DONTNEED)
        self._flushed_nbytes = self.nbytes

    def _write_piece(self, piece: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        if self._checksummed:
            self.checksum = checksum(piece, self.checksum)
        while piece.nbytes:
            written = in_time(partial(os.write, self._fd, piece.data), f"descriptor {self._fd}", "write")
            self.nbytes += written
            piece = piece[written:]
        if self.nbytes - self._flushed_nbytes >= FLUSH_NBYTES:
            sync(self._fd, os.fdatasync)
            self.drop()


@contextmanager
def new_file(path: str, folder: Folder | None = None) -> Iterator[int]:
    """A file that did not exist, open for writing, readable by its owner only; in ``folder`` if that is open."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    if folder is None:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    else:
        fd = folder.open_file(os.path.basename(path), flags)
    with closing_fd(fd), naming(path):
        yield fd


def lay_out(items: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorEntry, ...]:
    """Place tensors, given as name, dtype and shape, without holes, by falling item size: all are aligned."""
    entries: list[TensorEntry] = []
    position = 0
    for name, dtype, shape in sorted(items, key=lambda item: -ITEMSIZE[item[1]]):
        end = position + math.prod(shape) * ITEMSIZE[dtype]
        entries.append(TensorEntry(name, dtype, shape, position, end))
        position = end
    return tuple(entries)


def lay_out_tensors(tensors: Mapping[str, Tensor]) -> tuple[TensorEntry, ...]:
    """Place tensors that are at hand."""
    entries = lay_out((name, name_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())
    return tuple(replace(entry, stride=stride_of(tensors[entry.name])) for entry in entries)


def write_tensors(
    writer: StreamWriter,
    entries: Iterable[TensorEntry],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, asking for one tensor after the other."""
    ordered = tuple(entries)
    writer.write(encode_header(ordered, metadata))
    for entry in ordered:
        writer.write(as_bytes(entry.flatten(values_of(tensor_of(entry.name)))))


def write_pickle(writer: StreamWriter, content: Mapping[str, Any], *, is_result: bool = False) -> None:
    """Write what ``torch.load`` reads; tensors go from where they lie to the file.

    Args:
        writer: Of the file.
        content: What is written.
        is_result: It is the file that the user asked for, which ``torch.save`` writes, whoever has wrapped or replaced
            that function meanwhile; what is read again here is written by torch's own.

    Raises:
        CheckpointError: If something in ``content`` cannot be pickled.
    """
    try:
        (torch.save if is_result else _save)(content, cast(IO[bytes], writer))
    except (RuntimeError, pickle.PicklingError, AttributeError, TypeError) as error:
        # After a failed write torch closes its archive, which fails too, and raises only the second error.
        failure = writer.error
        if failure is not None:
            raise failure from error
        raise CheckpointError(f"part of the training state cannot be pickled: {error}") from error
    finally:
        # torch keeps the writer for ever; the error must not stay in it, as its frames refer to the whole training.
        writer.error = failure = None


def is_plain(tensor: Tensor) -> bool:
    """Whether a safetensors file can hold the tensor; others go to ``extra_tensors.pt``."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and tensor.layout == torch.strided
        and tensor.dtype in TORCH_DTYPE.values()
    )


def as_bytes(tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes of a tensor: where they lie, or of a contiguous copy on the host."""
    with torch.inference_mode(False):
        flat = values_of(tensor).detach().to("cpu").contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy()
