"""Strategy, precision plugin and callback for `pytorch_lightning`. Imported only when that namespace is in use.

`type: ignore[misc]`: for mypy the mixins derive from the classes of `lightning.pytorch`, not from these.
"""

from __future__ import annotations

from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from pytorch_lightning.strategies import ParallelStrategy, SingleDeviceStrategy

from lightning_ssd.strategy.precision import PrecisionMixin, by_name
from lightning_ssd.strategy.strategy import StrategyMixin
from lightning_ssd.strategy.trace_callback import TraceMixin


class SSDOffloadPrecision(PrecisionMixin, Precision):  # type: ignore[misc]  # noqa: D101
    __doc__ = PrecisionMixin.__doc__  # so that `help()` shows the arguments


class SSDOffloadStrategy(StrategyMixin, ParallelStrategy):  # type: ignore[misc]  # noqa: D101
    __doc__ = StrategyMixin.__doc__

    _namespace = "pytorch_lightning"
    _precision_class = SSDOffloadPrecision
    _stock_precision = by_name(Precision, MixedPrecision, HalfPrecision, DoublePrecision)


class SSDOffloadTrace(TraceMixin, Callback):  # type: ignore[misc]  # noqa: D101
    __doc__ = TraceMixin.__doc__


# As in `for_lightning`.
SingleDeviceStrategy.register(SSDOffloadStrategy)
