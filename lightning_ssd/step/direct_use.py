"""Parameters that code outside of their modules uses in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from lightning_ssd.units.param_cache import ParamCache
from lightning_ssd.units.unit import Unit


class DirectUse:
    """Fetches units for operations on their parameters, which no module runs.

    Args:
        cache: Fetches.
    """

    def __init__(self, cache: ParamCache) -> None:
        self._cache = cache

    def touch(self, units: Sequence[Unit], operands: Sequence[Tensor]) -> None:
        """Fetch ``units`` all at the same time, and keep the units that ``operands`` view.

        They stay until the module that runs is over, or the step.
        """
        with ExitStack() as stack:
            for unit in self._cache.resident.units_of(operands):
                unit.num_holds += 1
                stack.callback(self._release, unit)
            for unit in units:
                self._cache.fetch(unit)
                self._move_aside(unit)
                stack.callback(self._release, unit)
                unit.touch()

    @contextmanager
    def hold(self, units: Sequence[Unit]) -> Iterator[None]:
        """Inside, ``units`` are fetched; afterwards they stay until the module that runs is over, or the step."""
        with ExitStack() as stack:
            for unit in units:
                self._cache.fetch(unit)
                stack.callback(self._release, unit)
            yield

    def _release(self, unit: Unit) -> None:
        unit.num_holds -= 1
        if unit.num_holds == 0:
            self._cache.let_stay(unit)

    def _move_aside(self, unit: Unit) -> None:
        """Let ``unit`` not lie where it leaves no room for a second operand.

        It came between idle units, into the middle of the memory, and has to stay: code may hold views of it. What is
        free when the idle ones go would be two pieces, neither long enough (for a teacher beside its student).
        """
        units, pool = self._cache.units, self._cache.pool
        largest = max(other.layout.buffer_nbytes for other in units)
        if unit.num_holds > 1 or unit.host_copy is None or pool.nbytes >= 3 * largest:
            return
        copies = [(u, u.host_copy) for u in units if u.host_copy is not None]
        held = [copy.buffer for u, copy in copies if u.num_holds > 0 or u.is_viewed]
        if pool.is_cut_by(held, largest):
            unit.num_holds -= 1
            self._cache.evict_idle()
            self._cache.fetch(unit)
