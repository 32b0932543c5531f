"""``checkpoint="file"``: one file as plain Lightning saves it, which everything opens, and our runs resume from it."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import nn

from lightning_ssd.checkpoint.directory import is_checkpoint
from lightning_ssd.checkpoint.link_file import mark_of
from lightning_ssd.cli.main import main
from lightning_ssd.errors import CheckpointError, ConfigurationError, CorruptionError
from lightning_ssd.session import sizing
from lightning_ssd.session.session import Session
from tests.helpers.models import GPT
from tests.helpers.training import Result, assert_equal, streamed, train


class Tied(GPT):
    """Its head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.tok.weight


def saved_at(tmp_path: Path, step: int, strategy: Any, make_net: Any = GPT, **kwargs: Any) -> tuple[Path, Result]:
    saver = ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=step, save_top_k=1)
    done = train(tmp_path, make_net, strategy, max_steps=step, enable_checkpointing=True, callbacks=[saver], **kwargs)
    return tmp_path / "saved.ckpt", done


@pytest.mark.parametrize("make_net", [GPT, Tied])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_run_resumes_from_it_to_the_bit(tmp_path: Path, precision: Any, make_net: type[nn.Module]) -> None:
    whole = train(tmp_path, make_net, streamed(), max_steps=6, precision=precision)
    path, first = saved_at(tmp_path, 3, streamed(checkpoint="file"), make_net, precision=precision)
    assert path.is_file()
    for form in ("file", "links"):
        rest = train(
            tmp_path, make_net, streamed(checkpoint=form), max_steps=6, precision=precision, ckpt_path=str(path)
        )
        rest.losses[:0] = first.losses
        assert_equal(whole, rest)


@pytest.mark.parametrize("make_net", [GPT, Tied])
def test_it_holds_what_plain_lightning_saves_and_plain_lightning_resumes(
    tmp_path: Path, make_net: type[nn.Module]
) -> None:
    path, _ = saved_at(tmp_path / "ours", 3, streamed(checkpoint="file"), make_net)
    plain_path, _ = saved_at(tmp_path / "plain", 3, "auto", make_net)
    for options in ({"weights_only": True}, {"weights_only": True, "mmap": True}, {"weights_only": False}):
        ours, plain = torch.load(path, **options), torch.load(plain_path, **options)
        assert {key for key in ours if not key.startswith("ssd_offload")} == set(plain)
        assert isinstance(ours["state_dict"], OrderedDict)
        assert_same(ours["state_dict"], plain["state_dict"])
        assert_same(ours["optimizer_states"], plain["optimizer_states"])
        assert_same(ours["lr_schedulers"], plain["lr_schedulers"])
    if make_net is Tied:
        tok, head = (ours["state_dict"][f"net.{name}.weight"] for name in ("tok", "head"))
        assert tok.data_ptr() == head.data_ptr()
    rest = [train(tmp_path, make_net, "auto", max_steps=6, ckpt_path=str(p)) for p in (path, plain_path)]
    assert_equal(*rest)


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b.cpu())
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_callbacks_keep_and_remove_files(tmp_path: Path) -> None:
    saver = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max"
    )
    last = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=2, save_weights_only=True)
    train(
        tmp_path,
        GPT,
        streamed(checkpoint="file"),
        max_steps=5,
        enable_checkpointing=True,
        callbacks=[saver, last, LogsStep()],
    )
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step=4.ckpt", "step=5.ckpt"]
    assert "optimizer_states" not in torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(p.is_file() for p in tmp_path.glob("*.ckpt"))
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".") and p.name != ".ssd_offload"]


class LogsStep(pl.Callback):
    """A number that grows."""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        module.log("step", float(trainer.global_step))


@pytest.mark.parametrize("there", ["nothing", "a file", "a directory of ours"])
def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    class Saves(pl.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            trainer.save_checkpoint(path)

    path = tmp_path / "it.ckpt"
    if there == "a file":
        path.write_bytes(b"mine")
    elif there == "a directory of ours":
        train(tmp_path, GPT, streamed(), max_steps=1, callbacks=[Saves()])
        path.unlink()
        os.rename(f"{path}.links", path)
        assert is_checkpoint(path)
    write = os.write
    num_bytes = 0

    def full(fd: int, data: Any) -> int:
        nonlocal num_bytes
        num_bytes += len(data)
        if num_bytes > 20_000 and "it.ckpt" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, "full")
        return write(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CheckpointError, match=r"it\.ckpt.*full"):
        train(tmp_path, GPT, streamed(checkpoint="file"), max_steps=1, callbacks=[Saves()])
    monkeypatch.undo()
    names = [p.name for p in tmp_path.iterdir() if p.name != ".ssd_offload"]
    assert names == ([] if there == "nothing" else ["it.ckpt"])
    assert there != "a file" or path.read_bytes() == b"mine"
    assert there != "a directory of ours" or is_checkpoint(path)
    train(tmp_path, GPT, streamed(checkpoint="file"), max_steps=1, callbacks=[Saves()])
    assert path.is_file()
    assert is_checkpoint(f"{path}.replaced") == (there == "a directory of ours")


