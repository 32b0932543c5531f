"""What the user writes to parameters, in a step or outside, and how it comes into the store.

[Note: in a step, written] Bytes in memory are thrown away when a unit is released, so a change to them (weights clipped
in ``training_step``, a mask that is multiplied in, `nn.Embedding(max_norm=)`) would be lost without a word. An
operation in place on a parameter raises its ``_version``, which is compared at every release. ``p.data`` and what is
made from it have versions of their own, so where they may be used the bytes are compared: of units that code outside
their own modules can reach (`Unit.is_touched`), and of units whose own modules use ``.data`` in their forward, which
`may_write` or their first forwards, in training and in evaluation, tell. A unit of which the user holds a view stays in
memory to the end of the step, so that what is written through the view counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_ssd.errors import ResidencyError, SSDOffloadError
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.store.strides import is_dense, memory_order
from lightning_ssd.units.holders import is_held
from lightning_ssd.units.mapped import InMemoryParams, MappedParams, is_assigned, tensors_of_mappings
from lightning_ssd.units.masters import follow_values
from lightning_ssd.units.unit import Unit
from lightning_ssd.units.unit_state import tensors_of


class UserWrites:
    """Brings into the store what was written.

    Args:
        store: Where values are.
        units: All units.
    """

    def __init__(self, store: StateStore, units: Sequence[Unit]) -> None:
        self._store = store
        self._units = units
        self._ties: dict[str, str] = {}  # parameters that were given the memory of another one, and which
        # Memory that was a parameter's, by its first address, while somebody else views it.
        self._left: dict[int, tuple[str, _Place, Any]] = {}
        self._told: set[str] = set()

    # -- inside a step -------------------------------------------------------------------------------------------

    def collect_in_step(self, unit: Unit) -> None:
        """Bring in what was written to ``unit``, which is resident and `Unit.may_be_written`.

        Raises:
            ResidencyError: It was written to while its optimizer updated it, or while it shared memory with another.
            SSDOffloadError: A parameter has another form than it was placed with.
        """
        if unit.device_copy is None:
            return
        tensors = unit.device_copy.tensors
        if unit.is_in_place:  # the device copy is what is in memory; it is updated when it is not resident
            if unit.is_ahead and unit.is_changed():
                self._refuse_late(unit)
            if is_assigned(unit.params, tensors):
                self._put(unit, tensors)
            self._store.drop_file(self._store.newest(unit.name, "param"))
            return
        if unit.is_ahead or unit.is_submitted or unit.is_stale(self._store):
            self._refuse_late(unit)
        masters = tensors_of(self._store, unit, "master")
        self._put(unit, tensors)
        follow_values(self._store, unit, masters)

    @staticmethod
    def _refuse_late(unit: Unit) -> NoReturn:
        unit.is_ahead = unit.is_submitted = False  # said once
        raise ResidencyError(
            f"parameters of unit {unit.name!r} were written to in a step while their optimizer updated them: write to "
            "them before the step's forward, or after optimizer.step(), or set overlap='off' in the strategy"
        )

    # -- outside a step ------------------------------------------------------------------------------------------

    def collect_mapped(self, unit: Unit, mapped: MappedParams | InMemoryParams) -> bool:
        """Bring in what was written to ``unit`` while it was ``mapped``; returns whether there was anything.

        Raises:
            ResidencyError: It was written to while it shared memory with another parameter.
            SSDOffloadError: A parameter has another form than it was placed with.
        """
        with torch._C.DisableTorchFunctionSubclass():  # [Note: values on the host]
            return self._collect_mapped(unit, mapped)

    def _collect_mapped(self, unit: Unit, mapped: MappedParams | InMemoryParams) -> bool:
        was_assigned = mapped.is_assigned(unit.params)
        was_written = mapped.was_written()
        masters = tensors_of(self._store, unit, "master") if was_assigned or was_written else None
        if was_assigned or (was_written and mapped.is_private):
            self._put(unit, mapped.tensors)
        self.leave(unit, mapped.tensors)
        if was_assigned or was_written:
            unit.num_writes += 1
            follow_values(self._store, unit, masters)
        self._store.drop_file(self._store.newest(unit.name, "param"))
        return was_assigned or was_written

    def before_update(self, names: Collection[str]) -> None:
        """Say what an update of parameters will not reach: memory that was theirs and that somebody still views.

        Raises:
            ResidencyError: A parameter was given the memory of another one; an update of one should change both.
        """
        self._require_untied(names)
        left = {name for name, _, storage in self._left.values() if name in names and not storage.expired()}
        for name in sorted(left - self._told):
            self._told.add(name)
            warnings.warn(
                f"a tensor made from parameter {name!r} (such as p.data, p.detach() or p[...]) is still held while the "
                "parameter is updated. In plain Lightning it would show the new values; here it goes on to show the "
                "old ones: take it anew where you use it, or clone it if the old values are meant",
                stacklevel=2,
            )

    def _require_untied(self, names: Collection[str]) -> None:
        """Refuse to change a parameter that was given the memory of another one: both would have to change.

        Raises:
            ResidencyError: Names both.
        """
        for name, other in self._ties.items():
            if name in names or other in names:
                raise ResidencyError(
                    f"parameter {name!r} was given the memory of parameter {other!r} ({name}.data = {other}.data): in "
                    "plain torch a change of one would change both, here each has memory of its own. Copy the values "
                    "(.data.copy_), or make them one parameter (module.weight = other.weight) before the Trainer starts"
                )

    # -- both ----------------------------------------------------------------------------------------------------

    def _put(self, unit: Unit, tensors: Sequence[Tensor]) -> None:
        """Bring the parameters of ``unit`` into the store; before they were written they viewed ``tensors``."""
        for name, param, shape in zip(unit.names, unit.params, unit.shapes, strict=True):
            if tuple(param.shape) != shape.shape or param.dtype != unit.dtype:
                raise SSDOffloadError(
                    f"parameter {name!r} was given data of shape {tuple(param.shape)} and {param.dtype}; it was placed "
                    f"with {shape.shape} and {unit.dtype}: change a parameter's form before the Trainer starts"
                )
        moved = [i for i in range(len(tensors)) if is_assigned(unit.params[i : i + 1], tensors[i : i + 1])]
        self._note_ties(unit, moved)
        before = self._store.newest(unit.name, "param")
        if unit.in_memory is not None:
            unit.in_memory = self._store.replace_in_memory(unit.layout, _memory_of(unit.params, unit.in_memory))
        generation = self._store.put(unit.layout, lambda i: unit.params[i].data)
        generation.lineage = before.lineage  # no update
        if unit.device_copy is None or unit.is_in_place:
            return
        unit.note_stored(generation)
        if not moved:  # what is in memory is what was put
            unit.became(generation)

    def _note_ties(self, unit: Unit, moved: Sequence[int]) -> None:
        """Remember which parameters of ``unit`` share memory with others, now that those in ``moved`` were assigned."""
        names = {unit.names[i] for i in moved}
        self._ties = {a: b for a, b in self._ties.items() if a not in names and b not in names}
        self._require_untied(unit.names)
        if not moved:
            return
        self._left = {address: left for address, left in self._left.items() if left[0] not in names}
        owners = self._owners(except_for=names)
        for i in moved:
            name, place = unit.names[i], _place_of(unit.params[i])
            others = owners.setdefault(place.storage, [])
            tied = next((other for at, other in others if place.overlaps(at)), None)
            if tied is not None:
                self._ties[name] = tied
            others.append((place, name))

    def _owners(self, *, except_for: set[str]) -> dict[int, list[tuple[_Place, str]]]:
        """The parameter that memory is of, or was of as long as somebody else views it, by number of the storage."""
        self._left = {address: left for address, left in self._left.items() if not left[2].expired()}
        owners: dict[int, list[tuple[_Place, str]]] = {}
        for name, at, _ in self._left.values():
            if name not in except_for:
                owners.setdefault(at.storage, []).append((at, name))
        for unit in self._units:
            is_offloaded = unit.device_copy is None and unit.mapped is None
            tensors = (unit.in_memory or ()) if is_offloaded else unit.params
            for name, tensor in zip(unit.names, tensors, strict=bool(tensors)):
                if name not in except_for:
                    place = _place_of(tensor)
                    owners.setdefault(place.storage, []).append((place, name))
        return owners

    def leave(self, unit: Unit, tensors: Sequence[Tensor]) -> None:
        """The parameters of ``unit`` are about to view ``tensors`` no longer; who else does may have them from it."""
        for name, param, tensor in zip(unit.names, unit.params, tensors, strict=bool(tensors)):
            # Who assigns p.data leaves what was there, in plain torch too, and shares what is there now.
            is_moved = is_assigned([param], [tensor])
            shown = param.data if is_moved else tensor
            if not (is_moved and unit.in_memory is not None) and is_held(param, shown):
                self._note_left(name, shown)

    def note_views(self) -> None:
        """All parameters are about to be placed: they leave memory that the user's code may view."""
        known = tensors_of_mappings()
        for unit in self._units:
            for name, param in zip(unit.names, unit.params, strict=True):
                if param.dtype == unit.dtype and is_held(param, param.data, num_known=known[param.data_ptr()]):
                    self._note_left(name, param.data)

    def _note_left(self, name: str, tensor: Tensor) -> None:
        place = _place_of(tensor)
        self._left[place.begin] = name, place, StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


