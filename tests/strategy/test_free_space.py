"""What checkpoints need of the disk is counted before the first step, truly and with a way out if it is too much."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from lightning_ssd.errors import CheckpointError, StoreError
from lightning_ssd.session import free_space
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.helpers.models import GPT
from tests.helpers.training import Result, train


def fit(tmp_path: Path, *callbacks: pl.Callback, net: Any = GPT, max_steps: int = 1, **kwargs: Any) -> Result:
    strategy = SSDOffloadStrategy(host_memory="min", min_unit_numel=0)
    options = {"callbacks": list(callbacks), "enable_checkpointing": True, "max_steps": max_steps}
    return train(tmp_path, net, strategy, **(options | kwargs))


def saver(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    defaults = {"filename": "{step}", "every_n_train_steps": 1, "monitor": "step", "mode": "max"}
    return ModelCheckpoint(folder, **(defaults | kwargs))


class Extent(pl.Callback):
    """Bytes of different files on the disk, the most that there are at a time; and what the strategy says of them."""

    def __init__(self, top: Path) -> None:
        self._top = top
        self.own_nbytes = self.whole_nbytes = self.each_nbytes = self.most_nbytes = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        session = trainer.strategy.session
        self.own_nbytes = session.store.nbytes_on_disk + session.sizing.disk_nbytes
        self.whole_nbytes, self.each_nbytes = session.sizing.checkpoint_nbytes(with_state=True)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.strategy.session.drain()  # else files go while we look
        found = {}
        for path in self._top.rglob("*.safetensors"):
            stat = path.stat()
            found[stat.st_ino] = stat.st_size if path.name != "buffers.safetensors" else 0
        self.most_nbytes = max(self.most_nbytes, sum(found.values()))


def _leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_checkpoints: int) -> None:
    """Pretend that the disk has room for a run and some checkpoints, as far as who counts them can see."""
    extent = Extent(tmp_path)
    fit(tmp_path, extent, enable_checkpointing=False)
    placed = extent.whole_nbytes // 3  # parameters, and two states of the same size
    free = extent.own_nbytes - placed + num_checkpoints * extent.whole_nbytes
    monkeypatch.setattr(free_space, "free_nbytes", lambda path: free)


@pytest.mark.parametrize("host_memory", ["min", "1GiB"])
def test_a_run_takes_no_more_than_is_announced(tmp_path: Path, host_memory: str) -> None:
    extent = Extent(tmp_path)
    strategy = SSDOffloadStrategy(host_memory=host_memory, min_unit_numel=0)
    callbacks = [extent, saver(tmp_path / "saved", save_top_k=3)]
    train(tmp_path, GPT, strategy, callbacks=callbacks, enable_checkpointing=True, max_steps=8)
    assert extent.most_nbytes <= extent.own_nbytes + 3 * extent.each_nbytes
    assert extent.most_nbytes >= (4 if host_memory == "min" else 3) * extent.each_nbytes


def test_what_is_frozen_is_on_the_disk_once(tmp_path: Path) -> None:
    def net() -> nn.Module:
        made = GPT()
        made.tok.requires_grad_(False)
        made.blocks.requires_grad_(False)
        return made

    extent = Extent(tmp_path)
    fit(tmp_path, extent, saver(tmp_path / "saved", save_top_k=3), net=net, max_steps=6)
    assert 3 * extent.each_nbytes < extent.whole_nbytes
    assert extent.most_nbytes <= extent.own_nbytes + 3 * extent.each_nbytes


@pytest.mark.parametrize(
    ("options", "num_kept"),
    [
        ({"save_top_k": 3}, 3),
        ({"save_top_k": 3, "save_last": True}, 4),
        ({"save_top_k": 3, "save_last": "link"}, 3),
        ({"save_top_k": 1, "save_last": True, "monitor": None}, 1),
        ({"save_top_k": 0, "save_last": True}, 1),
        ({"save_top_k": 0, "save_last": "link"}, 1),
        ({"save_top_k": -1, "save_last": True}, None),
    ],
)
def test_what_a_callback_keeps(tmp_path: Path, options: dict[str, Any], num_kept: int | None) -> None:
    trainer = pl.Trainer(callbacks=[saver(tmp_path, **options)], logger=False, accelerator="cpu")
    (callback,) = free_space.find_saving_callbacks(trainer)
    assert callback.num_kept == num_kept
    assert callback.folder == str(tmp_path)
    assert callback.has_state


def test_who_saves_nothing_keeps_nothing(tmp_path: Path) -> None:
    kinds = [saver(tmp_path, save_top_k=0), OnExceptionCheckpoint(tmp_path)]
    trainer = pl.Trainer(callbacks=kinds, logger=False, accelerator="cpu")
    assert [(k.name, k.num_kept) for k in free_space.find_saving_callbacks(trainer)] == [("OnExceptionCheckpoint", 0)]
    trainer = pl.Trainer(callbacks=[saver(tmp_path)], logger=False, accelerator="cpu", fast_dev_run=True)
    assert free_space.find_saving_callbacks(trainer) == []


def test_one_save_at_the_end_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links cost nothing before the next step, and there is none."""
    _leave(tmp_path, monkeypatch, num_checkpoints=0)
    at_end = ModelCheckpoint(tmp_path / "saved")
    fit(tmp_path, at_end, max_epochs=1, max_steps=-1, limit_train_batches=2)
    assert Path(at_end.best_model_path).is_file()


