"""The update of one unit: stored state meets gradients on the CPU and becomes new generations.

An elementwise rule sees the unit in chunks: while chunk c is computed, c+1 is being read and c-1 written, so host
memory is depth x chunk whatever the unit's size. Any other rule sees whole parameters, with the unit's state in memory.

[Note: write-behind] The last chunks of a unit are written while the first chunks of the next unit are read, so that
the disk does not idle between units. `UpdatePipeline.update` returns when all is computed; the new generations become
current in the next call of `update` or in `finish`.

[Note: suffix] Kinds are named as the optimizer's class names its states. Where a second optimizer updates parameters
that another one updates too, its kinds have a suffix: ``exp_avg@1``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from copy import deepcopy

from torch import Tensor

from lightning_ssd.codec.forms import Piece
from lightning_ssd.errors import ResidencyError
from lightning_ssd.kernels import api as kernels
from lightning_ssd.memory.pool import Pool
from lightning_ssd.optim.chunking import UpdatePools
from lightning_ssd.optim.rules import Rule
from lightning_ssd.optim.state_tensors import UpdateTensors
from lightning_ssd.optim.update import ParameterUpdate, PendingUpdate
from lightning_ssd.sizes import round_up
from lightning_ssd.store.chunk_buffer import ChunkBuffer
from lightning_ssd.store.layout import Segment, suffix_of
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.trace.recorder import Lane, Trace
from lightning_ssd.units.host_copy import UpdateTarget
from lightning_ssd.units.unit import Unit


class UpdatePipeline:
    """Runs updates, one at a time.

    Args:
        store: Where states and parameters are.
        pool: Memory for updates, ``depth`` chunk buffers of equal size.
        chunk_numel: Elements of a chunk, a multiple of 2**19.
        depth: Chunks in memory at a time.
        trace: Gets the events ``update`` and ``updated``, and spans.
    """

    def __init__(self, store: StateStore, pool: Pool, *, chunk_numel: int, depth: int, trace: Trace) -> None:
        self._store = store
        self._pools = UpdatePools(pool, chunk_numel=chunk_numel, depth=depth)
        self._trace = trace
        self._behind: _Writes | None = None

    def update(self, update: PendingUpdate, target: UpdateTarget | None = None) -> None:
        """Update the parameters of a unit; returns when all is computed, see [Note: write-behind].

        Args:
            update: What to update; `PendingUpdate.complete` is called once its new generations are the current ones.
            target: Where the parameters of the unit are in memory, or may be; ended here.

        Raises:
            ResidencyError: A gradient was changed in place since the step.
            IOFailure: The disk failed, under this update or under the writes of the one before; the generations before
                an update that failed are still the current ones.
        """
        unit, rule, parts = update.unit, update.rule, update.parts
        self._trace.mark("update", unit.name)
        with self._trace.span(Lane.UPDATE, "update", unit.name):
            try:
                writes = _Writes(update, self._tensors(update, target))
            except BaseException:
                if target is not None:
                    target.end(is_new=False)
                raise
            try:
                _require_unchanged(unit, parts)
                writes.tensors.begin()
                for part in parts.values():
                    rule.begin(part.scalars, part.options)
                if rule.is_elementwise:
                    self._in_chunks(unit, rule, parts, writes)
                    for part in parts.values():
                        part.initialised.update(rule.kinds(part.options))
                else:
                    self._in_whole(unit, rule, parts, writes, update.suffix)
                writes.tensors.end_source()
                self.finish()
            except BaseException as error:
                writes.fail(error)
                raise
            self._behind = writes
            if not writes.buffers:  # all of it is in memory
                self.finish()

    def finish(self) -> None:
        """Return when the new generations of every update are the current ones.

        Raises:
            IOFailure: The disk failed; the generations before the update are still the current ones.
        """
        writes, self._behind = self._behind, None
        if writes is None:
            return
        try:
            while writes.buffers:
                self._wait(writes.buffers[0], writes.update.unit)  # sync: the last writes
                writes.buffers.popleft().close()
            if writes.blocks is not None:
                self._wait(writes.blocks, writes.update.unit)  # sync: the last write
                writes.end_blocks()
            writes.tensors.commit()
        except BaseException as error:
            writes.fail(error)
            raise
        self._trace.mark("updated", writes.update.unit.name)
        writes.update.complete()

    def _make_room(self) -> bool:
        """Wait until a buffer of the update before is written, and give it back; False if there is none."""
        if self._behind is None or not self._behind.buffers:
            return False
        self._wait(self._behind.buffers[0], self._behind.update.unit)  # sync: its writes
        self._behind.buffers.popleft().close()
        return True

    # -- elementwise ---------------------------------------------------------------------------------------------

    def _in_chunks(self, unit: Unit, rule: Rule, parts: Mapping[int, ParameterUpdate], writes: _Writes) -> None:
        flats = {i: unit.layout.entries[i].flatten(part.grad.detach()) for i, part in parts.items()}
        tensors = writes.tensors
        if not tensors.moves:
            tensors.is_touched = True
            self._compute(unit, rule, parts, flats, tensors, None, 0, unit.layout.numel)
            return
        if tensors.by_block:
            writes.blocks = self._pools.lend_blocks(unit.name, tensors, self._finish_one)
            tensors.read_blocks(writes.blocks)
        chunking = self._pools.chunking(unit.layout, tensors)
        pending: deque[tuple[ChunkBuffer, int, int]] = deque()
        # One buffer is left free of reads, so that its writes run while the next chunk is computed.
        most_pending = max(chunking.depth - 1, 1)

        def compute_one() -> None:
            self.finish()  # the writes of the update before were submitted before the reads that we wait for now
            buffer, begin, end = pending.popleft()
            self._wait(buffer, unit)  # sync: the chunk's reads
            if writes.blocks is not None:
                self._wait(writes.blocks, unit)  # sync: the same
            tensors.is_touched = True
            self._compute(unit, rule, parts, flats, tensors, buffer, begin, end, writes.blocks)
            tensors.write(buffer, begin, end)

        for i, (begin, end) in enumerate(chunking.ranges):
            if i < chunking.depth:
                buffer = chunking.lend(unit.name, self._make_room)
                writes.buffers.append(buffer)
            else:
                writes.buffers.rotate(-1)  # the one whose writes began first comes to the front
                buffer = writes.buffers[-1]
            self._wait(buffer, unit)  # sync: the chunk that it held before is on disk
            tensors.read(buffer, begin, end)
            pending.append((buffer, begin, end))
            if len(pending) == most_pending:
                compute_one()
        while pending:
            compute_one()
        if writes.blocks is not None:
            tensors.write_blocks(writes.blocks)

    def _wait(self, buffer: ChunkBuffer, unit: Unit) -> None:
        with self._trace.span(Lane.WAIT, "update waits for the disk", unit.name):
            buffer.wait()

    def _compute(
        self,
        unit: Unit,
        rule: Rule,
        parts: Mapping[int, ParameterUpdate],
        flats: Mapping[int, Tensor],
        tensors: UpdateTensors,
        buffer: ChunkBuffer | None,
        begin: int,
        end: int,
        blocks: ChunkBuffer | None = None,
    ) -> None:
        staged = {} if buffer is None else tensors.staged(buffer, end - begin)
        staged |= {} if blocks is None else tensors.staged_blocks(blocks)

        def view(kind: str, segment: Segment) -> Tensor:
            return tensors.by_kind[kind].piece(segment, staged.get(kind), begin)

        with self._trace.span(Lane.UPDATE, "rule", unit.name):
            for segment in unit.layout.segments(begin, end):
                master = view(tensors.master_kind, segment)
                param = view("param", segment) if tensors.master_kind != "param" else None
                if tensors.makes_master and param is not None:
                    kernels.convert_(master, param)
                elif tensors.master_source is not None:
                    kernels.convert_(master, tensors.master_source[segment.begin : segment.end])
                part = parts.get(segment.index)
                if part is None:
                    if param is not None:
                        kernels.convert_(param, master)  # parameters without an update keep their value
                    continue
                states = {name: view(kind, segment) for name, kind in tensors.state_kinds.items()}
                grad = flats[segment.index][segment.offset : segment.offset + segment.numel]
                is_first = not part.initialised
                if is_first:
                    unit.form.reset(states)  # the file may hold the state of an optimizer that was replaced
                if unit.form.is_plain:
                    rule.update(master, grad, states, part.scalars, part.options, is_first=is_first, out=param)
                else:
                    piece = Piece(master, grad, states, param, unit.names[segment.index], segment.offset)
                    rule.update_encoded(unit.form, piece, part.scalars, part.options)

    # -- any rule ------------------------------------------------------------------------------------------------

    def _in_whole(
        self, unit: Unit, rule: Rule, parts: Mapping[int, ParameterUpdate], writes: _Writes, suffix: str
    ) -> None:
        self.finish()
        numel, tensors = unit.layout.numel, writes.tensors
        sizes = [(state_tensor.kind, state_tensor.layout.itemsize * numel) for state_tensor in tensors.streamed]
        buffer = ChunkBuffer(self._pools.pool_for(sum(round_up(nbytes) for _, nbytes in sizes)), sizes, unit.name)
        writes.buffers.append(buffer)
        tensors.read(buffer, 0, numel)
        self._wait(buffer, unit)  # sync: the unit's state
        tensors.is_touched = True
        with self._trace.span(Lane.UPDATE, "rule", unit.name):
            late: dict[str, dict[int, Tensor]] = {}
            for index in range(len(unit.shapes)):  # parameters without elements too: they have a step count
                self._update_whole(rule, parts.get(index), tensors, buffer, index, late)
        self._add_kinds(unit, parts, late, suffix)
        tensors.write(buffer, 0, numel)

    def _finish_one(self) -> bool:
        """Wait until the update before is written, and give its memory back; False if there is none."""
        is_behind = self._behind is not None
        self.finish()
        return is_behind

    def _add_kinds(
        self,
        unit: Unit,
        parts: Mapping[int, ParameterUpdate],
        late: Mapping[str, Mapping[int, Tensor]],
        suffix: str,
    ) -> None:
        """Make files of states that the class has made for the first time.

        If the update fails afterwards they stay, and no parameter refers to them.
        """
        for kind, states in late.items():
            self._store.put(unit.layout_of(kind + suffix), states.get)
            for index in states:
                parts[index].initialised.add(kind)

    @staticmethod
    def _update_whole(
        rule: Rule,
        part: ParameterUpdate | None,
        tensors: UpdateTensors,
        buffer: ChunkBuffer,
        index: int,
        late: dict[str, dict[int, Tensor]],
    ) -> None:
        views = {kind: state_tensor.whole(buffer, index) for kind, state_tensor in tensors.by_kind.items()}
        places = {name: views[kind] for name, kind in tensors.state_kinds.items()}
        master = views[tensors.master_kind]
        if tensors.makes_master:
            master.copy_(views["param"])
        elif tensors.master_source is not None:
            entry, itemsize = tensors.by_kind["param"].layout.entries[index], master.itemsize
            master.copy_(entry.unflatten(tensors.master_source[entry.begin // itemsize : entry.end // itemsize]))
        if part is not None:
            states = {k: v for k, v in places.items() if k in part.initialised}
            grad = part.grad.detach().to(master.dtype)
            rule.update(master, grad, states, part.scalars, part.options, is_first=not part.initialised)
            for kind, state in states.items():
                if kind not in part.initialised and kind in places:
                    places[kind].copy_(state)
                    part.initialised.add(kind)
                elif kind not in places:
                    late.setdefault(kind, {})[index] = state
            part.initialised.intersection_update(states)  # a class may delete a state
        if tensors.master_kind != "param":
            views["param"].copy_(master)

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _tensors(self, update: PendingUpdate, target: UpdateTarget | None) -> UpdateTensors:
        unit, suffix = update.unit, update.suffix
        kinds = [kind for kind in self._store.state_kinds(unit.name) if suffix_of(kind) == suffix]
        made = [kind + suffix for part in update.parts.values() for kind in update.rule.kinds(part.options)]
        files = unit.form.layouts([*(["master"] if unit.has_master else []), *made])
        layouts = {kind: unit.layout_of(kind) for kind in dict.fromkeys([*files, *kinds])}
        return UpdateTensors(self._store, {"param": unit.layout, **layouts}, target, suffix=suffix)


class _Writes:
    """What an update writes, until its generations are current or dropped.

    Args:
        update: The update.
        tensors: The kinds of its unit.

    Attributes:
        buffers: Its chunk buffers; the one whose writes began first is at the front.
        blocks: The buffer of what is by block, if there is any.
    """

    def __init__(self, update: PendingUpdate, tensors: UpdateTensors) -> None:
        self.update = update
        self.tensors = tensors
        self.buffers: deque[ChunkBuffer] = deque()
        self.blocks: ChunkBuffer | None = None
        # A step count belongs to the tensors: if the update fails, both stay as they were.
        parts = update.parts.values()
        self._before = [(p.scalars, deepcopy(p.scalars), p.initialised, set(p.initialised)) for p in parts]

    def end_blocks(self) -> None:
        """Give the buffer of what is by block back, after the transfers on it are over."""
        blocks, self.blocks = self.blocks, None
        if blocks is not None:
            blocks.close()

    def fail(self, error: BaseException) -> None:
        """The current generations stay the current ones."""
        while self.buffers:
            self.buffers.popleft().close()
        self.end_blocks()
        self.tensors.abandon(error)
        for scalars, old_scalars, initialised, old_initialised in self._before:
            scalars.clear()
            scalars.update(old_scalars)
            initialised.clear()
            initialised.update(old_initialised)


def _require_unchanged(unit: Unit, parts: Mapping[int, ParameterUpdate]) -> None:
    """Refuse gradients that somebody wrote to between the step and the update.

    Raises:
        ResidencyError: Names the parameter.
    """
    for index, part in parts.items():
        if part.grad._version != part.version:
            raise ResidencyError(
                f"the gradient of parameter {unit.names[index]!r} was changed in place after optimizer.step(), while "
                "its update was still to run; change gradients before the step, use zero_grad(), or set overlap='off'"
            )
