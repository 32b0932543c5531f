"""Store files: exact length, reserved space, O_DIRECT where it is to be had."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ssd.errors import ConfigurationError, IOFailure
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.io.file import File
from lightning_ssd.io.select import use_direct
from lightning_ssd.sizes import MiB


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_new_file_is_exact_private_and_reserved(tmp_store: Path) -> None:
    file = File.create(tmp_store / "file", 3 * MiB + 1, direct=True)
    status = os.stat(file.path)
    assert status.st_size == file.nbytes == 3 * MiB + 1
    assert status.st_blocks * 512 >= 3 * MiB + 1
    assert status.st_mode & 0o777 == 0o600
    with pytest.raises(IOFailure, match="create") as caught:
        File.create(file.path, 1, direct=True)
    assert caught.value.errno == errno.EEXIST
    assert os.stat(file.path).st_size == file.nbytes  # what was there is not touched
    file.close()


def test_a_full_disk_is_an_error_at_create_and_leaves_nothing(tiny_disk: Path) -> None:
    with pytest.raises(IOFailure, match="create") as caught:
        File.create(tiny_disk / "file", 2 * MiB, direct=True)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tiny_disk) == []


def test_rename_and_close(tmp_store: Path) -> None:
    file = File.create(tmp_store / "old", 10, direct=True)
    (tmp_store / "new").write_bytes(b"in the way")
    file.rename(tmp_store / "new")
    assert file.path == str(tmp_store / "new")
    assert os.listdir(tmp_store) == ["new"]
    file.sync()
    file.close()
    file.close()
    with pytest.raises(ValueError, match="is closed"):
        file.sync()
    with pytest.raises(IOFailure, match="open"):
        File.open(tmp_store / "old", direct=True, writable=False)
    again = File.open(tmp_store / "new", direct=False, writable=False)
    assert (again.nbytes, again.is_direct, again.direct_fd) == (10, False, again.tail_fd)
    again.close()


def test_where_direct_is_refused(tmp_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system without O_DIRECT: files still work, "auto" warns once per look, "on" is an error."""
    assert use_direct(IOOptions(direct="on"), tmp_store)
    real_open = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, **rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real_open(path, flags, mode, **rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(UserWarning, match="O_DIRECT"):
        assert not use_direct(IOOptions(direct="auto"), tmp_store)
    with pytest.raises(ConfigurationError, match="direct='on'"):
        use_direct(IOOptions(direct="on"), tmp_store)
    assert not use_direct(IOOptions(direct="off"), tmp_store)
    assert os.listdir(tmp_store) == []
    file = File.create(tmp_store / "file", 10, direct=True)
    assert not file.is_direct
    file.close()
