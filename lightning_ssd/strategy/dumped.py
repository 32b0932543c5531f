"""Whether a hook changed an optimizer's state dict after Lightning took it: then the dict is saved, not the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


class Dumped:
    """One optimizer's state dict as it was given to Lightning."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state
        self._seen = list(_items(state))  # keeps the values alive, so that none of their ids is used again

    def is_still(self, state: object) -> bool:
        """Whether ``state`` is the dict that was given, with the same unmodified values in it."""
        if state is not self._state:
            return False
        now = list(_items(self._state))
        return len(now) == len(self._seen) and all(
            place == old_place and value is old_value and version == old_version
            for (place, value, version), (old_place, old_value, old_version) in zip(now, self._seen, strict=True)
        )


def are_unchanged(dumped: Sequence[Dumped | None], states: object) -> bool:
    """Whether the checkpoint's ``states`` are the dumped ones, unchanged, or there are none."""
    if states is None:
        return True
    return (
        isinstance(states, list)
        and len(states) == len(dumped)
        and all(each is not None and each.is_still(state) for each, state in zip(dumped, states, strict=True))
    )


def _items(state: dict[str, Any]) -> Iterator[tuple[object, object, int]]:
    """Each value of an optimizer's state dict: its path, the value, and its version counter."""
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
