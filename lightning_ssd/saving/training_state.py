"""Saves Lightning's dictionary, with units and optimizer state linked from the store, as a checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_ssd.checkpoint.contents import CheckpointContent
from lightning_ssd.checkpoint.dictionary import (
    STATE_DICT_EXTRA,
    STATE_DICT_METADATA,
    STATE_DICT_WHOLE,
    WHOLE_STATES,
)
from lightning_ssd.checkpoint.manifest import OptimizerRecord
from lightning_ssd.checkpoint.state_dict import OPTIMIZER_PREFIX
from lightning_ssd.checkpoint.unit_file import UnitFile
from lightning_ssd.codec.encodings import decoded_kinds, files_with
from lightning_ssd.errors import CheckpointError
from lightning_ssd.optim.adapter import OptimizerAdapter
from lightning_ssd.optim.whole import WholeOptimizer
from lightning_ssd.saving.write import write_checkpoint
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.unit import Unit


class Saver:
    """Saves training states of one run.

    Args:
        store: Has the values of parameters and optimizer state.
    """

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._unsynced: set[str] = set()  # paths of generations; [Note: failed sync]
        self._saved: dict[str, tuple[int, int]] = {}  # path of a checkpoint -> device and inode of its directory

    def save(
        self,
        checkpoint: Mapping[str, Any],
        path: Any,
        *,
        units: Sequence[Unit],
        optimizers: Sequence[OptimizerAdapter],
        is_linked: bool,
        with_file: bool,
    ) -> None:
        """Save Lightning's dictionary, as hooks and callbacks have left it, as links to the store.

        No update is pending, and the store has all values.

        Args:
            checkpoint: Lightning's dictionary.
            path: Of the new file or directory.
            units: The model's.
            optimizers: The adopted ones, in Lightning's order.
            is_linked: The state of the optimizers is linked from the store; else the dictionary's is saved.
            with_file: See `write_checkpoint`.

        Raises:
            CheckpointError: If it could not be saved; a checkpoint of that name is then untouched.
        """
        target = os.path.abspath(os.fspath(path))
        self._warn_if_replaced(target)
        has_optimizers = checkpoint.get("optimizer_states") is not None
        small = _without_linked_states(checkpoint, optimizers) if is_linked else dict(checkpoint)
        weights = _sort(units, small)
        with_state = has_optimizers and is_linked
        records = _records(optimizers, weights.buffers) if with_state else []
        linked = self._generations(units, weights, with_state=with_state, with_masters=has_optimizers)
        content = CheckpointContent(
            list(map(_unit_file, linked)),
            weights.buffers,
            small,
            records,
            step=int(small.get("global_step", 0)),
            dtypes={name: unit.layout.dtype for unit in units if unit.name in weights.units for name in unit.names},
            aliases=weights.aliases,
            names=weights.names,
        )
        write_checkpoint(target, content, with_file=with_file, recycle=self._store.recycle, unsynced=self._unsynced)
        with suppress(OSError):  # it was removed meanwhile
            self._saved[target] = _identity(target)

    def _warn_if_replaced(self, path: str) -> None:
        """Warn if another run saves to the same name: it has replaced our checkpoint, and now we replace its."""
        known = self._saved.get(path)
        if known is not None and os.path.lexists(path) and known != _identity(path):
            warnings.warn(
                f"the checkpoint {path!r} that this run saved has been replaced, by another run it seems, and is now "
                "replaced in turn; give each run a directory of its own for its checkpoints (dirpath)",
                stacklevel=2,
            )

    def _generations(
        self, units: Sequence[Unit], weights: _Weights, *, with_state: bool, with_masters: bool
    ) -> Iterator[Generation]:
        """What is linked: parameters that the state dict has, and the state to continue with."""
        for unit in units:
            wanted = {"param": unit.name in weights.units, "master": with_masters}
            there = self._store.kinds(unit.name)
            files = files_with([kind for kind in decoded_kinds(there) if wanted.get(kind, with_state)], there)
            for kind in there:
                if kind in files:
                    yield self._store.on_disk(self._store.newest(unit.name, kind))


def _without_linked_states(checkpoint: Mapping[str, Any], optimizers: Sequence[OptimizerAdapter]) -> dict[str, Any]:
    """A copy of ``checkpoint`` with only those optimizer states that are not in the store."""
    small = dict(checkpoint)
    if not checkpoint.get("optimizer_states") or not optimizers:  # what is deleted, empty, or of no optimizer stays so
        return small
    states = small.pop("optimizer_states")
    for number, (state, adopted) in enumerate(zip(states, optimizers, strict=False)):
        if isinstance(adopted, WholeOptimizer):
            small.setdefault(WHOLE_STATES, {})[number] = state
    return small


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


@dataclass
class _Weights:
    """A state dict, divided by where its tensors are saved.

    Attributes:
        names: Names of its tensors, in order.
        units: Names of the units of which it has a parameter.
        aliases: Further names of parameters -> the parameter's own name.
        buffers: All other tensors, by name.
    """

    names: list[str] = field(default_factory=list)
    units: set[str] = field(default_factory=set)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def _sort(units: Sequence[Unit], small: dict[str, Any]) -> _Weights:
    """Move the tensors of the state dict out of ``small``; its other values stay there."""
    found = _Weights()
    state = small.pop("state_dict", None)
    if not isinstance(state, Mapping):
        small[STATE_DICT_WHOLE] = [] if state is None else [state]
        return found
    own = {param: (name, unit.name) for unit in units for name, param in zip(unit.names, unit.params, strict=True)}
    by_name = {name: param for param, (name, _) in own.items()}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            small[STATE_DICT_EXTRA] = {**small.get(STATE_DICT_EXTRA, {}), key: value}
            continue
        found.names.append(key)
        name, unit = own.get(value, ("", "")) if isinstance(value, nn.Parameter) else ("", "")
        # An alias is a name of no parameter, for a parameter that is in the state dict by its own name too.
        if name and (name == key or (key not in by_name and state.get(name, value) is value)):
            found.units.add(unit)
            if name != key:
                found.aliases[key] = name
        else:
            found.buffers[key] = value.detach().cpu()
    metadata = getattr(state, "_metadata", None)
    if metadata is not None and any(entry.get("version", 1) != 1 for entry in metadata.values()):
        small[STATE_DICT_METADATA] = dict(metadata)
    return found


def _unit_file(generation: Generation) -> UnitFile:
    layout = generation.layout
    checks = [check for check in generation.checks if check is not None]
    return UnitFile(
        unit=layout.unit,
        kind=layout.kind,
        source=generation.file.path,
        linkable=not generation.is_mapped,
        entries=layout.entries,
        checksums=tuple(checks) if len(checks) == len(generation.checks) else None,
        data_begin=layout.data_begin,
        folder=generation.file.folder,
    )


def _records(optimizers: Sequence[OptimizerAdapter], buffers: dict[str, Tensor]) -> list[OptimizerRecord]:
    records = []
    for number, adopted in enumerate(optimizers):
        initialised = adopted.initialised()
        scalars = adopted.scalars()
        state: dict[str, dict[str, Any]] = {}
        for name in {**initialised, **scalars}:
            state[name] = {}
            for key, value in scalars.get(name, {}).items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    place = f"{OPTIMIZER_PREFIX}{number}.{name}.{key}"
                    if place in buffers:
                        raise CheckpointError(f"the name {place!r} is that of a tensor of the state dict; rename that")
                    buffers[place] = value
                else:
                    state[name][key] = value
        kinds = sorted({kind + adopted.suffix for found in initialised.values() for kind in found})
        lacking = {
            name: [k for k in kinds if k.removesuffix(adopted.suffix) not in initialised.get(name, ())]
            for name in state
        }
        class_name = f"{type(adopted.optimizer).__module__}.{type(adopted.optimizer).__qualname__}"
        records.append(
            OptimizerRecord(
                class_name, adopted.groups_by_name(), state, kinds, {n: ks for n, ks in lacking.items() if ks}
            )
        )
    return records
