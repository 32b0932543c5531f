"""A disk that is too small or fills: a sentence with numbers, the last checkpoint whole, and the rest of it usable."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ssd.errors import CheckpointError, IOFailure, StoreError
from lightning_ssd.io.file import File
from lightning_ssd.sizes import MiB
from lightning_ssd.store import state_store
from tests.faults.support import refused, run_directories, small_gpt, streamed
from tests.helpers.training import assert_equal, train

_LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB. Mounting is for root; others get the same from a faked `statvfs` and `fallocate`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = _LIBC.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, b"size=1m") == 0
    if mounted:
        yield disk
        _LIBC.umount2(os.fsencode(disk), 2)
        return
    with pytest.MonkeyPatch.context() as patch:
        _fake_small(patch, disk)
        yield disk


def _fake_small(patch: pytest.MonkeyPatch, disk: Path) -> None:
    def used() -> int:
        return sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())

    def statvfs(path: Any) -> os.statvfs_result:
        free = max(0, MiB - used()) // 4096
        return os.statvfs_result((4096, 4096, 256, free, free, 0, 0, 0, 0, 255, 0))

    create = File.create

    def full(path: str, nbytes: int, **options: Any) -> File:
        if used() + nbytes > MiB:
            raise IOFailure(errno.ENOSPC, path, 0, nbytes, "create")
        return create(path, nbytes, **options)

    patch.setattr(os, "statvfs", statvfs)
    patch.setattr(state_store.File, "create", full)


def test_a_disk_that_cannot_hold_the_run_is_refused_before_the_first_step(tmp_path: Path, small_disk: Path) -> None:
    parts = ("optimizer state and generations being written needs", "has .*KiB free", "another nvme_path")
    refused(tmp_path, streamed(nvme_path=str(small_disk)), *parts, error=StoreError, make_net=lambda: small_gpt(2000))
    assert run_directories(small_disk) == []


def test_a_disk_that_cannot_hold_the_parameters_is_refused_when_they_are_placed(
    tmp_path: Path, small_disk: Path
) -> None:
    parts = ("placing the parameters needs", "has .*KiB free")
    refused(tmp_path, streamed(nvme_path=str(small_disk)), *parts, error=StoreError, make_net=lambda: small_gpt(9999))
    assert run_directories(small_disk) == []


@pytest.mark.parametrize("at_file", [3, 12, 19, 40])
def test_a_disk_that_fills_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_file: int
) -> None:
    """While parameters are placed, in the first update, in later ones whose files a checkpoint holds."""
    create, made = File.create, [0]

    def full(path: str, nbytes: int, **options: Any) -> File:
        made[0] += 1
        if made[0] >= at_file:
            raise IOFailure(errno.ENOSPC, path, 0, nbytes, "create")
        return create(path, nbytes, **options)

    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    options: dict[str, Any] = {"max_steps": 5, "enable_checkpointing": True}
    with monkeypatch.context() as patch:
        patch.setattr(state_store.File, "create", full)
        with pytest.raises(StoreError, match=r"cannot reserve .* No space left .* the last checkpoint is whole"):
            train(tmp_path, small_gpt, streamed(), callbacks=[saver], **options)
    whole = train(tmp_path, small_gpt, streamed(), max_steps=5)
    saved = sorted((tmp_path / "saved").glob("*.ckpt")) if (tmp_path / "saved").is_dir() else []
    assert bool(saved) == (at_file == 40)
    for path in saved:
        step = int(path.stem.removeprefix("step="))
        rest = train(tmp_path, small_gpt, streamed(), max_steps=5, ckpt_path=str(path))
        assert rest.losses == whole.losses[step:]
        rest.losses = whole.losses
        assert_equal(whole, rest)


def test_a_checkpoint_onto_a_full_disk_is_an_error_and_the_run_can_save_elsewhere(
    tmp_path: Path, small_disk: Path
) -> None:
    result = train(tmp_path, lambda: small_gpt(9999), streamed(), max_steps=2)
    with pytest.raises(CheckpointError, match=r"No space left"):
        result.trainer.save_checkpoint(small_disk / "checkpoint")
    assert list(small_disk.iterdir()) == []
    result.trainer.save_checkpoint(tmp_path / "checkpoint")
    rest = train(tmp_path, lambda: small_gpt(9999), streamed(), max_steps=3, ckpt_path=str(tmp_path / "checkpoint"))
    whole = train(tmp_path, lambda: small_gpt(9999), streamed(), max_steps=3)
    assert rest.losses == whole.losses[2:]
