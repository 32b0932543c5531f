"""Units with values in a store, and what fetches them: without a model, hooks or a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lightning_ssd.io.engine import IOOptions
from lightning_ssd.io.python_engine import PythonEngine
from lightning_ssd.memory.pool import Pool, pool_nbytes
from lightning_ssd.store.run_directory import RunDirectory
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.trace.recorder import Trace
from lightning_ssd.units.model_units import ModelUnits
from lightning_ssd.units.param_cache import ParamCache
from lightning_ssd.units.partition import UnitSpec
from lightning_ssd.units.placeholder import make_placeholders
from lightning_ssd.units.placement import InPlace
from lightning_ssd.units.unit import Unit
from tests.helpers.events import Events
from tests.helpers.faulty import FaultyEngine, When
from tests.helpers.pools import num_lent

NUMEL = 2000


class CacheWorld:
    """Units of one parameter each, all of one size; every element of unit i has the value i.

    Args:
        folder: Of the files.
        num_units: How many.
        num_buffers: For how many host copies there is memory.
        faults: What the disk does.
        in_memory: Numbers of units that the plan holds in memory.
        persistent: Numbers of units that stay for the step.
        keep_cache: See `ParamCache`.
        max_ahead: See `ParamCache`.
        prefetch_batch: See `ParamCache`.
    """

    def __init__(
        self,
        folder: Path,
        num_units: int,
        num_buffers: int,
        *,
        faults: Sequence[When] = (),
        in_memory: Sequence[int] = (),
        persistent: Sequence[int] = (),
        keep_cache: bool = False,
        max_ahead: int | None = 1,
        prefetch_batch: int = 1,
    ) -> None:
        options, directory, self.trace = IOOptions(num_threads=2), RunDirectory(str(folder)), Trace()
        self.engine = FaultyEngine(PythonEngine(options), faults)
        self.store = StateStore(
            [directory], self.engine, options=options, direct=[False], verify=False, trace=self.trace
        )
        params = [nn.Parameter(torch.full((NUMEL,), float(i))) for i in range(num_units)]
        self.units = [
            Unit(UnitSpec(str(i), [f"{i}.weight"], [param], persistent=i in persistent))
            for i, param in enumerate(params)
        ]
        for unit in self.units:
            self.store.put(unit.layout, lambda i, unit=unit: unit.params[i].data)  # type: ignore[misc]
        placeholders = make_placeholders(self.units, self.store.scratches[0], torch.device("cpu"))
        self.model = ModelUnits(self.units, self.store, torch.device("cpu"))
        nbytes = pool_nbytes(self.units[0].layout.buffer_nbytes)
        self.pool = Pool(num_buffers * nbytes, "parameter", poison=True)
        for i, unit in enumerate(self.units):
            unit.placeholders = placeholders[unit.name]
            self.model.offload(unit)
            if i in in_memory:
                self.store.hold_in_memory(unit.layout, [torch.empty(NUMEL)])
                unit.hold_in_memory(self.store.in_memory(unit.name, "param") or ())
        self.cache = ParamCache(
            self.model,
            pool=self.pool,
            placement=InPlace(),
            keep_cache=keep_cache,
            max_ahead=max_ahead,
            prefetch_batch=prefetch_batch,
            trace=self.trace,
        )

    def close(self) -> None:
        """No buffer is lent any more; the placeholders' file goes."""
        self.cache.close()
        self.model.map_all()
        for unit in self.units:
            unit.placeholders = ()
        assert num_lent(self.pool) == 0
        self.store.close(remove=True)
        self.engine.close()
        self.pool.close()

    def value(self, unit: Unit) -> float:
        """The one value of all elements of a resident unit."""
        assert unit.device_copy is not None
        (value,) = set(unit.params[0].detach().tolist())
        return float(value)

    def use(self, *numbers: int) -> list[float]:
        """Run modules of units one after the other, as a step does; what each found."""
        found = []
        for number in numbers:
            unit = self.units[number]
            self.cache.fetch(unit)
            found.append(self.value(unit))
            self.cache.release(unit)
        return found

    def step(self, *numbers: int) -> tuple[list[float], list[str]]:
        """One step of the kind ``train``; what each unit held, and the events: ``fetch 0``, ``prefetch 1``, ..."""
        with Events() as events:
            self.cache.begin_step("train")
            with self.model.step.running():
                found = self.use(*numbers)
            self.cache.end_step()
        return found, events.found

    def update(self, number: int, value: float) -> None:
        """An update of a unit is made: a new generation, through the host copy if there is one."""
        unit = self.units[number]
        target = self.cache.reserve(unit)
        if target is not None and target.is_writable:
            target.values.fill_(value)
        self.store.put(unit.layout, lambda i: torch.full((NUMEL,), value))
        if target is not None:
            target.end(is_new=True)
        self.cache.updated(unit)
