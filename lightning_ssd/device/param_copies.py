"""Units on a device that is not the host: copies that neither the host nor compute waits for; sizes in bytes.

[Note: device memory] The tensors of a unit are allocated and written on a stream of copies and read on compute's. When
they are dropped, their memory returns to the allocator's pool of the stream of copies, and the next copy may overwrite
it at once. So a unit that is released is not dropped: it keeps its tensors, and the event of what compute had queued
by then. When their memory is needed, copies are told to wait, on the device, for that event, and only then are they
dropped. The host waits for none of this and runs ahead: while a block computes, the copy of the next is queued and
runs, in the memory of the one before. What was released and not dropped is also a cache: fetched again, as the last
block at the turn from forward to backward, it is used as it is.

A tensor that somebody else still holds when its unit is released may be read after the event: then copies wait for
all that compute has queued by the time of the drop, and what is held even then the allocator keeps from reuse itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ssd.device.allowance import LearnedAllowance
from lightning_ssd.device.streams import Event, Streams, WaitFor
from lightning_ssd.errors import ResidencyError
from lightning_ssd.memory.device_plan import tensors_nbytes
from lightning_ssd.memory.pool import Buffer
from lightning_ssd.sizes import fmt
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.layout import UnitLayout


class DeviceCopy:
    """One unit where compute reads.

    Attributes:
        tensors: One per parameter, in file order; empty once their memory is used for something else.
        generation: Whose values they are.
        nbytes: What they take of device memory; 0 on the host.
        copied: When the host's bytes may change; None on the host, whose bytes these are.
        is_stale: The values of ``generation`` may have changed since, in memory or where they were mapped.
    """

    def __init__(
        self, tensors: list[Tensor], generation: Generation, nbytes: int = 0, copied: Event | None = None
    ) -> None:
        self.tensors = tensors
        self.generation = generation
        self.nbytes = nbytes
        self.copied = copied
        self.is_stale = False

    def has(self, generation: Generation) -> bool:
        """Whether it still holds the values of ``generation``."""
        return self.generation is generation and bool(self.tensors) and not self.is_stale


class CopyToDevice:
    """The way to a device with memory of its own; see `Placement`, and [Note: device memory].

    Args:
        streams: The device.
        capacity_nbytes: Memory that units in use and released ones take together.
        reserve_nbytes: The part of it that is for units in use, and is not lent.
        is_limit: More than that for units in use is refused; else only released ones are held to it.
        allowance: Tells the capacity of each step; None if it stays the same.
    """

    keeps_buffer = False

    def __init__(
        self,
        streams: Streams,
        *,
        capacity_nbytes: int,
        reserve_nbytes: int | None = None,
        is_limit: bool,
        allowance: LearnedAllowance | None = None,
    ) -> None:
        self._streams = streams
        self._capacity_nbytes = capacity_nbytes
        self._reserve_nbytes = capacity_nbytes if reserve_nbytes is None else reserve_nbytes
        self._is_limit = is_limit
        self._lock = threading.RLock()  # units are released by the thread of updates too
        self._allowance = allowance
        self._goes_back = True
        self._nbytes = 0
        self._lent_nbytes = 0
        self._most_nbytes = 0  # of both, until now
        # The one that was released first comes first. With what compute had queued at the release, and
        # whether somebody else held one of the tensors then.
        self._released: dict[DeviceCopy, tuple[Event, bool]] = {}
        # Copies under way, the oldest first. The host's tensors are held, so that their buffers are not lent again.
        self._sending: deque[tuple[Event, list[Tensor]]] = deque()

    def place(self, layout: UnitLayout, buffer: Buffer, generation: Generation) -> DeviceCopy:
        """See `Placement.place`; ``buffer`` is in use until the copy is over, and may be given back before."""
        dtype = dtype_of(layout.dtype)
        tensors = [buffer.tensor(entry.begin, dtype, entry.shape, entry.stride) for entry in layout.entries]
        return self.place_tensors(tensors, generation)

    def place_tensors(self, tensors: Sequence[Tensor], generation: Generation) -> DeviceCopy:
        """See `Placement.place_tensors`."""
        nbytes = tensors_nbytes(tensor.nbytes for tensor in tensors)
        with self._lock:
            self.poll()
            self._make_room(nbytes)
            found, copied = self._streams.send(tensors)
            self._sending.append((copied, list(tensors)))
            self._nbytes += nbytes
            self._most_nbytes = max(self._most_nbytes, self._nbytes + self._lent_nbytes)
        return DeviceCopy(found, generation, nbytes, copied)

    def release(self, device_copy: DeviceCopy) -> DeviceCopy:
        """See `Placement.release`; it stays as long as nothing else needs the memory."""
        with self._lock:
            self._released[device_copy] = self._streams.mark(), any(map(_is_held_elsewhere, device_copy.tensors))
        return device_copy

    def begin_step(self, kind: str) -> None:
        """See `Placement.begin_step`."""
        with self._lock:
            self._goes_back = kind != "eval"
            if self._allowance is not None:
                self._capacity_nbytes = self._allowance.of_step(kind, self._most_nbytes)
                self._drop_until(0)

    def reuse(self, device_copy: DeviceCopy, generation: Generation) -> bool:
        """See `Placement.reuse`; if it is there with other values, it is dropped."""
        with self._lock:
            if device_copy not in self._released:
                return False
            if device_copy.has(generation):
                del self._released[device_copy]
                return True
            self._drop(device_copy)
            return False

    def poll(self) -> None:
        """See `Placement.poll`."""
        with self._lock:
            while self._sending and self._sending[0][0].query():
                self._sending.popleft()

    def wait_for_one(self) -> bool:
        """See `Placement.wait_for_one`."""
        with self._lock:
            if not self._sending:
                return False
            copied, hosts = self._sending.popleft()
        copied.wait(WaitFor.PARAM_BUFFER)  # sync: the oldest copy
        del hosts
        return True

    def try_lend(self, nbytes: int) -> bool:
        """Lend memory to saved inputs, before released units: an input that goes crosses twice, a unit once.

        Args:
            nbytes: How much.

        Returns:
            False if the reserve would have to be lent.
        """
        with self._lock:
            if self._lent_nbytes + nbytes > self._capacity_nbytes - self._reserve_nbytes:
                return False
            self._lent_nbytes += nbytes
            self._drop_until(0)
            self._most_nbytes = max(self._most_nbytes, self._nbytes + self._lent_nbytes)
            return True

    def take_back(self, nbytes: int) -> None:
        """Undo `try_lend`."""
        with self._lock:
            self._lent_nbytes -= nbytes

    def close(self) -> None:
        """See `Placement.close`."""
        while self.wait_for_one():
            pass
        with self._lock:
            while self._released:
                self._drop(next(iter(self._released)))

    def _make_room(self, nbytes: int) -> None:
        self._drop_until(nbytes)
        if self._is_limit and self._nbytes + nbytes > self._capacity_nbytes:
            raise ResidencyError(
                f"parameters in use take {fmt(self._nbytes)} of device memory and {fmt(nbytes)} more are needed at the "
                f"same time, device_memory allows {fmt(self._capacity_nbytes)}: raise it, cut smaller units with "
                "units=..., or use fewer parameters outside the modules that own them"
            )

    def _drop_until(self, nbytes: int) -> None:
        """Drop released units until there is room for ``nbytes``, or none is left."""
        while self._released and self._nbytes + nbytes > self._capacity_nbytes - self._lent_nbytes:
            # In a step that goes back, the one released first is needed last; in one that begins anew, the one
            # released last: units that come first stay, where the others would drive each other out.
            self._drop(next(iter(self._released)) if self._goes_back else next(reversed(self._released)))

    def _drop(self, device_copy: DeviceCopy) -> None:
        released, is_shared = self._released.pop(device_copy)
        self._streams.wait(self._streams.mark() if is_shared else released)
        if is_shared:
            for tensor in filter(_is_held_elsewhere, device_copy.tensors):
                self._streams.share(tensor)
        device_copy.tensors.clear()
        self._nbytes -= device_copy.nbytes


def _is_held_elsewhere(tensor: Tensor) -> bool:
    """Whether another tensor than ``tensor`` is on its storage."""
    storage = tensor.untyped_storage()  # which holds it too
    return int(torch._C._storage_Use_Count(storage._cdata)) > 2
