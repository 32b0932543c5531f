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

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lightning_ssd.codec import float32
from lightning_ssd.codec.encodings import BY_BLOCK, STORED_DTYPE, stored_shape
from lightning_ssd.codec.forms import PLAIN, Form
from lightning_ssd.device.param_copies import DeviceCopy
from lightning_ssd.device.streams import WaitFor
from lightning_ssd.errors import ResidencyError, SSDOffloadError
from lightning_ssd.memory.pool import Buffer, Pool
from lightning_ssd.store.dtypes import dtype_of, name_of
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.layout import Shape, UnitLayout, file_order, lay_out
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.store.strides import stride_of
from lightning_ssd.units.fingerprint import Fingerprint, fingerprint
from lightning_ssd.units.holders import give, is_held, is_saved
from lightning_ssd.units.host_copy import HostCopy
from lightning_ssd.units.mapped import InMemoryParams, MappedParams
from lightning_ssd.units.partition import UnitSpec
from lightning_ssd.units.placement import Placement

_NUM_WATCHED = 2
"""Uses of a unit, in training and in evaluation, after which it is known whether its modules write to it."""


class Waitable(Protocol):
    """An update of a unit that is still to be done; the unit's values are stale until then."""

    def wait(self) -> None:
        """Return when it is done.

        Raises:
            BaseException: It failed.
        """
        ...


class SpilledGrads(Protocol):
    """Gradients of a unit that wait on disk."""

    def check(self, grads: Mapping[int, Tensor], *, is_final: bool) -> None:
        """Refuse those of ``grads``, by parameter index, that were damaged there.

        Args:
            grads: Those that are read next.
            is_final: False at the step, which takes checksums; True before the update reads them, which compares.

        Raises:
            SSDOffloadError: Some were.
        """
        ...


