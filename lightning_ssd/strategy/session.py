"""The parts, put together for one model: store, plan, pools, streamer, sink, pipeline, adopted optimizers.

A session begins when the Trainer sets the strategy up. At teardown it goes to rest: no hooks, threads or pools, but the
files stay, so that a checkpoint can still be saved; they go when the next session begins or the process ends.
"""

from __future__ import annotations

import mmap
import resource
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ssd.activations.spill_files import SpillFiles
from lightning_ssd.activations.store import ActivationStore
from lightning_ssd.errors import ConfigurationError, Ending, IOFailure, ResidencyError, SSDOffloadError
from lightning_ssd.io.deadline import within
from lightning_ssd.io.engine import Engine, IOStats
from lightning_ssd.io.select import make_engine, use_direct
from lightning_ssd.memory.budget import SharedBudget
from lightning_ssd.memory.device_plan import device_capacity, tensors_nbytes
from lightning_ssd.memory.headroom import Headroom
from lightning_ssd.memory.heap import HeapWatch, bound_heap, trim_heap, unbound_heap
from lightning_ssd.memory.mapped_file import handle_bus_errors
from lightning_ssd.memory.pinned import Pinned
from lightning_ssd.memory.plan import MemoryPlan
from lightning_ssd.memory.pool import Pool, map_anonymous, pool_nbytes
from lightning_ssd.memory.views import address_of
from lightning_ssd.optim.adapter import OptimizerAdapter
from lightning_ssd.optim.choice import choose_rule
from lightning_ssd.optim.pipeline import UpdatePipeline, master_dtype
from lightning_ssd.optim.updater import Updater
from lightning_ssd.optim.whole import WholeOptimizer, WholeRule
from lightning_ssd.step.grad_offload import GradOffloader
from lightning_ssd.step.gradients import GradientStore
from lightning_ssd.step.module_hooks import ModuleHooks
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.run_directory import RunDirectory, warn_of_dead_runs
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.strategy.forking import Forking
from lightning_ssd.strategy.handles import handles, require_handles
from lightning_ssd.strategy.settings import Settings
from lightning_ssd.strategy.sizing import Sizing, chains
from lightning_ssd.trace.recorder import Trace
from lightning_ssd.units.inherited import Inherited
from lightning_ssd.units.mapped import MappedParams
from lightning_ssd.units.masters import master_of
from lightning_ssd.units.materialize import ParamMaterializer
from lightning_ssd.units.param_cache import ParamCache
from lightning_ssd.units.partition import partition
from lightning_ssd.units.placeholder import make_placeholders
from lightning_ssd.units.placement import Placement, make_placement
from lightning_ssd.units.unit import Unit


