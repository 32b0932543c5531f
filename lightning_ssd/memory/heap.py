"""The C library's heap, where torch allocates tensors on the host: when freed memory returns to the system. Bytes."""

from __future__ import annotations

import ctypes
import os
import resource

from lightning_ssd.sizes import MiB

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def bound_heap() -> None:
    """Make the C library return freed blocks of 8 MiB or more to the system at once, and keep smaller ones for reuse.

    This holds for the whole process. By default glibc raises the threshold to the largest block it has seen freed (up
    to 32 MiB) and keeps such blocks in its heap, fragmented: the memory that gradients take then grows with the model.
    With a threshold far below 8 MiB, or if the end of the heap is returned whenever it is free, each intermediate
    result costs a page fault for every 4 KiB: 15 % of a step of 124 million parameters. With 16 MiB, activations of a
    large batch took 60 MiB more than the budget. Does nothing if the environment sets ``MALLOC_MMAP_THRESHOLD_``, or
    if the C library has no such setting.

    Call it before a model is created, too: else its freed weights leave room in the heap that gradients keep in use.
    """
    _set_thresholds(8 << 20, -1)  # never trim


def unbound_heap() -> None:
    """Undo `bound_heap`: set the thresholds that glibc reaches by itself once it has seen large blocks freed."""
    _set_thresholds(32 << 20, 64 << 20)


def _set_thresholds(mmap_nbytes: int, trim_nbytes: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, mmap_nbytes)
        mallopt(_M_TRIM_THRESHOLD, trim_nbytes)


def trim_heap() -> None:
    """Return all free memory of the C library's heap to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class HeapWatch:
    """Returns free memory of the heap to the system when it has become fragmented.

    [Note: holes] glibc cuts the aligned block of a tensor out of a longer one. So a freed tensor leaves a hole that is
    too short for the next tensor of its size, unless the memory beside it is free too. If small objects that stay
    alive lie between gradients, each gradient extends the heap, and the free memory in it grows with the model.

    Memory that compute frees and allocates again all the time is not a hole, and to return it would cost page faults.
    So as much stays in the heap as memory was seen to grow beyond what was freed meanwhile.

    Args:
        slack_nbytes: Free memory that is tolerated.
    """

    def __init__(self, *, slack_nbytes: int = 16 * MiB) -> None:
        self._slack_nbytes = slack_nbytes
        self._step_nbytes = slack_nbytes // 4
        self._unmeasured_nbytes = 0  # since memory was measured last
        self._freed_nbytes = 0  # since the last trim
        self._left_nbytes = anonymous_nbytes()  # by the last trim
        self._working_nbytes = 0

    def note_freed(self, nbytes: int) -> None:
        """Note that a tensor of ``nbytes`` was freed. Every few MiB the memory of the process is measured."""
        self._unmeasured_nbytes += nbytes
        if self._unmeasured_nbytes < self._step_nbytes:
            return
        self._freed_nbytes += self._unmeasured_nbytes
        self._unmeasured_nbytes = 0
        grown = anonymous_nbytes() - self._left_nbytes
        self._working_nbytes = max(self._working_nbytes, grown - self._freed_nbytes)
        if grown - self._working_nbytes > self._slack_nbytes:
            trim_heap()
            self._left_nbytes = anonymous_nbytes()
            self._freed_nbytes = 0


def anonymous_nbytes() -> int:
    """Anonymous memory that this process has."""
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = file.read().split()
    return (int(resident) - int(shared)) * resource.getpagesize()
