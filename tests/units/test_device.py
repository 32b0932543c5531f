"""The route to a device with memory of its own: host and device memory are used again when, and only when, they may."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch

from lightning_ssd.device.allowance import LearnedAllowance
from lightning_ssd.device.param_copies import CopyToDevice, DeviceCopy
from lightning_ssd.errors import MemoryPlanError, ResidencyError
from lightning_ssd.memory.device_plan import device_capacity
from lightning_ssd.memory.pool import Pool
from lightning_ssd.sizes import MiB
from lightning_ssd.step.grad_offload import GradOffloader
from lightning_ssd.store.generation import Generation
from lightning_ssd.store.layout import Shape, lay_out
from tests.helpers.fake_device import LateStreams, SimulatedDevice
from tests.helpers.pools import lingering, num_lent

LAYOUT = lay_out("unit", "param", [Shape("a", (40, 30)), Shape("b", (30,)), Shape("c", ())], "F32")
GENERATION = cast(Generation, object())
NBYTES = 40 * 30 * 4 + 512 - 40 * 30 * 4 % 512 + 512 + 512
Break = Callable[[SimulatedDevice], None]


def value_at(address: int) -> float:
    import ctypes

    return ctypes.c_float.from_address(address).value


class Run:
    """Units of distinct values go through a route; compute reads each late, and finds what was sent, or not."""

    def __init__(self, seed: int, *, capacity: int, breaks: Break = lambda device: None) -> None:
        self.rng = random.Random(seed)
        self.device = SimulatedDevice(1 << 20, self.rng)
        breaks(self.device)
        self.placement = CopyToDevice(self.device, capacity_nbytes=capacity * NBYTES, is_limit=True)
        self.pool = Pool(3 * LAYOUT.buffer_nbytes, "host", poison=True)
        self.wrong = 0
        self.most_nbytes = 0

    def fetch(self, value: float) -> DeviceCopy:
        buffer = self.pool.lend(LAYOUT.buffer_nbytes, "unit", self.placement.wait_for_one)
        buffer.tensor(0, torch.float32, (LAYOUT.numel,)).fill_(value)
        device_copy = self.placement.place(LAYOUT, buffer, GENERATION)
        self.pool.give_back(buffer)
        self.most_nbytes = max(self.most_nbytes, self.placement._nbytes)
        return device_copy

    def read(self, device_copy: DeviceCopy, value: float) -> None:
        """Compute reads the first and the last tensor."""
        for address in (device_copy.tensors[0].data_ptr(), device_copy.tensors[-1].data_ptr()):
            self.device.compute(lambda address=address: self._check(address, value))

    def end(self) -> None:
        while self.device.advance():
            pass
        self.placement.close()

    def _check(self, address: int, value: float) -> None:
        self.wrong += value_at(address) != value


def run_units(run: Run, *, num: int = 40, keep_view: bool = False) -> None:
    views: list[tuple[float, torch.Tensor]] = []
    last: tuple[float, DeviceCopy] | None = None
    for i in range(num):
        value = float(i)
        if last is not None and run.rng.random() < 0.3 and run.placement.reuse(last[1], GENERATION):
            value, device_copy = last
        else:
            device_copy = run.fetch(value)
        run.read(device_copy, value)
        if keep_view and run.rng.random() < 0.3:
            views.append((value, device_copy.tensors[0][3:]))
        run.placement.release(device_copy)
        last = (value, device_copy)
        for view_value, view in views:  # what somebody kept is used after its unit was released
            address = view.data_ptr()
            run.device.compute(lambda address=address, value=view_value: run._check(address, value))
        if run.rng.random() < 0.5:
            views.clear()
        for _ in range(run.rng.randrange(4)):
            run.device.advance()
    views.clear()
    run.end()


@pytest.mark.parametrize("capacity", [1, 2, 5])
@pytest.mark.parametrize("keep_view", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_compute_reads_what_was_sent(seed: int, keep_view: bool, capacity: int) -> None:
    run = Run(seed, capacity=capacity)
    run_units(run, keep_view=keep_view)
    assert run.wrong == 0
    assert run.most_nbytes <= capacity * NBYTES
    assert num_lent(run.pool) == 0
    assert lingering(run.pool) == []
    assert run.placement._nbytes == 0


def no_wait_for_compute(device: SimulatedDevice) -> None:
    device.wait = lambda event: None  # type: ignore[method-assign]


def events_fire_at_once(device: SimulatedDevice) -> None:
    send = device.send

    class Over:
        def query(self) -> bool:
            return True

        def wait(self, why: object) -> None:
            pass

    def send_without_event(hosts: Sequence[torch.Tensor]) -> object:
        return send(hosts)[0], Over()

    device.send = send_without_event  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("breaks", [no_wait_for_compute, events_fire_at_once])
def test_the_simulation_finds_a_missing_wait(breaks: Break) -> None:
    wrong = 0
    for seed in range(10):
        run = Run(seed, capacity=1, breaks=breaks)
        run_units(run)
        wrong += run.wrong
    assert wrong > 0


def test_the_next_copy_waits_for_the_unit_before_the_one_in_use_only() -> None:
    run = Run(0, capacity=2)
    for i in range(2):
        device_copy = run.fetch(float(i))
        run.read(device_copy, float(i))
        run.placement.release(device_copy)
    run.fetch(2.0)  # into the memory of the first
    while run.device.queues["copies"]:
        run.device.advance(prefer="copies")
    assert len(run.device.queues["compute"]) == 4  # the waits for two units, and the reads of the first of these
    run.end()
    assert run.wrong == 0


def test_units_in_use_beyond_the_limit_are_refused() -> None:
    run = Run(0, capacity=1)
    run.fetch(1.0)
    with pytest.raises(ResidencyError, match="device_memory"):
        run.fetch(2.0)
    run.end()


def test_capacity() -> None:
    units, chains = {"a": 3 * MiB, "b": 4 * MiB, "c": 1 * MiB}, [["a"], ["a", "c"], ["b"]]
    assert device_capacity(units, chains, None) == 8 * MiB
    assert device_capacity(units, chains, 5 * MiB) == 5 * MiB
    with pytest.raises(MemoryPlanError, match=r"device_memory=3.00 MiB.*4.00 MiB.*at least 4MiB"):
        device_capacity(units, chains, 3 * MiB)


def test_landing_bounds_what_is_on_its_way_and_goes_on_without_room() -> None:
    waited: list[float] = []

    class Streams(LateStreams):
        """A copy is over when the host has waited for it."""

        def to_host(self, data: torch.Tensor, memory: torch.Tensor, after: object = None) -> Any:
            event: Any = super().to_host(data, memory)
            event.query = lambda: event._finish is None
            event.value = data[0].item()
            return event

        def use(self, event: Any) -> None:
            waited.append(event.value)

    offloader = GradOffloader(Streams(random.Random(0)), Pool(4 * 4096, "gradient", poison=True), most_nbytes=2 * 4096)
    asked: list[int] = []
    landed = [offloader.offload(torch.full((1024,), float(i)), lambda: asked.append(1)) for i in range(6)]
    assert waited == [0.0, 1.0, 2.0]  # two may be on their way: compute waits, not the host
    assert len(asked) == 2  # the pool holds four
    for i, one in enumerate(landed):
        one.wait()
        assert (one.tensor == i).all()
    del landed, one
    assert offloader.offload(torch.ones(1024), lambda: asked.append(1)).tensor.numel() == 1024
    assert len(asked) == 2


def test_a_gradient_that_nobody_wants_keeps_its_memory_until_it_has_landed() -> None:
    class Streams(LateStreams):
        def to_host(self, data: torch.Tensor, memory: torch.Tensor, after: object = None) -> Any:
            event: Any = super().to_host(data, memory)
            event.query = lambda: event._finish is None  # else asking may end it
            events.append(event)
            return event

    events: list[Any] = []
    pool = Pool(2 * 4096, "gradient", poison=True)
    offloader = GradOffloader(Streams(random.Random(0)), pool, most_nbytes=8 * 4096)
    first = offloader.offload(torch.ones(1024), lambda: None).tensor.data_ptr()
    assert offloader.offload(torch.ones(1024), lambda: None).tensor.data_ptr() != first
    events[0].wait()
    assert offloader.offload(torch.ones(1024), lambda: None).tensor.data_ptr() == first
    offloader.close()
    assert all(event._finish is None for event in events)


def test_what_a_step_may_take_is_known_after_the_first_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,024 MiB the step takes 100 beside units; an eighth stays free, or half of what was taken if that is more."""
    taken = {"peak": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900 * MiB, 1024 * MiB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100 * MiB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: taken["peak"])
    allowance = LearnedAllowance(torch.device("cuda"), 8 * MiB)
    assert allowance.of_step("train", 0) == 8 * MiB
    taken["peak"] = 108 * MiB
    assert allowance.of_step("train", 8 * MiB) == (1000 - 100 - 128) * MiB
    assert allowance.of_step("eval", 8 * MiB) == 8 * MiB
    taken["peak"] = 700 * MiB  # a longer batch
    assert allowance.of_step("train", 300 * MiB) == (1000 - 400 - 200) * MiB
    assert allowance.of_step("eval", 300 * MiB) == 400 * MiB
    taken["peak"] = 2000 * MiB
    assert allowance.of_step("eval", 300 * MiB) == 8 * MiB


