"""What a run and a checkpoint put on disk is for their owner only, whatever the umask allows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ssd.convert.copy import copy_checkpoint
from lightning_ssd.convert.export import consolidate, to_safetensors
from lightning_ssd.convert.export_dcp import to_dcp
from lightning_ssd.convert.importing import import_checkpoint
from lightning_ssd.io.engine import File
from lightning_ssd.store.run_directory import RunDirectory
from tests.checkpoint.support import Training


@pytest.fixture(autouse=True)
def _generous() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def assert_private(path: Path) -> None:
    for each in (path, *path.rglob("*")):
        assert each.stat().st_mode & 0o077 == 0, each


def test_everything_is_private(training: Training, tmp_store: Path) -> None:
    training.save(tmp_store / "c")
    copy_checkpoint(tmp_store / "c", tmp_store / "copy")
    consolidate(tmp_store / "c", tmp_store / "one.ckpt")
    (tmp_store / "config").mkdir()
    (tmp_store / "config" / "config.json").write_text("{}")
    to_safetensors(tmp_store / "c", tmp_store / "hf", config_from=tmp_store / "config", max_shard="1MB")
    to_dcp(tmp_store / "c", tmp_store / "dcp")
    import_checkpoint(tmp_store / "hf", tmp_store / "imported")
    for name in ("c", "copy", "one.ckpt", "hf", "dcp", "imported"):
        assert_private(tmp_store / name)
    assert (tmp_store / "hf" / "config.json").read_text() == "{}"


def test_a_run_is_private(tmp_store: Path) -> None:
    run = RunDirectory(str(tmp_store / "root"))
    File.create(os.path.join(run.path, "0.safetensors"), 4096, direct=False).close()
    assert_private(Path(run.path))
    run.close(remove=True)
