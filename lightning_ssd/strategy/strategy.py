"""What Lightning sees: one strategy. Behaviour without a namespace; the faces add Lightning's base classes.

Everything it does is handed to a `Session`; this file only says when.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Union

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ssd.checkpoint.mapped import SeenFiles
from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.io.deadline import within
from lightning_ssd.io.engine import IOOptions, IOStats
from lightning_ssd.kernels import api as kernels
from lightning_ssd.strategy import guards
from lightning_ssd.strategy.checkpoint_hooks import CheckpointMixin
from lightning_ssd.strategy.free_space import prepare_checkpoints
from lightning_ssd.strategy.grad_consumers import find_grad_consumer
from lightning_ssd.strategy.precision import PrecisionMixin
from lightning_ssd.strategy.resume import Resume
from lightning_ssd.strategy.session import Session
from lightning_ssd.strategy.settings import Settings
from lightning_ssd.strategy.succession import Handover
from lightning_ssd.strategy.summary import summary


class StrategyMixin(CheckpointMixin):
    """Streams parameters, optimizer state, gradients and activations through NVMe SSDs.

    Args:
        accelerator: As in every Lightning strategy; so are the next four.
        parallel_devices: The one device to use.
        cluster_environment: Where ranks come from; one process in this version.
        checkpoint_io: Not supported, since checkpoints are hard links to the store: leave it unset. Only
            ``AsyncCheckpointIO`` is accepted, and has nothing to do.
        precision_plugin: A precision plugin; `Trainer(precision=...)` sets it.
        nvme_path: Directory, or one per disk, for the live store, text or `pathlib.Path`; ``~`` and ``$VAR`` are
            expanded. Default: ``$LIGHTNING_SSD_PATH``, else ``.ssd_offload`` under the Trainer's ``default_root_dir``.
        host_memory: Bytes (int, or text such as ``"16GiB"``) of host memory that may be used; ``"auto"`` takes half of
            what the machine and the control group leave; ``"min"`` takes the smallest plan that streams, with
            nothing kept in memory.
        device_memory: Bytes of a GPU's memory for parameters, those in use and those that wait there to be used again;
            ``"auto"`` is what lets one unit arrive while others compute. Activations and gradients come on top.
        units: ``"auto"``, or class names of the modules that are streamed as one unit each.
        min_unit_numel: Modules outside repeated blocks with at least this many parameters are units of their own;
            smaller ones share a unit that stays in memory during a step.
        activations: ``"recompute"`` runs each block's forward again in backward, ``"keep"`` keeps what it saved;
            ``"auto"`` recomputes if not everything fits in ``host_memory``, except blocks that work in place.
        overlap: ``"auto"`` updates units beside compute: during backward where that is exact, else under the next
            forward; ``"off"`` updates them after backward, one after the other.
        update: ``"native"`` uses the fused kernels (Adam, AdamW, SGD), ``"torch"`` the optimizer's own class on one
            parameter at a time (bit-equal to plain torch); ``"auto"`` is native where there is a kernel.
        state: Form of the optimizer state on disk; ``"fp32"``.
        window: Units in memory at once, the one in use among them (Superpipeline's *k*); ``"auto"`` takes as many as
            the plan has room for.
        prefetch_batch: Units whose reads are started together; ``"auto"`` is one.
        verify_reads: Check every byte read against a checksum; ``"auto"`` does where the kernel is native.
        io: Disk transport.
        keep_store: Leave the live store on disk when the run ends.
    """

    strategy_name = "ssd_offload"
    # Set by the faces: Lightning's stock precision classes, by name, and the root of its logger names.
    _stock_precision: Mapping[str, Any]
    _precision_class: type[PrecisionMixin]
    _namespace: str

    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: Any = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        *,
        nvme_path: Union[list[Union[str, Path]], str, Path, None] = None,  # noqa: UP007  jsonargparse tries in this order
        host_memory: Union[int, str] = "auto",  # noqa: UP007
        device_memory: Union[int, str] = "auto",  # noqa: UP007
        units: Union[list[str], str] = "auto",  # noqa: UP007
        min_unit_numel: int = 1_000_000,
        activations: Literal["auto", "recompute", "keep"] = "auto",
        overlap: Literal["auto", "off"] = "auto",
        update: Literal["auto", "native", "torch"] = "auto",
        state: Literal["fp32"] = "fp32",
        window: Union[int, Literal["auto"]] = "auto",  # noqa: UP007
        prefetch_batch: Union[int, Literal["auto"]] = "auto",  # noqa: UP007
        verify_reads: Union[bool, Literal["auto"]] = "auto",  # noqa: UP007
        io: IOOptions = IOOptions(),  # noqa: B008  frozen
        keep_store: bool = False,
    ) -> None:
        self._session: Session | None = None
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.num_nodes = 1
        self._settings: dict[str, Any] = {
            "nvme_path": nvme_path,
            "host_memory": host_memory,
            "device_memory": device_memory,
            "units": units,
            "min_unit_numel": min_unit_numel,
            "activations": activations,
            "overlap": overlap,
            "update": update,
            "state": state,
            "window": window,
            "prefetch_batch": prefetch_batch,
            "verify_reads": verify_reads,
            "io": io,
            "keep_store": keep_store,
        }
        self._resume = Resume()
        self._handover = Handover()
        self._dumped = {}
        self._opened = SeenFiles({})

    # -- one process -------------------------------------------------------------------------------------------

    @property
    def is_distributed(self) -> bool:
        """One process: no sampler is replaced, no reduction is made."""
        return False

    @property
    def root_device(self) -> torch.device:
        """Where compute runs."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """What a distributed sampler would be made with."""
        return {"num_replicas": 1, "rank": 0}

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The identity."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """The identity."""
        return decision

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """The identity."""
        return tensor

    def barrier(self, name: str | None = None) -> None:
        """Nobody to wait for."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The identity."""
        return obj

    # -- setup -------------------------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Any:
        """The precision plugin; a stock one is put inside ours."""
        return self._precision_plugin if self._precision_plugin is not None else self._stock_precision["Precision"]()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        if plugin is not None and not isinstance(plugin, PrecisionMixin):
            plugin = self._precision_class(inner=plugin)
        if plugin is not None:
            plugin.prepare(self._stock_precision)
        self._precision_plugin = plugin

    def stats(self) -> IOStats:
        """What was read from and written to disk since the Trainer started, bytes and seconds."""
        return self.session.stats()

    def setup_environment(self) -> None:
        """Check the settings, and make the run directory."""
        assert self.accelerator is not None
        guards.require_choices(self._settings)
        guards.require_one_process(self.world_size, len(self.parallel_devices or []), self.num_nodes)
        guards.require_device(self.root_device)
        plugin = self.precision_plugin
        if isinstance(plugin, PrecisionMixin):
            plugin.prepare(self._stock_precision, self.root_device.type)
        if guards.is_async_checkpoint_plugin(self._checkpoint_io):
            logging.getLogger(f"{self._namespace}.ssd_offload").info(guards.ASYNC_IS_NOT_NEEDED)
        super().setup_environment()
        assert self.lightning_module is not None
        guards.require_not_streamed(self.lightning_module)
        self._resume.begin()
        self._opened = SeenFiles({})
        previous, self._session = self._session, Session(self._checked_settings())
        self._handover.begin(previous)

    def _checked_settings(self) -> Settings:
        chosen = self._settings
        assert self.lightning_module is not None
        roots = guards.store_roots(chosen["nvme_path"], self.lightning_module.trainer.default_root_dir)
        for root in roots:
            in_memory = guards.memory_file_system(root)
            if in_memory:
                warnings.warn(
                    f"nvme_path={root!r} is on {in_memory}, which lives in memory: nothing is saved by streaming "
                    "there, and host_memory does not count it; choose a directory on a disk",
                    stacklevel=2,
                )
        plugin = self.precision_plugin
        return Settings(
            roots=roots,
            budget_nbytes=guards.host_budget(chosen["host_memory"]),
            device=self.root_device,
            device_nbytes=guards.device_budget(chosen["device_memory"], self.root_device),
            units=chosen["units"],
            min_unit_numel=chosen["min_unit_numel"],
            activations=chosen["activations"],
            overlap=chosen["overlap"] == "auto",
            update=chosen["update"],
            window=None if chosen["window"] == "auto" else chosen["window"],
            prefetch_batch=1 if chosen["prefetch_batch"] == "auto" else chosen["prefetch_batch"],
            verify=kernels.is_native() if chosen["verify_reads"] == "auto" else chosen["verify_reads"],
            io=chosen["io"],
            param_dtype=plugin.param_dtype,
            keep_master=plugin.keeps_master,
            is_autocast=plugin.precision.endswith("-mixed"),
            keep_store=chosen["keep_store"],
        )

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """While ``configure_model`` runs, parameters are mapped files as they are registered."""
        with ExitStack() as stack:
            if self._session is not None:
                stack.enter_context(self._session.materializer.armed())
            yield

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """For `trainer.init_module()`: tensors are made on the host, in the precision's dtype."""
        with ExitStack() as stack:
            stack.enter_context(self.precision_plugin.tensor_init_context())
            if self._session is not None:
                stack.enter_context(self._session.materializer.armed())
            yield

    def setup(self, trainer: Any) -> None:
        """Place the model in the store, adopt the optimizers, plan the memory, hook the modules."""
        assert self.accelerator is not None
        assert self.lightning_module is not None
        guards.require_no_compile(self.lightning_module)
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.lightning_module)
        self._handover.before_placing()
        self.session.place(self.lightning_module)
        self._opened.require_unchanged()
        self.model_to_device()
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
            self._handover.move_into(self.session, ())
        self.setup_precision_plugin()
        waits_for_all_grads = trainer.accumulate_grad_batches > 1 or not all(
            map(self._may_stream_updates, self.optimizers)
        )
        with within(self.session.engine.patience):
            checkpoints = prepare_checkpoints(self.session, trainer) if trainer.state.fn == "fit" else []
        self.session.start(self.lightning_module, waits_for_all_grads=waits_for_all_grads)
        logging.getLogger(f"{self._namespace}.ssd_offload").info("\n".join([summary(self.session), *checkpoints]))

    def model_to_device(self) -> None:
        """Move buffers; parameters go to the device unit by unit."""
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.root_device)
            if hasattr(module, "_device"):
                module._device = self.root_device  # type: ignore[assignment]

    @property
    def optimizers(self) -> list[Optimizer]:
        """The user's optimizers, adopted."""
        return self._optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        module, session = self.lightning_module, self._session
        if session is not None and session.units and module is not None and module.trainer.state.fn == "fit":
            session.adopt_all([o for o in optimizers if isinstance(o, Optimizer) and o.param_groups])
        _optimizers_setter(self)(optimizers)

    # -- steps -------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step; parameters come and go."""
        with self._stepping("train"):
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step; parameters come and go."""
        with self._stepping("eval", ends=True):
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step; parameters come and go."""
        with self._stepping("eval", ends=True):
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step; parameters come and go."""
        with self._stepping("eval", ends=True):
            return super().predict_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run backward; units come again, gradients go."""
        with self.session.backward():
            return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Run the step; where nobody may look at gradients, units are updated during its backward."""
        session = self.session
        if self._may_stream_updates(optimizer):
            session.stream_updates_for(optimizer)
        try:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            session.stream_updates_for(None)
            session.running.hooks.end_step()

    @contextmanager
    def _stepping(self, kind: str, *, ends: bool = False) -> Iterator[None]:
        hooks = self.session.running.hooks
        with hooks.step(kind):
            yield
        if ends:
            hooks.end_step()

    def _may_stream_updates(self, optimizer: Optimizer) -> bool:
        module = self.lightning_module
        assert module is not None
        return (
            self.session.settings.overlap
            and module.automatic_optimization
            and len(self.optimizers) == 1
            and not self.session.runs_whole(optimizer)
            and self.precision_plugin.scaler is None
            and find_grad_consumer(module.trainer, module) is None
        )

    # -- resume ------------------------------------------------------------------------------------------------

    def process_dataloader(self, dataloader: Any) -> Any:
        """Make a DataLoader resumable, so that training goes on with the next batch after a restart."""
        assert self.lightning_module is not None
        return self._resume.watch(dataloader) if self.lightning_module.trainer.training else dataloader

    def on_train_start(self) -> None:
        """After a restart, go on from the generator states of the checkpoint."""
        assert self.lightning_module is not None
        self._resume.start(self.lightning_module.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """After a restart, the last moment to set the generators."""
        self._resume.begin_batch()

    # -- end ---------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Make the updates that are still owed."""
        self.session.drain()

    def on_exception(self, exception: BaseException) -> None:
        """Drop what the failed step held."""
        if self._session is not None:
            try:
                self._session.abort_step()
            except SSDOffloadError as error:  # the exception is the cause, and stays the one that is shown
                warnings.warn(f"after the error of this run, giving up its step failed as well: {error}", stacklevel=2)

    def teardown(self) -> None:
        """Hooks, threads and memory go; parameters are plain again, on mappings of their files."""
        self._resume.end()
        if self._session is not None:
            self._end_session(self._session)
        if self.lightning_module is not None:
            guards.keep_bus_errors_handled(self.lightning_module._trainer)
            for module in self.lightning_module.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.cpu()
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()

    @staticmethod
    def _end_session(session: Session) -> None:
        """End it; an error here does not take the place of one that is on its way to the user."""
        is_failing = sys.exc_info()[1] is not None
        try:
            if session.is_started:
                session.rest()
            else:
                session.close()  # setup failed: there is nothing that a checkpoint could want
        except Exception as error:
            if not is_failing:
                raise
            warnings.warn(f"after the error of this run, its end failed as well: {error}", stacklevel=2)


def _optimizers_setter(strategy: Any) -> Callable[[list[Optimizer]], None]:
    base = next(cls for cls in type(strategy).__mro__ if cls.__name__ == "Strategy" and "optimizers" in vars(cls))
    setter = vars(base)["optimizers"].fset
    return lambda optimizers: setter(strategy, optimizers)
