"""What other runs of a Trainer leave for a fit, and a fit for what comes after: what plain Lightning leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ssd.errors import ConfigurationError
from tests.helpers.training import make_trainer, streamed

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(pl.LightningModule):
    """Remembers which items it saw, and what dropout made of them; odd parameters of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 8))
        self.none = nn.Linear(8, 0)
        self.phase = nn.Parameter(torch.randn(8, dtype=torch.complex64))
        self.seen: list[Any] = []
        self.lr, self.batch_size = 1e-3, 2

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        turned = (torch.fft.fft(self.net(batch[0])) * self.phase).real
        loss = turned.square().mean() + self.none(batch[0]).sum()
        self.seen.append((batch[1].tolist(), loss.item()))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen.append(self.net(batch[0]).sum().item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(24, 8, generator=torch.Generator().manual_seed(2))
        return DataLoader(TensorDataset(x, torch.arange(24)), self.batch_size, shuffle=True)

    val_dataloader = train_dataloader


Make = Callable[[], Any]


def _fit(folder: Path, make: Make, module: Net, **options: Any) -> None:
    make_trainer(folder, make(), **({"max_steps": -1, "max_epochs": 2} | options)).fit(module)


def evaluated(folder: Path, make: Make, module: Net) -> None:
    saver = ModelCheckpoint(folder, filename="mid", every_n_train_steps=5, save_top_k=-1)
    _fit(folder, make, Net(), max_epochs=1, limit_train_batches=6, callbacks=[saver], enable_checkpointing=True)
    trainer = make_trainer(folder, make(), max_steps=-1, max_epochs=2)
    trainer.validate(module, ckpt_path=str(folder / "mid.ckpt"), verbose=False)
    trainer.fit(module)
    trainer.validate(module, ckpt_path=str(folder / "mid.ckpt"), verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module)


def tuned(folder: Path, make: Make, module: Net) -> None:
    trainer = make_trainer(folder, make(), max_steps=-1, max_epochs=2)
    Tuner(trainer).lr_find(module, num_training=5, update_attr=False)
    Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=2)
    trainer.fit(module)


def found(folder: Path, make: Make, module: Net) -> None:
    finders = [LearningRateFinder(num_training_steps=5), BatchSizeFinder(max_trials=2, steps_per_trial=2)]
    _fit(folder, make, module, callbacks=finders)


def reloaded(folder: Path, make: Make, module: Net) -> None:
    _fit(folder, make, module, reload_dataloaders_every_n_epochs=1)


class Nests(pl.Callback):
    """Another Trainer on the same module, in the middle of a fit."""

    def __init__(self, folder: Path, strategy: str) -> None:
        self._folder, self._strategy = folder, strategy

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        make_trainer(self._folder, self._strategy).validate(module, verbose=False)
        module.trainer = trainer


def nested(folder: Path, make: Make, module: Net) -> None:
    _fit(folder, make, module, callbacks=[Nests(folder, "auto")])


MOVES = pytest.mark.not_simulated(reason="a plain Trainer inside a plain one leaves the module on the CPU")


@pytest.mark.parametrize("program", [evaluated, tuned, found, reloaded, pytest.param(nested, marks=MOVES)])
def test_data_seeds_and_values_are_those_of_plain_lightning(tmp_path: Path, program: Callable[..., None]) -> None:
    shown = []
    for name, make in {"plain": lambda: "auto", "ours": streamed}.items():
        pl.seed_everything(3, verbose=False)
        module = Net()
        program(tmp_path / name, make, module)
        shown.append((module.seen, [p.detach().clone() for p in module.parameters()], torch.rand(()).item()))
    (plain, plain_values, plain_draw), (ours, values, draw) = shown
    assert ours == plain
    assert draw == plain_draw
    assert all(map(torch.equal, values, plain_values))


def test_a_module_that_is_streamed_now_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"streams this module now.*strategy='auto'"):
        _fit(tmp_path, streamed, Net(), callbacks=[Nests(tmp_path, "ssd_offload")])


class Subclass(DataLoader[Any]):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_the_loader_is_itself_again(tmp_path: Path, fails: bool) -> None:
    loader = Subclass(Net().train_dataloader().dataset, 4)
    before = dict(vars(loader))

    class Stops(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if fails:
                raise ZeroDivisionError

    trainer = make_trainer(tmp_path, streamed(), max_steps=2, callbacks=[Stops()])
    try:
        trainer.fit(Net(), loader)
    except ZeroDivisionError:
        assert fails
    assert type(loader) is Subclass
    assert vars(loader) == before
