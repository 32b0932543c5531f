"""Lightning's base classes for type checkers only; at run time the faces add those of their namespace.

A module of its own, since jsonargparse runs ``if TYPE_CHECKING`` blocks of the module that defines a class's arguments;
there it would import a namespace that may not be the one in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback as CallbackBase
    from lightning.pytorch.plugins.precision import Precision as PrecisionBase
    from lightning.pytorch.strategies import ParallelStrategy as StrategyBase
else:
    CallbackBase = object
    PrecisionBase = object
    StrategyBase = object

__all__ = ["CallbackBase", "PrecisionBase", "StrategyBase"]
