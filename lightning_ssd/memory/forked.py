"""Which of our memory a forked process gets. Bytes; ranges are extended to whole pages.

[Note: forks] After `fork`, private memory is copied once either process writes to it; pages that are pinned for
transfers are copied at once. So each worker of a DataLoader would take as much as ``host_memory``. Our memory is
therefore withheld: the child finds empty pages there, and nothing is copied. What the user can reach, parameters in
memory and buffers that a tensor views, is passed on for one fork.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress

from lightning_ssd.memory.views import address_of

# Since Linux 4.14. MADV_DONTFORK would leave a hole; the child could map something there, and then unmap it as ours.
_WIPE_ON_FORK, _KEEP_ON_FORK = 18, 19
_PROT_NONE = 0
_MAP_FIXED = 0x10


def withhold(memory: mmap.mmap, begin: int = 0, nbytes: int | None = None) -> None:
    """Processes forked from now on find zeros here. A kernel without support copies the values."""
    _advise(memory, _WIPE_ON_FORK, begin, len(memory) - begin if nbytes is None else nbytes)


def pass_on(memory: mmap.mmap, begin: int, nbytes: int) -> None:
    """Undo `withhold`: a process forked next has the values of that moment."""
    _advise(memory, _KEEP_ON_FORK, begin, nbytes)


def forbid(memory: mmap.mmap, passed_on: list[tuple[int, int]]) -> None:
    """In the child: an access to ``memory`` ends it, instead of giving zeros, except in the ranges ``passed_on``."""
    _protect(memory, 0, len(memory), _PROT_NONE)
    for begin, nbytes in passed_on:
        _protect(memory, begin, nbytes, mmap.PROT_READ | mmap.PROT_WRITE)


def make_private(memory: mmap.mmap, fd: int) -> None:
    """Replace a shared mapping of ``fd`` by a private one: what is written to it from now on stays in this process.

    Raises:
        OSError: It cannot be mapped again.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address, nbytes = ctypes.c_void_p(address_of(memory)), ctypes.c_size_t(len(memory))
    flags = mmap.MAP_PRIVATE | _MAP_FIXED  # in one step, so that other threads can read it meanwhile
    found = libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, ctypes.c_long(0))
    if found != address.value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _advise(memory: mmap.mmap, advice: int, begin: int, nbytes: int) -> None:
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    if nbytes > 0:
        with suppress(OSError):
            memory.madvise(advice, first, begin + nbytes - first)


def _protect(memory: mmap.mmap, begin: int, nbytes: int, protection: int) -> None:
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    libc.mprotect(ctypes.c_void_p(address_of(memory) + first), ctypes.c_size_t(begin + nbytes - first), protection)
