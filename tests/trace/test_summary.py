"""The arithmetic of a trace's summary, against counting on a grid; and which resource it says limits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ssd.trace.recorder import Lane, Recording, Span
from lightning_ssd.trace.summary import RESOURCES, summarize

WALL = 40
MAIN, WORKER = "MainThread 1", "update 2"


def span(lane: Lane, begin_s: float, end_s: float, thread: str = MAIN, **more: Any) -> Span:
    is_transfer = lane in (Lane.READ, Lane.WRITE)
    name = more.pop("name", "work")
    return Span(lane, name, "blocks.0", begin_s, end_s, thread, **{"is_transfer": is_transfer, **more})


def recording(*spans: Span, wall_s: float = WALL, num_steps: int = 1) -> Recording:
    in_order = tuple(sorted(spans, key=lambda one: (one.begin_s, -one.end_s)))
    return Recording(0.0, wall_s, MAIN, in_order, num_steps)


@st.composite
def nested(draw: st.DrawFn, thread: str) -> list[Span]:
    """Spans of one thread, as `with` blocks give them."""
    lanes = st.sampled_from([Lane.COPY, Lane.COMPUTE, Lane.UPDATE, Lane.WAIT])
    found: list[Span] = []

    def fill(begin: int, end: int, depth: int) -> None:
        while begin < end and draw(st.booleans()):
            first = draw(st.integers(begin, end - 1))
            last = draw(st.integers(first + 1, end))
            name = draw(st.sampled_from(["read", "buffer"]))
            found.append(span(draw(lanes), first, last, thread, name=name))
            if depth:
                fill(first, last, depth - 1)
            begin = last

    fill(0, WALL, 3)
    return found


transfers = st.builds(
    lambda lane, begin, length, nbytes, over: span(
        lane, begin, min(begin + length, WALL), nbytes=nbytes, is_transfer=True, is_over=over
    ),
    st.sampled_from([Lane.READ, Lane.WRITE, Lane.COPY, Lane.COMPUTE]),
    st.integers(0, WALL - 1),
    st.integers(1, 15),
    st.integers(0, 100),
    st.booleans(),
)


def cells(spans: list[Span]) -> list[set[tuple[Lane, str, str]]]:
    """Per second: what is busy, told by lane, thread and name."""
    grid: list[set[tuple[Lane, str, str]]] = []
    for second in range(WALL):
        now = [one for one in spans if one.begin_s <= second < one.end_s]
        busy = {(one.lane, "", "") for one in now if one.is_transfer}
        for thread in (MAIN, WORKER):
            # Spans are made outermost first, so the last one is the innermost.
            busy |= {(one.lane, thread, one.name) for one in [o for o in now if o.thread == thread][-1:]}
        grid.append(busy)
    return grid


@settings(max_examples=200, deadline=None)
@given(nested(MAIN), nested(WORKER), st.lists(transfers, max_size=8))
def test_seconds_are_those_of_a_grid(main: list[Span], worker: list[Span], moved: list[Span]) -> None:
    moved = [one for one in moved if one.lane in RESOURCES]
    asynchronous = [Span(**{**vars(one), "thread": "someone 3"}) for one in moved]
    summary = summarize(recording(*main, *worker, *asynchronous))
    grid = [{lane for lane, _, _ in busy} for busy in cells([*main, *worker, *asynchronous])]
    for lane in RESOURCES:
        of_lane = summary.lanes[lane]
        assert of_lane.busy_s == sum(lane in busy for busy in grid)
        assert of_lane.alone_s == sum(busy - {Lane.WAIT} == {lane} for busy in grid)
        mine = [one for one in asynchronous if one.lane is lane and one.is_over and one.nbytes]
        assert of_lane.nbytes == sum(one.nbytes for one in mine)
        seconds = len({second for one in mine for second in range(int(one.begin_s), int(one.end_s))})
        assert of_lane.nbytes_per_s == (of_lane.nbytes / seconds if seconds else 0)
    disk = [busy for busy in grid if busy & {Lane.READ, Lane.WRITE}]
    assert summary.disk_busy_s == len(disk)
    hidden = sum(bool(busy & {Lane.COMPUTE, Lane.UPDATE}) for busy in disk)
    assert summary.overlap == pytest.approx(hidden / len(disk) if disk else 0)
    trains = {MAIN} | {one.thread for one in worker if one.lane is Lane.COMPUTE}
    for reason in ("read", "buffer"):
        waiting = sum(any((Lane.WAIT, thread, reason) in busy for thread in trains) for busy in cells(main + worker))
        assert summary.waits_s.get(reason, 0) == waiting


def test_a_thread_counts_for_its_innermost_span() -> None:
    outer, wait = span(Lane.UPDATE, 0, 10), span(Lane.WAIT, 2, 6, name="the disk")
    summary = summarize(recording(outer, wait, span(Lane.READ, 2, 6)))
    assert summary.lanes[Lane.UPDATE].busy_s == 6
    assert summary.lanes[Lane.READ].alone_s == 4
    assert summary.waits_s == {"the disk": 4}
    assert summary.overlap == 0


def test_waits_of_a_thread_that_only_updates_do_not_count() -> None:
    waits = [span(Lane.WAIT, 0, 10, WORKER, name="the disk"), span(Lane.WAIT, 5, 6, name="the update")]
    assert summarize(recording(*waits, span(Lane.UPDATE, 10, 20, WORKER))).waits_s == {"the update": 1}
    # Autograd's own thread on CUDA: it computes, so training waits where it waits.
    waited = summarize(recording(*waits, span(Lane.COMPUTE, 10, 20, WORKER))).waits_s
    assert list(waited.items()) == [("the disk", 10), ("the update", 1)]


@pytest.mark.parametrize(
    ("spans", "limit"),
    [
        (
            [span(Lane.READ, 0, 37), span(Lane.COMPUTE, 0, 16), span(Lane.WAIT, 16, 36, name="read")],
            "disk read: busy 92% of the time; compute 40%; training waited 50% (most: read)",
        ),
        ([span(Lane.WRITE, 0, 36), span(Lane.READ, 0, 10)], "disk write: busy 90% of the time"),
        ([span(Lane.WRITE, 0, 20), span(Lane.READ, 20, 40)], "disk: busy 100% of the time"),
        ([span(Lane.COMPUTE, 0, 40), span(Lane.READ, 0, 20)], "compute: busy 100% of the time; disk read 50%"),
        ([span(Lane.UPDATE, 0, 30, WORKER), span(Lane.COMPUTE, 0, 20)], "update: busy 75% of the time; compute 50%"),
        ([span(Lane.COPY, 0, 30)], "copy: busy 75% of the time"),
        (
            [span(Lane.COMPUTE, 0, 20), span(Lane.READ, 20, 36)],
            "no resource alone, they wait for each other: compute is the busiest with 50% of the time; disk read 40%",
        ),
        ([], "nothing was recorded"),
        ([span(Lane.WAIT, 0, 40)], "nothing was recorded"),
    ],
)
def test_the_limiting_resource_is_named(spans: list[Span], limit: str) -> None:
    assert summarize(recording(*spans)).limit.startswith(limit)


def test_an_empty_recording_has_a_summary() -> None:
    summary = summarize(recording(wall_s=0, num_steps=0))
    assert (summary.wall_s, summary.waited_s, summary.disk_busy_s, summary.overlap) == (0, 0, 0, 0)


def test_a_summary_is_plain_json() -> None:
    read = span(Lane.READ, 0, 10, nbytes=50)
    plain = json.loads(json.dumps(summarize(recording(read, span(Lane.WAIT, 0, 4, name="read"))).to_json()))
    assert plain["lanes"]["read"] == {
        "num_spans": 1,
        "busy_s": 10,
        "alone_s": 10,
        "nbytes": 50,
        "nbytes_per_s": 5,
    }
    assert set(plain["lanes"]) == {"read", "write", "copy", "compute", "update", "wait"}
    assert (plain["wall_s"], plain["num_steps"], plain["waited_s"], plain["waits_s"]) == (WALL, 1, 4, {"read": 4})
    assert plain["limit"].startswith("no resource alone")
