"""What the parameters of an optimizer share in a step: the keys of their group.

Every parameter's update gets a copy of its group as it was before the step. What the class changes there, such as
``group["step"] += 1``, goes into the group once, after the step; all parameters must leave the same values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_ssd.errors import SSDOffloadError


class SharedOptions:
    """The hyper-parameters of one optimizer's groups, during a step.

    Args:
        optimizer: Whose ``param_groups``.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._before: dict[int, dict[str, Any]] = {}
        self._handed: dict[int, list[dict[str, Any]]] = {}

    def clear(self) -> None:
        """A step begins, or one that failed is given up."""
        self._before.clear()
        self._handed.clear()

    @property
    def is_used(self) -> bool:
        """Whether the step has begun to update parameters."""
        return bool(self._before)

    def before(self, group: int) -> Mapping[str, Any]:
        """The options of ``group`` before the step."""
        if group not in self._before:
            found = self._optimizer.param_groups[group]
            # Copies: a scheduler may change them before the update has run, a tensor in place.
            self._before[group] = {k: _own(v) for k, v in found.items() if k != "params"}
        return self._before[group]

    def hand_out(self, group: int) -> dict[str, Any]:
        """The options of ``group`` before the step, for one parameter, whose class may change them."""
        options = {key: _own(value) for key, value in self.before(group).items()}
        self._handed.setdefault(group, []).append(options)
        return options

    def unused_groups(self) -> list[int]:
        """Groups of which no parameter was updated."""
        return [group for group in range(len(self._optimizer.param_groups)) if group not in self._handed]

    def finish(self) -> None:
        """The step is over: write the options that the updates left into the groups.

        Raises:
            SSDOffloadError: Two parameters of a group left different values.
        """
        name = type(self._optimizer).__name__
        for group, handed in self._handed.items():
            first = handed[0]
            for other in handed[1:]:
                keys = [key for key in {**first, **other} if not same(first.get(key), other.get(key))]
                if keys:
                    raise SSDOffloadError(
                        f"{name} left {keys[0]!r} of its parameter group {group} as {first.get(keys[0])!r} after one "
                        f"parameter and as {other.get(keys[0])!r} after another: it does not treat each parameter by "
                        "itself as it did when it was tried at setup; use another optimizer, or another strategy"
                    )
            self._write_back(group, first)
        self.clear()

    def _write_back(self, group: int, after: dict[str, Any]) -> None:
        before, target = self._before[group], self._optimizer.param_groups[group]
        for key, value in after.items():
            if key in before and same(value, before[key]):
                continue
            if isinstance(value, Tensor) and isinstance(target.get(key), Tensor) and target[key].shape == value.shape:
                target[key].copy_(value)  # the user may hold this tensor
            else:
                target[key] = value
        for key in before.keys() - after.keys():
            target.pop(key, None)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal to the bit, NaN included; two objects of a class without equality, by attributes."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and bool(((one == other) | ((one != one) & (other != other))).all())
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    has_equality = "__eq__" in {name for cls in type(one).__mro__[:-1] for name in vars(cls)}
    if not has_equality and hasattr(one, "__dict__"):
        return same(vars(one), vars(other))
    return bool(one == other)


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return deepcopy(value) if isinstance(value, (list, dict, set)) else value
