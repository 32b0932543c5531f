"""gluonts: probabilistic forecasting."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gluonts.torch
import numpy as np
import pandas as pd
from gluonts.dataset.pandas import PandasDataset
from gluonts.model.predictor import Predictor
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.packages.job import Job, Trained

NAMESPACE = "lightning.pytorch"
RESUME_NOTE = "its stream of data begins anew, with plain Lightning too"


def data() -> PandasDataset:
    index = pd.period_range("2021-01-01", periods=120, freq="D")
    wave = np.sin(np.arange(120) / 3).astype(np.float32)
    return PandasDataset({f"series {i}": pd.DataFrame({"target": wave * (i + 1)}, index=index) for i in range(3)})


def train(name: str, options: dict[str, Any], trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    return _fit(name, options, trainer | {"max_epochs": epochs}, folder, None)


def resume(name: str, options: dict[str, Any], trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    return _fit(name, options, trainer | {"max_epochs": epochs}, folder, folder / "epochs" / "epoch=1.ckpt")


def _fit(name: str, options: dict[str, Any], trainer: dict[str, Any], folder: Path, checkpoint: Path | None) -> Trained:
    middle = ModelCheckpoint(folder / "epochs", "{epoch}", save_top_k=-1)
    trainer = trainer | {"callbacks": [*trainer["callbacks"], middle]}
    estimator = getattr(gluonts.torch, name)(
        prediction_length=4,
        batch_size=8,
        num_batches_per_epoch=4,
        trainer_kwargs=trainer,
        **options,
    )
    output = estimator.train_model(data(), ckpt_path=checkpoint)
    output.predictor.serialize(make(folder / "predictor"))
    again = Predictor.deserialize(folder / "predictor")
    return Trained(output.trained_net, predict(output.predictor), predict(again))


def make(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def predict(predictor: Any) -> list[Any]:
    import torch

    torch.manual_seed(5)
    np.random.seed(5)
    return [forecast.quantile(0.5) for forecast in predictor.predict(data())]


MODELS: dict[str, dict[str, Any]] = {
    "SimpleFeedForwardEstimator": {"hidden_dimensions": [16, 16]},
    "DeepAREstimator": {"freq": "D", "hidden_size": 12},
    "TemporalFusionTransformerEstimator": {"freq": "D", "hidden_dim": 8, "variable_dim": 8},
    "WaveNetEstimator": {"freq": "D", "num_residual_channels": 8, "num_skip_channels": 8},
    "PatchTSTEstimator": {"patch_len": 4, "d_model": 16, "nhead": 2, "dim_feedforward": 16},
    "DLinearEstimator": {},
    "TiDEEstimator": {"freq": "D"},
    "LagTSTEstimator": {"freq": "D", "d_model": 16, "nhead": 2, "dim_feedforward": 16},
}
JOBS = [
    Job("gluonts", name, f"{name}.train", "Predictor.deserialize", partial(train, name, o), partial(resume, name, o))
    for name, o in MODELS.items()
]
