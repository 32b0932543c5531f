"""Which units are in memory: fetch and release, reading ahead, caching, and values of parameters at rest."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn

from lightning_ssd.errors import ResidencyError, SSDOffloadError
from lightning_ssd.memory.pool import Buffer, Pool
from lightning_ssd.store.state_store import Generation, StateStore
from lightning_ssd.streaming.at_rest import AtRest
from lightning_ssd.streaming.fence import fenced_class
from lightning_ssd.streaming.fetch import Route
from lightning_ssd.streaming.in_step import Reachable
from lightning_ssd.streaming.schedule import Schedule
from lightning_ssd.streaming.unit import Residency, Unit
from lightning_ssd.trace import Trace


class Residents:
    """The units of one model and the memory they take.

    Args:
        units: All units.
        store: Where their values are.
        window: Units fetched ahead of use.
        trace: Gets the events ``prefetch``, ``fetch``, ``release``.

    Attributes:
        units: All units.
        schedule: Order of use.
        is_in_step: Tells whether an operation on a parameter at rest fetches it to the device. Set by the owner.
        on_fetch: Called with each unit that became resident. Set by the owner.
        on_touch: Called with each unit of which a parameter at rest was used in a step. Set by the owner.
    """

    def __init__(self, units: list[Unit], *, store: StateStore, window: int, trace: Trace) -> None:
        self.units = units
        self.schedule = Schedule()
        self.is_in_step: Callable[[], bool] = lambda: False
        self.on_fetch: Callable[[Unit], None] = lambda unit: None
        self.on_touch: Callable[[Unit], None] = lambda unit: None
        self._store = store
        self._window = window
        self._trace = trace
        self._pool: Pool
        self._route: Route
        self._keep_cache = False
        self._lock = threading.RLock()
        self._by_name = {unit.name: unit for unit in units}
        self._owners = {param: unit for unit in units for param in unit.params}
        self._parked_class = fenced_class(self)
        self._places: dict[int, tuple[Unit, int]] = {}  # of resident parameters, by address of their storage
        self._reachable = Reachable()
        self._loose: list[dict[str, Unit]] = [{}]  # resident without a hold, by the visit that touched them

    def start(self, *, pool: Pool, route: Route, keep_cache: bool) -> None:
        """Take memory from ``pool`` from now on; with ``keep_cache`` released bytes stay while nobody needs it."""
        self._pool, self._route, self._keep_cache = pool, route, keep_cache

    def stop(self) -> None:
        """Hold no memory; leave plain parameters on mappings of their files."""
        for unit in self.units:
            unit.num_holds = 0
            self._evict(unit)
            is_placed = self._store.current(unit.name, "param") is not None  # not if the disk failed or filled before
            if unit.at_rest is None and is_placed:
                self._wake_at_rest(unit)

    # -- fetch and release ---------------------------------------------------------------------------------------

    def acquire(self, unit: Unit) -> None:
        """Make ``unit`` resident and keep it so until `release`."""
        with self._lock:
            self.schedule.use(unit.name)
            if any(unit.name in loose for loose in self._loose):
                self._keep_written(unit)  # its module runs on what the user wrote before
            unit.num_holds += 1
            try:
                self._fetch(unit)
            except BaseException:
                unit.num_holds -= 1
                raise
            for loose in self._loose:
                loose.pop(unit.name, None)
            self._prefetch()

    def release(self, unit: Unit) -> None:
        """Undo one `acquire`; after the last, the parameters are at rest, or stay for the step if sticky."""
        with self._lock:
            unit.num_holds -= 1
            if unit.num_holds == 0 and not (unit.sticky and self.is_in_step() and self.is_current(unit)):
                self._release_memory(unit)

    def begin_visit(self) -> None:
        """A module runs: parameters at rest that are touched inside stay until `end_visit`."""
        self._loose.append({})

    def end_visit(self) -> None:
        """The module has run."""
        with self._lock:
            for unit in self._loose.pop().values():
                if unit.num_holds == 0:
                    self._release_memory(unit)

    def end_step(self) -> None:
        """The step is over: units that stayed for it go to rest."""
        with self._lock:
            for unit in self.units:
                if unit.num_holds == 0:
                    self._release_memory(unit)
            self._loose = [{}]

    def drop_holds(self) -> None:
        """Forget who holds what, after a failure."""
        with self._lock:
            self._reachable.clear()
            for unit in self.units:
                unit.num_holds = 0
            self.end_step()

    def is_current(self, unit: Unit) -> bool:
        """Whether the bytes in memory are those of the newest generation."""
        return unit.generation is self.current(unit)

    def find(self, tensor: Tensor) -> tuple[Unit, int] | None:
        """The resident parameter that ``tensor`` views: its unit and index."""
        if not self._places or tensor.layout is not torch.strided:
            return None
        with torch._C.DisableTorchFunctionSubclass():
            try:
                return self._places.get(tensor.untyped_storage().data_ptr())
            except (RuntimeError, NotImplementedError):
                return None  # a tensor without storage of its own, such as one under functorch

    def _fetch(self, unit: Unit) -> None:
        is_free = unit.state is Residency.STAGED or (unit.state is Residency.RESIDENT and unit.num_holds == 1)
        is_stale = is_free and not self.is_current(unit)
        if unit.at_rest is not None or is_stale:
            self._evict(unit)
        if unit.state is Residency.RESIDENT:
            return
        if unit.state is Residency.ON_DISK:
            self.settle(unit)
            buffer = self._pool.lend(unit.layout.buffer_nbytes, f"unit {unit.name!r}", self._make_room)
            self._start_read(unit, buffer)
        if unit.state is Residency.READING:
            self._finish_read(unit)
        self._install(unit)
        self.on_fetch(unit)
        self._trace.mark("fetch", unit.name)

    def _start_read(self, unit: Unit, buffer: Buffer) -> None:
        generation = self.current(unit)
        unit.buffer = buffer
        unit.generation = generation
        unit.move(Residency.READING)
        if unit.layout.data_nbytes:
            unit.transfer = self._store.read(generation, 0, buffer.address, unit.layout.data_nbytes, keep=buffer)

    def _finish_read(self, unit: Unit) -> None:
        try:
            if unit.transfer is not None:
                unit.transfer.wait()  # sync: the disk
        except BaseException:
            self._evict(unit)
            raise
        unit.transfer = None
        unit.move(Residency.STAGED)

    def _install(self, unit: Unit) -> None:
        assert unit.buffer is not None
        tensors = self._route.install(unit.layout, unit.buffer)
        for index, (param, tensor) in enumerate(zip(unit.params, tensors, strict=True)):
            _give(param, tensor, nn.Parameter)
            if tensor.numel():
                self._places[tensor.untyped_storage().data_ptr()] = (unit, index)
        unit.move(Residency.RESIDENT)
        if unit.sticky:
            self._reachable.note(unit)
        if not self._route.keeps_buffer:
            self._pool.give_back(unit.buffer)
            unit.buffer = None

    def _prefetch(self) -> None:
        for name in itertools.islice(self.schedule.upcoming(), self._window):
            unit = self._by_name[name]
            if unit.state is Residency.ON_DISK and unit.at_rest is None:
                buffer = self._pool.try_lend(unit.layout.buffer_nbytes, f"unit {unit.name!r}")
                if buffer is None:
                    return
                self._start_read(unit, buffer)
                self._trace.mark("prefetch", unit.name)

    # -- giving memory back --------------------------------------------------------------------------------------

    def superseded(self, unit: Unit) -> None:
        """``unit`` has a new generation: bytes in memory that nobody uses now are let go."""
        with self._lock:
            if unit.num_holds == 0:
                self._evict(unit)

    def _make_room(self) -> bool:
        """Give back the memory of one unit that nobody uses now: cached ones first, then what is needed last."""
        upcoming = {name: i for i, name in reversed(list(enumerate(self.schedule.upcoming())))}
        idle = [u for u in self.units if u.num_holds == 0 and u.buffer is not None]
        if not idle:
            return False
        self._evict(min(idle, key=lambda u: (u.state is Residency.READING, -upcoming.get(u.name, len(upcoming) + 1))))
        return True

    def _release_memory(self, unit: Unit) -> None:
        """Put a resident unit's parameters at rest; keep its bytes as cache if that is wanted and they are current."""
        if unit.state is not Residency.RESIDENT:
            return
        self._keep_written(unit)
        if self._keep_cache and unit.buffer is not None and self.is_current(unit):
            self._reachable.forget(unit)
            self.park(unit)
            self._forget_places(unit)
            unit.move(Residency.STAGED)
        else:
            self._evict(unit)
        self._trace.mark("release", unit.name)

    def _evict(self, unit: Unit) -> None:
        """Hold no memory for ``unit``, whatever state it is in."""
        if unit.state is Residency.ON_DISK:
            return
        if unit.state is Residency.RESIDENT:
            self._keep_written(unit)
            self._reachable.forget(unit)
            self.park(unit)
            self._forget_places(unit)
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

    # -- at rest -------------------------------------------------------------------------------------------------

    def park(self, unit: Unit) -> None:
        """Put the parameters of ``unit``, whose values are in the store, at rest."""
        for param, parked in zip(unit.params, unit.parked, strict=True):
            _give(param, parked, self._parked_class)

    def wake(self, params: Sequence[nn.Parameter]) -> None:
        """See `Fence.wake`."""
        with self._lock:
            units = {self._owners[p].name: self._owners[p] for p in params}.values()
            if not self.is_in_step():
                for unit in units:
                    self._wake_at_rest(unit)
                return
            with ExitStack() as stack:
                for unit in units:
                    self.acquire(unit)
                    stack.callback(self._loosen, unit)
                    self._reachable.note(unit)
                    self.on_touch(unit)

    def settle(self, unit: Unit) -> None:
        """Bring what the user did to ``unit`` at rest into the store, and put its parameters at rest."""
        at_rest = unit.at_rest
        if at_rest is None:
            self._keep_written(unit)
            return
        with self._lock:
            is_assigned = at_rest.is_assigned(unit.params)
            is_written = at_rest.was_written()
            if is_assigned or (is_written and at_rest.is_private):
                _require_same_form(unit)
                self._store.put(unit.layout, lambda i: unit.params[i].data)
            if is_assigned or is_written:
                self._store.forget(unit.name, "master")  # the user's value is the truth now
            self.park(unit)
            at_rest.let_go(is_written=is_assigned or is_written)
            unit.at_rest = None

    def _keep_written(self, unit: Unit) -> None:
        """Bring what the user did to ``unit`` inside a step into the store; [Note: in a step, written]."""
        if unit.state is not Residency.RESIDENT or not self._reachable.is_written(unit):
            return
        if not self.is_current(unit):
            raise ResidencyError(
                f"parameters of unit {unit.name!r} were written to in a step while their optimizer updated them: write "
                "to them before the step's forward, or after optimizer.step()"
            )
        _require_same_form(unit)
        # From here on the bytes in memory are not those of the newest generation: they go at the next release.
        self._store.put(unit.layout, lambda i: unit.params[i].data)
        self._store.forget(unit.name, "master")
        self._reachable.forget(unit)

    def _wake_at_rest(self, unit: Unit) -> None:
        unit.at_rest = AtRest(self._store, self.current(unit))
        for param, tensor in zip(unit.params, unit.at_rest.tensors, strict=True):
            _give(param, tensor, nn.Parameter)

    def _loosen(self, unit: Unit) -> None:
        unit.num_holds -= 1
        if unit.num_holds == 0:
            self._loose[-1][unit.name] = unit

    def current(self, unit: Unit) -> Generation:
        """The newest generation of the parameters of ``unit``."""
        generation = self._store.current(unit.name, "param")
        assert generation is not None, unit.name
        return generation


def _give(param: nn.Parameter, data: Tensor, cls: type[nn.Parameter]) -> None:
    with torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
        param.data = data
    param.__class__ = cls


def _require_same_form(unit: Unit) -> None:
    for name, param, shape in zip(unit.names, unit.params, unit.shapes, strict=True):
        if tuple(param.shape) != shape.shape or param.dtype != unit.dtype:
            raise SSDOffloadError(
                f"parameter {name!r} was given data of shape {tuple(param.shape)} and {param.dtype}; it was placed "
                f"with {shape.shape} and {unit.dtype}: change a parameter's form before the Trainer starts"
            )
