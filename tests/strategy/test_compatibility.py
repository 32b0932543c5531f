"""The surface of the Trainer, pattern by pattern: under the strategy everything is what it is in plain Lightning.

Each pattern is trained with plain Lightning and with the strategy, in the smallest memory and with all of it. Losses,
logged values, the order of hooks, weights and the content of a checkpoint are compared to the bit; then plain Lightning
resumes from both checkpoints. `docs/compatibility.md` lists the patterns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as cb
from lightning.pytorch import loggers, profilers
from lightning.pytorch.tuner import Tuner
from torch import nn

from tests.helpers.compatibility import Pattern, compare, each_strategy, make
from tests.helpers.compatibility_modules import (
    Backbone,
    Clips,
    Closing,
    ConfiguresCallbacks,
    ConfiguresModel,
    Draws,
    Freezes,
    KeepsState,
    Manual,
    ManualClosure,
    Momentum,
    Net,
    Plateau,
    Quasi,
    ReturnsDictionary,
    ScalesLoss,
    StepsSchedulers,
    Transfers,
    TwoLoaders,
    ZeroesItself,
)

WIDTH = 6


class HalfOfIt(pl.plugins.HalfPrecision):
    """A precision plugin of the user's."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.to(torch.bfloat16)


_TIMES = ("Timer", "DeviceStatsMonitor", "BatchSizeFinder", "LearningRateFinder")  # they note times, or file names


def flag(name: str, value: Any, module: Callable[[], Net] = Net, **others: Any) -> Pattern:
    return Pattern("Trainer", f"{name}={value!r}", module, lambda: {name: value, **others})


def callback(make: Callable[[], pl.Callback], module: Callable[[], Net] = Net, **trainer: Any) -> Pattern:
    name = type(make()).__name__
    is_stable = name not in _TIMES
    return Pattern("Callbacks", name, module, lambda: trainer, lambda: [make()], same_logs=is_stable, resumes=is_stable)


FLAGS = [
    flag("max_epochs", 3, max_steps=-1),
    flag("min_steps", 5, max_epochs=1, max_steps=-1),
    flag("max_time", {"hours": 1}),
    flag("limit_train_batches", 0.5, max_epochs=2, max_steps=-1),
    flag("limit_val_batches", 1),
    flag("overfit_batches", 2),
    flag("val_check_interval", 0.5),
    flag("val_check_interval", 4, check_val_every_n_epoch=None),
    flag("check_val_every_n_epoch", 2, max_epochs=2, max_steps=-1),
    flag("num_sanity_val_steps", 1),
    flag("log_every_n_steps", 1),
    flag("accumulate_grad_batches", 3),
    flag("gradient_clip_val", 0.1),
    flag("gradient_clip_algorithm", "value", gradient_clip_val=0.01),
    flag("deterministic", True),
    flag("benchmark", True),
    flag("inference_mode", False),
    flag("detect_anomaly", True),
    flag("reload_dataloaders_every_n_epochs", 1, max_epochs=2, max_steps=-1),
    flag("use_distributed_sampler", False),
    flag("sync_batchnorm", True),
    flag("barebones", True, logger=None, enable_checkpointing=None),
    flag("enable_model_summary", True),
    flag("enable_autolog_hparams", False),
    flag("profiler", "simple"),
    Pattern("Profilers", "AdvancedProfiler", trainer=lambda: {"profiler": profilers.AdvancedProfiler()}),
]
PRECISIONS = [
    Pattern("Precision", name, trainer=lambda name=name: {"precision": name})
    for name in ("32-true", "bf16-mixed", "64-true")
] + [Pattern("Precision", "a plugin of one's own", trainer=lambda: {"plugins": [HalfOfIt("bf16-true")]})]
HOOKS = [
    Pattern("LightningModule", "training_step that returns a dictionary", ReturnsDictionary),
    Pattern("LightningModule", "training_step(dataloader_iter)", Draws, same_checkpoint=False),
    Pattern("LightningModule", "several loaders", TwoLoaders),
    Pattern("LightningModule", "manual optimization, several optimizers", Manual),
    Pattern("LightningModule", "manual optimization, step(closure)", ManualClosure),
    Pattern("LightningModule", "configure_model", ConfiguresModel),
    Pattern("LightningModule", "configure_callbacks", ConfiguresCallbacks, resumes=False),  # nothing to monitor yet
    Pattern("LightningModule", "on_save_checkpoint, on_load_checkpoint, state_dict", KeepsState),
    Pattern("LightningModule", "on_before_batch_transfer, on_after_batch_transfer", Transfers),
    Pattern("LightningModule", "configure_gradient_clipping", Clips),
    Pattern("LightningModule", "backward", ScalesLoss),
    Pattern("LightningModule", "optimizer_zero_grad", ZeroesItself),
    Pattern("LightningModule", "lr_scheduler_step", StepsSchedulers),
    Pattern("LightningModule", "frozen parameters", Freezes),
    Pattern("Optimizers", "SGD with momentum, a scheduler by step", Momentum),
    Pattern("Optimizers", "ReduceLROnPlateau", Plateau),
    Pattern("Optimizers", "LBFGS", Quasi),
    Pattern("Optimizers", "a step that cannot be called without a closure", Closing),
]
CALLBACKS = [
    Pattern("Callbacks", "EarlyStopping", callbacks=lambda: [cb.EarlyStopping("val", patience=1)], resumes=False),
    callback(lambda: cb.StochasticWeightAveraging(1e-2, 1), Momentum, max_epochs=3, max_steps=-1),
    callback(lambda: cb.EMAWeightAveraging(decay=0.9)),
    callback(lambda: cb.GradientAccumulationScheduler({0: 2, 1: 1}), max_epochs=2, max_steps=-1),
    callback(lambda: cb.BackboneFinetuning(1, verbose=False), Backbone, max_epochs=2, max_steps=-1),
    callback(lambda: cb.LearningRateMonitor("step"), Momentum),
    callback(lambda: cb.DeviceStatsMonitor()),
    callback(lambda: cb.Timer("00:01:00:00")),
    callback(lambda: cb.LambdaCallback(on_train_start=lambda trainer, module: module.notes.append("start"))),
    callback(lambda: cb.ModelSummary(max_depth=2)),
    callback(lambda: cb.RichModelSummary(max_depth=2)),
    callback(lambda: cb.TQDMProgressBar(), enable_progress_bar=True),
    callback(lambda: cb.RichProgressBar(), enable_progress_bar=True),
    callback(lambda: cb.ModelPruning("l1_unstructured", use_lottery_ticket_hypothesis=False, amount=0.3)),
    callback(lambda: cb.LearningRateFinder(num_training_steps=4)),
    callback(lambda: cb.BatchSizeFinder(steps_per_trial=1, max_trials=2)),
    callback(lambda: cb.ModelCheckpoint(monitor="val", save_top_k=2, every_n_train_steps=2), enable_checkpointing=True),
    callback(lambda: cb.OnExceptionCheckpoint("."), enable_checkpointing=True),
]
LOGGERS = [
    Pattern("Loggers", "CSVLogger", trainer=lambda: {"logger": loggers.CSVLogger("logs")}),
    Pattern("Loggers", "several", trainer=lambda: {"logger": [loggers.CSVLogger("a"), loggers.CSVLogger("b")]}),
]
PATTERNS = {f"{each.area}: {each.what}": each for each in (*FLAGS, *PRECISIONS, *HOOKS, *CALLBACKS, *LOGGERS)}


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.not_simulated(reason="the smallest models; tests/parity has the device")
@pytest.mark.parametrize("name", PATTERNS)
def test_is_as_in_plain_lightning(tmp_path: Path, name: str) -> None:
    compare(tmp_path, PATTERNS[name])


