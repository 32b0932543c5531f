"""The queue of updates by itself: who waits for whom."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_ssd.optim.queue import Owed, UpdateQueue
from lightning_ssd.streaming.partition import UnitSpec
from lightning_ssd.streaming.unit import Unit
from lightning_ssd.trace import Trace


def make_unit(name: str) -> Unit:
    weight = nn.Parameter(torch.zeros(4))
    return Unit(UnitSpec(name=name, names=[f"{name}.weight"], params=[weight], modules=[], block=None, sticky=False))


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("capacity", [0, 100])
def test_gradients_without_room_are_waited_for_unless_memory_in_use_would_change(is_kept: bool, capacity: int) -> None:
    """``capacity`` is below or above what is owed by a unit that compute still uses."""
    ran: list[str] = []
    is_free = False
    queue = UpdateQueue(capacity=lambda: capacity, is_async=True, finish=lambda: None, trace=Trace())
    unit = make_unit("unit")

    def run() -> None:
        ran.append(unit.name)
        queue.complete(unit)

    queue.add(Owed(unit, 16, 0, is_kept, lambda: is_free, run, lambda: None))
    if not is_kept and capacity == 0:
        assert ran == ["unit"]  # `add` returned when it had run: the gradients of two units have no room
    else:
        assert ran == []
        is_free = True
        queue.notify()
    queue.wait(unit)
    assert ran == ["unit"]
    assert queue.held_nbytes == 0
    queue.close()
