"""Plans of random models: the smallest budget named is the smallest, and no plan is larger than its budget."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ssd.errors import MemoryPlanError
from lightning_ssd.memory.plan import CHUNK_STEP_NUMEL, MAX_CHUNK_NUMEL, MemoryPlan, UnitSize, make_plan
from lightning_ssd.sizes import MiB, parse_nbytes, round_up


@st.composite
def models(draw: st.DrawFn) -> dict[str, object]:
    """Units of up to 100 million elements, some frozen, nested in random chains."""
    itemsize = draw(st.sampled_from([2, 4]))
    width = draw(st.sampled_from([4, 8, 12, 14, 16]))
    units = []
    for i, numel in enumerate(draw(st.lists(st.integers(0, 100_000_000), min_size=1, max_size=12))):
        nbytes, frozen = numel * itemsize, draw(st.booleans())
        trained = 0 if frozen else numel
        units.append(UnitSize(f"unit{i}", round_up(max(nbytes, 1)), 0 if frozen else nbytes, trained, width))
    names = [unit.name for unit in units]
    chains = [[name] for name in names]
    chains += draw(st.lists(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True), max_size=3))
    return {
        "units": units,
        "chains": chains,
        "is_elementwise": draw(st.booleans()),
    }


def plan(model: dict[str, object], budget_nbytes: int | None) -> MemoryPlan:
    return make_plan(**model, budget_nbytes=budget_nbytes)  # type: ignore[arg-type]


@given(models())
@settings(deadline=None, database=None)
def test_the_smallest_works_and_one_byte_less_does_not(model: dict[str, object]) -> None:
    smallest = plan(model, None)
    assert smallest.host_nbytes == smallest.smallest_nbytes
    assert plan(model, smallest.smallest_nbytes).host_nbytes == smallest.smallest_nbytes
    with pytest.raises(MemoryPlanError) as error:
        plan(model, smallest.smallest_nbytes - 1)
    named = re.search(r"Set host_memory to at least (\w+), or cut smaller units with units=", str(error.value))
    assert named is not None
    assert plan(model, parse_nbytes(named[1])).host_nbytes <= parse_nbytes(named[1])
    assert parse_nbytes(named[1]) - smallest.smallest_nbytes < MiB


@given(models(), st.lists(st.integers(0, 4 << 30), min_size=2, max_size=6).map(sorted))
@settings(deadline=None, database=None)
def test_a_plan_keeps_to_its_budget_and_grows_with_it(model: dict[str, object], extras: list[int]) -> None:
    smallest = plan(model, None)
    plans = [plan(model, smallest.smallest_nbytes + extra) for extra in extras]
    for extra, made in zip(extras, plans, strict=True):
        assert made.host_nbytes <= smallest.smallest_nbytes + extra
        assert made.smallest_nbytes == smallest.smallest_nbytes
        assert made.param_nbytes >= smallest.param_nbytes
        assert made.grad_nbytes >= smallest.grad_nbytes
        assert made.chunk_numel % CHUNK_STEP_NUMEL == 0
        assert made.chunk_numel <= MAX_CHUNK_NUMEL
        assert made.keep_cache <= (made.param_nbytes > smallest.param_nbytes)
    for less, more in pairwise(plans):
        assert less.chunk_numel <= more.chunk_numel
        assert less.host_nbytes <= more.host_nbytes


@given(models())
@settings(deadline=None, database=None)
def test_reserves_hold_what_runs_in_them(model: dict[str, object]) -> None:
    units: list[UnitSize] = model["units"]  # type: ignore[assignment]
    made = plan(model, None)
    for chain in model["chains"]:  # type: ignore[attr-defined]
        arriving = max((u.param_nbytes for u in units if u.name not in chain), default=0)
        assert made.param_nbytes >= sum(u.param_nbytes for u in units if u.name in chain) + arriving
    assert made.grad_nbytes >= max(unit.grad_nbytes for unit in units)
    for unit in units:
        in_memory = min(unit.numel, made.chunk_numel) if model["is_elementwise"] else unit.numel
        assert made.update_nbytes >= in_memory * unit.state_nbytes


def test_enough_memory_keeps_everything() -> None:
    units = [UnitSize(f"unit{i}", 4 * MiB, 4 * MiB, MiB, 12) for i in range(8)]
    made = make_plan(units, [[u.name] for u in units], budget_nbytes=1 << 30, is_elementwise=True)
    assert made.keep_cache
    assert made.keep_grads
    assert made.param_nbytes >= 32 * MiB
    assert made.host_nbytes < 200 * MiB  # no more than it can use