@pytest.mark.parametrize(("kind", "dropped"), [("train", 0), ("eval", 1)])
def test_what_goes_is_needed_last(kind: str, dropped: int) -> None:
    run = Run(0, capacity=2)
    run.placement.begin_step(kind)
    copies = [run.fetch(float(i)) for i in range(2)]
    for copy in copies:
        run.placement.release(copy)
    run.fetch(2.0)
    assert [run.placement.reuse(copy, GENERATION) for copy in copies] == [i != dropped for i in range(2)]
    run.end()


def test_lent_memory_is_taken_from_released_units_and_not_from_the_reserve() -> None:
    device = SimulatedDevice(1 << 20, random.Random(0))
    placement = CopyToDevice(device, capacity_nbytes=3 * NBYTES, reserve_nbytes=2 * NBYTES, is_limit=True)
    run = Run(0, capacity=3)
    run.device, run.placement = device, placement
    copies = [run.fetch(float(i)) for i in range(3)]
    for copy in copies:
        placement.release(copy)
    assert not placement.try_lend(NBYTES + 1)
    assert placement.try_lend(NBYTES)
    assert [placement.reuse(copy, GENERATION) for copy in copies] == [False, True, True]
    assert not placement.try_lend(1)
    placement.take_back(NBYTES)
    assert placement.try_lend(1)
    run.end()
