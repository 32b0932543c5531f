"""The pools of a plan: as large as it says, apart from each other, known to the engine, and passed on to one fork."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from lightning_ssd.memory import plan_pools
from lightning_ssd.memory.plan import Demand, MemoryPlan, UnitSize, make_plan
from lightning_ssd.memory.plan_pools import OFF_HOST, PlanPools
from lightning_ssd.sizes import MiB
from tests.helpers.pools import num_lent

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Engine:
    """Remembers the memory that it is told of."""

    def __init__(self) -> None:
        self.registered: list[tuple[int, int]] = []

    def register_memory(self, address: int, nbytes: int) -> bool:
        self.registered.append((address, nbytes))
        return False  # where the system refuses, all works the same


class Pinned:
    def __init__(self, *args: object) -> None:
        self.is_open = True

    def close(self) -> None:
        self.is_open = False


def a_plan(num_persistent: int = 2) -> MemoryPlan:
    units = [
        UnitSize(f"unit{i}", 4 * MiB, 4 * MiB, 1 * MiB, 4, 8, 8 * MiB, is_persistent=i < num_persistent)
        for i in range(4)
    ]
    return make_plan(units, [[u.name] for u in units], budget_nbytes=None, demand=Demand(recomputes=True))


def made(plan: MemoryPlan, device: torch.device, engine: Any = None) -> PlanPools:
    return PlanPools(plan, engine or Engine(), device)


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_pools, "Pinned", Pinned)


@pytest.fixture
def pools() -> Iterator[PlanPools]:
    found = made(a_plan(), CPU)
    yield found
    found.close()


def test_pools_are_as_large_as_the_plan_says_and_lie_apart_in_one_arena() -> None:
    for device in (CPU, GPU):
        plan, engine = a_plan(), Engine()
        found = made(plan, device, engine)
        parts = [found.params, found.updates, found.states, found.spill]
        parts += [] if found.grads is None else [found.grads]
        buffers = [pool.lend(pool.nbytes, "all of it") for pool in parts]
        assert all(before.offset + before.nbytes <= after.offset for before, after in pairwise(buffers))
        assert engine.registered == [(buffers[0].address, len(found.arena))]
        assert found.params.nbytes == plan.param_nbytes
        assert found.updates.nbytes == plan.update_nbytes
        assert found.spill.nbytes == plan.spill_nbytes
        held = found.states if found.in_memory_params is None else found.in_memory_params
        assert held.nbytes == plan.in_memory_nbytes == 8 * MiB
        assert (found.grads is None) == (found.in_memory_params is not None) == (device is CPU)
        found.close()


def test_a_plan_that_holds_no_parameters_has_no_pool_for_them() -> None:
    found = made(a_plan(num_persistent=0), CPU)
    assert found.in_memory_params is None
    found.close()


def test_a_fork_gets_what_tensors_view_and_what_is_in_memory(pools: PlanPools) -> None:
    assert pools.in_memory_params is not None
    buffer = pools.params.lend(1 * MiB, "seen")
    view = buffer.tensor(0, torch.float32, (4,))
    pools.params.lend(1 * MiB, "not seen")
    assert pools.pass_on() == ([(buffer.offset, buffer.nbytes)], "")
    pools.withhold()
    del view
    assert pools.pass_on() == ([], "")


def test_what_a_fork_cannot_get_is_said(pools: PlanPools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_pools, "available_nbytes", lambda: 100)
    passed_on, why = pools.pass_on()
    assert passed_on == []
    assert "100 B were left at the fork; lower host_memory" in why
    on_gpu = made(a_plan(), GPU)
    assert on_gpu.pass_on() == ([], OFF_HOST)
    on_gpu.close()


def test_the_end_gives_everything_back() -> None:
    found = made(a_plan(), GPU)
    pinned: Any = found._pinned
    assert pinned.is_open
    found.params.lend(1 * MiB, "lent")
    found.close()
    assert not pinned.is_open
    assert num_lent(found.params) == 0
    assert not hasattr(found, "arena")
