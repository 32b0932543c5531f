"""Values that the user changes inside a step: weights clipped in ``training_step``, a mask that is multiplied in.

[Note: in a step, written] Bytes in memory are thrown away when a unit is released, so a change to them would be lost
without a word. Units that code outside their own modules can reach are checked: those of which a parameter at rest was
used, and small ones that stay for the whole step. Their content is summed up when they can be reached first and again
before they go. ``p.data`` has no version that would tell, so the bytes themselves are compared.
"""

from __future__ import annotations

from lightning_ssd.streaming.content import content
from lightning_ssd.streaming.unit import Unit


class Reachable:
    """What resident units held when the user's code could first write to them."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, ...]] = {}

    def note(self, unit: Unit) -> None:
        """From now on ``unit``, which is resident, may be written to."""
        if unit.name not in self._seen:
            self._seen[unit.name] = content(unit.params)

    def is_written(self, unit: Unit) -> bool:
        """Whether ``unit`` was written to since it was noted; False if it was not noted."""
        seen = self._seen.get(unit.name)
        return seen is not None and seen != content(unit.params)

    def forget(self, unit: Unit) -> None:
        """Watch ``unit`` no longer."""
        self._seen.pop(unit.name, None)

    def clear(self) -> None:
        """Watch nothing."""
        self._seen.clear()
