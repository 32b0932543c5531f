"""The values of one unit in a buffer, and what an update does with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_ssd.io.engine import Transfer
from lightning_ssd.memory.pool import Buffer
from lightning_ssd.store.generation import Generation

if TYPE_CHECKING:
    from lightning_ssd.units.param_cache import ParamCache
    from lightning_ssd.units.unit import Unit


@dataclass(eq=False)
class HostCopy:
    """The values of one unit in a buffer.

    Attributes:
        buffer: Lent by the pool of parameters.
        generation: Whose values the bytes are, or will be when they are read; None while they are undefined.
        transfer: The read of the bytes while it is under way; None before and after.
    """

    buffer: Buffer
    generation: Generation | None = None
    transfer: Transfer | None = None

    def end_read(self) -> None:
        """Return when the bytes are there.

        Raises:
            IOFailure: The disk failed.
        """
        transfer = self.transfer  # the other thread may end it too
        if transfer is not None:
            transfer.wait()
            self.transfer = None


@dataclass(eq=False)
class UpdateTarget:
    """The host copy of one unit, reserved for an update, so that what is in memory is neither read nor written twice.

    Attributes:
        cache: Takes the host copy back.
        unit: Whose host copy it is.
        host_copy: What was reserved.
        values: All elements of the unit, flat, in the dtype of the parameters. Drop references to it before `end`.
        is_current: They are the newest values; else they are undefined.
        is_writable: Compute does not read them: the update writes the new values here, and the next fetch finds them.
            Else the update may only read them.
    """

    cache: ParamCache
    unit: Unit
    host_copy: HostCopy
    values: Tensor
    is_current: bool
    is_writable: bool

    def end(self, *, is_new: bool) -> None:
        """Give the host copy back, once.

        Args:
            is_new: ``values`` are those of the generation that is the current one now.
        """
        del self.values
        self.cache.unreserve(self, is_new=is_new)
