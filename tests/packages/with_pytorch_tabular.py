"""pytorch-tabular."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_tabular.models
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig

from tests.packages.job import Job, Trained

NAMESPACE = "pytorch_lightning"
NAMES_ONLY = True  # OmegaConf


def table() -> pd.DataFrame:
    generator = np.random.default_rng(4)
    numbers = generator.normal(size=(160, 3))
    kinds = generator.choice(["a", "b", "c"], size=160)
    return pd.DataFrame(
        {"x": numbers[:, 0], "y": numbers[:, 1], "z": numbers[:, 2], "kind": kinds, "target": (numbers.sum(1) > 0) * 1}
    )


def train(name: str, options: dict[str, Any], trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    callbacks = trainer["callbacks"]
    given = {key: trainer[key] for key in ("strategy", "default_root_dir", "enable_model_summary")}
    model = TabularModel(
        data_config=DataConfig(target=["target"], continuous_cols=["x", "y", "z"], categorical_cols=["kind"]),
        model_config=getattr(pytorch_tabular.models, name)(task="classification", seed=1, **options),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            max_epochs=epochs,
            batch_size=32,
            accelerator="cpu",
            devices=1,
            progress_bar="none",
            auto_lr_find=False,
            checkpoints_path=str(folder / "checkpoints"),
            trainer_kwargs=given,
            load_best=True,
            seed=1,
        ),
        verbose=False,
    )
    data = table()
    model.fit(train=data[:128], validation=data[128:], callbacks=callbacks)
    predictions = model.predict(data[128:])
    model.save_model(str(folder / "saved"))
    again = TabularModel.load_model(str(folder / "saved"))
    return Trained(model.model, predictions, again.predict(data[128:]))


MODELS: dict[str, dict[str, Any]] = {
    "CategoryEmbeddingModelConfig": {"layers": "32-16"},
    "FTTransformerConfig": {"input_embed_dim": 16, "num_heads": 2, "num_attn_blocks": 2},
    "TabTransformerConfig": {"input_embed_dim": 16, "num_heads": 2, "num_attn_blocks": 2},
    "AutoIntConfig": {},
    "GANDALFConfig": {"gflu_stages": 2},
    "GatedAdditiveTreeEnsembleConfig": {"num_trees": 3, "tree_depth": 2},
    "DANetConfig": {"n_layers": 4},
    "NodeConfig": {"num_trees": 32, "num_layers": 1, "depth": 3},
}
REFUSED = ("GatedAdditiveTreeEnsembleConfig",)  # its parameters are slices of larger tensors
JOBS = [
    Job(
        "pytorch-tabular",
        name,
        "TabularModel.fit",
        "TabularModel.load_model",
        partial(train, name, options),
        is_refused=name in REFUSED,
    )
    for name, options in MODELS.items()
]
