"""The way from a host copy to where compute reads: in place on the CPU, by copies to a GPU (`device.param_copies`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lightning_ssd.device.param_copies import DeviceCopy
from lightning_ssd.memory.pool import Buffer
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.layout import UnitLayout


class Placement(Protocol):
    """Makes the device copy of a unit from its host copy, or from what is in memory. By default there are no copies."""

    keeps_buffer: bool
    """Whether the device copy views the host copy, which therefore stays as long as the unit is resident."""

    def place(self, layout: UnitLayout, buffer: Buffer, generation: Generation) -> DeviceCopy:
        """One tensor per parameter, in file order, on the device, ready for the current stream."""
        ...

    def place_tensors(self, tensors: Sequence[Tensor], generation: Generation) -> DeviceCopy:
        """The same of a unit that the plan holds in memory, in ``tensors``."""
        ...

    def release(self, device_copy: DeviceCopy) -> DeviceCopy | None:
        """Parameters view its tensors no longer; returns what may be used again, if anything."""
        ...

    def begin_step(self, kind: str) -> None:
        """A step of ``kind`` begins, such as ``"train"``; no unit is in use."""
        return

    def reuse(self, device_copy: DeviceCopy, generation: Generation) -> bool:
        """Whether what was released is there with the values of ``generation``; if so it is as if just placed."""
        return False

    def poll(self) -> None:
        """Let go of host memory whose copy is over."""
        return

    def wait_for_one(self) -> bool:
        """Let go of host memory after waiting for its copy; False if no copy is under way."""
        return False

    def try_lend(self, nbytes: int) -> bool:
        """Take device memory that parameters in use leave free; False if there is less."""
        return False

    def take_back(self, nbytes: int) -> None:
        """Undo `try_lend`."""
        return

    def close(self) -> None:
        """Let go of everything; every copy is over."""
        return


class InPlace(Placement):
    """The device is the CPU: parameters view the buffer that the disk was read into."""

    keeps_buffer = True

    def place(self, layout: UnitLayout, buffer: Buffer, generation: Generation) -> DeviceCopy:
        """See `Placement.place`; nothing is copied but parameters whose file offset is not 64-byte aligned."""
        for entry, place in zip(layout.entries, layout.places, strict=True):
            if place != entry.begin:
                ctypes.memmove(buffer.address + place, buffer.address + entry.begin, entry.nbytes)
        return DeviceCopy(_tensors(layout, buffer), generation)

    def place_tensors(self, tensors: Sequence[Tensor], generation: Generation) -> DeviceCopy:
        """See `Placement.place_tensors`; they are used where they are."""
        return DeviceCopy(list(tensors), generation)

    def release(self, device_copy: DeviceCopy) -> None:
        """See `Placement.release`; a tensor that lived on would keep the buffer in use."""
        device_copy.tensors.clear()


def _tensors(layout: UnitLayout, buffer: Buffer) -> list[Tensor]:
    dtype = dtype_of(layout.dtype)
    placed = zip(layout.entries, layout.places, strict=True)
    return [buffer.tensor(place, dtype, entry.shape, entry.stride) for entry, place in placed]
