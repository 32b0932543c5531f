"""The master and the optimizer state of a unit as values, whatever form its files have.

Kinds are called here what they are: ``master``, ``exp_avg``, ... Which files have them, the unit's form says
(`codec.forms`), and what there is in the store. Files that a run finds are decoded by `codec.encodings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_ssd.codec.encodings import BY_BLOCK, decoded_kinds, encoding_of
from lightning_ssd.codec.forms import Form
from lightning_ssd.store.decoded import DecodedTensor, decoded, values_of
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.mapped import MappedParams, snapshot
from lightning_ssd.units.unit import Unit

Values = Callable[[int], Tensor | None]
"""Gives the values of each parameter of a unit, by its index; None stands for zeros."""


def kinds_of(store: StateStore, unit: Unit) -> list[str]:
    """The kinds of which ``unit`` has values, ``param`` among them."""
    return list(dict.fromkeys(decoded_kinds(store.kinds(unit.name))))


def state_kinds_of(store: StateStore, unit: Unit) -> list[str]:
    """Those that are optimizer states."""
    return [kind for kind in kinds_of(store, unit) if kind not in ("param", "master")]


def tensors_of(store: StateStore, unit: Unit, kind: str) -> tuple[Tensor, ...] | None:
    """The values of a kind, one tensor per parameter, mapped or decoded when they are used; None if there are none.

    They stay what they are now. What is written to them goes nowhere.
    """
    encoding = encoding_of(kind, store.kinds(unit.name))
    if encoding is None:
        generation = store.current(unit.name, kind)
        return None if generation is None else snapshot(store, generation)
    parts = _snapshots(store, unit, encoding.parts)
    return tuple(
        decoded(encoding, {part: tensors[i] for part, tensors in parts.items()}, shape.shape)
        for i, shape in enumerate(unit.shapes)
    )


def put(store: StateStore, unit: Unit, kind: str, source: Values) -> None:
    """Write the values of a kind; those of a master round to the parameters.

    Raises:
        CheckpointError: The unit's form cannot keep them.
        StoreError: The disk is full.
        IOFailure: The disk failed.
    """
    form, files = unit.form, unit.form.files(kind)
    if form.is_plain or files == (kind,):
        store.put(unit.layout_of(kind), lambda i: _plain(source(i)))
        return
    before = _snapshots(store, unit, files)
    for file in files:
        store.put(unit.layout_of(file), _Encoded(form, kind, file, unit, source, before).tensor)


def forget(store: StateStore, unit: Unit, kinds: Iterable[str]) -> None:
    """Drop optimizer states, as if they had never been written; the master stays."""
    gone = {file for kind in kinds for file in unit.form.files(kind)} & set(store.kinds(unit.name))
    is_shared = not gone.isdisjoint(unit.form.files("master"))
    masters = tensors_of(store, unit, "master") if is_shared else None
    for file in sorted(gone):
        store.forget(unit.name, file)
    if masters is not None:
        put(store, unit, "master", masters.__getitem__)


def change_form(store: StateStore, unit: Unit, form: Form) -> None:
    """Give the files of ``unit`` another form; they keep their values.

    Raises:
        CheckpointError: The form cannot keep them.
        StoreError: The disk is full.
        IOFailure: The disk failed.
    """
    old, unit.form = unit.form, form
    changed = [k for k in kinds_of(store, unit) if k != "param" and old.files(k) != form.files(k)]
    values = {kind: tensors_of(store, unit, kind) for kind in changed}
    for kind, tensors in values.items():
        if tensors is not None:
            put(store, unit, kind, tensors.__getitem__)
    written = {file for kind in kinds_of(store, unit) for file in form.files(kind)}
    for file in {file for kind in changed for file in old.files(kind)} - written:
        store.forget(unit.name, file)


class ShownState:
    """The values of a kind of a unit, to be looked at and written to.

    Attributes:
        tensors: One per parameter, in file order.
    """

    def __init__(self, store: StateStore, unit: Unit, kind: str) -> None:
        is_encoded = encoding_of(kind, store.kinds(unit.name)) is not None
        self._mapped = None if is_encoded else MappedParams(store, store.newest(unit.name, kind))
        found = tensors_of(store, unit, kind) if self._mapped is None else self._mapped.tensors
        self.tensors: tuple[Tensor, ...] = found or ()

    def was_written(self) -> bool:
        """Whether somebody wrote to the tensors."""
        if self._mapped is not None:
            return self._mapped.was_written()
        return any(isinstance(tensor, DecodedTensor) and tensor.was_written for tensor in self.tensors)


class _Encoded:
    """What is written to one file of a kind, asked for one parameter at a time."""

    def __init__(
        self,
        form: Form,
        kind: str,
        file: str,
        unit: Unit,
        source: Values,
        before: Mapping[str, Sequence[Tensor]],
    ) -> None:
        self._form = form
        self._kind = kind
        self._file = file
        self._unit = unit
        self._source = source
        self._before = before

    def tensor(self, index: int) -> Tensor:
        value, entry = _plain(self._source(index)), self._unit.layout.entries[index]
        if value is None:
            value = torch.zeros(entry.shape)
        # In the order of the files: a block is 128 elements of these.
        stored = {f: t[index] if f in BY_BLOCK else entry.flatten(t[index]) for f, t in self._before.items()}
        found = self._form.encode(self._kind, entry.flatten(value.detach().cpu()), stored)[self._file]
        return found if self._file in BY_BLOCK else entry.unflatten(found)


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else values_of(tensor)


def _snapshots(store: StateStore, unit: Unit, files: Iterable[str]) -> dict[str, tuple[Tensor, ...]]:
    there: dict[str, Generation | None] = {file: store.current(unit.name, file) for file in files}
    return {file: snapshot(store, generation) for file, generation in there.items() if generation is not None}
