"""Hooks on modules: they fetch units before their modules run, and release them afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssd.activations.store import ActivationStore
from lightning_ssd.errors import Ending, ResidencyError
from lightning_ssd.memory.headroom import Headroom
from lightning_ssd.optim.adapter import OptimizerAdapter
from lightning_ssd.step.backward import BackwardPass
from lightning_ssd.step.direct_use import DirectUse
from lightning_ssd.step.fast_path import Removable, hook, hook_encoders
from lightning_ssd.step.gradients import GradientStore
from lightning_ssd.step.module_call import ModuleCall
from lightning_ssd.step.own_writes import may_write
from lightning_ssd.step.recompute import Frame
from lightning_ssd.step.step_on_device import StepOnDevice
from lightning_ssd.step.trial import Verdicts
from lightning_ssd.step.users_hooks import is_around_users
from lightning_ssd.trace.recorder import Lane, Trace
from lightning_ssd.units import transforms
from lightning_ssd.units.lazy_param import require_loaded
from lightning_ssd.units.model_units import ModelUnits
from lightning_ssd.units.param_cache import ParamCache
from lightning_ssd.units.transforms import require_no_transform
from lightning_ssd.units.unit import Unit


class ModuleHooks:
    """Streams the units of one model: what happens before and after each module, in a step, and around backward.

    Args:
        module: The model.
        model: Its units.
        cache: Fetches and releases them.
        grads: Takes the gradients.
        headroom: Looks whether memory is left, until the first backward is over.
        device: Where compute runs.
        recompute: Blocks whose forward is run again in backward.
        activations: Keeps the inputs of recomputed blocks, and is closed by its owner; None leaves them in memory.
        is_in_memory: Saved tensors that view parameters take no memory: all are held where compute reads them.
        trace: Gets the events of forward and backward.

    Attributes:
        cache: Fetches and releases units.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        model: ModelUnits,
        cache: ParamCache,
        grads: GradientStore,
        headroom: Headroom,
        device: torch.device,
        recompute: set[nn.Module],
        activations: ActivationStore | None,
        is_in_memory: bool,
        trace: Trace,
    ) -> None:
        self.cache = cache
        self.model = model
        self._direct_use = DirectUse(cache)
        self._grads = grads
        self._headroom = headroom
        self._device = device
        self._recompute = recompute
        self._verdicts = Verdicts()
        self._activations = activations
        self._is_in_memory = is_in_memory
        self._trace = trace
        self._on_device = StepOnDevice(cache, is_off_host=grads.is_off_device)
        self._backward = BackwardPass(model, cache, grads, self._on_device, trace)
        self._num_steps = 0  # step contexts that are open now
        self._calls: list[ModuleCall] = []  # forwards that run now, one inside the other
        self._inside: dict[nn.Module, list[Unit]] = {}  # of each block, the units that modules inside of it fetch
        self._handles = self._hook(module)
        model.streaming = self

    def _hook(self, module: nn.Module) -> list[Removable]:
        users: dict[nn.Module, list[Unit]] = {}
        writing: dict[type[nn.Module], bool] = {}
        for unit in self.cache.units:
            unit.writes_itself = any(may_write(user, writing) for user in unit.modules)
            for user in unit.modules:
                users.setdefault(user, []).append(unit)
        for block in self._recompute:
            inside = [unit for inner in block.modules() if inner is not block for unit in users.get(inner, ())]
            self._inside[block] = list(dict.fromkeys(inside))
        handles = hook_encoders(module)
        for user, units in users.items():
            handles += hook(user, HooksOfModule(self, units))
        return handles

    def close(self) -> None:
        """Remove the hooks; no unit is held any more."""
        with Ending() as ending:  # the last one first
            ending.callback(self._unhook)
            ending.callback(self._grads.unwatch)
            ending.callback(self.abort_step)
            ending.callback(partial(self._verdicts.written_buffers.check, is_end=True))
            ending.callback(self.end_step)  # what the last step wrote is kept

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.model.streaming = None

    def inherit(self) -> None:
        """This is a forked process: modules run with what parameters were at the fork, and nothing else is done."""
        self._grads.unwatch()
        self.model.streaming = None

    # -- steps ---------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """Inside, an operation on a lazy parameter fetches its unit, and saved tensors hold no unit's memory.

        Args:
            kind: What the order of use is remembered under, such as ``"train"``; empty to go on with the one before.
        """
        if kind and not self.model.step.is_running:
            self._backward.abort()  # one that failed outside our sight
            self._grads.begin_step()
            self.cache.begin_step(kind)
        self._on_device.begin()
        self._num_steps += 1
        if not self._is_in_memory:
            self._backward.step_hooks.begin()
        try:
            with self.model.step.running(), self._computing(f"{kind} step" if kind else "backward", ""):
                yield
        except BaseException as error:
            self.abort_step()
            require_no_transform(error)
            raise
        finally:
            self._num_steps -= 1
            if self._num_steps == 0:
                self._backward.step_hooks.end()

    @contextmanager
    def backward(self, optimizer: OptimizerAdapter | None) -> Iterator[None]:
        """Around a backward of the Trainer's; see `BackwardPass.updating`."""
        self.cache.begin_backward()
        if self._headroom.is_watching:
            self._headroom.begin_backward(self._grads.repeated_nbytes)
        with self.step(""), self._backward.updating(optimizer):
            yield
            self._on_device.begin_backward()  # a step that runs the backward itself goes on
        self._headroom.end()

    def end_step(self) -> None:
        """The step is over: units that stayed for it are offloaded."""
        self._on_device.end()
        self.cache.end_step()

    def await_backward(self) -> None:
        """The training step has returned; see [Note: a step on a device]."""
        self._on_device.await_backward()

    def abort_step(self) -> None:
        """Give up a step that failed: every hold is dropped."""
        while self._calls:
            self._calls.pop().close()
        self._backward.abort()
        self._on_device.end()
        if self._activations is not None:
            self._activations.abort()
        self.cache.drop_holds()

    def _computing(self, name: str, what: str) -> AbstractContextManager[object]:
        """A span of compute; none where this thread only starts it."""
        return self._trace.span(Lane.COMPUTE, name, what) if self._device.type == "cpu" else nullcontext()

    # -- parameters that code outside of modules uses: see `Streaming` --------------------------------------------

    def touch(self, units: Sequence[Unit], operands: Sequence[Tensor]) -> None:
        """See `Streaming.touch`."""
        self._backward.note_use(units)
        with transforms.suspended():
            self._direct_use.touch(units, operands)
        for unit in units:
            self._backward.touched(unit)
            self._grads.watch(unit, self._backward)
            if torch.is_grad_enabled() and self._backward.rerunning is None:
                self._grads.used(unit)
                if self._num_steps > 0:
                    self._backward.step_hooks.begin()
            elif self._backward.rerunning is None:
                self._grads.used_without_grad(unit)

    @contextmanager
    def hold(self, units: Sequence[Unit]) -> Iterator[None]:
        """See `Streaming.hold`."""
        with self._backward.step_hooks.suspended(), self._direct_use.hold(units):
            yield

    def before_map(self, unit: Unit) -> None:
        """See `Streaming.before_map`."""
        unit.wait_for_update()
        unit.end_copies()

    def after_map(self, unit: Unit) -> None:
        """See `Streaming.after_map`."""
        self._backward.touched(unit)

    # -- forward, the first and the second -----------------------------------------------------------------------

    def before_forward(self, module: nn.Module, units: list[Unit], args: Any, kwargs: Any) -> None:
        """A module that needs ``units`` is about to run."""
        if self.model.inherited is not None:
            self.model.load_inherited(units)
            return
        if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
            _require_exportable(module, units)
            return
        if transforms.are_active():
            self._before_transformed(module, units)
            return
        is_rerun = self._backward.rerunning is not None
        if self._activations is not None and not is_rerun:
            self._activations.enforce_budget()  # by now the caller has dropped the inputs of the block before
        self._backward.note_use(units)
        with transforms.suspended():
            call = self._fetch(module, units)
        if torch.is_grad_enabled() and not is_rerun:
            for unit in units:
                self._grads.used(unit, module)
            self._watch_saved_tensors(call, args, kwargs)
        elif not is_rerun and not torch.is_grad_enabled():
            for unit in units:
                self._grads.used_without_grad(unit)
        self._calls.append(call)
        call.enter(self.model.step.running())
        call.enter(self._computing("recompute" if is_rerun else "forward", units[0].name))
        self.cache.begin_module()

    def _watch_saved_tensors(self, call: ModuleCall, args: Any, kwargs: Any) -> None:
        """Set the hooks for what autograd saves in a first forward with grad that is about to run."""
        around = next((outer for outer in reversed(self._calls) if outer.frame is not None), None)
        if around is not None and around.frame is not None:
            around.inner += call.units
            # Under a checkpoint of the user's own inside the frame: backward runs that again outside of it, where
            # our hooks are set, and the checkpoint counts what reaches it.
            if not transforms.is_on_top(around.frame.pack):
                call.enter(self._backward.hooks())
            return
        hooks = self._backward.hooks()
        if not is_around_users(hooks):  # else the user's hooks get what is saved, and nothing is recomputed
            frame = call.frame = self._frame(call.module, call.units, args, kwargs)
            if frame is not None:
                hooks = torch.autograd.graph.saved_tensors_hooks(frame.pack, frame.unpack)
        call.enter(hooks)

    def _frame(self, module: nn.Module, units: list[Unit], args: Any, kwargs: Any) -> Frame | None:
        """The frame of a module that is about to run and will be recomputed; None for any other."""
        if module not in self._recompute or self._verdicts.keeps(module) or transforms.are_duals_made():
            return None
        inside = self._inside[module]
        if any(unit.writes_itself for unit in (*units, *inside)):  # it may not do so in its first forward
            self._verdicts.keep(module, units[0].name, "it writes to parameters by .data, or may")
            return None
        frame = Frame(
            units[0].name,
            module,
            args,
            kwargs,
            device=self._device,
            units=units,
            inside=inside,
            backward=self._backward,
            verdicts=self._verdicts,
        )
        if frame.opaque is None:
            self._backward.begin_forward(frame)
            return frame
        self._verdicts.keep(module, frame.name, f"what it has or is given holds {frame.opaque}")
        return None

    def _fetch(self, module: nn.Module, units: list[Unit]) -> ModuleCall:
        call = ModuleCall(module, units)
        try:
            for unit in units:
                is_new = self.cache.fetch(unit)
                call.num_fetched += 1
                if is_new:
                    self._grads.watch(unit, self._backward)
                    self._headroom.look()
        except BaseException:
            for unit in units[: call.num_fetched]:
                self.cache.release(unit)
            raise
        return call

    def _before_transformed(self, module: nn.Module, units: list[Unit]) -> None:
        """Under torch.func: neither recompute nor saved-tensor hooks, so what is saved holds the memory of its unit."""
        require_loaded(module)
        with transforms.suspended():
            self._calls.append(self._fetch(module, units))
            self._calls[-1].enter(self.model.step.running())
            for unit in units:
                unit.is_touched = True  # it stays while a graph holds its parameters
            self.cache.begin_module()

    def after_forward(self, module: nn.Module) -> None:
        """The module has run, or failed."""
        if not self._calls or self._calls[-1].module is not module:
            return  # its forward was given up before our hook ran, or with the whole step
        frame, call = self._backward.rerunning, self._calls.pop()
        try:
            with transforms.suspended():
                self._end_call(call, frame, failed=call.failed and not (frame is not None and frame.is_stopped))
        except BaseException as error:
            if frame is not None:
                frame.error = error
            raise

    def _end_call(self, call: ModuleCall, frame: Frame | None, *, failed: bool) -> None:
        call.close()
        self.cache.end_module()
        if frame is not None and frame.module is call.module and not failed and not frame.is_trying:
            self._backward.hold(frame, call.units)  # backward reads the parameters next
            return
        if call.frame is not None and not failed:
            self._end_forward(call.frame)
        for unit in call.units:
            self.cache.release(unit)
        if call.frame is not None and not failed:
            self._backward.end_forward(call.frame, list(dict.fromkeys([*call.units, *call.inner])))

    def _end_forward(self, frame: Frame) -> None:
        frame.end_forward()
        if frame.is_kept:
            return
        self._backward.watch(frame)
        if self._activations is not None:
            frame.save_inputs(self._activations)


