"""A trial save says whether real ones can be links, refuses where none can be, and leaves no trace."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from lightning_ssd.cli.stale_files import find_stale
from lightning_ssd.errors import CheckpointError
from lightning_ssd.saving.probe_save import probe_save


@pytest.fixture
def stores(tmp_store: Path) -> list[str]:
    folders = [tmp_store / "a", tmp_store / "b"]
    for folder in folders:
        folder.mkdir()
    return [str(folder) for folder in folders]


def tree(top: Path) -> list[str]:
    return sorted(str(path) for path in top.rglob("*"))


def test_links_and_no_trace(tmp_store: Path, stores: list[str]) -> None:
    (tmp_store / "saved").mkdir()
    (tmp_store / "saved" / "mine.txt").write_text("mine")
    before = tree(tmp_store)
    assert probe_save(str(tmp_store / "saved"), stores) == 1
    assert probe_save(str(tmp_store / "saved" / "not" / "there" / "yet"), stores) == 1
    assert tree(tmp_store) == before


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP])
def test_files_that_cannot_be_linked_are_counted(
    tmp_store: Path, stores: list[str], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    link = os.link

    def fails(source: str, to: str, **kwargs: Any) -> None:
        if source.startswith(stores[1]):
            raise OSError(code, os.strerror(code))
        link(source, to, **kwargs)

    monkeypatch.setattr(os, "link", fails)
    before = tree(tmp_store)
    assert probe_save(str(tmp_store / "saved"), stores) == 0.5
    assert tree(tmp_store) == before


@pytest.mark.parametrize("call", ["mkdir", "open", "rename", "fsync", "unlink"])
def test_a_directory_that_cannot_take_checkpoints_is_named(
    tmp_store: Path, stores: list[str], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Read-only from some call on: whichever it is, the directory is named, and the store is as it was."""
    real = getattr(os, call)

    def fails(path: Any, *args: Any, **kwargs: Any) -> Any:
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        folder = kwargs.get("dir_fd") or kwargs.get("src_dir_fd")
        name = name if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        if str(tmp_store / "saved") in name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(CheckpointError, match=r"no checkpoint can be saved in '.*saved'.*Read-only.*dirpath"):
            probe_save(str(tmp_store / "saved"), stores)
    assert tree(tmp_store / "a") == tree(tmp_store / "b") == []
    # What could not be removed is what `lightning-ssd clean` knows.
    left = list((tmp_store / "saved").iterdir()) if (tmp_store / "saved").is_dir() else []
    assert all(find_stale(str(path)) is not None for path in left)
    assert len(left) <= (call in ("unlink", "rename"))


def test_a_file_in_the_way_is_named(tmp_store: Path, stores: list[str]) -> None:
    (tmp_store / "saved").write_text("a file")
    with pytest.raises(CheckpointError, match=r"saved.checkpoints.*Not a directory"):
        probe_save(str(tmp_store / "saved" / "checkpoints"), stores)
    assert (tmp_store / "saved").read_text() == "a file"
