"""An optimizer's class makes its state under the default dtype of a step, not under that of a forward beside it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_ssd import SSDOffloadStrategy
from tests.helpers.training import make_trainer

WIDTH = 16


class Counts(torch.optim.SGD):
    """Makes a state of the default dtype in each step."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["seen"] = [*state.get("seen", []), str(torch.tensor(0.0).dtype)]
        return loss


class Slow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.01)  # updates that may run beside it do
        return torch.tanh(super().forward(x))


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Slow(WIDTH, WIDTH) for _ in range(4)])
        self.optimizer: torch.optim.Optimizer

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizer = Counts(self.parameters(), 1e-2)
        return self.optimizer

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(4, WIDTH), batch_size=1)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_state_has_the_dtype_that_plain_lightning_gives_it(tmp_path: Path, precision: Any) -> None:
    def seen(strategy: Any) -> list[Any]:
        module = Module()
        trainer = make_trainer(tmp_path, strategy, precision=precision, max_epochs=1, max_steps=-1)
        trainer.fit(module)
        return [state["seen"] for state in module.optimizer.state_dict()["state"].values()]

    store = str(tmp_path / "store")
    ours = SSDOffloadStrategy(nvme_path=store, min_unit_numel=0, activations="recompute", update="torch")
    assert seen("auto") == seen(ours) == [["torch.float32"] * 4] * 8
