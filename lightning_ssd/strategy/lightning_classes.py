"""Lightning's base classes, for type checkers only; at run time `for_lightning` and `for_pytorch_lightning` add them.

A module of its own, since jsonargparse runs the ``if TYPE_CHECKING`` blocks of a module whose signatures it reads: in
the module of the strategy such a block would import a namespace that may not be the one in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.callbacks import Callback as CallbackBase
    from lightning.pytorch.plugins.precision import Precision as PrecisionBase
    from lightning.pytorch.strategies import ParallelStrategy as StrategyBase
else:
    CallbackBase = object
    LightningModule = object
    PrecisionBase = object
    StrategyBase = object

__all__ = ["CallbackBase", "LightningModule", "PrecisionBase", "StrategyBase"]
