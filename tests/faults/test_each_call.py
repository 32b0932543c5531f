"""Each call of the system that a run makes on its files fails once: one error of ours or nothing, and nothing is left.

The calls are found by watching a run, so that a new one is tried without being listed.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_ssd
from lightning_ssd.errors import SSDOffloadError
from tests.faults.support import finish_backward, run_directories, small_gpt, streamed
from tests.helpers.training import train

CALLS = (
    "open", "pread", "pwrite", "preadv", "pwritev", "fsync", "fdatasync", "ftruncate", "posix_fallocate", "rename",
    "replace", "link", "unlink", "rmdir", "mkdir", "makedirs", "stat", "lstat", "fstat", "statvfs", "listdir",
    "scandir", "utime", "dup", "readlink", "write", "read", "close", "lseek", "posix_fadvise",
)  # fmt: skip
QUICK = ("stat", "statvfs", "pwrite", "unlink")
OURS = os.path.dirname(lightning_ssd.__file__)
Call = tuple[str, str]


class Calls:
    """Watches calls from the package by the three places that made them, and lets the first of one kind fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[Call, None] = {}
        self.failing: Call | None = None
        self.num_failed = 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def fail(self, call: Call | None) -> None:
        self.failing, self.num_failed = call, 0

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            found = (name, _places())
            path = args[0] if args and isinstance(args[0], str) else ""
            if found[1] and not path.startswith(("/proc/", "/sys/", "/dev/")):
                self.seen[found] = None
                if found == self.failing and not self.num_failed:
                    self.num_failed += 1
                    if name == "close":  # the system closes it all the same
                        call(*args)
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*args, **kwargs)

        return watched


def _places() -> str:
    frame, found = sys._getframe(2), list[str]()
    while frame is not None and len(found) < 3:
        if frame.f_code.co_filename.startswith(OURS):
            found.append(f"{frame.f_code.co_filename[len(OURS) + 1 :]}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)


def run(folder: Path) -> None:
    saver = ModelCheckpoint(folder / "saved", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max")
    options: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [saver], "gradient_clip_val": 0.5}
    train(folder, small_gpt, streamed(verify_reads=True), max_steps=3, **options)


def outcome(folder: Path) -> str:
    """What came of a run that is not as it should be; empty otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = error_of(folder)
    finish_backward()
    root = folder / ".ssd_offload"
    left = [name for name in run_directories(root) if not (root / name / "lock").exists()]
    return f"{found} leaves {left}, which `clean` does not know" if left else found


def error_of(folder: Path) -> str:
    try:
        run(folder)
    except SSDOffloadError as error:
        return "" if str(folder) in str(error) else f"names no file: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def failures(folder: Path, calls: Calls, chosen: Callable[[Call], bool]) -> list[str]:
    run(folder / "whole")
    bad = []
    for number, call in enumerate(filter(chosen, list(calls.seen))):
        calls.fail(call)
        found = outcome(folder / str(number))
        calls.fail(None)
        if found:
            bad.append(f"{call[0]} in {call[1]}: {found}")
    return bad


def test_the_first_calls_of_a_setup_that_fail_are_errors_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[str, Call] = {}
    calls = Calls(monkeypatch)
    assert failures(tmp_path, calls, lambda call: first.setdefault(call[0], call) == call and call[0] in QUICK) == []


@pytest.mark.soak
def test_every_call_that_fails_is_an_error_of_ours_or_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    assert failures(tmp_path, calls, lambda call: True) == []
    assert len(calls.seen) > 100
