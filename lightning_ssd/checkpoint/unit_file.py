"""The two kinds of unit file that a save takes: a generation on disk, or tensors that are asked for one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lightning_ssd.checkpoint.checksum import PIECE_NBYTES, checksum
from lightning_ssd.checkpoint.writer import StreamWriter, as_bytes, new_file
from lightning_ssd.io.deadline import in_time
from lightning_ssd.io.folder import Folder
from lightning_ssd.store.decoded import values_of
from lightning_ssd.store.safetensors_header import TensorEntry, encode_header


@dataclass(frozen=True)
class UnitFile:
    """A generation on disk, to be linked or copied into a checkpoint.

    Attributes:
        unit: Name of the unit.
        kind: ``param``, ``master``, ``exp_avg``, ...
        source: Path of the generation.
        linkable: Nothing can write to the file any more, so a hard link is enough.
        entries: What is in its data section.
        checksums: CRC32C of each 1 MiB of the data section, or None if not known. A copy computes them; a linked file
            without them cannot be verified later.
        data_begin: Where the data section starts.
        renamed: Name of a parameter -> its name inside the file, where that is another.
        folder: An open directory in which ``source`` is looked up, by the last part of it. Default: by its path.
    """

    unit: str
    kind: str
    source: str
    linkable: bool
    entries: tuple[TensorEntry, ...]
    checksums: tuple[int, ...] | None
    data_begin: int
    renamed: Mapping[str, str] = field(default_factory=dict)
    folder: Folder | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.data_begin + max((entry.end for entry in self.entries), default=0)

    def open_source(self) -> int:
        """The generation, open for reading; the descriptor is the caller's."""
        if self.folder is None:
            return os.open(self.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        return self.folder.open_file(os.path.basename(self.source), os.O_RDONLY)

    def link_source(self, folder: Folder, name: str) -> None:
        """Link the generation into ``folder``."""
        source, where = self.source, None
        if self.folder is not None:
            source, where = os.path.basename(source), self.folder.fd

        def link() -> None:
            os.link(source, name, src_dir_fd=where, dst_dir_fd=folder.fd, follow_symlinks=False)

        in_time(link, self.source, "link")


class TensorSource(Protocol):
    """Tensors by name, one in memory at a time."""

    def tensor(self, name: str) -> Tensor:
        """The tensor."""
        ...

    def drop(self, name: str) -> None:
        """Free the memory of a tensor that is not needed any more."""
        ...


@dataclass(frozen=True)
class ComposedFile:
    """A unit file that is written from tensors, one in memory at a time.

    Attributes:
        unit: Name of the unit.
        kind: As in `UnitFile`.
        entries: Where each tensor goes.
        source: Gives the tensors, in the order of the entries; each is dropped when it is written.
    """

    unit: str
    kind: str
    entries: tuple[TensorEntry, ...]
    source: TensorSource

    @property
    def data_begin(self) -> int:
        """Where the data section starts."""
        return len(encode_header(self.entries))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.data_begin + max((entry.end for entry in self.entries), default=0)

    def write(self, path: str, report: Callable[[int], None], folder: Folder | None = None) -> tuple[int, ...]:
        """Write the file, and make it durable; return the CRC32C of each 1 MiB of its data section.

        Args:
            path: Where; must not exist.
            report: Called with bytes written since the last call.
            folder: The directory it is in, open.
        """
        header = encode_header(self.entries)
        pieces = _Pieces()
        with new_file(path, folder) as fd:
            writer = StreamWriter(fd)
            report(writer.write(header))
            for entry in self.entries:
                self._write_tensor(entry, writer, pieces, report)
                self.source.drop(entry.name)
            writer.finish()
        return pieces.finish()

    # A method of its own, so that no local variable keeps a tensor alive while the next one is loaded.
    def _write_tensor(
        self, entry: TensorEntry, writer: StreamWriter, pieces: _Pieces, report: Callable[[int], None]
    ) -> None:
        for part in _parts(as_bytes(entry.flatten(values_of(self.source.tensor(entry.name)))).data):
            pieces.add(part)
            report(writer.write(part))


class _Pieces:
    """Checksums of the pieces of a data section that arrives in parts of any length."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._current = 0
        self._filled = 0

    def add(self, part: memoryview) -> None:
        while part.nbytes:
            take = part[: PIECE_NBYTES - self._filled]
            self._current = checksum(take, self._current)
            self._filled += take.nbytes
            part = part[take.nbytes :]
            if self._filled == PIECE_NBYTES:
                self._close()

    def finish(self) -> tuple[int, ...]:
        if self._filled:
            self._close()
        return tuple(self._done)

    def _close(self) -> None:
        self._done.append(self._current)
        self._current = self._filled = 0


def _parts(data: memoryview) -> Iterator[memoryview]:
    for begin in range(0, data.nbytes, 4 * PIECE_NBYTES):
        yield data[begin : begin + 4 * PIECE_NBYTES]
