from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lightning_ssd.checkpoint import directory
from lightning_ssd.checkpoint.contents import CheckpointContent
from lightning_ssd.checkpoint.directory import is_checkpoint, remove
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.errors import CheckpointError, CorruptionError
from lightning_ssd.io.folder import Folder
from lightning_ssd.saving.write import write_checkpoint
from tests.checkpoint.support import Training, assert_whole


@pytest.fixture
def memory_disk() -> Iterator[Path]:
    """Another file system than the store's."""
    path = Path("/dev/shm") / f"lightning-ssd-test-{os.getpid()}-{os.urandom(4).hex()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def test_round_trip_by_hard_links(training: Training, tmp_store: Path) -> None:
    target = tmp_store / "runs" / "step=1.ckpt"
    report = training.save(target)
    assert_whole(target, training, 1)
    assert report.nbytes_linked == sum(file.nbytes for file in training.files)
    assert (target.stat().st_mode & 0o777, (target / "state.pt").stat().st_mode & 0o777) == (0o700, 0o600)
    assert os.listdir(target.parent) == ["step=1.ckpt"]
    with CheckpointReader(target) as reader:
        for record, file in zip(reader.manifest.files, training.files, strict=True):
            assert os.path.samefile(reader.path_of(record), file.source)
            with safe_open(reader.path_of(record), "pt") as opened:
                for entry in record.entries:
                    assert torch.equal(opened.get_tensor(entry.name), reader.tensor(entry.name, record.kind))
        assert reader.kinds("a.weight") == ("master", "exp_avg")
        assert reader.value("head.weight").data_ptr() == reader.value("a.weight").data_ptr()
        assert reader.parameter_names == ("a.weight", "a.none", "b.scale", "b.bias")


def test_what_a_reader_gives_is_private_and_outlives_it(training: Training, tmp_store: Path) -> None:
    training.save(tmp_store / "c")
    with CheckpointReader(tmp_store / "c") as reader:
        weight = reader.tensor("a.weight", "master")
        weight += 1
        with pytest.raises(CheckpointError, match="no 'momentum'"):
            reader.tensor("a.weight", "momentum")
        with pytest.raises(CheckpointError, match=r"no parameter 'z\.weight'"):
            reader.kinds("z.weight")
    assert torch.equal(weight - 1, weight - 1)
    assert_whole(tmp_store / "c", training, 1)
    with pytest.raises(CheckpointError, match="closed"):
        reader.tensor("a.weight", "master")


def test_tensors_no_safetensors_file_can_hold(training: Training, tmp_store: Path) -> None:
    rest = {
        "freqs": torch.ones(2, dtype=torch.complex128),
        "sparse": torch.eye(3).to_sparse(),
        "cols": torch.ones(3, 4).T,
    }
    record = training.record()
    record.param_groups[0]["schedule"] = torch.Size([2, 3])  # JSON cannot say it
    write_checkpoint(tmp_store / "c", CheckpointContent(training.files, rest, {}, [record], step=1))
    with CheckpointReader(tmp_store / "c") as reader:
        found = reader.buffers()
        assert torch.equal(found["freqs"], rest["freqs"])
        assert torch.equal(found["sparse"].to_dense(), torch.eye(3))
        assert torch.equal(found["cols"], rest["cols"])
        assert type(reader.optimizers()[0].param_groups[0]["schedule"]) is torch.Size


def test_state_with_a_class_of_the_user_says_the_way_out(training: Training, tmp_store: Path) -> None:
    write_checkpoint(
        tmp_store / "c", CheckpointContent(training.files, {}, {"hyper_parameters": {"path": Path("x")}}, [], step=1)
    )
    with CheckpointReader(tmp_store / "c") as reader:
        with pytest.raises(CheckpointError, match=r"Path.*weights_only=False"):
            reader.state()
        assert reader.state(weights_only=False)["hyper_parameters"]["path"] == Path("x")


