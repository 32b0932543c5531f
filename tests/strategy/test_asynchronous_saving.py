"""Asynchronous use: a logger that copies checkpoints away in a thread, as uploading ones do, and AsyncCheckpointIO."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch.utils.data import DataLoader

from lightning_ssd.checkpoint.load import CheckpointReader
from tests.helpers.models import GPT
from tests.helpers.training import Module, Tokens, make_trainer, streamed


class Uploader(Logger):
    """Begins to copy the newest checkpoint when it is told of it, and goes on until three later steps are over."""

    def __init__(self, to: Path) -> None:
        super().__init__()
        self._to = to
        self.threads: list[threading.Thread] = []
        self.may_end = threading.Event()

    @property
    def name(self) -> str:
        return "uploader"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        if not self.threads:
            thread = threading.Thread(target=self._upload, args=(checkpoint_callback.best_model_path,))
            self.threads.append(thread)
            thread.start()

    def _upload(self, path: str) -> None:
        files = sorted(file for file in Path(f"{path}.links").rglob("*") if file.is_file())
        for i, file in enumerate(files):
            if i == 1:
                self.may_end.wait(60)  # the rest is read after steps that have updated every unit
            target = self._to / file.relative_to(f"{path}.links")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


class Weights(pl.Callback):
    """The weights at step 2, and the end of the upload after step 5."""

    def __init__(self, logger: Uploader) -> None:
        self._logger = logger

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            self.weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
        if trainer.global_step == 5:
            self._logger.may_end.set()


def test_what_is_read_while_training_goes_on_is_the_checkpoint(tmp_path: Path) -> None:
    logger = Uploader(tmp_path / "uploaded")
    weights = Weights(logger)
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)
    options: dict[str, Any] = {"logger": logger, "callbacks": [weights, saver], "enable_checkpointing": True}
    trainer = make_trainer(tmp_path, streamed(checkpoint="links"), max_steps=6, **options)
    trainer.fit(Module(GPT()), DataLoader(Tokens(40), batch_size=4))
    logger.threads[0].join()
    with CheckpointReader(tmp_path / "uploaded") as reader:
        reader.verify()
        assert reader.manifest.step == 2
        for name in reader.parameter_names:
            assert torch.equal(reader.value(name), weights.weights[name])


def test_async_checkpoint_io_has_nothing_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Reads(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step:  # the save of the step before has returned, so it is whole
                with CheckpointReader(saver.best_model_path) as reader:
                    reader.verify()
                    self.step = reader.manifest.step

    saver, reads = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1), Reads()
    options: dict[str, Any] = {"plugins": [AsyncCheckpointIO()], "callbacks": [reads, saver]}
    trainer = make_trainer(tmp_path, streamed(checkpoint="links"), max_steps=4, enable_checkpointing=True, **options)
    with caplog.at_level("INFO"):
        trainer.fit(Module(GPT()), DataLoader(Tokens(40), batch_size=4))
    assert reads.step == 3
    assert "AsyncCheckpointIO has nothing to do" in caplog.text
