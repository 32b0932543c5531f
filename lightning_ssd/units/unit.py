"""One unit: parameters that move together, the forms that their values have, and its pending update.

[Note: forms of a parameter] A value exists in one or more of these forms, all of which are attributes of its `Unit`
but the first and the last, which the store has:

    on disk       a generation: an immutable file. It is the truth, unless the unit is in memory.
    in memory     ``in_memory``: the truth, changed in place, for a unit that the memory plan holds in memory.
    host copy     ``host_copy``: the bytes of a generation in a buffer. It is being read until its transfer is over; an
                  update may make new values in it.
    device copy   ``device_copy``: tensors where compute reads them; on the CPU views of the host copy, or what is in
                  memory. A unit that has it is *resident*.
    released copy ``released_copy``: on a GPU, a device copy that nobody uses, and that may be used again.
    mapped        ``mapped``: tensors on the file, or what is in memory, for code outside of steps.
    placeholder   ``placeholders``: NaN bytes that take no memory.
    master        float32 values that a 16-bit parameter is rounded from; a kind of its own in the store.

The parameters view the device copy, else the mapping, else the placeholders; then they are lazy ([Note: lazy
parameters]). These moves change the forms, and refuse what would lose one:

    read          on disk -> host copy          give_back    host copy -> on disk
    show          any copy -> device copy       hide         device copy -> released copy, placeholder
    map           on disk -> mapped             offload      mapped -> placeholder
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_ssd.device.param_copies import DeviceCopy
from lightning_ssd.device.streams import WaitFor
from lightning_ssd.errors import ResidencyError, SSDOffloadError
from lightning_ssd.io.engine import Transfer
from lightning_ssd.memory.pool import Buffer, Pool
from lightning_ssd.store.dtypes import dtype_of, name_of
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.layout import Shape, UnitLayout, file_order, lay_out
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units import transforms
from lightning_ssd.units.mapped import InMemoryParams, MappedParams
from lightning_ssd.units.partition import UnitSpec
from lightning_ssd.units.placement import Placement


class Waitable(Protocol):
    """An update of a unit that is still to be done; the unit's values are stale until then."""

    def wait(self) -> None:
        """Return when it is done.

        Raises:
            BaseException: It failed.
        """
        ...


class HostCopy:
    """The values of one unit in a buffer.

    Attributes:
        buffer: Lent by the pool of parameters.
        generation: Whose values the bytes are, or will be when they are read; None while they are undefined.
        transfer: The read of the bytes while it is under way; None before and after.
    """

    def __init__(self, buffer: Buffer, generation: Generation | None = None, transfer: Transfer | None = None) -> None:
        self.buffer = buffer
        self.generation = generation
        self.transfer = transfer

    def end_read(self) -> None:
        """Return when the bytes are there.

        Raises:
            IOFailure: The disk failed.
        """
        transfer = self.transfer  # the other thread may end it too
        if transfer is not None:
            transfer.wait()
            self.transfer = None


