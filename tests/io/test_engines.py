"""What every engine promises. Pieces are small and few fit in flight, so that transfers split, queue and interleave."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_ssd.errors import DeadlineError, IOFailure
from lightning_ssd.io.engine import IOOptions, IOStats, Transfer
from lightning_ssd.io.file import File
from lightning_ssd.sizes import BLOCK_NBYTES, KiB, MiB, round_up
from tests.helpers.io_engines import ENGINES, HostBuffer, MakeEngine, engine_or_skip, running

PIECE_NBYTES = 16 * KiB


@pytest.fixture(params=ENGINES)
def make(request: pytest.FixtureRequest) -> MakeEngine:
    return engine_or_skip(request.param)


@contextmanager
def created(path: Path, nbytes: int, *, direct: bool = True) -> Iterator[File]:
    file = File.create(path, nbytes, direct=direct)
    try:
        yield file
    finally:
        file.close()
        os.unlink(file.path)


def content(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    nbytes=st.integers(1, 6 * PIECE_NBYTES) | st.sampled_from([1, 4095, 4096, 4097, PIECE_NBYTES, PIECE_NBYTES + 1]),
    cuts=st.lists(st.integers(0, 24), max_size=3),
    block_nbytes=st.sampled_from([BLOCK_NBYTES, PIECE_NBYTES, MiB]),
    direct=st.booleans(),
)
def test_what_is_written_is_read(
    make: MakeEngine, tmp_store: Path, nbytes: int, cuts: list[int], block_nbytes: int, direct: bool
) -> None:
    """Written in ranges cut at any block boundaries, all at once; read back in one piece and in the same ranges."""
    data = content(nbytes, seed=nbytes)
    bounds = sorted({0, nbytes} | {min(cut * BLOCK_NBYTES, nbytes) for cut in cuts})
    ranges = [(start, end - start) for start, end in itertools.pairwise(bounds)]
    options = IOOptions(block_nbytes=block_nbytes, depth=3, num_threads=3, deadline_s=60)
    with created(tmp_store / "file", nbytes, direct=direct) as file, running(make, options) as engine:
        sources = [HostBuffer.of(data[start : start + length]) for start, length in ranges]
        writes = [
            engine.write(file, start, source.address, length, keep=source)
            for (start, length), source in zip(ranges, sources, strict=True)
        ]
        for write in writes:
            write.wait()
        assert Path(file.path).read_bytes() == data  # the exact length, through the page cache
        whole = HostBuffer(nbytes)
        parts = [HostBuffer(length) for _, length in ranges]
        reads = [engine.read(file, 0, whole.address, nbytes)] + [
            engine.read(file, start, part.address, length) for (start, length), part in zip(ranges, parts, strict=True)
        ]
        for read in reads:
            read.wait()
        assert whole.bytes(nbytes) == data
        assert b"".join(part.bytes(length) for part, (_, length) in zip(parts, ranges, strict=True)) == data


def test_threads_share_an_engine(make: MakeEngine, tmp_store: Path) -> None:
    """Six threads overwrite and read back their own blocks of one file while depth is 4."""
    num_threads, num_rounds, nbytes = 6, 15, 3 * PIECE_NBYTES
    failures: list[str] = []
    with created(tmp_store / "file", num_threads * nbytes - 1000) as file, running(make) as engine:

        def work(mine: int) -> None:
            length = nbytes - 1000 if mine == num_threads - 1 else nbytes
            for turn in range(num_rounds):
                data = content(length, seed=mine * 1000 + turn)
                source, target = HostBuffer.of(data), HostBuffer(length)
                engine.write(file, mine * nbytes, source.address, length, keep=source).wait()
                engine.read(file, mine * nbytes, target.address, length, keep=target).wait()
                if target.bytes(length) != data:
                    failures.append(f"thread {mine}, turn {turn}")

        threads = [threading.Thread(target=work, args=(mine,)) for mine in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert engine.stats().num_writes == engine.stats().num_reads == num_threads * num_rounds


def test_end_of_file_inside_the_extent_is_an_error_that_stays(make: MakeEngine, tmp_store: Path) -> None:
    for length_left in (0, 100, BLOCK_NBYTES, PIECE_NBYTES, 3 * PIECE_NBYTES - 1):
        with created(tmp_store / "file", 3 * PIECE_NBYTES) as file, running(make) as engine:
            os.truncate(file.path, length_left)
            read = engine.read(file, 0, (memory := HostBuffer(file.nbytes)).address, file.nbytes, keep=memory)
            for _ in range(2):
                with pytest.raises(IOFailure) as caught:
                    read.wait()
                assert (caught.value.errno, caught.value.path) == (errno.EIO, file.path)
                assert length_left // PIECE_NBYTES * PIECE_NBYTES <= caught.value.offset < file.nbytes
                assert 0 < caught.value.nbytes <= PIECE_NBYTES
                assert read.done()
            assert engine.stats().num_reads == 0


def test_errors_of_the_system_arrive(make: MakeEngine, tmp_store: Path) -> None:
    """A full disk, and a descriptor that cannot write; then the engine still works."""
    full = os.open("/dev/full", os.O_RDWR)  # every write to it finds no space
    refusing = os.open("/dev/null", os.O_RDONLY)
    try:
        with running(make) as engine, created(tmp_store / "file", PIECE_NBYTES) as good:
            memory = HostBuffer(4 * PIECE_NBYTES)
            for fd, path, code in ((full, "/dev/full", errno.ENOSPC), (refusing, "/dev/null", errno.EBADF)):
                file = File(path, 4 * PIECE_NBYTES, direct_fd=fd, tail_fd=fd, writable=True)
                with pytest.raises(IOFailure, match=path) as caught:
                    engine.write(file, 0, memory.address, 4 * PIECE_NBYTES - 1).wait()
                assert caught.value.errno == code
            engine.write(good, 0, memory.address, good.nbytes).wait()
            assert engine.stats().written_nbytes == good.nbytes
    finally:
        os.close(full)
        os.close(refusing)


def test_a_deadline_leaves_the_transfer_in_flight(make: MakeEngine, tmp_store: Path) -> None:
    # 4096 pieces, one at a time: cannot be over in the instant between starting and waiting.
    options = IOOptions(block_nbytes=BLOCK_NBYTES, depth=1, num_threads=1, deadline_s=60)
    nbytes = 16 * MiB
    with created(tmp_store / "file", nbytes) as file, running(make, options) as engine:
        memory = HostBuffer.of(content(nbytes))
        write = engine.write(file, 0, memory.address, nbytes, keep=memory)
        with pytest.raises(DeadlineError, match="file") as caught:
            write.wait(deadline_s=0)
        assert (caught.value.offset, caught.value.nbytes) == (0, nbytes)
        assert not write.done()
        write.wait()
        assert write.done()
        assert Path(file.path).read_bytes() == memory.bytes(nbytes)


def test_close_completes_what_nobody_waited_for(make: MakeEngine, tmp_store: Path) -> None:
    """Transfers and their memory are dropped at once: `keep` alone holds the memory until the bytes are on disk."""
    num_writes, nbytes = 20, 5 * PIECE_NBYTES + 5
    with created(tmp_store / "file", num_writes * round_up(nbytes)) as file, running(make) as engine:
        for i in range(num_writes):
            memory = HostBuffer.of(content(nbytes, seed=i))
            engine.write(file, i * round_up(nbytes), memory.address, nbytes, keep=memory)
            del memory
        engine.close()
        engine.close()
        assert engine.stats().num_writes == num_writes
        written = Path(file.path).read_bytes()
        for i in range(num_writes):
            assert written[i * round_up(nbytes) :][:nbytes] == content(nbytes, seed=i)
        with pytest.raises(ValueError, match="closed"):
            engine.read(file, 0, HostBuffer(nbytes).address, nbytes)


def test_memory_is_kept_until_the_end_and_not_longer(make: MakeEngine, tmp_store: Path) -> None:
    options = IOOptions(block_nbytes=BLOCK_NBYTES, depth=1, num_threads=1, deadline_s=60)
    nbytes = 16 * MiB
    with created(tmp_store / "file", nbytes) as file, running(make, options) as engine:
        memory = HostBuffer(nbytes)
        kept = weakref.ref(memory)
        write = engine.write(file, 0, memory.address, nbytes, keep=memory)
        del memory
        assert kept() is not None  # 4096 pieces on their way, one at a time
        write.wait()
        assert kept() is None

        memory = HostBuffer(nbytes)
        kept = weakref.ref(memory)
        engine.write(file, 0, memory.address, nbytes, keep=memory)
        del memory
        assert kept() is not None
        engine.close()  # nobody waits: noticed at the next use of the engine
        assert kept() is None


def test_statistics_count_what_succeeded(make: MakeEngine, tmp_store: Path) -> None:
    with created(tmp_store / "file", 5 * PIECE_NBYTES - 7) as file, running(make) as engine:
        assert engine.stats() == IOStats()
        memory = HostBuffer(file.nbytes)
        transfers: list[Transfer] = [
            engine.write(file, 0, memory.address, file.nbytes),
            engine.write(file, 0, memory.address, BLOCK_NBYTES),
        ]
        for transfer in transfers:
            transfer.wait()
        engine.read(file, BLOCK_NBYTES, memory.address, 1).wait()
        stats = engine.stats()
        assert (stats.num_writes, stats.written_nbytes) == (2, file.nbytes + BLOCK_NBYTES)
        assert (stats.num_reads, stats.read_nbytes) == (1, 1)
        assert stats.read_busy_s > 0
        assert stats.write_busy_s > 0
        assert engine.stats() == stats  # nothing is in flight, so no time passes


def test_times_are_those_of_the_disk(make: MakeEngine, tmp_store: Path) -> None:
    """The first write takes 4096 pieces, one at a time; the one behind it has not begun before the first is over."""
    options = IOOptions(block_nbytes=BLOCK_NBYTES, depth=1, num_threads=1, deadline_s=60)
    nbytes = 16 * MiB
    with created(tmp_store / "file", nbytes) as file, running(make, options) as engine:
        memory = HostBuffer(nbytes)
        before_s = time.perf_counter()
        transfers = [engine.write(file, 0, memory.address, nbytes), engine.write(file, 0, memory.address, 1)]
        assert transfers[1].times() is None
        while (times := transfers[0].times()) is None:
            time.sleep(0.0001)
        assert times[1] is None
        for transfer in transfers:
            transfer.wait()
        first, second = [transfer.times() for transfer in transfers]
        assert first is not None and second is not None  # noqa: PT018
        assert before_s <= times[0] == first[0] <= first[1] <= second[0] <= second[1] <= time.perf_counter()


def test_a_transfer_that_fails_has_times(make: MakeEngine, tmp_store: Path) -> None:
    with created(tmp_store / "file", 3 * PIECE_NBYTES) as file, running(make) as engine:
        os.truncate(file.path, PIECE_NBYTES)
        memory = HostBuffer(file.nbytes)
        for _ in range(3):  # one of three is delayed by the engine that is faulty
            before_s = time.perf_counter()
            read = engine.read(file, 0, memory.address, file.nbytes, keep=memory)
            with pytest.raises(IOFailure):
                read.wait()
            begin_s, end_s = read.times()
            assert before_s <= begin_s <= end_s <= time.perf_counter()


def test_misuse_is_refused_at_once(make: MakeEngine, tmp_store: Path) -> None:
    memory = HostBuffer(4 * BLOCK_NBYTES)
    with created(tmp_store / "file", 2 * BLOCK_NBYTES) as file, running(make) as engine:
        for offset, address, nbytes in (
            (1, memory.address, 1),
            (-BLOCK_NBYTES, memory.address, 1),
            (0, memory.address + 512, 1),
            (0, 0, 1),
            (0, memory.address, 0),
            (0, memory.address, file.nbytes + 1),
            (BLOCK_NBYTES, memory.address, BLOCK_NBYTES + 1),
        ):
            for start in (engine.read, engine.write):
                with pytest.raises(ValueError, match=r"multiples|inside"):
                    start(file, offset, address, nbytes)
        reader = File.open(file.path, direct=True, writable=False)
        with pytest.raises(ValueError, match="reading only"):
            engine.write(reader, 0, memory.address, 1)
        reader.close()
        with pytest.raises(ValueError, match="is closed"):
            engine.read(reader, 0, memory.address, 1)
        assert engine.stats() == IOStats()


def test_a_forked_child_is_told(make: MakeEngine, tmp_store: Path) -> None:
    """Data loader workers are forks: using the parent's engine there must not hang, and must not disturb the parent."""
    memory = HostBuffer(BLOCK_NBYTES)
    with created(tmp_store / "file", BLOCK_NBYTES) as file, running(make) as engine:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                engine.read(file, 0, memory.address, 1)
            except ValueError as error:
                engine.close()
                del engine
                status = 0 if "fork" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        engine.read(file, 0, memory.address, 1).wait()


def test_registered_memory_changes_nothing(make: MakeEngine, tmp_store: Path) -> None:
    memory, other = HostBuffer(8 * PIECE_NBYTES), HostBuffer(8 * PIECE_NBYTES)
    data = content(8 * PIECE_NBYTES - 9)
    with created(tmp_store / "file", len(data)) as file, running(make) as engine:
        assert engine.register_memory(memory.address, 8 * PIECE_NBYTES) in (True, False)
        source = HostBuffer.of(data)
        engine.write(file, 0, source.address, len(data)).wait()
        for target in (memory, other):
            engine.read(file, 0, target.address, len(data)).wait()
            assert target.bytes(len(data)) == data
        engine.write(file, 0, memory.address, len(data)).wait()
        assert Path(file.path).read_bytes() == data
