"""The host memory that we lend: one anonymous mapping of exact size, cut into buffers; bytes, 4096-aligned.

Nothing is allocated while training. Each buffer has one owner; it returns to the pool by `Pool.give_back`, at once or,
if a tensor on it is still alive, as soon as that tensor dies and somebody needs the space.
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
    """One lent piece of a pool.

    Attributes:
        offset: First byte, counted in the pool.
        address: The same as an address.
        nbytes: Length.
        owner: Who holds it, for messages.
    """

    def __init__(self, memory: mmap.mmap, base: int, offset: int, nbytes: int, owner: str) -> None:
        self._memory = memory
        self._views = Views(memory)
        self.offset = offset
        self.address = base + offset
        self.nbytes = nbytes
        self.owner = owner

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """A tensor of ``shape`` at byte ``offset`` of this buffer; the buffer is in use as long as it lives."""
        return self._views.tensor(self.offset + offset, dtype, shape)

    def hold(self) -> object:
        """For a transfer to keep: as long as it lives the buffer is in use, also if it is given back while it hangs."""
        return self._views.hold(self.offset)

    @property
    def in_use(self) -> bool:
        """Whether a tensor on this buffer, or a view of one, still exists."""
        return self._views.in_use

    @property
    def is_viewed(self) -> bool:
        """Whether a tensor is on this buffer; a transfer that holds it does not count."""
        return self._views.are_seen

    def fill(self, byte: int, offset: int = 0, nbytes: int | None = None) -> None:
        """Overwrite ``nbytes`` at ``offset``, by default every byte."""
        ctypes.memset(self.address + offset, byte, self.nbytes if nbytes is None else nbytes)


def map_anonymous(nbytes: int) -> mmap.mmap:
    """Anonymous memory, page-aligned, in huge pages where there is more than one; forked processes have none of it.

    See [Note: forks] for the latter.
    A transfer from scattered small pages is cut into many requests: huge pages read and wrote 2 to 3 times faster on a
    virtio disk (tests/benchmarks/bench_io.py measures them beside fio's).
    """
    is_large = nbytes >= HUGE_PAGE_NBYTES
    nbytes = round_up(nbytes, HUGE_PAGE_NBYTES) if is_large else nbytes
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    forked.withhold(memory)
    if is_large:
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def pool_nbytes(nbytes: int) -> int:
    """Bytes that a pool for ``nbytes`` takes."""
    return round_up(max(nbytes, BLOCK_NBYTES))


class Pool:
    """Buffers of any size out of ``nbytes`` of anonymous memory, first fit from both ends, neighbours joined.

    Args:
        nbytes: Size of the pool.
        name: What messages call it.
        arena: Memory that it is a part of, from byte ``begin``; None maps memory of its own.
        poison: Fill what comes back with NaN bytes (0xFF), so that a use after return shows (for tests).
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
        self._lingering: list[Buffer] = []  # given back while a tensor on them was alive

    def try_lend(self, nbytes: int, owner: str, make_room: Callable[[], bool] | None = None) -> Buffer | None:
        """A buffer of at least ``nbytes``, or None if there is no room now.

        Args:
            nbytes: Bytes needed.
            owner: Who asks, for messages.
            make_room: Called while there is no room; gives something back and returns True, or returns False.
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
        """Return a buffer. While a tensor on it is alive it lingers: nobody gets it before that tensor is gone."""
        if self._lent.get(buffer.offset) is not buffer:  # nobody's, or by now somebody else's
            raise ResidencyError(f"{self.name}: buffer of {buffer.owner} was given back twice")
        del self._lent[buffer.offset]
        if buffer.in_use:
            self._lingering.append(buffer)
        else:
            self._reclaim(buffer)

    def is_cut_by(self, held: Sequence[Buffer], nbytes: int) -> bool:
        """Whether ``held``, if all else came back, would leave ``nbytes`` free, but not in one piece."""
        pieces = [(self._end - self.nbytes, self.nbytes)]
        for buffer in sorted(held, key=lambda buffer: buffer.offset):
            begin, room = pieces.pop()
            rest = buffer.offset + buffer.nbytes
            pieces += [(begin, buffer.offset - begin), (rest, begin + room - rest)]
        rooms = [room for _, room in pieces]
        return max(rooms) < round_up(nbytes) <= sum(rooms)

    def pass_on(self) -> list[tuple[int, int]]:
        """Let a process that is forked next have the buffers that tensors view: ``(offset, nbytes)`` of each."""
        viewed = [b for b in (*self._lent.values(), *self._lingering) if b.is_viewed]
        for buffer in viewed:
            forked.pass_on(self._memory, buffer.offset, buffer.nbytes)
        return [(buffer.offset, buffer.nbytes) for buffer in viewed]

    def withhold(self) -> None:
        """Undo `pass_on`."""
        forked.withhold(self._memory, self._end - self.nbytes, self.nbytes)

    def forbid(self, passed_on: list[tuple[int, int]]) -> None:
        """In a forked process: nothing may be read here but what was passed on; of an arena nothing else at all."""
        forked.forbid(self._memory, passed_on)

    @property
    def num_lent(self) -> int:
        """Buffers that have an owner now."""
        return len(self._lent)

    @property
    def lingering(self) -> list[str]:
        """Owners of buffers that were given back but are still referenced by a tensor somewhere."""
        self._collect()
        return [buffer.owner for buffer in self._lingering]

    def close(self) -> None:
        """Let go of the memory. The system has it back at once, but for buffers under tensors that live on.

        No transfer on it may be in flight. It is unmapped when the last tensor on it dies.
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
                # The last stretch is filled from its end: a buffer in the middle would leave the free memory in two
                # pieces, neither long enough for the one other unit that the smallest plan has room for.
                is_last = offset > self._end - self.nbytes and offset + room == self._end
                begin = offset + room - need if is_last else offset
                rest = (offset, room - need) if is_last else (offset + need, room - need)
                self._free[i : i + 1] = [rest] if room > need else []
                buffer = Buffer(self._memory, self._base, begin, need, owner)
                self._lent[begin] = buffer
                return buffer
        return None

    def _collect(self) -> None:
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
        kept = ", ".join(f"{b.owner} {fmt(b.nbytes)}" for b in self._lingering) or "nothing"
        return (
            f"{owner} needs {fmt(nbytes)} of {self.name} memory ({fmt(self.nbytes)} in all); in use: {held}; "
            f"released but still referenced by tensors kept outside: {kept}; "
            "raise host_memory, cut smaller units with units=..., or do not keep views of parameters"
        )


def with_span(free: list[tuple[int, int]], offset: int, nbytes: int) -> list[tuple[int, int]]:
    """Free stretches ``(offset, nbytes)``, by offset, and one more; neighbours are joined."""
    spans = sorted([*free, (offset, nbytes)])
    joined = [spans[0]]
    for begin, room in spans[1:]:
        last_begin, last_room = joined[-1]
        if last_begin + last_room == begin:
            joined[-1] = (last_begin, last_room + room)
        else:
            joined.append((begin, room))
    return joined