class Session:
    """One model under the strategy.

    Attributes:
        settings: What the user set.
        trace: Order of events.
        engine: Moves bytes between disk and memory.
        store: The files.
        units: The model's units, in order.
        plan: Memory, once `start` was called.
        streamer: Moves units, once `start` was called.
        sink: Takes gradients.
        optimizers: The adopted optimizers, in Lightning's order.
        in_memory_params: Memory for parameters that are kept, None where there are none or it is a part of the arena.
        queue: Updates that are owed, once `start` was called.
        is_started: Whether steps could run, now or before `rest`.
        is_updating: A backward updates units that it is done with, or has done so in the step that runs.
        is_inherited: This is a forked process, and all of it is the parent's.
    """

    def __init__(self, settings: Settings) -> None:
        bound_heap()  # before the model is made
        handle_bus_errors()
        self.settings = settings
        self.trace = Trace()
        self.engine: Engine = make_engine(settings.io)
        try:
            self.store = self._make_store()
        except BaseException:
            self.engine.close()
            raise
        self.units: list[Unit] = []
        self.plan: MemoryPlan | None = None
        self.streamer: ModuleHooks | None = None
        self.sink: GradientStore | None = None
        self.optimizers: list[OptimizerAdapter] = []
        self.is_started = False
        self._is_lazy = False
        self._pools: list[Pool] = []
        self.in_memory_params: Pool | None = None
        self._arena: mmap.mmap | None = None
        self._pinned: Pinned | None = None
        self._pipeline: UpdatePipeline | None = None
        self.queue: Updater | None = None
        self.is_inherited = False
        self.is_updating = False
        self._activations: ActivationStore | None = None
        self._headroom: Headroom | None = None  # until the first step is over
        self._streaming_for: OptimizerAdapter | None = None
        self.materializer = ParamMaterializer(self.store.scratches[0])
        # Runs when nobody holds the session any more, at the latest when the process ends.
        self._remove_files = weakref.finalize(self, _end_files, self.store, remove=not settings.keep_store)
        Forking(self)

    # -- life ----------------------------------------------------------------------------------------------------

    def place(self, module: nn.Module) -> None:
        """Cut ``module`` into units and write their values into the store; initialises what is on the meta device."""
        self.materializer.materialize(module)
        specs = partition(module, policy=self.settings.units, min_numel=self.settings.min_unit_numel)
        self.units = [Unit(spec, self.settings.param_dtype) for spec in specs]
        num_bytes = sum(unit.layout.file_nbytes for unit in self.units)
        self.store.require_free(num_bytes, "placing the parameters", num_files=len(self.units))
        is_direct = any(direct for _, direct in self.store.disks)
        adam = handles(3 * len(self.units), len(self.units), 0, direct=is_direct).num_files
        what = f"{len(self.units)} units of parameters (with the state of an Adam about {adam} open files)"
        require_handles(handles(len(self.units), 0, 0, direct=is_direct), what)
        cache = ParamCache(self.units, store=self.store, trace=self.trace)
        self.streamer = ModuleHooks(cache, device=self.settings.device, trace=self.trace)
        placeholders = make_placeholders(self.units, self.store.scratches[0])
        for unit in self.units:
            self._place_unit(unit)
            unit.placeholders = placeholders[unit.name]
            cache.offload(unit)

    def _place_unit(self, unit: Unit) -> None:
        for param in unit.params:
            if param.is_cuda:
                param.data = param.data.cpu()
        self.store.put(unit.layout, lambda i: unit.params[i].data)

    def adopt(self, optimizer: Optimizer) -> OptimizerAdapter:
        """Take over an optimizer; if the session is running its steps work at once."""
        for adopted in self.optimizers:
            if adopted.optimizer is optimizer:
                return adopted
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
        adopted = kind(optimizer, rule, self.units, self.store, keep_master=self.settings.keep_master, suffix=suffix)
        adopted.adopt()
        self._connect(adopted)
        self.optimizers.append(adopted)
        return adopted

    def adopt_all(self, optimizers: Sequence[Optimizer]) -> None:
        """Take over ``optimizers``; others that were adopted before get their step and their state back."""
        mine = self.optimizers
        self.optimizers = [adopted for adopted in mine if any(adopted.optimizer is each for each in optimizers)]
        for adopted in mine:
            if adopted not in self.optimizers:
                adopted.dismiss(self.optimizers)
        self.optimizers = [self.adopt(optimizer) for optimizer in optimizers]

    def start(self, module: nn.Module, *, waits_for_all_grads: bool = False) -> None:
        """Decide and take the memory, hook the modules.

        Args:
            module: The model.
            waits_for_all_grads: Gradients will wait for all others before the step.

        Raises:
            MemoryPlanError: If the budget cannot work.
            StoreError: If the disk cannot hold the run.
        """
        assert self.streamer is not None
        for unit in self.units:  # what was written to them in configure_optimizers
            self.streamer.cache.write_back(unit)
        self.plan = plan = self.sizing.plan(module, waits_for_all_grads=waits_for_all_grads)
        trim_heap()
        self._headroom = headroom = Headroom(plan, sum(len(unit.params) for unit in self.units))
        if plan.fits:
            unbound_heap()
        self._require_room(plan)
        placement = self._make_placement(module)
        params, updates, in_memory_states, spill = self._make_pools(plan)
        assert self._arena is not None
        headroom.watch(self._arena)
        self._keep(plan, in_memory_states)
        self.sink = GradientStore(
            None if plan.keep_grads or plan.fits else self.store.scratches[0],
            off_device=self._is_off_host,
            offloader=self._make_offloader(),
            heap=None if plan.fits or self._is_off_host else HeapWatch(),
            waits_for_all_grads=waits_for_all_grads,
            verify=self.settings.verify,
        )
        self._pipeline = UpdatePipeline(
            self.store,
            updates,
            chunk_numel=plan.chunk_numel,
            depth=plan.depth,
            keep_master=self.settings.keep_master,
            trace=self.trace,
        )
        budget = SharedBudget(
            gradients_nbytes=plan.queue_nbytes,
            saved_inputs_nbytes=plan.activation_nbytes if plan.recomputes else 0,
            lends=not self._is_off_host,
        )
        self.queue = Updater(
            budget=budget,
            is_async=self.settings.overlap,
            finish=self._pipeline.finish,
            trace=self.trace,
        )
        for adopted in self.optimizers:
            self._connect(adopted)
        window = self.settings.window
        self.streamer.cache.start(
            pool=params,
            placement=placement,
            updates=self.queue,
            keep_cache=plan.keep_cache,
            max_ahead=(None if plan.keep_cache else 1) if window is None else window - 1,
            prefetch_batch=self.settings.prefetch_batch,
        )
        if plan.recomputes:
            self._activations = self._make_activations(plan, spill, budget)
        recompute = self.sizing.blocks() if plan.recomputes else set()
        self.streamer.start(
            module,
            grads=self.sink,
            headroom=headroom,
            recompute=recompute,
            activations=self._activations,
            is_in_memory=plan.fits and not self._is_off_host,
        )
        self.is_started = True

    def _require_room(self, plan: MemoryPlan) -> None:
        """Refuse a run for which the disks, or the limits of this process, are too small."""
        sizing = self.sizing
        num_new = sizing.num_generations - len(self.units)
        what = "the optimizer state and generations being written"
        self.store.require_free(sizing.disk_nbytes, what, num_files=num_new + sizing.num_spare)
        needed = handles(
            sizing.num_generations,
            0 if plan.keep_grads or plan.fits else len(sizing.trained()),
            sizing.num_spare,
            direct=any(direct for _, direct in self.store.disks),
        )
        what = f"a run of {len(self.units)} units, which are {sizing.num_generations} files with their state,"
        require_handles(needed, what)

    def drain(self) -> None:
        """Return when every update that is owed has run.

        Raises:
            SSDOffloadError: One of them failed.
        """
        if self.queue is not None:
            self.queue.drain()

    def _connect(self, adopted: OptimizerAdapter) -> None:
        if self._pipeline is not None and self.queue is not None and self.streamer is not None:
            adopted.connect(self._pipeline, self.streamer.cache, self.queue)
            if self.sink is not None:
                adopted.check_grads = self.sink.check

    def _keep(self, plan: MemoryPlan, states: Pool) -> None:
        """Move what the plan keeps into memory."""
        assert self.streamer is not None
        for unit in self.units:
            layouts = [(unit.layout, self.in_memory_params or states)] if unit.name in plan.in_memory_params else []
            if unit.name in plan.in_memory_states:
                layouts += [(layout, states) for layout in self.sizing.state_layouts(unit)]
            for layout, pool in layouts:
                buffer, dtype = pool.lend(layout.buffer_nbytes, f"unit {unit.name!r}"), dtype_of(layout.dtype)
                places = zip(layout.entries, layout.places, strict=True)
                self.store.hold_in_memory(layout, [buffer.tensor(place, dtype, entry.shape) for entry, place in places])
            if unit.name in plan.in_memory_params:
                self.streamer.cache.keep(unit)

    def _make_activations(self, plan: MemoryPlan, pool: Pool, budget: SharedBudget) -> ActivationStore:
        return ActivationStore(
            self.engine,
            SpillFiles(self.store.scratches, "activations"),
            pool,
            device=self.settings.device,
            budget=budget,
            buffer_nbytes=plan.spill_nbytes // 4,  # one being filled, and others on their way
            verify=self.settings.verify,
            trace=self.trace,
        )

    def abort_step(self) -> None:
        """Drop what a step that failed held. Updates that the step before still owes are made."""
        if self.is_started and self.streamer is not None:
            with suppress(SSDOffloadError):  # reported already, or with the next use
                self.drain()
            self.streamer.abort_step()

    def rest(self) -> None:
        """End hooks, threads and pools; parameters stay as mappings of their files. A second call does nothing."""
        if self.is_inherited:
            return
        self._is_lazy = True
        # In reverse order, each whatever became of the one before.
        with within(self.engine.patience), Ending() as stack:
            stack.callback(trim_heap)  # here, not while training
            pools, self._pools, self.in_memory_params = self._pools, [], None
            for pool in pools:
                stack.callback(pool.close)
            stack.callback(self._let_go_of_arena)
            stack.callback(self.engine.close)  # it knows the arena
            stack.callback(self.store.suspend)
            if self._activations is not None:
                stack.callback(self._activations.close)
            for adopted in self.optimizers:
                stack.callback(adopted.release)
            if self.sink is not None:
                stack.callback(self.sink.close)
            if self.streamer is not None:
                stack.callback(self.streamer.stop)
            if self.queue is not None:
                stack.callback(self.queue.close)
                if not self.queue.is_broken:  # else it was reported
                    stack.callback(self.queue.drain)

    def _let_go_of_arena(self) -> None:
        if self._pinned is not None:
            self._pinned.close()
        if self._headroom is not None:
            self._headroom.end()
        self._arena = None

    def close(self) -> None:
        """Remove the files (or keep them, if asked for). Parameters that map them keep their values."""
        if self.is_inherited:
            return
        with ExitStack() as stack:
            stack.callback(self._remove_files)
            if self._is_lazy:  # what failed then was told then
                stack.enter_context(suppress(SSDOffloadError))
            self.rest()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Inside, the files hold every value, also those that the user changed at rest; works after `rest` too."""
        assert self.streamer is not None
        self.require_own("the model cannot be written to its files")
        resting = not self._pools
        if not resting:
            self.drain()
            self.streamer.end_step()  # what the last step wrote is kept
        mapped = [unit for unit in self.units if unit.mapped is not None]
        with self.store.writable():
            try:
                for unit in mapped:
                    self.streamer.cache.write_back(unit)
                yield
            finally:
                if resting:
                    self.streamer.stop()

    def masters(self) -> dict[nn.Parameter, Tensor]:
        """Float32 masters of 16-bit parameters, mapped; works after `rest` too."""
        found: dict[nn.Parameter, Tensor] = {}
        for unit in self.units:
            generation = self.store.current(unit.name, "master")
            if generation is not None:
                found.update(zip(unit.params, MappedParams(self.store, generation).tensors, strict=True))
        return found

    def take_masters(self, masters: Mapping[nn.Parameter, Tensor]) -> list[str]:
        """Stream float32 masters of 16-bit parameters into the store.

        Returns:
            Names of parameters whose values are others than their masters', and that have new ones therefore; see
            [Note: masters and values].
        """
        assert self.streamer is not None
        changed: list[str] = []
        for unit in self.units:
            dtype = master_dtype(unit, keep_master=self.settings.keep_master)
            if dtype != unit.layout.dtype and any(param in masters for param in unit.params):
                self.streamer.cache.write_back(unit)  # masters would follow what was written to it a second time
                found = partial(self._master, unit, masters, changed)
                self.store.put(unit.layout_of("master", dtype), found)
        return changed

    @staticmethod
    def _master(unit: Unit, masters: Mapping[nn.Parameter, Tensor], changed: list[str], index: int) -> Tensor:
        param = unit.params[index]
        if param not in masters:
            return param
        found = master_of(param, masters[param])
        if found is not masters[param]:
            changed.append(unit.names[index])
        return found

    # -- the step ------------------------------------------------------------------------------------------------

    def stream_updates_for(self, optimizer: Optimizer | None) -> None:
        """In `backward`, from now on, complete units go to the update of ``optimizer`` at once; None: no more."""
        self._streaming_for = next((a for a in self.optimizers if a.optimizer is optimizer), None)
        self.is_updating = False

    def runs_whole(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` is run on all its parameters at once, after all gradients are there."""
        return any(isinstance(a, WholeOptimizer) and a.optimizer is optimizer for a in self.optimizers)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around the backward of a step; not around one that the user runs, after which gradients must be there."""
        assert self.sink is not None
        assert self.streamer is not None
        self.require_own("a step cannot be made")
        self.drain()  # autograd may add to gradients that an update still reads
        self.is_updating = self.is_updating or self._streaming_for is not None
        with self.streamer.backward(self._streaming_for):
            yield

    # -- forked processes ----------------------------------------------------------------------------------------

    @property
    def param_pool(self) -> Pool | None:
        """Memory for parameters that stream."""
        return self._pools[0] if self._pools else None

    def inherit(self, refusals: Mapping[str, str], passed_on: list[tuple[int, int]], *, has_kept: bool) -> None:
        """This is a forked process; [Note: inherited].

        Args:
            refusals: Why parameters cannot be read here, by unit.
            passed_on: What there is of the arena, ``(offset, nbytes)``.
            has_kept: Whether parameters that are kept in memory are here.
        """
        self.is_inherited = True
        self._remove_files.detach()
        self.trace.stop()
        self.store.inherit("param")
        if self.store.is_suspended or self.streamer is None:  # parameters are plain, or not placed yet
            return
        self.queue = None
        for adopted in self.optimizers:
            adopted.inherit()
        if self.sink is not None:
            self.sink.inherit()
        self.streamer.inherit(
            Inherited(self.store, refusals),
            lambda unit: self._is_off_host or (unit.in_memory is not None and not has_kept),
        )
        if self.param_pool is not None:
            self.param_pool.forbid(passed_on)
        if self.in_memory_params is not None and not has_kept:
            self.in_memory_params.forbid([])

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

    def stats(self) -> IOStats:
        """What was read and written so far."""
        return self.engine.stats()

    def _make_pools(self, plan: MemoryPlan) -> tuple[Pool, Pool, Pool, Pool]:
        """Pools for parameters, updates, what is kept and inputs on their way, cut from one arena.

        On the CPU parameters that are kept have memory of their own, which no engine pins: forked processes see it.
        """
        kept_nbytes = sum(pool_nbytes(u.layout.buffer_nbytes) for u in self.units if u.name in plan.in_memory_params)
        if kept_nbytes and not self._is_off_host:
            self.in_memory_params = Pool(kept_nbytes, "kept parameter")
        sizes = {
            "parameter": plan.param_nbytes,
            "update": plan.update_nbytes,
            "kept": plan.kept_nbytes - (kept_nbytes if self.in_memory_params is not None else 0),
            "activation": plan.spill_nbytes,
        }
        if self._is_off_host:
            sizes["gradient"] = plan.grad_nbytes
        self._arena = arena = map_anonymous(sum(map(pool_nbytes, sizes.values())))
        # Where it is refused (a limit on locked memory), transfers cost more CPU time and work the same.
        self.engine.register_memory(address_of(arena), len(arena))
        if self._is_off_host:
            self._pinned = Pinned(address_of(arena), len(arena), self.settings.device)
        begin = 0
        for name, nbytes in sizes.items():
            self._pools.append(Pool(nbytes, name, arena=arena, begin=begin))
            begin += pool_nbytes(nbytes)
        params, updates, kept, spill = self._pools[:4]
        if self.in_memory_params is not None:
            self._pools.append(self.in_memory_params)
        return params, updates, kept, spill

    # -- a device with memory of its own -------------------------------------------------------------------------

    @property
    def _is_off_host(self) -> bool:
        return self.settings.device.type != "cpu"

    def _make_offloader(self) -> GradOffloader | None:
        if not self._is_off_host:
            return None
        gradients = next(pool for pool in self._pools if pool.name == "gradient")
        return GradOffloader(gradients, most_nbytes=max(unit.layout.data_nbytes for unit in self.units))

    def _make_placement(self, module: nn.Module) -> Placement:
        if not self._is_off_host:
            return make_placement(self.settings.device)
        units = {unit.name: tensors_nbytes(entry.nbytes for entry in unit.layout.entries) for unit in self.units}
        budget = self.settings.device_nbytes
        capacity = device_capacity(units, chains(module, self.units), budget)
        return make_placement(self.settings.device, capacity_nbytes=capacity, is_limit=budget is not None)

    def _make_store(self) -> StateStore:
        # Each generation of each kind of each unit is an open file.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        directories: list[RunDirectory] = []
        try:
            for root in self.settings.roots:
                warn_of_dead_runs(root)
                directories.append(RunDirectory(root, keep=self.settings.keep_store))
            direct = [use_direct(self.settings.io, directory.path) for directory in directories]
        except BaseException:
            with Ending() as ending:
                for directory in directories:
                    ending.callback(partial(directory.close, remove=True))
                raise
        return StateStore(
            directories,
            self.engine,
            direct=direct,
            verify=self.settings.verify,
            trace=self.trace,
            new_engine=partial(make_engine, self.settings.io),
        )


def _end_files(store: StateStore, *, remove: bool) -> None:
    """Close the files, and remove them; a disk that hangs does not keep the process from ending."""
    try:
        store.engine.patience.call(lambda: store.close(remove=remove), store.spill_directory, "end of the run's files")
    except IOFailure as error:
        warnings.warn(f"{error}; what is left there can be removed with: lightning-ssd clean", stacklevel=2)
