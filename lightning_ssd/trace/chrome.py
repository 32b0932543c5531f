"""A recorded trace as a file in Chrome's trace format, and back. It opens in https://ui.perfetto.dev and chrome://tracing.

Each lane is shown as a thread. What overlaps in a lane, such as several reads in flight, gets further rows below it.
Times in the file are microseconds since the trace began, exact to a nanosecond.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from typing import Any

from lightning_ssd.errors import TraceError
from lightning_ssd.sizes import GiB, fmt
from lightning_ssd.trace.recorder import Lane, Recording, Span

_WRITER = "lightning-ssd trace 1"
"""What we write and read; the number changes when older files cannot be read any more."""

_MAX_NBYTES = GiB // 2
"""Larger files are not read: parsed, each byte takes several."""

_LANES = {lane.name.lower(): lane for lane in Lane}


def write_trace(path: str | os.PathLike[str], recording: Recording) -> None:
    """Write ``recording`` to ``path``, replacing what is there.

    Raises:
        TraceError: The file cannot be written; what was there is unchanged.
    """
    path = os.fspath(path)
    part = f"{path}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.writelines(_lines(recording))
        os.replace(part, path)
    except OSError as error:
        raise TraceError(f"the trace {path!r} cannot be written: {error.strerror}") from error


def read_trace(path: str | os.PathLike[str]) -> Recording:
    """What `write_trace` has written, with times from 0.

    Raises:
        TraceError: There is no such file, or it is not one of ours, or damaged.
    """
    path = os.fspath(path)
    try:
        with open(path, encoding="utf-8", opener=_without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_NBYTES:
                raise TraceError(f"{path!r} is no trace: it is not a plain file of at most {fmt(_MAX_NBYTES)}")
            content = json.load(file)
    except OSError as error:
        raise TraceError(f"the trace {path!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not text
        raise TraceError(f"{path!r} is no trace, or only a part of one: {error}") from None
    about = content.get("otherData") if isinstance(content, dict) else None
    if not isinstance(about, dict) or about.get("writer") != _WRITER:
        raise TraceError(f"{path!r} was not written by this version of lightning-ssd: it does not say {_WRITER!r}")
    try:
        return _recording(about, content["traceEvents"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TraceError(f"the trace {path!r} is damaged: {error!r}") from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _lines(recording: Recording) -> Iterator[str]:
    """The file's text, one event per line."""
    about = {
        "writer": _WRITER,
        "wall_s": _ns(recording.end_s, recording) / 1e9,
        "thread": recording.thread,
        "num_steps": recording.num_steps,
    }
    yield f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)},"traceEvents":[\n'
    yield json.dumps({"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "lightning-ssd"}})
    for row, (lane, number, spans) in enumerate(_rows(recording), start=1):
        name = lane.value if number == 1 else f"{lane.value} {number}"
        for key, args in (("thread_name", {"name": name}), ("thread_sort_index", {"sort_index": row})):
            yield ",\n" + json.dumps({"ph": "M", "pid": 1, "tid": row, "name": key, "args": args})
        for span in spans:
            yield ",\n" + json.dumps(_event(span, row, recording))
    yield "\n]}\n"


def _ns(at_s: float, recording: Recording) -> int:
    return round((at_s - recording.begin_s) * 1e9)


def _rows(recording: Recording) -> Iterator[tuple[Lane, int, list[Span]]]:
    """Spans lane by lane, each in as few rows as hold them; rows of a lane are counted from 1."""
    for lane in Lane:
        rows: list[list[Span]] = []
        open_spans: list[list[Span]] = []  # per row, outermost first
        for span in (span for span in recording.spans if span.lane is lane):
            index = next((i for i, stack in enumerate(open_spans) if _fits(span, stack)), len(rows))
            if index == len(rows):
                rows.append([])
                open_spans.append([])
            rows[index].append(span)
            open_spans[index].append(span)
        for number, spans in enumerate(rows or [[]], start=1):  # an empty lane is shown too
            yield lane, number, spans


def _fits(span: Span, stack: list[Span]) -> bool:
    """Whether the row is free, or its innermost span is one of the same thread that ``span`` lies in."""
    # Viewers drop or misplace what overlaps without lying inside.
    while stack and stack[-1].end_s <= span.begin_s:
        stack.pop()
    if not stack:
        return True
    outer = stack[-1]
    nests = not (span.is_transfer or outer.is_transfer) and span.thread == outer.thread
    return nests and span.end_s <= outer.end_s


def _event(span: Span, row: int, recording: Recording) -> dict[str, Any]:
    begin_ns, end_ns = _ns(span.begin_s, recording), _ns(span.end_s, recording)
    args: dict[str, Any] = {"name": span.name, "what": span.what, "thread": span.thread}
    if span.nbytes:
        args["nbytes"] = span.nbytes
    if span.is_transfer:
        args["is_transfer"] = True
    if not span.is_over:
        args["is_over"] = False
    return {
        "ph": "X",
        "pid": 1,
        "tid": row,
        "cat": span.lane.name.lower(),
        "name": f"{span.name} {span.what}".rstrip(),
        "ts": begin_ns / 1e3,
        "dur": (end_ns - begin_ns) / 1e3,
        "args": args,
    }


def _recording(about: dict[str, Any], events: list[dict[str, Any]]) -> Recording:
    spans = [_span(event) for event in events if event["ph"] == "X"]
    spans.sort(key=lambda span: (span.begin_s, -span.end_s))
    return Recording(0.0, float(about["wall_s"]), str(about["thread"]), tuple(spans), int(about["num_steps"]))


def _span(event: dict[str, Any]) -> Span:
    args = event["args"]
    begin_us, dur_us = float(event["ts"]), float(event["dur"])
    return Span(
        _LANES[event["cat"]],
        str(args["name"]),
        str(args["what"]),
        begin_us / 1e6,
        (begin_us + dur_us) / 1e6,
        str(args["thread"]),
        int(args.get("nbytes", 0)),
        bool(args.get("is_transfer", False)),
        bool(args.get("is_over", True)),
    )
