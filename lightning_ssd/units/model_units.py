"""The units of one model outside of steps: lazy parameters, and values on mapped files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_ssd.device.on_host import PLAIN, HostClasses, host_classes, make_plain
from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.store.strides import Stride
from lightning_ssd.units import transforms
from lightning_ssd.units.holders import give
from lightning_ssd.units.inherited import Inherited
from lightning_ssd.units.lazy_param import lazy_class
from lightning_ssd.units.mapped import InMemoryParams, MappedParams
from lightning_ssd.units.step_state import StepState
from lightning_ssd.units.unit import Unit
from lightning_ssd.units.user_writes import UserWrites


class Streaming(Protocol):
    """What streams the units between setup and teardown, seen from parameters that code outside of modules uses."""

    def touch(self, units: Sequence[Unit], operands: Sequence[Tensor]) -> None:
        """In a step: fetch ``units``, all at the same time; the units that ``operands`` view stay."""
        ...

    def hold(self, units: Sequence[Unit]) -> AbstractContextManager[None]:
        """In a step: inside, ``units`` are fetched, and saved tensors are not watched."""
        ...

    def before_map(self, unit: Unit) -> None:
        """Outside a step: return when the newest values of ``unit`` are in the store, and nothing reads its memory."""
        ...

    def after_map(self, unit: Unit) -> None:
        """Outside a step: the parameters of ``unit`` show its values now, and may be written to."""
        ...


class ModelUnits:
    """The units of one model, and their values while no step runs. It is the loader of their lazy parameters.

    Args:
        units: All units.
        store: Where their values are.
        device: Where modules compute.

    Attributes:
        step: Whether a step runs.
        lazy_class: Of parameters that are offloaded.
        lock: Guards who has a unit; the thread that trains and the thread of updates take it.
        writes: What the user wrote to parameters.
        streaming: What streams the units; None before `start` and after the end.
        inherited: In a forked process, where values are; None in the one that trains.
        classes_on_host: Of tensors on the host, while the units are streamed.
    """

    def __init__(self, units: list[Unit], store: StateStore, device: torch.device) -> None:
        self.units = units
        self.store = store
        self.step = StepState()
        self.lock = threading.Condition()
        self.writes = UserWrites(store, units)
        self.streaming: Streaming | None = None
        self.inherited: Inherited | None = None
        self._unit_of = {param: unit for unit in units for param in unit.params}
        self.lazy_class = lazy_class(self)
        self.classes_on_host = host_classes(device)

    # -- lazy parameters -----------------------------------------------------------------------------------------

    def offload(self, unit: Unit) -> None:
        """Make the parameters of ``unit``, whose values are in the store, lazy."""
        unit.offload(self.lazy_class)

    @property
    def loads_to_host(self) -> bool:
        """Whether values that are loaded now are on the host for everybody, wherever compute runs."""
        return self.inherited is not None or self.streaming is None

    @property
    def host(self) -> HostClasses:
        """What values on the host are for code that looks at them."""
        return PLAIN if self.loads_to_host else self.classes_on_host

    def stride_of(self, param: nn.Parameter) -> Stride | None:
        """The strides that ``param`` has when it is loaded; None for those of its shape."""
        unit = self._unit_of[param]
        return next(shape.stride for own, shape in zip(unit.params, unit.shapes, strict=True) if own is param)

    def load(self, params: Sequence[nn.Parameter], operands: Sequence[Tensor] = ()) -> None:
        """Make ``params`` plain parameters on their current values, all at the same time; ``operands`` stay usable."""
        units = self._units_of(params)
        if self.inherited is not None:
            self.load_inherited(units)
        elif self.step.is_running and self.streaming is not None:
            self.streaming.touch(units, operands)
        else:
            with transforms.suspended():
                for unit in units:
                    self._map(unit)

    @contextmanager
    def gather(self, params: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside, ``params`` are plain parameters on their current values; in a step, saved tensors are not watched."""
        mine = [param for param in params if param in self._unit_of]
        if self.step.is_running and self.streaming is not None:
            with self.streaming.hold(self._units_of(mine)):
                self.load(mine)
                yield
        else:
            self.load(mine)
            yield

    def _units_of(self, params: Sequence[nn.Parameter]) -> list[Unit]:
        return list({self._unit_of[param].name: self._unit_of[param] for param in params}.values())

    # -- mapped values -------------------------------------------------------------------------------------------

    def map_all(self) -> None:
        """Nothing streams any more: all parameters are plain ones on mapped files."""
        for unit in self.units:
            unit.released_copy = None
            # Not placed if the disk failed or filled before.
            if unit.mapped is None and self.store.current(unit.name, "param") is not None:
                unit.map(MappedParams(self.store, self.store.newest(unit.name, "param")))
            for param in unit.params:
                make_plain(param)

    def release_memory(self) -> None:
        """Write what is held in memory into files; nothing computes with it any more."""
        for unit in self.units:
            if unit.in_memory is not None:
                self.write_back(unit)
                unit.in_memory = None
        self.store.flush_in_memory()

    def write_back(self, unit: Unit) -> bool:
        """If ``unit`` is mapped, bring what the user wrote to it into the store, and make its parameters lazy again.

        Returns:
            Whether it was written to: what else of it is in memory is out of date.
        """
        if unit.mapped is None:
            return False
        with self.lock:
            mapped, is_written = unit.mapped, self.writes.collect_mapped(unit, unit.mapped)
            self.offload(unit)
            mapped.unmap(is_written=is_written)
        return is_written

    def _map(self, unit: Unit) -> None:
        if self.streaming is not None:
            self.streaming.before_map(unit)
        with self.lock:
            if unit.mapped is None:
                generation = self.store.newest(unit.name, "param")
                if unit.in_memory is not None:
                    unit.map(InMemoryParams(generation, unit.in_memory), self.host.param)
                else:
                    unit.map(MappedParams(self.store, generation), self.host.param)
        if self.streaming is not None:
            self.streaming.after_map(unit)

    # -- forked processes: [Note: inherited] ---------------------------------------------------------------------

    def before_fork(self) -> None:
        """Let nothing change until `after_fork`, and let what is mapped now be mapped for each process alone."""
        self.lock.acquire()
        for unit in self.units:
            if isinstance(unit.mapped, MappedParams):
                with suppress(SSDOffloadError):  # its file is gone: only this process and its children see it
                    unit.mapped.make_private()

    def after_fork(self) -> None:
        """Undo `before_fork`, in both processes."""
        self.lock.release()

    def inherit(self, inherited: Inherited, lost: Callable[[Unit], bool]) -> None:
        """This is a forked process: parameters that are loaded stay so, but where their memory is ``lost``."""
        self.inherited = inherited
        for unit in self.units:
            unit.num_holds, unit.update = 0, None
            if lost(unit) and (unit.device_copy is not None or unit.in_memory is not None):
                self.offload(unit)
            unit.forget_copies()

    def load_inherited(self, units: Sequence[Unit]) -> None:
        """In a forked process: give lazy parameters of ``units`` the values of the fork."""
        if self.inherited is None:
            return
        with transforms.suspended():
            for unit in units:
                if self.lazy_class in map(type, unit.params):
                    for param, tensor in zip(unit.params, self.inherited.values(unit), strict=True):
                        if type(param) is self.lazy_class:
                            give(param, tensor, nn.Parameter)


def chains(root: nn.Module, units: Iterable[Unit]) -> list[list[str]]:
    """Names of units that nested modules need at the same time, one list per chain of nested modules."""
    users: dict[nn.Module, list[Unit]] = {}
    for unit in units:
        for user in unit.modules:
            users.setdefault(user, []).append(unit)
    found: list[list[str]] = []

    def call(module: nn.Module, held: list[str]) -> None:
        here = held + [unit.name for unit in users.get(module, []) if unit.name not in held]
        if len(here) > len(held):
            found.append(here)
        for child in module.children():
            call(child, here)

    call(root, [])
    return found
