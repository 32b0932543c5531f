"""The C library's heap, where torch's tensors on the host live: what of it goes back to the system, and when. Bytes."""

from __future__ import annotations

import ctypes
import os
import resource

from lightning_ssd.sizes import MiB

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def bound_heap() -> None:
    """Make the C library give freed blocks of 8 MiB or more back to the system at once, and keep others to reuse.

    For the whole process. By default glibc raises that threshold to the size of what it has seen freed (up to 32 MiB)
    and keeps such blocks in its heap, in pieces: gradients of a streamed model then stay in memory and grow with it.
    Far below that, or where the end of the heap goes back whenever it is free, every intermediate result is a page
    fault for each 4 KiB: of a step of 124 million parameters that took 15 %. With 16 MiB, activations of a large batch
    took 60 MiB more than the budget allows. Does nothing where the environment sets ``MALLOC_MMAP_THRESHOLD_``, or the
    C library has no such switch.

    To be called before a model is made too: where its weights were in the heap, gradients find room that stays theirs.
    """
    _set_thresholds(8 << 20, -1)  # never trim


def unbound_heap() -> None:
    """Undo `bound_heap`: the thresholds that glibc comes to by itself when it has seen large blocks freed."""
    _set_thresholds(32 << 20, 64 << 20)


def _set_thresholds(mmap_nbytes: int, trim_nbytes: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, mmap_nbytes)
        mallopt(_M_TRIM_THRESHOLD, trim_nbytes)


def trim_heap() -> None:
    """Give what is free in the C library's heap back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class HeapWatch:
    """Gives free pieces of the heap back to the system when they pile up.

    [Note: holes] glibc cuts the aligned block of a tensor out of a longer one. So the hole that a freed tensor leaves
    is too short for the next one of its size, unless what lies beside it is free too. Where small objects that stay
    lie between gradients, each gradient extends the heap, and what is free there grows with the model.

    What compute frees and takes again all the time is no hole, and giving it back would cost page faults: as much is
    left as memory was seen to grow by more than what was let go meanwhile.
    """

    def __init__(self, *, slack_nbytes: int = 16 * MiB) -> None:
        self._slack_nbytes = slack_nbytes
        self._step_nbytes = slack_nbytes // 4
        self._let_go_nbytes = 0  # since the last look
        self._freed_nbytes = 0  # since the last trim
        self._left_nbytes = anonymous_nbytes()  # by the last trim
        self._working_nbytes = 0

    def let_go(self, nbytes: int) -> None:
        """A tensor of ``nbytes`` is not needed any more. Looks at the memory of the process every few MiB."""
        self._let_go_nbytes += nbytes
        if self._let_go_nbytes < self._step_nbytes:
            return
        self._freed_nbytes += self._let_go_nbytes
        self._let_go_nbytes = 0
        grown = anonymous_nbytes() - self._left_nbytes
        self._working_nbytes = max(self._working_nbytes, grown - self._freed_nbytes)
        if grown - self._working_nbytes > self._slack_nbytes:
            trim_heap()
            self._left_nbytes = anonymous_nbytes()
            self._freed_nbytes = 0


def anonymous_nbytes() -> int:
    """Anonymous memory of this process."""
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = file.read().split()
    return (int(resident) - int(shared)) * resource.getpagesize()
