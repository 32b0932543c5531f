"""Devices made of host memory, on which work is done late and in any order that the events allow.

`SimulatedDevice` runs compute and copies from two queues, for tests of the route alone. `pretend` lets whole trainings
run with the route and the landing of a GPU: compute is immediate, but copies end late, and whoever relies on one
before its event has fired finds NaN, or is told.
"""

from __future__ import annotations

import ctypes
import functools
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ssd.device.param_copies import CopyToDevice
from lightning_ssd.device.streams import HostStreams, HostWaits, WaitFor
from lightning_ssd.memory import plan_pools
from lightning_ssd.memory.pool import Pool
from lightning_ssd.session import runtime as runtime_module
from lightning_ssd.session.settings import Settings


class SimulatedDevice:
    """Two queues. As in torch's allocator, memory is used again by copies as soon as the last tensor on it dies."""

    def __init__(self, nbytes: int, rng: random.Random) -> None:
        self.memory = Pool(nbytes, "device")
        self.rng = rng
        self.queues: dict[str, deque[Callable[[], object] | SimulatedEvent]] = {"compute": deque(), "copies": deque()}
        self.done = {"compute": 0, "copies": 0}
        self.queued = {"compute": 0, "copies": 0}
        self.shared: list[Tensor] = []

    # -- Streams

    def send(self, hosts: Sequence[Tensor]) -> tuple[list[Tensor], SimulatedEvent]:
        tensors = []
        for host in hosts:
            buffer = self.memory.lend(host.nbytes, "tensor")
            view = buffer.tensor(0, host.dtype, host.shape)
            # The only tensor on its storage, as one that the allocator makes.
            tensors.append(torch.empty(0, dtype=host.dtype).set_(view.untyped_storage(), 0, host.shape))
            del view
            self.memory.give_back(buffer)
            self._queue("copies", functools.partial(self.copy, tensors[-1].data_ptr(), host.data_ptr(), host.nbytes))
        copied = SimulatedEvent(self, "copies")
        self._queue("compute", copied)
        return tensors, copied

    def mark(self) -> SimulatedEvent:
        return SimulatedEvent(self, "compute")

    def wait(self, event: object) -> None:
        assert isinstance(event, SimulatedEvent)
        self._queue("copies", event)

    def share(self, tensor: Tensor) -> None:
        self.shared.append(tensor)  # for good, which is more than the contract asks

    # -- the device

    @staticmethod
    def copy(to: int, source: int, nbytes: int) -> None:
        ctypes.memmove(to, source, nbytes)

    def compute(self, work: Callable[[], object]) -> None:
        self._queue("compute", work)

    def advance(self, prefer: str = "") -> bool:
        """Do the next piece of work of one queue; False if none is left."""
        ready = [name for name, queue in self.queues.items() if queue and self._may_run(queue[0])]
        if not ready:
            assert not any(self.queues.values()), "each queue waits for the other"
            return False
        name = prefer if prefer in ready else self.rng.choice(ready)
        work = self.queues[name].popleft()
        self.done[name] += 1
        if not isinstance(work, SimulatedEvent):
            work()
        return True

    def _may_run(self, work: object) -> bool:
        return not isinstance(work, SimulatedEvent) or work.is_over

    def _queue(self, name: str, work: Any) -> None:
        self.queues[name].append(work)
        self.queued[name] += 1


class SimulatedEvent:
    def __init__(self, device: SimulatedDevice, queue: str) -> None:
        self._device, self._queue, self._position = device, queue, device.queued[queue]

    @property
    def is_over(self) -> bool:
        return self._device.done[self._queue] >= self._position

    def query(self) -> bool:
        while self._device.rng.random() < 0.7 and self._device.advance():
            pass
        return self.is_over

    def wait(self, why: WaitFor) -> None:
        while not self.is_over:
            assert self._device.advance()


class LateEvent:
    """Work that is done when somebody waits for it, or happens to ask often enough."""

    def __init__(self, finish: Callable[[], None], rng: random.Random, before: LateEvent | None = None) -> None:
        self._finish: Callable[[], None] | None = finish
        self._rng = rng
        self._lock = threading.Lock()
        self._before = before  # in the same queue

    def query(self) -> bool:
        if self._rng.random() < 0.2:
            self.wait()
        return self._finish is None

    def wait(self, why: WaitFor = WaitFor.END) -> None:
        with self._lock:
            if self._before is not None:
                self._before.wait()
                self._before = None
            finish, self._finish = self._finish, None
            if finish is not None:
                finish()


class LateStreams:
    """See `Streams`; compute is immediate, and tensors on the host are elsewhere for parameters and gradients.

    The host's bytes are compared with what was sent when the copy "ends"; where a copy goes to the host they are NaN
    until somebody waits.
    """

    def __init__(self, rng: random.Random) -> None:
        self.waits = HostWaits()
        self._rng = rng
        self._last: LateEvent | None = None

    def is_off_host(self, device: torch.device) -> bool:
        return False

    def send(self, hosts: Sequence[Tensor]) -> tuple[list[Tensor], LateEvent]:
        tensors = [host.clone() for host in hosts]
        # Addresses: a tensor held here would keep the buffer from reuse, which is the route's to do.
        sent = [(host.data_ptr(), ctypes.string_at(host.data_ptr(), host.nbytes)) for host in hosts if host.numel()]

        def finish() -> None:
            same = [ctypes.string_at(address, len(before)) == before for address, before in sent]
            assert all(same), "host memory changed while it was being sent"

        self._last = LateEvent(finish, self._rng, self._last)
        return tensors, self._last

    def mark(self) -> LateEvent:
        return LateEvent(lambda: None, self._rng)

    def wait(self, event: object) -> None:
        assert isinstance(event, LateEvent)

    def share(self, tensor: Tensor) -> None:
        pass

    def to_host(self, data: Tensor, memory: Tensor, after: object = None) -> LateEvent:
        values = data.clone()
        memory.view(-1).view(torch.uint8).fill_(0xFF) if memory.numel() else None

        def finish() -> None:
            with torch.no_grad():
                memory.data.copy_(values)

        return LateEvent(finish, self._rng)

    def to_device(self, memory: Tensor, data: Tensor, *after: object) -> None:
        data.copy_(memory)

    def use(self, event: object) -> None:
        pass


class OffHost(HostStreams):
    """The CPU's streams, but what is on the CPU counts as elsewhere."""

    def is_off_host(self, device: torch.device) -> bool:
        return True


class _NotPinned:
    def __init__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


def pretend(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> list[CopyToDevice]:
    """From now on sessions take the CPU for a device with memory of its own; returns their routes as they are made."""
    routes: list[CopyToDevice] = []

    def make(*args: Any, **options: Any) -> CopyToDevice:
        routes.append(CopyToDevice(*args, **(options | {"allowance": None})))
        return routes[-1]

    monkeypatch.setattr(runtime_module, "make_streams", lambda device: LateStreams(rng))
    monkeypatch.setattr(runtime_module, "CopyToDevice", make)
    monkeypatch.setattr(plan_pools, "Pinned", _NotPinned)
    monkeypatch.setattr(Settings, "is_off_host", property(lambda settings: True))
    return routes
