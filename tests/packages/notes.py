"""Callbacks that note the loss of each batch. Packages copy and pickle them, so what they note belongs to the class."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import torch


class Notes:
    """What a run logs: the losses of its batches, and the last logged values."""

    losses: ClassVar[list[float]] = []
    logged: ClassVar[dict[str, float]] = {}

    @staticmethod
    def clear() -> None:
        """A new run begins."""
        Notes.losses.clear()
        Notes.logged.clear()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self.losses.append(float(loss.detach()))

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        self.logged.update({name: float(value) for name, value in trainer.callback_metrics.items()})


# Lightning takes any object as a callback, but some packages insist on the class of their namespace.
if find_spec("lightning"):
    LightningNotes = type("LightningNotes", (Notes, importlib.import_module("lightning.pytorch").Callback), {})
if find_spec("pytorch_lightning"):
    PyTorchLightningNotes = type(
        "PyTorchLightningNotes", (Notes, importlib.import_module("pytorch_lightning").Callback), {}
    )


def notes_of(namespace: str) -> Any:
    """A callback for this namespace: "lightning.pytorch" or "pytorch_lightning"."""
    return globals()["LightningNotes" if namespace == "lightning.pytorch" else "PyTorchLightningNotes"]()
