"""Converts between Lightning's checkpoint dictionary and a checkpoint directory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_ssd.checkpoint.directory import is_checkpoint
from lightning_ssd.checkpoint.directory import remove as remove
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.manifest import OptimizerRecord
from lightning_ssd.checkpoint.mapped import SeenFiles
from lightning_ssd.checkpoint.save import write_checkpoint
from lightning_ssd.checkpoint.state_dict import (
    OPTIMIZER_PREFIX,
    STATE_DICT_EXTRA,
    STATE_DICT_METADATA,
    STATE_DICT_WHOLE,
    StateDictView,
    join_state_dict,
)
from lightning_ssd.checkpoint.unit_file import UnitFile
from lightning_ssd.codec import float32
from lightning_ssd.convert.export import WHOLE_STATES, optimizer_states
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.deadline import within
from lightning_ssd.optim.whole import WholeOptimizer
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.torch_file import load_pickle
from lightning_ssd.strategy.session import Session
from lightning_ssd.units.masters import master_of

MASTERS = "ssd_offload_masters"
"""Key under which an opened checkpoint carries float32 masters of 16-bit parameters, by parameter name."""


NAMES = "ssd_offload_parameter_names"
"""Key under which an opened checkpoint carries, for each optimizer, the names of each group's parameters."""


def state_dict(module: nn.Module) -> dict[str, Any]:
    """The module's state dict with the parameters themselves in it, so that none is read.

    If the module overrides ``state_dict`` without ``keep_vars``, it is called without; then parameters are mapped.
    """
    try:
        return module.state_dict(keep_vars=True)
    except TypeError:
        return module.state_dict()


def to_checkpoint(session: Session, checkpoint: dict[str, Any], path: Any, *, streams: bool) -> None:
    """Save Lightning's dictionary, as hooks and callbacks have left it, as a checkpoint directory.

    Args:
        session: Has the values of parameters and optimizer state.
        checkpoint: Lightning's dictionary.
        path: Of the new directory.
        streams: ``optimizer_states`` are unchanged: the state is linked from the store; else the dictionary's is saved.

    Raises:
        CheckpointError: If it could not be saved; a checkpoint of that name is then untouched.
    """
    session.require_own("a checkpoint cannot be saved")
    if any(adopted.is_mid_step for adopted in session.optimizers):
        raise CheckpointError(
            "the optimizer step that failed had already updated a part of the model, so the model is not saved; resume "
            "from the last checkpoint"
        )
    name = os.path.abspath(os.fspath(path))
    _warn_if_replaced(session, name)
    has_optimizers = checkpoint.get("optimizer_states") is not None
    small = _without_linked_states(session, checkpoint) if streams else dict(checkpoint)
    with session.settled():
        weights = _sort(session, small)
        kinds = _kinds(session, weights, with_state=has_optimizers and streams, with_masters=has_optimizers)
        files = [_unit_file(session.store.on_disk(generation)) for generation in _generations(session, kinds)]
        records = _records(session, weights.buffers) if has_optimizers and streams else []
        with within(session.engine.patience):
            done = write_checkpoint(
                os.fspath(path),
                files,
                weights.buffers,
                small,
                records,
                step=int(small.get("global_step", 0)),
                codec=float32.NAME,
                dtypes={n: u.layout.dtype for u in session.units if "param" in kinds[u.name] for n in u.names},
                aliases=weights.aliases,
                names=weights.names,
                recycle=session.store.recycle,
                unsynced=session.store.unsynced,
            )
    with suppress(OSError):  # it was removed meanwhile
        session.store.saved[name] = _identity(path)
    if done.moved_aside is not None:
        warnings.warn(f"a file had the checkpoint's name and is now {done.moved_aside!r}", stacklevel=2)


