"""Where the host waits for the device."""

from __future__ import annotations

import traceback
from collections import Counter
from types import TracebackType

from tests.simulated_cuda.device import core


class HostWaits:
    """Counts the host's waits inside, by reason and by the innermost frames of ``package``.

    Attributes:
        found: How often, by reason and by place such as ``"step/backward.py:99 unpack"``.
    """

    def __init__(self, package: str = "lightning_ssd", depth: int = 1) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self._part = f"/{package}/"
        self._depth = depth

    def __enter__(self) -> HostWaits:
        core.listen(self._wait)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        core.listen(None)

    def _wait(self, why: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if self._part in frame.filename]
        places = [
            f"{frame.filename.rpartition(self._part)[2]}:{frame.lineno} {frame.name}"
            for frame in frames[::-1][: self._depth]
        ]
        self.found[why, " < ".join(places) or "elsewhere"] += 1
