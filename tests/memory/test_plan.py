"""Plans of random models: the smallest budget named is the smallest, and no plan is larger than its budget."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ssd.errors import MemoryPlanError
from lightning_ssd.memory.plan import CHUNK_STEP_NUMEL, MAX_CHUNK_NUMEL, Demand, MemoryPlan, UnitSize, make_plan
from lightning_ssd.memory.pool import Buffer, Pool
from lightning_ssd.sizes import MiB, parse_nbytes, round_up


@st.composite
def models(draw: st.DrawFn) -> dict[str, object]:
    """Units of up to 100 million elements, some frozen, nested in random chains."""
    itemsize = draw(st.sampled_from([2, 4]))
    width = draw(st.sampled_from([0, 4, 8, 12]))
    is_persistent = draw(st.lists(st.booleans(), min_size=12, max_size=12))
    units = []
    for i, numel in enumerate(draw(st.lists(st.integers(0, 100_000_000), min_size=1, max_size=12))):
        nbytes, frozen = numel * itemsize, draw(st.booleans())
        states = 0 if frozen else round_up(numel * width)
        size = UnitSize(
            f"unit{i}",
            round_up(max(nbytes, 1)),
            0 if frozen else nbytes,
            0 if frozen else numel,
            itemsize,
            width,
            states,
            is_persistent=is_persistent[i] and numel < 1_000_000,
        )
        units.append(size)
    names = [unit.name for unit in units]
    chains = [[name] for name in names]
    chains += draw(st.lists(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True), max_size=3))
    return {
        "units": units,
        "chains": chains,
        "demand": Demand(
            is_elementwise=draw(st.booleans()),
            is_overlapped=draw(st.booleans()),
            waits_for_all_grads=draw(st.booleans()),
            window=draw(st.sampled_from([None, None, 1, 2, 4])),
            recomputes=draw(st.sampled_from([True, False, None])),
        ),
    }


def plan(model: dict[str, object], budget_nbytes: int | None) -> MemoryPlan:
    return make_plan(**model, budget_nbytes=budget_nbytes)  # type: ignore[arg-type]


@given(models())
@settings(deadline=None, database=None)
def test_the_smallest_works_and_one_byte_less_does_not(model: dict[str, object]) -> None:
    smallest = plan(model, None)
    assert smallest.host_nbytes >= smallest.smallest_nbytes  # which may keep everything
    assert plan(model, smallest.smallest_nbytes).host_nbytes <= smallest.smallest_nbytes
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
        assert made.grad_nbytes >= smallest.grad_nbytes
        assert made.in_memory_params >= smallest.in_memory_params
        assert made.chunk_numel % CHUNK_STEP_NUMEL == 0
        assert made.chunk_numel <= MAX_CHUNK_NUMEL
        demand: Demand = model["demand"]  # type: ignore[assignment]
        assert made.recomputes == (not made.fits if demand.recomputes is None else demand.recomputes)
        assert (made.spill_nbytes > 0) == made.recomputes
        if made.fits:
            assert made.param_nbytes == 0
            assert made.update_nbytes == 0 or any(not u.numel for u in model["units"])  # type: ignore[attr-defined]
    for less, more in pairwise(plans):
        assert bool(less.queue_nbytes) <= bool(more.queue_nbytes)  # an update beside backward, before all else
        # What is bought first, such as room to read ahead, leaves less for chunks just above its price.
        if (less.keep_cache, bool(less.queue_nbytes), less.recomputes) == (
            more.keep_cache,
            bool(more.queue_nbytes),
            more.recomputes,
        ):
            assert less.chunk_numel <= more.chunk_numel


@given(models(), st.integers(0, 4 << 30))
@settings(deadline=None, database=None)
def test_reserves_hold_what_runs_in_them(model: dict[str, object], extra: int) -> None:
    units: list[UnitSize] = model["units"]  # type: ignore[assignment]
    demand: Demand = model["demand"]  # type: ignore[assignment]
    made = plan(model, plan(model, None).smallest_nbytes + extra)
    streamed = {u.name: u for u in units if u.name not in made.in_memory_params}
    for chain in model["chains"]:  # type: ignore[attr-defined]
        in_use = sum(streamed[name].param_nbytes for name in chain if name in streamed)
        arriving = max((u.param_nbytes for u in streamed.values() if u.name not in chain), default=0)
        assert made.param_nbytes >= in_use + arriving
    assert made.grad_nbytes >= max(unit.grad_nbytes for unit in units)
    assert made.grad_nbytes >= min(made.queue_nbytes, sum(unit.grad_nbytes for unit in units))
    params = sum(u.param_nbytes for u in units if u.name in made.in_memory_params)
    states = sum(u.in_memory_state_nbytes for u in units if u.name in made.in_memory_states)
    assert made.in_memory_nbytes == params + states
    for unit in units:
        in_memory = min(unit.numel, made.chunk_numel) if demand.is_elementwise else unit.numel
        width = unit.param_width * (unit.name in streamed) + unit.state_width * (unit.name not in made.in_memory_states)
        assert made.update_nbytes >= in_memory * width


UNITS = [UnitSize(f"unit{i}", 4 * MiB, 4 * MiB, MiB, 4, 8, 8 * MiB) for i in range(8)]


def test_enough_memory_holds_everything() -> None:
    made = make_plan(UNITS, [[u.name] for u in UNITS], budget_nbytes=1 << 30, demand=Demand())
    assert made.fits
    assert made.in_memory_params == made.in_memory_states == {unit.name for unit in UNITS}
    assert made.host_nbytes < 200 * MiB  # no more than it can use


def test_parameters_are_held_before_states() -> None:
    smallest = make_plan(UNITS, [[u.name] for u in UNITS], budget_nbytes=None, demand=Demand())
    for extra in range(0, 120, 4):
        budget = smallest.smallest_nbytes + extra * MiB
        made = make_plan(UNITS, [[u.name] for u in UNITS], budget_nbytes=budget, demand=Demand())
        assert not made.in_memory_states or len(made.in_memory_params) == len(UNITS)
        assert made.queue_nbytes or not made.in_memory_params  # overlap before anything is kept


@pytest.mark.parametrize("is_elementwise", [True, False])
def test_more_memory_never_ends_the_overlap(is_elementwise: bool) -> None:
    sizes = [(16, 16, 32), (42, 0, 0), (138, 138, 276), (42, 0, 0)]  # parameters, gradients, states in MiB
    units = [UnitSize(f"unit{i}", p * MiB, g * MiB, g * MiB // 2, 2, 4, s * MiB) for i, (p, g, s) in enumerate(sizes)]
    chains = [[unit.name] for unit in units]
    demand = Demand(is_elementwise=is_elementwise, recomputes=True)
    smallest = make_plan(units, chains, budget_nbytes=None, demand=demand).smallest_nbytes
    budgets = range(smallest, smallest + 600 * MiB, MiB)
    queued = [make_plan(units, chains, budget_nbytes=b, demand=demand).queue_nbytes > 0 for b in budgets]
    assert queued == sorted(queued)
    assert not queued[0]
    assert queued[-1]


def test_a_window_is_paid_for() -> None:
    chains = [[u.name] for u in UNITS]
    sizes = [
        make_plan(UNITS, chains, budget_nbytes=None, demand=Demand(window=window)).param_nbytes for window in (2, 3, 5)
    ]
    assert sizes == [8 * MiB, 12 * MiB, 20 * MiB]


@pytest.mark.parametrize("sums_in_place", [True, False])
def test_a_tied_gradient_has_room_to_wait_and_to_be_added_up(sums_in_place: bool) -> None:
    def grads(shared_nbytes: int, **demand: bool) -> int:
        tied = UnitSize("tok", 32 * MiB, 32 * MiB, 8 * MiB, 4, 8, 64 * MiB, shared_nbytes)
        units = [tied, *UNITS]
        chains = [[unit.name] for unit in units]
        return make_plan(units, chains, budget_nbytes=None, demand=Demand(sums_in_place=sums_in_place)).grad_nbytes

    tensors = 2 if sums_in_place else 3
    assert grads(0) == 32 * MiB
    assert grads(32 * MiB) == tensors * 32 * MiB


def test_a_plan_of_many_units_is_made_at_once() -> None:
    units = [UnitSize(f"unit{i}", 4096, 1088, 272, 4, 8, 8192) for i in range(2000)]
    found = make_plan(units, [[u.name] for u in units], budget_nbytes=40 * MiB, demand=Demand())
    assert found.host_nbytes <= 40 * MiB
    assert found.queue_nbytes > 0


@given(models(), st.integers(-(64 << 20), 64 << 20))
@settings(deadline=None, database=None)
def test_a_budget_that_works_is_not_refused(model: dict[str, object], distance: int) -> None:
    """The smallest is that of streaming or, for small models, that of keeping everything: both plans are made of it."""
    units: list[UnitSize] = model["units"]  # type: ignore[assignment]
    demand: Demand = model["demand"]  # type: ignore[assignment]
    streaming = plan(model, None)
    lavish = plan(model, 1 << 50)
    everything = sum(u.param_nbytes + u.in_memory_state_nbytes for u in units)
    everything += streaming.grad_nbytes + streaming.staging_nbytes + streaming.temporary_nbytes
    everything += streaming.spill_nbytes if demand.recomputes else 0
    if lavish.update_nbytes == 0:
        assert streaming.smallest_nbytes == min(streaming.host_nbytes, everything)
    for around in (streaming.smallest_nbytes, streaming.host_nbytes, everything):
        budget = around + distance
        if budget < streaming.smallest_nbytes:
            with pytest.raises(MemoryPlanError):
                plan(model, budget)
        else:
            assert plan(model, budget).host_nbytes <= budget


def test_a_small_model_takes_less_memory_than_it_would_stream_through() -> None:
    units = [UnitSize(f"unit{i}", 4096, 1024, 256, 4, 8, 2 * 4096) for i in range(4)]
    chains = [[unit.name] for unit in units]
    streaming = make_plan(units, chains, budget_nbytes=None, demand=Demand(recomputes=None))
    assert streaming.host_nbytes > 18 * MiB  # staging, the reserve of inputs, one chunk of the update
    assert streaming.smallest_nbytes < 9 * MiB
    held = make_plan(units, chains, budget_nbytes=9 * MiB, demand=Demand(recomputes=None))
    assert held.fits
    assert not held.recomputes
    with pytest.raises(MemoryPlanError, match=r"always in memory 48.00 KiB.*Set host_memory to at least 9MiB"):
        make_plan(units, chains, budget_nbytes=8 * MiB, demand=Demand(recomputes=None))


@pytest.mark.parametrize("seed", range(60))
def test_the_pool_of_the_smallest_plan_has_room_wherever_its_buffers_lie(seed: int) -> None:
    """Modules nested in each other are entered and left at random, while a unit that may come next arrives."""
    draw = random.Random(seed)
    sizes = {f"unit{i}": 4096 * draw.choice([1, 2, 3, 5, 8, 13, 40]) for i in range(draw.randint(1, 7))}
    units = [UnitSize(name, nbytes, nbytes, nbytes // 4, 4, 8) for name, nbytes in sizes.items()]
    chains = [[name] for name in sizes]
    chains += [draw.sample(list(sizes), draw.randint(1, min(4, len(sizes)))) for _ in range(4)]
    made = make_plan(units, chains, budget_nbytes=None, demand=Demand())
    pool = Pool(made.param_nbytes, "parameter")
    held: dict[str, Buffer] = {}
    arriving: dict[str, Buffer] = {}

    def give_up_arriving() -> bool:
        for name in list(arriving):
            pool.give_back(arriving.pop(name))
            return True
        return False

    for _ in range(400):
        chain = draw.choice(chains)
        while held and list(held) != chain[: len(held)]:
            pool.give_back(held.pop(list(held)[-1]))
        if len(held) < len(chain):
            name = chain[len(held)]
            held[name] = arriving.pop(name, None) or pool.lend(sizes[name], name, give_up_arriving)
        ahead = draw.choice(list(sizes))
        if not arriving and ahead not in held:
            buffer = pool.try_lend(sizes[ahead], ahead)
            if buffer is not None:
                arriving[ahead] = buffer