class Unit:
    """One unit of a model; [Note: forms of a parameter].

    Attributes:
        name: Unique name.
        label: What messages call it.
        names: Full names of the parameters, in file order.
        params: The parameters, in file order.
        shapes: Their names and shapes.
        dtype: Dtype of the parameters.
        state_dtype: Safetensors dtype of the values that an update works on, and of its states.
        has_master: Updates work on masters, not on the values of the parameters themselves.
        form: Of its master and its states in files; `units.unit_state` reads and writes them.
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
        spilled_grads: Gradients that wait on disk, or None.
        saved_views: Stand for tensors that running graphs saved and that view its parameters.
        num_holds: How many users want it resident now.
        num_pins: How many updates have its host copy, or will want the bytes in it.
        is_touched: Code outside its own modules can reach it while it is resident, and may hold views of it.
        seen: Checksums of its values when it became resident or touched; None if only ``versions`` are compared.
        versions: ``_version`` of each parameter when it became resident.
        num_writes: How often the user's writes to it outside of steps were found; its generation may be the same.
        is_submitted: Its update of this step was submitted in backward.
        is_updated: The update of this step is done.
        is_ahead: It became resident after that, with the values of after the step.
        writes_itself: Its own modules write to it by ``.data`` in their forward, which no version tells.
    """

    def __init__(self, spec: UnitSpec, dtype: torch.dtype | None = None, *, keep_master: bool = False) -> None:
        self.name = spec.name
        self.label = f"unit {spec.name!r}"
        if dtype is None or not spec.params[0].is_floating_point():
            dtype = spec.params[0].dtype
        by_name = dict(zip(spec.names, spec.params, strict=True))
        shapes = file_order((Shape(n, tuple(p.shape), stride_of(p)) for n, p in by_name.items()), dtype.itemsize)
        self.names = tuple(shape.name for shape in shapes)
        self.params: tuple[nn.Parameter, ...] = tuple(by_name[name] for name in self.names)
        self.shapes = tuple(shapes)
        self.layout = lay_out(self.name, "param", shapes, name_of(dtype))
        self.dtype = dtype_of(self.layout.dtype)
        self.state_dtype = float32.state_dtype(self.layout.dtype, keep_master=keep_master)
        self.has_master = self.state_dtype != self.layout.dtype
        self.form: Form = PLAIN
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
        self.spilled_grads: SpilledGrads | None = None
        self.saved_views = WeakSet[object]()
        self.num_holds = 0
        self.num_pins = 0
        self.is_touched = False
        self.seen: Fingerprint | None = None
        self.versions: tuple[int, ...] = ()
        self.num_writes = 0
        self.writes_itself = False
        self._num_watched = {False: 0, True: 0}  # times that it was resident in evaluation, in training
        self.is_submitted = False
        self.is_updated = False
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
        if device_copy is None or not placement.reuse(device_copy, newest):
            if self.in_memory is not None:
                device_copy = placement.place_tensors(self.in_memory, newest)
            else:
                device_copy = placement.place(self.layout, *self._host_values())
        self._view(device_copy.tensors, nn.Parameter)
        self.device_copy, self.released_copy = device_copy, None
        self._begin_watch()
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
        self.is_touched = False

    def map(self, mapped: MappedParams | InMemoryParams, cls: type[nn.Parameter] = nn.Parameter) -> None:
        """Its parameters are of ``cls`` and view ``mapped``.

        Raises:
            ResidencyError: They view a device copy, or another mapping.
        """
        if self.device_copy is not None or self.mapped is not None:
            raise ResidencyError(f"{self} was to be mapped")
        self._view(mapped.tensors, cls)
        self.mapped = mapped
        if self.released_copy is not None:
            self.released_copy.is_stale = True  # what is mapped may be written to

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

    # -- what the user writes to it while it is resident: [Note: in a step, written] ------------------------------

    @property
    def is_in_place(self) -> bool:
        """Whether it is resident where the store keeps its values, and nothing beside it depends on them."""
        copy = self.device_copy
        return self.in_memory is not None and copy is not None and copy.copied is None and self.layout.itemsize >= 4

    def touch(self) -> None:
        """From now on the user's code can write to it; it is resident."""
        self.is_touched = True
        if self.seen is None and not self.is_in_place:
            self.seen = fingerprint(self.params)

    def may_be_written(self) -> bool:
        """Whether the store may lack what was written to it since it became resident."""
        return self.is_in_place or self.is_changed()

    def is_changed(self) -> bool:
        """Whether its parameters are not what they were when it became resident."""
        if self.device_copy is None or (self.seen is None and self.versions == self._versions()):
            return False
        found, before = fingerprint(self.params), self.seen
        if before is None:  # a second forward writes what the first wrote
            return found != self.device_copy.generation.fingerprint
        is_changed = found != before
        if is_changed and not self.is_touched and self.versions == self._versions():
            self.writes_itself = True
        return is_changed

    def note_stored(self, generation: Generation) -> None:
        """What its parameters hold now is in the store, as ``generation``."""
        found = generation.fingerprint = fingerprint(self.params)
        self.versions = self._versions()
        self.seen = None if self.seen is None else found

    def forget_writes(self) -> None:
        """What was written to it so far does not count: its step failed."""
        self.is_ahead = False
        if self.device_copy is not None and not self.is_in_place:
            self.versions, self.seen = self._versions(), None

    def _begin_watch(self) -> None:
        """It has become resident."""
        self.is_ahead = self.is_submitted
        if self.is_in_place and not self.is_ahead:
            return
        self.is_touched = self.persistent  # it stays resident to the end of the step, and everybody can use it
        is_training = any(module.training for module in self.modules)
        is_watched = self._num_watched[is_training] < _NUM_WATCHED
        self._num_watched[is_training] += is_watched
        is_summed = is_watched or self.writes_itself or self.is_touched or self.is_ahead
        self.versions, self.seen = self._versions(), fingerprint(self.params) if is_summed else None

    def _versions(self) -> tuple[int, ...]:
        """``_version`` of each parameter; an operation in place on the parameter itself raises it."""
        return tuple(param._version for param in self.params)

    # -- what is asked of it -------------------------------------------------------------------------------------

    @property
    def is_on_disk(self) -> bool:
        """Whether it has no copy in host memory, and is not resident."""
        return self.device_copy is None and self.host_copy is None and self.in_memory is None

    def is_stale(self, store: StateStore) -> bool:
        """Whether the copy that it has in memory, if it has one, is not of its newest values."""
        copy = self.device_copy or self.host_copy
        return copy is not None and copy.generation is not store.newest(self.name, "param")

    def is_released(self, store: StateStore) -> bool:
        """Whether it has a released copy of its newest values."""
        return self.released_copy is not None and self.released_copy.has(store.newest(self.name, "param"))

    @property
    def is_viewed(self) -> bool:
        """Whether the unit, which is resident, must stay: the user can write through a view, or a graph holds it."""
        if not self.is_touched or self.device_copy is None:
            return False
        return any(map(is_held, self.params, self.device_copy.tensors)) or any(map(is_saved, self.params))

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

    def layout_of(self, kind: str) -> UnitLayout:
        """Layout of a kind of file beside ``param``."""
        shapes: Sequence[Shape] = self.shapes
        if kind in BY_BLOCK:
            shapes = [Shape(each.name, stored_shape(kind, each.shape)) for each in self.shapes]
        return lay_out(self.name, kind, shapes, STORED_DTYPE.get(kind, self.state_dtype))

    @property
    def update_reads_param(self) -> bool:
        """Whether an update reads the parameters themselves, not only a master."""
        return not self.has_master or self.form.has_halves

    def __repr__(self) -> str:
        forms = [
            name
            for name in ("in_memory", "host_copy", "device_copy", "released_copy", "mapped", "update")
            if getattr(self, name) is not None
        ]
        return f"Unit({self.name!r}, {self.layout.numel} x {self.layout.dtype}, {' + '.join(forms) or 'offloaded'})"
