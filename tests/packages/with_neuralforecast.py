"""neuralforecast.

Not in the list, since plain Lightning does not repeat them: DeepAR, whose model predicts otherwise once it is loaded,
and KAN, two plain runs of which differ in the last bits.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import neuralforecast.models
import numpy as np
import pandas as pd
import torch
from neuralforecast import NeuralForecast

from tests.packages.job import Job, Trained

NAMESPACE = "pytorch_lightning"


def frame() -> pd.DataFrame:
    days = pd.date_range("2021-01-01", periods=80, freq="D")
    return pd.concat(
        pd.DataFrame({"unique_id": f"s{i}", "ds": days, "y": np.sin(np.arange(80) / 4) * (i + 1)}) for i in range(3)
    ).reset_index(drop=True)


def train(name: str, options: dict[str, Any], trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    model = getattr(neuralforecast.models, name)(
        h=4, input_size=12, max_steps=2 * epochs, val_check_steps=4, batch_size=2, random_seed=1, **options, **trainer
    )
    forecaster = NeuralForecast(models=[model], freq="D")
    forecaster.fit(frame(), val_size=8)
    predictions = predict(forecaster)
    forecaster.save(str(folder / "saved"), overwrite=True)
    again = NeuralForecast.load(str(folder / "saved"))
    return Trained(forecaster.models[0], predictions, predict(again, frame()))


def predict(forecaster: Any, *data: Any) -> Any:
    torch.manual_seed(1)  # some draw samples
    return forecaster.predict(*data)


MODELS: dict[str, dict[str, Any]] = {
    "NHITS": {"mlp_units": [[16, 16]] * 3},
    "NBEATS": {"mlp_units": [[16, 16]] * 3},
    "TFT": {"hidden_size": 8, "n_head": 2},
    "PatchTST": {"hidden_size": 16, "n_heads": 2, "patch_len": 4, "encoder_layers": 2},
    "VanillaTransformer": {"hidden_size": 16, "n_head": 2},
    "Autoformer": {"hidden_size": 16, "n_head": 2},
    "FEDformer": {"hidden_size": 16, "n_head": 8, "modes": 4},
    "LSTM": {"encoder_hidden_size": 8, "decoder_hidden_size": 8},
    "TiDE": {"hidden_size": 8},
    "BiTCN": {"hidden_size": 8},
    "DLinear": {},
    "iTransformer": {"n_series": 3, "hidden_size": 16, "n_heads": 2},
    "TSMixer": {"n_series": 3, "ff_dim": 8},
    "TimeMixer": {"n_series": 3, "d_model": 8, "d_ff": 8},
    "TimeXer": {"n_series": 3, "hidden_size": 16, "n_heads": 2, "patch_len": 4},
}
JOBS = [
    Job("neuralforecast", name, "NeuralForecast.fit", "NeuralForecast.load", partial(train, name, options))
    for name, options in MODELS.items()
]
