"""The page about troubleshooting, made to happen: a run says what the page quotes, but for names and numbers."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_ssd import SSDOffloadStrategy
from lightning_ssd.errors import IOFailure, SSDOffloadError
from lightning_ssd.session import free_space
from lightning_ssd.store import disks
from tests.helpers.docs import quoted_messages

# Used by name, not by argument: sessions end with the test, and small models train on one thread.
from tests.helpers.fixtures import _sessions_end  # noqa: F401

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_steps": 2,
}


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class NaN(Model):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch * float("nan")).mean()


class Sparse(Model):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam(self.parameters())


def fit(module: LightningModule, num: int = 16, **options: Any) -> Trainer:
    ours = {
        name: options.pop(name) for name in list(options) if name in ("host_memory", "overlap", "units", "checkpoint")
    }
    resume = options.pop("ckpt_path", None)
    trainer = Trainer(strategy=SSDOffloadStrategy(**ours), **QUIET | options)
    trainer.fit(module, DataLoader(torch.randn(num, 64), batch_size=4), ckpt_path=resume)
    return trainer


def resumed_with_less_data() -> None:
    fit(Model(), 40, max_steps=7).save_checkpoint("seven.ckpt")
    fit(Model(), 12, max_steps=20, ckpt_path="seven.ckpt")


def left_its_folder_behind() -> None:
    fit(Model(), checkpoint="links").save_checkpoint("x.ckpt")
    os.mkdir("away")
    torch.load(shutil.copy("x.ckpt", "away"))


CASES: dict[str, Callable[[], object]] = {
    "the budget is too small": lambda: fit(Model(), host_memory="1KiB"),
    "the budget is too large": lambda: fit(Model(), host_memory="900TiB"),
    "a gradient is NaN": lambda: fit(NaN(), overlap="off"),
    "an unknown word": lambda: fit(Model(), overlap="on"),
    "an unknown class": lambda: fit(Model(), units=["Blok"]),
    "two devices": lambda: fit(Model(), devices=2),
    "sparse gradients": lambda: fit(Sparse()),
    "other data": resumed_with_less_data,
    "a file without its folder": left_its_folder_behind,
}


def skeleton(text: str) -> str:
    """A message without the names, paths and numbers of its run."""
    text = re.sub(r"'[^']*'", "'…'", text)
    text = re.sub(r"\d[\d.,]* ?(?:[KMGT]i?)?B?\b", "#", text)
    return re.sub(r"(it has): .*", r"\1: …", text)


def quoted(kind: str) -> set[str]:
    return {skeleton(text) for name, text in quoted_messages("troubleshooting.md") if name == kind}


@pytest.mark.parametrize("case", CASES)
def test_what_is_quoted_happens(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SSDOffloadError) as raised:
        CASES[case]()
    assert skeleton(str(raised.value)) in quoted(type(raised.value).__name__)


def test_a_disk_that_others_fill() -> None:
    failure = IOFailure(errno.ENOSPC, "file", 0, 2**20, "write")
    assert skeleton(str(failure)) in quoted("IOFailure")


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disks, "free_nbytes", lambda path: 1000)
    with pytest.raises(SSDOffloadError) as raised:
        fit(Model())
    assert skeleton(str(raised.value)) in quoted("StoreError")


def test_a_disk_without_room_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(free_space, "free_nbytes", lambda path: 420_000)  # enough for the run itself
    with pytest.raises(SSDOffloadError) as raised:
        fit(Model(), enable_checkpointing=True)
    assert skeleton(str(raised.value)) in quoted("StoreError")