class Unit:
    """One unit of a model; [Note: forms of a parameter].

    Attributes:
        name: Unique name.
        names: Full names of the parameters, in file order.
        params: The parameters, in file order.
        shapes: Their names and shapes.
        dtype: Dtype of the parameters.
        layout: Of the kind ``param``: what a fetch reads.
        modules: Modules that need the unit in their forward.
        block: The repeated block it belongs to, or None.
        persistent: Stays resident to the end of the step once fetched.
        in_memory: See the note; one tensor per parameter.
        host_copy: See the note.
        device_copy: See the note.
        released_copy: See the note; its memory may have been used for something else.
        mapped: See the note.
        placeholders: See the note; one tensor per parameter.
        update: Its pending update, or one that failed; None if there is none. Set under the lock of the `ModelUnits`.
        num_holds: How many users want it resident now.
        num_pins: How many updates have its host copy, or will want the bytes in it.
        is_touched: Code outside its own modules can reach it while it is resident, and may hold views of it.
        seen: Checksums of its values when it became resident or touched; None if only ``versions`` are compared.
        versions: ``_version`` of each parameter when it became resident.
        num_writes: How often the user's writes to it outside of steps were found; its generation may be the same.
        is_handed_on: Its gradients of this step were handed to its optimizer in backward.
        is_ahead: It became resident after that, with the values of after the step.
        writes_itself: Its own modules write to it by ``.data`` in their forward, which no version tells.
    """

    def __init__(self, spec: UnitSpec, dtype: torch.dtype | None = None) -> None:
        self.name = spec.name
        if dtype is None or not spec.params[0].is_floating_point():
            dtype = spec.params[0].dtype
        by_name = dict(zip(spec.names, spec.params, strict=True))
        shapes = file_order((Shape(n, tuple(p.shape)) for n, p in by_name.items()), dtype.itemsize)
        self.names = tuple(shape.name for shape in shapes)
        self.params: tuple[nn.Parameter, ...] = tuple(by_name[name] for name in self.names)
        self.shapes = tuple(shapes)
        self.layout = lay_out(self.name, "param", shapes, name_of(dtype))
        self.dtype = dtype_of(self.layout.dtype)
        self.modules = list(spec.modules)
        self.block = spec.block
        self.persistent = spec.persistent
        self.in_memory: tuple[Tensor, ...] | None = None
        self.host_copy: HostCopy | None = None
        self.device_copy: DeviceCopy | None = None
        self.released_copy: DeviceCopy | None = None
        self.mapped: MappedParams | InMemoryParams | None = None
        self.placeholders: tuple[Tensor, ...] = ()
        self.update: Waitable | None = None
        self.num_holds = 0
        self.num_pins = 0
        self.is_touched = False
        self.seen: tuple[int, ...] | None = None
        self.versions: tuple[int, ...] = ()
        self.num_writes = 0
        self.writes_itself = False
        self.is_handed_on = False
        self.is_ahead = False

    # -- moves ---------------------------------------------------------------------------------------------------

    def read(self, store: StateStore, buffer: Buffer) -> None:
        """Start to read its newest values into ``buffer``, which is its host copy from now on.

        Raises:
            IOFailure: The read cannot be started; it has no host copy.
            ResidencyError: It has a copy in memory.
        """
        self._require_no_copy()
        generation, nbytes = store.newest(self.name, "param"), self.layout.data_nbytes
        transfer = store.read(generation, 0, buffer.address, nbytes, keep=buffer.hold()) if nbytes else None
        self.host_copy = HostCopy(buffer, generation, transfer)

    def lend(self, buffer: Buffer) -> None:
        """An update will make its values in ``buffer``, which is its host copy from now on.

        Raises:
            ResidencyError: It has a copy in memory.
        """
        self._require_no_copy()
        self.host_copy = HostCopy(buffer)

    def give_back(self, pool: Pool) -> None:
        """It has no host copy any more, if it had one.

        Raises:
            ResidencyError: An update has it.
        """
        host_copy = self.host_copy
        if host_copy is None:
            return
        if self.num_pins > 0:
            raise ResidencyError(f"{self} was to give back a buffer that an update has")
        with suppress(SSDOffloadError):  # nobody wants these bytes any more
            host_copy.end_read()  # sync: the engine owns the buffer until the read is over
        self.host_copy = None
        pool.give_back(host_copy.buffer)

    def show(self, store: StateStore, placement: Placement) -> DeviceCopy:
        """Make it resident: its parameters are plain ones that view a device copy of its newest values.

        Raises:
            ResidencyError: It is resident or mapped, or has no values in memory; or the device has no room.
        """
        if self.device_copy is not None or self.mapped is not None:
            raise ResidencyError(f"{self} was to be made resident")
        device_copy, newest = self.released_copy, store.newest(self.name, "param")
        if device_copy is None or not (device_copy.has(newest) and placement.reuse(device_copy)):
            if self.in_memory is not None:
                device_copy = placement.place_tensors(self.in_memory, newest)
            else:
                device_copy = placement.place(self.layout, *self._host_values())
        self._view(device_copy.tensors, nn.Parameter)
        self.device_copy, self.released_copy = device_copy, None
        return device_copy

    def hide(self, placement: Placement, lazy_class: type[nn.Parameter]) -> None:
        """It is resident no longer: its parameters are lazy ones.

        Raises:
            ResidencyError: It is not resident.
        """
        if self.device_copy is None:
            raise ResidencyError(f"{self} was to be released, and is not resident")
        self._view(self.placeholders, lazy_class)
        device_copy, self.device_copy = self.device_copy, None
        self.released_copy = placement.release(device_copy)

    def map(self, mapped: MappedParams | InMemoryParams) -> None:
        """Its parameters are plain ones that view ``mapped``.

        Raises:
            ResidencyError: They view a device copy, or another mapping.
        """
        if self.device_copy is not None or self.mapped is not None:
            raise ResidencyError(f"{self} was to be mapped")
        self._view(mapped.tensors, nn.Parameter)
        self.mapped, self.released_copy = mapped, None  # what is mapped may be written to

    def offload(self, lazy_class: type[nn.Parameter]) -> None:
        """Its parameters, which viewed a mapping or memory of their own, are lazy; their values are in the store."""
        self._view(self.placeholders, lazy_class)
        self.mapped = None

    def hold_in_memory(self, tensors: tuple[Tensor, ...]) -> None:
        """The plan holds its values in ``tensors``, one per parameter, from now on.

        Raises:
            ResidencyError: It has a copy in memory.
        """
        self._require_no_copy()
        self.in_memory = tensors

    def became(self, generation: Generation) -> None:
        """The values that it has in memory are those of ``generation``, which was written from them."""
        for copy in (self.host_copy, self.device_copy):
            if copy is not None:
                copy.generation = generation

    def forget_copies(self) -> None:
        """This is a forked process, which never releases what its parameters view."""
        self.host_copy = self.device_copy = self.released_copy = None

    def _view(self, tensors: Iterable[Tensor], cls: type[nn.Parameter]) -> None:
        for param, tensor in zip(self.params, tensors, strict=True):
            give(param, tensor, cls)

    def _require_no_copy(self) -> None:
        if not self.is_on_disk:
            raise ResidencyError(f"{self} was to get memory, and has a copy there")

    def _host_values(self) -> tuple[Buffer, Generation]:
        host_copy = self.host_copy
        if host_copy is None or host_copy.transfer is not None or host_copy.generation is None:
            raise ResidencyError(f"{self} was to be made resident, and has no values in memory")
        return host_copy.buffer, host_copy.generation

    # -- what is asked of it -------------------------------------------------------------------------------------

    @property
    def is_on_disk(self) -> bool:
        """Whether it has no copy in host memory, and is not resident."""
        return self.device_copy is None and self.host_copy is None and self.in_memory is None

    @property
    def is_viewed(self) -> bool:
        """Whether the unit, which is resident, must stay: the user can write through a view, or a graph holds it."""
        if not self.is_touched or self.device_copy is None:
            return False
        return any(map(is_held, self.params, self.device_copy.tensors)) or any(map(_is_saved, self.params))

    def wait_for_update(self) -> None:
        """Return when no update is pending.

        Raises:
            BaseException: An update of the model failed.
        """
        update = self.update  # the thread that updates may set it to None now
        if update is not None:
            update.wait()

    def end_copies(self) -> None:
        """Return when no copy to the device reads what is in memory, which may change then."""
        for copy in (self.device_copy, self.released_copy) if self.in_memory is not None else ():
            if copy is not None and copy.copied is not None:
                copy.copied.wait(WaitFor.IN_MEMORY_PARAMS)  # sync: a copy to the device

    def layout_of(self, kind: str, dtype: str) -> UnitLayout:
        """Layout of another kind of this unit: the same parameters in the same order."""
        return lay_out(self.name, kind, self.shapes, dtype)

    def __repr__(self) -> str:
        forms = [
            name
            for name in ("in_memory", "host_copy", "device_copy", "released_copy", "mapped", "update")
            if getattr(self, name) is not None
        ]
        return f"Unit({self.name!r}, {self.layout.numel} x {self.layout.dtype}, {' + '.join(forms) or 'offloaded'})"


