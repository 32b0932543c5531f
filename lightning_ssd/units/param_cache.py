"""Which units are in memory: fetch and release, prefetch and evict, and host copies for updates."""

from __future__ import annotations

from functools import partial

import torch

from lightning_ssd.memory.pool import Buffer, Pool
from lightning_ssd.trace.recorder import Lane, Trace
from lightning_ssd.units.execution_order import ExecutionOrder
from lightning_ssd.units.host_copy import UpdateTarget
from lightning_ssd.units.model_units import ModelUnits
from lightning_ssd.units.placement import Placement
from lightning_ssd.units.prefetch import PrefetchPolicy
from lightning_ssd.units.resident_params import ResidentParams
from lightning_ssd.units.unit import Unit


class ParamCache:
    """Which units have memory; it makes the moves of [Note: forms of a parameter] inside a step.

    The thread of updates calls `reserve`, `unreserve`, `unpin` and `updated`, the thread that trains everything else.

    Args:
        model: The units.
        pool: Memory for host copies.
        placement: Makes device copies.
        keep_cache: Released host copies stay while nobody needs the memory.
        max_ahead: Units that may be fetched ahead of use; None for as many as the memory holds.
        prefetch_batch: Units whose reads are started together.
        trace: Gets the events ``prefetch``, ``fetch``, ``release``, and spans.

    Attributes:
        units: All units.
        step: Whether a step runs.
        order: In which a step uses them.
        resident: The parameters of resident units.
        keeps_buffer: See `Placement.keeps_buffer`.
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
        self.step = model.step
        self.pool = pool
        self.order = ExecutionOrder()
        self.resident = ResidentParams()
        self.keeps_buffer = placement.keeps_buffer
        self._model = model
        self._store = model.store
        self._writes = model.writes
        self._lock = model.lock
        self._placement = placement
        self._keep_cache = keep_cache
        self._trace = trace
        self._num_calls = 0  # of modules, running now, one inside the other
        self._staying: dict[Unit, int] = {}  # resident without a hold, until this many calls run
        max_ahead = len(self.units) if max_ahead is None else max_ahead
        self._policy = PrefetchPolicy(
            self.units, model.store, self.order, max_ahead=max_ahead, prefetch_batch=prefetch_batch
        )

    def close(self) -> None:
        """Hold no memory."""
        with self._lock:
            for unit in self.units:
                unit.num_holds, unit.num_pins, unit.update = 0, 0, None  # an update that failed may have left some
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
            if self._model.inherited is not None:
                self._model.inherited.refuse_fetch(unit)
            self._begin_fetch(unit)
            try:
                host_copy = unit.host_copy
                if host_copy is not None and host_copy.transfer is not None:
                    with self._trace.span(Lane.WAIT, "wait for parameters", unit.name):
                        host_copy.end_read()  # sync: the disk
                with self._lock:
                    is_new = unit.device_copy is None
                    if is_new:
                        with self._trace.span(Lane.COPY, "to the device", unit.name):
                            self.resident.add(unit, unit.show(self._store, self._placement))
                        if not self.keeps_buffer:
                            unit.give_back(self.pool)
                        self._trace.mark("fetch", unit.name)
                    self._staying.pop(unit, None)
                    self._prefetch()
                return is_new
            except BaseException:
                self._abort_fetch(unit)
                raise

    def _begin_fetch(self, unit: Unit) -> None:
        """Hold ``unit``, and start to read it unless its newest values are in memory."""
        if unit.num_holds == 0:
            unit.wait_for_update()
        with self._lock:
            if unit.num_holds == 0:
                self.order.use(unit.name)
            if unit in self._staying:
                self.write_back(unit)  # its module runs on what the user wrote before
            unit.num_holds += 1
            try:
                if unit.mapped is not None or (unit.num_holds == 1 and unit.is_stale(self._store)):
                    self._evict(unit)
                if unit.mapped is not None:
                    self.write_back(unit)
                if unit.is_on_disk and not unit.is_released(self._store):
                    self._read_now(unit)
            except BaseException:
                unit.num_holds -= 1
                raise

    def _read_now(self, unit: Unit) -> None:
        """Start to read ``unit``. While room is waited for, the thread of updates may have it, and read it ahead."""
        self._placement.poll()
        nbytes, label = unit.layout.buffer_nbytes, unit.label
        buffer = self.pool.try_lend(nbytes, label, lambda: unit.host_copy is None and self._make_room())
        if unit.host_copy is None:
            self._read([unit], [self.pool.lend(nbytes, label) if buffer is None else buffer])
        elif buffer is not None:
            self.pool.give_back(buffer)

    def _abort_fetch(self, unit: Unit) -> None:
        with self._lock:
            unit.num_holds -= 1
            if unit.num_holds == 0:
                self._evict(unit)

    def release(self, unit: Unit) -> None:
        """Undo one `fetch`; after the last, ``unit`` is offloaded, unless it is persistent and stays for the step."""
        with self._lock:
            unit.num_holds -= 1
            stays = unit.persistent and self.step.is_running and not unit.is_stale(self._store)
            if unit.num_holds == 0 and not stays:
                self._let_go(unit)

    def begin_step(self, kind: str) -> None:
        """A step of ``kind`` begins, such as ``"train"``."""
        self.order.begin(kind)
        self._placement.begin_step(kind)

    def begin_backward(self) -> None:
        """Updates of this step are still to come."""
        with self._lock:
            for unit in self.units:
                unit.is_updated = False

    def end_step(self) -> None:
        """The step is over: units that stayed for it are offloaded."""
        self.offload_idle()
        for unit in self.units:
            unit.is_submitted = False

    def offload_idle(self) -> None:
        """Units that nobody holds are offloaded."""
        with self._lock:
            for unit in (unit for unit in self.units if unit.num_holds == 0):
                self._release_memory(unit)
            self._staying.clear()

    def drop_holds(self) -> None:
        """Forget who holds what, after a failure."""
        with self._lock:
            for unit in self.units:
                unit.forget_writes()
                unit.num_holds = 0
            self.end_step()

    # -- moves ---------------------------------------------------------------------------------------------------

    def _prefetch(self, *, beyond: bool = False) -> None:
        """Start reads of what is needed next, as far as free memory goes; see `PrefetchPolicy.wanted`."""
        self._placement.poll()
        for group in self._policy.wanted(beyond=beyond):
            buffers = self._lend_all(group)
            if not buffers:
                return
            self._read(group, buffers)
            for unit in group:
                self._trace.mark("prefetch", unit.name)

    def _lend_all(self, group: list[Unit]) -> list[Buffer]:
        """A buffer for each unit, if there is room for all of them, or what is cached is needed later; else none."""
        buffers: list[Buffer] = []
        for unit in group:
            make_room = partial(self._evict_one, needed_after=self._policy.need(unit))
            buffer = self.pool.try_lend(unit.layout.buffer_nbytes, unit.label, make_room)
            if buffer is None:
                for lent in buffers:
                    self.pool.give_back(lent)
                return []
            buffers.append(buffer)
        return buffers

    def _read(self, units: list[Unit], buffers: list[Buffer]) -> None:
        """Start to read the newest values of ``units``; buffers for which that fails are given back."""
        remaining = list(buffers)
        try:
            for unit in units:
                unit.read(self._store, remaining[0])
                del remaining[0]
        finally:
            for buffer in remaining:
                self.pool.give_back(buffer)

    def _let_go(self, unit: Unit) -> None:
        """Release the memory of a unit without a hold; not while the user may write to it through a view."""
        if unit.is_touched and unit.is_viewed:
            self.let_stay(unit)
        else:
            self._release_memory(unit)

    def _release_memory(self, unit: Unit) -> None:
        """Offload a resident unit; keep its host copy if that is wanted and the newest."""
        if unit.device_copy is None:
            return
        self._hide(unit)
        # A block that is needed next, at the turn of forward to backward, is not read again.
        is_wanted = self._keep_cache or next(self.order.upcoming(), "") == unit.name
        if unit.num_pins == 0 and not (is_wanted and not unit.is_stale(self._store)):
            unit.give_back(self.pool)
        self._trace.mark("release", unit.name)

    def _hide(self, unit: Unit) -> None:
        if unit.may_be_written():
            self._writes.collect_in_step(unit)
        if unit.is_touched and unit.device_copy is not None and not unit.is_in_place:
            self._writes.leave(unit, unit.device_copy.tensors)
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                torch.clear_autocast_cache()  # it holds casts of parameters that are going
        unit.hide(self._placement, self._model.lazy_class)
        self._lock.notify_all()  # an update may wait for that

    def _evict(self, unit: Unit) -> None:
        """Hold no memory for ``unit``, whatever copies it has; what the plan holds in memory stays there."""
        if unit.device_copy is not None:
            self._hide(unit)
        unit.give_back(self.pool)

    def _make_room(self) -> bool:
        """Give back the memory of one unit that nobody uses now: cached ones first, then what is needed last."""
        if self._placement.wait_for_one():
            return True  # what is being sent is done with, or soon: sooner than anything that was read ahead
        if self._evict_one():
            return True
        # What an update reads goes when it is done; it waits for nothing that we hold.
        idle = [u for u in self.units if u.num_holds == 0 and u.host_copy is not None and not u.is_viewed]
        for unit in idle:  # an update may wait until compute is done with it
            self._release_memory(unit)
        self._lock.wait_for(lambda: len(idle) == 0 or any(u.num_pins == 0 for u in idle))  # sync: an update
        return bool(idle)

    def _evict_one(self, needed_after: float | None = None) -> bool:
        """Evict what `PrefetchPolicy.dispensable` says; False if there is nothing."""
        unit = self._policy.dispensable(needed_after)
        if unit is None:
            return False
        self._evict(unit)
        return True

    # -- updates -------------------------------------------------------------------------------------------------

    def prepare_update(self, unit: Unit) -> bool:
        """Bring in what the user wrote to ``unit``, which will be updated; see `UserWrites.before_update`.

        Returns:
            Whether it has a host copy that the update will read, which is pinned: it stays until `reserve` or `unpin`.

        Raises:
            BaseException: An earlier update failed, or the update would not reach all that it should.
        """
        unit.wait_for_update()
        with self._lock:
            self.write_back(unit)
            self._writes.before_update(unit.names)
            is_pinned = unit.update_reads_param and unit.host_copy is not None and not unit.is_stale(self._store)
            unit.num_pins += is_pinned
            return is_pinned

    def reserve(self, unit: Unit, *, is_pinned: bool = False) -> UpdateTarget | None:
        """Reserve the host copy of ``unit`` for an update of it; None if there is none, or it is of no use.

        What is needed next, and would be read after the update, is lent a buffer if there is room.

        Args:
            unit: What will be updated.
            is_pinned: What `prepare_update` returned.
        """
        unit.end_copies()
        with self._lock:
            try:
                return self._reserve(unit)
            finally:
                if is_pinned:
                    self.unpin(unit)

    def _reserve(self, unit: Unit) -> UpdateTarget | None:
        if unit.host_copy is not None:
            unit.host_copy.end_read()  # sync: the disk; the update will replace the file
        elif unit.is_on_disk and self._policy.is_next(unit):
            make_room = partial(self._evict_one, needed_after=self._policy.position(unit))
            buffer = self.pool.try_lend(unit.layout.buffer_nbytes, unit.label, make_room)
            if buffer is not None:
                unit.lend(buffer)
        host_copy = unit.host_copy
        if host_copy is None:
            return None
        is_current = host_copy.generation is self._store.newest(unit.name, "param")
        # A view that the user kept shows the values it had.
        is_writable = unit.device_copy is None and unit.num_holds == 0 and not host_copy.buffer.in_use
        if not is_writable and not (is_current and unit.update_reads_param):
            return None
        unit.num_pins += 1
        if is_writable:
            host_copy.generation = None  # whose values they are is known at the end
        values = host_copy.buffer.tensor(0, unit.dtype, (unit.layout.numel,))
        return UpdateTarget(self, unit, host_copy, values, is_current=is_current, is_writable=is_writable)

    def unreserve(self, target: UpdateTarget, *, is_new: bool) -> None:
        """Undo `reserve`; if ``is_new``, its values are those of the generation that is the current one now."""
        unit = target.unit
        with self._lock:
            if target.is_writable and is_new and (self._keep_cache or self._policy.is_next(unit)):
                target.host_copy.generation = self._store.newest(unit.name, "param")
            self.unpin(unit)

    def unpin(self, unit: Unit) -> None:
        """Undo one `pin`; the tensor is gone."""
        with self._lock:
            unit.num_pins -= 1
            self._drop_stale(unit)
            self._lock.notify_all()

    def updated(self, unit: Unit) -> None:
        """``unit`` has a new generation: a host copy that nobody uses now is given back."""
        with self._lock:
            self._drop_stale(unit)
            unit.is_updated = True
            self._prefetch(beyond=True)

    def _drop_stale(self, unit: Unit) -> None:
        is_idle = unit.num_holds == unit.num_pins == 0 and unit.device_copy is None
        if is_idle and unit.is_stale(self._store):
            unit.give_back(self.pool)

    def begin_module(self) -> None:
        """A module runs: lazy parameters that are touched inside stay resident until `end_module`."""
        self._num_calls += 1

    def end_module(self) -> None:
        """The module has run."""
        with self._lock:
            self._num_calls -= 1
            for unit in [unit for unit, num_calls in self._staying.items() if num_calls > self._num_calls]:
                del self._staying[unit]
                if unit.num_holds == 0:
                    self._let_go(unit)

    def let_stay(self, unit: Unit) -> None:
        """``unit``, which nobody holds, stays resident until the module that runs now is over, or the step."""
        self._staying.setdefault(unit, self._num_calls)

    def evict_idle(self) -> None:
        """Evict every unit that nobody uses."""
        with self._lock:
            while self._evict_one():
                pass

    def write_back(self, unit: Unit) -> None:
        """Bring what the user wrote to ``unit`` into the store; if it is mapped, offload it."""
        with self._lock:
            if unit.mapped is None:
                if unit.may_be_written():
                    self._writes.collect_in_step(unit)
            elif self._model.write_back(unit):
                self._evict(unit)  # its host copy may have the bytes that the file had before
