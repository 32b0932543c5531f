"""Which parameter an optimizer's state number belongs to. Pure: names and shapes in, names out.

``torch.optim`` saves states by number. The numbers run through the groups, and inside a group almost always through the
module in order; where that leaves no choice, the names follow. If two of equal shape were exchanged by a group in
another order, loading exchanges them back: it goes by the same numbers.

Where names were saved, as in our checkpoints, states go by name, whatever the numbers: `in_order_of`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from lightning_ssd.errors import CheckpointError, OptimizerStateError, listed

Shape = tuple[int, ...]

_BUFFERS = (".running_mean", ".running_var")
"""Ends of the names of torch's own floating-point buffers, which no optimizer has."""


def optimizer_from_torch(
    content: Mapping[str, Any], shapes: Mapping[str, Shape], where: str
) -> tuple[list[dict[str, Any]], dict[str, Mapping[str, Any]]]:
    """Groups, and states by parameter name, of what ``Optimizer.state_dict`` gave.

    Args:
        content: ``state`` and ``param_groups``.
        shapes: Names and shapes of the floating-point tensors that the module saved, in its order.
        where: What messages call the optimizer.

    Raises:
        CheckpointError: If it is of another form, or the names do not follow from order and shapes.
    """
    groups, state = content.get("param_groups"), content.get("state")
    if (
        not isinstance(groups, list)
        or not isinstance(state, Mapping)
        or not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    ):
        raise CheckpointError(f"{where} is not what torch.optim saves")
    numbers = [number for group in groups for number in group["params"]]
    candidates = {name: shape for name, shape in shapes.items() if not name.endswith(_BUFFERS)}
    names = _names(groups, numbers, state, candidates)
    if names is None or not set(names) <= set(shapes):
        raise CheckpointError(
            f"{where}: it has {len(numbers)} parameters in {len(groups)} group(s) and no names, and which of the "
            f"{len(candidates)} tensors they are does not follow from order and shapes; import with --weights-only, or "
            "save it again with an optimizer made from named_parameters()"
        )
    name_of = dict(zip(numbers, names, strict=True))
    by_name = [_group(group, [name_of[number] for number in group["params"]]) for group in groups]
    return by_name, {name_of[number]: values for number, values in state.items() if number in name_of}


def in_order_of(
    content: Mapping[str, Any], saved: Sequence[Sequence[str]], shapes: Sequence[Mapping[str, Shape]], where: str
) -> tuple[dict[str, Any], list[str]]:
    """What ``Optimizer.state_dict`` gave, arranged for an optimizer whose groups hold the parameters otherwise.

    A parameter keeps its state wherever it is now. Groups keep their hyper-parameters by their place. Parameters
    without a namesake (the model renames them) go by their place among those, if their shapes fit.

    Args:
        content: ``state`` and ``param_groups``.
        saved: Names of the parameters, group by group, in the order of the numbers in ``content``.
        shapes: Name and shape of the parameters as they are now, group by group.
        where: What messages call the optimizer.

    Returns:
        The content, numbers in the order of ``shapes``; and sentences about what was not where it had been.

    Raises:
        OptimizerStateError: If there are more or fewer groups, or parameters without state that was saved for them, or
            the other way round.
    """
    if len(saved) != len(shapes):
        raise OptimizerStateError(
            f"{where}: the checkpoint has {len(saved)} parameter group(s), configure_optimizers made {len(shapes)}; it "
            "must make as many as when the checkpoint was saved, or import it with lightning-ssd import --like"
        )
    groups = content["param_groups"]
    numbers = (number for group in groups for number in group["params"])
    number_of = dict(zip(chain.from_iterable(saved), numbers, strict=True))
    group_of = {name: index for index, names in enumerate(saved) for name in names}
    now = set(chain.from_iterable(shapes))
    notes: list[str] = []
    for index, (names, here) in enumerate(zip(saved, shapes, strict=True)):
        new, gone = [n for n in here if n not in number_of], [n for n in names if n not in now]
        if new or gone:
            _take_places(gone, new, number_of, content["state"], here, f"{where}, group {index}")
            notes.append(f"group {index}: {listed(new)} took the state of {listed(gone)}, by their place")
        moved = [n for n in here if group_of.get(n, index) != index]
        if moved:
            notes.append(f"group {index}: {listed(moved)} were in another group, and have this one's hyper-parameters")
    arranged = [_group(group, [number_of[name] for name in here]) for group, here in zip(groups, shapes, strict=True)]
    return {**content, "param_groups": arranged}, notes