def give(param: nn.Parameter, data: Tensor, cls: type[nn.Parameter]) -> None:
    """Let ``param`` view ``data`` and be a ``cls``."""
    with torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
        param.data = data
    param.__class__ = cls


def _is_saved(param: nn.Parameter) -> bool:
    """Whether a graph holds ``param`` itself, whose values then may not go: no hooks were set when it was saved.

    So it is under torch.func, which allows none, and under ``gathered()``.
    """
    accumulator = None  # of gradients; it holds the parameter too
    if param.requires_grad:
        # In inference mode no view of a parameter has a history.
        with torch._C.DisableTorchFunctionSubclass(), transforms.suspended(), torch.inference_mode(False):
            accumulator = torch.autograd.graph.get_gradient_edge(param)
    num_holders: int = param._use_count()  # type: ignore[attr-defined]
    return num_holders > (1 if accumulator is None else 2)


def is_held(param: nn.Parameter, tensor: Tensor) -> bool:
    """Whether anybody but these two has a tensor on the storage of ``tensor``, which ``param`` views or once viewed."""
    if not tensor.numel():
        return False
    storage = tensor.untyped_storage()
    # This storage object, the tensor, the one that it was made a view of, and the parameter.
    own = 2 + (tensor._base is not None) + (param.data_ptr() == tensor.data_ptr())
    return int(torch._C._storage_Use_Count(storage._cdata)) > own


def params_with_grad(units: Iterable[Unit]) -> Iterable[tuple[Unit, dict[int, Tensor]]]:
    """Units that have a visible gradient, with their gradients by parameter index."""
    for unit in units:
        grads = {i: p.grad for i, p in enumerate(unit.params) if p.grad is not None}
        if grads:
            yield unit, grads


def chains(root: nn.Module, units: Iterable[Unit]) -> list[list[str]]:
    """Names of units that nested modules need at the same time, one list per chain of nested modules."""
    users: dict[nn.Module, list[Unit]] = {}
    for unit in units:
        for user in unit.modules:
            users.setdefault(user, []).append(unit)
    found: list[list[str]] = []

    def call(module: nn.Module, held: list[str]) -> None:
        here = held + [unit.name for unit in users.get(module, []) if unit.name not in held]
        if len(here) > len(held):
            found.append(here)
        for child in module.children():
            call(child, here)

    call(root, [])
    return found
