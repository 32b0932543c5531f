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
from lightning_ssd.errors import NonFiniteGradientError, SSDOffloadError
from lightning_ssd.io.engine import Transfer
from lightning_ssd.kernels import api as kernels
from lightning_ssd.memory.pool import Buffer, Pool
from lightning_ssd.optim.rules import Options, Rule
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.layout import UnitLayout, chunks
from lightning_ssd.store.state_store import Generation, StateStore
from lightning_ssd.streaming.unit import Unit
from lightning_ssd.trace import Trace


@dataclass
class ParameterUpdate:
    """One parameter's part in an update.

    Attributes:
        grad: Gradient, of the parameter's shape.
        options: Hyper-parameters of its group at the step.
        scalars: What the rule keeps beside tensors; changed in place.
        initialised: Kinds of which this parameter has a state; changed in place.
    """

    grad: Tensor
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
        trace: Gets the events ``update`` and ``updated``.
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

    def update(self, unit: Unit, rule: Rule, parts: Mapping[int, ParameterUpdate]) -> None:
        """Update the parameters of ``unit`` that have a part, by index, and commit new generations.

        Raises:
            NonFiniteGradientError: A gradient holds NaN or Inf; nothing of the unit has changed.
            IoError: The disk failed; the generations before the update are still the current ones.
        """
        self._require_finite(unit, parts)
        self._trace.mark("update", unit.name)
        kinds = [k for k in self._store.kinds(unit.name) if k not in ("param", "master")]
        for part in parts.values():
            kinds += [k for k in rule.kinds(part.options) if k not in kinds]
        with _unchanged_on_failure(parts.values()), self._new_generations(unit, kinds) as files:
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
        sizes = [(kind, layout.itemsize * self._chunk_numel) for kind, layout in files.layouts.items()]
        depth = min(self._depth, -(-unit.layout.numel // self._chunk_numel))
        with ExitStack() as stack:
            slots = [_Slot(self._pool, sizes, unit.name, stack) for _ in range(depth)]
            pending: list[tuple[_Slot, int, int]] = []
            ranges = list(chunks(unit.layout.numel, self._chunk_numel))
            for i, (begin, end) in enumerate([*ranges, (0, 0)]):
                if i < len(ranges):
                    slot = slots[i % depth]
                    slot.wait()  # sync: what the slot held before is on disk
                    files.read(slot, begin, end)
                    pending.append((slot, begin, end))
                # One slot is left free of reads, so that its writes run while the next chunk is computed.
                if len(pending) == max(depth - 1, 1) or i == len(ranges):
                    ready = pending[:] if i == len(ranges) else pending[:1]
                    del pending[: len(ready)]
                    for slot, begin, end in ready:
                        slot.wait()  # sync: the chunk's reads
                        self._compute(unit, rule, parts, flats, files, slot, begin, end)
                        files.write(slot, begin, end)
            for slot in slots:
                slot.wait()  # sync: the last writes

    def _compute(
        self,
        unit: Unit,
        rule: Rule,
        parts: Mapping[int, ParameterUpdate],
        flats: Mapping[int, Tensor],
        files: _Files,
        slot: _Slot,
        begin: int,
        end: int,
    ) -> None:
        views = {kind: slot.tensor(kind, files.dtype(kind), end - begin) for kind in files.layouts}
        master = views[files.master_kind]
        param = views["param"] if files.master_kind != "param" else None
        if files.widens:
            kernels.convert_(master, views["param"])
        elif param is not None and len(parts) < len(unit.params):
            kernels.convert_(param, master)  # parameters without an update keep their value
        for segment in unit.layout.segments(begin, end):
            part = parts.get(segment.index)
            if part is None:
                continue
            here = slice(segment.begin - begin, segment.end - begin)
            states = {k: v[here] for k, v in views.items() if k not in ("param", "master")}
            grad = flats[segment.index][segment.offset : segment.offset + segment.numel]
            is_first = not part.initialised
            out = None if param is None else param[here]
            rule.update(master[here], grad, states, part.scalars, part.options, is_first=is_first, out=out)

    # -- any rule ------------------------------------------------------------------------------------------------

    def _in_whole(self, unit: Unit, rule: Rule, parts: Mapping[int, ParameterUpdate], files: _Files) -> None:
        numel = unit.layout.numel
        with ExitStack() as stack:
            sizes = [(kind, layout.itemsize * numel) for kind, layout in files.layouts.items()]
            slot = _Slot(self._pool, sizes, unit.name, stack)
            files.read(slot, 0, numel)
            slot.wait()  # sync: the unit's state
            if files.widens:
                _flat(slot, files, "master", numel).copy_(_flat(slot, files, "param", numel))
            for index, part in parts.items():
                self._update_whole(rule, part, files, slot, index)
            if files.master_kind != "param":
                _flat(slot, files, "param", numel).copy_(_flat(slot, files, "master", numel))
            files.write(slot, 0, numel)
            slot.wait()  # sync: the writes

    @staticmethod
    def _update_whole(rule: Rule, part: ParameterUpdate, files: _Files, slot: _Slot, index: int) -> None:
        views = {
            kind: slot.tensor(kind, files.dtype(kind), layout.entries[index].shape, layout.entries[index].begin)
            for kind, layout in files.layouts.items()
        }
        master = views[files.master_kind]
        states = {k: v for k, v in views.items() if k in part.initialised}
        grad = part.grad.detach().to(master.dtype)
        rule.update(master, grad, states, part.scalars, part.options, is_first=not part.initialised)
        for kind, state in states.items():
            if kind not in views:
                raise SSDOffloadError(f"the optimizer made a state {kind!r} only after its first step; not supported")
            if kind not in part.initialised:
                views[kind].copy_(state)
                part.initialised.add(kind)

    # -- files ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _new_generations(self, unit: Unit, kinds: list[str]) -> Iterator[_Files]:
        dtype = master_dtype(unit, keep_master=self._keep_master)
        layouts = {"param": unit.layout}
        if dtype != unit.layout.dtype:
            layouts["master"] = unit.layout_of("master", dtype)
        layouts |= {kind: unit.layout_of(kind, dtype) for kind in kinds}
        files = _Files(self._store, layouts)
        try:
            files.begin()
            yield files
        except BaseException:
            files.abandon()
            raise
        files.commit()

    @staticmethod
    def _require_finite(unit: Unit, parts: Mapping[int, ParameterUpdate]) -> None:
        for index, part in parts.items():
            grad = part.grad.detach().reshape(-1)
            fast = grad.dtype in (torch.float32, torch.bfloat16, torch.float16)
            if not (kernels.sum_of_squares(grad)[1] if fast else bool(torch.isfinite(grad).all())):
                raise NonFiniteGradientError(
                    f"the gradient of parameter {unit.names[index]!r} holds NaN or Inf; its unit was not updated and "
                    "the last checkpoint is whole: resume from it with a lower learning rate, gradient clipping, or "
                    "the batch that caused this left out"
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


class _Files:
    """Current and new generations of the kinds of one unit."""

    def __init__(self, store: StateStore, layouts: dict[str, UnitLayout]) -> None:
        self._store = store
        self.layouts = layouts
        unit = layouts["param"].unit
        self._current = {kind: store.current(unit, kind) for kind in layouts}
        self._new: dict[str, Generation] = {}
        self.master_kind = "master" if "master" in layouts else "param"
        self.widens = self.master_kind == "master" and self._current["master"] is None

    def begin(self) -> None:
        for kind, layout in self.layouts.items():
            self._new[kind] = self._store.begin(layout)

    def dtype(self, kind: str) -> torch.dtype:
        return dtype_of(self.layouts[kind].dtype)

    def read(self, slot: _Slot, begin: int, end: int) -> None:
        for kind, layout in self.layouts.items():
            current = self._current[kind]
            if kind == "param" and self.master_kind != "param" and not self.widens:
                continue  # written from the master
            if current is None:
                slot.clear(kind)
            else:
                itemsize = layout.itemsize
                slot.add(self._store.read, current, kind, begin * itemsize, (end - begin) * itemsize)

    def write(self, slot: _Slot, begin: int, end: int) -> None:
        for kind, layout in self.layouts.items():
            itemsize = layout.itemsize
            slot.add(self._store.write, self._new[kind], kind, begin * itemsize, (end - begin) * itemsize)

    def commit(self) -> None:
        self._store.commit(*self._new.values())

    def abandon(self) -> None:
        for generation in self._new.values():
            self._store.abandon(generation)


def _flat(slot: _Slot, files: _Files, kind: str, numel: int) -> Tensor:
    return slot.tensor(kind, files.dtype(kind), numel)


def state_nbytes_per_numel(unit: Unit, num_kinds: int, *, keep_master: bool) -> int:
    """Bytes per element that an update of ``unit`` holds in memory for each element of a chunk."""
    dtype = dtype_of(master_dtype(unit, keep_master=keep_master))
    emits = dtype != unit.dtype
    return dtype.itemsize * (1 + num_kinds) + (unit.layout.itemsize if emits else 0)
