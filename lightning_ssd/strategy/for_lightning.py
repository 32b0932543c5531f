"""Strategy, precision plugin and callback for `lightning.pytorch`. Imported only when that namespace is in use."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import ParallelStrategy, SingleDeviceStrategy

from lightning_ssd.strategy.precision import PrecisionMixin, by_name
from lightning_ssd.strategy.strategy import StrategyMixin
from lightning_ssd.strategy.trace_callback import TraceMixin


class SSDOffloadPrecision(PrecisionMixin, Precision):  # noqa: D101
    __doc__ = PrecisionMixin.__doc__  # so that `help()` shows the arguments


class SSDOffloadStrategy(StrategyMixin, ParallelStrategy):  # noqa: D101
    __doc__ = StrategyMixin.__doc__

    _namespace = "lightning.pytorch"
    _precision_class = SSDOffloadPrecision
    _stock_precision = by_name(Precision, MixedPrecision, HalfPrecision, DoublePrecision)


class SSDOffloadTrace(TraceMixin, Callback):  # noqa: D101
    __doc__ = TraceMixin.__doc__


# Lightning tests for this class only before it takes a compiled module. Without the registration,
# `Trainer.fit(torch.compile(module))` fails with Lightning's message instead of ours.
SingleDeviceStrategy.register(SSDOffloadStrategy)
