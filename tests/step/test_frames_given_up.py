"""Blocks that put results into their arguments: a circle through the graph, which a step without backward leaves."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_ssd import SSDOffloadStrategy
from lightning_ssd.errors import RecomputeError
from tests.helpers.training import make_trainer

WIDTH = 16


class Cache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.outer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.keys.append(self.inner(x))
        return x + self.outer(cache.keys[-1].tanh())


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.caches: list[weakref.ref[Cache]] = []
        self.alive: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        self.alive.append(sum(cache() is not None for cache in self.caches))
        loss = self.loss(batch)
        return loss if batch_idx == 0 else None

    def loss(self, x: Tensor) -> Tensor:
        cache = Cache()
        self.caches.append(weakref.ref(cache))
        for block in self.blocks:
            x = block(x, cache)
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(6, WIDTH), batch_size=1)


class LateModule(Module):
    """Adds the loss of one step to that of the next."""

    before: Tensor | None = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        if batch_idx % 2 == 0:
            self.before = loss
            return None
        assert self.before is not None
        return loss + self.before


def fit(tmp_path: Path, module: Module, **settings: Any) -> None:
    strategy = SSDOffloadStrategy(nvme_path=str(tmp_path / "store"), min_unit_numel=0, host_memory="min", **settings)
    make_trainer(tmp_path, strategy, max_epochs=1, max_steps=-1).fit(module)


def test_skipped_batches_leave_nothing_in_memory(tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module)
    assert module.alive == [0, 0, 0, 0, 0, 0]


def test_a_backward_through_such_blocks_in_a_later_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecomputeError, match=r"blocks\.2'.*earlier step.*activations='keep'"):
        fit(tmp_path, LateModule())
    fit(tmp_path, LateModule(), activations="keep")
