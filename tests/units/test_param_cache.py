"""The cache of parameters: what is fetched is right, whatever memory there is; what is used is never taken away."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ssd.errors import IOFailure, ResidencyError
from tests.helpers.faulty import Fault, When
from tests.units.support import CacheWorld

Make = Callable[..., CacheWorld]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    worlds: list[CacheWorld] = []

    def make_world(num_units: int, num_buffers: int, **options: Any) -> CacheWorld:
        worlds.append(CacheWorld(tmp_path, num_units, num_buffers, **options))
        return worlds[-1]

    yield make_world
    while worlds:
        worlds.pop().close()


def test_the_first_step_reads_on_demand_and_the_second_ahead(make: Make) -> None:
    world = make(4, 2)
    found, events = world.step(0, 1, 2, 3)
    assert found == [0.0, 1.0, 2.0, 3.0]
    assert "prefetch" not in " ".join(events)
    found, events = world.step(0, 1, 2, 3)
    assert found == [0.0, 1.0, 2.0, 3.0]
    expected = ["fetch 0", "prefetch 1", "release 0", "fetch 1", "prefetch 2", "release 1", "fetch 2", "prefetch 3"]
    assert events[:8] == expected


def test_a_window_and_a_batch(make: Make) -> None:
    world = make(6, 6, max_ahead=4, prefetch_batch=2)
    world.step(0, 1, 2, 3, 4, 5)
    _, events = world.step(0, 1, 2, 3, 4, 5)
    assert events[:5] == ["fetch 0", "prefetch 1", "prefetch 2", "prefetch 3", "prefetch 4"]


def test_the_block_at_the_turn_is_not_read_again(make: Make) -> None:
    world = make(3, 2)
    turn = (0, 1, 2, 2, 1, 0)
    world.step(*turn)
    found, events = world.step(*turn)
    assert found == [0.0, 1.0, 2.0, 2.0, 1.0, 0.0]
    assert events.count("prefetch 2") == 1


def test_without_room_ahead_nothing_is_read_ahead_and_what_is_used_stays(make: Make) -> None:
    world = make(3, 1)
    for _ in range(2):
        assert world.step(0, 1, 2)[0] == [0.0, 1.0, 2.0]
    world.cache.fetch(world.units[0])
    with pytest.raises(ResidencyError, match=r"(?s)unit '1'.*parameter"):
        world.cache.fetch(world.units[1])
    assert world.value(world.units[0]) == 0.0
    world.cache.release(world.units[0])
    assert world.step(1, 0)[0] == [1.0, 0.0]


def test_the_cache_keeps_what_is_needed_soonest(make: Make) -> None:
    world = make(4, 3, keep_cache=True, max_ahead=None)
    order = (0, 1, 2, 3)
    world.step(*order)
    world.step(*order)
    reads = world.engine.stats().num_reads
    assert world.step(*order)[0] == [0.0, 1.0, 2.0, 3.0]
    assert world.engine.stats().num_reads - reads < 4  # some were still there


@pytest.mark.parametrize("seed", range(20))
def test_random_use_shows_the_newest_values_and_never_more_memory_than_there_is(make: Make, seed: int) -> None:
    rng = random.Random(seed)
    world = make(
        6,
        rng.choice([2, 3, 6]),
        in_memory=rng.sample(range(6), rng.choice([0, 1])),
        persistent=[] if rng.random() < 0.7 else [5],
        keep_cache=rng.random() < 0.5,
        max_ahead=rng.choice([1, 2, None]),
        prefetch_batch=rng.choice([1, 2]),
    )
    values = [float(i) for i in range(6)]
    orders = [[rng.randrange(6) for _ in range(12)] for _ in range(2)]
    for order in orders[:1] * 3 + orders[1:] * 3:
        assert world.step(*order)[0] == [values[number] for number in order]
        for number in rng.sample(range(6), 3):
            if world.units[number].in_memory is None:
                values[number] = rng.random()
                values[number] = torch.tensor(values[number]).item()
                world.update(number, values[number])


def test_nested_holds_and_a_view_that_the_user_kept(make: Make) -> None:
    world = make(3, 2)
    unit = world.units[0]
    with world.model.step.running():
        assert world.cache.fetch(unit)
        assert not world.cache.fetch(unit)
        world.cache.release(unit)
        assert world.value(unit) == 0.0
        view = unit.params[0].data
        world.cache.release(unit)
        assert world.use(1, 2, 1) == [1.0, 2.0, 1.0]
    assert set(view.tolist()) == {0.0}  # its buffer was not lent to another


@pytest.mark.parametrize("fault", [Fault(error=5), Fault(error=5, moved_nbytes=512)], ids=["fails", "is short"])
@pytest.mark.parametrize("nth", [0, 2, 4, 5])  # of three reads on demand, then one and two reads ahead
def test_a_read_that_failed_is_made_again(make: Make, fault: Fault, nth: int) -> None:
    world = make(3, 2, faults=[When(fault, "*.safetensors", is_write=False, nth=nth)])
    if nth > 2:
        world.step(0, 1, 2)
    with pytest.raises(IOFailure, match="errno 5"):
        world.step(0, 1, 2)
    world.cache.drop_holds()
    assert all(unit.num_holds == 0 for unit in world.units)
    for _ in range(2):
        assert world.step(0, 1, 2)[0] == [0.0, 1.0, 2.0]


def test_what_is_read_ahead_while_room_is_waited_for_is_not_read_twice(make: Make) -> None:
    world = make(3, 2)
    held, pinned, wanted = world.units
    world.cache.fetch(held)
    pinned.read(world.store, world.pool.lend(pinned.layout.buffer_nbytes, "unit"))
    pinned.num_pins = 1
    fetching = threading.Thread(target=world.cache.fetch, args=(wanted,), daemon=True)
    fetching.start()  # there is no room until the update of the pinned one is over
    while wanted.num_holds == 0:
        time.sleep(0.001)
    with world.model.lock:  # which the other thread has released: now this one is that of updates
        pinned.num_pins = 0
        world.cache.evict_idle()
        wanted.read(world.store, world.pool.lend(wanted.layout.buffer_nbytes, "unit"))
        world.model.lock.notify_all()
    fetching.join(20)
    assert not fetching.is_alive()
    assert world.value(wanted) == 2.0
    world.cache.release(wanted)
    world.cache.release(held)


def test_values_are_not_taken_before_they_are_there(make: Make) -> None:
    world = make(4, 3, max_ahead=2, faults=[When(Fault(delay_s=0.05), is_write=False)])
    for _ in range(3):
        assert world.step(0, 1, 2, 3)[0] == [0.0, 1.0, 2.0, 3.0]


def test_an_update_writes_into_memory_only_where_nobody_reads(make: Make) -> None:
    world = make(2, 2, keep_cache=True, max_ahead=None)
    world.step(0, 1)
    used, idle = world.units
    world.cache.fetch(used)
    used.has_master = True
    assert world.cache.reserve(used) is None  # its values would be of no use to it
    used.has_master = False
    reader = world.cache.reserve(used)
    assert reader is not None
    assert (reader.is_current, reader.is_writable) == (True, False)
    reader.end(is_new=False)
    writer = world.cache.reserve(idle)
    assert writer is not None
    assert (writer.is_current, writer.is_writable) == (True, True)
    with pytest.raises(ResidencyError, match="update has"):
        idle.give_back(world.pool)
    writer.end(is_new=False)  # it failed: the bytes are undefined
    assert world.use(1) == [1.0]
    world.cache.release(used)


def test_what_an_update_made_is_not_read_from_disk(make: Make) -> None:
    world = make(2, 2, keep_cache=True, max_ahead=None)
    world.step(0, 1)
    world.update(0, 7.0)
    reads = world.engine.stats().num_reads
    assert world.use(0) == [7.0]
    assert world.engine.stats().num_reads == reads


def test_pinned_bytes_stay_until_the_update_has_them(make: Make) -> None:
    world = make(3, 2)
    world.step(0, 1, 2)
    unit = world.units[0]
    world.cache.fetch(unit)
    assert world.cache.prepare_update(unit)
    world.cache.release(unit)
    assert world.use(1, 2) == [1.0, 2.0]
    assert unit.host_copy is not None
    world.cache.unpin(unit)
