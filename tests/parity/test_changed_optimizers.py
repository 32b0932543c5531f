"""Optimizers that are used, changed or replaced in the middle of a fit and after it: plain Lightning's numbers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.optim.shared import same
from tests.helpers.optimizers import PerParameter
from tests.helpers.training import make_trainer, streamed
from tests.parity.test_any_optimizer import (
    KEPT,
    WIDTH,
    Alternating,
    Midway,
    Net,
    assert_equal,
    train,
)


def test_a_state_is_in_the_order_of_its_parameters_and_may_be_edited_when_the_run_is_over(tmp_path: Path) -> None:
    def run(strategy: Any) -> Net:
        model = train(tmp_path, strategy, lambda m: AdamW(m.parameters(), lr=1e-2))
        optimizer = model.trainer.optimizers[0]
        assert list(optimizer.state) == list(model.parameters())
        optimizer.state[model.head.weight]["exp_avg"].mul_(0.5)
        for x in torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(2)):
            optimizer.zero_grad()
            model.training_step(x).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.states = optimizer.state_dict()["state"]
        saved = deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["lr"] = 0.5
        optimizer.load_state_dict(saved)
        assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.5
        model.trainer.save_checkpoint(tmp_path / "after")
        return model

    plain = run("auto")
    for settings in ({}, {"host_memory": "auto"}):
        ours = run(streamed(**settings))
        assert_equal(plain, ours)
        assert same(plain.states, ours.states)


def other_class(trainer: pl.Trainer, module: Net) -> None:
    trainer.strategy.optimizers = [SGD(module.parameters(), lr=1e-2, momentum=0.9)]


def add_group(trainer: pl.Trainer, module: Net) -> None:
    trainer.optimizers[0].add_param_group({"params": module.head.parameters(), "lr": 3e-2})


def hook(trainer: pl.Trainer, module: Net) -> None:
    optimizer = trainer.optimizers[0]
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mark": 3})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "mark"})
    optimizer.param_groups[0]["initial_lr"] = 1.0
    before = deepcopy(optimizer.state_dict())
    assert before["mark"] == 3
    del before["param_groups"][0]["initial_lr"]
    optimizer.load_state_dict(before)
    assert "initial_lr" not in optimizer.param_groups[0]


@pytest.mark.parametrize("act", [other_class, add_group, hook])
def test_an_optimizer_that_changes_midway_with_the_default_settings(tmp_path: Path, act: Callable[..., Any]) -> None:
    def make(module: Net) -> Optimizer:
        return AdamW((module.net if act is add_group else module).parameters(), lr=1e-2)

    plain = train(tmp_path, "auto", make, Midway(act))
    for settings in (KEPT, {"update": "auto"}):
        assert_equal(plain, train(tmp_path, streamed(**settings), make, Midway(act)))


def replace_parameter(trainer: pl.Trainer, module: Net) -> None:
    """Not by `add_param_group`, which would refuse it."""
    (group,) = trainer.optimizers[0].param_groups
    module.head.weight = torch.nn.Parameter(module.head.weight.detach().clone())
    group["params"][:] = module.parameters()


def test_a_parameter_that_is_new_in_a_group_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="was not in the LightningModule when the Trainer set it up"):
        train(tmp_path, streamed(), lambda m: AdamW(m.parameters(), lr=1e-2), Midway(replace_parameter))


class Pair(Alternating):
    """Two rules in one unit, by classes that need different memory for an update."""

    def __init__(self) -> None:
        super().__init__()
        matrices = [p for p in self.net.parameters() if p.dim() == 2]
        others = [p for p in self.parameters() if not any(p is m for m in matrices)]
        self._make = lambda _: (PerParameter(matrices), AdamW(others, lr=1e-2))

    def training_step(self, x: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(Net.training_step(self, x))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()


class Zeroes(Alternating):
    """By Lightning's wrapper of the optimizer, which has methods of the optimizer's class."""

    def __init__(self) -> None:
        super().__init__()
        self._make = lambda module: AdamW(module.parameters(), lr=1e-2)

    def training_step(self, x: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(Net.training_step(self, x))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("make", [Pair, Zeroes])
def test_steps_and_zeroed_gradients_by_hand(tmp_path: Path, make: type[Alternating]) -> None:
    def run(strategy: Any) -> Net:
        torch.manual_seed(0)
        model = make()
        data = DataLoader(torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1)), 4)
        make_trainer(tmp_path, strategy, max_epochs=1, max_steps=-1).fit(model, data)
        return model

    assert_equal(run("auto"), run(streamed(update="auto")))


class Twice(Net):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        optimizer.step(closure)
        optimizer.step()


class TwiceKept(Twice):
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None: ...


def test_a_second_step_on_gradients_that_are_gone_is_an_error(tmp_path: Path) -> None:
    def run(strategy: Any, kind: type[Net]) -> Net:
        torch.manual_seed(0)
        model = kind(lambda m: AdamW(m.parameters(), lr=1e-2))
        data = DataLoader(torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1)), 4)
        make_trainer(tmp_path, strategy, max_epochs=1, max_steps=-1).fit(model, data)
        return model

    with pytest.raises(ConfigurationError, match="again on the gradients of the step before"):
        run(streamed(), Twice)
    plain = run("auto", Twice)
    assert_equal(plain, run(streamed(overlap="off"), Twice))
    assert_equal(plain, run(streamed(), TwiceKept))