# ------------------------------------------------------------------------------------------------- beyond one fit


@pytest.mark.compatibility("Loops", "fit, validate, test, predict, each with ckpt_path, then fit again")
def test_loops_one_after_the_other(tmp_path: Path) -> None:
    def use(strategy: Callable[[], Any]) -> Any:
        trainer, module = make(tmp_path, strategy()), Net()
        trainer.fit(module)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        path, other = str(tmp_path / "x.ckpt"), Net()
        found = [
            trainer.validate(other, ckpt_path=path, verbose=False),
            trainer.test(other, ckpt_path=path, verbose=False),
            trainer.predict(other, ckpt_path=path),
        ]
        trainer.fit_loop.epoch_loop.max_steps = 6
        trainer.fit(other)
        return [*found, dict(other.state_dict())]

    each_strategy(use)


@pytest.mark.compatibility("Tuner", "lr_find, then fit")
def test_learning_rate_is_found(tmp_path: Path) -> None:
    def use(strategy: Callable[[], Any]) -> Any:
        trainer, module = make(tmp_path, strategy()), Net()
        found = Tuner(trainer).lr_find(module, num_training=6)
        assert found is not None
        trainer.fit(module)
        return found.results, module.lr, dict(module.state_dict())

    each_strategy(use)


@pytest.mark.compatibility("Tuner", "scale_batch_size, then fit")
def test_batch_size_is_scaled(tmp_path: Path) -> None:
    def use(strategy: Callable[[], Any]) -> Any:
        trainer, module = make(tmp_path, strategy()), Net()
        size = Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=1)
        trainer.fit(module)
        return size, dict(module.state_dict())

    each_strategy(use)


@pytest.mark.compatibility("Trainer", "fast_dev_run=2")
def test_fast_development_run(tmp_path: Path) -> None:
    def use(strategy: Callable[[], Any]) -> Any:
        trainer, module = make(tmp_path, strategy(), fast_dev_run=2), Net()
        trainer.fit(module)
        return dict(module.state_dict())

    each_strategy(use)


@pytest.mark.compatibility("Callbacks", "BasePredictionWriter")
def test_predictions_are_written(tmp_path: Path) -> None:
    class Writer(cb.BasePredictionWriter):
        def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
            self.written = predictions

    def use(strategy: Callable[[], Any]) -> Any:
        writer = Writer("epoch")
        make(tmp_path, strategy(), callbacks=[writer]).predict(Net())
        return writer.written

    each_strategy(use)


@pytest.mark.compatibility("LightningModule", "load_from_checkpoint")
def test_a_checkpoint_makes_the_module(tmp_path: Path) -> None:
    def use(strategy: Callable[[], Any]) -> Any:
        trainer = make(tmp_path, strategy())
        trainer.fit(Net(lr=0.01))
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        made = Net.load_from_checkpoint(tmp_path / "x.ckpt")
        return made.lr, dict(made.state_dict())

    each_strategy(use)


@pytest.mark.compatibility("Trainer", "save_checkpoint(weights_only=True)")
def test_weights_alone(tmp_path: Path) -> None:
    def use(strategy: Callable[[], Any]) -> Any:
        trainer = make(tmp_path, strategy())
        trainer.fit(Net())
        trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
        found = torch.load(tmp_path / "x.ckpt", weights_only=True)
        return found["state_dict"], "optimizer_states" in found

    each_strategy(use)
