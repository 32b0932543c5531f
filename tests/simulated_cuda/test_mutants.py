"""A test of the tester: the product with one step of its device path left out is caught; as it is, it is not blamed."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ssd.device.param_copies import CopyToDevice
from lightning_ssd.device.streams import CudaEvent, CudaStreams
from lightning_ssd.io import python_engine
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.sizes import KiB
from lightning_ssd.step.grad_offload import OffloadedGrad
from tests.helpers.models import GPT
from tests.helpers.training import Result, streamed, train
from tests.simulated_cuda.device import Stream, begin, core

NUM_SEEDS = 6
# Two blocks fit on the device, and no inputs beside them: memory is used again.
DEFAULTS = {"activations": "recompute", "device_memory": 420 * KiB}
IN_MEMORY = {"host_memory": "1GiB"}  # nobody waits for the disk
Mutate = Callable[[pytest.MonkeyPatch], None]


def without(owner: Any, method: str, caller: str) -> Mutate:
    """``owner.method`` does nothing where the function ``caller`` of the product calls it."""

    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def skipping(*args: Any, **kwargs: Any) -> Any:
            return None if sys._getframe(1).f_code.co_name == caller else original(*args, **kwargs)

        monkeypatch.setattr(owner, method, skipping)

    return mutate


def copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host buffer is lent again before the copy from it is over."""

    def poll(self: CopyToDevice) -> None:
        self._sending.clear()

    monkeypatch.setattr(CopyToDevice, "poll", poll)


def landed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient is read on the host before it has landed there."""
    monkeypatch.setattr(OffloadedGrad, "wait", lambda self: None)


def sent_while_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the disk, which takes its time, before host memory is sent."""
    move_once = python_engine._Piece._move_once

    def slow(self: python_engine._Piece, *args: Any) -> int:
        time.sleep(0 if self.is_write else 0.002)
        return move_once(self, *args)

    monkeypatch.setattr(python_engine._Piece, "_move_once", slow)
    without(python_engine.PythonTransfer, "wait", "end_read")(monkeypatch)


MUTANTS: dict[str, tuple[Mutate, dict[str, Any]]] = {
    "compute does not wait for a unit's copy": (without(CudaStreams, "use", "send"), {}),
    # With recompute the host waits at every block, and that orders what this wait does.
    "a copy does not wait for compute on the memory it overwrites": (
        without(Stream, "wait_event", "wait"),
        {"activations": "keep"},
    ),
    "a gradient's copy does not wait for backward": (without(Stream, "wait_event", "to_host"), {}),
    "a gradient's memory is freed while it is copied": (without(CudaStreams, "use", "offload"), IN_MEMORY),
    "an input's memory is freed while it is copied": (without(CudaStreams, "use", "leave"), IN_MEMORY),
    "an input is written to the disk while it is copied": (without(CudaEvent, "wait", "begin"), {}),
    "a reload's copy does not wait for compute": (without(Stream, "wait_event", "to_device"), {}),
    "compute does not wait for a reload": (without(CudaStreams, "use", "_on_device"), {}),
    "a buffer is lent too early": (copied_at_once, {}),
    "a gradient is read too early": (landed_at_once, {}),
    "host memory is sent while the disk writes to it": (
        sent_while_read,
        {"io": IOOptions(engine="python"), "verify_reads": False},
    ),
}


@functools.cache
def expected(directory: Path) -> Result:
    """What plain Lightning computes."""
    return run(directory, "auto")


def run(directory: Path, strategy: Any) -> Result:
    make_net = functools.partial(GPT, width=64, layers=4, dropout=0.1)
    return train(directory, make_net, strategy, max_steps=4, batch_size=16)


def is_caught(directory: Path, seed: int, options: dict[str, Any]) -> bool:
    """Whether a run ends with an error, a race or other values than plain Lightning's."""
    plain = expected(directory)
    begin(seed)
    try:
        ours = run(directory, streamed(**(DEFAULTS | options)))
    except Exception:
        return True
    is_same = all(torch.equal(plain.weights[name], value) for name, value in ours.weights.items())
    return bool(core.races()) or plain.losses != ours.losses or not is_same


@pytest.mark.usefixtures("_races_are_expected")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mutate, options = MUTANTS[name]
    directory = tmp_path_factory.getbasetemp() / "mutants"
    expected(directory)
    mutate(monkeypatch)
    assert any(is_caught(directory, seed, options) for seed in range(NUM_SEEDS))


@pytest.mark.parametrize("options", [{}, {"host_memory": "1GiB"}, {"activations": "keep"}], ids=str)
def test_the_product_as_it_is_is_not_blamed(tmp_path_factory: Any, options: dict[str, Any]) -> None:
    directory = tmp_path_factory.getbasetemp() / "mutants"
    assert not any(is_caught(directory, seed, options) for seed in range(NUM_SEEDS))