def _without_linked_states(session: Session, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``checkpoint`` with only those optimizer states that are not in the store."""
    small = dict(checkpoint)
    states = small.pop("optimizer_states", None) or ()
    for number, (state, adopted) in enumerate(zip(states, session.optimizers, strict=False)):
        if isinstance(adopted, WholeOptimizer):
            small.setdefault(WHOLE_STATES, {})[number] = state
    return small


def _warn_if_replaced(session: Session, path: str) -> None:
    """Warn if another run saves to the same name: it has replaced our checkpoint, and now we replace its."""
    known = session.store.saved.get(path)
    if known is not None and is_checkpoint(path) and known != _identity(path):
        warnings.warn(
            f"the checkpoint {path!r} that this run saved has been replaced, by another run it seems, and is now "
            "replaced in turn; give each run a directory of its own for its checkpoints (dirpath)",
            stacklevel=2,
        )


def _identity(path: Any) -> tuple[int, int]:
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


def _sort(session: Session, small: dict[str, Any]) -> _Weights:
    """Move the tensors of the state dict out of ``small``; its other values stay there."""
    found = _Weights()
    state = small.pop("state_dict", None)
    if not isinstance(state, Mapping):
        small[STATE_DICT_WHOLE] = [] if state is None else [state]
        return found
    own = {
        param: (name, unit.name) for unit in session.units for name, param in zip(unit.names, unit.params, strict=True)
    }
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


def load(path: Any, weights_only: bool | None) -> tuple[dict[str, Any], SeenFiles]:
    """Open a checkpoint directory, or a plain ``.ckpt``, as Lightning's dictionary with mapped tensors.

    All checksums of a directory are compared first. When all values have been used, the `SeenFiles` that is returned
    tells whether the files are still unchanged.

    Raises:
        CheckpointError: If it is incomplete or malformed.
        CorruptionError: If a byte differs from what was saved; names file, parameter and offset.
    """
    name = os.path.abspath(os.fspath(path))
    if not is_checkpoint(name):
        if os.path.isdir(name):
            raise CheckpointError(
                f"{name!r} is a directory without a manifest: no checkpoint of strategy='ssd_offload', or one whose "
                "saving was interrupted"
            )
        return load_pickle(name, name, weights_only is not False), SeenFiles({})
    with CheckpointReader(name) as reader:  # mapped tensors outlive it
        reader.verify()
        checkpoint = reader.state(weights_only)
        join_state_dict(checkpoint, StateDictView(reader, weights_only))
        records = reader.optimizers(weights_only)
        own = checkpoint.pop(WHOLE_STATES, {})
        if "optimizer_states" not in checkpoint and (records or "lr_schedulers" in checkpoint):
            checkpoint["optimizer_states"] = [
                own.get(index, state) for index, state in enumerate(optimizer_states(reader, weights_only))
            ]
            checkpoint[NAMES] = [[list(group["params"]) for group in record.param_groups] for record in records]
        names = [n for n in reader.parameter_names if "master" in reader.kinds(n)]
        checkpoint[MASTERS] = {n: reader.tensor(n, "master") for n in names}
        return checkpoint, reader.seen()


def with_masters(module: nn.Module, weights: Mapping[str, Any], masters: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """``weights`` with masters in place of the 16-bit values made from them, where ``module`` has float32.

    A value that was changed since it was rounded from its master stays; [Note: masters and values].
    """
    found: dict[str, Tensor] = {}
    params = dict(module.named_parameters())
    for name, master in masters.items():
        value, param = weights.get(name), params.get(name)
        if not isinstance(value, Tensor) or param is None:
            continue
        if value.dtype.itemsize < 4 <= param.dtype.itemsize and value.shape == master.shape:
            found[name] = master_of(value, master)
    if not found:
        return weights
    joined = copy(weights)  # with its versions
    joined.update(found)  # type: ignore[attr-defined]
    return joined


def _kinds(session: Session, weights: _Weights, *, with_state: bool, with_masters: bool) -> dict[str, list[str]]:
    """The kinds that are saved of each unit: the parameter if the state dict has it, and the state to continue with."""
    found: dict[str, list[str]] = {}
    for unit in session.units:
        wanted = {"param": unit.name in weights.units, "master": with_masters}
        found[unit.name] = [kind for kind in session.store.kinds(unit.name) if wanted.get(kind, with_state)]
    return found


def _generations(session: Session, kinds: Mapping[str, list[str]]) -> Iterator[Generation]:
    for unit, its_kinds in kinds.items():
        for kind in its_kinds:
            generation = session.store.current(unit, kind)
            if generation is not None:
                yield generation


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


def _records(session: Session, buffers: dict[str, Tensor]) -> list[OptimizerRecord]:
    records = []
    for number, adopted in enumerate(session.optimizers):
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
