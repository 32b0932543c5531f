"""Runs that stop after step 20 and go on to step 40 in another process; run as a program, it is that other process.

``python -m tests.helpers.resuming DIRECTORY`` resumes each checkpoint ``DIRECTORY/<scenario>.ckpt`` and leaves the
final weights in ``DIRECTORY/<scenario>.pt``.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.helpers.models import GPT
from tests.helpers.training import Module, Tokens, make_trainer

STOP, END = 20, 40


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Tokens changed by every generator a dataset may use."""

    def __init__(self, size: int) -> None:
        self._tokens = Tokens(size)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self._tokens[index]
        shift = random.randrange(97) + int(np.random.randint(97)) + int(torch.randint(97, ()))
        return (x + shift) % 97, (y + shift) % 97


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """No length: Lightning draws one batch ahead."""

    def __init__(self, size: int) -> None:
        self._data = Noisy(size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self._data[random.randrange(len(self._data))] for _ in range(len(self._data)))


class Validated(Module):
    """Draws from a generator in validation, where a restart must neither lose nor repeat a draw."""

    def on_validation_epoch_end(self) -> None:
        torch.rand(5)


class Restless(Validated):
    """Draws in other hooks too."""

    def on_train_start(self) -> None:
        torch.rand(3)

    def on_train_epoch_start(self) -> None:
        random.random()
        torch.rand(2)


@dataclass(frozen=True)
class Scenario:
    """``num_batches`` in an epoch; ``saver``: who saves the checkpoint."""

    num_batches: int = 13
    saver: str = "callback"
    data: type[Dataset[Any]] = Tokens
    loader: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    resumed: dict[str, Any] = field(default_factory=dict)  # settings of the strategy that goes on
    module: type[Module] = Module
    generator: bool = False  # the loader has one of its own


SCENARIOS = {
    "mid-epoch": Scenario(resumed={"host_memory": "64MiB", "min_unit_numel": 1_000_000}),
    "epoch end": Scenario(num_batches=10),
    "hook": Scenario(saver="hook", resumed={"activations": "keep"}),
    "after fit": Scenario(saver="after"),
    "after fit, epoch end": Scenario(num_batches=10, saver="after"),
    "accumulate": Scenario(num_batches=16, trainer={"accumulate_grad_batches": 3}),
    "workers": Scenario(data=Noisy, loader={"num_workers": 2}),
    "noisy data": Scenario(data=Noisy),
    "stream": Scenario(data=Stream, loader={"shuffle": False}),
    "own generator": Scenario(num_batches=8, generator=True),
    "native, clip": Scenario(strategy={"update": "native"}, trainer={"gradient_clip_val": 0.5}),
    "bf16-true": Scenario(trainer={"precision": "bf16-true"}),
    "bf16-true, native": Scenario(trainer={"precision": "bf16-true"}, strategy={"update": "native"}),
    "validation": Scenario(trainer={"val_check_interval": 5}, module=Restless),
    "validation due": Scenario(trainer={"val_check_interval": 7}, module=Restless),
    # Not Restless: Lightning itself does not call on_train_epoch_start after a restart from the last batch of an epoch.
    "validation due, epoch end": Scenario(num_batches=10, module=Validated),
}


def make_net() -> nn.Module:
    return GPT(dropout=0.2, tie=True)


def run(
    directory: Path, name: str, strategy: Any, *, max_steps: int, ckpt_path: str | None = None, seed: int = 1
) -> dict[str, Tensor]:
    """Run one scenario; a checkpoint after step 20 is ``directory/<name>.ckpt``. Returns the weights."""
    scenario = SCENARIOS[name]
    pl.seed_everything(seed, verbose=False)
    module = scenario.module(make_net())
    saving = strategy != "auto" and ckpt_path is None
    callbacks: list[pl.Callback] = []
    if saving and scenario.saver == "callback":
        callbacks.append(ModelCheckpoint(directory, filename=name, every_n_train_steps=STOP, save_top_k=-1))
    if saving and scenario.saver == "hook":
        callbacks.append(_SavesInHook(directory / f"{name}.ckpt"))
    options: dict[str, Any] = {"max_steps": max_steps, "callbacks": callbacks, "enable_checkpointing": bool(callbacks)}
    trainer = make_trainer(directory, strategy, **(options | scenario.trainer))
    data = scenario.data(4 * scenario.num_batches)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(5) if scenario.generator else None
    loader = DataLoader(data, **({"batch_size": 4, "shuffle": True, "generator": generator} | scenario.loader))
    val = DataLoader(Tokens(8), batch_size=4) if issubclass(scenario.module, Validated) else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, val, ckpt_path=ckpt_path)
        if saving and scenario.saver == "after":
            trainer.save_checkpoint(directory / f"{name}.ckpt")
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def make_strategy(name: str, *, resumed: bool) -> SSDOffloadStrategy:
    scenario = SCENARIOS[name]
    smallest = {"host_memory": "min", "min_unit_numel": 0, "update": "torch"}
    return SSDOffloadStrategy(**(smallest | scenario.strategy | (scenario.resumed if resumed else {})))


class _SavesInHook(pl.Callback):
    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == STOP:
            trainer.save_checkpoint(self._path)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    for name in SCENARIOS:
        path = directory / f"{name}.ckpt"
        if path.exists():
            strategy = make_strategy(name, resumed=True)
            torch.save(run(directory, name, strategy, max_steps=END, ckpt_path=str(path), seed=99), f"{path}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
