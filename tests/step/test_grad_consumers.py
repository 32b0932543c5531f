"""Which settings and hooks may read gradients before the update, so that these must be visible as ``.grad``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    Timer,
)
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.step.grad_consumers import find_grad_consumer, find_late_reader
from lightning_ssd.strategy.guards import require_set

MODULE_HOOKS = (
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "backward",
    "on_before_zero_grad",
    "optimizer_zero_grad",
)


def consumer(module: Any = None, *callbacks: Any, clip: float | None = None) -> str | None:
    trainer = SimpleNamespace(gradient_clip_val=clip, callbacks=list(callbacks))
    return find_grad_consumer(trainer, LightningModule() if module is None else module)


def made(base: type, name: str) -> Any:
    return type("Mine", (base,), {name: lambda self, *args, **kwargs: None})()


def test_stock_classes_read_no_gradients() -> None:
    assert consumer(None, Callback()) is None


def test_clipping_reads_gradients() -> None:
    assert consumer(clip=1.0) == "gradient_clip_val"


@pytest.mark.parametrize("name", MODULE_HOOKS)
def test_a_module_that_overrides_a_hook(name: str) -> None:
    assert consumer(made(LightningModule, name)) == f"Mine.{name}"


@pytest.mark.parametrize("name", ["on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"])
def test_a_callback_that_overrides_a_hook(name: str) -> None:
    assert consumer(None, Callback(), made(Callback, name)) == f"Mine.{name}"


def test_a_hook_that_is_set_on_the_instance() -> None:
    module = LightningModule()
    module.on_after_backward = lambda: None  # type: ignore[method-assign]
    assert consumer(module) == "LightningModule.on_after_backward"


@pytest.mark.parametrize("name", ["training_step", "on_train_batch_end"])
def test_other_hooks_do_not_count(name: str) -> None:
    assert consumer(made(LightningModule, name), made(Callback, "on_train_batch_end")) is None


def norms(module: LightningModule) -> list[Any]:
    return [param.grad for param in module.parameters()]


class ReadsLate(LightningModule):
    def on_train_batch_end(self, *args: Any) -> None:
        self.note()

    def note(self) -> None:
        norms(self)


class Penalty(LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            return torch.autograd.grad(batch, batch)


def test_code_after_the_step_that_mentions_gradients() -> None:
    late = LambdaCallback(on_train_batch_end=lambda trainer, module, *args: norms(module))
    every: Any = [cls() for cls in (EMAWeightAveraging, Timer, LearningRateMonitor, ModelCheckpoint)]
    trainer = SimpleNamespace(callbacks=every)
    assert find_late_reader(trainer, ReadsLate()) == "ReadsLate.on_train_batch_end"
    assert find_late_reader(trainer, Penalty()) is None
    assert find_late_reader(trainer, BoringModel()) is None
    assert find_late_reader(SimpleNamespace(callbacks=[late]), BoringModel()) == "LambdaCallback.on_train_batch_end"


def test_what_the_trainer_has_not_set_yet_is_named() -> None:
    assert require_set(0, "session") == 0
    with pytest.raises(ConfigurationError, match="has no session yet: the Trainer has not started"):
        require_set(None, "session")
