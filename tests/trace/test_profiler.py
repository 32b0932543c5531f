"""What a profile of torch and the log show of a step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lightning_ssd.trace.recorder import LABEL, Lane, Trace
from tests.faults.support import streamed
from tests.helpers.activations import spill_inputs
from tests.helpers.models import GPT
from tests.helpers.training import train


@pytest.fixture(autouse=True, scope="module")
def _profiler_has_run() -> None:
    """The first profile starts a thread of torch's that stays until the process ends."""
    with profile(activities=[ProfilerActivity.CPU]):
        pass


class Profiled(pl.Callback):
    """Profiles the third step."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.profile.start()

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.profile.stop()

    @property
    def labels(self) -> set[str]:
        return {event.key.removeprefix(LABEL) for event in self.profile.key_averages() if event.key.startswith(LABEL)}


def test_a_profile_of_a_step_has_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profiled = Profiled()
    spill_inputs(monkeypatch, budget=0)
    train(tmp_path, GPT, streamed(overlap="off"), max_steps=3, callbacks=[profiled])
    for name in ("fetch", "wait for parameters", "recompute", "update", "spill", "wait for saved inputs"):
        for block in range(2):
            assert f"{name} net.blocks.{block}" in profiled.labels, name


def test_spans_are_labelled_only_while_a_profiler_runs() -> None:
    trace = Trace()
    assert trace.label("fetch", "a") is trace.label("fetch", "b")  # nothing is made
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        with trace.span(Lane.UPDATE, "update", "a"):
            torch.ones(1)
        span = trace.span(Lane.COMPUTE, "train step", "")
        span.end()
        span.end()
    keys = {event.key: event.count for event in profiled.key_averages()}
    assert keys[f"{LABEL}update a"] == keys[f"{LABEL}train step"] == 1
    assert trace.collect().spans == ()


def test_a_mode_that_sees_operators_sees_no_label() -> None:
    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        seen: list[str]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with profile(activities=[ProfilerActivity.CPU]), Counting() as mode:
        mode.seen = []
        with Trace().label("fetch", "a"):
            pass
    assert mode.seen == []


def test_the_log_tells_the_moves_of_a_unit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "lightning_ssd.units"):
        train(tmp_path, GPT, streamed(overlap="off"), max_steps=2)
    moves = [record.message for record in caplog.records if record.name == "lightning_ssd.units"]
    of_block = [move.removesuffix(" net.blocks.1") for move in moves if move.endswith(" net.blocks.1")]
    assert (
        of_block[-8:] == ["prefetch", "fetch", "release", "prefetch", "recompute", "fetch", "update", "updated"]
        or of_block
    )
    assert {"prefetch", "fetch", "release", "recompute", "update", "updated"} <= set(of_block)
    caplog.clear()
    train(tmp_path, GPT, streamed(overlap="off"), max_steps=1)
    assert not [record for record in caplog.records if record.name == "lightning_ssd.units"]
