"""Whether a hook changed an optimizer's state dict after Lightning took it: then the dict is saved, not the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten


class Dumped:
    """One optimizer's state dict as it was given to Lightning."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state
        self._values, self._form = tree_flatten(state)  # the values stay alive, so that nothing else has their ids
        self._versions = list(map(_version, self._values))

    def is_still(self, state: object) -> bool:
        """Whether ``state`` is the dict that was given, with the same unmodified values in it."""
        if state is not self._state:
            return False
        values, form = tree_flatten(state)
        is_same = form == self._form and all(now is then for now, then in zip(values, self._values, strict=True))
        return is_same and list(map(_version, values)) == self._versions


def are_unchanged(dumped: Sequence[Dumped | None], states: object) -> bool:
    """Whether the checkpoint's ``states`` are the dumped ones, unchanged, or there are none."""
    if states is None:
        return True
    return (
        isinstance(states, list)
        and len(states) == len(dumped)
        and all(each is not None and each.is_still(state) for each, state in zip(dumped, states, strict=True))
    )


def _version(value: object) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
