"""darts: forecasting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import darts.models
import numpy as np
from darts import TimeSeries

from tests.packages.job import EPOCHS, Job, Trained

NAMESPACE = "pytorch_lightning"
SERIES = TimeSeries.from_values(np.sin(np.arange(160) / 5).astype(np.float32) + np.arange(160, dtype=np.float32) / 80)
COMMON = {"input_chunk_length": 12, "output_chunk_length": 4, "batch_size": 16, "random_state": 1}


def train(
    make: Callable[..., Any], options: dict[str, Any], trainer: dict[str, Any], folder: Path, epochs: int
) -> Trained:
    model = make(
        **(COMMON | options),
        n_epochs=epochs,
        model_name="model",
        work_dir=str(folder / "darts"),
        save_checkpoints=True,
        pl_trainer_kwargs=trainer,
    )
    model.fit(SERIES[:140], val_series=SERIES[100:])
    again = type(model).load_from_checkpoint("model", work_dir=str(folder / "darts"), best=False, trusted=True)
    return Trained(model.model, predict(model), predict(again))


def resume(make: Callable[..., Any], trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    model = make.load_from_checkpoint(  # type: ignore[attr-defined]
        "model", work_dir=str(folder / "darts"), best=False, trusted=True
    )
    model.trainer_params.update(trainer)  # else the Trainer of the run before
    model.fit(SERIES[:140], val_series=SERIES[100:], epochs=epochs)
    model.save(str(folder / "saved.pt"))
    return Trained(model.model, predict(model), predict(type(model).load(str(folder / "saved.pt"), trusted=True)))


def predict(model: Any) -> Any:
    return model.predict(6, series=SERIES[:140], random_state=3).all_values()


MODELS: dict[str, dict[str, Any]] = {
    "TransformerModel": {"d_model": 16, "nhead": 2, "dim_feedforward": 32},
    "TFTModel": {"hidden_size": 8, "add_relative_index": True},
    "NBEATSModel": {"num_stacks": 3, "layer_widths": 16},
    "NHiTSModel": {"num_stacks": 2, "layer_widths": 16},
    "TCNModel": {},
    "RNNModel": {"model": "LSTM", "hidden_dim": 12, "training_length": 16},
    "BlockRNNModel": {"model": "GRU", "hidden_dim": 12},
    "TiDEModel": {"hidden_size": 16, "use_reversible_instance_norm": True},
    "TSMixerModel": {"hidden_size": 8, "ff_size": 8},
    "NLinearModel": {},
    "DLinearModel": {},
}


def job(name: str, options: dict[str, Any]) -> Job:
    make = getattr(darts.models, name)
    options = {key: value for key, value in options.items()}
    common = partial(train, make, options)
    return Job("darts", name, f"{name}.fit", f"{name}.load_from_checkpoint", common, partial(resume, make), EPOCHS + 1)


JOBS = [job(name, options) for name, options in MODELS.items()]
