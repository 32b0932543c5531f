"""The device itself: each step that an overlap of copies and compute needs is missed if it is not there."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.simulated_cuda.device import begin, core
from tests.simulated_cuda.waits import HostWaits

NUM_SEEDS = 20
NUM_UNITS = 6


@dataclass(frozen=True)
class Overlap:
    """Weights arrive on a stream of copies while compute runs on those before; one step of it can be left out."""

    compute_waits_for_copy: bool = True
    copy_waits_for_compute: bool = True
    result_is_recorded: bool = True
    host_waits_for_result: bool = True
    host_memory_is_kept: bool = True

    def is_right(self, seed: int) -> bool:
        """Whether the host gets the values that it expects."""
        torch.manual_seed(seed)
        hosts = [torch.randn(64, 64, pin_memory=True) for _ in range(NUM_UNITS)]
        expected = torch.ones(8, 64)
        for host in hosts:
            expected = torch.tanh(expected @ host)
        result = self._compute(hosts)
        is_equal = torch.allclose(result, expected, atol=1e-5)
        torch.cuda.synchronize()
        return is_equal

    def _compute(self, hosts: list[Tensor]) -> Tensor:
        compute, copies = torch.cuda.current_stream(), torch.cuda.Stream()
        x, weight, used = torch.ones(8, 64, device="cuda"), None, None
        for host in hosts:
            with torch.cuda.stream(copies):
                if used is not None and self.copy_waits_for_compute:
                    copies.wait_event(used)
                weight = None  # its memory goes back to the copies' pool, and is used again
                weight = torch.empty(64, 64, device="cuda")
                weight.copy_(host, non_blocking=True)
                arrived = copies.record_event()
            if not self.host_memory_is_kept:
                host.zero_()
            if self.compute_waits_for_copy:
                compute.wait_event(arrived)
            x = torch.tanh(x @ weight)
            used = compute.record_event()
        result, back = torch.empty(8, 64, pin_memory=True), torch.cuda.Stream()
        back.wait_stream(compute)
        with torch.cuda.stream(back):
            result.copy_(x, non_blocking=True)
            done = back.record_event()
        if self.result_is_recorded:
            x.record_stream(back)
        del x
        torch.zeros(8, 64, device="cuda")  # takes its memory if it may
        if self.host_waits_for_result:
            done.synchronize()
        return result


def outcomes(overlap: Overlap, policy: str = "mixed") -> tuple[int, set[str]]:
    """In how many orders of work the values were wrong, and which races were reported."""
    num_wrong, races = 0, set()
    for seed in range(NUM_SEEDS):
        begin(seed, policy)
        num_wrong += not overlap.is_right(seed)
        races |= set(core.races())
    return num_wrong, races


@pytest.mark.parametrize("policy", ["mixed", "late", "others_first", "in_order"])
def test_an_overlap_with_every_wait_is_right(policy: str) -> None:
    assert outcomes(Overlap(), policy) == (0, set())


@pytest.mark.usefixtures("_races_are_expected")
@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        (Overlap(compute_waits_for_copy=False), "reads what copy to the device"),
        (Overlap(copy_waits_for_compute=False), "writes what aten::mm"),
        (Overlap(result_is_recorded=False), "writes what copy to the host"),
        (Overlap(host_memory_is_kept=False), "host memory changed while it was on its way"),
    ],
    ids=["copy not waited for", "memory used again", "no record_stream", "host memory changed"],
)
def test_a_missing_step_is_reported(overlap: Overlap, expected: str) -> None:
    _, races = outcomes(overlap)
    assert any(expected in race for race in races), races


@pytest.mark.usefixtures("_races_are_expected")
@pytest.mark.parametrize(
    "overlap",
    [
        Overlap(compute_waits_for_copy=False),
        Overlap(copy_waits_for_compute=False),
        Overlap(host_waits_for_result=False),
        Overlap(host_memory_is_kept=False),
    ],
    ids=str,
)
def test_a_missing_step_gives_wrong_values(overlap: Overlap) -> None:
    num_wrong, _ = outcomes(overlap)
    assert num_wrong > 0


def test_the_host_cannot_touch_device_memory() -> None:
    tensor = torch.ones(4, device="cuda")
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.string_at(tensor.data_ptr(), 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def test_freed_memory_belongs_to_its_stream() -> None:
    side = torch.cuda.Stream()
    first = torch.empty(1000, device="cuda")
    address = first.data_ptr()
    del first
    with torch.cuda.stream(side):
        assert torch.empty(1000, device="cuda").data_ptr() != address
    assert torch.empty(1000, device="cuda").data_ptr() == address


def test_memory_that_another_stream_uses_is_not_handed_out_before_that_is_done() -> None:
    begin(0, "late", 0)
    side = torch.cuda.Stream()
    tensor = torch.empty(1000, device="cuda")
    address = tensor.data_ptr()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor.add_(1)
    tensor.record_stream(side)
    del tensor
    assert torch.empty(1000, device="cuda").data_ptr() != address
    side.synchronize()
    assert torch.empty(1000, device="cuda").data_ptr() == address


def test_kernels_run_when_somebody_waits() -> None:
    begin(0, "late", 0)
    x = torch.ones(8, device="cuda")
    done = torch.cuda.current_stream().record_event()
    y = x + 1
    assert core.num_queued_kernels(0) >= 2
    assert not done.is_done()
    done.synchronize()
    assert core.num_queued_kernels(0) == 1
    with HostWaits(package="simulated_cuda") as waits:
        assert y.sum().item() == 16
    assert {why for why, _ in waits.found} == {"item"}


def test_the_error_of_a_kernel_is_raised_at_the_next_wait() -> None:
    begin(0, "late", 0)
    torch.zeros(3, 2, device="cuda")[torch.tensor([5], device="cuda")]
    with pytest.raises(RuntimeError, match=r"a kernel failed: aten::index.*index 5 is out of bounds"):
        torch.cuda.synchronize()


def draws(generator: torch.Generator | None) -> list[Tensor]:
    drawn = [torch.rand(5, device="cuda", generator=generator), torch.randn(5, device="cuda", generator=generator)]
    return [tensor.cpu() for tensor in drawn]


def test_random_numbers_follow_the_seed_and_the_state() -> None:
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    before = draws(None)
    assert not torch.equal(before[0], draws(None)[0])
    for restore in (lambda: torch.manual_seed(3), lambda: torch.cuda.set_rng_state(state)):
        restore()
        assert all(map(torch.equal, before, draws(None)))
    own = torch.Generator("cuda").manual_seed(3)
    assert all(map(torch.equal, before, draws(own)))
    assert not any(map(torch.equal, draws(own), before))


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "promotion": lambda x: (x.long() + 1.5) * x.half(),
    "reduction": lambda x: torch.linalg.vector_norm(x, dim=1).softmax(0),
    "index": lambda x: x[x > 0].sum() + x[:, [2, 0]].sum() + x.index_select(0, torch.tensor([1], device=x.device)),
    "views": lambda x: x.t()[1:].reshape(-1).view(2, -1).flip(0).contiguous(),
    "more views": lambda x: torch.view_as_real(torch.fft.rfft(x)).sum() + x.unfold(0, 2, 1) + x.view(torch.int32).min(),
    "in place": lambda x: x.clone().mul_(2).clamp_(min=0).masked_fill_(x < 0, 7),
    "norms": lambda x: F.layer_norm(x, (3,)) + F.batch_norm(x, None, None, training=True),
    "lists": lambda x: torch.stack(torch._foreach_add([x, x * 2], 1.0)).cumsum(0),
    "out": lambda x: torch.add(x, 1, out=torch.empty(0, device=x.device)),
    "sort": lambda x: x.flatten().sort().values.unique(),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_are_those_of_the_cpu(name: str) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    on_device = CASES[name](x.to("cuda"))
    assert on_device.is_cuda
    assert torch.equal(on_device.cpu(), CASES[name](x))


def test_backward_runs_on_the_streams_of_forward() -> None:
    weight = torch.randn(16, 16, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    x = torch.ones(4, 16, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = torch.tanh(x @ weight)
    torch.cuda.current_stream().wait_stream(side)
    for tensor in (x, weight):
        tensor.record_stream(side)
    y.record_stream(torch.cuda.current_stream())
    y.square().sum().backward()
    expected = weight.detach().cpu().requires_grad_()
    torch.tanh(torch.ones(4, 16) @ expected).square().sum().backward()
    assert torch.equal(weight.grad.cpu(), expected.grad)
    assert core.races() == []
