"""Files without a name, for what waits on disk only as long as this process lives: a killed one leaves nothing."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from lightning_ssd.errors import IOFailure, as_io_failure
from lightning_ssd.io.deadline import Patience
from lightning_ssd.io.engine import File
from lightning_ssd.io.folder import Folder


@dataclass(frozen=True)
class Scratch:
    """Makes them.

    Attributes:
        folder: Where; a name is there while a file is made.
        direct: Whether files in it take O_DIRECT.
        patience: How long its disk is waited for.
    """

    folder: Folder
    direct: bool
    patience: Patience

    def make(self, name: str, nbytes: int, *, direct: bool = False) -> File:
        """A file of ``nbytes`` whose space is reserved.

        Args:
            name: Must not exist yet.
            nbytes: Length, above 0.
            direct: Use O_DIRECT where the directory has it.

        Raises:
            IOFailure: The disk is full or failed.
            DeadlineError: It hangs.
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
    """Write ``data`` through the page cache, and tell a failure as an engine does.

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
