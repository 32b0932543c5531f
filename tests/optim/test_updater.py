"""The queue of updates by itself: who waits for whom."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ssd.memory.budget import SharedBudget
from lightning_ssd.optim.updater import PendingUpdate, Updater
from lightning_ssd.trace.recorder import Trace
from lightning_ssd.units.partition import UnitSpec
from lightning_ssd.units.unit import Unit


def make_unit(name: str) -> Unit:
    weight = nn.Parameter(torch.zeros(4))
    return Unit(
        UnitSpec(name=name, names=[f"{name}.weight"], params=[weight], modules=[], block=None, persistent=False)
    )


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("capacity", [0, 100])
def test_gradients_without_room_are_waited_for_unless_memory_in_use_would_change(is_kept: bool, capacity: int) -> None:
    """``capacity`` is below or above what is owed by a unit that compute still uses."""
    ran: list[str] = []
    is_free = False
    budget = SharedBudget(gradients_nbytes=capacity)
    queue = Updater(budget=budget, is_async=True, finish=lambda: None, trace=Trace())
    unit = make_unit("unit")

    def run() -> None:
        ran.append(unit.name)
        queue.complete(unit)

    queue.add(PendingUpdate(unit, 16, 0, is_kept, lambda: is_free, run, lambda: None))
    if not is_kept and capacity == 0:
        assert ran == ["unit"]  # `add` returned when it had run: the gradients of two units have no room
    else:
        assert ran == []
        is_free = True
        queue.notify()
    queue.wait(unit)
    assert ran == ["unit"]
    queue.close()  # until then the thread may be between the two
    assert budget.held_gradients_nbytes == 0


class Hesitant(threading.Condition):
    """The thread of updates gives others a chance each time it lets go of the lock."""

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if threading.current_thread().name == "lightning-ssd-update":
            time.sleep(0.05)


def test_who_waits_for_room_learns_that_nothing_can_run() -> None:
    """One update ends while another, of memory in use, waits: what waits for room has to go on, or both sleep."""
    queue = Updater(budget=SharedBudget(), is_async=True, finish=lambda: None, trace=Trace())
    queue._changed = Hesitant()
    free, used = make_unit("free"), make_unit("used")
    is_free = False
    may_end = threading.Event()

    def run_free() -> None:
        may_end.wait()
        queue.complete(free)

    def add_used() -> None:
        may_end.set()
        queue.add(PendingUpdate(used, 16, 0, True, lambda: is_free, lambda: queue.complete(used), lambda: None))

    queue.add(PendingUpdate(free, 0, 1, True, lambda: True, run_free, lambda: None))
    trainer = threading.Thread(target=add_used, daemon=True)
    trainer.start()
    trainer.join(20)
    assert not trainer.is_alive()
    is_free = True
    queue.notify()
    queue.drain()
    queue.close()
