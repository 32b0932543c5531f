"""Whether a hook changed the optimizer state that Lightning dumped: then that is saved, not what is in the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


class Dumped:
    """One optimizer's state as it was given to Lightning."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state
        self._seen = list(_items(state))  # holds the values, so that no other can be taken for one of them

    def is_still(self, state: object) -> bool:
        """Whether ``state`` is what was given, with the same values in it."""
        if state is not self._state:
            return False
        now = list(_items(self._state))
        return len(now) == len(self._seen) and all(
            place == old_place and value is old_value and version == old_version
            for (place, value, version), (old_place, old_value, old_version) in zip(now, self._seen, strict=True)
        )


def are_unchanged(dumped: Sequence[Dumped | None], states: object) -> bool:
    """Whether ``states`` of a checkpoint are those that were dumped, or there are none."""
    if states is None:
        return True
    return (
        isinstance(states, list)
        and len(states) == len(dumped)
        and all(each is not None and each.is_still(state) for each, state in zip(dumped, states, strict=True))
    )


def _items(state: dict[str, Any]) -> Iterator[tuple[object, object, int]]:
    """Each value of an optimizer's state dict: where it is, the value, and how often it was written to."""
    for part, content in state.items():
        if part not in ("state", "param_groups"):
            yield part, content, 0
            continue
        entries = content.items() if isinstance(content, dict) else enumerate(content)
        for number, entry in entries:
            for key, value in entry.items():
                is_list = isinstance(value, list)
                yield (part, number, key, tuple(value) if is_list else ()), value, _version(value)


def _version(value: object) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