def _take_places(
    gone: Sequence[str],
    new: Sequence[str],
    number_of: dict[str, Any],
    state: Mapping[Any, Any],
    shapes: Mapping[str, Shape],
    where: str,
) -> None:
    """Give each new name the number of the one that is gone in its place, if they fit."""
    pairs = list(zip(gone, new, strict=False))
    fit = all(_fits(state.get(number_of[old]), shapes[name]) for old, name in pairs)
    if len(new) != len(gone) or not fit:
        raise OptimizerStateError(
            f"{where}: parameters {listed(new)} of the model are not in the checkpoint, and {listed(gone)} of the "
            "checkpoint are not in the model or not in this optimizer; bring it to the model with lightning-ssd import "
            "--map (renamed) or --like ... --partial (added, left out)"
        )
    number_of.update((name, number_of[old]) for old, name in pairs)


def _group(group: Mapping[str, Any], params: list[Any]) -> dict[str, Any]:
    """``group`` with other ``params``, and without their names."""
    return {**{key: value for key, value in group.items() if key != "param_names"}, "params": params}


def _names(
    groups: list[Any], numbers: list[Any], state: Mapping[Any, Any], candidates: Mapping[str, Shape]
) -> list[str] | None:
    if all(isinstance(number, str) for number in numbers):
        return numbers
    if all(isinstance(g.get("param_names"), list) and len(g["param_names"]) == len(g["params"]) for g in groups):
        return [str(name) for group in groups for name in group["param_names"]]
    if len(groups) == 1 and len(numbers) == len(candidates):
        pairs = zip(numbers, candidates.values(), strict=True)
        if all(_fits(state.get(number), shape) for number, shape in pairs):
            return list(candidates)
    known = {number: _shape_of(values) for number, values in state.items()}
    return _by_shape(groups, known, candidates)


def _by_shape(
    groups: list[Any], known: Mapping[Any, Shape | None], candidates: Mapping[str, Shape]
) -> list[str] | None:
    """All tensors of a shape in one group: then they are there in order."""
    names: dict[Shape, list[str]] = defaultdict(list)
    for name, shape in candidates.items():
        names[shape].append(name)
    places: dict[Shape | None, list[tuple[int, Any]]] = defaultdict(list)
    for index, group in enumerate(groups):
        for number in group["params"]:
            places[known.get(number)].append((index, number))
    found: dict[Any, str] = {}
    for known_shape, at in places.items():
        fitting = [] if known_shape is None else names[known_shape]
        if len(at) != len(fitting) or len({index for index, _ in at}) > 1:
            return None
        found.update(zip((number for _, number in at), fitting, strict=True))
    return [found[number] for group in groups for number in group["params"]]


def _fits(values: object, shape: Shape) -> bool:
    """Whether a parameter of that shape may have this state: its shape is there, or only less (rows, columns)."""
    tensors = _tensors(values)
    return any(tuple(t.shape) == shape for t in tensors) or all(t.numel() < math.prod(shape) for t in tensors)


def _shape_of(values: object) -> Shape | None:
    """Shape of a parameter as far as its state shows it: that of its largest tensor."""
    tensors = _tensors(values)
    return tuple(max(tensors, key=Tensor.numel).shape) if tensors else None


def _tensors(values: object) -> list[Tensor]:
    found = values.values() if isinstance(values, Mapping) else ()
    return [value for value in found if isinstance(value, Tensor) and value.dim()]
