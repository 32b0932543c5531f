"""pytorch-forecasting."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytorch_forecasting as pf
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.packages.job import Job, Trained

NAMESPACE = "lightning.pytorch"


def dataset(**options: Any) -> pf.TimeSeriesDataSet:
    steps = np.arange(60)
    frame = pd.concat(
        pd.DataFrame({"time": steps, "group": str(i), "value": np.sin(steps / 4) * (i + 1)}) for i in range(3)
    ).reset_index(drop=True)
    return pf.TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["group"],
        max_encoder_length=12,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
        **options,
    )


def train(
    name: str, data: dict[str, Any], model: dict[str, Any], trainer: dict[str, Any], folder: Path, epochs: int
) -> Trained:
    return _fit(name, data, model, trainer | {"max_epochs": epochs}, folder, None)


def resume(
    name: str, data: dict[str, Any], model: dict[str, Any], trainer: dict[str, Any], folder: Path, epochs: int
) -> Trained:
    return _fit(name, data, model, trainer | {"max_epochs": epochs}, folder, folder / "epochs" / "epoch=1.ckpt")


def _fit(
    name: str, data: dict[str, Any], model: dict[str, Any], trainer: dict[str, Any], folder: Path, ckpt: Path | None
) -> Trained:
    series = dataset(**data)
    kind = getattr(pf, name)
    network = kind.from_dataset(series, learning_rate=1e-2, **model)
    loader = series.to_dataloader(train=True, batch_size=16, num_workers=0)
    middle = ModelCheckpoint(folder / "epochs", "{epoch}", save_top_k=-1)
    trainer = trainer | {"callbacks": [*trainer["callbacks"], middle]}
    runner = pl.Trainer(gradient_clip_val=0.1, limit_train_batches=5, logger=False, **trainer)
    checks = series.to_dataloader(train=False, batch_size=16, num_workers=0)
    runner.fit(network, loader, checks, ckpt_path=ckpt, weights_only=False)
    runner.save_checkpoint(folder / "last.ckpt")
    return Trained(
        network,
        predict(network, checks),
        predict(kind.load_from_checkpoint(folder / "last.ckpt", weights_only=False), checks),
    )


def predict(network: Any, checks: Any) -> Any:
    pl.seed_everything(1)
    return network.predict(checks, trainer_kwargs={"accelerator": "cpu", "logger": False})


KNOWN = {"time_varying_known_reals": ["time"]}
ONLY = {"add_relative_time_idx": False}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "TemporalFusionTransformer": (KNOWN, {"hidden_size": 8, "attention_head_size": 2}),
    "NBeats": (ONLY, {"widths": [16, 32], "backcast_loss_ratio": 0.1}),
    "NHiTS": (ONLY, {"hidden_size": 16}),
    "DeepAR": (ONLY, {"hidden_size": 8, "loss": pf.NormalDistributionLoss()}),
    "RecurrentNetwork": (ONLY, {"hidden_size": 8}),
    "DecoderMLP": (KNOWN, {"hidden_size": 8}),
    "TiDEModel": (KNOWN, {"hidden_size": 8}),
}
JOBS = [
    Job(
        "pytorch-forecasting",
        name,
        "Trainer.fit",
        f"{name}.load_from_checkpoint",
        partial(train, name, *o),
        partial(resume, name, *o),
    )
    for name, o in MODELS.items()
]
