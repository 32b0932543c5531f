"""The engine that fails on purpose does what its script says; other tests stand on that."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lightning_ssd.errors import DeadlineError, IOFailure
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.io.file import File
from lightning_ssd.io.python_engine import PythonEngine
from lightning_ssd.sizes import BLOCK_NBYTES
from tests.helpers.faulty import Fault, FaultyEngine, Rule, When
from tests.helpers.io_engines import HostBuffer

MakeFaulty = Callable[[Rule | list[When]], FaultyEngine]
NBYTES = 2 * BLOCK_NBYTES
OLD, NEW = b"o" * NBYTES, b"n" * NBYTES


@pytest.fixture
def file(tmp_store: Path) -> Iterator[File]:
    (tmp_store / "unit.exp_avg").write_bytes(OLD)
    file = File.open(tmp_store / "unit.exp_avg", direct=True, writable=True)
    yield file
    file.close()


@pytest.fixture
def faulty() -> Iterator[MakeFaulty]:
    """Makes engines that are closed afterwards, whatever they hold."""
    with ExitStack() as stack:

        def make(rule: Rule | list[When]) -> FaultyEngine:
            engine = FaultyEngine(PythonEngine(IOOptions(num_threads=2)), rule)
            stack.callback(engine.close)
            return engine

        yield make


def test_a_script_matches_by_path_direction_and_count(file: File, faulty: MakeFaulty) -> None:
    fail = Fault(error=errno.ENOSPC)
    engine = faulty([When(fail, path="*.exp_avg", is_write=True, nth=1), When(fail, path="*.master")])
    new, target = HostBuffer.of(NEW), HostBuffer(NBYTES)
    engine.write(file, 0, new.address, NBYTES).wait()
    engine.read(file, 0, target.address, NBYTES).wait()
    with pytest.raises(IOFailure) as caught:
        engine.write(file, BLOCK_NBYTES, new.address, BLOCK_NBYTES).wait()
    assert (caught.value.errno, caught.value.offset) == (errno.ENOSPC, BLOCK_NBYTES)
    engine.write(file, 0, new.address, NBYTES).wait()
    assert target.bytes(NBYTES) == NEW


def test_torn_writes_and_flipped_bits(file: File, faulty: MakeFaulty) -> None:
    torn = Fault(error=errno.EIO, moved_nbytes=BLOCK_NBYTES)
    engine = faulty([When(torn, is_write=True), When(Fault(flip_bit=8 * 5000 + 1), is_write=False, nth=0)])
    new = HostBuffer.of(NEW)
    with pytest.raises(IOFailure):
        engine.write(file, 0, new.address, NBYTES).wait()
    assert Path(file.path).read_bytes() == NEW[:BLOCK_NBYTES] + OLD[BLOCK_NBYTES:]
    target = HostBuffer(NBYTES)
    engine.read(file, 0, target.address, NBYTES).wait()
    wrong = target.bytes(NBYTES)
    engine.read(file, 0, target.address, NBYTES).wait()
    right = target.bytes(NBYTES)
    assert [(i, a ^ b) for i, (a, b) in enumerate(zip(wrong, right, strict=True)) if a != b] == [(5000, 2)]


def test_held_operations_start_when_and_in_what_order_they_are_released(file: File, faulty: MakeFaulty) -> None:
    engine = faulty(lambda operation: Fault(hold=True) if operation.index < 2 else None)
    target, new = HostBuffer(NBYTES), HostBuffer.of(NEW)
    read = engine.read(file, 0, target.address, NBYTES, keep=target)
    write = engine.write(file, 0, new.address, NBYTES, keep=new)
    with pytest.raises(DeadlineError):
        read.wait(deadline_s=0)
    assert target.bytes(NBYTES) == bytes(NBYTES)  # nothing arrives early
    assert engine.held() == [0, 1]
    engine.release(1)
    write.wait()
    assert not read.done()
    engine.release()
    read.wait()
    assert target.bytes(NBYTES) == NEW


def test_close_ends_what_hangs(file: File, faulty: MakeFaulty) -> None:
    engine = faulty(lambda operation: Fault(hold=operation.index == 0, delay_s=3600))
    target = HostBuffer(NBYTES)
    reads = [engine.read(file, 0, target.address, NBYTES, keep=target) for _ in range(3)]
    engine.close()
    assert all(read.done() for read in reads)
    assert target.bytes(NBYTES) == OLD
