"""Between Lightning's checkpoint dictionary and a checkpoint directory."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssd.checkpoint import save as saving
from lightning_ssd.checkpoint.directory import is_checkpoint
from lightning_ssd.checkpoint.directory import remove as remove
from lightning_ssd.checkpoint.export import WHOLE_STATES, optimizer_state
from lightning_ssd.checkpoint.load import CheckpointReader, load_pickle
from lightning_ssd.checkpoint.manifest import OptimizerRecord, UnitFile
from lightning_ssd.checkpoint.progress import LogProgress
from lightning_ssd.checkpoint.state_dict import STATE_DICT_EXTRA, StateDictView, split_rest
from lightning_ssd.codec import float32
from lightning_ssd.errors import CheckpointError
from lightning_ssd.optim.whole import WholeOptimizer
from lightning_ssd.store.generation import Generation
from lightning_ssd.strategy.session import Session
from lightning_ssd.streaming.unit import Unit

MASTERS = "ssd_offload_masters"
"""Key under which an opened checkpoint carries float32 masters of 16-bit parameters, by parameter name."""


NAMES = "ssd_offload_parameter_names"
"""Key under which an opened checkpoint carries, for each optimizer, the names of each group's parameters."""


def state_dict(module: nn.Module) -> dict[str, Any]:
    """The module's state dict with the parameters themselves in it, so that no value is read to make it.

    A module whose own ``state_dict`` takes no ``keep_vars`` is asked plainly; that maps the parameters' files.
    """
    try:
        return dict(module.state_dict(keep_vars=True))
    except TypeError:
        return dict(module.state_dict())


def save(session: Session, checkpoint: dict[str, Any], path: Any, logger: logging.Logger) -> None:
    """Save what Lightning dumped as a checkpoint directory; ``logger`` is told how far a copy to another disk is.

    Raises:
        CheckpointError: If it could not be saved; what was there before is untouched.
    """
    if any(adopted.is_mid_step for adopted in session.optimizers):
        raise CheckpointError(
            "the optimizer step that failed had updated a part of the model already, so its state is of no step and is "
            "not saved; resume from the last checkpoint"
        )
    _warn_if_replaced(session, os.path.abspath(os.fspath(path)))
    small = dict(checkpoint)
    tensors: Mapping[str, Any] = small.pop("state_dict")
    states = small.pop("optimizer_states", None)
    has_optimizers = states is not None
    for number, state in enumerate(states or ()):
        if number < len(session.optimizers) and isinstance(session.optimizers[number], WholeOptimizer):
            small.setdefault(WHOLE_STATES, {})[number] = state
    places = {param: (unit, i) for unit in session.units for i, param in enumerate(unit.params)}
    with session.settled():
        rest: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        units: dict[str, Unit] = {}
        for name, value in tensors.items():
            if isinstance(value, nn.Parameter) and value in places:
                unit, index = places[value]
                units[unit.name] = unit
                if name != unit.names[index]:
                    aliases[name] = unit.names[index]
            elif isinstance(value, Tensor):
                rest[name] = value.detach().cpu()
            else:
                small.setdefault(STATE_DICT_EXTRA, {})[name] = value
        files = [_unit_file(g) for g in _generations(session, units, with_state=has_optimizers)]
        records = _records(session, rest) if has_optimizers else []
        dtypes = {n: unit.layout.dtype for unit in units.values() for n in unit.names}
        step = int(small.get("global_step", 0))
        done = saving.save(
            os.fspath(path),
            files,
            rest,
            small,
            records,
            step=step,
            codec=float32.NAME,
            dtypes=dtypes,
            aliases=aliases,
            recycle=session.store.recycle,
            unsynced=session.store.unsynced,
            progress=LogProgress(logger, f"saving {os.fspath(path)}"),
        )
    with suppress(OSError):  # somebody was quick to remove it
        session.store.saved[os.path.abspath(os.fspath(path))] = _identity(path)
    if done.moved_aside is not None:
        warnings.warn(f"a file had the checkpoint's name and is now {done.moved_aside!r}", stacklevel=2)


def _warn_if_replaced(session: Session, path: str) -> None:
    """Say that another run saves to the same name: what this one saved there is gone, and now the other's goes."""
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


def load(path: Any, weights_only: bool | None) -> dict[str, Any]:
    """Open a checkpoint directory, or a plain ``.ckpt``, as Lightning's dictionary with mapped tensors.

    A directory is read once to compare its checksums before anything is used.

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
        return load_pickle(name, name, weights_only is not False)
    with CheckpointReader(name) as reader:  # mapped tensors outlive it
        reader.verify()
        checkpoint = reader.state(weights_only)
        checkpoint["state_dict"] = {**dict(StateDictView(reader)), **checkpoint.pop(STATE_DICT_EXTRA, {})}
        _, odd = split_rest(reader)
        records = reader.optimizers(weights_only)
        if records or "lr_schedulers" in checkpoint:
            own = checkpoint.pop(WHOLE_STATES, {})
            checkpoint["optimizer_states"] = [
                own.get(i, optimizer_state(record, _full(reader, record), odd.get(i, {})))
                for i, record in enumerate(records)
            ]
            checkpoint[NAMES] = [[list(group["params"]) for group in record.param_groups] for record in records]
        names = [n for n in reader.parameter_names if "master" in reader.kinds(n)]
        checkpoint[MASTERS] = {n: reader.tensor(n, "master") for n in names}
    return checkpoint


def with_masters(module: nn.Module, weights: Mapping[str, Any], masters: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """``weights`` with masters in place of the 16-bit values made from them, where ``module`` has float32.

    A value that somebody has changed since, or that is the master of nothing here, stays.
    """
    found: dict[str, Tensor] = {}
    params = dict(module.named_parameters())
    for name, master in masters.items():
        value, param = weights.get(name), params.get(name)
        is_narrow = isinstance(value, Tensor) and value.dtype != torch.float32
        if is_narrow and param is not None and param.dtype == torch.float32 and _is_rounded(value, master):
            found[name] = master
    return {**weights, **found} if found else weights


def _is_rounded(value: Any, master: Tensor) -> bool:
    return torch.equal(master.to(value.dtype), value)


def _full(reader: CheckpointReader, record: OptimizerRecord) -> Any:
    def full(name: str, kind: str) -> Tensor:
        if name not in record.state or kind not in reader.kinds(name):
            raise KeyError(name)
        return reader.tensor(name, kind)

    return full


def _generations(session: Session, units: Mapping[str, Unit], *, with_state: bool) -> Iterator[Generation]:
    for unit in session.units:
        if unit.name in units:
            for kind in session.store.kinds(unit.name):
                generation = session.store.current(unit.name, kind)
                if generation is not None and (with_state or kind == "param"):
                    yield session.store.on_disk(generation)


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


def _records(session: Session, rest: dict[str, Tensor]) -> list[OptimizerRecord]:
    records = []
    for number, adopted in enumerate(session.optimizers):
        initialised = adopted.initialised()
        scalars = adopted.scalars()
        state: dict[str, dict[str, Any]] = {}
        for name in {**initialised, **scalars}:
            state[name] = {}
            for key, value in scalars.get(name, {}).items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    rest[f"optimizer.{number}.{name}.{key}"] = value
                else:
                    state[name][key] = value
        kinds = sorted({kind + adopted.suffix for found in initialised.values() for kind in found})
        class_name = f"{type(adopted.optimizer).__module__}.{type(adopted.optimizer).__qualname__}"
        records.append(OptimizerRecord(class_name, adopted.groups_by_name(), state, kinds))
    return records
