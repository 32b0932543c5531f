"""What streams a model between setup and teardown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from torch import nn

from lightning_ssd.activations.spill_files import SpillFiles
from lightning_ssd.activations.store import ActivationStore
from lightning_ssd.device.allowance import LearnedAllowance
from lightning_ssd.device.param_copies import CopyToDevice
from lightning_ssd.device.streams import make_streams
from lightning_ssd.errors import Ending, SSDOffloadError
from lightning_ssd.io.engine import Engine
from lightning_ssd.memory.budget import SharedBudget
from lightning_ssd.memory.device_plan import device_capacity, tensors_nbytes
from lightning_ssd.memory.headroom import Headroom
from lightning_ssd.memory.heap import HeapWatch
from lightning_ssd.memory.plan import MemoryPlan
from lightning_ssd.memory.plan_pools import PlanPools
from lightning_ssd.optim.adapter import OptimizerAdapter
from lightning_ssd.optim.pipeline import UpdatePipeline
from lightning_ssd.optim.update import Updates
from lightning_ssd.optim.updater import Updater
from lightning_ssd.session.settings import Settings
from lightning_ssd.session.sizing import Sizing
from lightning_ssd.step.grad_offload import GradOffloader
from lightning_ssd.step.gradients import GradientStore
from lightning_ssd.step.module_hooks import ModuleHooks
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.trace.recorder import Trace
from lightning_ssd.units.model_units import ModelUnits, chains
from lightning_ssd.units.param_cache import ParamCache
from lightning_ssd.units.placement import InPlace, Placement


class Runtime:
    """What streams a model between setup and teardown: memory, cache, updater, gradients and hooks, all running.

    Args:
        module: The model.
        model: Its units.
        plan: The memory.
        sizing: What the units need.
        settings: Of the run.
        engine: Moves bytes between disk and memory.
        headroom: Checks, until the first backward has ended, that enough memory is left.
        trace: Records spans.
        waits_for_all_grads: No update runs before all gradients are there.

    Attributes:
        streams: Of the device, and what the host waited for.
        pools: Its pools.
        grads: Takes gradients.
        updater: Runs pending updates.
        updates: What optimizers make steps with.
        cache: Fetches and releases units.
        hooks: Of modules.
        is_updating: In the step that runs, a backward updates units, or has done so.
    """

    def __init__(
        self,
        module: nn.Module,
        model: ModelUnits,
        plan: MemoryPlan,
        *,
        sizing: Sizing,
        settings: Settings,
        engine: Engine,
        headroom: Headroom,
        trace: Trace,
        waits_for_all_grads: bool,
    ) -> None:
        self.plan = plan
        self.is_updating = False
        self._model = model
        self._settings = settings
        self._engine = engine
        self._trace = trace
        self._activations: ActivationStore | None = None
        self._headroom = headroom
        self.streams = make_streams(settings.device)
        self.pools = PlanPools(plan, engine, settings.device)
        undo: list[Callable[[], object]] = [self._give_back]
        try:
            headroom.watch(self.pools.arena)
            self._hold_in_memory(sizing)
            self.grads = self._make_grads(waits_for_all_grads)
            undo.append(self.grads.close)
            pipeline = self._make_pipeline()
            budget = SharedBudget(
                gradients_nbytes=plan.queue_nbytes,
                saved_inputs_nbytes=plan.activation_nbytes if plan.recomputes else 0,
                lends=not settings.is_off_host,
            )
            self.updater = Updater(lock=model.lock, budget=budget, is_async=sizing.is_overlapped, trace=trace)
            undo.append(self.updater.close)
            placement = self._make_placement(module)
            self.cache = self._make_cache(placement)
            undo.append(self.cache.close)
            self.updates = Updates(pipeline, self.cache, self.updater)
            if plan.recomputes:
                self._activations = self._make_activations(budget, placement)
                undo.append(self._activations.close)
            self.hooks = self._make_hooks(module, sizing)
        except BaseException:
            with Ending() as ending:  # what fails here does not hide the cause
                for call in undo:
                    ending.callback(call)
                raise

    def begin_step(self) -> None:
        """The optimizer's step begins, whose backward may update units."""
        self.is_updating = False

    @contextmanager
    def backward(self, optimizer: OptimizerAdapter | None) -> Iterator[None]:
        """Around the backward of a step that Lightning runs. After one that the user runs, gradients must be there.

        Args:
            optimizer: Updates each unit whose gradients are all there; None if gradients wait.
        """
        self.updater.drain()  # autograd may add to gradients that an update still reads
        self.is_updating = self.is_updating or optimizer is not None
        with self.hooks.backward(optimizer):
            yield

    def abort_step(self) -> None:
        """Drop what a failed step held, after the pending updates of the step before."""
        with suppress(SSDOffloadError):  # reported already, or with the next use
            self.updater.drain()
        self.hooks.abort_step()

    def close(self) -> None:
        """Run what is pending; end hooks and threads. The memory stays until `free`."""
        with Ending() as ending:
            if self._activations is not None:
                ending.callback(self._activations.close)
            ending.callback(self.grads.close)
            ending.callback(self.cache.close)
            ending.callback(self.hooks.close)
            ending.callback(self.updater.close)
            if not self.updater.is_broken:  # else it was reported
                ending.callback(self.updater.drain)

    def free(self) -> None:
        """Give the memory back; the engine is closed."""
        self._headroom.end()
        self.pools.close()

    def inherit(self, passed_on: list[tuple[int, int]], *, has_in_memory: bool) -> None:
        """This is a forked process; see `Session.inherit`."""
        self.grads.inherit()
        self.hooks.inherit()
        self.pools.forbid(passed_on, has_in_memory=has_in_memory)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _hold_in_memory(self, sizing: Sizing) -> None:
        """Move what the plan holds in memory there."""
        store, states = self._model.store, self.pools.states
        for unit in self._model.units:
            is_held = unit.name in self.plan.in_memory_params
            layouts = [(unit.layout, self.pools.in_memory_params or states)] if is_held else []
            if unit.name in self.plan.in_memory_states:
                layouts += [(layout, states) for layout in sizing.state_layouts(unit)]
            for layout, pool in layouts:
                buffer, dtype = pool.lend(layout.buffer_nbytes, f"unit {unit.name!r}"), dtype_of(layout.dtype)
                places = zip(layout.entries, layout.places, strict=True)
                tensors = [buffer.tensor(place, dtype, entry.shape, entry.stride) for entry, place in places]
                held = store.hold_in_memory(layout, tensors)
                if layout is unit.layout:
                    unit.hold_in_memory(held)

    def _give_back(self) -> None:
        """Setup failed: forget what was moved into memory, and free it."""
        self._model.release_memory()
        self._engine.close()
        self.free()

    def _make_grads(self, waits_for_all_grads: bool) -> GradientStore:
        plan, settings, units = self.plan, self._settings, self._model.units
        offloader = None
        if self.pools.grads is not None:
            largest_nbytes = max(unit.layout.data_nbytes for unit in units)
            offloader = GradOffloader(self.streams, self.pools.grads, most_nbytes=largest_nbytes)
        return GradientStore(
            None if plan.in_memory_grads or plan.fits else self._model.store.scratches[0],
            off_device=settings.is_off_host,
            on_host=self._model.classes_on_host,
            offloader=offloader,
            heap=None if plan.fits or settings.is_off_host else HeapWatch(),
            waits_for_all_grads=waits_for_all_grads,
            verify=settings.verify,
        )

    def _make_pipeline(self) -> UpdatePipeline:
        return UpdatePipeline(
            self._model.store,
            self.pools.updates,
            chunk_numel=self.plan.chunk_numel,
            depth=self.plan.depth,
            trace=self._trace,
        )

    def _make_cache(self, placement: Placement) -> ParamCache:
        plan, window = self.plan, self._settings.window_size
        return ParamCache(
            self._model,
            pool=self.pools.params,
            placement=placement,
            keep_cache=plan.keep_cache,
            max_ahead=(None if plan.keep_cache else 1) if window is None else window - 1,
            prefetch_batch=self._settings.prefetch_size,
            trace=self._trace,
        )

    def _make_placement(self, module: nn.Module) -> Placement:
        settings, units = self._settings, self._model.units
        if not settings.is_off_host:
            return InPlace()
        nbytes = {unit.name: tensors_nbytes(entry.nbytes for entry in unit.layout.entries) for unit in units}
        nested = chains(module, units)
        smallest_nbytes = device_capacity(nbytes, nested, None)
        is_learned = settings.device_nbytes is None
        return CopyToDevice(
            self.streams,
            capacity_nbytes=device_capacity(nbytes, nested, settings.device_nbytes),
            reserve_nbytes=smallest_nbytes,
            is_limit=not is_learned,
            allowance=LearnedAllowance(settings.device, smallest_nbytes) if is_learned else None,
        )

    def _make_hooks(self, module: nn.Module, sizing: Sizing) -> ModuleHooks:
        plan, settings = self.plan, self._settings
        return ModuleHooks(
            module,
            model=self._model,
            cache=self.cache,
            grads=self.grads,
            headroom=self._headroom,
            device=settings.device,
            recompute=sizing.blocks() if plan.recomputes else set(),
            activations=self._activations,
            is_in_memory=plan.fits and not settings.is_off_host,
            trace=self._trace,
        )

    def _make_activations(self, budget: SharedBudget, placement: Placement) -> ActivationStore:
        return ActivationStore(
            self._engine,
            SpillFiles(self._model.store.scratches, "activations"),
            self.pools.spill,
            device=self._settings.device,
            streams=self.streams,
            room=placement,
            budget=budget,
            piece_nbytes=self.plan.spill_nbytes // 4,  # one being filled, and others on their way
            images=self.pools.images,
            verify=self._settings.verify,
            trace=self._trace,
        )
