"""What Lightning calls, and when. `Session` does the work.

The class has no Lightning base; `for_lightning` and `for_pytorch_lightning` add that of their namespace.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Union

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.io.deadline import within
from lightning_ssd.io.engine import IOOptions, IOStats
from lightning_ssd.optim.adapter import use_adopted_methods
from lightning_ssd.optim.whole import WholeOptimizer
from lightning_ssd.saving.uploads import form_for_loggers
from lightning_ssd.session.free_space import prepare_checkpoints
from lightning_ssd.session.handover import Handover
from lightning_ssd.session.runtime import Runtime
from lightning_ssd.session.session import Session
from lightning_ssd.session.settings import Options, Settings, argument_docs
from lightning_ssd.session.summary import summary
from lightning_ssd.step.grad_consumers import find_grad_consumer, find_late_reader, has_code_after_backward
from lightning_ssd.store.mapped_safetensors import SeenFiles
from lightning_ssd.strategy import guards
from lightning_ssd.strategy.checkpoint_hooks import CheckpointMixin
from lightning_ssd.strategy.checkpoint_plugin import ASYNC_IS_NOT_NEEDED
from lightning_ssd.strategy.precision import PrecisionMixin
from lightning_ssd.strategy.resume import Resume
from lightning_ssd.units.moving import move_all_but_params

_ON_ONE_DEVICE = "[pl][profile][Strategy]SingleDeviceStrategy."


class StrategyMixin(CheckpointMixin):
    """Streams parameters, optimizer state, gradients and activations through NVMe SSDs.

    Args:
        accelerator: As in every Lightning strategy; so are the next four.
        parallel_devices: The one device to use.
        cluster_environment: Where ranks come from; one process in this version.
        checkpoint_io: A plugin that writes checkpoints in its own way, to which ``checkpoint="file"`` applies. Where
            checkpoints are links, ``AsyncCheckpointIO`` is accepted and does nothing, and any other is refused.
        precision_plugin: The precision plugin; `Trainer(precision=...)` sets it.
    """

    __doc__: str | None = f"{(__doc__ or '').rstrip()}\n{argument_docs()}\n    "

    strategy_name = "ssd_offload"
    global_rank, local_rank, node_rank, world_size = 0, 0, 0, 1
    _namespace: str  # root of Lightning's logger names; set in `for_lightning` and its twin

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
        state: Literal["auto", "fp32", "split", "bf16", "int8"] = "auto",
        master: Literal["auto", "param", "fp32"] = "auto",
        window: Union[int, Literal["auto"]] = "auto",  # noqa: UP007
        prefetch_batch: Union[int, Literal["auto"]] = "auto",  # noqa: UP007
        verify_reads: Union[bool, Literal["auto"]] = "auto",  # noqa: UP007
        io: IOOptions = IOOptions(),  # noqa: B008  frozen
        keep_store: bool = False,
        checkpoint: Literal["auto", "file", "links"] = "auto",
    ) -> None:
        given = locals()
        self._session: Session | None = None
        self._of_trainer = {}
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self._precision_plugin = self._of_trainer.pop("precision")  # Lightning's constructor has called the setter
        self.num_nodes = 1
        self._given = {field.name: given[field.name] for field in fields(Options)}
        self._resume = Resume()
        self._handover = Handover()
        self._dumped = {}
        self._opened = SeenFiles({})
        self._own_entries = {}
        self._late_reader: str | None = None  # a hook that may read gradients after the step

    # -- one process -------------------------------------------------------------------------------------------

    @property
    def is_distributed(self) -> bool:
        """False: one process, so Lightning replaces no sampler and reduces nothing."""
        return False

    @property
    def root_device(self) -> torch.device:
        """Where compute runs."""
        return guards.require_set(self.parallel_devices, "device")[self.local_rank]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Arguments for a distributed sampler: one replica."""
        return {"num_replicas": 1, "rank": 0}

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the argument: there is one process."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return the argument: there is one process."""
        return decision

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return the argument: there is one process."""
        return tensor

    def barrier(self, name: str | None = None) -> None:
        """Do nothing: there is one process."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the argument: there is one process."""
        return obj

    # -- setup -------------------------------------------------------------------------------------------------

    def stats(self) -> IOStats:
        """Bytes and seconds of disk reads and writes since the Trainer started."""
        return self.session.engine.stats()

    def setup_environment(self) -> None:
        """Check the options and the Trainer's arguments, and make the run directory."""
        options = Options(**self._given)
        guards.require_one_process(self.cluster_environment, len(self.parallel_devices or []), self.num_nodes)
        guards.require_device(self.root_device)
        plugin = self.precision_plugin
        if isinstance(plugin, PrecisionMixin):
            plugin.prepare(self._stock_precision, self.root_device.type)
        if self._checkpoint_plugin.is_async and options.checkpoint == "links":
            self._log(ASYNC_IS_NOT_NEEDED)
        super().setup_environment()
        guards.require_not_streamed(self._pl_module)
        self._resume.begin()
        self._opened = SeenFiles({})
        settings = Settings.resolve(
            options,
            default_root=self._pl_module.trainer.default_root_dir,
            device=self.root_device,
            precision=plugin,
        )
        previous, self._session = self._session, Session(settings)
        self._handover.begin(previous)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """While ``configure_model`` runs, each parameter moves to a mapped file when it is registered."""
        with self._materializing():
            yield

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """For `trainer.init_module()`: tensors are made where compute runs, in the precision's dtype."""
        with self.precision_plugin.tensor_init_context(), self._materializing():
            yield

    def _materializing(self) -> AbstractContextManager[None]:
        return nullcontext() if self._session is None else self._session.materializer.armed()

    def setup(self, trainer: Any) -> None:
        """Write the model to the store, adopt the optimizers, plan the memory, install the hooks."""
        module = self._pl_module
        guards.require_no_script(module)
        settings = self.session.settings
        self.session.settings = replace(settings, checkpoint=form_for_loggers(trainer, settings.checkpoint))
        guards.require_set(self.accelerator, "accelerator").setup(trainer)
        self.model = self.precision_plugin.convert_module(module)
        self._handover.before_placing()
        self.session.place(module)
        self._opened.require_unchanged()
        self.model_to_device()
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
            self._handover.move_into(self.session, ())
            self._late_reader = find_late_reader(trainer, module)
        self.setup_precision_plugin()
        waits_for_all_grads = trainer.accumulate_grad_batches > 1 or not all(
            map(self._may_update_in_backward, self.optimizers)
        )
        with within(self.session.engine.patience):
            is_tried = trainer.state.fn == "fit" and self._checkpoint_plugin.is_ours
            checkpoints = prepare_checkpoints(self.session, trainer) if is_tried else []
        self.session.start(module, waits_for_all_grads=waits_for_all_grads)
        self._log("\n".join([summary(self.session), *checkpoints]))

    def model_to_device(self) -> None:
        """Move all but the parameters, which are copied to the device unit by unit, when they are used."""
        move_all_but_params(self._pl_module, self.root_device)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The user's optimizers."""
        return self._optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        module, session = self.lightning_module, self._session
        if session is not None and session.units and module is not None and module.trainer.state.fn == "fit":
            session.adopt_all([o for o in optimizers if isinstance(o, Optimizer) and o.param_groups])
        super(StrategyMixin, type(self)).optimizers.fset(self, optimizers)  # type: ignore[attr-defined]
        for wrapper in self._lightning_optimizers:
            use_adopted_methods(wrapper)

    # -- steps -------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step; its parameters stream."""
        with self._stepping("training_step"):
            output = super().training_step(*args, **kwargs)
        if self._runtime is not None and self._pl_module.automatic_optimization:
            self._runtime.hooks.await_backward()
        return output

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step; its parameters stream."""
        with self._stepping("validation_step"):
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step; its parameters stream."""
        with self._stepping("test_step"):
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step; its parameters stream."""
        with self._stepping("predict_step"):
            return super().predict_step(*args, **kwargs)

    def streaming_backward(self) -> AbstractContextManager[None]:
        """Around the backward of a step: units are fetched again, gradients are taken. The precision plugin enters it.

        Lightning's ``backward`` is not overridden, so that whoever wraps or counts it finds what it finds elsewhere.
        """
        return nullcontext() if self._runtime is None else self.session.backward()

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Run the step. If no code may read gradients, units are updated during its backward."""
        if self._runtime is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        in_backward = self._may_update_in_backward(optimizer) and not has_code_after_backward(closure)
        with self.session.step_of(optimizer if in_backward else None):
            return super().optimizer_step(optimizer, closure, model, **kwargs)

    @contextmanager
    def _stepping(self, name: str) -> Iterator[None]:
        """Around a step of the user's. In traces of torch it has the name that it has without us, inside of ours."""
        if self._runtime is None:  # called by the user outside of a run, when all values are in the parameters
            yield
            return
        hooks, is_training = self._runtime.hooks, name == "training_step"
        with hooks.step("train" if is_training else "eval"), record_function(_ON_ONE_DEVICE + name):
            yield
        if not is_training:
            hooks.end_step()

    @property
    def _runtime(self) -> Runtime | None:
        return None if self._session is None else self._session.runtime

    def _may_update_in_backward(self, optimizer: Optimizer) -> bool:
        module, adopted = self._pl_module, self.session.adopted(optimizer)
        return (
            self.session.sizing.is_overlapped
            and module.automatic_optimization
            and len(self.optimizers) == 1
            and (adopted is None or (not isinstance(adopted, WholeOptimizer) and adopted.makes_steps))
            and self.precision_plugin.scaler is None
            and not self.precision_plugin.is_custom  # it may read gradients
            and self._late_reader is None
            and find_grad_consumer(module.trainer, module) is None
        )

    # -- resume ------------------------------------------------------------------------------------------------

    def process_dataloader(self, dataloader: Any) -> Any:
        """Make a training DataLoader resumable: after a restart, training continues with the next batch."""
        return self._resume.watch(dataloader) if self._pl_module.trainer.training else dataloader

    def on_train_start(self) -> None:
        """After a restart, set the random generators to the checkpoint's states."""
        self._resume.start(self._pl_module.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """After a restart, set the random generators if no DataLoader of ours has done so."""
        self._resume.begin_batch()

    # -- end ---------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Wait for pending updates."""
        self.session.drain()

    def on_exception(self, exception: BaseException) -> None:
        """Release what the failed step held."""
        super().on_exception(exception)
        if self._runtime is not None:
            try:
                self._runtime.abort_step()
            except SSDOffloadError as error:  # raised from here it would hide the exception, which is the cause
                warnings.warn(f"after the error of this run, ending its step failed as well: {error}", stacklevel=2)

    def teardown(self) -> None:
        """Remove hooks, end threads, release memory. Parameters are ordinary tensors again, mapped from their files."""
        self._resume.end()
        if self._session is not None:
            self._end_session(self._session)
        if self.lightning_module is not None:
            guards.keep_bus_errors_handled(self.lightning_module._trainer)
            move_all_but_params(self.lightning_module, torch.device("cpu"))
        self.precision_plugin.teardown()
        guards.require_set(self.accelerator, "accelerator").teardown()
        self.checkpoint_io.teardown()
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()

    def __getstate__(self) -> dict[str, Any]:
        """A copy streams nothing: it holds no store, and begins as a new strategy does."""
        return {
            **super().__getstate__(),
            "_session": None,
            "_resume": Resume(),
            "_handover": Handover(),
            "_dumped": {},
            "_opened": SeenFiles({}),
            "_own_entries": {},
        }

    def _log(self, text: str) -> None:
        logging.getLogger(f"{self._namespace}.ssd_offload").info(text)

    @staticmethod
    def _end_session(session: Session) -> None:
        """End ``session``. An error here becomes a warning if another exception is being raised."""
        is_failing = sys.exc_info()[1] is not None
        try:
            if session.is_started:
                session.stop()
            else:
                session.close()  # setup failed: nothing can be saved from it
        except Exception as error:
            if not is_failing:
                raise
            warnings.warn(f"after the error of this run, its end failed as well: {error}", stacklevel=2)
