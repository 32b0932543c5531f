"""Progress of something long, as lines of a log."""

from __future__ import annotations

import logging
import time

from lightning_ssd.sizes import fmt

_EVERY_S = 5.0


class LogProgress:
    """Bytes done of bytes in all, a line every few seconds; what is done sooner logs nothing."""

    def __init__(self, logger: logging.Logger, what: str) -> None:
        """Log to ``logger`` at level INFO; ``what`` (such as "saving last.ckpt") opens each line."""
        self._logger = logger
        self._what = what
        self._begin_s = self._logged_s = time.monotonic()

    def __call__(self, done_nbytes: int, total_nbytes: int) -> None:
        """Log the progress, if it is time to."""
        now_s = time.monotonic()
        if now_s - self._logged_s < _EVERY_S:
            return
        self._logged_s = now_s
        rate = done_nbytes / (now_s - self._begin_s) / 1e9
        self._logger.info("%s: %s of %s, %.2f GB/s", self._what, fmt(done_nbytes), fmt(total_nbytes), rate)
