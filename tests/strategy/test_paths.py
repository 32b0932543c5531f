"""Paths as users write them, with any bytes that a file system takes; what cannot work is refused before step 1."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_ssd.cli.main import main
from lightning_ssd.errors import CheckpointError, ConfigurationError, StoreError
from lightning_ssd.paths import PATH_MAX_NBYTES, memory_file_system
from lightning_ssd.session.settings import store_roots
from tests.faults.support import finish_backward, run_directories
from tests.helpers.models import GPT
from tests.helpers.training import streamed, train

ODD = os.fsdecode(b"a b\n\t\\040 \xff\xc3\xa9$q {x} 'y' #\x7f")
"""Not UTF-8, with all that `/proc/self/mounts`, a shell and a format string could trip over."""


def net() -> GPT:
    return GPT(width=16, layers=2)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a variable SCRATCH; the working directory is elsewhere."""
    for name in ("home", "scratch", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("LIGHTNING_SSD_PATH", raising=False)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~", "home"),
        ("~/a", "home/a"),
        (Path("~/a"), "home/a"),
        ("$SCRATCH/a", "scratch/a"),
        (Path("${SCRATCH}") / "a", "scratch/a"),
        ("a", "here/a"),
        (b"a\xff", "here/a\udcff"),
        (["~/a", Path("$SCRATCH")], "home/a scratch"),
        ((Path("a"), "b"), "here/a here/b"),
        ("./s3:/a", "here/s3:/a"),
    ],
)
def test_what_a_path_means(home: Path, monkeypatch: pytest.MonkeyPatch, written: Any, meant: str) -> None:
    expected = [str(home / each) for each in meant.split(" ")]
    assert store_roots(written, "elsewhere") == expected
    if isinstance(written, str):
        monkeypatch.setenv("LIGHTNING_SSD_PATH", written)
        assert store_roots(None, "elsewhere") == expected


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("s3://bucket/a", "is a URL.*name a local one"),
        (Path("s3://bucket/a"), "'s3:/bucket/a' is a URL"),
        (["/a", "file:///a"], "'file:///a' is a URL"),
        ("simplecache::gs://a", "is a URL"),
        ("$SCRATHC/a", r"'\$SCRATHC/a' names the environment variable \$SCRATHC, which is not set"),
        ("~nobody-here/a", "the home of a user that this machine does not know"),
        ("", "is empty"),
        ("a\0b", "NUL"),
        ("/a/" + "n" * 256, r"too long: its part 'n{256}' has 256 bytes, a name may have 255; choose a shorter"),
        ("/" + "é" * 128, "has 256 bytes"),
        ("/a" * 2000, r"too long: it has 4000 bytes, names inside it up to \d+ more, a path may have 4095"),
    ],
)
def test_what_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch, written: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"(?s)nvme_path=.*{said}"):
        store_roots(written, "elsewhere")
    if isinstance(written, str) and written and "\0" not in written:
        monkeypatch.setenv("LIGHTNING_SSD_PATH", written)
        with pytest.raises(ConfigurationError, match=rf"(?s)\$LIGHTNING_SSD_PATH=.*{said}"):
            store_roots(None, "elsewhere")


def test_the_default_is_below_a_local_folder(home: Path) -> None:
    assert store_roots(None, str(home / "$run")) == [str(home / "$run" / ".ssd_offload")]
    with pytest.raises(ConfigurationError, match=r"default_root_dir \(where nvme_path is not set\)='s3://a' is a URL"):
        store_roots(None, "s3://a")


@pytest.fixture
def _no_log() -> Iterator[None]:
    """What is logged of such paths could not go from a worker to the one who reports."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("_no_log")
def test_any_bytes_that_a_file_system_takes(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = train(home, net, "auto", max_steps=4)
    odd = home / ODD
    odd.mkdir()
    first = train(home, net, streamed(nvme_path=odd), max_steps=2)
    first.trainer.save_checkpoint(odd / "last.ckpt")
    first.trainer.save_checkpoint("~/last.ckpt")
    assert (home / "home" / "last.ckpt").is_file()
    for checkpoint in (odd / "last.ckpt", "~/last.ckpt"):
        result = train(home, net, streamed(nvme_path=odd / "new"), max_steps=4, ckpt_path=str(checkpoint))
        assert result.losses == expected.losses[2:]
        assert all(torch.equal(result.weights[name], value) for name, value in expected.weights.items())
        assert main(["verify", str(checkpoint)]) == 0
    assert main(["copy", str(odd / "last.ckpt"), "$SCRATCH/copy.ckpt"]) == 0
    assert (home / "scratch" / "copy.ckpt").is_file()
    assert main(["clean", str(odd)]) == 0
    assert os.listdir() == []  # nothing was made in the working directory
    with pytest.raises(SystemExit):
        main(["verify", "s3://bucket/last.ckpt"])
    assert "argument checkpoint: path='s3://bucket/last.ckpt' is a URL" in capsys.readouterr().err


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory whose mount point has an odd name."""
    point = tmp_path / ODD
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "none", os.fsencode(point)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount")
    yield point
    subprocess.run(["umount", os.fsencode(point)], check=True)


def test_a_mount_of_an_odd_name_is_seen(mounted: Path) -> None:
    assert memory_file_system(str(mounted)) == "tmpfs"
    assert memory_file_system(str(mounted / "not" / "there")) == "tmpfs"
    assert memory_file_system(f"{mounted}-beside") is None


class _RemovesTheRun(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            shutil.rmtree(trainer.strategy.session.store.disks.all[0].path)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"overlap": "off"}, {"gradient_clip_val": 0.1}),
        ({}, {"accumulate_grad_batches": 2}),
        ({"host_memory": "1GiB"}, {}),  # nothing of it is used before the end
    ],
    ids=["streamed", "gated", "accumulated", "in memory"],
)
def test_a_run_directory_that_somebody_removed_is_named(
    tmp_path: Path, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    strategy = streamed(nvme_path=tmp_path / "store", **settings)
    with pytest.raises(StoreError) as error:
        train(tmp_path, net, strategy, max_steps=6, callbacks=[_RemovesTheRun()], **options)
    assert re.search(r"the run directory '.*/store/ssd-run-\S+' is gone: somebody, or a cleaner", str(error.value))
    assert "resume from it, with an nvme_path where nothing is cleaned up" in str(error.value)
    del error
    finish_backward()
    strategy.lightning_module.trainer._signal_connector.teardown()  # not done by Lightning where a teardown fails
    strategy.session.close()  # what failed was told
    assert run_directories(tmp_path / "store") == []


def test_checkpoints_whose_path_is_too_long(tmp_path: Path) -> None:
    deep = str(tmp_path) + "/d" * ((PATH_MAX_NBYTES - len(str(tmp_path)) - 100) // 2)
    with pytest.raises(ConfigurationError, match=r"ModelCheckpoint: dirpath=.* is too long: it has \d+ bytes"):
        train(
            tmp_path,
            net,
            streamed(),
            max_steps=1,
            enable_checkpointing=True,
            callbacks=[ModelCheckpoint(deep, save_top_k=-1)],
        )
    trainer = train(tmp_path, net, streamed(), max_steps=1).trainer
    with pytest.raises(CheckpointError, match=r"has 2\d\d bytes, a name may have 255"):
        trainer.save_checkpoint(tmp_path / ("n" * 250))
    assert not list(tmp_path.glob("*nnn*"))
