"""Saved inputs on a device: which of them stay there, and how those that go leave it. Sizes in bytes."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from lightning_ssd.activations.saved_input import SavedInput
from lightning_ssd.activations.spill_state import SpillState
from lightning_ssd.device.streams import Event, Streams


class DeviceRoom(Protocol):
    """Memory of the device that parameters leave free."""

    def try_lend(self, nbytes: int) -> bool:
        """Take ``nbytes`` of it; False if there is less."""
        ...

    def take_back(self, nbytes: int) -> None:
        """Undo `try_lend`."""
        ...


class DeviceInputs:
    """Saved inputs on the device that nobody else holds.

    [Note: inputs on a device] They stay there while there is room. Those that were seen last stay in any case, so that
    what leaves was made a block ago: its copy waits for nothing that compute has yet to do, and runs beside the next
    block. What leaves keeps its memory until the copy is over. Compute, not the host, waits for that copy before more
    than twice the largest input is leaving.

    Args:
        streams: Of the device.
        room: For those that stay.
    """

    def __init__(self, streams: Streams, room: DeviceRoom) -> None:
        self._streams = streams
        self._room = room
        self._last: list[tuple[weakref.ref[SavedInput], int]] = []  # without room; and their bytes
        self._largest_nbytes = 0
        self._leaving: deque[tuple[Tensor, Event]] = deque()  # the oldest first

    def add(self, found: list[tuple[SavedInput, int]], evict_one: Callable[[], bool]) -> list[SavedInput]:
        """Nobody but us holds some inputs any more.

        Args:
            found: The inputs, and how many bytes of device memory they take.
            evict_one: Lets one go that has room, and is needed last; False if there is none.

        Returns:
            What must leave the device now.
        """
        if not found:
            return []
        before, self._last = self._last, [(weakref.ref(saved), nbytes) for saved, nbytes in found]
        self._largest_nbytes = max(self._largest_nbytes, *(nbytes for _, nbytes in found))
        earlier = [(ref(), nbytes) for ref, nbytes in before]
        live = [(saved, nbytes) for saved, nbytes in earlier if saved is not None and saved.has_values]
        return [saved for saved, nbytes in live if not self._may_stay(saved.state, nbytes, evict_one)]

    def _may_stay(self, state: SpillState, nbytes: int, evict_one: Callable[[], bool]) -> bool:
        while not self._room.try_lend(nbytes):
            if not evict_one():
                return False
        state.device_nbytes = nbytes
        return True

    def leave(self, data: Tensor, copied: Event | None) -> None:
        """``data`` is being copied to the host, and nobody else holds it."""
        if copied is None:
            return
        while self._leaving and self._leaving[0][1].query():
            self._leaving.popleft()
        while self._leaving and self._leaving_nbytes > self._largest_nbytes:
            self._streams.use(self._leaving[0][1])  # before it is dropped
            self._leaving.popleft()
        self._leaving.append((data, copied))

    @property
    def _leaving_nbytes(self) -> int:
        return sum(data.untyped_storage().nbytes() for data, _ in self._leaving)

    def end(self, state: SpillState) -> None:
        """An input leaves, or is gone."""
        if state.device_nbytes:
            self._room.take_back(state.device_nbytes)
            state.device_nbytes = 0

    def close(self) -> None:
        """Compute waits for what is leaving; then its memory may go."""
        while self._leaving:
            self._streams.use(self._leaving[0][1])
            self._leaving.popleft()
        self._last.clear()
