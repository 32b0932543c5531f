"""The thread of updates by itself: order, who waits for whom, failures, and the end."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.optim.update import UpdateState
from tests.optim.support import FakeWorld


@pytest.mark.parametrize("is_in_memory", [False, True])
@pytest.mark.parametrize("capacity", [0, 100])
def test_gradients_without_room_are_waited_for_unless_memory_in_use_would_change(
    is_in_memory: bool, capacity: int
) -> None:
    """``capacity`` is below or above what is pending of a unit that compute still uses."""
    world = FakeWorld("unit", capacity=capacity)
    world.use("unit")
    world.unit("unit").in_memory = (torch.zeros(4),) if is_in_memory else None
    world.submit("unit")
    if not is_in_memory and capacity == 0:
        assert world.updated_units == [
            "unit"
        ]  # `submit` returned when it had run: the gradients of two units have no room
    else:
        assert world.updated_units == []
        world.release("unit")
    world.unit("unit").wait_for_update()
    assert world.updated_units == ["unit"]
    world.updater.close()  # until then the thread may be between the two
    assert world.budget.held_gradients_nbytes == 0


class Hesitant(threading.Condition):
    """The thread of updates gives others a chance each time it lets go of the lock."""

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if threading.current_thread().name == "lightning-ssd-update":
            time.sleep(0.05)


def test_who_waits_for_room_learns_that_nothing_can_run() -> None:
    """One update ends while another, of memory in use, waits: what waits for room has to go on, or both sleep."""
    world = FakeWorld("used", "free", lock=Hesitant())
    world.use("used")
    world.unit("used").in_memory = (torch.zeros(4),)
    world.gates["free"] = threading.Event()
    world.updater.submit(world.make("free", is_last=False))

    def submit_used() -> None:
        world.gates["free"].set()
        world.submit("used")

    trainer = threading.Thread(target=submit_used, daemon=True)
    trainer.start()
    trainer.join(20)
    assert not trainer.is_alive()
    world.release("used")
    world.updater.drain()
    world.updater.close()


def test_soonest_needed_first() -> None:
    world = FakeWorld("a", "b", "c", "d", capacity=1000)
    world.gates["c"] = threading.Event()
    world.submit("c")
    assert world.begun.wait(20)  # c runs; the others wait
    world.submit("d", "b", "a")
    world.gates["c"].set()
    world.updater.drain()
    world.updater.close()
    assert world.updated_units == ["c", "a", "b", "d"]


def test_who_waits_for_a_unit_has_even_those_updated_that_compute_reads() -> None:
    world = FakeWorld("a", "b", capacity=1000)
    world.use("a", "b")
    a, b = world.submit("a", "b")
    assert (a.state, b.state) == (UpdateState.QUEUED, UpdateState.QUEUED)
    assert world.unit("b").update is b
    world.unit("b").wait_for_update()
    assert world.updated_units == ["a", "b"]
    assert b.state is UpdateState.DONE
    assert world.unit("b").update is None
    world.updater.close()


def test_an_earlier_update_of_the_same_unit_is_done_first() -> None:
    world = FakeWorld("a", capacity=1000)
    world.use("a")
    first, second = world.make("a"), world.make("a", is_last=False)
    first._unpin()  # the fake holds one pin for both
    world.updater.submit(first)
    submitting = threading.Thread(target=world.updater.submit, args=(second,), daemon=True)
    submitting.start()
    submitting.join(20)
    assert first.state is UpdateState.DONE
    world.updater.drain()
    world.updater.close()
    assert second.state is UpdateState.DONE


def test_the_last_writes_are_finished_when_there_is_nothing_to_run() -> None:
    world = FakeWorld("a", "b")
    world.writes_behind = True
    updates = world.submit("a", "b")
    world.updater.drain()
    assert [update.state for update in updates] == [UpdateState.DONE, UpdateState.DONE]
    world.updater.close()


def test_after_a_failure_what_was_written_is_whole_and_the_rest_is_cancelled() -> None:
    world = FakeWorld("a", "b", "c", "d", capacity=1000)
    world.writes_behind = True
    world.gates["a"] = threading.Event()
    world.use("b", "c", "d")  # only a runs by itself
    world.errors["b"] = SSDOffloadError("the disk")
    a, b, c = world.submit("a", "b", "c")
    world.gates["a"].set()
    with pytest.raises(SSDOffloadError, match="the disk"):
        world.updater.drain()
    assert [update.state for update in (a, b, c)] == [UpdateState.DONE, UpdateState.FAILED, UpdateState.FAILED]
    assert [unit.num_pins for unit in world.units] == [0, 0, 0, 0]
    assert world.updater.is_broken
    assert world.budget.held_gradients_nbytes == 0
    late = world.make("d")
    with pytest.raises(SSDOffloadError, match="the disk"):
        world.updater.submit(late)
    assert (late.state, late.unit.num_pins) == (UpdateState.FAILED, 0)
    world.updater.close()
    assert world.updated_units == ["a", "b"]


def test_a_write_that_fails_under_the_next_update_fails_both() -> None:
    world = FakeWorld("a", "b", capacity=1000)
    world.writes_behind = True
    world.gates = {"a": threading.Event(), "b": threading.Event()}
    world.write_errors["a"] = SSDOffloadError("the disk")
    updates = world.submit("a", "b")
    for gate in world.gates.values():
        gate.set()
    with pytest.raises(SSDOffloadError, match="the disk"):
        world.updater.drain()
    assert [update.state for update in updates] == [UpdateState.FAILED, UpdateState.FAILED]
    world.updater.close()


def test_without_a_thread_an_update_is_done_when_it_is_submitted() -> None:
    world = FakeWorld("a", "b", is_async=False)
    world.writes_behind = True
    world.errors["b"] = SSDOffloadError("the disk")
    (a,) = world.submit("a")
    assert (a.state, a.unit.update) == (UpdateState.DONE, None)
    with pytest.raises(SSDOffloadError, match="the disk"):
        world.submit("b")
    world.unit("a").wait_for_update()  # who submitted it was told
    world.updater.close()


def test_closing_runs_what_is_pending() -> None:
    world = FakeWorld("a", "b", capacity=1000)
    world.writes_behind = True
    world.use("a", "b")
    updates = world.submit("b", "a")
    world.updater.close()
    assert world.updated_units == ["a", "b"]
    assert [update.state for update in updates] == [UpdateState.DONE, UpdateState.DONE]


def test_settling_runs_what_can_run_and_leaves_the_rest() -> None:
    world = FakeWorld("a", "b", capacity=1000)
    world.use("a")
    a, b = world.submit("a", "b")
    world.updater.settle()
    assert (a.state, b.state) == (UpdateState.QUEUED, UpdateState.DONE)
    assert world.updater.before_fork() == ["a"]
    world.updater.after_fork()
    world.updater.close()
