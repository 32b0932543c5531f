"""Parameters that ``training_step`` writes to: weight clipping, masks, resets. What is written counts, as in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.faults.support import streamed
from tests.helpers.models import GPT
from tests.helpers.training import Module, Tokens, make_trainer


def clip(net: nn.Module) -> None:
    for param in net.parameters():
        param.data.clamp_(-0.02, 0.02)


def clip_without_grad(net: nn.Module) -> None:
    with torch.no_grad():
        for param in net.parameters():
            param.clamp_(-0.02, 0.02)


def assign(net: nn.Module) -> None:
    for param in net.parameters():
        param.data = param.data.clamp(-0.02, 0.02)


def clip_one(net: GPT) -> None:
    net.norm.weight.data.mul_(0.5)  # small: it stays for the whole step
    net.blocks[1].up.weight.data.mul_(0.5)


class Writing(Module):
    """Changes its weights before the forward, and after the update."""

    def __init__(self, write: Callable[[Any], None]) -> None:
        super().__init__(GPT(), schedule=False)
        self.automatic_optimization = False
        self._write = write

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        if batch_idx == 2:
            self._write(self.net)
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if batch_idx != 2:
            self._write(self.net)
        self.losses.append(loss.item())


def run(tmp_path: Path, strategy: Any, write: Callable[[Any], None], precision: str) -> tuple[list[float], Any]:
    pl.seed_everything(1, verbose=False)
    module = Writing(write)
    trainer = make_trainer(tmp_path, strategy, max_steps=5, precision=precision)
    trainer.fit(module, DataLoader(Tokens(400), batch_size=4))
    return module.losses, {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("write", [clip, clip_without_grad, assign, clip_one])
@pytest.mark.parametrize(("min_unit_numel", "host_memory"), [(0, "min"), (1_000_000, "min"), (1_000_000, "512MiB")])
def test_what_a_step_writes_counts(
    tmp_path: Path, write: Callable[[Any], None], min_unit_numel: int, host_memory: str
) -> None:
    losses, weights = run(tmp_path, "auto", write, "32-true")
    strategy = streamed(update="torch", min_unit_numel=min_unit_numel, host_memory=host_memory)
    our_losses, our_weights = run(tmp_path, strategy, write, "32-true")
    assert our_losses == losses
    assert all(torch.equal(our_weights[name], weight) for name, weight in weights.items())


def test_a_float32_master_starts_again_from_what_was_written(tmp_path: Path) -> None:
    _, weights = run(tmp_path, streamed(), clip, "bf16-true")
    assert all(weight.dtype == torch.bfloat16 and weight.abs().max() <= 0.02 for weight in weights.values())


def test_steps_that_only_read_write_nothing(tmp_path: Path) -> None:
    """A weight in a penalty is used outside its module in every step."""
    num_put: list[str] = []

    class Penalty(Module):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.net.head.weight.pow(2).sum() * 1e-3

    class Count(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            store = trainer.strategy.session.store
            put = store.put
            store.put = lambda layout, source: num_put.append(layout.unit) or put(layout, source)

    trainer = make_trainer(tmp_path, streamed(min_unit_numel=1_000_000), max_steps=4, callbacks=[Count()])
    trainer.fit(Penalty(GPT()), DataLoader(Tokens(400), batch_size=4))
    assert num_put == []
