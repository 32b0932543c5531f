"""The command ``lightning-ssd trace``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_ssd.cli.main import main
from lightning_ssd.trace.chrome import write_trace
from lightning_ssd.trace.recorder import Lane, Recording, Span


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two seconds: 1.5 GB read in one and a half of them, compute under one, a wait for the rest."""
    spans = (
        Span(Lane.READ, "param", "blocks.0", 10.0, 11.5, "MainThread 1", 1_500_000_000, is_transfer=True),
        Span(Lane.COMPUTE, "forward", "blocks.0", 10.0, 11.0, "MainThread 1"),
        Span(Lane.WAIT, "wait for a read", "blocks.1", 11.0, 11.5, "MainThread 1"),
    )
    write_trace(tmp_path / "trace.json", Recording(10.0, 12.0, "MainThread 1", spans, num_steps=1))
    return tmp_path / "trace.json"


def test_a_person_sees_lanes_waits_and_the_limit(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(trace)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        "traced 2.000 s, 1 step(s)",
        "overlap 67% of the 1.500 s of disk time lie under compute or update",
        "limit disk read: busy 75% of the time; compute 50%; training waited 25% (most: wait for a read)",
    ]
    assert "disk read 1.500 s 75% 0.500 s 1 1.500 GB 1.00 GB/s" in lines
    assert "compute 1.000 s 50% 0.000 s 1 - -" in lines
    assert "wait for a read 0.500 s 25%" in lines


def test_a_program_gets_json(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(trace), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["lanes"]["read"]["nbytes_per_s"] == pytest.approx(1e9)
    assert summary["waits_s"] == {"wait for a read": pytest.approx(0.5)}


def test_an_empty_trace_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(tmp_path / "trace.json", Recording(0, 0, "MainThread 1", ()))
    assert main(["trace", str(tmp_path / "trace.json")]) == 0
    assert "nothing was recorded" in capsys.readouterr().out


def test_what_is_no_trace_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for name, said in (("notes.txt", "is no trace"), ("missing.json", "No such file"), (".", "Is a directory")):
        assert main(["trace", str(tmp_path / name)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert said in captured.err
    with pytest.raises(SystemExit) as caught:
        main(["trace"])
    assert caught.value.code == 2
