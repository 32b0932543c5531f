"""The disks of one run: a run directory on each, names for new files, and how much room is left."""

from __future__ import annotations

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from lightning_ssd.errors import Ending, IOFailure, StoreError, as_io_failure
from lightning_ssd.io.file import File
from lightning_ssd.io.folder import device_of
from lightning_ssd.sizes import fmt
from lightning_ssd.store.run_directory import RunDirectory


@dataclass(frozen=True, eq=False)
class Disk:
    """The run directory on one disk.

    Attributes:
        directory: The run directory.
        direct: Whether files in it are opened with O_DIRECT.
    """

    directory: RunDirectory
    direct: bool

    @property
    def path(self) -> str:
        """Path of the run directory."""
        return self.directory.path

    def create(self, path: str, nbytes: int) -> File:
        """Create a file of ``nbytes`` in the run directory and reserve its space.

        Raises:
            StoreError: The disk is full or refuses; names what is needed and what is free.
        """
        try:
            return File.create(path, nbytes, direct=self.direct, folder=self.directory.folder)
        except IOFailure as error:
            raise StoreError(
                f"cannot reserve {fmt(nbytes)} in {self.path!r} ({_describe_free(self.path)}): {error}; "
                "choose another nvme_path; the last checkpoint is whole"
            ) from error

    def open(self, path: str) -> File:
        """Open a file of the run directory for reading and writing.

        Raises:
            IOFailure: The file cannot be opened.
        """
        return File.open(path, direct=self.direct, writable=True, folder=self.directory.folder)


class Disks:
    """The disks of one run, used in turn.

    Args:
        directories: One run directory per disk.
        direct: Whether to open files with O_DIRECT, one flag per directory.

    Attributes:
        all: The disks, in that order.
        are_direct: Whether files on any of them are opened with O_DIRECT.
    """

    def __init__(self, directories: Sequence[RunDirectory], direct: Sequence[bool]) -> None:
        self.all = [Disk(*pair) for pair in zip(directories, direct, strict=True)]
        self.are_direct = any(direct)
        self._numbers = itertools.count()

    def new_path(self, name: str, disk: Disk | None = None) -> tuple[Disk, str]:
        """A path that no file has yet, on ``disk`` or, by default, on the disk whose turn it is."""
        number = next(self._numbers)
        disk = disk or self.all[number % len(self.all)]
        slug = re.sub(r"[^A-Za-z0-9._-]", "_", name)
        return disk, os.path.join(disk.path, f"{number:08d}-{slug}.safetensors")

    def of(self, file: File) -> Disk:
        """The disk whose run directory holds ``file``."""
        folder = os.path.dirname(file.path)
        return next(disk for disk in self.all if disk.path == folder)

    def share_on(self, path: str) -> float:
        """The share of the generations that lies on the file system of ``path``, which exists."""
        device = device_of(path)
        return sum(disk.directory.device == device for disk in self.all) / len(self.all)

    def require_free(self, nbytes: int, what: str, *, num_files: int) -> None:
        """Refuse what cannot fit, before work on it starts.

        Args:
            nbytes: Bytes of all new files.
            what: What needs them, for the message.
            num_files: How many new files.

        Raises:
            StoreError: Names what is needed, what is free and the way out.
        """
        by_device: dict[int, list[str]] = defaultdict(list)
        for disk in self.all:
            by_device[disk.directory.device].append(disk.path)
        for paths in by_device.values():  # generations are spread evenly
            share_nbytes = nbytes * len(paths) // len(self.all)
            share_files = -(-num_files * len(paths) // len(self.all))
            _require_room(paths, share_nbytes, share_files, what)

    def close(self, *, remove: bool) -> None:
        """Unlock all run directories; with ``remove`` delete them. If several fail, the first error is raised."""
        with Ending() as ending:
            for disk in self.all:
                ending.callback(partial(disk.directory.close, remove=remove))


def _require_room(paths: Sequence[str], nbytes: int, num_files: int, what: str) -> None:
    """Refuse what the file system of the run directories ``paths`` has no bytes or no inodes for."""
    places = ", ".join(repr(os.path.dirname(path)) for path in paths)
    inodes = free_inodes(paths[0])
    if inodes is not None and inodes < num_files:
        raise StoreError(
            f"{what} needs {num_files} files on the disk of {places}, whose file system has inodes for "
            f"{inodes} more; remove files there (not bytes), make the file system with more inodes, choose "
            "another nvme_path, or cut larger units with units=... or min_unit_numel=..."
        )
    free = free_nbytes(paths[0])
    if free < nbytes:
        raise StoreError(
            f"{what} needs {fmt(nbytes)} on the disk of {places}, which has {fmt(free)} free; "
            "free space there or choose another nvme_path"
        )


def free_nbytes(path: str) -> int:
    """Bytes that this user may still write to the file system of ``path``."""
    with as_io_failure(path, what="asking for free space"):
        stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def free_inodes(path: str) -> int | None:
    """Files that this user may still create on the file system of ``path``; None where it does not count them."""
    with as_io_failure(path, what="asking for free inodes"):
        stat = os.statvfs(path)
    return stat.f_favail if stat.f_files else None


def _describe_free(path: str) -> str:
    try:
        inodes = "no inodes, so no more files, and " if free_inodes(path) == 0 else ""
        return f"{inodes}{fmt(free_nbytes(path))} free"
    except IOFailure as error:
        return str(error)
