"""Which units to read next and which may go for them: choices over the order of use, no moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile

from lightning_ssd.units.execution_order import ExecutionOrder
from lightning_ssd.units.unit import Residency, Unit


class PrefetchPolicy:
    """What a step needs soon.

    Args:
        units: All units.
        schedule: Order of use.
        max_ahead: Units that may be fetched ahead of use.
        prefetch_batch: Units whose reads are started together.
    """

    def __init__(
        self,
        units: list[Unit],
        schedule: ExecutionOrder,
        *,
        max_ahead: int = 1,
        prefetch_batch: int = 1,
    ) -> None:
        self._units = units
        self._by_name = {unit.name: unit for unit in units}
        self._schedule = schedule
        self._num_ahead = max_ahead
        self._prefetch_batch = prefetch_batch
        self._renewed: set[str] = set()  # updated since the last backward began

    def begin_backward(self) -> None:
        """Updates of this step are still to come."""
        self._renewed.clear()

    def updated(self, unit: Unit) -> None:
        """The update of this step has come."""
        self._renewed.add(unit.name)

    def wanted(self, is_placed: Callable[[Unit], bool], *, beyond: bool) -> Iterator[list[Unit]]:
        """Groups of units to read now, soonest needed first; to be asked for one by one, as each takes memory.

        Args:
            is_placed: Whether the newest values of a unit are where compute reads.
            beyond: Of what the next step begins with too, as far as no update of this step is still to come.
        """
        following = takewhile(self._is_renewed, self._schedule.following()) if beyond else ()
        group: list[Unit] = []
        for max_ahead, unit in enumerate(self._ahead(following, is_placed), 1):
            if max_ahead > self._num_ahead or unit.mapped is not None or unit.update is not None:
                return
            if unit.state is Residency.ON_DISK:
                group.append(unit)
            if len(group) == self._prefetch_batch:
                yield group
                group = []
        if group:
            yield group

    def need(self, unit: Unit) -> float:
        """How soon the bytes of ``unit`` are needed; infinity if they are not: an update will replace them before."""
        return math.inf if unit.update is not None else self.position(unit)

    def position(self, unit: Unit) -> int:
        """How many units are needed before ``unit`` is."""
        needs = (*self._schedule.upcoming(), *self._schedule.following())
        return needs.index(unit.name) if unit.name in needs else len(needs)

    def is_next(self, unit: Unit, is_placed: Callable[[Unit], bool]) -> bool:
        """Whether ``unit`` would be read now if no update of it were pending."""
        for max_ahead, other in enumerate(self._ahead(self._schedule.following(), is_placed), 1):
            if other is unit:
                return max_ahead <= self._num_ahead
            if other.state is Residency.ON_DISK:
                return False
        return False

    def dispensable(self, needed_after: float | None = None) -> Unit | None:
        """The unit that is needed last of those in host memory that nobody uses; None if there is none.

        Args:
            needed_after: Only one that is merely cached, and needed later than this.
        """
        free = [u for u in self._units if u.num_holds == u.num_pins == 0 and u.buffer is not None and not u.is_viewed]
        if needed_after is not None:
            free = [u for u in free if u.state is Residency.STAGED and self.need(u) > needed_after]
        return max(free, key=lambda u: (u.state is not Residency.READING, self.need(u)), default=None)

    def _ahead(self, following: Iterable[str], is_placed: Callable[[Unit], bool]) -> Iterator[Unit]:
        """Units that need a buffer before they are used, soonest needed first: in this step, then in the next."""
        units = (self._by_name[name] for name in dict.fromkeys((*self._schedule.upcoming(), *following)))
        return (u for u in units if u.state is not Residency.RESIDENT and u.in_memory is None and not is_placed(u))

    def _is_renewed(self, name: str) -> bool:
        return name in self._renewed or not any(param.requires_grad for param in self._by_name[name].params)
