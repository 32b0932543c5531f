"""In a directory that another user may write to, nothing is deleted, created or linked where they lead us."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ssd.checkpoint import directory
from lightning_ssd.cli.stale_files import find_stale, remove_stale
from lightning_ssd.convert.importing import import_checkpoint
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.engine import File
from lightning_ssd.io.folder import Folder
from lightning_ssd.store.run_directory import RunDirectory
from tests.checkpoint.support import Training, assert_whole

NOBODY, SOMEBODY = 65534, 65533
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def exchange(path: Path, other: Path) -> None:
    """What another user can do in a folder that is not sticky: put something else where ``path`` was."""
    path.rename(path.with_name("moved-away"))
    other.rename(path)


def as_user(uid: int, action: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgid(uid)
            os.setuid(uid)
            action()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_a_run_removes_its_own_files_and_not_what_has_its_name_by_now(tmp_path: Path) -> None:
    run, alive = RunDirectory(str(tmp_path)), RunDirectory(str(tmp_path))
    for each in (run, alive):
        File.create(os.path.join(each.path, "0.safetensors"), 4096, direct=False, folder=each.folder).close()
    exchange(Path(run.path), Path(alive.path))
    File.create(os.path.join(run.path, "1.safetensors"), 4096, direct=False, folder=run.folder).close()
    assert sorted(os.listdir(run.path)) == ["0.safetensors", "lock"]  # of the other run, which has the name now
    run.close(remove=True)
    assert sorted(os.listdir(run.path)) == ["0.safetensors", "lock"]
    assert os.listdir(tmp_path / "moved-away") == []
    Path(run.path).rename(alive.path)
    alive.close(remove=True)


def test_a_save_whose_directory_is_exchanged_publishes_and_deletes_nothing_of_others(
    training: Training, tmp_store: Path
) -> None:
    training.save(tmp_store / "mine")
    with (
        pytest.raises(CheckpointError, match="removed or renamed by somebody else"),
        directory.staging(str(tmp_store / "c")) as staged,
    ):
        exchange(Path(staged.path), tmp_store / "mine")
    assert not (tmp_store / "c").exists()
    assert_whole(Path(staged.path), training, 1)


def test_a_removal_stays_in_what_it_removes(
    training: Training, tmp_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.save(tmp_store / "c")
    training.save(tmp_store / "mine")
    discard = directory.discard_contents

    def swapped(found: Folder, *args: object, **options: object) -> None:
        exchange(Path(found.path), tmp_store / "mine")
        discard(found, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(directory, "discard_contents", swapped)
    directory.remove(tmp_store / "c")
    (kept,) = tmp_store.glob(".c.tmp-*")
    assert_whole(kept, training, 1)
    assert list((tmp_store / "moved-away").iterdir()) == []


@needs_root
def test_import_links_only_what_is_ours_alone(training: Training, tmp_store: Path) -> None:
    training.save(tmp_store / "c")
    shutil.copytree(tmp_store / "c", tmp_store / "theirs")
    shutil.copytree(tmp_store / "c", tmp_store / "shared")
    shutil.copytree(tmp_store / "c", tmp_store / "ours")
    for file in (tmp_store / "theirs" / "units").iterdir():
        os.chown(file, SOMEBODY, SOMEBODY)
    for file in (tmp_store / "shared" / "units").iterdir():
        file.chmod(0o666)
    for name in ("theirs", "shared", "ours"):
        report = import_checkpoint(tmp_store / name, tmp_store / f"from-{name}")
        assert bool(report.nbytes_linked) == (name == "ours")
        for file in (tmp_store / f"from-{name}.links" / "units").iterdir():
            found = file.stat()
            assert (found.st_uid, found.st_nlink) == (0, 2 if name == "ours" else 1)


@needs_root
def test_another_users_checkpoint_is_not_replaced_and_their_leftovers_stay(training: Training, tmp_store: Path) -> None:
    shared = tmp_store / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    for path in (*Path(tmp_store).parents, tmp_store):
        path.chmod(path.stat().st_mode | 0o011) if path.is_relative_to("/tmp") else None
    training.save(shared / "c")
    for path in (shared / "c", *(shared / "c").rglob("*")):
        path.chmod(0o755)
    shutil.copytree(shared / "c", shared / ".c.tmp-1-0123456789abcdef")

    def other() -> None:
        os.umask(0o077)
        own = tmp_store / "shared" / "live-of-nobody"
        own.mkdir()
        theirs = Training(own)
        theirs.advance()
        with pytest.raises(CheckpointError, match="belongs to another user"):
            theirs.save(shared / "c")
        assert find_stale(str(shared / ".c.tmp-1-0123456789abcdef")) is None
        assert not remove_stale(str(shared / ".c.tmp-1-0123456789abcdef"))

    as_user(NOBODY, other)
    assert_whole(shared / "c", training, 1)
    assert sorted(path.name for path in shared.glob(".c.*")) == [".c.tmp-1-0123456789abcdef"]