class _Place(NamedTuple):
    """Where the elements of a tensor lie: number of the storage, and the first and last address in bytes."""

    storage: int
    begin: int
    end: int

    def overlaps(self, other: _Place) -> bool:
        return self.storage == other.storage and self.begin < other.end and other.begin < self.end


def _place_of(tensor: Tensor) -> _Place:
    begin = tensor.data_ptr()
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    nbytes = (last + 1) * tensor.itemsize if tensor.numel() else 0
    return _Place(tensor.untyped_storage()._cdata, begin, begin + nbytes)


def _memory_of(params: Sequence[nn.Parameter], before: Sequence[Tensor]) -> list[Tensor]:
    """Where ``params`` are from now on: where they were ``before``, or in the memory that ``p.data`` was assigned.

    That memory becomes the parameter's, as in plain torch, where the user holds it or what was there before: an average
    that is swapped in, and the weights to be swapped back. A part of a larger tensor stays a part of that.
    """

    def place(param: nn.Parameter, tensor: Tensor) -> Tensor:
        data = param.data
        is_same = data.data_ptr() == tensor.data_ptr() or not data.numel()
        is_part = data.untyped_storage().nbytes() != data.nbytes
        if is_same or is_part or not _are_alike(data, tensor) or data.is_inference():
            return tensor
        if data.device != tensor.device:  # the host's memory stays the parameter's, unless the user has it
            return data.to(tensor.device) if is_held(param, tensor) else tensor
        return data if is_held(param, tensor) or is_held(param, data) else tensor

    return [place(param, tensor) for param, tensor in zip(params, before, strict=True)]


def _are_alike(data: Tensor, tensor: Tensor) -> bool:
    """Whether the elements of ``data`` lie in the order that those of ``tensor`` have, without gaps."""
    orders = [memory_order(each.shape, each.stride()) for each in (data, tensor)]
    return is_dense(data.shape, data.stride()) and orders[0] == orders[1]
