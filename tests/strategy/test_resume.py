"""A run that stops after step 20 and goes on in another process ends as the run that never stopped, to the bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ssd.errors import CheckpointError
from tests.conftest import REPOSITORY
from tests.helpers.resuming import END, SCENARIOS, STOP, make_net, make_strategy, run
from tests.helpers.training import Module, Tokens, make_trainer

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """Final weights of every scenario, after a stop; one process goes on with all of them."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("resume")
    for name in SCENARIOS:
        run(directory, name, make_strategy(name, resumed=False), max_steps=STOP)
    command = [sys.executable, "-m", "tests.helpers.resuming", str(directory)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return {name: torch.load(directory / f"{name}.ckpt.pt") for name in SCENARIOS}


@pytest.mark.parametrize("name", SCENARIOS)
def test_resumed_is_uninterrupted(tmp_path: Path, resumed: dict[str, Weights], name: str) -> None:
    scenario = SCENARIOS[name]
    has_other_arithmetic = "update" in scenario.strategy or "precision" in scenario.trainer
    strategy = make_strategy(name, resumed=False) if has_other_arithmetic else "auto"  # plain Lightning
    expected = run(tmp_path, name, strategy, max_steps=END)
    assert not [key for key, value in expected.items() if not torch.equal(value, resumed[name][key])]


def test_data_that_is_not_there_any_more_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, "mid-epoch", make_strategy("mid-epoch", resumed=False), max_steps=STOP)
    trainer = make_trainer(tmp_path, make_strategy("mid-epoch", resumed=True), max_steps=END)
    module = Module(make_net())
    with pytest.raises(CheckpointError, match="after 7 batches of an epoch, the training data loader has only 3"):
        trainer.fit(module, DataLoader(Tokens(12), batch_size=4), ckpt_path=str(tmp_path / "mid-epoch.ckpt"))
