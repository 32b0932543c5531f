"""What is refused because machine or control group cannot hold it, before the first step."""

from __future__ import annotations

import pytest

from lightning_ssd.errors import MemoryPlanError
from lightning_ssd.memory import headroom
from lightning_ssd.memory.headroom import COMPUTE_NBYTES, PARAMETER_NBYTES, STEP_NBYTES, Headroom
from lightning_ssd.memory.plan import Demand, MemoryPlan, UnitSize, make_plan
from lightning_ssd.memory.pool import map_anonymous
from lightning_ssd.sizes import MiB

NUM_PARAMS = 4


def a_plan() -> MemoryPlan:
    units = [UnitSize(f"unit{i}", 8 * MiB, 8 * MiB, 2 * MiB, 4, 8, 16 * MiB) for i in range(NUM_PARAMS)]
    return make_plan(units, [[u.name] for u in units], budget_nbytes=None, demand=Demand())


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number, which a test may change: what the process can take."""
    found = [1 << 40]
    monkeypatch.setattr(headroom, "available_nbytes", lambda: found[0])
    return found


def test_a_plan_needs_room_beside_it_for_compute_and_for_objects(available: list[int]) -> None:
    plan = a_plan()
    available[0] = plan.host_nbytes + COMPUTE_NBYTES + NUM_PARAMS * PARAMETER_NBYTES
    Headroom(plan, NUM_PARAMS)
    available[0] -= 1
    with pytest.raises(MemoryPlanError, match="smallest plan takes"):
        Headroom(plan, NUM_PARAMS)


def test_a_forward_that_takes_what_the_plan_has_yet_to_take_is_refused(available: list[int]) -> None:
    plan, arena = a_plan(), map_anonymous(16 * MiB)
    watch = Headroom(plan, NUM_PARAMS)
    watch.watch(arena)
    available[0] = 16 * MiB + plan.grad_nbytes + STEP_NBYTES
    watch.look()
    arena[: 8 * MiB] = bytes(8 * MiB)  # taken by now
    available[0] -= 8 * MiB
    watch.look()
    available[0] -= 2 * MiB
    with pytest.raises(MemoryPlanError, match=r"smaller batch"):
        watch.look()
    watch.end()
    watch.look()


def test_gradients_that_autograd_adds_up_count_in_the_first_backward(available: list[int]) -> None:
    plan, arena = a_plan(), map_anonymous(4 * MiB)
    watch = Headroom(plan, NUM_PARAMS)
    watch.watch(arena)
    available[0] = 4 * MiB + plan.grad_nbytes + STEP_NBYTES
    with pytest.raises(MemoryPlanError, match="uses several times"):
        watch.begin_backward(64 * MiB)
    watch.begin_backward(0)
