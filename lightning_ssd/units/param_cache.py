"""Which units are in memory: fetch and release, reading ahead, caching, and values of parameters at rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn

from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.memory.pool import Buffer, Pool
from lightning_ssd.trace.recorder import Lane, Trace
from lightning_ssd.units.device import DeviceCopy
from lightning_ssd.units.execution_order import ExecutionOrder
from lightning_ssd.units.model_units import ModelUnits, give
from lightning_ssd.units.placement import Placement
from lightning_ssd.units.prefetch import PrefetchPolicy
from lightning_ssd.units.unit import Residency, Unit
from lightning_ssd.units.update_target import UpdateTarget


class ParamCache:
    """Which units have memory: fetch and release, prefetch and evict, and what updates need of it.

    The thread of updates calls `reserve`, `unreserve`, `unpin` and `updated`, the thread that trains everything else.

    Args:
        model: The units.
        pool: Memory for parameters.
        placement: The way to the device.
        keep_cache: Released bytes stay while nobody needs the memory.
        max_ahead: Units that may be fetched ahead of use; None for as many as the memory holds.
        prefetch_batch: Units whose reads are started together.
        trace: Gets the events ``prefetch``, ``fetch``, ``release``, and spans.

    Attributes:
        units: All units.
        schedule: Order of use.
    """

    def __init__(
        self,
        model: ModelUnits,
        *,
        pool: Pool,
        placement: Placement,
        keep_cache: bool,
        max_ahead: int | None,
        prefetch_batch: int,
        trace: Trace,
    ) -> None:
        self.units = model.units
        self.schedule = ExecutionOrder()
        self._model = model
        self._store = model.store
        self._writes = model.writes
        self._lock = model.lock
        self._pool = pool
        self._placement = placement
        self._keep_cache = keep_cache
        self._trace = trace
        self._outlook = PrefetchPolicy(
            self.units,
            self.schedule,
            max_ahead=len(self.units) if max_ahead is None else max_ahead,
            prefetch_batch=prefetch_batch,
        )
        self._places: dict[int, tuple[Unit, int]] = {}  # of resident parameters, by address of their storage
        self._touched: list[dict[str, Unit]] = [{}]  # resident without a hold, by the module call that touched them

    def close(self) -> None:
        """Hold no memory."""
        for unit in self.units:
            unit.num_holds, unit.update = 0, None  # one that failed may be left
            self._evict(unit)
        self._placement.close()
        self._model.release_memory()

    # -- fetch and release ---------------------------------------------------------------------------------------

    def fetch(self, unit: Unit) -> bool:
        """Make ``unit`` resident and keep it so until `release`; returns whether it was not before.

        Raises:
            IOFailure: The disk failed.
            ResidencyError: There is no memory for it.
        """
        with self._trace.label("fetch", unit.name):
            return self._fetch(unit)

    def _fetch(self, unit: Unit) -> bool:
        if self._model.inherited is not None:
            self._model.inherited.refuse_fetch(unit)
        if unit.num_holds == 0:
            unit.wait_for_update()
        with self._lock:
            if unit.num_holds == 0:
                self.schedule.use(unit.name)
            if any(unit.name in touched_in for touched_in in self._touched):
                self._writes.collect_in_step(unit)  # its module runs on what the user wrote before
            unit.num_holds += 1
            try:
                self._begin_fetch(unit)
            except BaseException:
                unit.num_holds -= 1
                raise
        try:
            if unit.transfer is not None:
                with self._trace.span(Lane.WAIT, "wait for parameters", unit.name):
                    unit.transfer.wait()  # sync: the disk
        except BaseException:
            with self._lock:
                unit.num_holds -= 1
                self._evict(unit)
            raise
        with self._lock:
            is_new = self._end_fetch(unit)
            for touched_in in self._touched:
                touched_in.pop(unit.name, None)
            self._prefetch()
        return is_new

    def release(self, unit: Unit) -> None:
        """Undo one `fetch`; after the last, the parameters are at rest, or stay for the step if persistent."""
        with self._lock:
            unit.num_holds -= 1
            if unit.num_holds == 0 and not (
                unit.persistent and self._model.step.is_running and self._model.is_current(unit)
            ):
                self._let_go(unit)

    def begin_module(self) -> None:
        """A module runs: parameters at rest that are touched inside stay until `end_module`."""
        self._touched.append({})

    def end_module(self) -> None:
        """The module has run."""
        with self._lock:
            for unit in self._touched.pop().values():
                if unit.num_holds == 0:
                    self._let_go(unit)

    def begin_backward(self) -> None:
        """Updates of this step are still to come."""
        with self._lock:
            self._outlook.begin_backward()

    def end_step(self) -> None:
        """The step is over: units that stayed for it go to rest."""
        with self._lock:
            for unit in self.units:
                if unit.num_holds == 0:
                    self._release_memory(unit)
                unit.is_handed_on = False
            self._touched = [{}]

    @contextmanager
    def outside_step(self) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """Inside, parameters are offloaded, whatever runs around it; gives a context that is as it was before."""

        @contextmanager
        def inside_step() -> Iterator[None]:
            with self._model.step.suspended(False):
                try:
                    yield
                finally:
                    self.end_step()

        self.end_step()
        with self._model.step.suspended():
            yield inside_step

    def drop_holds(self) -> None:
        """Forget who holds what, after a failure."""
        with self._lock:
            for unit in self.units:
                self._writes.forget(unit)
                unit.num_holds = 0
            self.end_step()

    def find(self, tensor: Tensor) -> tuple[Unit, int] | None:
        """The resident parameter that ``tensor`` views: its unit and index."""
        if not self._places or tensor.layout is not torch.strided:
            return None
        with torch._C.DisableTorchFunctionSubclass():
            try:
                return self._places.get(tensor.untyped_storage().data_ptr())
            except (RuntimeError, NotImplementedError):
                return None  # a tensor without storage of its own, such as one under functorch

    def _begin_fetch(self, unit: Unit) -> None:
        is_free = unit.state is Residency.STAGED or (unit.state is Residency.RESIDENT and unit.num_holds == 1)
        is_stale = is_free and not self._model.is_current(unit)
        if unit.mapped is not None or is_stale:
            self._evict(unit)
        if unit.mapped is not None:
            self.write_back(unit)
        if unit.state is Residency.ON_DISK and self._has_device_copy(unit):
            unit.move(Residency.STAGED)
        elif unit.state is Residency.ON_DISK:
            self._placement.poll()
            self._start_read(unit, self._pool.lend(unit.layout.buffer_nbytes, f"unit {unit.name!r}", self._make_room))

    def _end_fetch(self, unit: Unit) -> bool:
        if unit.state is Residency.READING:
            self._end_read(unit)
        if unit.state is not Residency.STAGED:
            return False
        self._install(unit)
        self._trace.mark("fetch", unit.name)
        return True

    def _start_read(self, unit: Unit, buffer: Buffer) -> None:
        generation = self._store.newest(unit.name, "param")
        unit.buffer = buffer
        unit.generation = generation
        unit.move(Residency.READING)
        if unit.layout.data_nbytes:
            keep = buffer.hold()
            unit.transfer = self._store.read(generation, 0, buffer.address, unit.layout.data_nbytes, keep=keep)

    def _end_read(self, unit: Unit) -> None:
        unit.transfer = None
        unit.move(Residency.STAGED)

    def _install(self, unit: Unit) -> None:
        unit.device_copy = self._place(unit)
        for index, (param, tensor) in enumerate(zip(unit.params, unit.device_copy.tensors, strict=True)):
            give(param, tensor, nn.Parameter)
            if tensor.numel():
                self._places[tensor.untyped_storage().data_ptr()] = (unit, index)
        unit.move(Residency.RESIDENT)
        self._writes.begin(unit)
        if unit.buffer is not None and not self._placement.keeps_buffer:
            self._pool.give_back(unit.buffer)
            unit.buffer = None

    def _place(self, unit: Unit) -> DeviceCopy:
        if unit.buffer is None:  # it is kept, or on the device
            unit.generation = self._store.newest(unit.name, "param")
        device_copy = unit.device_copy
        if device_copy is None or not (self._has_device_copy(unit) and self._placement.reuse(device_copy)):
            if unit.in_memory is not None:
                device_copy = self._placement.place_tensors(unit.in_memory)
            else:
                assert unit.buffer is not None
                with self._trace.span(Lane.COPY, "to the device", unit.name):
                    device_copy = self._placement.place(unit.layout, unit.buffer)
            device_copy.generation = unit.generation
        return device_copy

    def _has_device_copy(self, unit: Unit) -> bool:
        """Whether the newest values are where compute reads."""
        device_copy = unit.device_copy
        return (
            device_copy is not None
            and bool(device_copy.tensors)
            and device_copy.generation is self._store.newest(unit.name, "param")
        )

    def _prefetch(self, *, beyond: bool = False) -> None:
        """Start reads of what is needed next, as far as free memory goes; see `PrefetchPolicy.wanted`."""
        self._placement.poll()
        for group in self._outlook.wanted(self._has_device_copy, beyond=beyond):
            if not self._start_reads(group):
                return

    def _start_reads(self, group: list[Unit]) -> bool:
        """Read units if there is room for all of them, or what is cached is needed later."""
        buffers: list[Buffer] = []
        for unit in group:
            make_room = partial(self._evict_one, needed_after=self._outlook.need(unit))
            buffer = self._pool.try_lend(unit.layout.buffer_nbytes, f"unit {unit.name!r}", make_room)
            if buffer is None:
                for lent in buffers:
                    self._pool.give_back(lent)
                return False
            buffers.append(buffer)
        for unit, buffer in zip(group, buffers, strict=True):
            self._start_read(unit, buffer)
            self._trace.mark("prefetch", unit.name)
        return True

    # -- updates -------------------------------------------------------------------------------------------------

    def is_idle(self, unit: Unit) -> bool:
        """Whether an update may change ``unit`` where it is in memory: not while compute may read it there."""
        return not self._placement.keeps_buffer or unit.state is not Residency.RESIDENT

    def pin(self, unit: Unit) -> bool:
        """Whether the newest values of ``unit`` are in a buffer; if so they stay until `unpin`."""
        with self._lock:
            if unit.in_memory is not None or unit.buffer is None or not self._model.is_current(unit):
                return False
            unit.num_pins += 1
            return True

    def reserve(self, unit: Unit, *, reads: bool) -> UpdateTarget | None:
        """Reserve the buffer of ``unit`` for an update of it; None if there is none, or it is of no use.

        What is needed next, and would be read after the update, is lent a buffer if there is room.

        Args:
            unit: What will be updated.
            reads: The update works on the newest values themselves, not on a master of them.
        """
        with self._lock:
            if unit.state is Residency.READING and unit.transfer is not None:
                unit.transfer.wait()  # sync: the disk; the update will replace the file
                self._end_read(unit)
            if unit.state is Residency.ON_DISK and self._outlook.is_next(unit, self._has_device_copy):
                make_room = partial(self._evict_one, needed_after=self._outlook.position(unit))
                unit.buffer = self._pool.try_lend(unit.layout.buffer_nbytes, f"unit {unit.name!r}", make_room)
                if unit.buffer is not None:
                    unit.move(Residency.STAGED)
            if unit.buffer is None:
                return None
            is_current = self._model.is_current(unit)
            # A view that the user kept shows the values it had.
            is_writable = unit.state is Residency.STAGED and unit.num_holds == 0 and not unit.buffer.in_use
            if not is_writable and not (reads and is_current):
                return None
            unit.num_pins += 1
            if is_writable:
                unit.generation = None  # whose values they are is known at the end
            values = unit.buffer.tensor(0, unit.dtype, (unit.layout.numel,))
        return UpdateTarget(self, unit, values, is_current=is_current, is_writable=is_writable)

    def unreserve(self, target: UpdateTarget, *, is_new: bool) -> None:
        """Undo `reserve`; if ``is_new``, its values are those of the generation that is the current one now."""
        unit = target.unit
        with self._lock:
            is_wanted = self._keep_cache or self._outlook.is_next(unit, self._has_device_copy)
            if target.is_writable and is_new and is_wanted:
                unit.generation = self._store.newest(unit.name, "param")
            self.unpin(unit)

    def end_copy(self, unit: Unit) -> None:
        """Return when no copy of ``unit`` reads what is kept of it in memory, which may change then."""
        device_copy = unit.device_copy
        if unit.in_memory is not None and device_copy is not None and device_copy.copied is not None:
            device_copy.copied.synchronize()  # sync: a copy to the device

    def unpin(self, unit: Unit) -> None:
        """Undo one `pin`; the tensor is gone."""
        with self._lock:
            unit.num_pins -= 1
            self._drop_stale(unit)
            self._lock.notify_all()

    def updated(self, unit: Unit) -> None:
        """``unit`` has a new generation: bytes in memory that nobody uses now are let go."""
        with self._lock:
            self._drop_stale(unit)
            self._outlook.updated(unit)
            self._prefetch(beyond=True)

    def _drop_stale(self, unit: Unit) -> None:
        is_idle = unit.num_holds == 0 and unit.num_pins == 0
        if is_idle and unit.state in (Residency.STAGED, Residency.READING) and not self._model.is_current(unit):
            self._evict(unit)

    # -- giving memory back --------------------------------------------------------------------------------------

    def _make_room(self) -> bool:
        """Give back the memory of one unit that nobody uses now: cached ones first, then what is needed last."""
        if self._placement.wait_for_one():
            return True  # what is being sent is done with, or soon: sooner than anything that was read ahead
        if self._evict_one():
            return True
        # What an update reads goes when it is done; it waits for nothing that we hold.
        idle = [u for u in self.units if u.num_holds == 0 and u.buffer is not None and not u.is_viewed]
        for unit in idle:  # an update may wait until compute is done with it
            self._release_memory(unit)
        self._lock.wait_for(lambda: len(idle) == 0 or any(u.num_pins == 0 for u in idle))  # sync: an update
        return bool(idle)

    def _evict_one(self, needed_after: float | None = None) -> bool:
        """Evict what `PrefetchPolicy.dispensable` says; False if there is nothing."""
        unit = self._outlook.dispensable(needed_after)
        if unit is None:
            return False
        self._evict(unit)
        return True

    def _let_go(self, unit: Unit) -> None:
        """Release the memory of a unit without a hold; not while the user may write to it through a view."""
        if unit.is_viewed:
            self._touched[-1][unit.name] = unit
        else:
            self._release_memory(unit)

    def _release_memory(self, unit: Unit) -> None:
        """Put a resident unit's parameters at rest; keep its bytes if that is wanted and they are current."""
        if unit.state is not Residency.RESIDENT:
            return
        self._writes.collect_in_step(unit)
        # A block that is needed next, at the turn of forward to backward, is not read again.
        is_wanted = self._keep_cache or unit.num_pins > 0 or next(self.schedule.upcoming(), "") == unit.name
        stays = is_wanted and unit.buffer is not None and (self._model.is_current(unit) or unit.num_pins > 0)
        self._offload(unit)
        if not stays:
            self._evict(unit)
        self._trace.mark("release", unit.name)

    def _offload(self, unit: Unit) -> None:
        self._writes.end(unit)
        self._model.offload(unit)
        self._forget_places(unit)
        if unit.device_copy is not None:
            self._placement.release(unit.device_copy)
        unit.move(Residency.STAGED)
        with self._lock:
            self._lock.notify_all()  # an update may wait for that

    def _evict(self, unit: Unit) -> None:
        """Hold no memory for ``unit``, whatever state it is in; what is kept goes to rest."""
        if unit.state is Residency.ON_DISK:
            return
        if unit.state is Residency.RESIDENT:
            self._writes.collect_in_step(unit)
            self._offload(unit)
        if unit.in_memory is not None:
            return
        if unit.transfer is not None:
            with suppress(SSDOffloadError):  # nobody wants these bytes any more
                unit.transfer.wait()  # sync: the engine owns the buffer until the read is over
        if unit.buffer is not None:
            self._pool.give_back(unit.buffer)
        unit.buffer = unit.transfer = unit.generation = None
        unit.move(Residency.ON_DISK)

    def _forget_places(self, unit: Unit) -> None:
        self._places = {a: place for a, place in self._places.items() if place[0] is not unit}
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                torch.clear_autocast_cache()  # it holds casts of parameters that are going

    # -- parameters that code outside of modules uses -------------------------------------------------------------

    def touch(self, units: Sequence[Unit], operands: Sequence[Tensor]) -> None:
        """Fetch ``units`` all at the same time; they stay until the module that runs is over. See `Streaming.touch`."""
        with ExitStack() as stack:
            for unit in self._units_of(operands):
                unit.num_holds += 1
                stack.callback(self._release_touch, unit)
            for unit in units:
                self.fetch(unit)
                self._move_aside(unit)
                stack.callback(self._release_touch, unit)
                self._writes.touch(unit)

    @contextmanager
    def hold(self, units: Sequence[Unit]) -> Iterator[None]:
        """Inside, ``units`` are fetched; afterwards they stay until the module that runs is over."""
        with ExitStack() as stack:
            for unit in units:
                self.fetch(unit)
                stack.callback(self._release_touch, unit)
            yield

    def _move_aside(self, unit: Unit) -> None:
        """Let ``unit``, which code outside of modules will use, not lie where it leaves no room for a second operand.

        It came between idle units, into the middle of the memory, and has to stay: code may hold views of it. What is
        free when the idle ones go would be two pieces, neither long enough (for a teacher beside its student).
        """
        largest = max(other.layout.buffer_nbytes for other in self.units)
        if unit.num_holds > 1 or unit.buffer is None or self._pool.nbytes >= 3 * largest:
            return
        held = [u.buffer for u in self.units if u.buffer is not None and (u.num_holds > 0 or u.is_viewed)]
        if self._pool.is_cut_by(held, largest):
            with self._lock:
                unit.num_holds -= 1
                while self._evict_one():
                    pass
            self.fetch(unit)

    def _units_of(self, tensors: Sequence[Tensor]) -> list[Unit]:
        """Resident units that ``tensors`` view."""
        found = filter(None, map(self.find, tensors))
        return list({unit.name: unit for unit, _ in found}.values())

    def write_back(self, unit: Unit) -> None:
        """See `ModelUnits.write_back`."""
        with self._lock:
            if self._model.write_back(unit):
                self._evict(unit)  # bytes in a buffer may be those that the file had before

    def before_map(self, unit: Unit) -> None:
        """See `Streaming.before_map`."""
        unit.wait_for_update()
        self.end_copy(unit)

    def before_update(self, unit: Unit) -> None:
        """See `UserWrites.before_update`."""
        self._writes.before_update(unit)

    def _release_touch(self, unit: Unit) -> None:
        """Undo a hold; the unit stays resident until the module that runs now is over, or its memory is needed."""
        unit.num_holds -= 1
        if unit.num_holds == 0 and not any(unit.name in touched_in for touched_in in self._touched):
            self._touched[-1][unit.name] = unit
