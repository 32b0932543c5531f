"""A unit's forms: each move, and what is refused since a form would be lost."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from lightning_ssd.errors import IOFailure, ResidencyError
from lightning_ssd.memory.pool import Buffer, Pool
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.mapped import MappedParams
from lightning_ssd.units.partition import UnitSpec
from lightning_ssd.units.placement import InPlace
from lightning_ssd.units.unit import Unit
from tests.helpers.pools import num_lent


class Lazy(nn.Parameter):
    """The class of offloaded parameters."""


class FakeTransfer:
    """A read that is over when somebody waits for it."""

    def __init__(self, address: int, numel: int, value: float) -> None:
        self.address, self.numel, self.value = address, numel, value

    def wait(self) -> None:
        memory = (ctypes.c_float * self.numel).from_address(self.address)
        torch.frombuffer(memory, dtype=torch.float32).fill_(self.value)


class FakeStore:
    """Generation n has the value n everywhere."""

    def __init__(self) -> None:
        self.generations: list[object] = [SimpleNamespace(fingerprint=None)]
        self.error: Exception | None = None

    def newest(self, name: str, kind: str) -> object:
        return self.generations[-1]

    def read(self, generation: object, offset: int, address: int, nbytes: int, *, keep: Any) -> FakeTransfer:
        if self.error is not None:
            raise self.error
        return FakeTransfer(address, nbytes // 4, float(self.generations.index(generation)))


def make_unit(dtype: torch.dtype | None = None, *, keep_master: bool = False) -> Unit:
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.zeros(()))]
    unit = Unit(UnitSpec("blocks.0", ["a", "b", "c"], params), dtype, keep_master=keep_master)
    unit.placeholders = tuple(torch.full(shape.shape, torch.nan, dtype=unit.dtype) for shape in unit.shapes)
    return unit


class World:
    """A unit, a store and memory for two units."""

    def __init__(self) -> None:
        self.unit = make_unit()
        self.fake_store = FakeStore()
        self.store = cast(StateStore, self.fake_store)
        self.pool = Pool(2 * self.unit.layout.buffer_nbytes, "parameter")
        self.placement = InPlace()
        self.unit.offload(Lazy)

    def lend(self) -> Buffer:
        return self.pool.lend(self.unit.layout.buffer_nbytes, "unit")

    def make_resident(self) -> None:
        self.unit.read(self.store, self.lend())
        host_copy = self.unit.host_copy
        assert host_copy is not None
        host_copy.end_read()
        self.unit.show(self.store, self.placement)

    def values(self) -> set[float]:
        return {float(value) for param in self.unit.params for value in param.detach().reshape(-1)}

    def mapping(self) -> MappedParams:
        class Mapping:
            tensors = tuple(torch.full(shape.shape, 7.0) for shape in self.unit.shapes)

        return cast(MappedParams, Mapping())


def test_from_disk_to_the_device_and_back() -> None:
    world = World()
    unit = world.unit
    assert unit.is_on_disk
    assert {type(param) for param in unit.params} == {Lazy}
    world.make_resident()
    assert {type(param) for param in unit.params} == {nn.Parameter}
    assert world.values() == {0.0}
    unit.hide(world.placement, Lazy)
    assert {type(param) for param in unit.params} == {Lazy}
    assert all(bool(param.detach().isnan().all()) for param in unit.params)
    assert unit.host_copy is not None  # it may be shown again without a read
    unit.show(world.store, world.placement)
    assert world.values() == {0.0}
    unit.hide(world.placement, Lazy)
    unit.give_back(world.pool)
    assert unit.is_on_disk
    assert num_lent(world.pool) == 0


def test_values_that_are_not_there_yet_are_not_shown() -> None:
    world = World()
    with pytest.raises(ResidencyError, match=r"Unit\('blocks.0', 36 x F32, offloaded\) was to be made resident"):
        world.unit.show(world.store, world.placement)
    world.unit.read(world.store, world.lend())
    with pytest.raises(ResidencyError, match=r"host_copy.* has no values in memory"):
        world.unit.show(world.store, world.placement)  # it is being read
    world.unit.give_back(world.pool)
    world.unit.lend(world.lend())  # an update will make them
    with pytest.raises(ResidencyError, match="has no values in memory"):
        world.unit.show(world.store, world.placement)


@pytest.mark.parametrize("is_resident", [False, True])
def test_a_copy_is_not_replaced_by_another(is_resident: bool) -> None:
    world = World()
    if is_resident:
        world.make_resident()
    else:
        world.unit.read(world.store, world.lend())
    other = world.lend()
    with pytest.raises(ResidencyError, match="has a copy there"):
        world.unit.read(world.store, other)
    with pytest.raises(ResidencyError, match="has a copy there"):
        world.unit.lend(other)
    with pytest.raises(ResidencyError, match="has a copy there"):
        world.unit.hold_in_memory(())
    if is_resident:
        with pytest.raises(ResidencyError, match="was to be made resident"):
            world.unit.show(world.store, world.placement)
        with pytest.raises(ResidencyError, match="was to be mapped"):
            world.unit.map(world.mapping())


def test_what_is_mapped_is_offloaded_before_it_is_resident() -> None:
    world = World()
    world.unit.map(world.mapping())
    assert world.values() == {7.0}
    with pytest.raises(ResidencyError, match=r"mapped.* was to be made resident"):
        world.unit.show(world.store, world.placement)
    with pytest.raises(ResidencyError, match="was to be mapped"):
        world.unit.map(world.mapping())
    with pytest.raises(ResidencyError, match="is not resident"):
        world.unit.hide(world.placement, Lazy)
    world.unit.offload(Lazy)
    world.make_resident()
    assert world.values() == {0.0}


def test_what_is_in_memory_is_shown_as_it_is() -> None:
    world = World()
    held = tuple(torch.full(shape.shape, 5.0) for shape in world.unit.shapes)
    world.unit.hold_in_memory(held)
    world.unit.show(world.store, world.placement)
    with torch.no_grad():
        world.unit.params[0].add_(1)
    world.unit.hide(world.placement, Lazy)
    assert {float(value) for tensor in held for value in tensor.reshape(-1)} == {5.0, 6.0}
    with pytest.raises(ResidencyError, match="has a copy there"):
        world.unit.read(world.store, world.lend())
    world.unit.in_memory = None
    assert world.unit.is_on_disk


def test_what_is_written_to_it_is_noticed_by_versions_and_where_they_do_not_tell_by_checksums() -> None:
    world = World()
    unit = world.unit
    world.make_resident()  # in the first two uses checksums are compared too
    unit.hide(world.placement, Lazy)

    def is_noticed(write: Callable[[torch.Tensor], object], *, touches: bool = False) -> bool:
        unit.show(world.store, world.placement)
        if touches:
            unit.touch()
        assert not unit.may_be_written()
        write(unit.params[0])
        found = unit.may_be_written()
        unit.forget_writes()
        assert not unit.may_be_written()
        unit.hide(world.placement, Lazy)
        return found

    def by_operation(param: torch.Tensor) -> None:
        param.detach().add_(1)

    def by_data(param: torch.Tensor) -> None:
        param.data.add_(1)

    assert is_noticed(by_operation)
    assert not is_noticed(by_data)
    assert is_noticed(by_operation)
    assert is_noticed(by_data, touches=True)
    assert not unit.writes_itself
    unit.writes_itself = True
    assert is_noticed(by_data)


def test_what_is_in_memory_may_always_have_been_written() -> None:
    world = World()
    world.unit.hold_in_memory(tuple(torch.zeros(shape.shape) for shape in world.unit.shapes))
    assert not world.unit.may_be_written()
    world.unit.show(world.store, world.placement)
    assert world.unit.is_in_place
    assert world.unit.may_be_written()


def test_a_buffer_that_an_update_has_is_not_given_back() -> None:
    world = World()
    world.unit.read(world.store, world.lend())
    world.unit.num_pins = 1
    with pytest.raises(ResidencyError, match="an update has"):
        world.unit.give_back(world.pool)
    world.unit.num_pins = 0
    world.unit.give_back(world.pool)
    assert num_lent(world.pool) == 0


def test_a_read_that_cannot_be_started_leaves_no_copy() -> None:
    world = World()
    world.fake_store.error = IOFailure(5, "/disk/file", 0, 16)
    buffer = world.lend()
    with pytest.raises(IOFailure, match="/disk/file"):
        world.unit.read(world.store, buffer)
    assert world.unit.is_on_disk
    world.fake_store.error = None
    world.pool.give_back(buffer)
    world.make_resident()
    assert world.values() == {0.0}


def test_a_copy_that_the_device_kept_is_used_again_only_for_the_newest_values() -> None:
    class Device(InPlace):
        """Has what was released."""

        keeps_buffer = False

        def release(self, device_copy: Any) -> Any:  # type: ignore[override]
            return device_copy

        def reuse(self, device_copy: Any, generation: Any) -> bool:
            return bool(device_copy.has(generation))

    world = World()
    world.placement = Device()
    world.make_resident()
    world.unit.hide(world.placement, Lazy)
    world.unit.give_back(world.pool)
    world.unit.show(world.store, world.placement)  # without a host copy
    assert world.values() == {0.0}
    world.unit.hide(world.placement, Lazy)
    world.fake_store.generations.append(object())
    with pytest.raises(ResidencyError, match=r"released_copy\) was to be made resident, and has no values"):
        world.unit.show(world.store, world.placement)
    world.make_resident()
    assert world.values() == {1.0}


def test_what_was_written_into_the_store_is_what_is_in_memory() -> None:
    world = World()
    world.make_resident()
    generation = cast(Generation, object())
    world.unit.became(generation)
    unit = world.unit
    assert unit.host_copy is not None
    assert unit.device_copy is not None
    assert unit.host_copy.generation is unit.device_copy.generation is generation


def test_parameters_stand_in_file_order_in_every_kind() -> None:
    made = make_unit(torch.bfloat16, keep_master=True)
    assert made.names == ("b", "a", "c")  # the one that keeps the others aligned comes first
    assert [tuple(param.shape) for param in made.params] == [(4, 8), (3,), ()]
    assert made.layout.dtype == "BF16"
    assert made.dtype == torch.bfloat16
    master = made.layout_of("master")
    assert (made.has_master, master.dtype) == (True, "F32")
    assert [entry.name for entry in master.entries] == list(made.names)
    assert master.numel == made.layout.numel == 36


def test_integer_parameters_keep_their_dtype() -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False)
    assert Unit(UnitSpec("ids", ["ids"], [param]), torch.bfloat16).layout.dtype == "I32"
