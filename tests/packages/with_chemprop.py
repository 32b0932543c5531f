"""chemprop: properties of molecules."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from chemprop import data, featurizers, models, nn
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.packages.job import Job, Trained

NAMESPACE = "lightning.pytorch"
SMILES = ["CCO", "c1ccccc1", "CC(=O)O", "CCN", "CCCC", "c1ccncc1", "CC(C)O", "C#N", "CCOCC", "CC(=O)C", "OCCO", "CCCl"]


def loaders() -> tuple[Any, Any]:
    points = [data.MoleculeDatapoint.from_smi(s, [float(len(s) + i % 3)]) for i, s in enumerate(SMILES * 2)]
    dataset = data.MoleculeDataset(points, featurizers.SimpleMoleculeMolGraphFeaturizer())
    dataset.normalize_targets()
    return data.build_dataloader(dataset, batch_size=6, num_workers=0), data.build_dataloader(
        dataset, batch_size=6, num_workers=0, shuffle=False
    )


def train(passing: str, predictor: str, trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    return _fit(passing, predictor, trainer | {"max_epochs": epochs}, folder, None)


def resume(passing: str, predictor: str, trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    return _fit(passing, predictor, trainer | {"max_epochs": epochs}, folder, folder / "epochs" / "epoch=1.ckpt")


def _fit(passing: str, predictor: str, trainer: dict[str, Any], folder: Path, checkpoint: Path | None) -> Trained:
    learned, checked = loaders()
    layers = getattr(nn, passing)(d_h=24, depth=3)
    head = getattr(nn, predictor)(input_dim=24, hidden_dim=16)
    model = models.MPNN(layers, nn.MeanAggregation(), head, batch_norm=True, metrics=[nn.metrics.RMSE()])
    middle = ModelCheckpoint(folder / "epochs", "{epoch}", save_top_k=-1)
    runner = pl.Trainer(logger=False, **trainer | {"callbacks": [*trainer["callbacks"], middle]})
    runner.fit(model, learned, checked, ckpt_path=checkpoint, weights_only=False)
    runner.save_checkpoint(folder / "last.ckpt")
    again = models.MPNN.load_from_checkpoint(folder / "last.ckpt")
    return Trained(model, predict(model, checked, trainer), predict(again, checked, trainer))


def predict(model: Any, loader: Any, trainer: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    return pl.Trainer(logger=False, **trainer).predict(model, loader)


JOBS = [
    Job(
        "chemprop",
        f"MPNN, {passing}, {head}",
        "Trainer.fit",
        "MPNN.load_from_checkpoint",
        partial(train, passing, head),
        partial(resume, passing, head),
    )
    for passing in ("BondMessagePassing", "AtomMessagePassing")
    for head in ("RegressionFFN", "MveFFN", "EvidentialFFN")
]
