"""Copies: whole, compared, gone on with wherever they were interrupted."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ssd.checkpoint import progress as progress_module
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.cli.main import main
from lightning_ssd.cli.stale_files import find_stale
from lightning_ssd.convert import copy as copying
from lightning_ssd.convert.copy import copy_checkpoint
from lightning_ssd.errors import CheckpointError, CorruptionError
from lightning_ssd.io.folder import try_lock
from tests.checkpoint.support import Training, assert_whole
from tests.convert.test_export import AnonymousMemory

DIED = 77


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A directory on another file system."""
    path = Path("/dev/shm") / f"lightning-ssd-copy-{os.getpid()}-{os.urandom(4).hex()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def checkpoint(training: Training, tmp_store: Path) -> Path:
    training.save(tmp_store / "c")
    return tmp_store / "c"


def test_a_copy_is_the_checkpoint(
    checkpoint: Path, training: Training, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = elsewhere / "deep" / "d"
    assert main(["copy", str(checkpoint), str(target)]) == 0
    assert "0 B were there" in capsys.readouterr().out
    assert_whole(target, training, 1)
    assert (target / "manifest.json").read_bytes() == (checkpoint / "manifest.json").read_bytes()
    assert os.listdir(target.parent) == ["d"]
    assert {p.stat().st_mode & 0o777 for p in target.rglob("*") if p.is_file()} == {0o600}
    assert {p.stat().st_mode & 0o777 for p in (target, target / "units")} == {0o700}
    assert main(["copy", str(checkpoint), str(target)]) == 1
    assert "exists" in capsys.readouterr().err


def die_at(number: int, checkpoint: Path, target: Path) -> bool:
    """Copy in a process that ends before its ``number``-th write; False if it made fewer."""
    child = os.fork()
    if child == 0:
        left = number
        write = os.pwrite

        def counted(*args: object) -> int:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(DIED)
            return write(*args)  # type: ignore[arg-type]

        os.pwrite = counted  # type: ignore[assignment]
        try:
            copy_checkpoint(checkpoint, target)
        finally:
            os._exit(0 if target.exists() else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, DIED)
    return code == DIED


def test_a_killed_copy_goes_on_where_it_was(checkpoint: Path, training: Training, elsewhere: Path) -> None:
    with CheckpointReader(checkpoint) as reader:
        nbytes = reader.manifest.nbytes
    number, kept = 1, []
    while die_at(number, checkpoint, elsewhere / "d"):
        assert not (elsewhere / "d").exists()
        (unfinished,) = elsewhere.iterdir()
        found = find_stale(str(unfinished))
        assert found is not None
        assert found.what == "unfinished copy"
        assert not found.kept_because
        report = copy_checkpoint(checkpoint, elsewhere / "d")
        assert report.nbytes_copied + report.nbytes_reused == nbytes
        kept.append(report.nbytes_reused)
        assert_whole(elsewhere / "d", training, 1)
        shutil.rmtree(elsewhere / "d")
        number += 1
    assert kept[0] == 0
    assert kept == sorted(kept)
    assert kept[-1] > nbytes // 2
    assert os.listdir(elsewhere) == ["d"]


def test_what_is_wrong_in_an_unfinished_copy_is_copied_again(
    checkpoint: Path, training: Training, elsewhere: Path
) -> None:
    assert die_at(9, checkpoint, elsewhere / "d")
    (unfinished,) = elsewhere.iterdir()
    victim = sorted((unfinished / "units").iterdir())[0]
    data = bytearray(victim.read_bytes())
    data[5000] ^= 1
    victim.write_bytes(data + b"too long")
    copy_checkpoint(checkpoint, elsewhere / "d")
    assert_whole(elsewhere / "d", training, 1)


def test_a_damaged_source_is_not_copied(checkpoint: Path, elsewhere: Path) -> None:
    victim = checkpoint / "units" / "00001-a.exp_avg.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.unlink()
    victim.write_bytes(data)
    with pytest.raises(CorruptionError, match=r"00001-a.*damaged in the"):
        copy_checkpoint(checkpoint, elsewhere / "d")
    assert not (elsewhere / "d").exists()


def test_what_a_disk_got_wrong_is_found(checkpoint: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = copying._write

    def wrong(fd: int, data: bytes, offset: int) -> None:
        write(fd, data[:-1] + bytes([data[-1] ^ 1]) if offset > 1 << 20 else data, offset)

    monkeypatch.setattr(copying, "_write", wrong)
    with pytest.raises(CorruptionError):
        copy_checkpoint(checkpoint, elsewhere / "d")
    assert not (elsewhere / "d").exists()


def test_one_copy_at_a_time_and_room_first(
    checkpoint: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert die_at(9, checkpoint, elsewhere / "d")
    (unfinished,) = elsewhere.iterdir()
    child = os.fork()
    if child == 0:
        fd = os.open(unfinished, os.O_RDONLY)
        os._exit(0 if try_lock(fd) and _refused(checkpoint, elsewhere / "d") else 1)
    assert os.waitpid(child, 0)[1] == 0
    with monkeypatch.context() as patch:
        real = os.statvfs(elsewhere)
        patch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real[:4], 1, *real[5:])))
        with pytest.raises(CheckpointError, match=r"needs .*free"):
            copy_checkpoint(checkpoint, elsewhere / "d")
    assert main(["clean", str(elsewhere), "--yes"]) == 0
    assert os.listdir(elsewhere) == []


def _refused(checkpoint: Path, target: Path) -> bool:
    """Whether a third process is turned away while this one holds the lock."""
    child = os.fork()
    if child == 0:
        try:
            copy_checkpoint(checkpoint, target)
        except CheckpointError as error:
            os._exit(0 if "another process" in str(error) else 1)
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def test_an_unfinished_copy_leads_nowhere_else(checkpoint: Path, elsewhere: Path, tmp_path: Path) -> None:
    assert die_at(9, checkpoint, elsewhere / "d")
    (unfinished,) = elsewhere.iterdir()
    victim = sorted((unfinished / "units").iterdir())[0]
    outside = tmp_path / "outside"
    outside.write_text("mine")
    victim.unlink()
    victim.symlink_to(outside)
    with pytest.raises(CheckpointError, match="could not be written"):
        copy_checkpoint(checkpoint, elsewhere / "d")
    victim.unlink()
    other = elsewhere / "mine"
    other.write_text("mine")
    os.link(other, victim)
    with pytest.raises(CheckpointError, match="no plain file of its own"):
        copy_checkpoint(checkpoint, elsewhere / "d")
    assert outside.read_text() == other.read_text() == "mine"


def test_a_save_to_another_file_system_is_a_copy_in_little_memory(tmp_store: Path, elsewhere: Path) -> None:
    training = Training(tmp_store, shapes={"a": {"a.weight": (3000, 4000)}, "b": {"b.bias": (5,)}})
    training.advance()
    with AnonymousMemory() as memory:
        report = training.save(elsewhere / "c")
        copy_checkpoint(elsewhere / "c", tmp_store / "d")
    assert report.nbytes_linked == 0
    assert memory.growth_nbytes < 12 << 20
    assert_whole(tmp_store / "d", training, 1)


class _Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_progress_in_a_log(
    training: Training, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training.save(elsewhere / "c")
    assert capsys.readouterr().err == ""  # over before there was anything to say
    monkeypatch.setattr(progress_module, "_LINE_S", 0.0)
    training.save(elsewhere / "c")
    assert re.search(r"saving 'c': +\d+%\|", capsys.readouterr().err)
    for stream in (_Full(), None):  # where progress cannot be shown, the save is the same
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            training.save(elsewhere / "c")
