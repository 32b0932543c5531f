"""What the user writes to parameters, at rest or inside a step, and how it comes into the store.

[Note: in a step, written] Bytes in memory are thrown away when a unit is released, so a change to them (weights clipped
in ``training_step``, a mask that is multiplied in) would be lost without a word. Units that code outside their own
modules can reach are checked: those of which a parameter at rest was used, and small ones that stay for the whole step.
Their content is summed up when they can be reached first and again before they go. ``p.data`` has no version that would
tell, so the bytes themselves are compared.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_ssd.errors import ResidencyError, SSDOffloadError
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.streaming.at_rest import AtRest, KeptAtRest, is_assigned
from lightning_ssd.streaming.content import content
from lightning_ssd.streaming.unit import Residency, Unit


class Writes:
    """Brings into the store what was written.

    Args:
        store: Where values are.
        is_current: Whether the bytes of a unit in memory are those of its newest generation.
    """

    def __init__(self, store: StateStore, is_current: Callable[[Unit], bool]) -> None:
        self._store = store
        self._is_current = is_current
        self._seen: dict[str, tuple[int, ...]] = {}  # content of units that can be written to, when that began
        self.keeps_buffer = True

    def note(self, unit: Unit) -> None:
        """From now on the user's code can write to ``unit``, which is resident."""
        if not self._is_in_place(unit) and unit.name not in self._seen:
            self._seen[unit.name] = content(unit.params)

    def forget(self, unit: Unit) -> None:
        """Watch ``unit`` no longer."""
        self._seen.pop(unit.name, None)

    def clear(self) -> None:
        """Watch nothing."""
        self._seen.clear()

    def take_from_step(self, unit: Unit) -> None:
        """Bring in what was written to ``unit``, if it is resident; [Note: in a step, written].

        Raises:
            ResidencyError: It was written to while its optimizer updated it.
            SSDOffloadError: A parameter has another form than it was placed with.
        """
        if unit.state is not Residency.RESIDENT:
            return
        if self._is_in_place(unit):
            assert unit.kept is not None
            if is_assigned(unit.params, unit.kept):
                self._put(unit)
            self._drop_file(unit)
            return
        seen = self._seen.get(unit.name)
        if seen is None or seen == content(unit.params):
            return
        if not self._is_current(unit):
            raise ResidencyError(
                f"parameters of unit {unit.name!r} were written to in a step while their optimizer updated them: write "
                "to them before the step's forward, or after optimizer.step()"
            )
        # From here on the bytes in memory are not those of the newest generation: they go at the next release.
        self._put(unit)
        self._store.forget(unit.name, "master")
        self.forget(unit)

    def take_from_rest(self, unit: Unit, at_rest: AtRest | KeptAtRest) -> bool:
        """Bring in what was written to ``unit`` while it was awake at rest; whether there was anything.

        Raises:
            SSDOffloadError: A parameter has another form than it was placed with.
        """
        was_assigned = at_rest.is_assigned(unit.params)
        was_written = at_rest.was_written()
        if was_assigned or (was_written and at_rest.is_private):
            self._put(unit)
        if was_assigned or was_written:
            self._store.forget(unit.name, "master")  # the user's value is the truth now
        self._drop_file(unit)
        return was_assigned or was_written

    def _is_in_place(self, unit: Unit) -> bool:
        """Whether resident parameters are what the store keeps, and nothing beside them depends on their values."""
        return unit.kept is not None and self.keeps_buffer and unit.layout.itemsize >= 4

    def _put(self, unit: Unit) -> None:
        for name, param, shape in zip(unit.names, unit.params, unit.shapes, strict=True):
            if tuple(param.shape) != shape.shape or param.dtype != unit.dtype:
                raise SSDOffloadError(
                    f"parameter {name!r} was given data of shape {tuple(param.shape)} and {param.dtype}; it was placed "
                    f"with {shape.shape} and {unit.dtype}: change a parameter's form before the Trainer starts"
                )
        self._store.put(unit.layout, lambda i: unit.params[i].data)

    def _drop_file(self, unit: Unit) -> None:
        generation = self._store.current(unit.name, "param")
        assert generation is not None, unit.name
        self._store.drop_file(generation)
