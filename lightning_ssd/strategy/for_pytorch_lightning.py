"""Strategy, precision plugin and callback for `pytorch_lightning`. Imported only when that namespace is in use.

`type: ignore[misc]`: for mypy the mixins derive from the classes of `lightning.pytorch`, not from these.
"""

from __future__ import annotations

from types import MappingProxyType

from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from pytorch_lightning.strategies import ParallelStrategy, SingleDeviceStrategy

from lightning_ssd.strategy.precision import PrecisionMixin
from lightning_ssd.strategy.strategy import StrategyMixin
from lightning_ssd.strategy.trace_callback import TraceMixin


class SSDOffloadPrecision(PrecisionMixin, Precision):  # type: ignore[misc]  # noqa: D101
    __doc__ = PrecisionMixin.__doc__  # so that `help()` shows the arguments


class SSDOffloadStrategy(StrategyMixin, ParallelStrategy):  # type: ignore[misc]  # noqa: D101
    __doc__ = StrategyMixin.__doc__

    _namespace = "pytorch_lightning"
    _precision_class = SSDOffloadPrecision
    _stock_precision = MappingProxyType(
        {plugin.__name__: plugin for plugin in (Precision, MixedPrecision, HalfPrecision, DoublePrecision)}
    )


class SSDOffloadTrace(TraceMixin, Callback):  # type: ignore[misc]  # noqa: D101
    __doc__ = TraceMixin.__doc__


# Lightning tests for this class only before it takes a compiled module. Without the registration,
# `Trainer.fit(torch.compile(module))` fails with Lightning's message instead of ours.
SingleDeviceStrategy.register(SSDOffloadStrategy)