def test_no_room_for_one_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _leave(tmp_path, monkeypatch, num_checkpoints=0)
    before = set(os.listdir(tmp_path / ".ssd_offload"))
    for top in (2, -1):
        with pytest.raises(StoreError, match=r"not one checkpoint .* keeps .*saved.* of up to .*free .*dirpath"):
            fit(tmp_path, saver(tmp_path / "saved", save_top_k=top))
    assert not (tmp_path / "saved").exists()
    assert set(os.listdir(tmp_path / ".ssd_offload")) <= before


def test_room_for_some_checkpoints_is_a_warning_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _leave(tmp_path, monkeypatch, num_checkpoints=2)
    monkeypatch.setattr(warnings, "simplefilter", lambda *args: None)  # `train` is silent otherwise
    with pytest.warns(UserWarning, match=r"room for 2 checkpoint\(s\) only: ModelCheckpoint keeps 5 .*save_top_k"):
        fit(tmp_path, saver(tmp_path / "second", save_top_k=5))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="room for")
        fit(tmp_path, saver(tmp_path / "third", save_top_k=2))
        fit(tmp_path, saver(tmp_path / "fourth", save_top_k=-1))


def test_checkpoints_that_will_be_replaced_need_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, saver(tmp_path / "saved", save_top_k=2), max_steps=4)
    _leave(tmp_path, monkeypatch, num_checkpoints=0)
    newest = str(tmp_path / "saved" / "step=4.ckpt")
    with pytest.raises(StoreError, match="not one checkpoint"):  # Lightning never removes the one it resumes from
        fit(tmp_path, saver(tmp_path / "saved", save_top_k=2), max_steps=6, ckpt_path=newest)
    copy = tmp_path / "elsewhere.ckpt"
    os.rename(newest, copy)
    os.rename(f"{newest}.links", f"{copy}.links")
    fit(tmp_path, saver(tmp_path / "saved", save_top_k=1), max_steps=6, ckpt_path=str(copy))


def test_the_first_lines_say_what_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(
            tmp_path,
            saver(tmp_path / "a", save_top_k=2),
            ModelCheckpoint(tmp_path / "b", save_top_k=-1, save_weights_only=True),
        )
    lines = [line for line in caplog.text.splitlines() if line.startswith("  checkpoints: ")]
    assert "ModelCheckpoint keeps 2 in " in lines[0]
    assert "of links each, room for " in lines[0]
    assert "keeps every one in " in lines[1]


def test_another_file_system_is_told_and_has_room_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are whole, and there is one more of them while an older one waits to go."""
    monkeypatch.setattr(free_space, "probe_save", lambda folder, stores: 0.0)
    _leave(tmp_path, monkeypatch, num_checkpoints=2)
    monkeypatch.setattr(warnings, "simplefilter", lambda *args: None)
    with pytest.warns(UserWarning, match=r"checkpoints in '.*second' cannot be hard links .*lightning-ssd copy"):
        fit(tmp_path, saver(tmp_path / "second"))
    with pytest.warns(UserWarning, match=r"room for 1 checkpoint"):
        fit(tmp_path, saver(tmp_path / "third", save_top_k=2))


def test_a_directory_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be saved in '.*file/saved'.*dirpath"):
        fit(tmp_path, saver(tmp_path / "file" / "saved"))
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_tried_where_nothing_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> float:
        raise AssertionError("a trial save without anybody who saves")

    monkeypatch.setattr(free_space, "probe_save", never)
    fit(tmp_path, enable_checkpointing=False)
