"""The native module, or ``None`` where it is missing; the only place that imports it unasked, so it warns once."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

_native: Any
try:
    _native = importlib.import_module("lightning_ssd._native")
except ImportError as error:  # never built, or built for another Python or C++ runtime: the reason is in the error
    _native = None
    warnings.warn(
        f"lightning_ssd runs without its native module ({error}): the same results, slower. "
        "Reinstall with a C++20 compiler to get it.",
        RuntimeWarning,
        stacklevel=2,
    )
