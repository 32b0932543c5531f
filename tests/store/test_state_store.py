"""Generations: immutable, recycled only where nobody can see it, readable by the format's own library."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_ssd.errors import CorruptionError, DeadlineError, IOFailure, StoreError
from lightning_ssd.io.deadline import Patience
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.io.file import File
from lightning_ssd.io.python_engine import PythonEngine
from lightning_ssd.memory.pool import Pool
from lightning_ssd.sizes import MiB
from lightning_ssd.store import state_store
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.layout import CHECK_NBYTES, Shape, UnitLayout, file_order, lay_out
from lightning_ssd.store.run_directory import RunDirectory
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.trace.recorder import Trace

# Several checksum pieces, an odd tail, an empty and a scalar parameter.
SHAPES = file_order([Shape("w", (700, 601)), Shape("none", (0, 3)), Shape("scale", ()), Shape("b", (5,))], 4)


def layout(kind: str = "param", unit: str = "layers/7 ü") -> UnitLayout:
    return lay_out(unit, kind, SHAPES, "F32")


def values(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape.shape, generator=generator) for shape in SHAPES]


def put(store: StateStore, seed: int, kind: str = "param", unit: str = "layers/7 ü") -> Generation:
    found = values(seed)
    return store.put(layout(kind, unit), lambda i: found[i])


def read(store: StateStore, generation: Generation) -> list[Tensor]:
    pool = Pool(layout().buffer_nbytes, "test")
    buffer = pool.lend(layout().buffer_nbytes, "test")
    store.read(generation, 0, buffer.address, generation.layout.data_nbytes).wait()
    return [buffer.tensor(e.begin, torch.float32, e.shape).clone() for e in generation.layout.entries]


def is_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def library(path: Path | str) -> list[Tensor]:
    with safe_open(path, "pt") as file:
        return [file.get_tensor(shape.name) for shape in SHAPES]


def names(store: StateStore) -> set[str]:
    return {name for name in os.listdir(store.disks.all[0].path) if name.endswith(".safetensors")}


@pytest.fixture
def store(tmp_store: Path) -> Iterator[StateStore]:
    options = IOOptions(engine="python", num_threads=2, block_nbytes="64KiB")
    engine = PythonEngine(options)
    store = StateStore(
        [RunDirectory(str(tmp_store))], engine, options=options, direct=[True], verify=True, trace=Trace()
    )
    yield store
    store.close(remove=True)
    engine.close()
    assert os.listdir(tmp_store) == []


def test_the_library_reads_every_generation_by_name(store: StateStore) -> None:
    for seed in range(3):
        generation = put(store, seed)
        assert is_equal(library(generation.file.path), values(seed))
        assert is_equal(read(store, generation), values(seed))
    assert store.kinds("layers/7 ü") == ["param"]


def test_a_superseded_file_is_used_again_and_no_other(store: StateStore) -> None:
    first = put(store, 1)
    inode = os.stat(first.file.path).st_ino
    second = put(store, 2)
    assert os.stat(second.file.path).st_ino != inode  # never written over while current
    assert is_equal(read(store, second), values(2))
    third = put(store, 3, kind="exp_avg")  # another kind of the same length
    assert os.stat(third.file.path).st_ino == inode
    assert len(names(store)) == 2


@pytest.mark.parametrize("seen_by", ["link", "shared mapping", "private mapping", "link that went", "mapping of link"])
def test_what_somebody_may_see_is_never_written_again(store: StateStore, tmp_store: Path, seen_by: str) -> None:
    first, kept = put(store, 1), tmp_store / "checkpoint"
    memory: Any = None
    if "link" in seen_by:
        os.link(first.file.path, kept)
    if "mapping" in seen_by:
        memory = store.map(first, private=seen_by != "shared mapping")
    if seen_by in ("link that went", "mapping of link"):
        kept.unlink()  # the user removed the checkpoint, the mapping (if any) stays
    inode = os.fstat(first.file.tail_fd).st_ino
    before = None if memory is None else memory[:]
    put(store, 2)
    put(store, 3)
    third = put(store, 4)
    inodes = {os.stat(os.path.join(store.disks.all[0].path, name)).st_ino for name in names(store)}
    assert (inode in inodes) == (seen_by == "link that went")
    if memory is not None:
        assert memory[:] == before
        memory.close()
        del memory
        gc.collect()
    if kept.exists():
        assert is_equal(library(kept), values(1))
        kept.unlink()
    assert is_equal(read(store, third), values(4))


def test_files_of_a_removed_checkpoint_come_back_unless_somebody_reads_them(store: StateStore, tmp_store: Path) -> None:
    paths = []
    for seed in range(2):
        paths.append(tmp_store / f"checkpoint{seed}")
        os.link(put(store, seed).file.path, paths[-1])
    current = put(store, 2)
    put(store, 2, kind="exp_avg")
    with safe_open(paths[0], "pt") as evaluation:  # another process that maps the file looks the same
        lazy = evaluation.get_slice("w")
        assert not store.recycle(str(paths[0]))
        assert store.recycle(str(paths[1]))
        inode = os.fstat(put(store, 3).file.tail_fd).st_ino
        assert torch.equal(lazy[:], values(0)[[s.name for s in SHAPES].index("w")])
    del lazy, evaluation  # the library maps a file as long as a slice of it lives
    assert store.recycle(str(paths[0]))
    assert not paths[0].exists()
    assert inode in {os.stat(os.path.join(store.disks.all[0].path, name)).st_ino for name in names(store)}
    assert store.current("layers/7 ü", "param") is not current
    odd = tmp_store / "odd"
    odd.write_bytes(b"x" * 4097)
    assert not store.recycle(str(odd))  # no generation has its size
    odd.unlink()


def test_an_abandoned_generation_changes_nothing(store: StateStore) -> None:
    first = put(store, 1)
    (begun,) = store.begin([layout()])
    store.abandon(begun)

    def fails(index: int) -> Tensor:
        raise KeyError(index)

    with pytest.raises(KeyError):
        store.put(layout(), fails)
    assert store.current("layers/7 ü", "param") is first
    assert is_equal(read(store, first), values(1))
    assert len(names(store)) == 2  # the current one and one to be used again


def test_suspended_files_are_found_again_and_can_be_mapped_meanwhile(store: StateStore) -> None:
    put(store, 1)
    last = put(store, 2)
    store.suspend()
    store.suspend()
    assert len(names(store)) == 1  # what waited for use is gone
    with store.map(last, private=True) as memory:
        assert bytes(memory[:8]) == layout().header[:8]
    with store.writable():
        assert is_equal(read(store, last), values(2))


@pytest.mark.parametrize("piece", [0, 1])
def test_a_flipped_bit_is_found_and_named(store: StateStore, piece: int) -> None:
    generation = put(store, 1)
    where = generation.layout.data_begin + piece * CHECK_NBYTES + 5
    with open(generation.file.path, "r+b") as file:
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ 4]))
        os.fsync(file.fileno())
    os.posix_fadvise(generation.file.tail_fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with pytest.raises(CorruptionError, match=rf"unit 'layers/7 ü', kind 'param': .*offset {piece * MiB} .*\bw\b"):
        read(store, generation)


def test_full_disks_are_named_with_numbers_and_leave_no_file(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        StoreError, match=r"the plan needs 1024.00 TiB on the disk of '.*', which has .* free; free space"
    ):
        store.disks.require_free(1 << 50, "the plan", num_files=0)

    def create(path: str, nbytes: int, **options: Any) -> File:
        raise IOFailure(errno.ENOSPC, path, 0, nbytes, "create")

    with monkeypatch.context() as patch:
        patch.setattr(state_store.File, "create", create)
        with pytest.raises(StoreError, match=r"cannot reserve 1.61 MiB in .*No space left .*the last checkpoint is"):
            put(store, 1)

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(state_store.os, "pwrite", pwrite)
        with pytest.raises(IOFailure, match=r"write of 4096 bytes at offset 0 of .* failed: Input/output error"):
            put(store, 1)
    assert store.current("layers/7 ü", "param") is None
    assert is_equal(read(store, put(store, 1)), values(1))


def test_a_file_that_is_used_again_is_named_before_it_is_written_while_others_are_read(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 1)
    second = put(store, 2)  # the first file is spare now
    may_rename, take_name = threading.Event(), File.take_name

    def late(file: File, old_path: str) -> None:
        assert may_rename.wait(10)
        take_name(file, old_path)

    monkeypatch.setattr(File, "take_name", late)
    (generation,) = store.begin([layout()])  # returns although the name is not there yet
    assert is_equal(read(store, second), values(2))
    assert not os.path.exists(generation.file.path)
    pool = Pool(layout().buffer_nbytes, "test")
    buffer = pool.lend(layout().buffer_nbytes, "test")
    for entry, value in zip(layout().entries, values(3), strict=True):
        buffer.tensor(entry.begin, torch.float32, entry.shape).copy_(value)
    may_rename.set()
    transfer = store.write(generation, 0, buffer.address, layout().data_nbytes)
    assert os.path.exists(generation.file.path)
    transfer.wait()
    store.commit(generation)
    assert is_equal(library(generation.file.path), values(3))
    assert is_equal(read(store, store.newest("layers/7 ü", "param")), values(3))


def test_a_file_that_cannot_be_named_is_not_current_and_not_used_again(store: StateStore) -> None:
    put(store, 1)
    second = put(store, 2)
    spare = next(path for path in Path(store.disks.all[0].path).glob("*.safetensors") if path != Path(second.file.path))
    spare.unlink()  # the user removed it
    with pytest.raises(IOFailure, match="errno 2"):
        put(store, 3)
    assert store.newest("layers/7 ü", "param") is second
    put(store, 4)  # with a new file
    assert is_equal(read(store, store.newest("layers/7 ü", "param")), values(4))


def test_where_one_file_cannot_be_named_the_others_have_their_old_names(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("param", "exp_avg", "exp_avg_sq")
    for generation in store.begin([layout(kind) for kind in kinds]):
        store.abandon(generation)  # three files are spare then
    monkeypatch.setattr(os, "rename", lambda *args, **kwargs: os.stat("/no/such/file"))
    begun = store.begin([layout(kind) for kind in kinds])
    with pytest.raises(IOFailure, match="errno 2"):
        store.commit(*begun)
    monkeypatch.undo()
    for generation in begun:
        store.abandon(generation)
    assert all(os.path.exists(generation.file.path) for generation in begun[1:])
    for kind in kinds:  # and are used again
        put(store, 3, kind)
        assert is_equal(read(store, store.newest("layers/7 ü", kind)), values(3))


def test_a_file_whose_naming_hangs_is_given_up_until_that_is_over(tmp_path: Path) -> None:
    file, patience, over = File.create(tmp_path / "file", 4096, direct=False), Patience(0.1), threading.Event()
    generation = Generation(layout(), file)
    generation.naming = naming = patience.start(lambda: over.wait(10) and None, file.path, "naming a file")
    with pytest.raises(DeadlineError, match="errno 110"):
        generation.end_naming()
    assert file.hangs  # it may still write a header: the file is not used again
    assert generation.is_misnamed
    over.set()
    assert naming.wait_for(10)
    naming.end()
    assert not file.hangs
    file.close()
    patience.close()
