"""The streams of a device: compute's, and those of copies. Every wait of the host for one of them is counted.

[Note: host waits] The host queues work and runs ahead of the device. Where it waits, compute's queue runs empty and the
device idles. So one kind of work waits for another on the device, by events, and the host waits only where a bound on
memory needs it: each such place says why, `WaitFor`, and `HostWaits` counts it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class WaitFor(Enum):
    """Why the host waits for the device."""

    PARAM_BUFFER = "a host buffer, whose parameters are being copied to the device, is needed"
    IN_MEMORY_PARAMS = "parameters in memory, which an update changes next, are being copied to the device"
    GRAD = "a gradient is read on the host"
    GRAD_MEMORY = "a gradient comes off the device, and the pool of gradients has no memory for it"
    INPUT_BUFFER = "a host buffer, whose saved input is being copied, is needed"
    SPILL = "a saved input goes to the disk once it is on the host; a thread waits that does nothing else"
    END = "the session ends"


class HostWaits:
    """How often the host has waited for the device, by reason; see [Note: host waits].

    Attributes:
        found: The numbers. Asking for what is over already is no wait.
    """

    def __init__(self) -> None:
        self.found: Counter[WaitFor] = Counter()
        self._lock = threading.Lock()

    def add(self, why: WaitFor) -> None:
        """The host is about to wait."""
        with self._lock:
            self.found[why] += 1


class Event(Protocol):
    """A point in the work of a device."""

    def query(self) -> bool:
        """Whether it was reached."""
        ...

    def wait(self, why: WaitFor) -> None:
        """Return when it was reached; the thread sleeps until then."""
        ...


class Streams(Protocol):
    """Compute's queue of work, which is the caller's current one, and those of copies. Safe to use from many threads.

    Attributes:
        waits: What the host waited for.
    """

    waits: HostWaits

    def is_off_host(self, device: torch.device) -> bool:
        """Whether tensors on ``device`` take no host memory."""
        ...

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

    def to_host(self, data: Tensor, memory: Tensor, after: Event | None = None) -> Event | None:
        """Start to copy ``data`` to ``memory``.

        Args:
            data: On any device. It may be dropped once the event is over, or compute is told to `use` it.
            memory: On the host, of its shape and dtype.
            after: By then compute has made ``data``; None for all that it has queued.

        Returns:
            The event after which ``memory`` has the values; None if it has them already.
        """
        ...

    def to_device(self, memory: Tensor, data: Tensor, *after: Event) -> Event | None:
        """Start to copy ``memory`` to ``data``.

        Args:
            memory: On the host.
            data: Of its shape and dtype, on any device, allocated by compute, which must `use` the event before the
                tensor is read or dropped.
            after: By then ``memory`` has the values, and compute uses the memory of ``data`` for nothing else; none for
                all that compute has queued.

        Returns:
            The event after which ``data`` has the values and ``memory`` may be reused; None if that is so already.
        """
        ...

    def use(self, event: Event | None) -> None:
        """What compute queues from now on starts after ``event``."""
        ...


class CudaStreams:
    """The streams of a GPU; see `Streams`."""

    def __init__(self, device: torch.device) -> None:
        self.waits = HostWaits()
        self._device = device
        self._params = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Apart from parameters: a reload may wait for compute, and what is queued behind it would wait too.
        self._inputs = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._to_host = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def is_off_host(self, device: torch.device) -> bool:
        """See `Streams.is_off_host`."""
        return device.type != "cpu"

    def send(self, hosts: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """See `Streams.send`; from memory that is not registered with CUDA the host waits for most of the copy."""
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._params):
            # Allocated here, not on compute's stream: memory of compute's may be in use by what compute has queued,
            # and the copy would have to wait for all of that.
            tensors = [torch.empty_like(host, device=self._device) for host in hosts]
            for tensor, host in zip(tensors, hosts, strict=True):
                tensor.copy_(host, non_blocking=True)
            copied = self._event_on(self._params)
        self.use(copied)
        return tensors, copied

    def mark(self) -> Event:
        """See `Streams.mark`."""
        return self._event_on(self._compute)

    def wait(self, event: Event) -> None:
        """See `Streams.wait`."""
        self._params.wait_event(_cuda_event(event))

    def share(self, tensor: Tensor) -> None:
        """See `Streams.share`."""
        tensor.record_stream(self._compute)

    def to_host(self, data: Tensor, memory: Tensor, after: Event | None = None) -> Event | None:
        """See `Streams.to_host`."""
        if not data.is_cuda:
            memory.copy_(data)
            return None
        self._to_host.wait_event(_cuda_event(self.mark() if after is None else after))
        with torch.cuda.stream(self._to_host):
            memory.copy_(data, non_blocking=True)
            return self._event_on(self._to_host)

    def to_device(self, memory: Tensor, data: Tensor, *after: Event) -> Event | None:
        """See `Streams.to_device`."""
        if not data.is_cuda:
            data.copy_(memory)
            return None
        for event in after or (self.mark(),):
            self._inputs.wait_event(_cuda_event(event))
        with torch.cuda.stream(self._inputs):
            data.copy_(memory, non_blocking=True)
            return self._event_on(self._inputs)

    def use(self, event: Event | None) -> None:
        """See `Streams.use`."""
        if event is not None:
            self._compute.wait_event(_cuda_event(event))

    @property
    def _compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def _event_on(self, stream: torch.cuda.Stream) -> CudaEvent:
        return CudaEvent(stream, self.waits)


class CudaEvent:
    """The end of what ``stream`` has been given; see `Event`."""

    def __init__(self, stream: torch.cuda.Stream, waits: HostWaits) -> None:
        # Without `blocking` a thread that waits spins, and takes a core from the updates.
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)
        self._waits = waits

    def query(self) -> bool:
        """See `Event.query`."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self, why: WaitFor) -> None:
        """See `Event.wait`."""
        if not self.query():
            self._waits.add(why)
            self.event.synchronize()


class HostStreams:
    """The device is the CPU: tensors are copied at once, and nobody waits; see `Streams`."""

    def __init__(self) -> None:
        self.waits = HostWaits()

    def is_off_host(self, device: torch.device) -> bool:
        """See `Streams.is_off_host`."""
        return False

    def send(self, hosts: Sequence[Tensor]) -> tuple[list[Tensor], Event]:
        """See `Streams.send`."""
        return [host.clone() for host in hosts], _Over()

    def mark(self) -> Event:
        """See `Streams.mark`."""
        return _Over()

    def wait(self, event: Event) -> None:
        """See `Streams.wait`."""

    def share(self, tensor: Tensor) -> None:
        """See `Streams.share`."""

    def to_host(self, data: Tensor, memory: Tensor, after: Event | None = None) -> None:
        """See `Streams.to_host`."""
        memory.copy_(data)

    def to_device(self, memory: Tensor, data: Tensor, *after: Event) -> None:
        """See `Streams.to_device`."""
        data.copy_(memory)

    def use(self, event: Event | None) -> None:
        """See `Streams.use`."""


class _Over:
    """What is over."""

    def query(self) -> bool:
        """See `Event.query`."""
        return True

    def wait(self, why: WaitFor) -> None:
        """See `Event.wait`."""


def make_streams(device: torch.device) -> Streams:
    """The streams of ``device``."""
    return HostStreams() if device.type == "cpu" else CudaStreams(device)


def _cuda_event(event: Event) -> torch.cuda.Event:
    assert isinstance(event, CudaEvent)
    return event.event
