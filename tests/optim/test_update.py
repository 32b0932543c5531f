"""One update by itself: its states, what it asks for, and what it lets go of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
import torch

from lightning_ssd.errors import NonFiniteGradientError, ResidencyError, SSDOffloadError
from lightning_ssd.optim.update import PendingUpdate, UpdateState
from tests.optim.support import FakeWorld

WAYS = {  # to each state
    UpdateState.QUEUED: (),
    UpdateState.RUNNING: (UpdateState.RUNNING,),
    UpdateState.WRITING: (UpdateState.RUNNING, UpdateState.WRITING),
    UpdateState.DONE: (UpdateState.RUNNING, UpdateState.WRITING, UpdateState.DONE),
    UpdateState.FAILED: (UpdateState.FAILED,),
}
LEGAL = {
    UpdateState.QUEUED: {UpdateState.RUNNING, UpdateState.FAILED},
    UpdateState.RUNNING: {UpdateState.WRITING, UpdateState.DONE, UpdateState.FAILED},
    UpdateState.WRITING: {UpdateState.DONE, UpdateState.FAILED},
    UpdateState.DONE: set(),
    UpdateState.FAILED: set(),
}


class Waiting:
    """Gradients that are in flight, or on disk."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def wait(self) -> None:
        self._call()

    def check(self, grads: Mapping[int, torch.Tensor], *, is_final: bool) -> None:
        assert is_final
        assert list(grads) == [0]
        self._call()


@pytest.mark.parametrize(("start", "to"), list(itertools.product(UpdateState, UpdateState)), ids=str)
def test_each_move_is_legal_or_refused(start: UpdateState, to: UpdateState) -> None:
    update = FakeWorld("a").make("a")
    for state in WAYS[start]:
        update._move(state)
    assert update.state is start
    if to in LEGAL[start]:
        update._move(to)
        assert update.state is to
    else:
        with pytest.raises(ResidencyError, match=f"'a': {start.name} -> {to.name} is not a move"):
            update._move(to)
        assert update.state is start


@pytest.mark.parametrize("writes_behind", [False, True])
def test_the_way_of_an_update(writes_behind: bool) -> None:
    world = FakeWorld("a")
    world.writes_behind = writes_behind
    unit = world.unit("a")
    unit.spilled_grads = Waiting(lambda: world.events.append("check"))
    update = world.make("a", in_flight=Waiting(lambda: world.events.append("wait")))
    assert update.nbytes == 16
    assert update.unit.num_pins == 1
    update.run()
    assert update.parts == {}  # its gradients are gone before the next update runs
    assert update.unit.num_pins == 0
    assert update.state is (UpdateState.WRITING if writes_behind else UpdateState.DONE)
    update.finish()
    assert update.state is UpdateState.DONE
    assert world.events == ["check", "wait", "reserve a", "update a", "updated a"]
    for method in (PendingUpdate.run, PendingUpdate.complete, PendingUpdate.cancel):
        with pytest.raises(ResidencyError):
            method(update)


def test_one_that_is_cancelled_lets_go_of_what_it_pinned() -> None:
    world = FakeWorld("a", "b")
    update = world.make("a")
    update.cancel()
    assert (update.state, update.parts, update.unit.num_pins) == (UpdateState.FAILED, {}, 0)
    assert world.unit("b").update is None  # it was another one that failed
    assert world.events == []
    with pytest.raises(ResidencyError, match="FAILED and cannot be cancelled"):
        update.cancel()


def test_a_gradient_that_arrives_from_a_device_is_checked_when_it_is_there() -> None:
    grad = torch.ones(4)

    world = FakeWorld("a")
    update = world.make("a", grad=grad, in_flight=Waiting(lambda: grad.fill_(torch.nan)))
    with pytest.raises(NonFiniteGradientError, match=r"'a\.weight'"):
        update.run()
    assert (update.state, update.unit.num_pins) == (UpdateState.FAILED, 0)
    assert world.updated_units == []


def test_a_failed_update_lies_on_every_unit() -> None:
    world = FakeWorld("a", "b")
    world.errors["a"] = SSDOffloadError("the disk")
    update = world.make("a")
    with pytest.raises(SSDOffloadError, match="the disk"):
        world.updater.submit(update)
    for unit in world.units:
        with pytest.raises(SSDOffloadError, match="the disk"):
            unit.wait_for_update()
        assert unit.update is update
    world.updater.close()


def test_numbers_that_count() -> None:
    world = FakeWorld("a", "b")
    shared = world.make("b", is_last=False)
    assert (shared.nbytes, shared.position) == (0, 1)
    assert shared.is_idle
    assert not shared.changes_memory
    world.use("b")
    assert not shared.is_idle
    world.unit("b").in_memory = (torch.zeros(4),)
    assert shared.changes_memory
