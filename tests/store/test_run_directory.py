"""Run directories: one per run, locked as long as it lives, reported when it is dead, removed only by its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_ssd.errors import StoreError
from lightning_ssd.store import run_directory
from lightning_ssd.store.run_directory import RunDirectory, dead_runs, warn_of_dead_runs

HOLD = (
    "import sys; from lightning_ssd.store.run_directory import RunDirectory; "
    "run = RunDirectory(sys.argv[1]); print(run.path, flush=True); sys.stdin.read()"
)


@contextmanager
def another_process(root: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that holds a run directory under ``root``."""
    command = [sys.executable, "-c", HOLD, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = process.stdout.readline().strip()
        yield process, path
        process.kill()


def test_the_living_are_left_alone_and_the_dead_are_named_with_their_size(tmp_path: Path) -> None:
    with another_process(tmp_path) as (process, path):
        (Path(path) / "0.safetensors").write_bytes(b"x" * 100_000)
        mine = RunDirectory(str(tmp_path))  # beside it, without a word
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_dead_runs(str(tmp_path))
        process.send_signal(signal.SIGKILL)
        process.wait()
    dead = dead_runs(str(tmp_path))
    assert [run.path for run in dead] == [path]
    assert dead[0].nbytes >= 100_000
    with pytest.warns(UserWarning, match=rf"hold 10\d\.\d\d KiB in .*lightning-ssd clean {tmp_path}"):
        warn_of_dead_runs(str(tmp_path))
    mine.close(remove=True)
    assert os.listdir(tmp_path) == [os.path.basename(path)]  # reported, not removed


def test_nobody_sees_a_run_before_its_lock_is_held(tmp_path: Path) -> None:
    """Runs begin and end while another thread looks for dead ones all the time."""
    found: list[run_directory.DeadRun] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            found.extend(dead_runs(str(tmp_path)))

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(300):
        RunDirectory(str(tmp_path)).close(remove=True)
    ended.set()
    thread.join()
    assert found == []
    assert os.listdir(tmp_path) == []


def test_what_a_user_put_there_stays(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    Path(run.path, "0.safetensors").touch()
    Path(run.path, "notes.txt").touch()
    with pytest.warns(UserWarning, match="files that this run did not make, it stays"):
        run.close(remove=True)
    assert os.listdir(run.path) == ["notes.txt"]
    run.close(remove=True)  # nothing left to do


def test_a_directory_that_the_user_removed_is_no_error(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    os.unlink(os.path.join(run.path, "lock"))
    os.rmdir(run.path)
    run.close(remove=True)


def test_a_disk_that_takes_no_lock_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory.os, "write", full)
    with pytest.raises(StoreError, match=r"cannot make a run directory in nvme_path=.*No space left on device"):
        RunDirectory(str(tmp_path))
    assert os.listdir(tmp_path) == []
