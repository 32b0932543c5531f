"""Spare files: found again by length and disk, never written again while somebody may see them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ssd.errors import StoreError
from lightning_ssd.io.deadline import Over
from lightning_ssd.io.file import File
from lightning_ssd.sizes import KiB
from lightning_ssd.store.disks import Disk, Disks
from lightning_ssd.store.run_directory import RunDirectory
from lightning_ssd.store.spare_files import SpareFiles


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    """Two run directories, on one file system."""
    made = Disks([RunDirectory(str(tmp_path / name)) for name in ("a", "b")], [False, False])
    yield made
    made.close(remove=True)


@pytest.fixture
def spare(disks: Disks) -> Iterator[SpareFiles]:
    made = SpareFiles(disks)
    yield made
    made.remove()


def new(disks: Disks, nbytes: int = 4 * KiB, disk: Disk | None = None) -> File:
    disk, path = disks.new_path("file", disk)
    return disk.create(path, nbytes)


def inode(file: File) -> int:
    return os.fstat(file.tail_fd).st_ino


def names(disk: Disk) -> list[str]:
    return [name for name in os.listdir(disk.path) if name.endswith(".safetensors")]


def test_a_retired_file_is_taken_by_length_and_disk_and_once(disks: Disks, spare: SpareFiles) -> None:
    first, other = disks.all
    file = new(disks, disk=first)
    spare.retire(file, is_seen=False)
    assert spare.nbytes == 4 * KiB
    assert spare.take(8 * KiB, first) is None
    assert spare.take(4 * KiB, other) is None
    assert spare.take(4 * KiB, first) is file
    assert spare.take(4 * KiB, first) is None
    file.close()


@pytest.mark.parametrize("seen_by", ["mapping", "checkpoint", "transfer that hangs"])
def test_a_file_that_somebody_may_see_is_not_used_again(
    disks: Disks, spare: SpareFiles, tmp_path: Path, seen_by: str
) -> None:
    file = new(disks)
    disk = disks.of(file)
    if seen_by == "checkpoint":
        os.link(file.path, tmp_path / "linked")
    over = Over()
    if seen_by == "transfer that hangs":
        file.give_up(over)
    fd = file.tail_fd
    spare.retire(file, is_seen=seen_by == "mapping")
    assert len(names(disk)) == (seen_by == "transfer that hangs")  # unlinking it could hang too
    assert spare.nbytes == 0
    assert file.closed
    if seen_by == "transfer that hangs":
        assert os.fstat(fd).st_size == file.nbytes  # its descriptor stays open, so that no other file gets the number
        over.set()
        os.close(fd)


def test_a_file_from_outside_is_taken_up_to_the_number_that_is_useful(
    disks: Disks, spare: SpareFiles, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in ("first", "second", "third")]
    for path in paths:
        path.write_bytes(b"x" * 4096)
        path.chmod(0o600)

    def recycle(path: Path, most: int) -> bool:
        file = File(str(path), 0, direct_fd=-1, tail_fd=-1, writable=True)
        return spare.recycle(file, file.stat(), most=most)

    assert not recycle(paths[0], most=0)
    with paths[0].open("rb"):
        assert not recycle(paths[0], most=2)  # somebody reads it
    assert recycle(paths[0], most=2)
    paths[1].chmod(0o666)
    assert not recycle(paths[1], most=2)  # another user may write to it
    paths[1].chmod(0o600)
    assert recycle(paths[1], most=2)
    assert not recycle(paths[2], most=2)
    assert [path.exists() for path in paths] == [False, False, True]
    taken = spare.take(4096, disks.all[0])
    assert taken is not None
    assert os.pread(taken.tail_fd, 1, 0) == b"x"
    taken.close()


def test_close_keeps_files_and_remove_does_not(disks: Disks, spare: SpareFiles) -> None:
    file = new(disks, disk=disks.all[0])
    spare.retire(file, is_seen=False)
    spare.close()
    assert file.closed
    assert len(names(disks.all[0])) == 1
    other = new(disks, disk=disks.all[1])
    spare.retire(other, is_seen=False)
    os.unlink(other.path)  # the user removed it: no error
    spare.remove()
    assert other.closed
    assert spare.nbytes == 0


def test_new_paths_take_turns_and_room_is_asked_of_each_file_system_once(disks: Disks) -> None:
    first, second = (disks.new_path("a/ü") for _ in range(2))
    assert [first[0], second[0]] == disks.all
    assert os.path.basename(first[1]) == "00000000-a__.safetensors"
    assert disks.share_on(disks.all[0].path) == 1.0
    with pytest.raises(StoreError, match=r"the plan needs 1024\.00 TiB on the disk of '.*/a', '.*/b', which has"):
        disks.require_free(1 << 50, "the plan", num_files=1)
    with pytest.raises(StoreError, match=r"the plan needs \d+ files on the disk .* has inodes for \d+ more"):
        disks.require_free(0, "the plan", num_files=1 << 62)


def test_a_file_whose_directory_was_removed_is_closed(disks: Disks, spare: SpareFiles) -> None:
    file = new(disks, disk=disks.all[0])
    shutil.rmtree(disks.all[0].path)
    spare.retire(file, is_seen=True)
    assert file.closed
