"""Which unit is needed next, learned from the step before. Pure bookkeeping on names."""

from __future__ import annotations

from collections.abc import Iterator


class ExecutionOrder:
    """Order of use, one per kind of step. A step that departs from it is learned anew from where it departed."""

    def __init__(self) -> None:
        self._learned: dict[str, list[str]] = {}
        self._key = ""
        self._seen: list[str] = []
        self._position: int | None = None  # of the last use in the learned order, None while off it

    def begin(self, key: str) -> None:
        """A step of kind ``key`` starts; what the step before did becomes the order of its kind."""
        if self._seen:
            self._learned[self._key] = self._seen
        self._key = key
        self._seen = []
        self._position = -1

    def use(self, name: str) -> None:
        """``name`` is needed now."""
        self._seen.append(name)
        order = self._learned.get(self._key, [])
        if self._position is not None and self._position + 1 < len(order) and order[self._position + 1] == name:
            self._position += 1
        else:  # control flow changed: go on from the next place where the order knows the unit
            start = 0 if self._position is None else self._position + 1
            self._position = next((i for i in range(start, len(order)) if order[i] == name), None)

    def upcoming(self) -> Iterator[str]:
        """Units needed after the last one used, soonest first; nothing while the order is not known."""
        if self._position is not None:
            yield from self._learned.get(self._key, [])[self._position + 1 :]

    def following(self) -> Iterator[str]:
        """Units that the next step of the same kind needs, soonest first; nothing while the order is not known."""
        if self._position is not None:
            yield from dict.fromkeys(self._learned.get(self._key, []))

    def position(self, name: str, key: str) -> int:
        """Place of the first use of ``name`` in a step of kind ``key``; after all others if it is not known."""
        order = self._learned.get(key) or self._seen
        return order.index(name) if name in order else len(order)
