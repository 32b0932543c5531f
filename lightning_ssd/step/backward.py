"""What happens inside backward: units come again for saved tensors and recompute, and go when they are done.

[Note: backward] A unit is fetched again when autograd unpacks a tensor that was saved under it. It goes when the
gradients of its inputs are there, when backward goes on to another unit, or when backward ends. This only decides how
long memory is held; nothing depends on it: a recomputed tensor that was dropped is computed again, and a buffer is not
lent again while any tensor on it lives.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_ssd.optim.adapter import OptimizerAdapter
from lightning_ssd.step.gradients import GradientStore
from lightning_ssd.step.recompute import Frame
from lightning_ssd.step.saved_views import ParameterView, form_of, unchanged
from lightning_ssd.step.step_on_device import StepOnDevice
from lightning_ssd.step.users_hooks import around_users
from lightning_ssd.store.generation import Generation
from lightning_ssd.trace.recorder import Trace
from lightning_ssd.units import transforms
from lightning_ssd.units.fingerprint import Fingerprint, fingerprint
from lightning_ssd.units.model_units import ModelUnits
from lightning_ssd.units.param_cache import ParamCache
from lightning_ssd.units.transforms import StepHooks
from lightning_ssd.units.unit import Unit


class BackwardPass:
    """What is done for a backward: units are held, gradients are taken, complete units are updated.

    Args:
        model: The units.
        cache: Fetches and releases them.
        grads: Takes the gradients.
        on_device: Is told when backward begins and ends.
        trace: Gets the event ``recompute``.

    Attributes:
        rerunning: The frame whose forward runs again now, or None.
        step_hooks: For tensors that are saved outside the forward of a module that needs a unit.
    """

    def __init__(
        self, model: ModelUnits, cache: ParamCache, grads: GradientStore, on_device: StepOnDevice, trace: Trace
    ) -> None:
        self.rerunning: Frame | None = None
        self.step_hooks = StepHooks(self.hooks)
        self._model = model
        self._store = model.store
        self._cache = cache
        self._grads = grads
        self._on_device = on_device
        self._is_of_trainer = False  # the backward that runs
        self._trace = trace
        self._held: dict[int, _Hold] = {}  # by id of the frame, which is alive in the value
        self._unpacked: dict[str, Unit] = {}  # held because a view of a parameter was unpacked
        self._is_running = False
        self._used: weakref.WeakKeyDictionary[Frame, list[_Used]] = weakref.WeakKeyDictionary()
        self._frames: weakref.WeakSet[Frame] = weakref.WeakSet()

    def note(self) -> None:
        """Something of ours happens inside backward: be told when it ends."""
        if not self._is_running:
            self._is_running = True
            self._on_device.begin_backward()
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def note_use(self, units: Sequence[Unit]) -> None:
        """Code of the user's is about to use ``units``; in backward, say so if they are updated already."""
        for unit in units if self._is_running and self.rerunning is None else ():
            if unit.is_submitted:
                warnings.warn(
                    f"code that runs inside backward (a hook of a tensor or module) uses parameters of {unit.label}, "
                    "which backward has updated already: in plain Lightning it would see their old values, here it "
                    "sees the new ones; set overlap='off' in the strategy",
                    stacklevel=2,
                )

    def abort(self) -> None:
        """A step is over, or has failed: hold nothing, expect no backward."""
        self._end_holds()
        for frame in list(self._frames):
            frame.give_up()
        self._grads.show()
        self._is_running = False
        self.rerunning = None

    @contextmanager
    def updating(self, optimizer: OptimizerAdapter | None) -> Iterator[None]:
        """Around a backward: ``optimizer`` updates each unit whose gradients are all there; None: gradients wait."""
        self._is_of_trainer = True
        try:
            with self._grads.backward(self._cache.units, optimizer):
                yield
        finally:
            self._is_of_trainer = False

    def _update_complete(self, frame: Frame) -> None:
        """Update the units whose gradients came while the backward of ``frame``, which is over, still read them."""
        for used in self._used.get(frame, ()):
            self._grads.update_complete(used.unit)

    # -- saved tensors that view parameters ----------------------------------------------------------------------

    def hooks(self) -> saved_tensors_hooks:
        """Under these, a saved tensor that views a resident parameter does not hold its memory."""
        return around_users(self._pack_view, self.unpack) or saved_tensors_hooks(self.pack, self.unpack)

    def _pack_view(self, tensor: Tensor) -> object:
        """As `pack`, and any other tensor as it is."""
        return tensor if self._cache.resident.find(tensor) is None else self.pack(tensor)

    def pack(self, tensor: Tensor) -> object:
        """What stands for a saved tensor."""
        param = self._cache.resident.find(tensor)
        if param is None:
            if tensor.is_inference() or transforms.are_active():
                return tensor, None
            # Detached (the version is shared): an operation may save its own output, which holds the graph that holds
            # this. Without backward nothing would break that circle, and every skipped batch stayed in memory.
            return tensor.detach(), tensor._version
        view = ParameterView(param, form_of(tensor))
        view.unit.saved_views.add(view)
        return view

    def unpack(self, packed: Any) -> Tensor:
        """The tensor that `pack` was given."""
        if not isinstance(packed, ParameterView):
            return unchanged(*packed)
        unit = packed.unit
        self._require_unchanged(unit, packed.generation)
        self.note()
        if unit.name not in self._unpacked:
            self._end_idle_holds(going_to=unit)
            with transforms.suspended():
                self._cache.fetch(unit)
            self._unpacked[unit.name] = unit
        return packed.tensor()

    def _require_unchanged(self, unit: Unit, generation: Generation) -> None:
        if generation.lineage is not self._store.newest(unit.name, "param").lineage:
            raise RuntimeError(
                f"backward needs values of unit {unit.name!r} that an optimizer step has replaced since the forward; "
                "run the forward again, or the backward before the step"
            )

    def _require_unwritten(self, used: _Used) -> None:
        unit = used.unit
        is_written = used.generation is not self._store.newest(unit.name, "param") or used.num_writes != unit.num_writes
        if not is_written and used.fingerprint is not None and unit.in_memory is not None:
            is_written = used.fingerprint != fingerprint(unit.in_memory)
        if is_written:
            raise RuntimeError(
                f"unit {unit.name!r} cannot be recomputed: its parameters were written to between its forward and its "
                "backward, and a second forward would compute with the new values; write to them before the forward or "
                "after the backward, or set activations='keep' in the strategy"
            )

    # -- recompute -----------------------------------------------------------------------------------------------

    def rerun(self, frame: Frame, call: Callable[[], object]) -> None:
        """Run a frame's module again in backward; its units are held until the frame's backward is over."""
        for used in self._used[frame]:
            self._cache.write_back(used.unit)  # what was written to it since
            self._require_unchanged(used.unit, used.generation)
            self._require_unwritten(used)
        self.note()
        self._end_idle_holds()
        self._trace.mark("recompute", frame.name)
        with self._trace.label("recompute", frame.name):
            self.run_again(frame, call)

    def run_again(self, frame: Frame, call: Callable[[], object]) -> None:
        """Run a frame's module again, while its units are held."""
        outer, self.rerunning = self.rerunning, frame
        try:
            with self._model.step.running():
                call()
        finally:
            self.rerunning = outer

    def begin_forward(self, frame: Frame) -> None:
        """The forward of ``frame`` begins."""
        self._frames.add(frame)

    def end_forward(self, frame: Frame, units: list[Unit]) -> None:
        """The forward of ``frame`` is over, and what it wrote to parameters of ``units`` itself is in the store."""
        self._used[frame] = [_Used(unit, self._store.newest(unit.name, "param"), unit.num_writes) for unit in units]

    def touched(self, unit: Unit) -> None:
        """Code outside of modules may write to ``unit`` from now on; no generation tells where it is kept in memory."""
        if unit.in_memory is None:
            return
        waiting = [u for used in self._used.values() for u in used if u.unit is unit and u.fingerprint is None]
        found = fingerprint(unit.in_memory) if waiting else None
        for used in waiting:
            used.fingerprint = found

    def hold(self, frame: Frame, units: list[Unit]) -> None:
        """Keep ``units``, which are held once, until the backward of ``frame`` is over."""
        self._held[id(frame)] = _Hold(frame, units)

    def place(self, tensor: Tensor) -> object | None:
        """Which parameter ``tensor`` views, and how; None if it views none."""
        param = self._cache.resident.find(tensor)
        return None if param is None else (param.unit.name, param.index, *form_of(tensor))

    def hide(self, tensor: Tensor, own: list[Unit]) -> object:
        """As `pack`, for a tensor of a second run by a frame whose ``own`` units stay; see `show`."""
        param = self._cache.resident.find(tensor)
        # What a unit that was only visited has is not held: a view of it would hold its buffer, one for each visit.
        return tensor.detach() if param is None or param.unit in own else self.pack(tensor)

    def show(self, frame: Frame, view: Any) -> Tensor:
        """The tensor that `hide` was given; of the units that are not the frame's own, one at a time is held."""
        if not isinstance(view, ParameterView):
            return cast(Tensor, view)
        self._require_unchanged(view.unit, view.generation)
        hold = self._held.setdefault(id(frame), _Hold(frame, []))
        if hold.guest is not view.unit:
            guest, hold.guest = hold.guest, None
            if guest is not None:
                self._cache.release(guest)
            self._cache.fetch(view.unit)
            hold.guest = view.unit
        return view.tensor()

    def watch(self, frame: Frame) -> None:
        """When the gradients of a frame's inputs are there, its backward is over."""
        inputs = [t for t in frame.inputs if t.requires_grad and not t.is_leaf]
        remaining = [len(inputs)]
        # The graph must not keep the frame, which keeps the graph; nor us, if a module keeps an output of a step.
        weak, weak_self = weakref.ref(frame), weakref.ref(self)

        def arrived(_: Tensor) -> None:
            remaining[0] -= 1
            live, backward = weak(), weak_self()
            if remaining[0] == 0 and live is not None and backward is not None:
                backward._end_frame(live)
                backward._update_complete(live)

        for tensor in inputs:
            tensor.register_hook(arrived)  # type: ignore[no-untyped-call]

    # -- ends ----------------------------------------------------------------------------------------------------

    def _end_frame(self, frame: Frame) -> None:
        frame.drop()
        hold = self._held.pop(id(frame), None)
        for unit in hold.all_units if hold is not None else ():
            self._cache.release(unit)

    def _end_holds(self) -> None:
        for hold in list(self._held.values()):
            self._end_frame(hold.frame)
        while self._unpacked:
            self._cache.release(self._unpacked.popitem()[1])

    def _end_idle_holds(self, going_to: Unit | None = None) -> None:
        """Backward goes on to another unit: those it was in before are over, as far as anybody can tell.

        Units of one block, such as frozen weights and the adapters beside them, are used in turns and stay together.
        """
        if self.rerunning is not None:
            return
        block = None if going_to is None else going_to.block
        staying = {name: unit for name, unit in self._unpacked.items() if block is not None and unit.block is block}
        for name in staying:
            del self._unpacked[name]
        frames = [hold.frame for hold in self._held.values()]
        self._end_holds()
        self._unpacked.update(staying)
        for frame in frames:
            self._update_complete(frame)

    def _end(self) -> None:
        self._is_running = False
        self._end_holds()
        self._grads.end_backward()
        if self._is_of_trainer:
            self._on_device.end_backward()


@dataclass(eq=False)
class _Used:
    """A unit that a frame ran with."""

    unit: Unit
    generation: Generation
    num_writes: int
    fingerprint: Fingerprint | None = None  # what it held when code outside of modules first touched it after that


@dataclass(eq=False)
class _Hold:
    """Units that are held for the backward of one frame, each once."""

    frame: Frame
    units: list[Unit]
    guest: Unit | None = None  # one that it shares with others

    @property
    def all_units(self) -> list[Unit]:
        return self.units if self.guest is None else [*self.units, self.guest]
