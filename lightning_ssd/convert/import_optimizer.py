"""Optimizer records of an imported checkpoint: whose groups, whose hyper-parameters, which state. Reads no tensor.

Hyper-parameters are imported together with the scheduler states that changed them. If the source has no scheduler
states, groups hold names only, and a resumed optimizer keeps the hyper-parameters of ``configure_optimizers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_ssd.checkpoint.manifest import OptimizerRecord
from lightning_ssd.convert.sources import ImportSource
from lightning_ssd.errors import CheckpointError

_ADAM = {"exp_avg", "exp_avg_sq"}  # Lion has the first alone, and no step
_STEP = "step"

ExtraState = list[tuple[int, str, str, Tensor]]
"""Optimizer, parameter, key and tensor of state that has another shape than its parameter."""


def optimizers_for(
    source: ImportSource, like: ImportSource | None, names: Mapping[str, str], step: int | None
) -> tuple[list[OptimizerRecord], ExtraState]:
    """Records of the target.

    Args:
        source: The source of the state.
        like: A checkpoint that the model saved; the target then gets its groups.
        names: Name in the source -> name in the target, of imported parameters.
        step: Number of optimizer steps, for state without a count.

    Raises:
        CheckpointError: If the source's state cannot be given to the groups of an optimizer.
    """
    if not source.optimizers:
        fresh = [] if like is None else like.optimizers
        return [OptimizerRecord(r.class_name, [_bare(g) for g in r.param_groups], {}, []) for r in fresh], []
    if like is not None and len(like.optimizers) != len(source.optimizers):
        raise CheckpointError(
            f"{source.where} has the state of {len(source.optimizers)} optimizer(s), the model's checkpoint of "
            f"{len(like.optimizers)}; import with --weights-only"
        )
    records = []
    for index, record in enumerate(source.optimizers):
        model = None if like is None else like.optimizers[index]
        groups = _groups(record, model, names, source.where)
        if "lr_schedulers" not in source.state:
            groups = [_bare(group) for group in groups]
        state = {names[old]: dict(values) for old, values in record.state.items() if old in names}
        _count_steps(source, record, names, state, step)
        class_name = record.class_name if model is None or record.class_name != "unknown" else model.class_name
        lacking = {names[old]: list(kinds) for old, kinds in record.lacking.items() if names.get(old) in state}
        records.append(OptimizerRecord(class_name, groups, state, list(record.kinds), lacking))
    extra = [
        (index, names[old], key, value)
        for index, states in source.extra_state.items()
        for old, values in states.items()
        if old in names
        for key, value in values.items()
    ]
    return records, extra


def _groups(
    record: OptimizerRecord, model: OptimizerRecord | None, names: Mapping[str, str], where: str
) -> list[dict[str, Any]]:
    """The model's groups, with the source's hyper-parameters if it has as many groups, else with the model's own."""
    if model is None:
        if not record.param_groups:
            raise CheckpointError(
                f"{where} has optimizer state, but does not say which parameters were in which group; name a "
                "checkpoint that the model saved with --like, or import with --weights-only"
            )
        return [{**g, "params": [names[old] for old in g["params"] if old in names]} for g in record.param_groups]
    if len(record.param_groups) != len(model.param_groups):
        return model.param_groups
    pairs = zip(record.param_groups, model.param_groups, strict=True)
    return [{**mine, **theirs, "params": mine["params"]} for theirs, mine in pairs]


def _bare(group: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": group["params"]}


def _count_steps(
    source: ImportSource,
    record: OptimizerRecord,
    names: Mapping[str, str],
    state: dict[str, dict[str, Any]],
    step: int | None,
) -> None:
    """Add the caller's number of steps to moments that the source stores without one."""
    for old, new in names.items():
        if old in record.state and source.parameters[old].keys() >= _ADAM and _STEP not in state[new]:
            if step is None:
                raise CheckpointError(
                    f"{source.where}: {old!r} has Adam's moments without the number of steps they have seen, on which "
                    "their correction depends; name it with --step"
                )
            state[new][_STEP] = float(step)
