"""scvi-tools: single cells."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scvi
import scvi.external
import scvi.model
from scvi.train import SaveCheckpoint

from tests.packages.job import Job, Trained

NAMESPACE = "lightning.pytorch"


def cells() -> Any:
    np.random.seed(3)
    return scvi.data.synthetic_iid(batch_size=64, n_genes=40, n_proteins=8, n_regions=30)


Setup = tuple[dict[str, Any], dict[str, Any], Callable[[Any], Any]]


def train(name: str, setup: Setup, saves: bool, trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    of_data, of_model, predict = setup
    kind = getattr(scvi.model, name, None) or getattr(scvi.external, name)
    scvi.settings.seed = 0
    data = cells()
    kind.setup_anndata(data, **of_data)
    model = kind(data, **of_model)
    given = {key: value for key, value in trainer.items() if key not in ("accelerator", "devices")}
    if saves:
        best = SaveCheckpoint(str(folder / "best"), monitor="elbo_validation", load_best_on_end=True)
        given |= {"callbacks": [*trainer["callbacks"], best], "check_val_every_n_epoch": 1}
    model.train(max_epochs=epochs, batch_size=32, accelerator="cpu", **given)
    if not saves:
        model.save(str(folder / "saved"), overwrite=True)
    again = kind.load(best.best_model_path if saves else str(folder / "saved"), adata=data, accelerator="cpu")
    return Trained(model.module, seeded(predict, model), seeded(predict, again))


def seeded(predict: Callable[[Any], Any], model: Any) -> Any:
    scvi.settings.seed = 1
    return predict(model)


def latent(model: Any) -> Any:
    return model.get_latent_representation()


SMALL = {"n_latent": 4, "n_hidden": 16}
BY_BATCH = {"batch_key": "batch"}
MODELS: dict[str, Setup] = {
    "SCVI": (BY_BATCH, SMALL, latent),
    "SCANVI": (BY_BATCH | {"labels_key": "labels", "unlabeled_category": "label_0"}, SMALL, latent),
    "LinearSCVI": (BY_BATCH, SMALL, latent),
    "AUTOZI": (BY_BATCH, SMALL, latent),
    "TOTALVI": (BY_BATCH | {"protein_expression_obsm_key": "protein_expression"}, {"n_latent": 4}, latent),
    "PEAKVI": (BY_BATCH, {"n_latent": 4, "n_hidden": 16}, latent),
    "CondSCVI": ({"labels_key": "labels"}, SMALL, latent),
    "AmortizedLDA": ({}, {"n_topics": 4, "n_hidden": 16}, latent),
    "POISSONVI": (BY_BATCH, {"n_latent": 4, "n_hidden": 16}, latent),
}
JOBS = [
    Job("scvi-tools", name, f"{name}.train", f"{name}.load", partial(train, name, setup, False))
    for name, setup in MODELS.items()
] + [
    Job(
        "scvi-tools",
        f"{name}, SaveCheckpoint",
        f"{name}.train",
        f"{name}.load",
        partial(train, name, MODELS[name], True),
    )
    for name in ("SCVI", "TOTALVI")
]
