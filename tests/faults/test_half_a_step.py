"""A step that fails between two units has updated a part of the model: that state is never saved."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from lightning_ssd.errors import CheckpointError, IOFailure, NonFiniteGradientError
from lightning_ssd.optim.pipeline import UpdatePipeline
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.faults.support import finish_backward
from tests.helpers.models import GPT
from tests.helpers.training import Module, Tokens, make_trainer


@pytest.mark.parametrize("overlap", ["auto", "off"])
def test_a_failed_update_is_not_saved(tmp_path: Path, overlap: str) -> None:
    pl.seed_everything(0, verbose=False)
    net = GPT()
    module = Module(net)
    # The embedding's gradient comes last, when the blocks and the head have been updated.
    net.tok.weight.register_hook(lambda grad: grad * float("nan") if len(module.losses) == 3 else grad)
    strategy = SSDOffloadStrategy(host_memory="min", min_unit_numel=0, overlap=overlap)  # type: ignore[arg-type]
    trainer = make_trainer(tmp_path, strategy, callbacks=[_SaveOnException(tmp_path)], max_steps=5)
    with pytest.raises(NonFiniteGradientError, match="net"):
        trainer.fit(module, DataLoader(Tokens(40), batch_size=4))
    assert not (tmp_path / "failed.ckpt").exists()


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}], ids=["in backward", "after a gate"])
def test_nor_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """After a gate the update fails under the next forward, when the step itself seemed to be over."""
    calls, update = itertools.count(), UpdatePipeline.update

    def fails(self: UpdatePipeline, *args: Any, **kwargs: Any) -> None:
        if next(calls) == 10:
            raise IOFailure(errno.EIO, "a file", 0, 4096)
        update(self, *args, **kwargs)

    monkeypatch.setattr(UpdatePipeline, "update", fails)
    strategy = SSDOffloadStrategy(host_memory="min", min_unit_numel=0)
    trainer = make_trainer(tmp_path, strategy, max_steps=5, **options)
    with pytest.raises(IOFailure, match="a file"):
        trainer.fit(Module(GPT()), DataLoader(Tokens(40), batch_size=4))
    with pytest.raises(CheckpointError, match="a part of the model"):
        trainer.save_checkpoint(tmp_path / "failed.ckpt")
    assert not (tmp_path / "failed.ckpt").exists()
    finish_backward()


class _SaveOnException(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        with pytest.raises(CheckpointError, match="a part of the model"):
            trainer.save_checkpoint(self._folder / "failed.ckpt")
