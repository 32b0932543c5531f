"""Files without a name, for data that only this process needs: if it is killed, nothing is left on disk."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from lightning_ssd.errors import IOFailure, as_io_failure
from lightning_ssd.io.deadline import Patience
from lightning_ssd.io.file import File
from lightning_ssd.io.folder import Folder


@dataclass(frozen=True)
class Scratch:
    """Creates files without a name on one disk.

    Attributes:
        folder: The directory; a new file has a name in it for a moment.
        direct: Whether files in it may be opened with O_DIRECT.
        patience: How long the disk is waited for.
    """

    folder: Folder
    direct: bool
    patience: Patience

    def make(self, name: str, nbytes: int, *, direct: bool = False) -> File:
        """Create a file of ``nbytes`` with reserved space.

        Args:
            name: Must not exist yet.
            nbytes: Length, above 0.
            direct: Use O_DIRECT if the directory supports it.

        Raises:
            IOFailure: The disk is full or failed.
            DeadlineError: The disk hangs.
        """
        path = os.path.join(self.folder.path, name)

        def make() -> File:
            file = File.create(path, nbytes, direct=direct and self.direct, folder=self.folder)
            try:
                file.unlink()
            except BaseException:
                file.close()
                raise
            return file

        return self.patience.call(make, path, "making a file")


def write_all(file: File, data: bytes | memoryview, offset: int = 0) -> None:
    """Write ``data`` through the page cache.

    Raises:
        IOFailure: The disk failed or is full.
    """
    left = memoryview(data)
    while left:
        with as_io_failure(file.path, offset, len(left), "write"):
            done = os.pwrite(file.tail_fd, left, offset)
        if not done:
            raise IOFailure(errno.EIO, file.path, offset, len(left), "write")
        left, offset = left[done:], offset + done
