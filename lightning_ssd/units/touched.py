"""Units that stay resident although no module runs with them: code outside of their modules uses their parameters."""

from __future__ import annotations

from lightning_ssd.units.unit import Unit


class TouchedUnits:
    """Resident units that nobody holds, by the innermost module call that was running when they were touched.

    They stay until that call is over, those that were touched outside of any module to the end of the step, unless
    their memory is needed before.
    """

    def __init__(self) -> None:
        self._calls: list[dict[str, Unit]] = [{}]

    def begin_module(self) -> None:
        """A module runs; what is touched from now on stays until `end_module`."""
        self._calls.append({})

    def end_module(self) -> list[Unit]:
        """The innermost module has run; returns the units that stayed for it."""
        return list(self._calls.pop().values())

    def add(self, unit: Unit) -> None:
        """``unit`` stays for the module that runs now."""
        self._calls[-1][unit.name] = unit

    def remove(self, unit: Unit) -> None:
        """Somebody holds ``unit`` now."""
        for call in self._calls:
            call.pop(unit.name, None)

    def clear(self) -> None:
        """The step is over."""
        self._calls = [{}]

    def __contains__(self, unit: Unit) -> bool:
        return any(unit.name in call for call in self._calls)
