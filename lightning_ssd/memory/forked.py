"""What a forked process gets of our memory. Bytes; addresses and lengths are rounded out to whole pages.

[Note: forks] `fork` shares private memory until somebody writes, then there are two copies; pages that are pinned for
transfers it copies at once. So each worker of a DataLoader would take as much as ``host_memory``. Our memory is
therefore withheld: a child finds other pages there, and nothing is copied. What the user can reach, parameters kept in
memory and buffers that a tensor views, is passed on for one fork.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress

from lightning_ssd.memory.views import address_of

# Of Linux 4.14. MADV_DONTFORK would leave a hole, in which the child's next mapping could lie when ours is unmapped.
_WIPE_ON_FORK, _KEEP_ON_FORK = 18, 19
_PROT_NONE = 0
_MAP_FIXED = 0x10


def withhold(memory: mmap.mmap, begin: int = 0, nbytes: int | None = None) -> None:
    """A process that is forked from now on finds no values here. A kernel that does not know this copies them."""
    _advise(memory, _WIPE_ON_FORK, begin, len(memory) - begin if nbytes is None else nbytes)


def pass_on(memory: mmap.mmap, begin: int, nbytes: int) -> None:
    """Undo `withhold`: a process that is forked next has the values of that moment."""
    _advise(memory, _KEEP_ON_FORK, begin, nbytes)


def forbid(memory: mmap.mmap, passed_on: list[tuple[int, int]]) -> None:
    """In the child: an access to what was withheld ends it, rather than giving zeros; stretches ``passed_on`` stay."""
    _protect(memory, 0, len(memory), _PROT_NONE)
    for begin, nbytes in passed_on:
        _protect(memory, begin, nbytes, mmap.PROT_READ | mmap.PROT_WRITE)


def make_private(memory: mmap.mmap, fd: int) -> None:
    """From now on what is written to a shared mapping of ``fd`` stays in this process.

    Raises:
        OSError: It cannot be mapped again.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address, nbytes = ctypes.c_void_p(address_of(memory)), ctypes.c_size_t(len(memory))
    flags = mmap.MAP_PRIVATE | _MAP_FIXED  # in one step: who reads meanwhile sees the file, before or after
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
