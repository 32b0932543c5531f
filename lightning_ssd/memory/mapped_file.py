"""Mapped files: a page that the disk cannot read is a Python error, and does not end the process.

[Note: bus errors] The kernel answers an access to such a page with SIGBUS. The handler of the native module maps a page
of NaN bytes there, so that the access ends, and has the interpreter call `_raise`: the main thread raises the error
before its next call, or after the call that runs now. Results computed from the NaN until then cannot look right. Pages
are read only when they are used, as without the handler. Without the native module SIGBUS ends the process.

The handler is not known to Python's `signal` module. Else code that saves and restores Python's handlers could replace
it by one that only sets a flag, and the access would be repeated for ever.
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
"""Says what is at an offset of a file. It must not hold a reference to the mapping, which would never be unmapped."""

_WAIT_BEFORE = 1  # SYNC_FILE_RANGE_WAIT_BEFORE


def handle_bus_errors() -> None:
    """From now on raise `IOFailure` if a page of a mapped file cannot be read; see [Note: bus errors]."""
    if _extension._native is not None:
        _extension._native.handle_bus_errors(_raise)


def map_file(fd: int, nbytes: int, path: str, about: About, *, private: bool = False) -> mmap.mmap:
    """Map a file, writable.

    Args:
        fd: The file, open for reading and writing.
        nbytes: How much of it.
        path: Its path, for messages.
        about: What is at an offset, for messages.
        private: Writes stay in memory.

    Raises:
        IOFailure: It cannot be mapped: too many mappings or open files, too little memory.
    """
    flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
    with as_io_failure(path, 0, nbytes, "mapping"):
        memory = mmap.mmap(fd, nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    watch_mapping(memory, address_of(memory), nbytes, path, about)
    return memory


def watch_mapping(owner: object, address: int, nbytes: int, path: str, about: About) -> None:
    """As long as ``owner`` lives, an unreadable page of the mapping at ``address`` is an `IOFailure`.

    Args:
        owner: The mapping.
        address: Its first byte.
        nbytes: Its length.
        path: The file, for messages.
        about: What is at an offset, for messages.
    """
    if _extension._native is not None:
        watched = _extension._native.watch_mapping(address, nbytes, (path, about))
        weakref.finalize(owner, _extension._native.forget_mapping, watched).atexit = False


def flush(memory: mmap.mmap, path: str) -> None:
    """Write the changed pages of a shared mapping to its file, and wait for the disk.

    Raises:
        IOFailure: The disk failed, now or when the system wrote pages before.
    """
    with as_io_failure(path, 0, len(memory), "write of a mapping"):
        memory.flush()  # sync: msync


def wait_for_write_back(fd: int) -> None:
    """Wait for the pages of a file that the system is writing back now; starts no other writes.

    Raises:
        OSError: A write-back failed since the file was opened, or since the last such error.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    # sync: waits for the disk, for writes in flight
    if libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _WAIT_BEFORE) != 0:
        code = ctypes.get_errno()
        if code != errno.ENOSYS:
            raise OSError(code, os.strerror(code))


def _raise(known: tuple[str, About], offset: int) -> None:
    path, about = known
    raise IOFailure(errno.EIO, path, offset, mmap.PAGESIZE, f"read of {about(offset)}, mapped,")
