"""What tests of compatibility share: a pattern is trained by plain Lightning and by the strategy, and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import loggers
from torch import Tensor

from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.helpers.compatibility_modules import Net

PARTS = {"state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"}
"""Of a checkpoint, those that are compared."""


@dataclass(frozen=True)
class Pattern:
    """One row of the page.

    Attributes:
        area: Its table.
        what: The row.
        module: The module.
        trainer: Arguments of the Trainer, made anew for each run.
        callbacks: Further callbacks.
        same_checkpoint: The whole checkpoint is compared; else weights only.
        same_logs: Logged values are compared; they are no times, and no names of files.
        resumes: Plain Lightning can resume from it.
    """

    area: str
    what: str
    module: Callable[[], Net] = Net
    trainer: Callable[[], dict[str, Any]] = dict
    callbacks: Callable[[], list[pl.Callback]] = list
    same_checkpoint: bool = True
    same_logs: bool = True
    resumes: bool = True


class Watch(pl.Callback):
    """Notes what is logged, batch by batch."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    on_validation_end = on_train_batch_end


def fit(folder: Path, pattern: Pattern, strategy: Any, ckpt_path: Path | None = None, **more: Any) -> Any:
    """Train; returns the Trainer, the module and what was logged."""
    pl.seed_everything(2, verbose=False)
    folder.mkdir(exist_ok=True)
    options: dict[str, Any] = {
        "max_steps": 6,
        "logger": loggers.logger.DummyLogger(),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    module, watch = pattern.module(), Watch()
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=[watch, *pattern.callbacks()],
        **(options | pattern.trainer() | more),
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module, watch.logged


def compare(folder: Path, pattern: Pattern) -> None:
    """Everything is equal to the bit, in the smallest memory and with all of it; plain Lightning resumes from both."""
    trainer, module, logged = fit(folder / "plain", pattern, "auto")
    saves = not trainer.barebones
    if saves:
        trainer.save_checkpoint(folder / "plain.ckpt")
        saved = torch.load(folder / "plain.ckpt", weights_only=False)
    for memory in ("min", "auto"):
        our_trainer, our_module, our_logged = fit(folder / memory, pattern, ours(memory))
        assert not pattern.same_logs or same(our_logged, logged)
        assert same(our_module.notes, module.notes)
        assert same(dict(our_module.state_dict()), dict(module.state_dict()))
        if saves:
            our_trainer.save_checkpoint(folder / f"{memory}.ckpt")
            found = torch.load(folder / f"{memory}.ckpt", weights_only=False)
            assert saved.keys() <= found.keys()
            for part in PARTS.intersection(saved) if pattern.same_checkpoint else {"state_dict"}:
                assert same(found[part], saved[part]), part
    if saves and pattern.resumes:
        more = {"max_steps": trainer.global_step + 2, "max_epochs": 10}
        _, plain_again, _ = fit(folder / "plain", pattern, "auto", folder / "plain.ckpt", **more)
        _, ours_again, _ = fit(folder / "plain", pattern, "auto", folder / "min.ckpt", **more)
        assert same(dict(ours_again.state_dict()), dict(plain_again.state_dict()))


def ours(memory: str) -> SSDOffloadStrategy:
    """The strategy that computes plain Lightning's bits."""
    return SSDOffloadStrategy(host_memory=memory, min_unit_numel=0, update="torch", checkpoint="file")


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal to the bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def each_strategy(use: Callable[[Any], Any]) -> None:
    """``use`` returns the same with plain Lightning, and with the strategy in each memory."""
    expected = use(lambda: "auto")
    for memory in ("min", "auto"):
        assert same(use(lambda memory=memory: ours(memory)), expected), memory


def make(tmp_path: Path, strategy: Any, **options: Any) -> pl.Trainer:
    """A Trainer that makes few steps and says nothing."""
    pl.seed_everything(2, verbose=False)
    defaults = {"max_steps": 4, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        enable_model_summary=False,
        **(defaults | options),
    )
