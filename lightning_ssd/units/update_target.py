"""A unit's host copy while an update has it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_ssd.units.unit import HostCopy, Unit


class _Owner(Protocol):
    """Has the host copy: the `ParamCache`."""

    def unreserve(self, target: UpdateTarget, *, is_new: bool) -> None:
        """Undo ``reserve``."""
        ...


class UpdateTarget:
    """The host copy of one unit, reserved for an update, so that what is in memory is neither read nor written twice.

    Args:
        owner: Takes the host copy back.
        unit: Whose it is.
        host_copy: What was reserved.
        values: See below.
        is_current: See below.
        is_writable: See below.

    Attributes:
        unit: Whose host copy it is.
        host_copy: What was reserved.
        values: All elements of the unit, flat, in the dtype of the parameters. Drop references to it before `end`.
        is_current: They are the newest values; else they are undefined.
        is_writable: Compute does not read them: the update writes the new values here, and the next fetch finds them.
            Else the update may only read them.
    """

    def __init__(
        self, owner: _Owner, unit: Unit, host_copy: HostCopy, values: Tensor, *, is_current: bool, is_writable: bool
    ) -> None:
        self.unit = unit
        self.host_copy = host_copy
        self.values = values
        self.is_current = is_current
        self.is_writable = is_writable
        self._owner = owner

    def end(self, *, is_new: bool) -> None:
        """Give the host copy back, once.

        Args:
            is_new: ``values`` are those of the generation that is the current one now.
        """
        del self.values
        self._owner.unreserve(self, is_new=is_new)
