"""When the update of a unit is submitted in backward, and what stays visible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ssd.step.gradients import GradientStore
from lightning_ssd.units.partition import UnitSpec
from lightning_ssd.units.unit import Unit


class FakeOptimizer:
    """Notes whose update was submitted, and with which gradients."""

    def __init__(self) -> None:
        self.submitted: list[tuple[str, list[int]]] = []

    def update(self, unit: Unit, grads: Mapping[int, Tensor], *, is_last: bool, in_flight: object) -> None:
        assert is_last
        assert in_flight is None
        self.submitted.append((unit.name, sorted(grads)))


class World:
    """A unit of two parameters whose gradients are watched."""

    def __init__(self) -> None:
        self.unit = Unit(UnitSpec("unit", ["a", "b"], [nn.Parameter(torch.ones(2)) for _ in "ab"]))
        self.optimizer = FakeOptimizer()
        self.grads = GradientStore(None)
        self.num_notes = 0
        self.grads.watch(self.unit, cast(Any, self))

    def note(self) -> None:
        """As of the `BackwardPass`."""
        self.num_notes += 1

    def run(self, *indices: int, updates: bool = True) -> None:
        """The backward of the Trainer, which reaches some of the parameters."""
        with self.grads.backward([self.unit], cast(Any, self.optimizer) if updates else None):
            sum(self.unit.params[i].sum() for i in indices).backward()  # type: ignore[union-attr]
            self.found = list(self.optimizer.submitted)
            self.grads.end_backward()


def test_a_unit_is_submitted_once_all_its_gradients_are_there() -> None:
    world = World()
    world.grads.used(world.unit)
    world.run(0, 1)
    assert world.found == world.optimizer.submitted == [("unit", [0, 1])]
    assert [param.grad for param in world.unit.params] == [None, None]
    assert world.unit.is_submitted
    assert world.num_notes == 2


def test_one_that_may_get_more_is_submitted_when_backward_ends() -> None:
    world = World()
    for _ in range(2):  # one forward of two is still to come
        world.grads.used(world.unit)
    world.run(0, 1)
    assert world.found == []
    assert world.optimizer.submitted == [("unit", [0, 1])]
    world.grads.used(world.unit)
    world.run(1)  # the other one is never reached
    assert world.found == [("unit", [0, 1])]
    assert world.optimizer.submitted[1:] == [("unit", [1])]


def test_values_that_backward_still_reads_are_not_updated() -> None:
    class View:
        """Stands for a saved tensor."""

    world, view = World(), View()
    world.unit.saved_views.add(view)
    world.grads.used(world.unit)
    with world.grads.backward([world.unit], cast(Any, world.optimizer)):
        (world.unit.params[0].sum() + world.unit.params[1].sum()).backward()
        world.grads.update_complete(world.unit)
        assert world.optimizer.submitted == []
        del view
        world.grads.update_complete(world.unit)
        assert world.optimizer.submitted == [("unit", [0, 1])]


def test_without_an_optimizer_gradients_are_visible_and_add_up() -> None:
    world = World()
    for number in (1, 2):
        world.grads.used(world.unit)
        world.run(0, 1, updates=False)
        assert [cast(Tensor, param.grad).tolist() for param in world.unit.params] == [[number] * 2] * 2
    assert world.optimizer.submitted == []
    assert not world.unit.is_submitted
