"""Commands that are given something that is no file or folder of theirs: one line that says so, no hang, no memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_ssd.checkpoint.directory import make_locked
from lightning_ssd.cli.main import main
from lightning_ssd.convert import copy as copying
from lightning_ssd.errors import TraceError
from lightning_ssd.io.folder import Folder
from lightning_ssd.sizes import parse_nbytes
from lightning_ssd.trace.chrome import read_trace


@pytest.mark.parametrize("what", ["dangling", "loop", "fifo", "deep", "sparse", "/dev/zero"])
@pytest.mark.parametrize("command", [("trace",), ("import", "to")])
def test_what_is_no_trace_and_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str, command: tuple[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    os.mkfifo("fifo")
    Path("deep").write_text("[" * 100_000)
    with open("sparse", "wb") as file:
        file.truncate(1 << 40)
    name, *more = command
    assert main([name, what, *more]) == 1
    assert what in capsys.readouterr().err
    assert not os.path.exists("to")


@pytest.mark.parametrize("events", ["7", "[7]", '[{"ph":"X"}]', '[{"ph":"X","args":[],"ts":1e999,"dur":{}}]'])
def test_a_trace_of_another_form(tmp_path: Path, events: str) -> None:
    path = tmp_path / "trace.json"
    about = '{"writer":"lightning-ssd trace 1","wall_s":1,"thread":"a","num_steps":1e999}'
    path.write_text(f'{{"otherData":{about},"traceEvents":{events}}}')
    with pytest.raises(TraceError, match="damaged"):
        read_trace(path)


def test_a_place_in_which_no_directory_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_WAIT_S", 0.1)
    with Folder.open("/proc") as parent:
        with pytest.raises(FileNotFoundError):
            make_locked(parent, lambda: "x")
        with pytest.raises(FileNotFoundError):
            copying._own(parent, "x", "/proc/x")


@pytest.mark.parametrize("text", ["9" * 400 + "GiB", "9" * 5000, True, "1e3", "nan", "inf", "-1", ""])
def test_sizes_that_are_none(text: str) -> None:
    if text == "9" * 400 + "GiB":
        assert parse_nbytes(text) > 10**400
        return
    with pytest.raises(ValueError, match=r"size|digits"):
        parse_nbytes(text)
