"""What happens to units, in order, as the package logs it."""

from __future__ import annotations

import logging


class Events(logging.Handler):
    """The events inside a ``with`` block, each ``"name what"``; in the order in which they happened."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._logger = logging.getLogger("lightning_ssd.units")

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())

    def __enter__(self) -> Events:
        self._level, self._propagates = self._logger.level, self._logger.propagate
        self._logger.propagate = False
        self._logger.setLevel(logging.DEBUG)
        self._logger.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)
        self._logger.propagate = self._propagates
