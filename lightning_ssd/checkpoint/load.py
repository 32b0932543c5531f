"""Reading a checkpoint: tensors that lie in the mapped files, small state, and a check of every byte."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_ssd.checkpoint.checksum import PIECE_NBYTES, checksum
from lightning_ssd.checkpoint.contents import Contents
from lightning_ssd.checkpoint.directory import recover
from lightning_ssd.checkpoint.link_file import links_of
from lightning_ssd.checkpoint.manifest import (
    BUFFERS,
    EXTRA_TENSORS,
    MANIFEST,
    STATE,
    FileRecord,
    Manifest,
    OptimizerRecord,
)
from lightning_ssd.checkpoint.manifest_json import decode_manifest
from lightning_ssd.checkpoint.state_dict import require_whole
from lightning_ssd.checkpoint.values import decode_optimizer, needs_pickled
from lightning_ssd.checkpoint.writer import Progress
from lightning_ssd.errors import CheckpointError, CorruptionError, listed
from lightning_ssd.io.folder import Folder, close_fd, closing_fd
from lightning_ssd.io.safe_open import open_folder, open_inside
from lightning_ssd.sizes import MiB
from lightning_ssd.store.decoded import decoded
from lightning_ssd.store.mapped_safetensors import MappedFile, SeenFiles, read_exactly
from lightning_ssd.store.safetensors_header import TensorEntry
from lightning_ssd.store.torch_file import load_pickle

_MAX_MANIFEST_NBYTES = 512 * MiB  # a state of 10 TiB has a manifest of about 100 MiB


@dataclass(frozen=True)
class VerifyReport:
    """What `CheckpointReader.verify` compared.

    Attributes:
        nbytes: Bytes whose checksums matched.
        unchecked: Files that were saved without checksums.
    """

    nbytes: int
    unchecked: tuple[str, ...]


class CheckpointReader(Contents):
    """A checkpoint directory, checked before anything in it is used."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Open a checkpoint, by its file or by the folder of links; files are mapped when a tensor is first asked for.

        Raises:
            CheckpointError: If it is no checkpoint, or a file is missing or of another size than the manifest says.
        """
        self.directory = os.path.abspath(os.fspath(directory))
        self._mapped: dict[str, MappedFile] = {}
        self._folders: dict[str, Folder] = {}
        recover(self.directory)
        if os.path.isfile(self.directory):
            links = links_of(self.directory)
            if links is None:
                raise CheckpointError(
                    f"{self.directory!r} is one file that holds everything, without links: open it with torch.load, "
                    "copy it as any file, or make links of it with `lightning-ssd import FILE TARGET`"
                )
            self.directory = links
        with ExitStack() as on_error:
            self._fd = open_folder(self.directory)
            on_error.callback(self.close)
            self.manifest = self._read_manifest()
            self._check_sizes()
            on_error.pop_all()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the directory; tensors that were handed out stay valid."""
        if self._fd >= 0:
            close_fd(self._fd)
            self._fd = -1
        for mapped in self._mapped.values():
            mapped.close()
        self._mapped.clear()
        for folder in self._folders.values():
            folder.close()
        self._folders.clear()

    def tensor(self, name: str, kind: str) -> Tensor:
        """One kind of a parameter, in place, or decoded when it is used; writing to it never reaches the file.

        See [Note: private mapping].

        Raises:
            CheckpointError: If there is none, or its file is not as the manifest says.
        """
        encoded = self._encoded(name, kind)
        if encoded is None:
            return self._mapped_tensor(*self._place(name, kind))
        encoding, places = encoded
        parts = {part: self._mapped_tensor(*place) for part, place in places.items()}
        return decoded(encoding, parts, places[encoding.parts[0]][1].shape)

    def folder_of(self, record: FileRecord) -> Folder:
        """The directory of a unit file, opened without following symlinks; the reader closes it."""
        inner = os.path.dirname(record.path)
        if inner not in self._folders:
            folder = Folder(os.dup(self._open_directory_fd()), self.directory)
            for part in inner.split("/") if inner else ():
                with folder:
                    folder = folder.folder(part)
            self._folders[inner] = folder
        return self._folders[inner]

    def path_of(self, record: FileRecord) -> str:
        """Absolute path of a unit file; it is immutable, so it may be linked, and must not be written."""
        return os.path.join(self.directory, record.path)

    def open_file(self, path: str) -> int:
        """A file of the checkpoint by its relative path, open for reading; the descriptor is the caller's."""
        return open_inside(self._open_directory_fd(), path, self.directory)

    def buffers(self, weights_only: bool | None = None) -> dict[str, Tensor]:
        """Map every tensor that is in no unit file: buffers, and optimizer state of another shape than its parameter.

        Their bytes are compared with the checksum first.

        Args:
            weights_only: As in `state`, for tensors of other classes than torch's own.

        Raises:
            CorruptionError: If the bytes are not those that were written.
        """
        name = self.manifest.file_name(BUFFERS)
        mapped = self._mapped.get(name)
        if mapped is None:
            with closing_fd(self._open_small(name)) as fd:
                mapped = self._mapped[name] = MappedFile(fd, self._where(name))
        found = {entry: mapped.tensor(entry) for entry in mapped.header.entries}
        if (extra := self.manifest.file_name(EXTRA_TENSORS)) in self.manifest.small_files:
            found.update(self._load(extra, weights_only is not False))
        return found

    def state(self, weights_only: bool | None = None) -> dict[str, Any]:
        """What `save` was given as ``state``; its tensors lie in the mapped file.

        Args:
            weights_only: False unpickles whatever the file names, which runs its code; only for files you trust.

        Raises:
            CheckpointError: If the state holds a class that is not allowed.
            CorruptionError: If the bytes are not those that were written.
        """
        return self._load_part("state", weights_only)

    def optimizers(self, weights_only: bool | None = None) -> list[OptimizerRecord]:
        """The optimizer records, as `save` was given them."""
        pickled: Mapping[str, Any] = {}
        if any(map(needs_pickled, self.manifest.optimizers)):
            pickled = self._load_part("hyper", weights_only)
        return [decode_optimizer(record, pickled) for record in self.manifest.optimizers]

    def seen(self) -> SeenFiles:
        """The files that are mapped now; `SeenFiles.require_unchanged` tells later whether one was written to."""
        return SeenFiles({mapped.where: mapped.file for mapped in self._mapped.values()})

    def drop(self) -> None:
        """Free the memory of all mapped pages; the next read loads them from the file again."""
        for mapped in self._mapped.values():
            mapped.drop()

    def drop_parameter(self, name: str) -> None:
        """Free the memory of one parameter's mapped pages, of all kinds."""
        for record, entry in self._places(name).values():
            if record.path in self._mapped:
                self._mapped[record.path].drop(record.renamed.get(entry.name, entry.name))

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read every byte and compare it with the checksums, through one buffer of 1 MiB.

        Raises:
            CorruptionError: If a byte differs; names file, parameter and offset.
            CheckpointError: If a header is not what the manifest says, or something that it lists is nowhere.
        """
        require_whole(self.manifest, self.buffers(), self.directory)
        done = 0
        for name in self.manifest.small_files:
            close_fd(self._open_small(name))
            done += self.manifest.small_files[name].nbytes
        return self.verify_files(progress, done=done)

    def verify_files(
        self, progress: Progress | None = None, *, kinds: Collection[str] | None = None, done: int = 0
    ) -> VerifyReport:
        """Compare the bytes of unit files, of all or of some kinds, with their checksums.

        Args:
            progress: Called with bytes done and bytes in all.
            kinds: Kinds to compare; None for all.
            done: Bytes compared before, for ``progress``.

        Raises:
            CorruptionError: If a byte differs; names file, parameter and offset.
            CheckpointError: If a header is not what the manifest says.
        """
        unchecked = []
        for record in self.manifest.files:
            if kinds is not None and record.kind not in kinds:
                continue
            with closing_fd(self._open(record)) as fd:
                self._map(record, fd)  # `tensor` then gives the very bytes that are compared
                if record.checksums is None:
                    unchecked.append(record.path)
                    continue
                self._verify_file(fd, record, record.checksums, done, progress)
            done += record.nbytes
        return VerifyReport(done, tuple(unchecked))

    def _verify_file(
        self, fd: int, record: FileRecord, checksums: tuple[int, ...], done: int, progress: Progress | None
    ) -> None:
        for index, expected in enumerate(checksums):
            offset = record.data_begin + index * PIECE_NBYTES
            piece = read_exactly(fd, min(PIECE_NBYTES, record.nbytes - offset), offset, self._where(record.path))
            if checksum(piece) != expected:
                raise CorruptionError(self._damage(record, index * PIECE_NBYTES))
            os.posix_fadvise(fd, offset, PIECE_NBYTES, os.POSIX_FADV_DONTNEED)
            if progress is not None:
                progress(done + offset + len(piece), self.manifest.nbytes)

    def _damage(self, record: FileRecord, begin: int) -> str:
        names = listed(e.name for e in record.entries if e.begin < begin + PIECE_NBYTES and e.end > begin)
        return (
            f"{self._where(record.path)}: the 1 MiB at offset {record.data_begin + begin} is damaged; "
            f"it holds {record.kind} of {names}"
        )

    def _read_manifest(self) -> Manifest:
        with closing_fd(open_inside(self._fd, MANIFEST, self.directory)) as fd:
            nbytes = os.fstat(fd).st_size
            if nbytes > _MAX_MANIFEST_NBYTES:
                raise CheckpointError(f"{self._where(MANIFEST)}: {nbytes} bytes are no manifest")
            return decode_manifest(read_exactly(fd, nbytes, 0, self._where(MANIFEST)), self._where(MANIFEST))

    def _check_sizes(self) -> None:
        for record in self.manifest.files:
            close_fd(self._open(record))
        for name in self.manifest.small_files:
            close_fd(self._open_small(name, compare=False))

    def _mapped_tensor(self, record: FileRecord, entry: TensorEntry) -> Tensor:
        return self._mapped_file(record).tensor(record.renamed.get(entry.name, entry.name))

    def _mapped_file(self, record: FileRecord) -> MappedFile:
        if record.path in self._mapped:
            return self._mapped[record.path]
        with closing_fd(self._open(record)) as fd:
            return self._map(record, fd)

    def _map(self, record: FileRecord, fd: int) -> MappedFile:
        """A unit file mapped, through ``fd`` if it is not yet."""
        mapped = self._mapped.get(record.path)
        if mapped is None:
            mapped = MappedFile(fd, self._where(record.path))
            expected = [replace(e, name=record.renamed.get(e.name, e.name)) for e in record.entries]
            same = sorted(mapped.header.entries.values(), key=_order) == sorted(expected, key=_order)
            if not same or mapped.header.data_begin != record.data_begin:
                raise CheckpointError(
                    f"{self._where(record.path)}: its header does not list {record.parameters} as the manifest does"
                )
            self._mapped[record.path] = mapped
        return mapped

    def _open(self, record: FileRecord) -> int:
        """A unit file of the right size, open; the very one that is mapped, if it is mapped already."""
        where = f"{self.directory}: {record.kind} of {record.parameters}"
        fd = self._open_sized(record.path, record.nbytes, where)
        mapped = self._mapped.get(record.path)
        if mapped is not None and not os.path.samestat(mapped.file, os.fstat(fd)):
            close_fd(fd)
            raise CheckpointError(f"{where}: {record.path!r} was replaced while the checkpoint was read")
        return fd

    def _open_small(self, name: str, *, compare: bool = True) -> int:
        """A small file of the right size, open; with ``compare``, also of the right checksum."""
        small = self.manifest.small_files[name]
        fd = self._open_sized(name, small.nbytes, self.directory)
        with ExitStack() as on_error:
            on_error.callback(close_fd, fd)
            actual = 0
            for offset in range(0, small.nbytes if compare else 0, PIECE_NBYTES):
                piece = read_exactly(fd, min(PIECE_NBYTES, small.nbytes - offset), offset, self._where(name))
                actual = checksum(piece, actual)
            if compare and actual != small.checksum:
                raise CorruptionError(
                    f"{self._where(name)} is damaged: its {small.nbytes} bytes have checksum {actual:08x}, "
                    f"not {small.checksum:08x}"
                )
            on_error.pop_all()
        return fd

    def _open_sized(self, path: str, nbytes: int, where: str) -> int:
        fd = open_inside(self._open_directory_fd(), path, where)
        found = os.fstat(fd).st_size
        if found != nbytes:
            close_fd(fd)
            raise CheckpointError(f"{where}: {path!r} has {found} bytes, not {nbytes}")
        return fd

    def _open_directory_fd(self) -> int:
        if self._fd < 0:
            raise CheckpointError(f"the reader of {self.directory!r} was closed")
        return self._fd

    def _load_part(self, part: str, weights_only: bool | None) -> dict[str, Any]:
        """One of the dictionaries that ``state.pt`` consists of."""
        found = self._load(STATE, weights_only is not False).get(part)
        if not isinstance(found, dict):
            raise CheckpointError(f"{self._where(STATE)} holds no {part!r} as `save` writes it")
        return found

    def _load(self, name: str, weights_only: bool) -> dict[str, Any]:
        with closing_fd(self._open_small(name)) as fd:
            return load_pickle(f"/proc/self/fd/{fd}", self._where(name), weights_only)

    def _where(self, name: str) -> str:
        return os.path.join(self.directory, name)


def _order(entry: Any) -> tuple[int, int, str]:
    return entry.begin, entry.end, entry.name
