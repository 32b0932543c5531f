"""Updates without files or threads of compute: a cache and a pipeline that only note what they are asked for."""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ssd.device.param_copies import DeviceCopy
from lightning_ssd.memory.budget import SharedBudget
from lightning_ssd.optim.rules import SGDRule
from lightning_ssd.optim.update import ParameterUpdate, PendingUpdate, Updates
from lightning_ssd.optim.updater import Updater
from lightning_ssd.trace.recorder import Trace
from lightning_ssd.units.partition import UnitSpec
from lightning_ssd.units.unit import Unit, Waitable


def make_unit(name: str) -> Unit:
    weight = nn.Parameter(torch.zeros(4))
    return Unit(
        UnitSpec(name=name, names=[f"{name}.weight"], params=[weight], modules=[], block=None, persistent=False)
    )


class FakeWorld:
    """Stands for cache, pipeline and gradients at once.

    Args:
        names: Units, in forward order.
        capacity: Bytes of gradients that may wait.
        is_async: Of the `Updater`.
        lock: Of the cache.

    Attributes:
        events: What was called, in order.
        begun: Set when the first update runs.
        gates: An update of a unit waits for the event here.
        errors: What an update of a unit raises.
        write_errors: What the writes of a unit raise.
        writes_behind: Updates end in `finish`, else in `update`.
    """

    def __init__(
        self, *names: str, capacity: int = 0, is_async: bool = True, lock: threading.Condition | None = None
    ) -> None:
        self.events: list[str] = []
        self.begun = threading.Event()
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.write_errors: dict[str, Exception] = {}
        self.writes_behind = False
        self.budget = SharedBudget(gradients_nbytes=capacity)
        self.lock = threading.Condition() if lock is None else lock
        self.units = [make_unit(name) for name in names]
        self.order = self
        self._writing: PendingUpdate | None = None
        self.updater = Updater(lock=self.lock, budget=self.budget, is_async=is_async, trace=Trace())
        self.updates = Updates(cast(Any, self), cast(Any, self), self.updater)

    def unit(self, name: str) -> Unit:
        return next(unit for unit in self.units if unit.name == name)

    def make(
        self, name: str, *, is_last: bool = True, grad: Tensor | None = None, in_flight: Waitable | None = None
    ) -> PendingUpdate:
        grad = torch.ones(4) if grad is None else grad
        parts = {0: ParameterUpdate(grad, grad._version, {}, {}, set())}
        return PendingUpdate(self.updates, self.unit(name), SGDRule(), parts, is_last=is_last, in_flight=in_flight)

    def submit(self, *names: str) -> list[PendingUpdate]:
        made = [self.make(name) for name in names]
        for update in made:
            self.updater.submit(update)
        return made

    def use(self, *names: str) -> None:
        """Compute reads units."""
        for name in names:
            self.unit(name).device_copy = DeviceCopy([], cast(Any, None))

    def release(self, name: str) -> None:
        """Compute is done with a unit."""
        with self.lock:
            self.unit(name).device_copy = None
            self.lock.notify_all()

    # -- of the cache --------------------------------------------------------------------------------------------

    keeps_buffer = True

    def position(self, name: str, pass_: str) -> int:
        return [unit.name for unit in self.units].index(name)

    def prepare_update(self, unit: Unit) -> bool:
        unit.num_pins += 1
        return True

    def unpin(self, unit: Unit) -> None:
        unit.num_pins -= 1

    def reserve(self, unit: Unit, *, is_pinned: bool) -> None:
        assert unit.num_pins == 1  # until now the values may not go
        unit.num_pins -= is_pinned
        self.events.append(f"reserve {unit.name}")

    def updated(self, unit: Unit) -> None:
        self.events.append(f"updated {unit.name}")

    # -- of the pipeline -----------------------------------------------------------------------------------------

    def update(self, update: PendingUpdate, target: None) -> None:
        name = update.unit.name
        self.begun.set()
        if name in self.gates:
            assert self.gates[name].wait(20)
        self.events.append(f"update {name}")
        if name in self.errors:
            raise self.errors[name]
        self.finish()
        self._writing = update
        if not self.writes_behind:
            self.finish()

    def finish(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            if writing.unit.name in self.write_errors:
                raise self.write_errors[writing.unit.name]
            writing.complete()

    @property
    def updated_units(self) -> list[str]:
        """Units in the order in which they were updated."""
        return [event.removeprefix("update ") for event in self.events if event.startswith("update ")]
