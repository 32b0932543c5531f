"""Spans: nothing while off, times of transfers taken late, threads told apart, what is not over cut at the end."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from lightning_ssd.trace.recorder import Lane, OpenSpan, Span, Trace


class Transfer:
    """As an engine's, with times that the test sets."""

    def __init__(self) -> None:
        self.known: tuple[float, float | None] | None = None

    def times(self) -> tuple[float, float | None] | None:
        return self.known


def started() -> Trace:
    trace = Trace()
    trace.start()
    return trace


def names(trace: Trace) -> list[str]:
    return [span.name for span in trace.collect().spans]


def test_nothing_is_kept_while_off() -> None:
    trace = Trace()
    with trace.span(Lane.COMPUTE, "forward", "a") as first:
        trace.follow(Lane.READ, "read", "a", 1, Transfer())
    second = trace.span(Lane.WAIT, "wait", "b")
    assert first is second  # one object for all: nothing is made
    trace.start()
    first.end()
    trace.stop()
    assert trace.collect().spans == ()


def test_a_span_has_times_thread_and_bytes() -> None:
    trace = started()
    before_s = time.perf_counter()
    with trace.span(Lane.UPDATE, "update", "a", 12), trace.span(Lane.WAIT, "read", "a"):
        pass
    trace.stop()
    recording = trace.collect()
    outer, inner = recording.spans
    assert (outer.lane, outer.name, outer.what, outer.nbytes) == (Lane.UPDATE, "update", "a", 12)
    assert (inner.lane, inner.name, inner.nbytes) == (Lane.WAIT, "read", 0)
    assert recording.begin_s <= before_s <= outer.begin_s <= inner.begin_s <= inner.end_s <= outer.end_s
    assert outer.end_s <= recording.end_s <= time.perf_counter()
    assert outer.is_over
    assert not outer.is_transfer
    assert outer.thread == inner.thread == recording.thread == f"MainThread {threading.get_native_id()}"


def test_a_span_need_not_be_a_block() -> None:
    trace = started()
    span = trace.span(Lane.COMPUTE, "forward", "a")
    span.end()
    end_s = span.times()[1]
    span.end()
    assert span.times()[1] == end_s
    with pytest.raises(KeyError), trace.span(Lane.COMPUTE, "forward", "b"):
        raise KeyError
    assert all(span.is_over for span in trace.collect().spans)


def test_a_transfer_tells_its_times_when_the_trace_is_collected() -> None:
    trace = started()
    transfer = Transfer()
    trace.follow(Lane.READ, "param", "a", 4096, transfer)
    begin_s = time.perf_counter()
    transfer.known = (begin_s, time.perf_counter())
    trace.stop()
    (span,) = trace.collect().spans
    assert span == Span(Lane.READ, "param", "a", *transfer.known, span.thread, 4096, is_transfer=True)  # type: ignore[misc]
    assert trace.collect().spans == ()  # let go


def test_what_is_not_over_is_cut_at_the_end() -> None:
    trace = started()
    queued, running, late, slow = Transfer(), Transfer(), Transfer(), Transfer()
    for transfer, name in ((queued, "queued"), (running, "running"), (late, "late"), (slow, "slow")):
        trace.follow(Lane.WRITE, name, "a", 1, transfer)
    running.known = slow.known = (time.perf_counter(), None)
    compute = trace.span(Lane.COMPUTE, "open", "a")
    trace.stop()
    late.known = (time.perf_counter(), time.perf_counter())
    slow.known = (slow.known[0], time.perf_counter())  # over when the trace is collected, not when it was stopped
    compute.end()
    recording = trace.collect()
    assert {span.name: span.end_s for span in recording.spans} == dict.fromkeys(
        ("running", "slow", "open"), recording.end_s
    )
    assert not any(span.is_over for span in recording.spans)


def test_a_running_trace_can_be_collected_in_parts() -> None:
    trace = started()
    trace.span(Lane.COMPUTE, "one", "a").end()
    assert names(trace) == ["one"]
    trace.span(Lane.COMPUTE, "two", "a").end()
    assert names(trace) == ["two"]
    assert trace.is_on


def test_a_new_start_forgets() -> None:
    trace = started()
    old = trace.span(Lane.COMPUTE, "old", "a")
    trace.start()
    old.end()
    trace.span(Lane.COMPUTE, "new", "a").end()
    assert names(trace) == ["new"]


def test_many_threads_lose_nothing_and_are_told_apart() -> None:
    trace = started()
    num_threads, num_spans = 8, 500
    go = threading.Barrier(num_threads)

    def work() -> None:
        go.wait()
        for i in range(num_spans):
            with trace.span(Lane.UPDATE, "update", str(i)):
                trace.follow(Lane.READ, "read", str(i), 1, OpenSpan(time.perf_counter()))

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, name="worker") for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    trace.stop()
    recording = trace.collect()
    by_thread: dict[str, list[Span]] = {}
    for span in recording.spans:
        if span.lane is Lane.UPDATE:
            by_thread.setdefault(span.thread, []).append(span)
    assert [[span.what for span in spans] for spans in by_thread.values()] == [list(map(str, range(num_spans)))] * 8
    assert len(recording.spans) == 2 * num_threads * num_spans


def test_off_costs_about_nothing() -> None:
    """Compared with the cheapest thing that could be there instead: calling an empty method."""

    class Nothing:
        is_on = False

        def span(self, lane: Lane, name: str, what: str) -> OpenSpan | None:
            return self if self.is_on else None  # type: ignore[return-value]

    def seconds(trace: Trace | Nothing) -> float:
        best_s = float("inf")
        for _ in range(20):
            begin_s = time.perf_counter()
            for _ in range(2000):
                trace.span(Lane.COMPUTE, "forward", "a")
            best_s = min(best_s, time.perf_counter() - begin_s)
        return best_s

    assert seconds(Trace()) < 3 * seconds(Nothing())
