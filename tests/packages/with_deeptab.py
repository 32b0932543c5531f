"""deeptab: tables."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import deeptab.models
import numpy as np
import pandas as pd

from tests.packages.job import Job, Trained

NAMESPACE = "lightning.pytorch"


def table() -> tuple[pd.DataFrame, np.ndarray]:
    generator = np.random.default_rng(4)
    frame = pd.DataFrame(generator.normal(size=(160, 4)), columns=list("abcd"))
    frame["kind"] = generator.choice(["p", "q", "r"], size=160)
    return frame, np.asarray(frame[list("abcd")].sum(axis=1))


def train(name: str, trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    kind = getattr(deeptab.models, name)
    model = kind(random_state=3)
    frame, target = table()
    if name.endswith("Classifier"):
        target = (target > 0).astype(int)
    given = {} if not name.endswith("LSS") else {"family": "normal"}
    model.fit(
        frame, target, max_epochs=epochs, batch_size=32, checkpoint_path=str(folder / "checkpoints"), **given, **trainer
    )
    model.save(str(folder / "model.deeptab"))
    again = kind.load(str(folder / "model.deeptab"))
    return Trained(model._task_model, model.predict(frame), again.predict(frame))


NAMES = [
    "FTTransformerRegressor",
    "FTTransformerLSS",
    "MambularRegressor",
    "SAINTRegressor",
    "TabMRegressor",
    "NODERegressor",
]
JOBS = [Job("deeptab", name, f"{name}.fit", f"{name}.load", partial(train, name)) for name in NAMES]