def test_bytes_that_changed_on_disk_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Saves(pl.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            session: Session = trainer.strategy.session
            unit = next(unit for unit in session.units if unit.name == "net.blocks.0")
            generation = session.store.newest(unit.name, "exp_avg")
            with open(generation.file.path, "r+b") as file:
                file.seek(generation.layout.data_begin + 100)
                (byte,) = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1]))
            trainer.save_checkpoint(tmp_path / "it.ckpt")

    with pytest.raises(CorruptionError, match=r"net\.blocks\.0\.exp_avg"):
        train(tmp_path, GPT, streamed(checkpoint="file"), max_steps=1, callbacks=[Saves()])
    assert not (tmp_path / "it.ckpt").exists()


@pytest.mark.parametrize(("limit_nbytes", "is_file"), [(1_000_000, True), (100_000, False)])
def test_a_small_state_is_a_file_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_nbytes: int, is_file: bool
) -> None:
    monkeypatch.setattr(sizing, "AUTO_FILE_NBYTES", limit_nbytes)
    for folder, options, has_links in (
        ("auto", {}, not is_file),
        ("links", {"checkpoint": "links"}, True),
        ("file", {"checkpoint": "file"}, False),
    ):
        path, _ = saved_at(tmp_path / folder, 1, streamed(**options))
        assert path.is_file()
        assert (mark_of(str(path)) is not None) == has_links
        assert Path(f"{path}.links").is_dir() == has_links


@pytest.mark.parametrize("command", ["inspect", "verify", "export", "copy"])
def test_the_command_line_says_what_to_do_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path, _ = saved_at(tmp_path, 1, streamed(checkpoint="file"))
    arguments = [str(path)] + ([str(tmp_path / "out")] if command in ("export", "copy") else [])
    assert main([command, *arguments]) != 0
    assert "is one file that holds everything, without links: open it with torch.load" in capsys.readouterr().err


def test_it_is_what_the_start_up_lines_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    saved_at(tmp_path, 1, streamed(checkpoint="file"))
    assert "of one file each" in caplog.text
    assert "a checkpoint is one file (checkpoint='file'," in caplog.text


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_its_mode_is_that_of_other_files(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path, _ = saved_at(tmp_path, 1, streamed(checkpoint="file"))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path: Path) -> None:
    left, foreign = (
        tmp_path / ".saved.ckpt.export-1-0123456789abcdef",
        tmp_path / ".saved.ckpt.export-1-fedcba9876543210",
    )
    left.touch(0o600)
    left.write_bytes(b"PK\x03\x04 half a file")
    foreign.write_bytes(b"somebody's notes")
    saved_at(tmp_path, 1, streamed(checkpoint="file"))
    assert not left.exists()
    assert foreign.exists()


def test_a_file_and_links_replace_each_other(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    for form in ("links", "file", "links", "file"):
        train(tmp_path, GPT, streamed(checkpoint=form), max_steps=1).trainer.save_checkpoint(path)
        names = sorted(p.name for p in tmp_path.iterdir() if p.name != ".ssd_offload")
        assert names == ["saved.ckpt", *(["saved.ckpt.links"] if form == "links" else [])]
        assert torch.load(path, weights_only=True)["global_step"] == 1


class Uploads(Logger):
    """A logger that says that it uploads checkpoints, as those of Lightning do."""

    name, version = "uploads", "0"

    def __init__(self, log_model: object) -> None:
        super().__init__()
        self._log_model = log_model

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass


class Told(Uploads):
    """One of the user's own that is told of each checkpoint, and does not say what it does."""

    def __init__(self) -> None:
        super().__init__(False)
        del self._log_model

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.seen = torch.load(checkpoint_callback.best_model_path, weights_only=True)["global_step"]


@pytest.mark.parametrize("log_model", [True, "all"])
def test_what_is_uploaded_is_one_file(tmp_path: Path, log_model: object) -> None:
    path, _ = saved_at(tmp_path, 1, streamed(), logger=Uploads(log_model))
    assert mark_of(str(path)) is None
    with pytest.raises(ConfigurationError, match=r"Uploads would upload the file alone: set checkpoint='file'"):
        saved_at(tmp_path, 1, streamed(checkpoint="links"), logger=Uploads(log_model))
    path, _ = saved_at(tmp_path / "links", 1, streamed(checkpoint="links"), logger=Uploads(False))
    assert mark_of(str(path)) is not None
    told = Told()
    path, _ = saved_at(tmp_path / "told", 1, streamed(), logger=told)
    assert (mark_of(str(path)), told.seen) == (None, 1)
