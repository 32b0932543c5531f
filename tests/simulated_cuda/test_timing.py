"""The device that takes time: what is over when follows from what work costs and from what it has to wait for."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
import torch

from tests.simulated_cuda.device import Rates, core, takes_time

NUMEL = 1 << 16
COPY_S, PRODUCT_S = 0.004, 0.008
SIDE = 128
RATES = Rates(operations=2 * SIDE**3 / PRODUCT_S, memory=1e15, pinned=4 * NUMEL / COPY_S, pageable=1e12, launch=0)


@pytest.fixture(autouse=True, params=[True, False], ids=["values", "no values"])
def has_values(request: pytest.FixtureRequest) -> Iterator[bool]:
    with takes_time(RATES, has_values=request.param):
        yield request.param


def spans_by_engine() -> tuple[list[tuple[float, float]], ...]:
    """Begin and end, in order of the queue, of all that took longer than the small things around it."""
    torch.cuda.synchronize()
    found = [span for span in core.take_spans() if span.end - span.begin > COPY_S / 2]
    return tuple([(span.begin, span.end) for span in found if span.engine == engine] for engine in range(3))


def square() -> torch.Tensor:
    return torch.full((SIDE, SIDE), 1 / SIDE, device="cuda")


def send(stream: torch.cuda.Stream, host: torch.Tensor) -> torch.cuda.Event:
    with torch.cuda.stream(stream):
        torch.empty(NUMEL, device="cuda").copy_(host, non_blocking=True)
        return stream.record_event()


def test_copies_run_beside_compute_and_one_after_another() -> None:
    x, host = square(), torch.ones(NUMEL, pin_memory=True)
    for _ in range(2):
        x = x @ x
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        send(stream, host)
    products, copies, _ = spans_by_engine()
    assert [round(end - begin, 6) for begin, end in products + copies] == [PRODUCT_S] * 2 + [COPY_S] * 2
    assert copies[1][0] < products[0][1]
    for (_, end), (begin, _) in (*itertools.pairwise(products), *itertools.pairwise(copies)):
        assert end <= begin


def test_what_waits_for_an_event_begins_after_it_and_others_go_first() -> None:
    host, late, other = torch.ones(NUMEL, pin_memory=True), torch.cuda.Stream(), torch.cuda.Stream()
    x = square()
    x = x @ x
    late.wait_stream(torch.cuda.current_stream())
    send(late, host)
    send(other, host)
    (product,), (waited, free), _ = spans_by_engine()
    assert waited[0] >= product[1]
    assert free[1] <= waited[0]


def test_an_event_is_reached_when_its_time_has_come(has_values: bool) -> None:
    x = square()
    before = torch.cuda.current_stream().record_event()
    torch.cuda._sleep(20_000_000)
    y = x @ x
    after = torch.cuda.current_stream().record_event()
    after.synchronize()
    assert after.query()
    assert time.monotonic() >= after.done_at()
    assert before.elapsed_time(after) >= 1e3 * PRODUCT_S + 10
    assert y.sum().item() == (SIDE if has_values else 0)


def test_the_host_waits_for_pageable_memory_alone() -> None:
    pinned, pageable = torch.ones(NUMEL, pin_memory=True), torch.ones(NUMEL)
    torch.cuda._sleep(20_000_000)
    held = torch.empty(NUMEL, device="cuda")
    held.copy_(pinned, non_blocking=True)
    done = torch.cuda.current_stream().record_event()
    held.copy_(pageable, non_blocking=True)
    assert done.query()
    on_host = torch.zeros(NUMEL, pin_memory=True)
    on_host.copy_(held, non_blocking=True)
    _, to_device, to_host = spans_by_engine()
    assert (len(to_device), len(to_host)) == (1, 1)
