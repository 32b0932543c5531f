"""Compiled parts of a model: hooks run outside the compiled regions, and the numbers are those of plain Lightning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.training import make_trainer, streamed

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Net(pl.LightningModule):
    def __init__(self, compile_parts: Callable[[Net], None]) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Block() for _ in range(3)))
        self.losses: list[float] = []
        compile_parts(self)

    def step(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.step(batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def whole(module: Net) -> None:
    module.net.compile(backend="eager")


def block(module: Net) -> None:
    module.net[1].compile(backend="eager")


def method(module: Net) -> None:
    module.step = torch.compile(module.step, backend="eager")  # type: ignore[method-assign]


def run(tmp_path: Path, strategy: Any, compile_parts: Callable[[Net], None]) -> Any:
    torch._dynamo.reset()
    pl.seed_everything(3, verbose=False)
    module = Net(compile_parts)
    data = DataLoader(torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(4)), batch_size=4)  # type: ignore[arg-type]
    make_trainer(tmp_path, strategy, max_steps=4).fit(module, data)
    return module.losses, [param.detach().clone() for param in module.parameters()]


@pytest.mark.not_simulated(reason="it compiles nothing")
@pytest.mark.parametrize("compile_parts", [whole, block, method])
def test_compiled_parts_equal_plain_lightning(tmp_path: Path, compile_parts: Callable[[Net], None]) -> None:
    losses, weights = run(tmp_path, "auto", compile_parts)
    for settings in ({}, {"activations": "keep"}, {"host_memory": "256MiB"}):
        our_losses, our_weights = run(tmp_path, streamed(**settings), compile_parts)
        assert our_losses == losses, settings
        assert all(map(torch.equal, our_weights, weights)), settings
