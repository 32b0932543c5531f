"""Whether a step of one model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StepState:
    """Whether a step runs. In a step an operation on a lazy parameter fetches its unit to the device; else it maps it.

    Steps of the Trainer, forwards of modules and recomputes count, one inside the other.

    Attributes:
        override: Whether a step runs, whatever counts; None if nothing is said.
    """

    def __init__(self) -> None:
        self.override: bool | None = None
        self._depth = 0
        self._is_suspended = False

    @property
    def is_running(self) -> bool:
        """Whether a step runs now."""
        is_running = self._depth > 0 if self.override is None else self.override
        return is_running and not self._is_suspended

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, a step runs."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    @contextmanager
    def suspended(self, is_suspended: bool = True) -> Iterator[None]:
        """Inside, no step runs, whatever runs around it; with False inside that, it runs again."""
        before, self._is_suspended = self._is_suspended, is_suspended
        try:
            yield
        finally:
            self._is_suspended = before