def test_state_that_cannot_be_pickled_is_a_sentence(training: Training, tmp_store: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be pickled.*lambda"):
        write_checkpoint(
            tmp_store / "c", CheckpointContent(training.files, {}, {"hyper_parameters": {"f": lambda: 0}}, [], step=1)
        )
    assert os.listdir(tmp_store) == ["live"]


def test_other_file_system_and_unfinished_writers_get_a_copy(
    training: Training, tmp_store: Path, memory_disk: Path
) -> None:
    report = training.save(memory_disk / "c")
    assert report.nbytes_linked == 0
    assert_whole(memory_disk / "c", training, 1)
    training.files = [replace(file, linkable=False, checksums=None) for file in training.files]
    seen: list[tuple[int, int]] = []
    training.save(tmp_store / "c", progress=lambda done, total: seen.append((done, total)))
    assert_whole(tmp_store / "c", training, 1)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    with CheckpointReader(tmp_store / "c") as reader:
        assert all(record.checksums is not None for record in reader.manifest.files)
        assert not os.path.samefile(reader.path_of(reader.manifest.files[0]), training.files[0].source)


def test_a_damaged_generation_is_not_copied(training: Training, tmp_store: Path, memory_disk: Path) -> None:
    with open(training.files[0].source, "r+b") as file:
        file.seek(training.files[0].data_begin + 2**20 + 5)
        file.write(b"\x55\xaa")
    with pytest.raises(CorruptionError, match=r"master of unit 'a'.*'a\.weight'"):
        training.save(memory_disk / "c")
    assert os.listdir(memory_disk) == []


def test_overwriting_replaces_ours_and_loses_nothing_of_others(training: Training, tmp_store: Path) -> None:
    target = tmp_store / "last.ckpt"
    target.write_text("a checkpoint of plain Lightning")
    assert training.save(target).moved_aside == f"{target}.replaced"
    assert (tmp_store / "last.ckpt.replaced").read_text() == "a checkpoint of plain Lightning"
    training.advance()
    training.save(target)
    assert_whole(target, training, 2)
    os.rename(target, tmp_store / "best.ckpt")
    target.symlink_to(tmp_store / "best.ckpt")
    assert_whole(target, training, 2)
    training.advance()
    training.save(target)
    assert not target.is_symlink()
    assert_whole(tmp_store / "best.ckpt", training, 2)
    assert_whole(target, training, 3)
    (tmp_store / "theirs").mkdir()
    training.save(tmp_store / "theirs")
    (tmp_store / "mine").mkdir()
    (tmp_store / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        training.save(tmp_store / "mine")
    assert sorted(os.listdir(tmp_store)) == [
        "best.ckpt", "last.ckpt", "last.ckpt.replaced", "live", "mine", "theirs",
    ]  # fmt: skip


def test_without_exchange_two_renames_do(training: Training, tmp_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_exchange", lambda first, second: False)
    training.save(tmp_store / "c")
    training.advance()
    training.save(tmp_store / "c")
    assert_whole(tmp_store / "c", training, 2)
    assert sorted(os.listdir(tmp_store)) == ["c", "live"]


def test_remove_takes_what_we_wrote_and_recycles_last_links(training: Training, tmp_store: Path) -> None:
    target = tmp_store / "c"
    training.save(target)
    (target / "notes.txt").write_text("keep me")
    os.unlink(training.files[0].source)
    taken: list[str] = []

    def recycle(path: str, folder: Folder) -> bool:
        taken.append(os.path.basename(path))
        os.rename(path, tmp_store / "free")
        return True

    remove(target, recycle)
    assert taken == ["00000-a.master.safetensors"]
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    assert not is_checkpoint(target)
    for foreign in (target, tmp_store / "live", tmp_store / "nowhere"):
        with pytest.raises(CheckpointError, match="not removed"):
            remove(foreign)
    assert os.path.exists(training.files[1].source)


@pytest.mark.parametrize("is_there", [False, True])
def test_of_two_that_save_to_one_name_at_a_time_one_is_told(
    training: Training, tmp_store: Path, is_there: bool
) -> None:
    """And neither takes the other's unfinished directory for a dead one's."""
    if is_there:
        training.save(tmp_store / "c")
        with directory.staging(str(tmp_store / "c")) as staged:
            with pytest.raises(CheckpointError, match=r"c' is being saved or removed by another process.*dirpath"):
                training.save(tmp_store / "c")
            with pytest.raises(CheckpointError, match="is being saved or removed"):
                remove(tmp_store / "c")
            assert os.path.isdir(staged.path)
    else:
        told = pytest.raises(CheckpointError, match=r"c' was saved by another process in the meantime.*dirpath")
        with told, directory.staging(str(tmp_store / "c")) as staged:
            training.save(tmp_store / "c")
            assert os.path.isdir(staged.path)
        assert_whole(tmp_store / "c", training, 1)
    assert sorted(os.listdir(tmp_store)) == ["c", "live"]


def test_a_generation_of_another_size_is_refused(training: Training, tmp_store: Path) -> None:
    os.truncate(training.files[2].source, training.files[2].nbytes - 1)
    with pytest.raises(CheckpointError, match="master of unit 'b'"):
        training.save(tmp_store / "c")
    assert os.listdir(tmp_store) == ["live"]


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_generation_that_could_not_be_synced_is_never_linked(
    training: Training, tmp_store: Path, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    """Linux reports a failed write-back once: the next sync succeeds, whatever is on the disk."""
    bad = training.files[0].source
    sync, failed, unsynced = os.fdatasync, [], set[str]()

    def fails_once(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}") == bad and not failed:
            failed.append(bad)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", fails_once)
    with pytest.raises(CheckpointError, match=f"Input/output error: '{bad}'"):
        training.save(tmp_store / "c", unsynced=unsynced)
    assert unsynced == {bad}
    if is_lost:
        with open(bad, "r+b") as file:
            file.seek(-3, os.SEEK_END)
            file.write(b"old")
        with pytest.raises(CorruptionError, match="master of unit 'a' is damaged"):
            training.save(tmp_store / "c", unsynced=unsynced)
        assert os.listdir(tmp_store) == ["live"]
        return
    training.save(tmp_store / "c", unsynced=unsynced)
    assert_whole(tmp_store / "c", training, 1)
    assert [os.stat(file.source).st_nlink for file in training.files] == [1, 2, 2, 2]
    training.files[0] = replace(training.files[0], checksums=None)
    with pytest.raises(CheckpointError, match="no checksums to tell"):
        training.save(tmp_store / "d", unsynced=unsynced)


def test_every_generation_that_could_not_be_synced_is_remembered(
    training: Training, tmp_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    unsynced: set[str] = set()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        with pytest.raises(CheckpointError, match="Input/output error"):
            training.save(tmp_store / "c", unsynced=unsynced)
    assert unsynced == {file.source for file in training.files}
