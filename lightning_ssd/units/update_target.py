"""A unit's buffer while an update has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class UpdateTarget:
    """The buffer of one unit, lent to an update, so that what is in memory is neither read nor written twice.

    Attributes:
        values: All elements of the unit, flat, in the dtype of the parameters. Let go of it before `end`.
        is_current: They are the newest values; else they are anything.
        is_writable: Nobody computes with them: the update makes the new values here, and whoever needs the unit next
            finds them.
        end: To be called once: whether ``values`` are those of the generation that is the current one now.
    """

    values: Tensor
    is_current: bool
    is_writable: bool
    end: Callable[[bool], None]
