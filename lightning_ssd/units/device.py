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

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_ssd.errors import ResidencyError
from lightning_ssd.memory.device_plan import tensors_nbytes
from lightning_ssd.memory.pool import Buffer
from lightning_ssd.sizes import fmt
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.layout import UnitLayout


class Event(Protocol):
    """A point in the work of a device."""

    def query(self) -> bool:
        """Whether it was reached."""
        ...

    def synchronize(self) -> None:
        """Return when it was reached."""
        ...


class Streams(Protocol):
    """Compute's queue of work, which is the caller's current one, and one of copies to the device."""

    def send(self, hosts: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """Start to copy ``hosts`` to new memory of the device; what compute queues from now on may use it.

        The event tells when ``hosts`` may change.
        """
        ...

    def mark(self) -> Event:
        """The end of what compute has queued so far."""
        ...

    def wait(self, event: Event) -> None:
        """Copies sent from now on start after ``event``."""
        ...

    def share(self, tensor: Tensor) -> None:
        """Compute may go on to use ``tensor`` until the last reference to it goes, and then what it has queued."""
        ...


class DeviceCopy:
    """One unit where compute reads.

    Attributes:
        tensors: One per parameter, in file order; empty once their memory is used for something else.
        generation: Whose values they are.
        nbytes: What they take of device memory; 0 on the host.
        copied: When the host's bytes may change; None on the host, whose bytes these are.
    """

    def __init__(
        self, tensors: list[Tensor], generation: Generation, nbytes: int = 0, copied: Event | None = None
    ) -> None:
        self.tensors = tensors
        self.generation = generation
        self.nbytes = nbytes
        self.copied = copied

    def has(self, generation: Generation) -> bool:
        """Whether it still holds the values of ``generation``."""
        return self.generation is generation and bool(self.tensors)


class CopyToDevice:
    """The way to a device with memory of its own; see `Placement`, and [Note: device memory].

    Args:
        streams: The device.
        capacity_nbytes: Memory that units in use and released ones take together.
        is_limit: More than that for units in use is refused; else only released ones are held to it.
    """

    keeps_buffer = False

    def __init__(self, streams: Streams, *, capacity_nbytes: int, is_limit: bool) -> None:
        self._streams = streams
        self._capacity_nbytes = capacity_nbytes
        self._is_limit = is_limit
        self._nbytes = 0
        # The oldest first: in backward that is the one needed last. With what compute had queued at the release, and
        # whether somebody else held one of the tensors then.
        self._released: dict[DeviceCopy, tuple[Event, bool]] = {}
        # Copies under way, the oldest first. The host's tensors are held, so that their buffers are not lent again.
        self._sending: deque[tuple[Event, list[Tensor]]] = deque()

    def place(self, layout: UnitLayout, buffer: Buffer, generation: Generation) -> DeviceCopy:
        """See `Placement.place`; ``buffer`` is in use until the copy is over, and may be given back before."""
        dtype = dtype_of(layout.dtype)
        tensors = [buffer.tensor(entry.begin, dtype, entry.shape) for entry in layout.entries]
        return self.place_tensors(tensors, generation)

    def place_tensors(self, tensors: Sequence[Tensor], generation: Generation) -> DeviceCopy:
        """See `Placement.place_tensors`."""
        self.poll()
        nbytes = tensors_nbytes(tensor.nbytes for tensor in tensors)
        self._make_room(nbytes)
        found, copied = self._streams.send(tensors)
        self._sending.append((copied, list(tensors)))
        self._nbytes += nbytes
        return DeviceCopy(found, generation, nbytes, copied)

    def release(self, device_copy: DeviceCopy) -> DeviceCopy:
        """See `Placement.release`; it stays as long as nothing else needs the memory."""
        self._released[device_copy] = self._streams.mark(), any(map(_is_held_elsewhere, device_copy.tensors))
        return device_copy

    def reuse(self, device_copy: DeviceCopy) -> bool:
        """See `Placement.reuse`."""
        return self._released.pop(device_copy, None) is not None

    def poll(self) -> None:
        """See `Placement.poll`."""
        while self._sending and self._sending[0][0].query():
            self._sending.popleft()

    def wait_for_one(self) -> bool:
        """See `Placement.wait_for_one`."""
        if not self._sending:
            return False
        self._sending.popleft()[0].synchronize()  # sync: waits for the oldest copy
        return True

    def close(self) -> None:
        """See `Placement.close`."""
        while self.wait_for_one():
            pass
        while self._released:
            self._drop_oldest()

    def _make_room(self, nbytes: int) -> None:
        while self._released and self._nbytes + nbytes > self._capacity_nbytes:
            self._drop_oldest()
        if self._is_limit and self._nbytes + nbytes > self._capacity_nbytes:
            raise ResidencyError(
                f"parameters in use take {fmt(self._nbytes)} of device memory and {fmt(nbytes)} more are needed at the "
                f"same time, device_memory allows {fmt(self._capacity_nbytes)}: raise it, cut smaller units with "
                "units=..., or use fewer parameters outside the modules that own them"
            )

    def _drop_oldest(self) -> None:
        device_copy = next(iter(self._released))
        released, is_shared = self._released.pop(device_copy)
        self._streams.wait(self._streams.mark() if is_shared else released)
        if is_shared:
            for tensor in filter(_is_held_elsewhere, device_copy.tensors):
                self._streams.share(tensor)
        device_copy.tensors.clear()
        self._nbytes -= device_copy.nbytes


class CudaStreams:
    """The streams of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, hosts: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """See `Streams.send`; from memory that is not registered with CUDA the host waits for most of the copy."""
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._copies):
            # Allocated here, not on compute's stream: memory of compute's may be in use by what compute has queued,
            # and the copy would have to wait for all of that.
            tensors = [torch.empty(host.shape, dtype=host.dtype, device=self._device) for host in hosts]
            for tensor, host in zip(tensors, hosts, strict=True):
                tensor.copy_(host, non_blocking=True)
            copied = _event_on(self._copies)
        torch.cuda.current_stream(self._device).wait_event(copied)
        return tensors, copied

    def mark(self) -> Event:
        """See `Streams.mark`."""
        return _event_on(torch.cuda.current_stream(self._device))

    def wait(self, event: Event) -> None:
        """See `Streams.wait`."""
        assert isinstance(event, torch.cuda.Event)
        self._copies.wait_event(event)

    def share(self, tensor: Tensor) -> None:
        """See `Streams.share`."""
        tensor.record_stream(torch.cuda.current_stream(self._device))


def _event_on(stream: torch.cuda.Stream) -> torch.cuda.Event:
    # Without `blocking` a thread that waits spins, and takes a core from the updates.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _is_held_elsewhere(tensor: Tensor) -> bool:
    """Whether another tensor than ``tensor`` is on its storage."""
    storage = tensor.untyped_storage()  # which holds it too
    return int(torch._C._storage_Use_Count(storage._cdata)) > 2
