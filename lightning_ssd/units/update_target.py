"""A unit's buffer while an update has it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_ssd.units.unit import Unit


class _Owner(Protocol):
    """Has the buffer: the `ParamCache`."""

    def unreserve(self, target: UpdateTarget, *, is_new: bool) -> None:
        """Undo ``reserve``."""
        ...


class UpdateTarget:
    """The buffer of one unit, reserved for an update, so that what is in memory is neither read nor written twice.

    Args:
        owner: Takes the buffer back.
        unit: Whose buffer it is.
        values: See below.
        is_current: See below.
        is_writable: See below.

    Attributes:
        unit: Whose buffer it is.
        values: All elements of the unit, flat, in the dtype of the parameters. Drop references to it before `end`.
        is_current: They are the newest values; else they are undefined.
        is_writable: Compute does not read them: the update writes the new values here, and the next fetch finds them.
            Else the update may only read them.
    """

    def __init__(self, owner: _Owner, unit: Unit, values: Tensor, *, is_current: bool, is_writable: bool) -> None:
        self.unit = unit
        self.values = values
        self.is_current = is_current
        self.is_writable = is_writable
        self._owner = owner

    def end(self, *, is_new: bool) -> None:
        """Give the buffer back, once.

        Args:
            is_new: ``values`` are those of the generation that is the current one now.
        """
        del self.values
        self._owner.unreserve(self, is_new=is_new)
