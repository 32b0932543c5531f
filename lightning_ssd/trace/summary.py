"""What a trace says: how long each resource was busy, what training waited for, which resource limits. Seconds, bytes.

Pure arithmetic on intervals.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_ssd.trace.recorder import Lane, Recording, Span

Intervals = list[tuple[float, float]]
"""Begin and end of each; disjoint and in order where they come from `_union`."""

RESOURCES = (Lane.READ, Lane.WRITE, Lane.COPY, Lane.COMPUTE, Lane.UPDATE)

_BUSY = 0.7
"""Below this share of the time the busiest resource is not what limits: they wait for each other."""


@dataclass(frozen=True)
class LaneSummary:
    """One lane.

    Attributes:
        num_spans: How many there were.
        busy_s: Seconds with at least one of them. A thread counts for its innermost span only.
        alone_s: Part of ``busy_s`` in which no other resource was busy: what could be won if this one were faster.
        nbytes: Bytes of the spans that were over in time.
        nbytes_per_s: Their speed while any of them ran; 0 if there were none.
    """

    num_spans: int
    busy_s: float
    alone_s: float
    nbytes: int
    nbytes_per_s: float


@dataclass(frozen=True)
class Summary:
    """What a trace says.

    Attributes:
        wall_s: Seconds from start to stop.
        num_steps: Optimizer steps in it; 0 if they were not counted.
        lanes: By lane, the waiting threads included.
        waits_s: What the threads that train waited for: seconds by reason, the longest first.
        disk_busy_s: Seconds in which the disk read or wrote.
        overlap: Share of these in which the model computed or updated.
        limit: Which resource limits, in one sentence.
    """

    wall_s: float
    num_steps: int
    lanes: dict[Lane, LaneSummary]
    waits_s: dict[str, float]
    disk_busy_s: float
    overlap: float
    limit: str

    @property
    def waited_s(self) -> float:
        """Seconds that the threads that train stood still."""
        return sum(self.waits_s.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        return asdict(self) | {
            "lanes": {lane.name.lower(): asdict(lane_summary) for lane, lane_summary in self.lanes.items()},
            "waited_s": self.waited_s,
        }


def summarize(recording: Recording) -> Summary:
    """Sum up a recorded trace."""
    wall_s = recording.end_s - recording.begin_s
    by_lane = running(recording.spans)
    busy = {lane: _union(_times(spans)) for lane, spans in by_lane.items()}
    waits_s = _waits(by_lane[Lane.WAIT], recording)
    disk = _union(busy[Lane.READ] + busy[Lane.WRITE])
    disk_s = _length(disk)
    work = _union(busy[Lane.COMPUTE] + busy[Lane.UPDATE])
    return Summary(
        wall_s=wall_s,
        num_steps=recording.num_steps,
        lanes={lane: _lane_summary(lane, recording.spans, busy) for lane in Lane},
        waits_s=waits_s,
        disk_busy_s=disk_s,
        overlap=_length(_common(disk, work)) / disk_s if disk_s else 0.0,
        limit=_limit(wall_s, busy, waits_s),
    )


def running(spans: Iterable[Span]) -> dict[Lane, list[Span]]:
    """By lane: transfers as they are, spans of threads cut to when they were the innermost of their thread."""
    by_lane: dict[Lane, list[Span]] = {lane: [] for lane in Lane}
    by_thread: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        if span.is_transfer:
            by_lane[span.lane].append(span)
        else:
            by_thread[span.thread].append(span)
    for stacked in by_thread.values():
        for span, begin_s, end_s in _innermost(stacked):
            by_lane[span.lane].append(Span(span.lane, span.name, span.what, begin_s, end_s, span.thread))
    return by_lane


def _innermost(spans: list[Span]) -> list[tuple[Span, float, float]]:
    """When each span of one thread was the innermost; ``spans`` in order of their begin."""
    found: list[tuple[Span, float, float]] = []
    stack: list[Span] = []
    at_s = 0.0  # up to here it is decided

    def advance(to_s: float) -> None:
        nonlocal at_s
        if to_s > at_s:
            found.append((stack[-1], at_s, to_s))
            at_s = to_s

    for span in spans:
        while stack and stack[-1].end_s <= span.begin_s:
            advance(stack[-1].end_s)
            stack.pop()
        if stack:
            advance(span.begin_s)
        at_s = span.begin_s
        stack.append(span)
    while stack:
        advance(stack[-1].end_s)
        stack.pop()
    return found


def _waits(waits: list[Span], recording: Recording) -> dict[str, float]:
    # Autograd runs backward on CUDA in a thread of its own, so more than one may train. Threads that only update wait
    # as well, but training does not wait for that.
    trains = {span.thread for span in recording.spans if span.lane is Lane.COMPUTE and not span.is_transfer}
    by_reason: dict[str, Intervals] = defaultdict(list)
    for span in waits:
        if span.thread in trains | {recording.thread}:
            by_reason[span.name].append((span.begin_s, span.end_s))
    seconds = {reason: _length(_union(times)) for reason, times in by_reason.items()}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _lane_summary(lane: Lane, spans: Iterable[Span], busy: Mapping[Lane, Intervals]) -> LaneSummary:
    mine = [span for span in spans if span.lane is lane]
    moved = [span for span in mine if span.is_over and span.nbytes]
    nbytes = sum(span.nbytes for span in moved)
    moving_s = _length(_union(_times(moved)))
    others = _union(times for other in RESOURCES if other is not lane for times in busy[other])
    busy_s = _length(busy[lane])
    return LaneSummary(
        num_spans=len(mine),
        busy_s=busy_s,
        alone_s=busy_s - _length(_common(busy[lane], others)),
        nbytes=nbytes,
        nbytes_per_s=nbytes / moving_s if moving_s else 0.0,
    )


def _limit(wall_s: float, busy: Mapping[Lane, Intervals], waits_s: Mapping[str, float]) -> str:
    if wall_s <= 0 or not any(busy[lane] for lane in RESOURCES):
        return "nothing was recorded: the trace was stopped before anything began"
    read, write = (_length(busy[lane]) / wall_s for lane in (Lane.READ, Lane.WRITE))
    disk = "disk" if 0.5 < read / max(write, 1e-9) < 2 else "disk read" if read > write else "disk write"
    shares = {lane.value: _length(busy[lane]) / wall_s for lane in (Lane.COMPUTE, Lane.UPDATE, Lane.COPY)}
    shares[disk] = _length(_union(busy[Lane.READ] + busy[Lane.WRITE])) / wall_s
    (name, share), *rest = sorted(shares.items(), key=lambda item: -item[1])
    said = f"{name}: busy {share:.0%} of the time"
    if share < _BUSY:
        said = f"no resource alone, they wait for each other: {name} is the busiest with {share:.0%} of the time"
    said += "".join(f"; {other} {other_share:.0%}" for other, other_share in rest if other_share >= 0.005)
    waited = sum(waits_s.values()) / wall_s
    if waited >= 0.01:
        said += f"; training waited {waited:.0%} (most: {next(iter(waits_s))})"
    return said


def _times(spans: Iterable[Span]) -> Intervals:
    return [(span.begin_s, span.end_s) for span in spans]


def _union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    merged: Intervals = []
    for begin_s, end_s in sorted(intervals):
        if merged and begin_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end_s))
        else:
            merged.append((begin_s, end_s))
    return merged


def _common(some: Intervals, others: Intervals) -> Intervals:
    """What lies in both; each a result of `_union`."""
    common: Intervals = []
    i = j = 0
    while i < len(some) and j < len(others):
        begin_s, end_s = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if begin_s < end_s:
            common.append((begin_s, end_s))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return common


def _length(intervals: Intervals) -> float:
    return sum(end_s - begin_s for begin_s, end_s in intervals)