def _require_exportable(module: nn.Module, units: list[Unit]) -> None:
    """Refuse to trace a module where what comes of it would hold other values.

    TorchScript takes the parameters themselves into its module, and they go back to disk; torch.export looks at them.
    """
    is_script = torch._C._get_tracing_state() is not None
    if is_script or any(unit.mapped is None and unit.device_copy is None for unit in units):
        way_out = "trace copy.deepcopy(module)" if is_script else "export inside `with lightning_ssd.gathered(module):`"
        raise ResidencyError(
            f"a {type(module).__name__} is being {'traced by TorchScript' if is_script else 'exported'} while its "
            f"parameters, such as {units[0].names[0]!r}, may be on disk, and what comes of it would not hold their "
            f"values: {way_out}, or do it after the Trainer has returned"
        )


def is_streamed(root: nn.Module) -> bool:
    """Whether a module of ``root`` has hooks of ours now."""
    return bool(models_of(root))


def models_of(root: nn.Module) -> list[ModelUnits]:
    """The units of which a module of ``root`` has hooks now."""
    hooks = [hook for module in root.modules() for hook in module._forward_pre_hooks.values()]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    found = [owner.hooks for owner in owners if isinstance(owner, HooksOfModule) and owner.hooks is not None]
    return list({hooks: hooks.model for hooks in found}.values())


class HooksOfModule:
    """Forward hooks of one module. On a copy of the module, whose parameters are plain, they do nothing."""

    def __init__(self, hooks: ModuleHooks | None, units: list[Unit]) -> None:
        self.hooks = hooks
        self._units = units

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled caller stops here, and goes on after
    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """As a forward pre-hook with keyword arguments."""
        if self.hooks is not None:
            self.hooks.before_forward(module, self._units, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled caller stops here, and goes on after
    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """As a forward hook with keyword arguments; also called when the forward raises."""
        if self.hooks is not None:
            self.hooks.after_forward(module)

    def __reduce__(self) -> Any:
        return HooksOfModule, (None, [])  # `copy` and `pickle` both ask here
