"""Open files and mappings are counted before the first step, and errors at the end of a run do not hide its cause."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from lightning_ssd.errors import Ending, StoreError
from lightning_ssd.session.session import Session
from lightning_ssd.store import handles as handles_module
from lightning_ssd.store.handles import handles, require_handles
from tests.faults.support import finish_backward, refused, run_directories, small_gpt, streamed
from tests.helpers.training import Module, train


def test_three_thousand_units_are_refused_where_the_limit_is_4096(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = handles(3000 * 3, 3000, 20, direct=True)
    assert needed.num_files > 3000 * 9  # two descriptors and a mapping's for each file
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    with pytest.raises(StoreError, match=r"3000 units needs 33\d+ open files, .* 4096.*ulimit -Hn 33.*units="):
        require_handles(needed, "3000 units")


def test_mappings_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles_module, "_max_map_count", lambda: 1000)
    with pytest.raises(StoreError, match=r"needs \d+ mappings, .* 1000; raise it \(sysctl vm.max_map_count=\d+\)"):
        require_handles(handles(1000, 0, 0, direct=False), "a run")


def test_a_run_that_needs_more_open_files_than_allowed_is_refused_at_setup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = len(os.listdir("/proc/self/fd")) + 150
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: None)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (few, few))
    refused(tmp_path, streamed(), rf"open files, the limit of this process is {few}", "ulimit -Hn", error=StoreError)
    assert run_directories(tmp_path / ".ssd_offload") == []


def test_a_file_system_without_inodes_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statvfs = os.statvfs

    def no_inodes(path: str) -> os.statvfs_result:
        found = list(statvfs(path))
        found[5], found[7] = 1000, 3  # f_files, f_favail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", no_inodes)
    refused(tmp_path, streamed(), r"needs \d+ files", "inodes for 3 more", "not bytes", error=StoreError)


def test_the_first_error_of_an_end_is_the_one_that_is_raised() -> None:
    done: list[int] = []

    def fail(number: int) -> None:
        done.append(number)
        raise ValueError(f"error {number}")

    def end() -> None:
        with Ending() as ending:
            ending.callback(lambda: done.append(0))
            ending.callback(lambda: fail(1))
            ending.callback(lambda: fail(2))

    with pytest.warns(UserWarning, match="error 1"), pytest.raises(ValueError, match="error 2"):
        end()
    assert done == [2, 1, 0]


def test_a_failing_teardown_does_not_take_the_place_of_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, ended = Session.stop, []

    def failing(session: Session) -> None:
        stop(session)
        ended.append(True)
        raise StoreError("the end failed")

    def broken(self: object, batch: object, batch_idx: int) -> None:
        raise ZeroDivisionError("the cause")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "stop", failing)
        patch.setattr(Module, "training_step", broken)
        with pytest.raises(ZeroDivisionError, match="the cause"):
            train(tmp_path, small_gpt, streamed(), max_steps=1)
    finish_backward()
    assert ended == [True]
