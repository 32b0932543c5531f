"""Trace files: what is written is read, viewers can show it, and what is not one of ours is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_ssd.errors import TraceError
from lightning_ssd.trace.chrome import read_trace, write_trace
from lightning_ssd.trace.recorder import Lane, Recording, Span

BEGIN_S = 12345.678  # of the recording, on the clock of the machine


def span(lane: Lane, begin_ms: int, end_ms: int, *, thread: str = "MainThread 1", **more: Any) -> Span:
    begin_s, end_s = BEGIN_S + begin_ms / 1000, BEGIN_S + end_ms / 1000
    return Span(lane, more.pop("name", "work"), more.pop("what", "blocks.0"), begin_s, end_s, thread, **more)


def recording(*spans: Span) -> Recording:
    in_order = tuple(sorted(spans, key=lambda one: (one.begin_s, -one.end_s)))
    return Recording(BEGIN_S, BEGIN_S + 1, "MainThread 1", in_order, num_steps=2)


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return found


spans = st.builds(
    lambda lane, begin_ms, ms, thread, nbytes, is_transfer, is_over: span(
        lane,
        begin_ms,
        begin_ms + ms,
        thread=thread,
        nbytes=nbytes,
        is_transfer=is_transfer,
        is_over=is_over,
        what='blocks.0 "ä"',
    ),
    st.sampled_from(Lane),
    st.integers(0, 30),
    st.integers(1, 10),
    st.sampled_from(["MainThread 1", "update 2"]),
    st.integers(0, 2**40),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(spans, max_size=25))
def test_what_is_written_is_read_and_rows_can_be_shown(tmp_path: Path, some: list[Span]) -> None:
    written = recording(*some)
    write_trace(tmp_path / "trace.json", written)
    read = read_trace(tmp_path / "trace.json")
    assert (read.begin_s, read.thread, read.num_steps) == (0, written.thread, 2)
    assert read.end_s == pytest.approx(1, abs=2e-9)

    def plain(one: Span, begin_s: float) -> tuple[Any, ...]:
        rest = (one.lane.name, one.name, one.what, one.thread, one.nbytes, one.is_transfer, one.is_over)
        return (round((one.begin_s - begin_s) * 1e6), round((one.end_s - begin_s) * 1e6), *rest)

    assert sorted(plain(one, 0) for one in read.spans) == sorted(plain(one, BEGIN_S) for one in written.spans)
    _check_rows(events(tmp_path / "trace.json"))


def _check_rows(found: list[dict[str, Any]]) -> None:
    """In a row each event is free of the one before, or lies inside it and is of the same thread."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for event in found:
        if event["ph"] == "X":
            rows.setdefault(event["tid"], []).append(event)
    for row in rows.values():
        assert len({event["cat"] for event in row}) == 1
        stack: list[dict[str, Any]] = []
        for event in row:
            begin_ns, end_ns = round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3)
            while stack and stack[-1]["end_ns"] <= begin_ns:
                stack.pop()
            assert not stack or stack[-1]["end_ns"] >= end_ns
            assert not stack or stack[-1]["args"]["thread"] == event["args"]["thread"]
            stack.append(event | {"end_ns": end_ns})


def test_lanes_are_threads_with_names_in_order(tmp_path: Path) -> None:
    reads = [span(Lane.READ, begin_ms, begin_ms + 10, is_transfer=True, nbytes=5) for begin_ms in (0, 5, 10)]
    nested = [span(Lane.COMPUTE, 0, 10), span(Lane.COMPUTE, 2, 4)]
    write_trace(tmp_path / "trace.json", recording(*reads, *nested))
    found = events(tmp_path / "trace.json")
    names = {event["tid"]: event["args"]["name"] for event in found if event["name"] == "thread_name"}
    order = {event["tid"]: event["args"]["sort_index"] for event in found if event["name"] == "thread_sort_index"}
    lanes = ["disk read", "disk read 2", "disk write", "copy", "compute", "update", "wait"]
    assert [names[tid] for tid in sorted(order, key=order.__getitem__)] == lanes
    shown = [(names[event["tid"]], event["ts"], event["dur"]) for event in found if event["ph"] == "X"]
    assert shown == [
        ("disk read", 0, 10_000),
        ("disk read", 10_000, 10_000),
        ("disk read 2", 5_000, 10_000),
        ("compute", 0, 10_000),
        ("compute", 2_000, 2_000),
    ]
    first = next(event for event in found if event["ph"] == "X")
    assert (first["name"], first["cat"], first["args"]["nbytes"]) == ("work blocks.0", "read", 5)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(path, recording(span(Lane.COPY, 0, 1)))
    write_trace(path, recording())
    assert read_trace(path).spans == ()
    (tmp_path / "folder").mkdir()
    with pytest.raises(TraceError, match=r"folder.* cannot be written: Is a directory"):
        write_trace(tmp_path / "folder", recording())
    with pytest.raises(TraceError, match="No such file"):
        write_trace(tmp_path / "missing" / "trace.json", recording())


GOOD = {
    "otherData": {"writer": "lightning-ssd trace 1", "wall_s": 1.0, "thread": "MainThread 1", "num_steps": 1},
    "traceEvents": [],
}
EVENT = {"ph": "X", "cat": "read", "ts": 0, "dur": 1, "args": {"name": "a", "what": "b", "thread": "c"}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is no trace"),
        ('{"traceEvents": [', "only a part"),
        (b"\xff\xfe", "is no trace"),
        ("[]", "was not written by this version"),
        ({"traceEvents": []}, "was not written by this version"),
        (GOOD | {"otherData": GOOD["otherData"] | {"writer": "lightning-ssd trace 0"}}, "was not written by"),  # type: ignore[operator]
        ({"otherData": GOOD["otherData"]}, "damaged"),
        (GOOD | {"traceEvents": 3}, "damaged"),
        (GOOD | {"traceEvents": [3]}, "damaged"),
        (GOOD | {"traceEvents": [EVENT | {"cat": "lunch"}]}, "damaged: KeyError\\('lunch'\\)"),
        (GOOD | {"traceEvents": [EVENT | {"ts": "soon"}]}, "damaged"),
        (GOOD | {"traceEvents": [{"ph": "X"}]}, "damaged"),
    ],
)
def test_what_is_no_trace_of_ours_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "trace.json"
    data = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(TraceError, match=said) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_the_good_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(json.dumps(GOOD | {"traceEvents": [EVENT]}))
    assert read_trace(tmp_path / "trace.json").spans == (Span(Lane.READ, "a", "b", 0, 1e-6, "c"),)
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "other.json")
