"""In which order a step needs the units: learned from an earlier step of the same kind. Pure bookkeeping on names.

FSDP2 records its ``post_forward_order`` and DeepSpeed ZeRO-3 its trace for the same reason: to prefetch.
"""

from __future__ import annotations

from collections.abc import Iterator

MAX_SHORT_STEPS = 3
"""So many steps in a row that stop early, all at the same place, are the order; fewer were skipped, or failed."""


class ExecutionOrder:
    """The order of use, one per kind of step.

    A step that departs from the learned order replaces it. A step that only stops early, since it failed or the user
    skipped its backward, does not: the next one is prefetched for as before.
    """

    def __init__(self) -> None:
        self._learned: dict[str, list[str]] = {}
        self._num_short: dict[str, tuple[int, int]] = {}  # length of the short steps, and how many came in a row
        self._key = ""
        self._seen: list[str] = []
        self._position: int | None = None  # of the last use in the learned order; None while off it

    def begin(self, key: str) -> None:
        """A step of kind ``key`` begins; the one before it is over, and is learned from."""
        if self._seen:
            self._learn(self._key, self._seen)
        self._key = key
        self._seen = []
        self._position = -1

    def _learn(self, key: str, seen: list[str]) -> None:
        order = self._learned.get(key, [])
        if len(seen) < len(order) and order[: len(seen)] == seen:
            length, num_short = self._num_short.get(key, (0, 0))
            num_short = num_short + 1 if length == len(seen) else 1
            if num_short < MAX_SHORT_STEPS:
                self._num_short[key] = len(seen), num_short
                return
        self._learned[key] = seen
        self._num_short.pop(key, None)

    def use(self, name: str) -> None:
        """``name`` is needed now."""
        self._seen.append(name)
        order = self._learned.get(self._key, [])
        if self._position is not None and self._position + 1 < len(order) and order[self._position + 1] == name:
            self._position += 1
        else:  # control flow changed: go on from the next place where the order has the unit
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
        """Index of the first use of ``name`` in a step of kind ``key``; after all others if it is not known."""
        order = self._learned.get(key) or self._seen
        return order.index(name) if name in order else len(order)
