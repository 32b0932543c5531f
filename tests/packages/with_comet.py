"""unbabel-comet: language; scores of translations, by an encoder of transformers that is made here."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import comet.models
import pandas as pd
import torch
import yaml
from comet.cli.train import initialize_model, initialize_trainer, read_arguments
from transformers import BertConfig, BertModel, BertTokenizerFast

from tests.packages.job import Job, Trained

NAMESPACE = "pytorch_lightning"
NAMES_ONLY = True  # the configuration is a file
RESUME_NOTE = "its checkpoints do not say whether the encoder is frozen, with plain Lightning neither"
WORDS = (
    *("the", "a", "cat", "dog", "house", "sees", "finds", "big", "small", "red"),
    *("runs", "and", "or", "under", "over", "tree", "bird", "old"),
)


def make_encoder(folder: Path) -> str:
    """A small BERT with random weights, as `from_pretrained` reads it."""
    if not folder.exists():
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
        BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
        with torch.random.fork_rng():  # only the first run comes here
            BertModel(BertConfig(vocab_size=len(WORDS) + 5, **sizes), add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def make_data(file: Path) -> str:
    draw = random.Random(3)
    rows = [[" ".join(draw.choices(WORDS, k=draw.randint(3, 7))) for _ in range(3)] for _ in range(24)]
    frame = pd.DataFrame(rows, columns=["src", "mt", "ref"])
    frame["score"] = [draw.random() for _ in rows]
    frame.to_csv(file, index=False)
    return str(file)


def train(name: str, options: dict[str, Any], trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    return _fit(name, options, trainer, folder, epochs, None)


def resume(name: str, options: dict[str, Any], trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    return _fit(name, options, trainer, folder, epochs, folder / "checkpoints" / "after-epoch=1.ckpt")


def _fit(
    name: str, options: dict[str, Any], trainer: dict[str, Any], folder: Path, epochs: int, checkpoint: Path | None
) -> Trained:
    data = make_data(Path("scores.csv"))  # the names of logged values have it
    plain = {key: value for key, value in trainer.items() if key != "callbacks"}
    model = {
        "pretrained_model": make_encoder(folder.parent / "encoder"),
        "encoder_model": "BERT",
        "nr_frozen_epochs": 0.5,
        "hidden_sizes": [24],
        "batch_size": 4,
        "train_data": [data],
        "validation_data": [data],
        **options,
    }
    saves = {
        "dirpath": str(folder / "checkpoints"),
        "save_last": True,
        "save_top_k": -1,
        "filename": "after-{epoch}",
        "monitor": "val_kendall",
        "mode": "max",
    }
    config = {
        name: {"class_path": f"comet.models.{MODELS[name][0]}", "init_args": model},
        "trainer": _class("trainer.trainer.Trainer", max_epochs=epochs, num_sanity_val_steps=0, **plain),
        "early_stopping": _class("callbacks.EarlyStopping", monitor="val_kendall", mode="max", patience=9),
        "model_checkpoint": _class("callbacks.ModelCheckpoint", **saves),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    asked = read_arguments().parse_args(["--cfg", str(folder / "config.yaml")])
    runner, network = initialize_trainer(asked), initialize_model(asked)
    runner.callbacks += trainer["callbacks"]
    runner.fit(network, ckpt_path=checkpoint)
    (folder / "hparams.yaml").write_text(yaml.safe_dump({"class_identifier": name}))  # a logger of Lightning writes it
    again = comet.models.load_from_checkpoint(str(folder / "checkpoints" / "last.ckpt"))
    return Trained(network, predict(network, data), predict(again, data))


def _class(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"pytorch_lightning.{name}", "init_args": arguments}


def predict(network: Any, data: str) -> Any:
    samples = pd.read_csv(data).to_dict("records")
    return network.predict(samples, batch_size=8, gpus=0, progress_bar=False, num_workers=1).scores


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "regression_metric": ("RegressionMetric", {}),
    "referenceless_regression_metric": (
        "ReferencelessRegression",
        {"keep_embeddings_frozen": False, "nr_frozen_epochs": 0},
    ),
}
JOBS = [
    Job("unbabel-comet", name, "comet-train", "load_from_checkpoint", partial(train, key, o), partial(resume, key, o))
    for key, (name, o) in MODELS.items()
]
