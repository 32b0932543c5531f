"""A PyTorch Lightning strategy that trains models larger than memory by streaming their state through NVMe SSDs.

`Trainer(strategy="ssd_offload")` needs no import of this package. Importing it is cheap: torch and Lightning are
imported when one of the names below is used.

`SSDOffloadStrategy`, `SSDOffloadPrecision` and `SSDOffloadTrace` are classes of the Lightning in use: of
`pytorch_lightning` if it is imported and `lightning.pytorch` is not, or if `lightning` is not installed; else of
`lightning.pytorch`. So with `pytorch_lightning`, import it first. A program that uses both imports the classes from
`lightning_ssd.strategy.for_lightning` or `lightning_ssd.strategy.for_pytorch_lightning`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

from lightning_ssd import _autoload

if TYPE_CHECKING:
    from lightning_ssd.io.engine import IOOptions
    from lightning_ssd.step.gathered import gathered
    from lightning_ssd.strategy.for_lightning import SSDOffloadPrecision, SSDOffloadStrategy, SSDOffloadTrace

    __version__: str

__all__ = ["IOOptions", "SSDOffloadPrecision", "SSDOffloadStrategy", "SSDOffloadTrace", "__version__", "gathered"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name in ("SSDOffloadStrategy", "SSDOffloadPrecision", "SSDOffloadTrace"):
        return getattr(importlib.import_module(_lightning_classes()), name)
    if name == "IOOptions":
        return importlib.import_module("lightning_ssd.io.engine").IOOptions
    if name == "gathered":
        return importlib.import_module("lightning_ssd.step.gathered").gathered
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _lightning_classes() -> str:
    """Our module for the Lightning in use, as the module docstring defines it."""
    if "lightning.pytorch" not in sys.modules and (
        "pytorch_lightning" in sys.modules or importlib.util.find_spec("lightning") is None
    ):
        return "lightning_ssd.strategy.for_pytorch_lightning"
    return "lightning_ssd.strategy.for_lightning"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lightning-ssd")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"


if not _autoload.is_unwanted():
    _autoload.install()
