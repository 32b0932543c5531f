"""Which units to read next and which may go for them: choices over the order of use, no moves.

The window of units that are read ahead (``max_ahead``) and the number of them that are read together
(``prefetch_batch``) are those of Superpipeline (its *k* and move quantum, arXiv 2410.08791).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import takewhile

from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.execution_order import ExecutionOrder
from lightning_ssd.units.unit import Unit


class PrefetchPolicy:
    """What a step needs soon.

    Args:
        units: All units.
        store: Which generation of a unit is the newest.
        order: In which a step uses them.
        max_ahead: Units that may be fetched ahead of use.
        prefetch_batch: Units whose reads are started together.
    """

    def __init__(
        self,
        units: list[Unit],
        store: StateStore,
        order: ExecutionOrder,
        *,
        max_ahead: int = 1,
        prefetch_batch: int = 1,
    ) -> None:
        self._units = units
        self._by_name = {unit.name: unit for unit in units}
        self._store = store
        self._order = order
        self._max_ahead = max_ahead
        self._prefetch_batch = prefetch_batch

    def wanted(self, *, beyond: bool) -> Iterator[list[Unit]]:
        """Groups of units to read now, soonest needed first; to be asked for one by one, as each takes memory.

        Args:
            beyond: Of what the next step begins with too, as far as no update of this step is still to come.
        """
        following = takewhile(self._is_renewed, self._order.following()) if beyond else ()
        group: list[Unit] = []
        for num_ahead, unit in enumerate(self._ahead(following), 1):
            if num_ahead > self._max_ahead or unit.mapped is not None or unit.update is not None:
                return
            if unit.host_copy is None:
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
        needs = (*self._order.upcoming(), *self._order.following())
        return needs.index(unit.name) if unit.name in needs else len(needs)

    def is_next(self, unit: Unit) -> bool:
        """Whether ``unit`` would be read now if no update of it were pending."""
        for num_ahead, other in enumerate(self._ahead(self._order.following()), 1):
            if other is unit:
                return num_ahead <= self._max_ahead
            if other.host_copy is None:
                return False
        return False

    def dispensable(self, needed_after: float | None = None) -> Unit | None:
        """The unit that is needed last of those in host memory that nobody uses; None if there is none.

        Args:
            needed_after: Only one that is merely cached, and needed later than this.
        """
        copies = [(u, u.host_copy) for u in self._units if u.host_copy is not None and u.num_holds == u.num_pins == 0]
        free = {u: copy.transfer is not None for u, copy in copies if not u.is_viewed}  # whether they are being read
        if needed_after is not None:
            cached = (u for u, is_reading in free.items() if not is_reading and u.device_copy is None)
            free = {u: False for u in cached if self.need(u) > needed_after}
        return max(free, key=lambda u: (not free[u], self.need(u)), default=None)

    def _ahead(self, following: Iterable[str]) -> Iterator[Unit]:
        """Units that need a buffer before they are used, soonest needed first: in this step, then in the next."""
        units = (self._by_name[name] for name in dict.fromkeys((*self._order.upcoming(), *following)))
        return (u for u in units if u.device_copy is None and u.in_memory is None and not u.is_released(self._store))

    def _is_renewed(self, name: str) -> bool:
        unit = self._by_name[name]
        return unit.is_updated or not any(param.requires_grad for param in unit.params)
