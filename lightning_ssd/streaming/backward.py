"""What happens inside backward: units come again for saved tensors and recompute, and go when they are done.

[Note: backward] A unit is fetched again when autograd unpacks a tensor that was saved under it. It goes when the
gradients of its inputs are there, when backward goes on to another unit, or when backward ends. This only decides how
long memory is held; nothing depends on it: a recomputed tensor that was dropped is computed again, and a buffer is not
lent again while any tensor on it lives.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_ssd.store.generation import Generation
from lightning_ssd.streaming import transforms
from lightning_ssd.streaming.activations import Frame, Rerun
from lightning_ssd.streaming.gradients import GradientSink
from lightning_ssd.streaming.residency import Residents
from lightning_ssd.streaming.transforms import StepHooks
from lightning_ssd.streaming.unit import Unit
from lightning_ssd.trace import Trace


class Backward:
    """Holds units during backward.

    Args:
        residents: Fetches and releases units.
        sink: Is told when a backward ends.
        trace: Gets the event ``recompute``.

    Attributes:
        rerunning: The frame whose forward runs again now, or None.
        step_hooks: For tensors that are saved outside the forward of a module that needs a unit.
    """

    def __init__(self, residents: Residents, sink: GradientSink, trace: Trace) -> None:
        self.rerunning: Frame | None = None
        self.step_hooks = StepHooks(self.hooks)
        self._residents = residents
        self._sink = sink
        self._trace = trace
        self._held: dict[int, tuple[Frame, list[Unit]]] = {}  # by id of the frame, which is alive in the value
        self._unpacked: dict[str, Unit] = {}  # held because a view of a parameter was unpacked
        self._is_running = False
        self._generations: weakref.WeakKeyDictionary[Frame, list[tuple[Unit, Generation]]] = weakref.WeakKeyDictionary()
        self._packed: dict[str, weakref.WeakSet[_ParameterView]] = {}  # what backward may still unpack, by unit
        sink.is_needed = lambda unit: bool(self._packed.get(unit.name))

    def note(self) -> None:
        """Something of ours happens inside backward: be told when it ends."""
        if not self._is_running:
            self._is_running = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def abort(self) -> None:
        """A backward may have failed: hold nothing, expect nothing."""
        self._end_holds()
        self._is_running = False
        self.rerunning = None

    # -- saved tensors that view parameters ----------------------------------------------------------------------

    def hooks(self) -> saved_tensors_hooks:
        """Under these, a saved tensor that views a resident parameter does not hold its memory."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> object:
        place = self._residents.find(tensor)
        if place is None:
            if tensor.is_inference() or transforms.are_active():
                return tensor, None
            # Detached (the version is shared): an operation may save its own output, which holds the graph that holds
            # this. Without backward nothing would break that circle, and every skipped batch stayed in memory.
            return tensor.detach(), tensor._version
        unit, index = place
        assert unit.generation is not None
        form = (tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.dtype)
        view = _ParameterView(unit, index, form, unit.generation, unit.params[index]._version)
        self._packed.setdefault(unit.name, weakref.WeakSet()).add(view)
        return view

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _ParameterView):
            return _unchanged(*packed)
        unit = packed.unit
        self._require_unchanged(unit, packed.generation)
        self.note()
        if unit.name not in self._unpacked:
            self._end_idle_holds(going_to=unit)
            self._residents.acquire(unit)
            self._unpacked[unit.name] = unit
        param = unit.params[packed.index]
        _unchanged(param, packed.version)
        size, stride, offset, dtype = packed.form
        with torch.no_grad():
            flat = param.detach().view(-1)
            return (flat if dtype == flat.dtype else flat.view(dtype)).as_strided(size, stride, offset)

    def _require_unchanged(self, unit: Unit, generation: Generation) -> None:
        if generation.lineage is not self._residents.current(unit).lineage:
            raise RuntimeError(
                f"backward needs values of unit {unit.name!r} that an optimizer step has replaced since the forward; "
                "run the forward again, or the backward before the step"
            )

    def _require_unwritten(self, unit: Unit, generation: Generation) -> None:
        if generation is not self._residents.current(unit):
            raise RuntimeError(
                f"unit {unit.name!r} cannot be recomputed: its parameters were written to between its forward and its "
                "backward, and a second forward would compute with the new values; write to them before the forward or "
                "after the backward, or set activations='keep' in the strategy"
            )

    # -- recompute -----------------------------------------------------------------------------------------------

    def rerun(self, units: list[Unit]) -> Rerun:
        """What a frame of a module that needs ``units`` calls to run its forward again."""

        def rerun(frame: Frame, call: Callable[[], object]) -> None:
            for unit, generation in self._generations[frame]:
                self._require_unchanged(unit, generation)
                self._require_unwritten(unit, generation)
            self.note()
            self._end_idle_holds()
            self._trace.mark("recompute", frame.name)
            outer, self.rerunning = self.rerunning, frame
            try:
                call()
            finally:
                self.rerunning = outer

        return rerun

    def end_forward(self, frame: Frame, units: list[Unit]) -> None:
        """The forward of ``frame`` is over, and what it wrote to parameters of ``units`` itself is in the store."""
        self._generations[frame] = [(unit, self._residents.current(unit)) for unit in units]

    def hold(self, frame: Frame, units: list[Unit]) -> None:
        """Keep ``units``, which are held once, until the backward of ``frame`` is over."""
        self._held[id(frame)] = (frame, units)

    def watch(self, frame: Frame) -> None:
        """When the gradients of a frame's inputs are there, its backward is over."""
        inputs = [t for t in frame.inputs if t.requires_grad and not t.is_leaf]
        remaining = [len(inputs)]
        weak = weakref.ref(frame)  # the graph must not keep the frame: the frame keeps the graph

        def arrived(_: Tensor) -> None:
            remaining[0] -= 1
            live = weak()
            if remaining[0] == 0 and live is not None:
                self._end_frame(live)

        for tensor in inputs:
            tensor.register_hook(arrived)  # type: ignore[no-untyped-call]

    # -- ends ----------------------------------------------------------------------------------------------------

    def _end_frame(self, frame: Frame) -> None:
        frame.drop()
        _, units = self._held.pop(id(frame), (frame, []))
        for unit in units:
            self._residents.release(unit)

    def _end_holds(self) -> None:
        for frame, _ in list(self._held.values()):
            self._end_frame(frame)
        while self._unpacked:
            self._residents.release(self._unpacked.popitem()[1])

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
        self._end_holds()
        self._unpacked.update(staying)

    def _end(self) -> None:
        self._is_running = False
        self._end_holds()
        self._sink.end_backward()


class _ParameterView:
    """Stands for a saved tensor that views a parameter: fetched again when backward needs it."""

    __slots__ = ("__weakref__", "form", "generation", "index", "unit", "version")

    def __init__(self, unit: Unit, index: int, form: tuple[Any, ...], generation: Generation, version: int) -> None:
        self.unit = unit
        self.index = index
        self.form = form
        self.generation = generation
        self.version = version


def _unchanged(tensor: Tensor, version: int | None) -> Tensor:
    # Autograd does not check this itself for tensors that went through hooks.
    if version is not None and tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{tensor.dtype} {list(tensor.shape)} is at version {tensor._version}; expected version {version}"
        )
    return tensor
