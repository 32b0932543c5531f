"""The way from a host buffer to where compute reads, and back: the only code here that knows about devices."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_ssd.memory.pool import Buffer
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.layout import UnitLayout


class Route(Protocol):
    """Makes the bytes of a staged unit usable on the device."""

    keeps_buffer: bool
    """Whether the parameters view the host buffer, which therefore stays with the unit."""

    def install(self, layout: UnitLayout, buffer: Buffer) -> list[Tensor]:
        """One tensor per parameter, in file order, on the device, ready for the current stream."""
        ...

    def show(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The same of a unit whose host tensors are kept in memory."""
        ...


class HostRoute:
    """The device is the CPU: parameters view the buffer that the disk was read into."""

    keeps_buffer = True

    def install(self, layout: UnitLayout, buffer: Buffer) -> list[Tensor]:
        """See `Route.install`; nothing is copied but parameters whose file offset is not 64-byte aligned."""
        for entry, place in zip(layout.entries, layout.places, strict=True):
            if place != entry.begin:
                ctypes.memmove(buffer.address + place, buffer.address + entry.begin, entry.nbytes)
        return _tensors(layout, buffer)

    def show(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `Route.show`; they are used where they are."""
        return tensors


class CudaRoute:
    """The device is a GPU: one copy per unit on a stream of its own; compute waits for it by an event."""

    keeps_buffer = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def install(self, layout: UnitLayout, buffer: Buffer) -> list[Tensor]:
        """See `Route.install`. The host buffer is free when this returns."""
        dtype = dtype_of(layout.dtype)
        host = buffer.tensor(0, dtype, (layout.numel,))
        with torch.cuda.device(self._device), torch.inference_mode(False):
            on_device = torch.empty(layout.numel, dtype=dtype, device=self._device)
            # The allocator may hand out memory that compute still reads on its own stream: the copy waits for it.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                on_device.copy_(host, non_blocking=True)
                copied = self._stream.record_event()
            on_device.record_stream(self._stream)
            torch.cuda.current_stream().wait_event(copied)
            # sync: waits for the copy. The pool lends the buffer again right away; without this the next read
            # overwrites bytes that are still being sent.
            copied.synchronize()
            flat = on_device.view(-1)
            itemsize = layout.itemsize
            return [flat[e.begin // itemsize : e.end // itemsize].view(e.shape).clone() for e in layout.entries]

    def show(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `Route.show`; copies, since an update may change the host's while compute reads these."""
        with torch.inference_mode(False):
            return [tensor.to(self._device) for tensor in tensors]


def make_route(device: torch.device) -> Route:
    """The route to ``device``."""
    return CudaRoute(device) if device.type == "cuda" else HostRoute()


def _tensors(layout: UnitLayout, buffer: Buffer) -> list[Tensor]:
    dtype = dtype_of(layout.dtype)
    return [buffer.tensor(place, dtype, e.shape) for e, place in zip(layout.entries, layout.places, strict=True)]
