"""A step that fails between two units has updated a part of the model: that state is never saved."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from lightning_ssd.errors import CheckpointError, NonFiniteGradientError
from lightning_ssd.strategy.lightning_face import SSDOffloadStrategy
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


class _SaveOnException(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        with pytest.raises(CheckpointError, match="a part of the model"):
            trainer.save_checkpoint(self._folder / "failed.ckpt")
