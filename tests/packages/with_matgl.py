"""matgl: chemistry of materials; potentials learn forces, which are gradients that the forward takes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from matgl.ext.pymatgen import Structure2Graph
from matgl.graph.data import MGLDataLoader, MGLDataset
from matgl.models import M3GNet, TensorNet
from matgl.utils.training import PotentialLightningModule
from pymatgen.core import Lattice, Structure
from torch import nn

from tests.packages.job import Job, Trained

NAMESPACE = "lightning.pytorch"
ELEMENTS = ("Mo", "S")


def loader(folder: Path) -> Any:
    draw = np.random.default_rng(2)
    structures = []
    for _ in range(8):
        places = np.array([[0, 0, 0], [0.5, 0.5, 0.5]]) + draw.normal(size=(2, 3)) / 40
        structures.append(Structure(Lattice.cubic(3.3), ELEMENTS, places))
    labels = {
        "energies": draw.normal(size=8).tolist(),
        "forces": draw.normal(size=(8, 2, 3)).tolist(),
        "stresses": draw.normal(size=(8, 3, 3)).tolist(),
    }
    graphs = MGLDataset(
        structures=structures,
        converter=Structure2Graph(element_types=ELEMENTS, cutoff=4.0),
        labels=labels,
        root=str(folder / "graphs"),
        save_cache=False,
    )
    return MGLDataLoader(train_data=graphs, val_data=graphs, batch_size=4, num_workers=0)


def train(make: Any, options: dict[str, Any], trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    return _fit(make, options, trainer | {"max_epochs": epochs}, folder, None)


def resume(make: Any, options: dict[str, Any], trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    return _fit(make, options, trainer | {"max_epochs": epochs}, folder, folder / "epochs" / "epoch=1.ckpt")


def _fit(make: Any, options: dict[str, Any], trainer: dict[str, Any], folder: Path, checkpoint: Path | None) -> Trained:
    learned, checked = loader(folder)
    module = PotentialLightningModule(model=make(element_types=ELEMENTS, **options), stress_weight=0.1, lr=1e-2)
    middle = ModelCheckpoint(folder / "epochs", "{epoch}", save_top_k=-1)
    trainer = trainer | {"callbacks": [*trainer["callbacks"], middle]}
    runner = pl.Trainer(inference_mode=False, logger=False, **trainer)
    runner.fit(module, learned, checked, ckpt_path=checkpoint)
    runner.save_checkpoint(folder / "last.ckpt")
    again = PotentialLightningModule.load_from_checkpoint(
        folder / "last.ckpt", model=make(element_types=ELEMENTS, **options)
    )
    return Trained(module, predict(module, checked), predict(again, checked))


def predict(module: nn.Module, batches: Any) -> Any:
    module.eval()
    found = []
    for batch in batches:
        graph, lattice, state, *_ = batch
        with torch.enable_grad():
            found.append(list(module(graph, lattice, state)[:2]))
    return found


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "TensorNet": (TensorNet, {"units": 8, "nblocks": 2, "num_rbf": 6, "is_intensive": False, "use_warp": False}),
    "M3GNet": (M3GNet, {"dim_node_embedding": 8, "dim_edge_embedding": 8, "units": 8, "nblocks": 2,
                        "is_intensive": False}),
}  # fmt: skip
JOBS = [
    Job(
        "matgl",
        name,
        "Trainer.fit",
        "PotentialLightningModule.load_from_checkpoint",
        partial(train, *given),
        partial(resume, *given),
    )
    for name, given in MODELS.items()
]
