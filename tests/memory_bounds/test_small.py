"""Training a model of 60 million parameters takes the memory of the plan, whatever the model takes on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_ssd.sizes import MiB
from tests.memory_bounds.peak import BATCH, LAYERS, SEQ, VOCAB, WIDTH

SLACK_NBYTES = 64 * MiB


def activations_nbytes(itemsize: int) -> int:
    """What compute itself needs at most, beside parameters and their gradients.

    One input of each block is kept for recompute. Inside the one block that is recomputed, autograd keeps about 30
    values for each element of the input (norms, q, k, v, attention, the four times wider middle before and after its
    activation), and backward has about as many gradients at a time. The logits exist as logits, as float32, as their
    softmax and as gradients of each.
    """
    elements = BATCH * SEQ * WIDTH
    return LAYERS * elements * itemsize + 2 * 30 * elements * itemsize + 6 * BATCH * SEQ * VOCAB * 4


@pytest.mark.parametrize(("precision", "itemsize"), [("32-true", 4), ("bf16-true", 2)])
def test_peak_memory_is_that_of_the_smallest_plan(tmp_store: Path, precision: str, itemsize: int) -> None:
    command = [sys.executable, "-m", "tests.memory_bounds.peak", precision, str(tmp_store)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    taken = found["peak"] - found["baseline"]
    allowed = found["plan"] + SLACK_NBYTES + activations_nbytes(itemsize)
    plain = found["numel"] * 16  # parameters, gradients and two moments in float32
    assert found["numel"] > 55_000_000
    assert allowed < plain / 3  # otherwise this would show nothing
    assert taken <= allowed, f"{taken / MiB:.0f} MiB taken, {allowed / MiB:.0f} allowed, plan {found['plan'] / MiB:.0f}"
