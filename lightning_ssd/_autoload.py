"""Makes `Trainer(strategy="ssd_offload")` work without an import. Standard library only; nothing here raises.

torch calls `register` at the end of `import torch` (entry point in the group `torch.backends`); `import lightning_ssd`
calls `install`. Either way Lightning is not imported here: a finder on `sys.meta_path` waits until Lightning's
registries of strategies exist, and gives each a factory that imports the strategy when somebody asks for it. It also
tells torch's safe loading of the one function that checkpoints with links call.

`LIGHTNING_SSD_AUTOLOAD=0` switches our entry point off, torch's `TORCH_DEVICE_BACKEND_AUTOLOAD=0` every package's;
`import lightning_ssd` then still registers.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

NAMES = ("ssd_offload", "ssdoffloadstrategy", "lightning_ssd.ssdoffloadstrategy")
"""Names of the strategy. Lightning puts names in lower case: the last two are `SSDOffloadStrategy` and
`lightning_ssd.SSDOffloadStrategy`, which `LightningCLI` passes as strings."""


class _Registry(NamedTuple):
    """Where Lightning keeps strategies by name.

    Attributes:
        module: Module that owns the registry.
        attribute: The registry's name in that module.
        classes: Our module with the strategy for this namespace; None for Fabric, which we do not support.
        cli: Module with the namespace's `LightningCLI`.
    """

    module: str
    attribute: str
    classes: str | None = None
    cli: str | None = None


_REGISTRIES = (
    _Registry(
        "lightning.pytorch.strategies",
        "StrategyRegistry",
        "lightning_ssd.strategy.for_lightning",
        "lightning.pytorch.cli",
    ),
    _Registry(
        "pytorch_lightning.strategies",
        "StrategyRegistry",
        "lightning_ssd.strategy.for_pytorch_lightning",
        "pytorch_lightning.cli",
    ),
    _Registry("lightning.fabric.strategies", "STRATEGY_REGISTRY"),
    _Registry("lightning_fabric.strategies", "STRATEGY_REGISTRY"),
)


def register() -> None:
    """Entry point that torch calls: registers, or if switched off removes the package from `sys.modules`."""
    if not is_unwanted():
        install()
        return
    # torch has imported the package only to call this function. If it stayed imported, a later
    # `import lightning_ssd` would run no code and could not register.
    for name in ("lightning_ssd._autoload", "lightning_ssd"):
        sys.modules.pop(name, None)


def is_unwanted() -> bool:
    """Whether it is torch that imports this package although `LIGHTNING_SSD_AUTOLOAD` tells it not to."""
    switched_off = os.environ.get("LIGHTNING_SSD_AUTOLOAD", "1").strip().lower() in ("0", "false", "no", "off")
    return switched_off and _is_initialising("torch") and _installed() is None


def install() -> None:
    """Registers with every Lightning that is imported, now or later. Doing it twice does no harm."""
    if _installed() is None:
        finder = RegisteringFinder()
        sys.meta_path.insert(0, finder)
        finder.catch_up()
        for registry in _REGISTRIES:
            if registry.cli in sys.modules:
                _show_to_cli(registry)


class RegisteringFinder:
    """A meta path finder that finds nothing: each call tells it that another import has begun.

    It wraps no loader and touches no module, spec or lock, so it does not disturb whatever loads Lightning (files,
    archives, lazy or instrumenting loaders, several threads), and a module in the middle of its import needs no special
    case. It is in time: after a registry is created, dozens of modules are searched for before Lightning's `Trainer`,
    the only reader of the registry, is imported.
    """

    def __init__(self) -> None:
        self._served: dict[str, object] = {}  # registry by name of its module; a reloaded module has a new one

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Register if it is possible now; return None, so that other finders find the module."""
        for registry in _REGISTRIES:
            if fullname == registry.cli:
                _show_to_cli(registry)
        self.catch_up()

    def catch_up(self) -> None:
        """Register in each registry that exists; when all are done, leave `sys.meta_path`."""
        for place in _REGISTRIES:
            try:
                registry = _global_of(place.module, place.attribute)
                if registry is not None and self._served.get(place.module) is not registry:
                    self._served[place.module] = registry  # first, so that a failure is not repeated at every import
                    _register_names(registry, place)
            except Exception as error:  # raised from here it would end an import that has nothing to do with us
                _warn(f"could not register 'ssd_offload' in {place.module}: {error!r}")
        self._admit_links()
        if len(self._served) == len(_REGISTRIES) + 1:
            # A new list: importlib is iterating over the old one, and would skip the next finder.
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]

    def _admit_links(self) -> None:
        """Let ``torch.load(weights_only=True)`` call what checkpoints with links name, once torch is imported."""
        admit = _global_of("torch.serialization", "add_safe_globals")
        if admit is None or self._served.get("torch.serialization") is admit:
            return
        self._served["torch.serialization"] = admit
        try:
            admit([importlib.import_module("lightning_ssd.links").linked])
        except Exception as error:
            _warn(f"torch.load(weights_only=True) will not open checkpoints with links: {error!r}")


def _installed() -> RegisteringFinder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, RegisteringFinder)), None)


def _global_of(module_name: str, name: str) -> Any:
    """Global variable ``name`` of a module if both exist by now, else None; imports nothing."""
    module = sys.modules.get(module_name)
    # Not getattr or vars: on a module under `importlib.util.LazyLoader` these would load it.
    return object.__getattribute__(module, "__dict__").get(name) if isinstance(module, ModuleType) else None


def _is_initialising(module_name: str) -> bool:
    spec = getattr(sys.modules.get(module_name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _register_names(registry: Any, place: _Registry) -> None:
    factory = _refuse_fabric if place.classes is None else _factory(place.classes)
    for name in NAMES:
        if name not in registry:  # somebody's own strategy of that name wins
            # override: two threads may come here at once, and the second must not raise.
            registry.register(name, factory, description="Streams model state through NVMe SSDs", override=True)


def _factory(classes: str) -> Callable[..., Any]:
    def ssd_offload(**init_args: Any) -> Any:
        """Import the strategy and make one."""
        return importlib.import_module(classes).SSDOffloadStrategy(**init_args)

    return ssd_offload


def _refuse_fabric(**init_args: Any) -> Any:
    """Registered for Fabric in place of a strategy: raises with what to do instead."""
    from lightning_ssd.errors import ConfigurationError

    raise ConfigurationError(
        "strategy 'ssd_offload' does not work with Fabric yet; use Trainer(strategy='ssd_offload') of "
        "lightning.pytorch or pytorch_lightning, or another strategy with Fabric, such as 'fsdp'"
    )


def _show_to_cli(place: _Registry) -> None:
    """Import the strategy for `LightningCLI`, which resolves short names only of classes that are imported.

    Without this `--trainer.strategy=SSDOffloadStrategy --trainer.strategy.host_memory=8GiB` is not understood.
    """
    if place.classes is None or _is_initialising(place.module.rpartition(".")[0]):
        return
    try:
        importlib.import_module(place.classes)
    except (
        Exception
    ) as error:  # a broken installation of ours must not take `LightningCLI` from those who do not use us
        _warn(f"cannot offer SSDOffloadStrategy to {place.cli}: {error!r}")


def _warn(what: str) -> None:
    with contextlib.suppress(Exception):  # under `-W error` the warning is an exception
        warnings.warn(f"lightning_ssd {what}", stacklevel=2)
