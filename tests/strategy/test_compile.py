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


def mean_square(x: Tensor) -> Tensor:
    return x.square().mean()


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Block() for _ in range(3)))
        self.loss = mean_square
        self.losses: list[Tensor] = []

    def step(self, batch: Tensor) -> Tensor:
        return self.loss(self.net(batch))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.step(batch)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.losses.append(self.step(batch).detach())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def blocks(module: Net, backend: str) -> Any:
    module.net = nn.Sequential(*(torch.compile(block, backend=backend) for block in module.net))
    return module


def whole(module: Net, backend: str) -> Any:
    return torch.compile(module, backend=backend)


def network(module: Net, backend: str) -> Any:
    module.net = torch.compile(module.net, backend=backend)  # type: ignore[assignment]
    return module


def in_place(module: Net, backend: str) -> Any:
    module.net.compile(backend=backend)
    module.net[1].compile(backend=backend)
    return module


def function(module: Net, backend: str) -> Any:
    module.loss = torch.compile(mean_square, backend=backend)
    return module


def method(module: Net, backend: str) -> Any:
    module.step = torch.compile(module.step, backend=backend)  # type: ignore[method-assign]
    return module


SPELLINGS = (blocks, whole, network, in_place, function, method)


def run(tmp_path: Path, strategy: Any, spell: Callable[[Net, str], Any], backend: str) -> Any:
    torch._dynamo.reset()
    pl.seed_everything(3, verbose=False)
    module = Net()
    data = DataLoader(torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(4)), batch_size=4)  # type: ignore[arg-type]
    make_trainer(tmp_path, strategy, max_steps=4).fit(spell(module, backend), data, data)
    return [loss.item() for loss in module.losses], module.state_dict()


@pytest.mark.not_simulated(reason="it compiles nothing")
@pytest.mark.parametrize(
    ("spell", "backend"), [*((spell, "eager") for spell in SPELLINGS), (blocks, "aot_eager"), (method, "aot_eager")]
)
@pytest.mark.compatibility("torch.compile", "compiled blocks")
@pytest.mark.compatibility("torch.compile", "the compiled LightningModule")
@pytest.mark.compatibility("torch.compile", "a compiled network")
@pytest.mark.compatibility("torch.compile", "module.compile()")
@pytest.mark.compatibility("torch.compile", "a compiled function")
@pytest.mark.compatibility("torch.compile", "a compiled method")
def test_compiled_parts_equal_plain_lightning(tmp_path: Path, spell: Callable[[Net, str], Any], backend: str) -> None:
    losses, weights = run(tmp_path, "auto", spell, backend)
    assert len(losses) == 8
    for settings in ({}, {"host_memory": "256MiB"}) if backend == "eager" else ({},):
        our_losses, our_weights = run(tmp_path, streamed(**settings), spell, backend)
        assert our_losses == losses, settings
        assert our_weights.keys() == weights.keys()
        assert all(torch.equal(our_weights[key], weights[key]) for key in weights), settings
