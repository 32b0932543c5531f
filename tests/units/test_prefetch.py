"""What is read next, and what may go for it."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_ssd.device.param_copies import DeviceCopy
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.execution_order import ExecutionOrder
from lightning_ssd.units.partition import UnitSpec
from lightning_ssd.units.prefetch import PrefetchPolicy
from lightning_ssd.units.unit import HostCopy, Unit

NAMES = "abcdef"


class World:
    """Units a to f, and a step that has used some of them in a learned order."""

    def __init__(self, order: str, used: str = "", *, max_ahead: int = 6, prefetch_batch: int = 1) -> None:
        self.units = {name: Unit(UnitSpec(name, [name], [nn.Parameter(torch.zeros(4))])) for name in NAMES}
        self.generations = {name: cast(Any, object()) for name in NAMES}
        self.order = ExecutionOrder()
        for names in (order, used):
            self.order.begin("train")
            for name in names:
                self.order.use(name)
        self.policy = PrefetchPolicy(
            list(self.units.values()),
            cast(StateStore, self),
            self.order,
            max_ahead=max_ahead,
            prefetch_batch=prefetch_batch,
        )

    def newest(self, name: str, kind: str) -> Any:
        return self.generations[name]

    def wanted(self, *, beyond: bool = False) -> list[str]:
        return ["".join(unit.name for unit in group) for group in self.policy.wanted(beyond=beyond)]

    def read(self, *names: str, is_over: bool = True) -> None:
        for name in names:
            transfer: Any = None if is_over else object()
            self.units[name].host_copy = HostCopy(cast(Any, None), cast(Any, None), transfer)

    def use(self, *names: str) -> None:
        for name in names:
            self.units[name].device_copy = DeviceCopy([torch.zeros(4)], cast(Any, None))

    def dispensable(self, needed_after: float | None = None) -> str | None:
        unit = self.policy.dispensable(needed_after)
        return None if unit is None else unit.name


def test_nothing_is_read_ahead_before_the_order_is_known() -> None:
    assert World("", "abc").wanted() == []


def test_what_comes_next_soonest_first_in_batches_within_the_window() -> None:
    assert World("abcdef", "a").wanted() == ["b", "c", "d", "e", "f"]
    assert World("abcdef", "a", prefetch_batch=2).wanted() == ["bc", "de", "f"]
    assert World("abcdef", "a", max_ahead=3, prefetch_batch=2).wanted() == ["bc"]  # the batch is not full
    assert World("abccba", "abc").wanted() == ["c", "b", "a"]


def test_what_is_in_memory_is_not_read_and_what_was_read_counts_as_ahead() -> None:
    world = World("abcdef", "a", max_ahead=2)
    world.use("b")  # resident: it needs no buffer
    world.units["c"].in_memory = (torch.zeros(4),)
    world.read("d")
    assert world.wanted() == ["e"]


def test_nothing_is_read_past_what_will_change() -> None:
    for change in ("mapped", "update"):
        world = World("abcdef", "a")
        setattr(world.units["c"], change, object())
        assert world.wanted() == ["b"]


def test_what_the_device_still_has_is_not_read_unless_it_is_old_or_its_memory_was_used() -> None:
    world = World("abcd", "a")
    for name in "bcd":
        world.units[name].released_copy = DeviceCopy([torch.zeros(4)], world.generations[name])
    assert world.wanted() == []
    world.generations["c"] = object()
    world.units["d"].released_copy = DeviceCopy([], world.generations["d"])
    assert world.wanted() == ["c", "d"]


def test_the_next_step_is_read_ahead_as_far_as_its_units_are_updated() -> None:
    world = World("abc", "abc")
    assert world.wanted(beyond=True) == []
    world.units["a"].is_updated = True
    assert world.wanted(beyond=True) == ["a"]
    world.units["c"].is_updated = True
    assert world.wanted(beyond=True) == ["a"]  # b comes before
    world.units["b"].params[0].requires_grad_(False)  # no update of it will come
    assert world.wanted(beyond=True) == ["a", "b", "c"]


def test_what_goes_is_what_is_needed_last_and_nobody_uses() -> None:
    world = World("abcdef", "ab")
    world.read(*NAMES)
    assert world.dispensable() == "b"  # needed in the next step, after all others
    world.units["b"].num_holds = 1
    assert world.dispensable() == "a"
    world.units["a"].num_pins = 1
    assert world.dispensable() == "f"
    world.units["e"].update = cast(Any, object())  # its bytes will be replaced before they are needed
    assert world.dispensable() == "e"
    assert world.policy.need(world.units["e"]) == math.inf


def test_what_is_being_read_goes_only_if_there_is_nothing_else_and_never_for_a_prefetch() -> None:
    world = World("abcdef", "a")
    world.read("f", is_over=False)
    assert world.dispensable() == "f"
    assert world.dispensable(needed_after=1) is None
    world.read("b")
    assert world.dispensable() == "b"
    assert world.dispensable(needed_after=0) is None  # it is needed before
    world.read("e")
    assert world.dispensable(needed_after=0) == "e"
    world.use("e")
    assert world.dispensable(needed_after=0) is None  # only what is merely cached


@given(
    order=st.text(NAMES, max_size=10),
    num_used=st.integers(0, 10),
    cached=st.sets(st.sampled_from(NAMES)),
    resident=st.sets(st.sampled_from(NAMES)),
    max_ahead=st.integers(1, 6),
    prefetch_batch=st.integers(1, 3),
)
def test_as_said_in_words(
    order: str, num_used: int, cached: set[str], resident: set[str], max_ahead: int, prefetch_batch: int
) -> None:
    """The oracle: of the next ``max_ahead`` different units that are not resident, those without a host copy."""
    world = World(order, order[:num_used], max_ahead=max_ahead, prefetch_batch=prefetch_batch)
    world.read(*cached)
    world.use(*resident)
    ahead = [name for name in dict.fromkeys(order[num_used:]) if name not in resident][:max_ahead]
    to_read = "".join(name for name in ahead if name not in cached)
    wanted = world.wanted()
    assert "".join(wanted) in (to_read, to_read[: len(to_read) // prefetch_batch * prefetch_batch])
    assert all(len(group) == prefetch_batch for group in wanted[:-1])
