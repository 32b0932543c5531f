"""A disk that hangs costs one deadline, whoever waits for it; a process that was stopped has not waited."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from lightning_ssd.errors import DeadlineError, IOFailure
from lightning_ssd.io import deadline
from lightning_ssd.io.deadline import Patience
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.io.file import File
from lightning_ssd.io.python_engine import PythonEngine
from lightning_ssd.memory.pool import Pool
from tests.helpers.faulty import Fault, FaultyEngine, When
from tests.helpers.pools import lingering


class Clock:
    """A clock that goes only where a wait lets it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.asked: list[float] = []

    def monotonic(self) -> float:
        return self.now_s


class Hanging:
    """An operation that is waited for in vain; the first wait takes ``jump_s`` longer than it was asked to."""

    def __init__(self, clock: Clock, jump_s: float = 0.0) -> None:
        self.is_over = False
        self._clock = clock
        self._jumps = [jump_s]

    def done(self) -> bool:
        return self.is_over

    def wait_for(self, seconds: float) -> bool:
        self._clock.asked.append(seconds)
        self._clock.now_s += seconds + (self._jumps.pop() if self._jumps else 0.0)
        return self.is_over


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(deadline.time, "monotonic", clock.monotonic)
    return clock


def test_a_process_that_was_stopped_goes_on_to_wait(clock: Clock) -> None:
    """An hour between two looks is no hour that the disk had."""
    assert not Patience(10.0).wait(Hanging(clock, jump_s=3600.0))
    assert 8.0 < sum(clock.asked) <= 10.0


def test_nobody_waits_again_for_a_disk_that_hangs_until_it_answers(clock: Clock) -> None:
    patience, first = Patience(10.0), Hanging(clock)
    assert not patience.wait(first)
    assert patience.is_spent
    clock.asked.clear()
    assert not patience.wait(Hanging(clock))
    assert clock.asked == [0.0]
    with pytest.raises(DeadlineError, match=r"sync of 'a file' failed: .*raise io.deadline_s"):
        patience.call(lambda: pytest.fail("it was called all the same"), "a file", "sync")
    first.is_over = True
    assert not patience.is_spent
    assert patience.call(lambda: 7, "a file", "sync") == 7


def test_a_wait_with_a_deadline_of_its_own_does_not_judge_the_disk(clock: Clock) -> None:
    patience = Patience(10.0)
    assert not patience.wait(Hanging(clock), 1.0)
    assert not patience.is_spent


def test_a_call_that_hangs_is_left_behind_and_one_that_fails_names_the_file() -> None:
    patience, gate = Patience(0.05), threading.Event()
    with pytest.raises(DeadlineError, match="sync of 'a file'"):
        patience.call(gate.wait, "a file", "sync")
    gate.set()

    def full() -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(IOFailure, match=r"sync of 'a file' failed: No space left.*; free space there"):
        Patience(5.0).call(full, "a file", "sync")


def test_what_hangs_keeps_its_memory_and_its_descriptors_and_the_engine_closes(tmp_store: Path) -> None:
    engine = FaultyEngine(PythonEngine(IOOptions()), [When(Fault(hold=True))], deadline_s=0.05)
    pool = Pool(8192, "test")
    file = File.create(tmp_store / "file", 4096, direct=False)
    buffer = pool.lend(4096, "a unit")
    read = engine.read(file, 0, buffer.address, 4096, keep=buffer.hold())
    with pytest.raises(DeadlineError, match=r"read of 4096 bytes at offset 0 of .*/file' failed: .*timed out"):
        read.wait()
    pool.give_back(buffer)
    assert lingering(pool) == ["a unit"]  # nobody else gets what the disk may still write to
    assert file.hangs
    descriptor = file.tail_fd
    file.close()
    engine.close()  # releases what it holds; the file is closed by then
    with pytest.raises(IOFailure, match="Bad file"):
        read.wait()
    del read
    assert lingering(pool) == []
    assert not file.hangs
    os.close(descriptor)


def test_calls_use_one_thread_again_unless_it_hangs() -> None:
    patience, gate = Patience(0.05), threading.Event()
    first, second = (patience.run(threading.get_ident, "a file", "sync") for _ in range(2))
    assert first == second != threading.get_ident()
    with pytest.raises(DeadlineError):
        patience.run(gate.wait, "a file", "sync")
    gate.set()
    while patience.is_spent:
        time.sleep(0.01)
    assert patience.run(lambda: 3, "a file", "sync") == 3
    patience.close()
