"""The bounds against numbers worked out by hand."""

from __future__ import annotations

import pytest

from tests.benchmarks.bounds import (
    FirstUnit,
    Moved,
    Pieces,
    Rates,
    first_update_s,
    gated_bound_s,
    strict_bound_s,
    ungated_bound_s,
)

RATES = Rates(read_gbps=1.0, write_gbps=2.0)
MOVED = Moved(1e9, 2e9, 3e9, 4e9)  # forward: 1 s + 1 s; the rest: 3 s + 2 s
FAST, SLOW = Pieces(0.1, 0.2, 0.3, 0.1), Pieces(10.0, 20.0, 30.0, 1.0)


def test_disk_bound() -> None:
    assert ungated_bound_s(MOVED, RATES, FAST, 0.0) == pytest.approx(7.0)
    assert gated_bound_s(MOVED, RATES, FAST) == pytest.approx(7.0)


def test_compute_bound() -> None:
    assert ungated_bound_s(MOVED, RATES, SLOW, 0.5) == pytest.approx(30.5)
    assert gated_bound_s(MOVED, RATES, SLOW) == pytest.approx(30.0)


def test_strict_bound_counts_no_byte_twice() -> None:
    assert strict_bound_s(MOVED, RATES, FAST, 0.5) == pytest.approx(7.0)
    assert strict_bound_s(MOVED, RATES, SLOW, 0.5) == pytest.approx(30.5)


def test_first_update_counts_only_where_it_is_large() -> None:
    assert first_update_s(MOVED, RATES, 1.0, FirstUnit(0.03, 0.1, 1.0)) == 0.0
    # A tenth of 6e9 bytes written: 0.3 s, and as many read: 0.6 s.
    assert first_update_s(MOVED, RATES, 1.0, FirstUnit(0.05, 0.1, 1.0)) == pytest.approx(0.9)
    assert first_update_s(MOVED, RATES, 1.0, FirstUnit(0.05, 0.0, 1.0)) == pytest.approx(0.05)
