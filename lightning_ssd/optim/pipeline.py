"""The update of one unit: stored state meets gradients on the CPU and becomes new generations.

An elementwise rule sees the unit in chunks: while chunk c is computed, c+1 is being read and c-1 written, so host
memory is depth x chunk whatever the unit's size. Any other rule sees whole parameters, with the unit's state in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ssd.codec import float32
from lightning_ssd.errors import NonFiniteGradientError, ResidencyError, SSDOffloadError
from lightning_ssd.io.engine import Transfer
from lightning_ssd.kernels import api as kernels
from lightning_ssd.memory.plan import CHUNK_STEP_NUMEL
from lightning_ssd.memory.pool import Buffer, Pool
from lightning_ssd.optim.rules import Options, Rule
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.layout import Segment, UnitLayout, chunks
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.streaming.unit import Unit
from lightning_ssd.trace import Lane, Trace

CHUNKS_PER_UNIT = 16
"""Into at least so many a unit is cut, if they are not too small then."""


@dataclass
class ParameterUpdate:
    """One parameter's part in an update.

    Attributes:
        grad: Gradient, of the parameter's shape.
        version: Its version counter at the step: it must not change before the update has run.
        options: Hyper-parameters of its group at the step.
        scalars: What the rule keeps beside tensors; changed in place.
        initialised: Kinds of which this parameter has a state; changed in place.
    """

    grad: Tensor
    version: int
    options: Options
    scalars: dict[str, Any]
    initialised: set[str]


def master_dtype(unit: Unit, *, keep_master: bool) -> str:
    """Safetensors dtype of the values that an update of ``unit`` works on, and of its states."""
    return float32.state_dtype(unit.layout.dtype, keep_master=keep_master)


class Pipeline:
    """Runs updates.

    Args:
        store: Where states and parameters are.
        pool: Memory for updates.
        chunk_numel: Elements of a chunk, a multiple of 2**19.
        depth: Chunks in memory at a time.
        keep_master: Keep a float32 master of 16-bit parameters.
        trace: Gets the events ``update`` and ``updated``, and spans.
    """

    def __init__(
        self, store: StateStore, pool: Pool, *, chunk_numel: int, depth: int, keep_master: bool, trace: Trace
    ) -> None:
        self._store = store
        self._pool = pool
        self._chunk_numel = chunk_numel
        self._depth = depth
        self._keep_master = keep_master
        self._trace = trace

    def update(
        self, unit: Unit, rule: Rule, parts: Mapping[int, ParameterUpdate], values: Tensor | None = None
    ) -> None:
        """Update the parameters of ``unit`` that have a part, by index, and commit new generations.

        Args:
            unit: What to update.
            rule: How.
            parts: Gradients and hyper-parameters by parameter index.
            values: All elements of ``unit``, flat, where they are in memory and are the master: not read again then.

        Raises:
            ResidencyError: A gradient was changed in place since the step.
            IoError: The disk failed; the generations before the update are still the current ones.
        """
        _require_unchanged(unit, parts)
        self._trace.mark("update", unit.name)
        kinds = [k for k in self._store.kinds(unit.name) if k not in ("param", "master")]
        for part in parts.values():
            kinds += [k for k in rule.kinds(part.options) if k not in kinds]
        with (
            self._trace.span(Lane.UPDATE, "update", unit.name),
            _unchanged_on_failure(parts.values()),
            self._new_generations(unit, kinds, values) as files,
        ):
            for part in parts.values():
                rule.begin(part.scalars, part.options)
            if rule.is_elementwise:
                self._in_chunks(unit, rule, parts, files)
            else:
                self._in_whole(unit, rule, parts, files)
        if rule.is_elementwise:
            for part in parts.values():
                part.initialised.update(rule.kinds(part.options))
        self._trace.mark("updated", unit.name)

    # -- elementwise ---------------------------------------------------------------------------------------------

    def _in_chunks(self, unit: Unit, rule: Rule, parts: Mapping[int, ParameterUpdate], files: _Files) -> None:
        flats = {i: part.grad.detach().reshape(-1) for i, part in parts.items()}
        if not files.streamed:
            files.is_touched = True
            self._compute(unit, rule, parts, flats, files, None, 0, unit.layout.numel)
            return
        # Many chunks: nothing is computed while the first is read and the last is written.
        most = unit.layout.numel // CHUNKS_PER_UNIT // CHUNK_STEP_NUMEL * CHUNK_STEP_NUMEL
        chunk_numel = max(min(self._chunk_numel, most), CHUNK_STEP_NUMEL)
        sizes = [(column.kind, column.layout.itemsize * chunk_numel) for column in files.streamed]
        depth = min(self._depth, -(-unit.layout.numel // chunk_numel))
        with ExitStack() as stack:
            slots = [_Slot(self._pool, sizes, unit.name, stack) for _ in range(depth)]
            pending: list[tuple[_Slot, int, int]] = []
            ranges = list(chunks(unit.layout.numel, chunk_numel))
            for i, (begin, end) in enumerate([*ranges, (0, 0)]):
                if i < len(ranges):
                    slot = slots[i % depth]
                    self._wait(slot, unit)  # sync: what the slot held before is on disk
                    files.read(slot, begin, end)
                    pending.append((slot, begin, end))
                # One slot is left free of reads, so that its writes run while the next chunk is computed.
                if len(pending) == max(depth - 1, 1) or i == len(ranges):
                    ready = pending[:] if i == len(ranges) else pending[:1]
                    del pending[: len(ready)]
                    for slot, begin, end in ready:
                        self._wait(slot, unit)  # sync: the chunk's reads
                        files.is_touched = True
                        self._compute(unit, rule, parts, flats, files, slot, begin, end)
                        files.write(slot, begin, end)
            for slot in slots:
                self._wait(slot, unit)  # sync: the last writes

    def _wait(self, slot: _Slot, unit: Unit) -> None:
        with self._trace.span(Lane.WAIT, "update waits for the disk", unit.name):
            slot.wait()

    def _compute(
        self,
        unit: Unit,
        rule: Rule,
        parts: Mapping[int, ParameterUpdate],
        flats: Mapping[int, Tensor],
        files: _Files,
        slot: _Slot | None,
        begin: int,
        end: int,
    ) -> None:
        staged = {} if slot is None else files.staged(slot, end - begin)

        def view(kind: str, segment: Segment) -> Tensor:
            kept = files.columns[kind].kept
            if kept is not None:
                return kept[segment.index].view(-1)[segment.offset : segment.offset + segment.numel]
            return staged[kind][segment.begin - begin : segment.end - begin]

        with self._trace.span(Lane.UPDATE, "rule", unit.name):
            for segment in unit.layout.segments(begin, end):
                master = view(files.master_kind, segment)
                param = view("param", segment) if files.master_kind != "param" else None
                if files.widens and param is not None:
                    kernels.convert_(master, param)
                elif files.values is not None and files.columns["param"].kept is None:
                    master.copy_(files.values[segment.begin : segment.end])
                part = parts.get(segment.index)
                if part is None:
                    if param is not None:
                        kernels.convert_(param, master)  # parameters without an update keep their value
                    continue
                states = {kind: view(kind, segment) for kind in files.state_kinds}
                grad = flats[segment.index][segment.offset : segment.offset + segment.numel]
                is_first = not part.initialised
                rule.update(master, grad, states, part.scalars, part.options, is_first=is_first, out=param)

    # -- any rule ------------------------------------------------------------------------------------------------

    def _in_whole(self, unit: Unit, rule: Rule, parts: Mapping[int, ParameterUpdate], files: _Files) -> None:
        numel = unit.layout.numel
        with ExitStack() as stack:
            sizes = [(column.kind, column.layout.itemsize * numel) for column in files.streamed]
            slot = _Slot(self._pool, sizes, unit.name, stack)
            files.read(slot, 0, numel)
            self._wait(slot, unit)  # sync: the unit's state
            files.is_touched = True
            with self._trace.span(Lane.UPDATE, "rule", unit.name):
                for index, shape in enumerate(unit.shapes):
                    if shape.numel:
                        self._update_whole(rule, parts.get(index), files, slot, index)
            files.write(slot, 0, numel)
            self._wait(slot, unit)  # sync: the writes

    @staticmethod
    def _update_whole(rule: Rule, part: ParameterUpdate | None, files: _Files, slot: _Slot, index: int) -> None:
        views = {kind: column.whole(slot, index) for kind, column in files.columns.items()}
        master = views[files.master_kind]
        if files.widens:
            master.copy_(views["param"])
        elif files.values is not None and files.columns["param"].kept is None:
            entry, itemsize = files.columns["param"].layout.entries[index], master.itemsize
            master.copy_(files.values[entry.begin // itemsize : entry.end // itemsize].view(master.shape))
        if part is not None:
            states = {k: v for k, v in views.items() if k in part.initialised}
            grad = part.grad.detach().to(master.dtype)
            rule.update(master, grad, states, part.scalars, part.options, is_first=not part.initialised)
            for kind, state in states.items():
                if kind not in views:
                    raise SSDOffloadError(
                        f"the optimizer made a state {kind!r} only after its first step; not supported"
                    )
                if kind not in part.initialised:
                    views[kind].copy_(state)
                    part.initialised.add(kind)
        if files.master_kind != "param":
            views["param"].copy_(master)

    # -- files ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _new_generations(self, unit: Unit, kinds: list[str], values: Tensor | None) -> Iterator[_Files]:
        dtype = master_dtype(unit, keep_master=self._keep_master)
        layouts = {"param": unit.layout}
        if dtype != unit.layout.dtype:
            layouts["master"] = unit.layout_of("master", dtype)
        layouts |= {kind: unit.layout_of(kind, dtype) for kind in kinds}
        files = _Files(self._store, layouts, values)
        try:
            files.begin()
            yield files
        except BaseException as error:
            files.abandon(error)
            raise
        files.commit()


def require_finite(unit: Unit, grads: Mapping[int, Tensor]) -> None:
    """Refuse gradients, by parameter index, that hold NaN or Inf.

    Raises:
        NonFiniteGradientError: Names the parameter.
    """
    for index, grad in grads.items():
        flat = grad.detach().reshape(-1)
        fast = flat.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not (kernels.sum_of_squares(flat)[1] if fast else bool(torch.isfinite(flat).all())):
            raise NonFiniteGradientError(
                f"the gradient of parameter {unit.names[index]!r} holds NaN or Inf; its unit was not updated and "
                "the last checkpoint is whole: resume from it with a lower learning rate, gradient clipping, or "
                "the batch that caused this left out"
            )


def _require_unchanged(unit: Unit, parts: Mapping[int, ParameterUpdate]) -> None:
    for index, part in parts.items():
        if part.grad._version != part.version:
            raise ResidencyError(
                f"the gradient of parameter {unit.names[index]!r} was changed in place after optimizer.step(), while "
                "its update was still to run; change gradients before the step, use zero_grad(), or set overlap='off'"
            )


@contextmanager
def _unchanged_on_failure(parts: Iterable[ParameterUpdate]) -> Iterator[None]:
    """A step count goes with the files: where they stay as they were, so does it."""
    before = [(part, deepcopy(part.scalars), set(part.initialised)) for part in parts]
    try:
        yield
    except BaseException:
        for part, scalars, initialised in before:
            part.scalars.clear()
            part.scalars.update(scalars)
            part.initialised.clear()
            part.initialised.update(initialised)
        raise


class _Slot:
    """Buffers for one chunk of every kind, and the transfers under way on them."""

    def __init__(self, pool: Pool, sizes: list[tuple[str, int]], owner: str, stack: ExitStack) -> None:
        self._buffers: dict[str, Buffer] = {}
        self._transfers: list[Transfer] = []
        for kind, nbytes in sizes:
            buffer = pool.lend(nbytes, f"update of unit {owner!r}")
            stack.callback(pool.give_back, buffer)
            self._buffers[kind] = buffer
        stack.callback(self._settle)  # runs first: the engine owns the buffers while transfers are under way

    def add(self, start: Callable[..., Transfer], generation: Generation, kind: str, offset: int, nbytes: int) -> None:
        buffer = self._buffers[kind]
        self._transfers.append(start(generation, offset, buffer.address, nbytes, keep=buffer))

    def clear(self, kind: str) -> None:
        self._buffers[kind].fill(0)

    def tensor(self, kind: str, dtype: torch.dtype, shape: int | tuple[int, ...], offset: int = 0) -> Tensor:
        return self._buffers[kind].tensor(offset, dtype, (shape,) if isinstance(shape, int) else shape)

    def wait(self) -> None:
        while self._transfers:
            self._transfers[0].wait()
            del self._transfers[0]

    def _settle(self) -> None:
        for transfer in self._transfers:
            with suppress(SSDOffloadError):  # reported by `wait`, or another error is on its way up
                transfer.wait()
        self._transfers.clear()


@dataclass
class _Column:
    """One kind of a unit in an update: streamed through slots, or kept in memory and changed there."""

    kind: str
    layout: UnitLayout
    current: Generation | None
    kept: tuple[Tensor, ...] | None

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.layout.dtype)

    def whole(self, slot: _Slot, index: int) -> Tensor:
        """Parameter ``index`` of a slot that holds the whole unit."""
        if self.kept is not None:
            return self.kept[index]
        entry = self.layout.entries[index]
        return slot.tensor(self.kind, self.dtype, entry.shape, entry.begin)


class _Files:
    """Current and new generations of the kinds of one unit.

    Attributes:
        columns: By kind.
        streamed: Those that are not kept.
        state_kinds: All but the parameter and its master.
        master_kind: Which kind the rule updates.
        widens: There is no master yet: it is made from the parameter.
        values: See `Pipeline.update`.
        is_touched: Kept memory may hold new values by now.
    """

    def __init__(self, store: StateStore, layouts: dict[str, UnitLayout], values: Tensor | None) -> None:
        self._store = store
        unit = layouts["param"].unit
        self.columns = {k: _Column(k, lay, store.current(unit, k), store.kept(unit, k)) for k, lay in layouts.items()}
        self.streamed = [column for column in self.columns.values() if column.kept is None]
        self.state_kinds = [kind for kind in layouts if kind not in ("param", "master")]
        self.master_kind = "master" if "master" in layouts else "param"
        self.widens = self.master_kind == "master" and self.columns["master"].current is None
        self.values = values if self.master_kind == "param" else None
        self.is_touched = False
        self._new: list[Generation] = []

    def begin(self) -> None:
        for column in self.columns.values():
            if column.current is None and column.kept is not None:
                for tensor in column.kept:
                    tensor.zero_()
            self._new.append(self._store.begin(column.layout))

    def staged(self, slot: _Slot, numel: int) -> dict[str, Tensor]:
        """The streamed kinds' tensors of a chunk."""
        return {column.kind: slot.tensor(column.kind, column.dtype, numel) for column in self.streamed}

    def read(self, slot: _Slot, begin: int, end: int) -> None:
        for column in self.streamed:
            if column.kind == "param" and (
                self.values is not None or (self.master_kind != "param" and not self.widens)
            ):
                continue  # it is in memory, or written from the master
            if column.current is None:
                slot.clear(column.kind)
            else:
                itemsize = column.layout.itemsize
                slot.add(self._store.read, column.current, column.kind, begin * itemsize, (end - begin) * itemsize)

    def write(self, slot: _Slot, begin: int, end: int) -> None:
        for column, new in zip(self.columns.values(), self._new, strict=True):
            if column.kept is None:
                itemsize = column.layout.itemsize
                slot.add(self._store.write, new, column.kind, begin * itemsize, (end - begin) * itemsize)

    def commit(self) -> None:
        self._store.commit(*self._new)

    def abandon(self, error: BaseException) -> None:
        unit = self.columns["param"].layout.unit
        damage = f"the update of unit {unit!r} failed midway ({error}): resume from the last checkpoint"
        for generation in self._new:
            self._store.abandon(generation, damage if self.is_touched else "")


def state_nbytes_per_numel(unit: Unit, num_kinds: int, *, keep_master: bool) -> int:
    """Bytes per element that an update of ``unit`` holds in memory for each element of a chunk."""
    dtype = dtype_of(master_dtype(unit, keep_master=keep_master))
    emits = dtype != unit.dtype
    return dtype.itemsize * (1 + num_kinds) + (unit.layout.itemsize if emits else 0)
