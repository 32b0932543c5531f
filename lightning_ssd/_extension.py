"""The native module, or ``None`` where it was not built; the only place that imports it, so it warns once."""

from __future__ import annotations

import warnings
from typing import Any

_native: Any
try:
    from lightning_ssd import _native  # type: ignore[attr-defined,no-redef]
except ImportError:
    _native = None
    warnings.warn(
        "lightning_ssd was installed without its native module: the same results, slower. "
        "Reinstall with a C++20 compiler to get it.",
        RuntimeWarning,
        stacklevel=2,
    )
