"""Pools of host memory: anonymous mappings of fixed size, lent in buffers. Sizes in bytes, 4096-aligned.

Nothing is allocated while training. Each buffer has one owner until `Pool.give_back`. If a tensor on it is still alive
then, its space is free again when that tensor is gone.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from lightning_ssd.errors import ResidencyError
from lightning_ssd.memory import forked
from lightning_ssd.memory.views import Views, address_of
from lightning_ssd.sizes import BLOCK_NBYTES, MiB, fmt, round_up

HUGE_PAGE_NBYTES = 2 * MiB


class Buffer:
    """A part of a pool's memory, lent to one owner.

    Attributes:
        offset: First byte, counted in the memory that the pool is in.
        address: Address of that byte.
        nbytes: Length.
        owner: Who has it, for messages.
    """

    def __init__(self, memory: mmap.mmap, base: int, offset: int, nbytes: int, owner: str) -> None:
        self._memory = memory
        self._views = Views(memory)
        self.offset = offset
        self.address = base + offset
        self.nbytes = nbytes
        self.owner = owner

    def tensor(
        self, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None
    ) -> Tensor:
        """A tensor at byte ``offset`` of this buffer, see `Views.tensor`; the buffer is in use as long as it lives."""
        return self._views.tensor(self.offset + offset, dtype, shape, stride)

    def hold(self) -> object:
        """An object for a transfer to keep: the buffer is in use as long as it lives, also if the transfer hangs."""
        return self._views.hold(self.offset)

    @property
    def in_use(self) -> bool:
        """Whether a tensor on this buffer, a view of one, or an object of `hold` still exists."""
        return self._views.in_use

    @property
    def is_viewed(self) -> bool:
        """Whether a tensor on this buffer, or a view of one, still exists."""
        return self._views.are_seen

    def fill(self, byte: int, offset: int = 0, nbytes: int | None = None) -> None:
        """Set ``nbytes`` bytes at ``offset``, by default all after it, to ``byte``."""
        ctypes.memset(self.address + offset, byte, self.nbytes if nbytes is None else nbytes)


def map_anonymous(nbytes: int) -> mmap.mmap:
    """Map anonymous memory, page-aligned, in huge pages if it is as large as one.

    The kernel cuts a transfer from scattered small pages into many requests: with huge pages a virtio disk read and
    wrote 2 to 3 times faster (tests/benchmarks/bench_io.py). Forked processes do not get the memory; [Note: forks].
    """
    is_large = nbytes >= HUGE_PAGE_NBYTES
    nbytes = round_up(nbytes, HUGE_PAGE_NBYTES) if is_large else nbytes
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    forked.withhold(memory)
    if is_large:
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def pool_nbytes(nbytes: int) -> int:
    """Bytes that a pool for ``nbytes`` takes."""
    return round_up(max(nbytes, BLOCK_NBYTES))


class Pool:
    """Buffers of any size out of ``nbytes`` of anonymous memory: first fit, and free neighbours are joined.

    Args:
        nbytes: Size of the pool.
        name: What messages call it.
        arena: Memory that the pool is a part of; None maps memory of its own.
        begin: First byte of the pool in ``arena``.
        poison: For tests: fill what is given back with NaN bytes (0xFF), so that a use after that shows.
    """

    def __init__(
        self, nbytes: int, name: str, *, arena: mmap.mmap | None = None, begin: int = 0, poison: bool = False
    ) -> None:
        self.nbytes = pool_nbytes(nbytes)
        self.name = name
        self._poison = poison
        self._memory = map_anonymous(self.nbytes) if arena is None else arena
        self._base = address_of(self._memory)
        self._end = begin + self.nbytes
        self._free: list[tuple[int, int]] = [(begin, self.nbytes)]  # (offset, nbytes), by offset
        self._lent: dict[int, Buffer] = {}  # by offset
        self._lingering: list[Buffer] = []  # given back, but a tensor on them was alive

    def try_lend(self, nbytes: int, owner: str, make_room: Callable[[], bool] | None = None) -> Buffer | None:
        """A buffer of at least ``nbytes``, or None if there is no room now.

        Args:
            nbytes: Bytes needed.
            owner: Who needs them, for messages.
            make_room: Called while there is no room; gives buffers back and returns True, or returns False.
        """
        while True:
            buffer = self._try_lend(nbytes, owner)
            if buffer is not None or make_room is None or not make_room():
                return buffer

    def lend(self, nbytes: int, owner: str, make_room: Callable[[], bool] | None = None) -> Buffer:
        """As `try_lend`.

        Raises:
            ResidencyError: There is no room and none can be made.
        """
        buffer = self.try_lend(nbytes, owner, make_room)
        if buffer is None:
            raise ResidencyError(self._no_room(nbytes, owner))
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        """Return a buffer. While it is in use it lingers: its space is not lent again.

        Raises:
            ResidencyError: It was given back before.
        """
        if self._lent.get(buffer.offset) is not buffer:
            raise ResidencyError(f"{self.name}: buffer of {buffer.owner} was given back twice")
        del self._lent[buffer.offset]
        if buffer.in_use:
            self._lingering.append(buffer)
        else:
            self._reclaim(buffer)

    def is_cut_by(self, held: Sequence[Buffer], nbytes: int) -> bool:
        """Whether, with only ``held`` lent, ``nbytes`` would be free in all, but not in one piece."""
        pieces = [(self._end - self.nbytes, self.nbytes)]
        for buffer in sorted(held, key=lambda buffer: buffer.offset):
            begin, room = pieces.pop()
            rest = buffer.offset + buffer.nbytes
            pieces += [(begin, buffer.offset - begin), (rest, begin + room - rest)]
        rooms = [room for _, room in pieces]
        return max(rooms) < round_up(nbytes) <= sum(rooms)

    def pass_on(self) -> list[tuple[int, int]]:
        """Let a process that is forked next have the buffers that tensors view; [Note: forks].

        Returns:
            ``(offset, nbytes)`` of each.
        """
        viewed = [b for b in (*self._lent.values(), *self._lingering) if b.is_viewed]
        for buffer in viewed:
            forked.pass_on(self._memory, buffer.offset, buffer.nbytes)
        return [(buffer.offset, buffer.nbytes) for buffer in viewed]

    def withhold(self) -> None:
        """Undo `pass_on`."""
        forked.withhold(self._memory, self._end - self.nbytes, self.nbytes)

    def forbid(self, passed_on: list[tuple[int, int]]) -> None:
        """In a forked process: an access to anything in the whole arena but what was passed on ends the process."""
        forked.forbid(self._memory, passed_on)

    def close(self) -> None:
        """Give the memory back to the system, at once except for buffers in use. No transfer on it may be in flight.

        It is unmapped when the last tensor on it is gone.
        """
        free = [(b.offset, b.nbytes) for b in (*self._lent.values(), *self._lingering) if not b.in_use]
        for offset, nbytes in [*self._free, *free]:
            with suppress(OSError, ValueError):  # pages larger than our blocks
                self._memory.madvise(mmap.MADV_DONTNEED, offset, nbytes)
        self._free = []
        self._lent = {}
        self._lingering = []
        del self._memory

    def _try_lend(self, nbytes: int, owner: str) -> Buffer | None:
        self._collect()
        need = round_up(max(nbytes, 1))
        for i, (offset, room) in enumerate(self._free):
            if room >= need:
                # The last free span is filled from its end: a buffer in the middle would leave two pieces, neither of
                # them long enough for the one other unit that the smallest plan has room for.
                is_last = offset > self._end - self.nbytes and offset + room == self._end
                begin = offset + room - need if is_last else offset
                rest = (offset, room - need) if is_last else (offset + need, room - need)
                self._free[i : i + 1] = [rest] if room > need else []
                buffer = Buffer(self._memory, self._base, begin, need, owner)
                self._lent[begin] = buffer
                return buffer
        return None

    def _collect(self) -> None:
        """Free lingering buffers that are not in use any more."""
        still: list[Buffer] = []
        for buffer in self._lingering:
            if buffer.in_use:
                still.append(buffer)
            else:
                self._reclaim(buffer)
        self._lingering = still

    def _reclaim(self, buffer: Buffer) -> None:
        if self._poison:
            buffer.fill(0xFF)
        self._free = with_span(self._free, buffer.offset, buffer.nbytes)

    def _no_room(self, nbytes: int, owner: str) -> str:
        held = ", ".join(f"{b.owner} {fmt(b.nbytes)}" for b in self._lent.values()) or "nothing"
        lingering = ", ".join(f"{b.owner} {fmt(b.nbytes)}" for b in self._lingering) or "nothing"
        return (
            f"{owner} needs {fmt(nbytes)} of the {self.name} pool ({fmt(self.nbytes)} in all); in use: {held}; "
            f"released but still referenced by tensors kept outside: {lingering}; "
            "raise host_memory, cut smaller units with units=..., or do not keep views of parameters"
        )


def with_span(free: list[tuple[int, int]], offset: int, nbytes: int) -> list[tuple[int, int]]:
    """Free spans ``(offset, nbytes)``, sorted, with one more added; neighbours are joined."""
    spans = sorted([*free, (offset, nbytes)])
    joined = [spans[0]]
    for begin, room in spans[1:]:
        last_begin, last_room = joined[-1]
        if last_begin + last_room == begin:
            joined[-1] = (last_begin, last_room + room)
        else:
            joined.append((begin, room))
    return joined
