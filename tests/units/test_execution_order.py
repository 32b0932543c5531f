"""The order in which units are used: learned from one step, followed in the next, kept when a step stops early."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ssd.units.execution_order import MAX_SHORT_STEPS, ExecutionOrder

STEP = ["a", "b", "c", "c", "b", "a"]
STEPS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=8)


def run(order: ExecutionOrder, uses: list[str], key: str = "train") -> list[list[str]]:
    """One step; what was upcoming after each use."""
    order.begin(key)
    upcoming = []
    for name in uses:
        order.use(name)
        upcoming.append([*order.upcoming()])
    return upcoming


def suffixes(uses: list[str]) -> list[list[str]]:
    return [uses[i + 1 :] for i in range(len(uses))]


@given(STEPS)
@settings(deadline=None, database=None)
def test_the_second_step_is_foreseen(uses: list[str]) -> None:
    order = ExecutionOrder()
    assert run(order, uses) == [[]] * len(uses)
    assert [*order.following()] == []
    assert run(order, uses) == suffixes(uses)
    assert [*order.following()] == [*dict.fromkeys(uses)]


@given(STEPS, STEPS)
@settings(deadline=None, database=None)
def test_a_step_that_departs_is_learned_anew(first: list[str], second: list[str]) -> None:
    order = ExecutionOrder()
    run(order, first)
    run(order, second)
    is_short = len(second) < len(first) and first[: len(second)] == second
    expected = first if is_short else second
    assert run(order, expected) == suffixes(expected)


def test_after_a_departure_it_goes_on_where_the_unit_is_known() -> None:
    order = ExecutionOrder()
    run(order, ["a", "b", "c", "d"])
    assert run(order, ["a", "x", "c", "d"]) == [["b", "c", "d"], [], ["d"], []]


@pytest.mark.parametrize("num_uses", range(len(STEP)))
def test_a_step_that_was_skipped_or_failed_does_not_erase_the_order(num_uses: int) -> None:
    order = ExecutionOrder()
    run(order, STEP)
    for _ in range(MAX_SHORT_STEPS - 1):
        assert run(order, STEP[:num_uses]) == suffixes(STEP)[:num_uses]
    assert run(order, STEP) == suffixes(STEP)
    for _ in range(MAX_SHORT_STEPS - 1):  # they are counted anew after a whole one
        run(order, STEP[:num_uses])
    assert run(order, STEP) == suffixes(STEP)


def test_steps_that_became_shorter_are_learned() -> None:
    order = ExecutionOrder()
    run(order, STEP)
    for _ in range(MAX_SHORT_STEPS):
        run(order, STEP[:3])
    assert run(order, STEP[:3]) == suffixes(STEP[:3])


def test_each_kind_of_step_has_its_order() -> None:
    order = ExecutionOrder()
    run(order, STEP, "train")
    run(order, ["b", "a"], "validate")
    assert run(order, STEP, "train") == suffixes(STEP)
    assert run(order, ["b", "a"], "validate") == suffixes(["b", "a"])
    assert [order.position(name, "train") for name in "abcx"] == [0, 1, 2, 6]
    assert order.position("a", "validate") == 1


def test_positions_in_the_first_step_are_those_seen_so_far() -> None:
    order = ExecutionOrder()
    run(order, ["b", "a"])
    assert [order.position(name, "train") for name in "bax"] == [0, 1, 2]
