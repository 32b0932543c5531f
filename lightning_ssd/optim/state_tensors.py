"""The tensors of one update: those that stream through chunk buffers, and those that are changed in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.io.engine import Transfer
from lightning_ssd.memory.pool import Pool
from lightning_ssd.sizes import round_up
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.layout import UnitLayout
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.store.strides import Stride
from lightning_ssd.units.host_copy import UpdateTarget


class ChunkBuffer:
    """A buffer for one chunk of every kind, and the transfers under way on it.

    Args:
        pool: Lends the buffer.
        sizes: Kinds and their bytes.
        owner: The unit, for messages.
        nbytes: At least so many bytes are lent: buffers of equal size leave no gaps in the pool.
        make_room: See `Pool.lend`.
    """

    def __init__(
        self,
        pool: Pool,
        sizes: list[tuple[str, int]],
        owner: str,
        *,
        nbytes: int = 0,
        make_room: Callable[[], bool] | None = None,
    ) -> None:
        self._pool = pool
        self._transfers: list[Transfer] = []
        self._places: dict[str, tuple[int, int]] = {}  # offset and bytes of a kind
        end = 0
        for kind, size in sizes:
            self._places[kind] = (end, size)
            end += round_up(size)
        self._buffer = pool.lend(max(end, nbytes), f"update of unit {owner!r}", make_room)

    def add(
        self,
        start: Callable[..., Transfer],
        generation: Generation,
        kind: str,
        offset: int,
        nbytes: int,
        out: Tensor | None = None,
    ) -> None:
        """Start a transfer of bytes of a generation's data section: from or to ``out``, else the buffer's memory."""
        if not nbytes:  # a unit of parameters without elements
            return
        if out is None:
            address = self._buffer.address + self._places[kind][0]
            transfer = start(generation, offset, address, nbytes, keep=self._buffer.hold())
        else:
            transfer = start(generation, offset, out.data_ptr() + offset, nbytes, keep=out)
        self._transfers.append(transfer)

    def clear(self, kind: str) -> None:
        """Zeros, for a kind that has no generation yet."""
        self._buffer.fill(0, *self._places[kind])

    def tensor(
        self, kind: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0, stride: Stride | None = None
    ) -> Tensor:
        """A tensor at byte ``offset`` of the memory of ``kind``."""
        return self._buffer.tensor(self._places[kind][0] + offset, dtype, shape, stride)

    def wait(self) -> None:
        """Return when the transfers are over.

        Raises:
            IOFailure: One of them failed.
        """
        while self._transfers:
            self._transfers[0].wait()
            del self._transfers[0]

    def close(self) -> None:
        """Give the buffer back, after the transfers on it are over."""
        for transfer in self._transfers:
            with suppress(SSDOffloadError):  # reported by `wait`, or another error is on its way up
                transfer.wait()
        self._transfers.clear()
        self._pool.give_back(self._buffer)


@dataclass
class StateTensor:
    """One kind of a unit in an update: streamed through buffers, or in memory and changed there.

    Attributes:
        kind: Which.
        layout: Of its files.
        current: What is read.
        in_memory: One tensor per parameter, where the plan holds the kind in memory; [Note: in memory].
        out: All elements, flat, of what is written to a new file from where compute will read it.
    """

    kind: str
    layout: UnitLayout
    current: Generation | None
    in_memory: tuple[Tensor, ...] | None
    out: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its tensors."""
        return dtype_of(self.layout.dtype)

    def whole(self, buffer: ChunkBuffer, index: int) -> Tensor:
        """Parameter ``index`` of a buffer that holds the whole unit."""
        if self.in_memory is not None:
            return self.in_memory[index]
        entry, itemsize = self.layout.entries[index], self.layout.itemsize
        if self.out is not None:
            return entry.unflatten(self.out[entry.begin // itemsize : entry.end // itemsize])
        return buffer.tensor(self.kind, self.dtype, entry.shape, entry.begin, entry.stride)


class UpdateTensors:
    """Current and new generations of the kinds of one unit.

    Attributes:
        by_kind: By kind.
        streamed: Those in buffers.
        moves: Whether any is read or written.
        state_kinds: All but the parameter and its master, by the name that the rule has for each.
        master_kind: Which kind the rule updates.
        makes_master: There is no master yet: it is made from the parameter.
        master_source: The master's values, flat, where they are in memory and may not be changed there.
        is_touched: Kept memory may hold new values by now.
    """

    def __init__(
        self, store: StateStore, layouts: dict[str, UnitLayout], target: UpdateTarget | None, *, suffix: str = ""
    ) -> None:
        self._store = store
        unit = layouts["param"].unit
        self.by_kind = {
            k: StateTensor(k, lay, store.current(unit, k), store.in_memory(unit, k)) for k, lay in layouts.items()
        }
        self.moves = any(state.in_memory is None for state in self.by_kind.values())
        self.state_kinds = {k.removesuffix(suffix): k for k in layouts if k not in ("param", "master")}
        self.master_kind = "master" if "master" in layouts else "param"
        self.makes_master = self.master_kind == "master" and self.by_kind["master"].current is None
        self._target = target
        self.master_source: Tensor | None = None
        if target is not None and target.is_writable:
            self.by_kind["param"].out = target.values
        elif target is not None and target.is_current and self.master_kind == "param":
            self.master_source = target.values
        self.streamed = [c for c in self.by_kind.values() if c.in_memory is None and c.out is None]
        # Else it is in memory, or written from the master.
        self._reads_param = not (target is not None and target.is_current) and (
            self.master_kind == "param" or self.makes_master
        )
        self.is_touched = False
        self._new: list[Generation] = []

    def begin(self) -> None:
        """New generations of every kind."""
        for state in self.by_kind.values():
            if state.current is None and state.in_memory is not None:
                for tensor in state.in_memory:
                    tensor.zero_()
        self._new = self._store.begin([state.layout for state in self.by_kind.values()])

    def staged(self, buffer: ChunkBuffer, numel: int) -> dict[str, Tensor]:
        """The streamed kinds' tensors of a chunk."""
        return {state.kind: buffer.tensor(state.kind, state.dtype, (numel,)) for state in self.streamed}

    def read(self, buffer: ChunkBuffer, begin: int, end: int) -> None:
        """Start reading elements ``[begin, end)`` of what is not in memory."""
        if begin == end:  # a unit without elements: its files are headers
            return
        for state in self.by_kind.values():
            if state.in_memory is not None or (state.kind == "param" and not self._reads_param):
                continue
            if state.current is None:
                buffer.clear(state.kind)
            else:
                size = state.layout.itemsize
                buffer.add(
                    self._store.read,
                    state.current,
                    state.kind,
                    begin * size,
                    (end - begin) * size,
                    state.out,
                )

    def write(self, buffer: ChunkBuffer, begin: int, end: int) -> None:
        """Start writing them."""
        if begin == end:
            return
        for state, new in zip(self.by_kind.values(), self._new, strict=True):
            if state.in_memory is None:
                size = state.layout.itemsize
                buffer.add(self._store.write, new, state.kind, begin * size, (end - begin) * size, state.out)

    def end_source(self) -> None:
        """All is computed: give the buffer back if it was only read."""
        if self.by_kind["param"].out is None:
            self._end_target(is_new=False)

    def commit(self) -> None:
        """The new generations are the current ones."""
        self._store.commit(*self._new)
        self._end_target(is_new=True)

    def abandon(self, error: BaseException) -> None:
        """The update failed: the current generations stay, but those changed in memory are damaged."""
        unit = self.by_kind["param"].layout.unit
        damage = f"the update of unit {unit!r} failed midway ({error}): resume from the last checkpoint"
        for generation in self._new:
            self._store.abandon(generation, damage if self.is_touched else "")
        self._end_target(is_new=False)

    def _end_target(self, *, is_new: bool) -> None:
        target, self._target = self._target, None
        if target is not None:
            self.master_source = self.by_kind["param"].out = None
            target.end(is_new=is_new)
