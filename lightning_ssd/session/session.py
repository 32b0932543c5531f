"""One model in a store, from the Trainer's setup until the next session has taken over.

At teardown hooks, threads and pools end. The files stay, so that a checkpoint can still be saved; they are removed when
the next session begins or the process ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ssd.creation.materialize import ParamMaterializer
from lightning_ssd.errors import CheckpointError, ConfigurationError, Ending, ResidencyError, SSDOffloadError
from lightning_ssd.io.deadline import within
from lightning_ssd.io.engine import Engine
from lightning_ssd.io.select import make_engine
from lightning_ssd.memory.headroom import Headroom
from lightning_ssd.memory.heap import bound_heap, trim_heap, unbound_heap
from lightning_ssd.memory.mapped_file import handle_bus_errors
from lightning_ssd.memory.plan import MemoryPlan
from lightning_ssd.optim.adapter import OptimizerAdapter
from lightning_ssd.optim.choice import choose_rule
from lightning_ssd.optim.state_forms import choose_forms, keep_possible_forms
from lightning_ssd.optim.whole import WholeOptimizer, WholeRule
from lightning_ssd.saving.training_state import Saver
from lightning_ssd.session.forking import Forking
from lightning_ssd.session.runtime import Runtime
from lightning_ssd.session.settings import Settings
from lightning_ssd.session.sizing import Sizing
from lightning_ssd.store.handles import handles, require_handles
from lightning_ssd.store.open_store import end_store, open_store
from lightning_ssd.trace.recorder import Trace
from lightning_ssd.units.inherited import Inherited
from lightning_ssd.units.model_units import ModelUnits
from lightning_ssd.units.partition import partition
from lightning_ssd.units.placeholder import make_placeholders
from lightning_ssd.units.unit import Unit


class Session:
    """One model in a store: units, files, adopted optimizers; between `start` and `stop` a runtime streams it.

    Attributes:
        settings: What the user set.
        trace: Records spans, and logs what happens to units.
        engine: Moves bytes between disk and memory.
        store: The files.
        materializer: Makes parameters on mapped files while a model is created.
        model: The model's units; none before `place`.
        optimizers: The adopted optimizers, in Lightning's order.
        runtime: What streams the model; None before `start`, and from `stop` on.
        plan: The memory of the runtime, also after its end; None before `start`.
        is_inherited: This is a forked process, and all of it is the parent's.
    """

    def __init__(self, settings: Settings) -> None:
        bound_heap()  # before the model is made
        handle_bus_errors()
        self.settings = settings
        self.trace = Trace()
        self.engine: Engine = make_engine(settings.io)
        try:
            self.store = open_store(
                settings.roots,
                settings.io,
                self.engine,
                keep=settings.keep_store,
                verify=settings.verify,
                trace=self.trace,
            )
        except BaseException:
            self.engine.close()
            raise
        self.materializer = ParamMaterializer(self.store.scratches[0], settings.device)
        self._saver = Saver(self.store)
        self.model = self._make_model([])
        self.optimizers: list[OptimizerAdapter] = []
        self.runtime: Runtime | None = None
        self.plan: MemoryPlan | None = None
        self.is_inherited = False
        self._is_stopped = False
        self._updates_in_backward: OptimizerAdapter | None = None
        # Runs when the last reference to the session is gone, at the latest when the process ends.
        self._remove_files = weakref.finalize(self, end_store, self.store, remove=not settings.keep_store)
        Forking(self)

    @property
    def units(self) -> list[Unit]:
        """The model's units, in order."""
        return self.model.units

    @property
    def is_started(self) -> bool:
        """Whether `start` has succeeded, also after `stop`."""
        return self.plan is not None

    @property
    def running(self) -> Runtime:
        """The runtime.

        Raises:
            ConfigurationError: There is none: the strategy was not set up, or is torn down.
        """
        if self.runtime is None:
            raise ConfigurationError(
                "strategy='ssd_offload' streams nothing now: a step runs between the Trainer's setup and its teardown"
            )
        return self.runtime

    # -- life ----------------------------------------------------------------------------------------------------

    def place(self, module: nn.Module) -> None:
        """Cut ``module`` into units and write their values into the store; initialises what is on the meta device."""
        settings = self.settings
        self.materializer.materialize(module)
        specs = partition(module, policy=settings.units, min_numel=settings.min_unit_numel)
        self.model = self._make_model(
            [Unit(spec, settings.param_dtype, keep_master=settings.keep_master) for spec in specs]
        )
        nbytes = sum(unit.layout.file_nbytes for unit in self.units)
        self.store.disks.require_free(nbytes, "placing the parameters", num_files=len(self.units))
        adam = handles(3 * len(self.units), len(self.units), 0, direct=self.store.disks.are_direct).num_files
        what = f"{len(self.units)} units of parameters (with the state of an Adam about {adam} open files)"
        require_handles(handles(len(self.units), 0, 0, direct=self.store.disks.are_direct), what)
        placeholders = make_placeholders(self.units, self.store.scratches[0], self.settings.device)
        if settings.device.type == "cpu":  # to other devices plain Lightning moves parameters away from views, too
            self.model.writes.note_views()
        for unit in self.units:
            for param in unit.params:
                if param.is_cuda:
                    param.data = param.data.cpu()
            self.store.put(unit.layout, partial(_values, unit))
            unit.placeholders = placeholders[unit.name]
            self.model.offload(unit)

    def _make_model(self, units: list[Unit]) -> ModelUnits:
        return ModelUnits(units, self.store, self.settings.device)

    def adopted(self, optimizer: Optimizer) -> OptimizerAdapter | None:
        """What ``optimizer`` was adopted as; None if it was not."""
        return next((each for each in self.optimizers if each.optimizer is optimizer), None)

    def adopt(self, optimizer: Optimizer) -> OptimizerAdapter:
        """Take over an optimizer, unless that was done before; if a runtime streams, its steps work at once."""
        known = self.adopted(optimizer)
        if known is not None:
            return known
        rule = choose_rule(optimizer, self.settings.update, keep_master=self.settings.keep_master)
        if isinstance(rule, WholeRule) and self.is_started:
            raise ConfigurationError(
                f"optimizer {type(optimizer).__name__} can only be run whole ({rule.why}), which takes memory that is "
                "planned at setup; return it from configure_optimizers"
            )
        kind = WholeOptimizer if isinstance(rule, WholeRule) else OptimizerAdapter
        params = {param for group in optimizer.param_groups for param in group["params"]}
        taken = {other.suffix for other in self.optimizers if not params.isdisjoint(other.params())}
        suffix = next(s for s in (f"@{n}" if n else "" for n in count()) if s not in taken)
        adopted = kind(optimizer, rule, self.units, self.store, suffix=suffix)
        adopted.adopt()
        self.optimizers.append(adopted)
        self.drain()
        keep_possible_forms(self.store, self.units, self.optimizers)
        if self.runtime is not None:
            adopted.connect(self.runtime.updates)
        return adopted

    def adopt_all(self, optimizers: Sequence[Optimizer]) -> None:
        """Take over ``optimizers``; others that were adopted before get their step and their state back."""
        mine = self.optimizers
        self.optimizers = [adopted for adopted in mine if any(adopted.optimizer is each for each in optimizers)]
        for adopted in mine:
            if adopted not in self.optimizers:
                adopted.dismiss(self.optimizers)
        self.optimizers = [self.adopt(optimizer) for optimizer in optimizers]

    def start(self, module: nn.Module, *, waits_for_all_grads: bool) -> None:
        """Plan the memory and take it, and set the hooks of the modules.

        Args:
            module: The model.
            waits_for_all_grads: No unit is updated before all gradients of a step are there.

        Raises:
            MemoryPlanError: If the budget cannot work.
            StoreError: If the disk cannot hold the run.
        """
        for unit in self.units:  # what was written to them in configure_optimizers
            self.model.write_back(unit)
        sizing = self.sizing
        plan = sizing.plan(module, waits_for_all_grads=waits_for_all_grads)
        trim_heap()
        headroom = Headroom(plan, sum(len(unit.params) for unit in self.units))
        if plan.fits:
            unbound_heap()
        in_memory = plan.in_memory_params | plan.in_memory_states
        with self.store.writable():
            choose_forms(self.store, self.units, self.optimizers, self.settings.state, in_memory)
        self._require_room(plan, sizing)
        self.runtime = Runtime(
            module,
            self.model,
            plan,
            sizing=sizing,
            settings=self.settings,
            engine=self.engine,
            headroom=headroom,
            trace=self.trace,
            waits_for_all_grads=waits_for_all_grads,
        )
        for adopted in self.optimizers:
            adopted.connect(self.runtime.updates)
        self.plan = plan

    def _require_room(self, plan: MemoryPlan, sizing: Sizing) -> None:
        """Refuse a run for which the disks, or the limits of this process, are too small."""
        num_new = sizing.num_generations - len(self.units)
        what = "the optimizer state and generations being written"
        self.store.disks.require_free(sizing.disk_nbytes, what, num_files=num_new + sizing.num_spare)
        needed = handles(
            sizing.num_generations,
            0 if plan.in_memory_grads or plan.fits else len(sizing.trained()),
            sizing.num_spare,
            direct=self.store.disks.are_direct,
        )
        what = f"a run of {len(self.units)} units, which are {sizing.num_generations} files with their state,"
        require_handles(needed, what)

    def drain(self) -> None:
        """Return when no update is pending.

        Raises:
            SSDOffloadError: One of them failed.
        """
        if self.runtime is not None:
            self.runtime.updater.drain()

    def stop(self) -> None:
        """End hooks, threads and pools; parameters stay as mappings of their files. A second call does nothing."""
        if self.is_inherited:
            return
        self._is_stopped = True
        runtime, self.runtime = self.runtime, None
        # In reverse order, each whatever became of the one before.
        with within(self.engine.patience), Ending() as stack:
            stack.callback(trim_heap)  # here, not while training
            if runtime is not None:
                stack.callback(runtime.free)
            stack.callback(self.engine.close)  # it knows the memory
            stack.callback(self.store.suspend)
            for adopted in self.optimizers:
                stack.callback(adopted.release)
            stack.callback(self.model.map_all)
            if runtime is not None:
                stack.callback(runtime.close)

    def close(self) -> None:
        """Remove the files (or keep them, if asked for). Parameters that map them keep their values."""
        if self.is_inherited:
            return
        with ExitStack() as stack:
            stack.callback(self._remove_files)
            if self._is_stopped:  # what failed then was reported then
                stack.enter_context(suppress(SSDOffloadError))
            self.stop()

    def save_links(self, checkpoint: Mapping[str, Any], path: str, *, is_linked: bool, with_file: bool) -> None:
        """Save Lightning's dictionary as a checkpoint of links.

        Args:
            checkpoint: The dictionary.
            path: Of the checkpoint; one of that name is replaced.
            is_linked: See `Saver.save`.
            with_file: See `Saver.save`.

        Raises:
            CheckpointError: A step failed midway, or the checkpoint could not be saved.
            ResidencyError: This is a forked process.
        """
        self.require_own("a checkpoint cannot be saved")
        if any(adopted.is_mid_step for adopted in self.optimizers):
            raise CheckpointError(
                "the optimizer step that failed had already updated a part of the model, so the model is not saved; "
                "resume from the last checkpoint"
            )
        with self.written_back(), within(self.engine.patience):
            self._saver.save(
                checkpoint,
                path,
                units=self.units,
                optimizers=self.optimizers,
                is_linked=is_linked,
                with_file=with_file,
            )

    @contextmanager
    def written_back(self) -> Iterator[None]:
        """Inside, the store has every value, also those that the user wrote outside a step; works after `stop` too."""
        self.require_own("the model cannot be written to its files")
        if self.runtime is not None:
            self.drain()
            self.runtime.cache.end_step()  # what the last step wrote is kept
        mapped = [unit for unit in self.units if unit.mapped is not None]
        with self.store.writable():
            try:
                for unit in mapped:
                    self.write_back(unit)
                yield
            finally:
                if self.runtime is None:
                    self.model.map_all()

    def write_back(self, unit: Unit) -> None:
        """Bring what the user wrote to ``unit`` outside a step into the store."""
        if self.runtime is None:
            self.model.write_back(unit)
        else:
            self.runtime.cache.write_back(unit)

    # -- the step ------------------------------------------------------------------------------------------------

    @contextmanager
    def step_of(self, updates_in_backward: Optimizer | None) -> Iterator[None]:
        """Around the step of an optimizer, which runs forward and `backward` as its closure.

        Args:
            updates_in_backward: The optimizer, if backward may update each unit as soon as its gradients are complete;
                None if gradients wait for the end of backward.
        """
        if updates_in_backward is not None:
            self._updates_in_backward = self.adopted(updates_in_backward)
            self.running.begin_step()
        try:
            yield
        finally:
            self._updates_in_backward = None
            self.running.begin_step()
            self.running.hooks.end_step()

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around the backward of a step that Lightning runs; see `Runtime.backward`."""
        self.require_own("a step cannot be made")
        with self.running.backward(self._updates_in_backward):
            yield

    # -- forked processes ----------------------------------------------------------------------------------------

    def inherit(self, refusals: Mapping[str, str], passed_on: list[tuple[int, int]], *, has_in_memory: bool) -> None:
        """This is a forked process; [Note: inherited].

        Args:
            refusals: Why parameters cannot be read here, by unit.
            passed_on: What there is of the arena, ``(offset, nbytes)``.
            has_in_memory: Whether parameters that are held in memory are here.
        """
        self.is_inherited = True
        self._remove_files.detach()
        self.trace.stop()
        self.store.inherit("param")
        if self.store.is_suspended or not self.units:  # parameters are plain, or not placed yet
            return
        for adopted in self.optimizers:
            adopted.inherit()
        is_off_host = self.settings.is_off_host
        self.model.inherit(
            Inherited(self.store, refusals),
            lambda unit: is_off_host or (unit.in_memory is not None and not has_in_memory),
        )
        if self.runtime is not None:
            self.runtime.inherit(passed_on, has_in_memory=has_in_memory)

    def require_own(self, what: str) -> None:
        """Refuse ``what`` in a forked process.

        Raises:
            ResidencyError: This is one.
        """
        if self.is_inherited:
            raise ResidencyError(
                f"{what} in a forked process: the model is that of the process that trains; do it there, or train a "
                "copy.deepcopy of the module here"
            )

    # -- numbers -------------------------------------------------------------------------------------------------

    @property
    def sizing(self) -> Sizing:
        """What the units need, with the optimizers that are adopted now."""
        return Sizing(self.settings, self.units, self.optimizers)


def _values(unit: Unit, index: int) -> Tensor:
    return unit.params[index].data
