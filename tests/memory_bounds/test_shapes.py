"""Memory of runs that are gated, tied, or run a class of their own; and runs in a control group that is too small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from lightning_ssd.memory.heap import anonymous_nbytes
from lightning_ssd.sizes import MiB
from tests.faults.support import streamed
from tests.helpers.control_group import can_make_one, control_group
from tests.helpers.training import make_trainer
from tests.memory_bounds.shapes import SHAPES, Mlp, Trained, rows, shape

SLACK_NBYTES = 64 * MiB  # and what compute takes: logits, inputs of one block


def command(name: str, host_memory: str, root: Path) -> list[str]:
    return [sys.executable, "-m", "tests.memory_bounds.shape", name, host_memory, str(root), "2"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("name", ["deep, clipped", "tied"])
def test_peak_memory_is_that_of_the_plan(tmp_store: Path, name: str) -> None:
    argv = command(name, "min", tmp_store)
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["outcome"] == "lives"
    assert 4 * found["numel"] > SLACK_NBYTES  # gradients alone would be more
    assert found["peak_nbytes"] <= found["plan_nbytes"] + SLACK_NBYTES


@pytest.mark.skipif(not can_make_one(), reason="no control group of our own")
def test_a_run_that_its_control_group_cannot_hold_is_refused(tmp_store: Path) -> None:
    with control_group(480 * MiB) as group:
        done = group.run(command("tied", "min", tmp_store), environment())
        assert group.num_killed == 0
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["outcome"] == "refused"
    assert "this process can take" in found["error"]
    assert "allow more memory" in found["error"]


def test_memory_goes_back_when_a_run_ends_and_the_next_does_not_take_it_twice(tmp_path: Path) -> None:
    deep = shape(lambda: Mlp(864, 12), rows(864))
    module, kept = Trained(deep), []

    class SavingCallback(pl.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            kept.append(next(module.parameters()).detach())  # of a unit that is kept in memory

    before = anonymous_nbytes()
    for num in (1, 2):
        strategy = streamed(host_memory="96MiB")
        trainer = make_trainer(tmp_path, strategy, max_epochs=1, max_steps=-1, callbacks=[SavingCallback()])
        trainer.fit(module, DataLoader([deep.batch() for _ in range(2)], batch_size=None))
        assert strategy.session.plan.in_memory_nbytes > 48 * MiB
        module.zero_grad()
        # A little stays: objects, the buffer through which a checkpoint may still be saved, what the callback keeps.
        assert anonymous_nbytes() - before < num * 24 * MiB
    assert all(bool(values.isfinite().all()) for values in kept)


@pytest.mark.soak
@pytest.mark.skipif(not can_make_one(), reason="no control group of our own")
@pytest.mark.parametrize("host_memory", ["auto", "min", "192MiB"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_lives_in_a_control_group_or_is_refused(tmp_store: Path, name: str, host_memory: str) -> None:
    with control_group(768 * MiB) as group:
        done = group.run(command(name, host_memory, tmp_store), environment())
        assert group.num_killed == 0
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["outcome"] in ("lives", "refused")
