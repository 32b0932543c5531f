"""What a package's script is made of: a `Job` for each model, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

EPOCHS = 3


@dataclass
class Trained:
    """What one run of a package's entry point leaves.

    Attributes:
        module: The package's LightningModule.
        predictions: What the trained model predicts: arrays, tensors or frames, in any nesting.
        reloaded: What the model predicts that the package's own loader made of the run's checkpoint.
    """

    module: nn.Module
    predictions: Any
    reloaded: Any


Train = Callable[[dict[str, Any], Path, int], Trained]
"""Of arguments for the Trainer, a folder for files, and the number of epochs in all."""


@dataclass(frozen=True)
class Job:
    """One model of a package.

    Attributes:
        package: Name on PyPI.
        model: The package's class.
        entry: The package's entry point that trains.
        loader: The package's entry point that reads a checkpoint.
        train: Trains anew.
        resume: Goes on from a checkpoint that a run has left in this folder; None where the package cannot.
        resume_epochs: Until when. If that is where the run ended, the checkpoint is one of its middle.
        is_refused: The strategy refuses the model at setup, and says what to do.
    """

    package: str
    model: str
    entry: str
    loader: str
    train: Train
    resume: Train | None = None
    resume_epochs: int = EPOCHS
    is_refused: bool = False
