"""The tensors of one update: those that stream through chunk buffers, and those that are changed in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lightning_ssd.codec.encodings import BY_BLOCK
from lightning_ssd.kernels.bits import BLOCK_NUMEL
from lightning_ssd.store.chunk_buffer import ChunkBuffer
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.layout import Segment, UnitLayout
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.host_copy import UpdateTarget


@dataclass(eq=False)
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

    @property
    def is_by_block(self) -> bool:
        """Whether it has one number for each block of a parameter, and streams as a whole."""
        return self.kind in BY_BLOCK

    def piece(self, segment: Segment, staged: Tensor | None, begin: int) -> Tensor:
        """The part of ``segment``; ``staged`` has the elements from ``begin`` on, or the whole of what is by block."""
        if self.is_by_block:
            first = segment.offset // BLOCK_NUMEL
            num = -(-segment.numel // BLOCK_NUMEL)
            if self.in_memory is not None:
                return self.in_memory[segment.index][first : first + num]
            first += self.layout.entries[segment.index].begin // self.layout.itemsize
            return cast(Tensor, staged)[first : first + num]
        if self.in_memory is not None:
            flat = self.layout.entries[segment.index].flatten(self.in_memory[segment.index])
            return flat[segment.offset : segment.offset + segment.numel]
        if self.out is not None:
            return self.out[segment.begin : segment.end]
        return cast(Tensor, staged)[segment.begin - begin : segment.end - begin]

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
        streamed: Those in buffers, chunk by chunk.
        by_block: Those in buffers that have one number for each block; they stream as a whole.
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
        staged = [c for c in self.by_kind.values() if c.in_memory is None and c.out is None]
        self.streamed = [c for c in staged if not c.is_by_block]
        self.by_block = [c for c in staged if c.is_by_block]
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
            is_read = state.kind != "param" or self._reads_param
            if state.in_memory is not None or state.is_by_block or not is_read:
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
            if state.in_memory is None and not state.is_by_block:
                size = state.layout.itemsize
                buffer.add(self._store.write, new, state.kind, begin * size, (end - begin) * size, state.out)

    def read_blocks(self, buffer: ChunkBuffer) -> None:
        """Start reading what is by block."""
        for state in self.by_block:
            if state.current is None:
                buffer.clear(state.kind)
            else:
                buffer.add(self._store.read, state.current, state.kind, 0, state.layout.data_nbytes)

    def write_blocks(self, buffer: ChunkBuffer) -> None:
        """Start writing it."""
        for state, new in zip(self.by_kind.values(), self._new, strict=True):
            if state in self.by_block:
                buffer.add(self._store.write, new, state.kind, 0, state.layout.data_nbytes)

    def staged_blocks(self, buffer: ChunkBuffer) -> dict[str, Tensor]:
        """The tensors of what is by block."""
        return {state.kind: buffer.tensor(state.kind, state.dtype, (state.layout.numel,)) for state in self.by_block}

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
