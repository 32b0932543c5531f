"""One way to train a small model, under plain Lightning or under the strategy, and compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy


class Tokens(Dataset[tuple[Tensor, Tensor]]):
    """Random tokens and their successors, the same for an index always."""

    def __init__(self, size: int, vocab: int = 97, seq: int = 16) -> None:
        self._data = torch.randint(0, vocab, (size, seq + 1), generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._data[index, :-1], self._data[index, 1:]


class Images(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, size: int, classes: int = 10, side: int = 16) -> None:
        generator = torch.Generator().manual_seed(8)
        self._x = torch.randn(size, 3, side, side, generator=generator)
        self._y = torch.randint(0, classes, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._x[index], self._y[index]


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    """Two groups: matrices decay, the rest does not."""
    params = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0, "lr": 2e-3},
        ],
        lr=1e-3,
        betas=(0.9, 0.95),
    )


class Module(pl.LightningModule):
    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
        schedule: bool = True,
    ) -> None:
        super().__init__()
        self.net = net
        self._make_optimizer = optimizer
        self._schedule = schedule
        self.losses: list[float] = []
        self.val_losses: list[float] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = self.net(batch[0])
        return F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), batch[1].reshape(-1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.val_losses.append(self.loss(batch).item())

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = self._make_optimizer(self)
        if not self._schedule:
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def streamed(**kwargs: Any) -> SSDOffloadStrategy:
    """The least memory, every module a unit, and each optimizer's own class: the bits of plain Lightning."""
    return SSDOffloadStrategy(**({"host_memory": "min", "min_unit_numel": 0, "update": "torch"} | kwargs))


@dataclass
class Result:
    losses: list[float]
    weights: dict[str, Tensor]
    module: Module
    trainer: pl.Trainer
    val_losses: list[float] = field(default_factory=list)


def make_trainer(tmp_path: Path, strategy: Any, **kwargs: Any) -> pl.Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 10,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(tmp_path),
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(strategy=strategy, **(options | kwargs))


def train(
    tmp_path: Path,
    make_net: Callable[[], nn.Module],
    strategy: Any = "auto",
    *,
    data: Dataset[Any] | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    schedule: bool = True,
    batch_size: int = 4,
    validate: bool = False,
    ckpt_path: str | None = None,
    **kwargs: Any,
) -> Result:
    """Train with seed 1; the same initial weights and batches whatever the strategy."""
    pl.seed_everything(1, verbose=False)
    module = Module(make_net(), optimizer, schedule)
    trainer = make_trainer(tmp_path, strategy, **kwargs)
    data = data or Tokens(400)
    loader = DataLoader(data, batch_size=batch_size, shuffle=True)
    val = DataLoader(data, batch_size=batch_size) if validate else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, val, ckpt_path=ckpt_path)
    weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return Result(module.losses, weights, module, trainer, module.val_losses)


def assert_equal(a: Result, b: Result) -> None:
    """Losses and weights are equal to the bit."""
    assert a.losses == b.losses
    assert a.weights.keys() == b.weights.keys()
    different = [name for name in a.weights if not torch.equal(a.weights[name], b.weights[name])]
    assert not different
