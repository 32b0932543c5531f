"""Brings each unit to the device when its modules run, and takes it away afterwards: forward, recompute and backward.

[Note: backward] A unit is fetched again in backward when autograd unpacks a tensor that was saved under it, and goes
when the gradients of its inputs and of its parameters are there, when the next unit is fetched, or when backward ends.
This only decides how long memory is held. Nothing depends on it: a recomputed tensor that was dropped is computed
again, and a buffer is not lent again while any tensor on it lives.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.memory.pool import Pool
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.streaming.activations import Frame, without_caches
from lightning_ssd.streaming.at_rest import AtRest
from lightning_ssd.streaming.fence import fenced_class
from lightning_ssd.streaming.fetch import Route
from lightning_ssd.streaming.gradients import GradientSink
from lightning_ssd.streaming.schedule import Schedule
from lightning_ssd.streaming.unit import Residency, Unit
from lightning_ssd.trace import Trace


class Streamer:
    """Streams the units of one model.

    Args:
        units: All units.
        store: Where their values are.
        device: Where compute runs.
        recompute: Blocks whose forward is run again in backward.
        window: Units fetched ahead of use.
        trace: Gets the events ``prefetch``, ``fetch``, ``release``, ``recompute``.
    """

    def __init__(
        self,
        units: list[Unit],
        *,
        store: StateStore,
        device: torch.device,
        recompute: set[nn.Module],
        window: int,
        trace: Trace,
    ) -> None:
        self.units = units
        self._by_name = {unit.name: unit for unit in units}
        self._slots = {param: unit for unit in units for param in unit.params}
        self._store = store
        self._device = device
        self._recompute = recompute
        self._window = window
        self._trace = trace
        self._pool: Pool
        self._route: Route
        self._sink: GradientSink
        self._keep_cache = False
        self._lock = threading.RLock()
        self._schedule = Schedule()
        self._parked_class = fenced_class(self)
        self._handles: list[RemovableHandle] = []
        self._num_steps = 0  # step contexts that are open now
        self._visits: list[_Visit] = []
        self._loose: dict[str, Unit] = {}  # resident with no hold: fetched by an operation on a parameter at rest
        self._addresses: dict[int, tuple[Unit, int]] = {}  # of resident parameters, by address of their storage
        self._held: dict[int, tuple[Frame, list[Unit]]] = {}  # by id of the frame, which is alive in the value
        self._unpacked: dict[str, Unit] = {}  # held because backward unpacked a view of a parameter
        self._recomputing: Frame | None = None
        self._in_backward = False

    # -- life ----------------------------------------------------------------------------------------------------

    def park(self, unit: Unit) -> None:
        """Put the parameters of ``unit``, whose values are in the store, at rest."""
        self._park(unit)

    def start(self, *, pool: Pool, route: Route, sink: GradientSink, keep_cache: bool) -> None:
        """Hook the modules.

        Args:
            pool: Host memory for parameters.
            route: The way to the device.
            sink: Gets the gradients.
            keep_cache: Keep a released unit's bytes while nobody needs the memory.
        """
        self._pool, self._route, self._sink, self._keep_cache = pool, route, sink, keep_cache
        users: dict[nn.Module, list[Unit]] = {}
        for unit in self.units:
            for module in unit.modules:
                users.setdefault(module, []).append(unit)
        for module, units in users.items():
            hooks = _ModuleHooks(self, units)
            self._handles.append(module.register_forward_pre_hook(hooks.before, prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(hooks.after, with_kwargs=True, always_call=True))

    def stop(self) -> None:
        """Remove the hooks and leave plain parameters on mappings of their files. A second call does nothing."""
        self.abort_step()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for unit in self.units:
            self._evict(unit)
            if unit.at_rest is None:
                self._wake_at_rest(unit)

    @contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """Inside, an operation on a parameter at rest fetches its unit, and saved tensors hold no unit's memory.

        Args:
            kind: What the order of use is remembered under, such as ``"train"``; empty to go on with the one before.
        """
        if not self._is_in_step and kind:
            self._schedule.begin(kind)
        self._num_steps += 1
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                yield
        except BaseException:
            self.abort_step()
            raise
        finally:
            self._num_steps -= 1

    @property
    def _is_in_step(self) -> bool:
        return self._num_steps > 0 or bool(self._visits) or self._recomputing is not None

    def end_step(self) -> None:
        """The step is over: units that stayed for it go to rest."""
        with self._lock:
            for unit in self.units:
                if unit.state is Residency.RESIDENT and unit.num_holds == 0:
                    self._release_memory(unit)
            self._loose.clear()

    def abort_step(self) -> None:
        """Give up a step that failed: every hold is dropped."""
        with self._lock:
            while self._visits:
                self._visits.pop().close()
            self._end_frames()
            self._in_backward = False
            self._recomputing = None
            for unit in self.units:
                unit.num_holds = 0
            self.end_step()

    # -- residency -----------------------------------------------------------------------------------------------

    def acquire(self, unit: Unit) -> None:
        """Make ``unit`` resident and keep it so until `release`."""
        with self._lock:
            self._schedule.use(unit.name)
            unit.num_holds += 1
            try:
                self._fetch(unit)
            except BaseException:
                unit.num_holds -= 1
                raise
            self._loose.pop(unit.name, None)
            self._prefetch()

    def release(self, unit: Unit) -> None:
        """Undo one `acquire`; after the last, the parameters are at rest unless the unit is sticky."""
        with self._lock:
            unit.num_holds -= 1
            if unit.num_holds == 0 and not (unit.sticky and self._is_in_step and self._is_current(unit)):
                self._release_memory(unit)

    def settle(self, unit: Unit) -> None:
        """Bring what the user did to ``unit`` at rest into the store, and put its parameters at rest."""
        if unit.at_rest is None:
            return
        with self._lock:
            at_rest = unit.at_rest
            is_assigned = at_rest.is_assigned(unit.params)
            is_written = at_rest.was_written()
            if is_assigned or (is_written and at_rest.is_private):
                self._require_same_form(unit)
                self._store.put(unit.layout, lambda i: unit.params[i].data)
            if is_assigned or is_written:
                self._store.forget(unit.name, "master")  # the user's value is the truth now
            self._park(unit)
            unit.at_rest = None

    def superseded(self, unit: Unit) -> None:
        """``unit`` has a new generation: bytes in memory that nobody uses now are let go."""
        with self._lock:
            if unit.num_holds == 0:
                self._evict(unit)

    def wake(self, params: list[nn.Parameter]) -> None:
        """See `Fence.wake`."""
        with self._lock:
            units = {self._slots[p].name: self._slots[p] for p in params}.values()
            if not self._is_in_step:
                for unit in units:
                    self._wake_at_rest(unit)
                return
            with ExitStack() as stack:
                for unit in units:
                    self.acquire(unit)
                    stack.callback(self._loosen, unit)

    def _loosen(self, unit: Unit) -> None:
        unit.num_holds -= 1
        if unit.num_holds == 0:
            self._loose[unit.name] = unit
            if self._visits:
                self._visits[-1].loose.append(unit)

    def _fetch(self, unit: Unit) -> None:
        is_stale = unit.state is Residency.STAGED and not self._is_current(unit)
        if unit.at_rest is not None or is_stale:
            self._evict(unit)
        if unit.state is Residency.RESIDENT:
            return
        if unit.state is Residency.ON_DISK:
            self._start_read(unit)
        if unit.state is Residency.READING:
            self._finish_read(unit)
        assert unit.buffer is not None
        tensors = self._route.install(unit.layout, unit.buffer)
        for index, (param, tensor) in enumerate(zip(unit.params, tensors, strict=True)):
            self._give(param, tensor, nn.Parameter)
            if tensor.numel():
                self._addresses[tensor.untyped_storage().data_ptr()] = (unit, index)
        unit.move(Residency.RESIDENT)
        if not self._route.keeps_buffer:
            self._pool.give_back(unit.buffer)
            unit.buffer = None
        self._sink.watch(unit, self._note_backward)
        self._trace.mark("fetch", unit.name)

    def _start_read(self, unit: Unit) -> None:
        self.settle(unit)
        generation = self._store.current(unit.name, "param")
        assert generation is not None, unit.name
        buffer = self._pool.lend(unit.layout.buffer_nbytes, f"unit {unit.name!r}", self._make_room)
        self._read_into(unit, generation, buffer)

    def _read_into(self, unit: Unit, generation: Any, buffer: Any) -> None:
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

    def _prefetch(self) -> None:
        for name in itertools.islice(self._schedule.upcoming(), self._window):
            unit = self._by_name[name]
            if unit.state is Residency.ON_DISK and unit.at_rest is None:
                generation = self._store.current(unit.name, "param")
                buffer = self._pool.try_lend(unit.layout.buffer_nbytes, f"unit {unit.name!r}")
                if buffer is None or generation is None:
                    return
                self._read_into(unit, generation, buffer)
                self._trace.mark("prefetch", unit.name)

    def _make_room(self) -> bool:
        """Give back the memory of one unit that nobody uses now."""
        upcoming = {name: i for i, name in reversed(list(enumerate(self._schedule.upcoming())))}
        idle = [u for u in self.units if u.num_holds == 0 and u.buffer is not None]
        # Cached and loose units first, then the prefetched one that is needed last.
        idle.sort(key=lambda u: (u.state is Residency.READING, -upcoming.get(u.name, len(upcoming) + 1)))
        if not idle:
            return False
        self._evict(idle[0])
        self._loose.pop(idle[0].name, None)
        return True

    def _release_memory(self, unit: Unit) -> None:
        """Put a resident unit's parameters at rest; keep its bytes as cache if that is wanted and they are current."""
        if unit.state is not Residency.RESIDENT:
            return
        self._park(unit)
        self._forget_addresses(unit)
        if unit.buffer is not None and self._keep_cache and self._is_current(unit):
            unit.move(Residency.STAGED)
        else:
            self._to_disk(unit)
        if torch.is_autocast_enabled(self._device.type):
            torch.clear_autocast_cache()  # it holds casts of parameters that are going
        self._trace.mark("release", unit.name)

    def _evict(self, unit: Unit) -> None:
        """Hold no memory for ``unit``, whatever state it is in."""
        if unit.state is Residency.RESIDENT:
            self._park(unit)
            self._forget_addresses(unit)
        if unit.state is Residency.READING and unit.transfer is not None and not unit.transfer.done():
            with suppress(SSDOffloadError):  # nobody wants these bytes any more
                unit.transfer.wait()  # sync: the engine owns the buffer until the read is over
        if unit.state is not Residency.ON_DISK:
            self._to_disk(unit)

    def _to_disk(self, unit: Unit) -> None:
        if unit.buffer is not None:
            self._pool.give_back(unit.buffer)
        unit.buffer = unit.transfer = unit.generation = None
        unit.move(Residency.ON_DISK)

    def _is_current(self, unit: Unit) -> bool:
        return unit.generation is self._store.current(unit.name, "param")

    # -- parameters ----------------------------------------------------------------------------------------------

    def _give(self, param: nn.Parameter, data: Tensor, cls: type[nn.Parameter]) -> None:
        with torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
            param.data = data
        param.__class__ = cls

    def _park(self, unit: Unit) -> None:
        for param, parked in zip(unit.params, unit.parked, strict=True):
            self._give(param, parked, self._parked_class)

    def _wake_at_rest(self, unit: Unit) -> None:
        generation = self._store.current(unit.name, "param")
        assert generation is not None, unit.name
        unit.at_rest = AtRest(self._store, generation)
        for param, tensor in zip(unit.params, unit.at_rest.tensors, strict=True):
            self._give(param, tensor, nn.Parameter)

    def _forget_addresses(self, unit: Unit) -> None:
        self._addresses = {a: slot for a, slot in self._addresses.items() if slot[0] is not unit}

    @staticmethod
    def _require_same_form(unit: Unit) -> None:
        for name, param, shape in zip(unit.names, unit.params, unit.shapes, strict=True):
            if tuple(param.shape) != shape.shape or param.dtype != unit.dtype:
                raise SSDOffloadError(
                    f"parameter {name!r} was given data of shape {tuple(param.shape)} and {param.dtype}; it was placed "
                    f"with {shape.shape} and {unit.dtype}: change a parameter's form before the Trainer starts"
                )

    # -- saved tensors -------------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> object:
        if tensor.layout is torch.strided and self._addresses:
            slot = self._addresses.get(_storage_address(tensor))
            if slot is not None:
                unit, index = slot
                form = (tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.dtype)
                return _ParameterView(unit, index, form, unit.generation)
        return tensor, (None if tensor.is_inference() else tensor._version)

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _ParameterView):
            tensor, version = packed
            if version is not None and tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{tensor.dtype} {list(tensor.shape)} is at version {tensor._version}; expected version {version}"
                )
            return cast(Tensor, tensor)
        unit = packed.unit
        self._require_unchanged(unit, packed.generation)
        self._note_backward()
        if unit.name not in self._unpacked:
            self._end_idle_holds()
            self.acquire(unit)
            self._unpacked[unit.name] = unit
        size, stride, offset, dtype = packed.form
        with torch.no_grad():
            flat = unit.params[packed.index].detach().view(-1)
            return (flat if dtype == flat.dtype else flat.view(dtype)).as_strided(size, stride, offset)

    def _require_unchanged(self, unit: Unit, generation: object) -> None:
        if generation is not self._store.current(unit.name, "param"):
            raise RuntimeError(
                f"backward needs values of unit {unit.name!r} that an optimizer step has replaced since the forward; "
                "run the forward again, or the backward before the step"
            )

    # -- forward and backward ------------------------------------------------------------------------------------

    def before_forward(self, module: nn.Module, units: list[Unit], args: Any, kwargs: Any) -> Any:
        """A module that needs ``units`` is about to run; returns its keyword arguments."""
        visit = _Visit(module, units)
        try:
            for unit in units:
                self.acquire(unit)
                visit.num_acquired += 1
        except BaseException:
            for unit in units[: visit.num_acquired]:
                self.release(unit)
            raise
        rerun = self._recomputing
        if torch.is_grad_enabled() and rerun is None and not any(v.frame for v in self._visits):
            for unit in units:
                self._sink.used(unit)
            if module in self._recompute:
                kwargs = without_caches(kwargs)
                visit.frame = Frame(units[0].name, module, args, kwargs, self._device, self._rerun(units))
                visit.enter(saved_tensors_hooks(visit.frame.pack, visit.frame.unpack))
            else:
                visit.enter(saved_tensors_hooks(self._pack, self._unpack))
        self._visits.append(visit)
        return kwargs

    def after_forward(self, module: nn.Module, *, failed: bool) -> None:
        """The module has run, or failed."""
        if not self._visits or self._visits[-1].module is not module:
            return  # its pre-hooks failed before ours
        visit = self._visits.pop()
        visit.close()
        for unit in visit.loose:
            if self._loose.pop(unit.name, None) is not None and unit.num_holds == 0:
                self._release_memory(unit)
        if self._recomputing is not None and self._recomputing.module is module and not failed:
            self._held[id(self._recomputing)] = (self._recomputing, visit.units)
            return
        if visit.frame is not None and not failed:
            visit.frame.end_forward()
            self._watch_inputs(visit.frame)
        for unit in visit.units:
            self.release(unit)

    def _rerun(self, units: list[Unit]) -> Callable[[Frame, Callable[[], object]], None]:
        generations = [(unit, unit.generation) for unit in units]

        def rerun(frame: Frame, call: Callable[[], object]) -> None:
            for unit, generation in generations:
                self._require_unchanged(unit, generation)
            self._note_backward()
            self._end_idle_holds()
            self._trace.mark("recompute", frame.name)
            outer, self._recomputing = self._recomputing, frame
            try:
                call()
            finally:
                self._recomputing = outer

        return rerun

    def _watch_inputs(self, frame: Frame) -> None:
        """When the gradients of a frame's inputs are there, its backward is over."""
        inputs = [t for t in frame.inputs if t.requires_grad and not t.is_leaf]
        remaining = [len(inputs)]
        weak = weakref.ref(frame)

        def arrived(_: Tensor) -> None:
            remaining[0] -= 1
            live = weak()
            if remaining[0] == 0 and live is not None:
                self._end_frame(live)

        for tensor in inputs:
            tensor.register_hook(arrived)

    def _end_frame(self, frame: Frame) -> None:
        frame.drop()
        _, units = self._held.pop(id(frame), (None, []))
        for unit in units:
            self.release(unit)

    def _end_frames(self) -> None:
        for frame, _ in list(self._held.values()):
            self._end_frame(frame)
        while self._unpacked:
            self.release(self._unpacked.popitem()[1])

    def _end_idle_holds(self) -> None:
        """Backward goes on to another unit: those it was in before are over, as far as anybody can tell."""
        if self._recomputing is None:
            self._end_frames()

    def _note_backward(self) -> None:
        """Something of ours happened inside backward: be told when it ends."""
        if not self._in_backward:
            self._in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)  # type: ignore[attr-defined]

    def _end_backward(self) -> None:
        self._in_backward = False
        self._end_frames()
        self._sink.end_backward()


class _ParameterView:
    """Stands for a saved tensor that views a parameter: fetched again when backward needs it."""

    __slots__ = ("form", "generation", "index", "unit")

    def __init__(self, unit: Unit, index: int, form: tuple[Any, ...], generation: object) -> None:
        self.unit = unit
        self.index = index
        self.form = form
        self.generation = generation


class _Visit:
    """One running forward of a module that needs units."""

    def __init__(self, module: nn.Module, units: list[Unit]) -> None:
        self.module = module
        self.units = units
        self.num_acquired = 0
        self.frame: Frame | None = None
        self.loose: list[Unit] = []
        self._stack = ExitStack()

    def enter(self, context: saved_tensors_hooks) -> None:
        self._stack.enter_context(context)

    def close(self) -> None:
        self._stack.close()


class _ModuleHooks:
    """Forward hooks of one module."""

    def __init__(self, streamer: Streamer, units: list[Unit]) -> None:
        self._streamer = streamer
        self._units = units

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, self._streamer.before_forward(module, self._units, args, kwargs)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._streamer.after_forward(module, failed=output is None)


def _storage_address(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):
            return 0  # a tensor without storage of its own, such as one under functorch
