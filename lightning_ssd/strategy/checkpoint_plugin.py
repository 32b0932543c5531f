"""Which checkpoints the strategy writes itself, and which Lightning's checkpoint plugin writes.

The plugin (``CheckpointIO``) writes what only it can: to a URL, with ``storage_options``, or in a format of its own. It
is given Lightning's dictionary with tensors mapped from the store. In place of Lightning's stock plugin, which makes
the file in memory first, the strategy writes the same file in pieces.
"""

from __future__ import annotations

import sys
from typing import Any

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.paths import is_url

ASYNC_IS_NOT_NEEDED = (
    "ssd_offload: AsyncCheckpointIO has nothing to do: a save makes hard links instead of copies, and the checkpoint "
    "is complete when it returns"
)


class CheckpointPlugin:
    """The checkpoint plugin of one Trainer, as far as the strategy depends on it.

    Args:
        plugin: What the strategy was given; None for Lightning's own.
        form: The option ``checkpoint``.

    Attributes:
        is_async: It is Lightning's ``AsyncCheckpointIO`` over Lightning's own format.
        is_stock: It is Lightning's own, and does what it does in a fresh installation.

    Raises:
        ConfigurationError: It has a format of its own, where links are to be made.
    """

    def __init__(self, plugin: Any, form: str) -> None:
        self._form = form
        inner = getattr(plugin, "checkpoint_io", None)
        self.is_async = _is_of(plugin, "AsyncCheckpointIO") and (inner is None or _is_stock(inner))
        self.is_stock = plugin is None or _is_stock(plugin)
        if form == "links" and not self.is_ours:
            name = type(plugin if inner is None else inner).__name__
            raise ConfigurationError(
                f"the checkpoint plugin {name} writes checkpoints itself, which are then no hard links to the store: "
                "use checkpoint='file', or remove it from plugins"
            )

    @property
    def is_ours(self) -> bool:
        """Whether the strategy writes checkpoints on a disk of this machine in the plugin's place."""
        return self.is_stock or self.is_async

    def writes(self, path: Any, storage_options: Any, *, saves_files: bool) -> bool:
        """Whether the plugin saves a checkpoint.

        Args:
            path: Where.
            storage_options: Of the call.
            saves_files: A checkpoint is one file; else links.

        Raises:
            ConfigurationError: Links are asked for by name, and cannot be made there.
        """
        only_plugin = storage_options is not None or is_url(path)
        if only_plugin and self._form == "links":
            what = f"the URL {path!s}" if is_url(path) else "storage_options"
            raise ConfigurationError(
                f"checkpoint='links' makes hard links on this machine's disks, which {what} cannot be used with: use "
                "checkpoint='file', or save to a local directory"
            )
        return only_plugin or not (self.is_stock or (self.is_async and not saves_files))

    def reads(self, path: Any) -> bool:
        """Whether the plugin loads, or removes, the checkpoint at ``path``."""
        return is_url(path) or not self.is_ours


def _is_stock(plugin: Any) -> bool:
    """Whether it is Lightning's ``TorchCheckpointIO``, and none of its methods has been replaced."""
    cls = type(plugin)
    methods = ("save_checkpoint", "load_checkpoint", "remove_checkpoint")
    return cls.__name__ == "TorchCheckpointIO" and all(
        getattr(getattr(owner, name, None), "__module__", "") == cls.__module__
        for name in methods
        for owner in (cls, plugin)
    )


def _is_of(plugin: Any, name: str) -> bool:
    """Whether ``plugin`` is an instance of Lightning's plugin class ``name``, in one of its namespaces."""
    modules = (sys.modules.get(f"{namespace}.plugins") for namespace in ("lightning.pytorch", "pytorch_lightning"))
    return any(isinstance(plugin, getattr(module, name)) for module in modules if module is not None)
