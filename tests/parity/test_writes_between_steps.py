"""What the user writes to parameters while an older copy of them waits in memory for the next forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.helpers.models import GPT
from tests.helpers.plans import choose_plan
from tests.helpers.training import Module, assert_equal, make_trainer, train

STEPS = 5


class Shrink(Callback):
    """Writes in place, after a step or just before the optimizer's."""

    def __init__(self, hook: str, saves_to: Path | None = None) -> None:
        self.saves_to = saves_to
        setattr(self, hook, self.shrink)

    def shrink(self, trainer: Any, module: nn.Module, *args: Any) -> None:
        with torch.no_grad():
            for param in module.parameters():
                param.mul_(0.75)
        if self.saves_to is not None:
            trainer.save_checkpoint(self.saves_to)


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_before_optimizer_step"])
def test_it_equals_plain_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str, saves: bool) -> None:
    """A save brings what was written into the store, and leaves no trace of it beside."""
    plain = train(tmp_path, GPT, max_steps=STEPS, callbacks=[Shrink(hook)])
    choose_plan(monkeypatch, keep_cache=True, num_queued=1)
    strategy = SSDOffloadStrategy(host_memory="64MiB", min_unit_numel=0, update="torch")
    path = tmp_path / "checkpoint" if saves and hook == "on_train_batch_end" else None
    assert_equal(train(tmp_path, GPT, strategy, max_steps=STEPS, callbacks=[Shrink(hook, path)]), plain)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_before_optimizer_step"])
def test_a_new_master_is_made_from_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    """Of 16-bit parameters; where nothing stays in memory, the file is all that there is to make it from."""
    options: dict[str, Any] = {"precision": "bf16-true", "max_steps": STEPS, "callbacks": [Shrink(hook)]}
    strategy = SSDOffloadStrategy(host_memory="min", min_unit_numel=0, update="native")
    streamed = train(tmp_path, GPT, strategy, **options)
    choose_plan(monkeypatch, keep_cache=True, num_queued=1)
    strategy = SSDOffloadStrategy(host_memory="64MiB", min_unit_numel=0, update="native")
    assert_equal(train(tmp_path, GPT, strategy, **options), streamed)


class Added(Module):
    """Adds weights whose modules do not run: they stay for the step after they were touched."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))))
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) + self.first.weight + self.second.weight).square().mean()
        self.losses.append(loss.item())
        return loss


def test_what_was_touched_outside_its_module_is_updated_when_its_memory_is_needed(tmp_path: Path) -> None:
    losses = []
    for strategy in ("auto", SSDOffloadStrategy(host_memory="min", min_unit_numel=0, update="torch")):
        torch.manual_seed(3)
        module = Added()
        data = torch.randn(STEPS * 16, 16, generator=torch.Generator().manual_seed(4))
        trainer = make_trainer(tmp_path, strategy, max_steps=STEPS)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16))  # type: ignore[arg-type]
        losses.append(module.losses)
    assert losses[0] == losses[1]
