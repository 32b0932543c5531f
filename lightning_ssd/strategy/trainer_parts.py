"""What a Trainer gives its strategy, kept apart from what the strategy's user gave to the constructor."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from lightning_ssd.strategy.lightning_classes import StrategyBase
from lightning_ssd.strategy.precision import PrecisionMixin


class TrainerPartsMixin(StrategyBase):
    """Accelerator and plugins, so that one strategy object can be in several Trainers, one after the other.

    A Trainer reads ``_accelerator``, ``_precision_plugin`` and ``_checkpoint_io`` as what the user gave to the
    constructor. If they are set, it refuses an accelerator or checkpoint plugin of its own, and ignores its own
    precision. Lightning's classes keep there what a Trainer gives, too: a package that makes one Trainer to fit and
    another to predict, from the same arguments, fails.
    """

    _stock_precision: Mapping[str, Any]  # Lightning's own classes by name; set in `for_lightning` and its twin
    _precision_class: type[PrecisionMixin]
    _of_trainer: dict[str, Any]

    @property
    def accelerator(self) -> Any:
        """The accelerator."""
        return self._of_trainer.get("accelerator", self._accelerator)

    @accelerator.setter
    def accelerator(self, accelerator: Any) -> None:
        self._of_trainer["accelerator"] = accelerator

    @property
    def checkpoint_io(self) -> Any:
        """The checkpoint plugin; where there is none, Lightning's own, which is made here."""
        holder = SimpleNamespace(_checkpoint_io=self._known_checkpoint_io)
        self._of_trainer["checkpoint_io"] = super(TrainerPartsMixin, type(self)).checkpoint_io.fget(holder)  # type: ignore[attr-defined]
        return self._of_trainer["checkpoint_io"]

    @checkpoint_io.setter
    def checkpoint_io(self, plugin: Any) -> None:
        self._of_trainer["checkpoint_io"] = plugin

    @property
    def _known_checkpoint_io(self) -> Any:
        """The checkpoint plugin; None where there is none."""
        return self._of_trainer.get("checkpoint_io", self._checkpoint_io)

    @property
    def precision_plugin(self) -> Any:
        """The precision plugin. One of Lightning's own is wrapped in `PrecisionMixin`."""
        plugin = self._of_trainer.get("precision", self._precision_plugin)
        return plugin if plugin is not None else self._stock_precision["Precision"]()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        if plugin is not None and not isinstance(plugin, PrecisionMixin):
            plugin = self._precision_class(inner=plugin)
        if plugin is not None:
            plugin.prepare(self._stock_precision)
        self._of_trainer["precision"] = plugin
