"""A forward that runs."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, ExitStack

from torch import nn

from lightning_ssd.step.recompute import Frame
from lightning_ssd.units.unit import Unit


class ModuleCall:
    """One running forward of a module that needs units.

    Args:
        module: The module.
        units: The units.

    Attributes:
        inner: Units that modules inside of it have fetched, if it has a frame.
        num_fetched: How many of ``units`` are fetched.
        frame: Of a module that will be recomputed; None for others.
    """

    def __init__(self, module: nn.Module, units: list[Unit]) -> None:
        self.module = module
        self.units = units
        self.inner: list[Unit] = []
        self.num_fetched = 0
        self.frame: Frame | None = None
        self._handled = sys.exc_info()[1]
        self._stack = ExitStack()

    @property
    def failed(self) -> bool:
        """Whether the forward, whose end is being told of, ends by an exception; what it returns may be None."""
        return sys.exc_info()[1] is not self._handled

    def enter(self, context: AbstractContextManager[object]) -> None:
        """Enter ``context`` until `close`."""
        self._stack.enter_context(context)

    def close(self) -> None:
        """Exit what was entered."""
        self._stack.close()
