"""Mapped files: a page that the disk cannot give is a Python error, and no end of the process.

[Note: bus errors] The kernel answers an access to such a page with SIGBUS. The native module's handler puts NaN bytes
there instead, so that the access ends, and has the interpreter call `_raise`: the main thread raises the error before
its next call, or after the one that runs. What is computed from the NaN meanwhile is never plausible. Nothing is read
for this before it is used. Without the native module the process ends by SIGBUS.

Python knows nothing of the handler, so that nobody who saves and restores Python's handlers puts one in its place that
returns without having done anything: the access would be repeated for ever.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Callable

from lightning_ssd import _extension
from lightning_ssd.errors import IOFailure, as_io_failure
from lightning_ssd.memory.views import address_of

About = Callable[[int], str]
"""Says what lies at an offset of a file. It must not hold the mapping, which lives no shorter then."""

_WAIT_BEFORE = 1  # SYNC_FILE_RANGE_WAIT_BEFORE


def handle_bus_errors() -> None:
    """From now on raise `IOFailure` where a page of a mapped file cannot be read; see [Note: bus errors]."""
    if _extension._native is not None:
        _extension._native.handle_bus_errors(_raise)


def map_file(fd: int, nbytes: int, path: str, about: About, *, private: bool = False) -> mmap.mmap:
    """Map a file, writable; an error of the disk names ``path`` and what ``about`` says.

    Raises:
        IOFailure: It cannot be mapped: too many mappings or open files, too little memory.
    """
    flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
    with as_io_failure(path, 0, nbytes, "mapping"):
        memory = mmap.mmap(fd, nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    watch_mapping(memory, address_of(memory), nbytes, path, about)
    return memory


def watch_mapping(owner: object, address: int, nbytes: int, path: str, about: About) -> None:
    """As long as ``owner`` lives, let an error of the disk under the mapping at ``address`` name what lies there."""
    if _extension._native is not None:
        watched = _extension._native.watch_mapping(address, nbytes, (path, about))
        weakref.finalize(owner, _extension._native.forget_mapping, watched).atexit = False


def flush(memory: mmap.mmap, path: str) -> None:
    """Bring what was written to a shared mapping into its file.

    Raises:
        IOFailure: The disk failed, now or when the system wrote some of it before.
    """
    with as_io_failure(path, 0, len(memory), "write of a mapping"):
        memory.flush()  # sync: msync


def wait_for_write_back(fd: int) -> None:
    """Wait for what the system is writing back of a file now; nothing else is written.

    Raises:
        OSError: It could not write something since the file was opened, or since it said so last.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    # sync: waits for the disk, for what is on its way to it already
    if libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _WAIT_BEFORE) != 0:
        code = ctypes.get_errno()
        if code != errno.ENOSYS:
            raise OSError(code, os.strerror(code))


def _raise(known: tuple[str, About], offset: int) -> None:
    path, about = known
    raise IOFailure(errno.EIO, path, offset, mmap.PAGESIZE, f"read of {about(offset)}, mapped,")
