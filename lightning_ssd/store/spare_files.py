"""Files that hold no current generation and wait to be written again.

A superseded generation's file goes to the next generation of the same length: its space is reserved and its blocks are
allocated already. A file that may still be read is never written again, only unlinked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections import defaultdict
from contextlib import suppress
from functools import partial

from lightning_ssd.errors import Ending, IOFailure, StoreError, as_io_failure
from lightning_ssd.io.file import File
from lightning_ssd.io.folder import closing_fd, is_own_file
from lightning_ssd.store.disks import Disk, Disks


class SpareFiles:
    """Spare files on the disks of a run, by length. Safe to use from several threads.

    Args:
        disks: Where they are.
    """

    def __init__(self, disks: Disks) -> None:
        self._disks = disks
        self._files: dict[int, list[File]] = defaultdict(list)  # by length
        self._lock = threading.Lock()  # never held during a call to the disk, which may hang

    @property
    def nbytes(self) -> int:
        """Bytes of all spare files."""
        with self._lock:
            return sum(nbytes * len(files) for nbytes, files in self._files.items())

    def take(self, nbytes: int, disk: Disk) -> File | None:
        """A spare file of exactly ``nbytes`` on ``disk``, with its name and header of before; None if there is none."""
        with self._lock:
            files = self._files.get(nbytes, [])
            found = next((i for i, file in enumerate(files) if self._disks.of(file) is disk), None)
            return None if found is None else files.pop(found)

    def retire(self, file: File, *, is_seen: bool) -> None:
        """Take the file of a generation that is not needed any more, or only unlink it.

        It is unlinked if it ``is_seen`` (a mapping or another process may read it), or if a checkpoint links it. If an
        operation on it hangs, it is left alone: that could still write to it, and may keep a lock that unlinking needs.

        Raises:
            IOFailure: The disk failed.
        """
        if file.hangs:
            file.close()
            return
        try:
            with as_io_failure(file.path, what="stat"):
                num_links = os.fstat(file.tail_fd).st_nlink
        except IOFailure:
            file.close()
            raise
        if num_links > 1 or is_seen:
            try:
                _unlink(file)
            finally:
                file.close()
        else:
            self._add(file)

    def recycle(self, file: File, found: os.stat_result, *, most: int) -> bool:
        """Take a file from outside the run directories; see `StateStore.recycle`.

        Args:
            file: Not open.
            found: Its status.
            most: Take it only if fewer spare files than this have its length.

        Returns:
            Whether it is gone from where it was.

        Raises:
            IOFailure: The disk failed.
            StoreError: A run directory was removed.
        """
        disk = next((disk for disk in self._disks.all if disk.directory.device == found.st_dev), None)
        if disk is None or len(self._files.get(found.st_size, ())) >= most:
            return False
        if not is_own_file(found, disk.directory.folder) or _is_open(file):
            return False
        file.rename(self._disks.new_path("recycled", disk)[1], disk.directory.folder)
        if _is_open(file):  # it was opened after the first look; without a name, it cannot be opened again
            file.unlink()
        else:
            self._add(disk.open(file.path))
        return True

    def remove(self) -> None:
        """Close and unlink all; if several fail, the first error is raised."""
        with Ending() as ending:
            for file in self._pop_all():
                ending.callback(file.close)
                ending.callback(partial(_unlink, file))

    def close(self) -> None:
        """Close all and forget them. Takes no lock: in a forked process a thread of the parent may hold it."""
        for file in self._pop_all():
            file.close()

    def _add(self, file: File) -> None:
        with self._lock:
            self._files[file.nbytes].append(file)

    def _pop_all(self) -> list[File]:
        files = [file for files in self._files.values() for file in files]
        self._files.clear()
        return files


def _unlink(file: File) -> None:
    try:
        file.unlink()
    except StoreError:
        pass  # the user removed the run directory, and the space is free already
    except IOFailure as error:
        if error.errno != errno.ENOENT:  # else the user removed the file
            raise


def _is_open(file: File) -> bool:
    """Whether anybody, this process included, has the file open or mapped; True where the kernel cannot tell."""
    with closing_fd(file.open_again(os.O_RDWR)) as fd, suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # granted only to the single opener of a file
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False
    return True
