"""The inputs of a deep model take the memory that they were given, and the disk the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_ssd.sizes import MiB
from tests.memory_bounds.inputs import INPUT_NBYTES, LAYERS


def measured(root: Path, *budgets: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.memory_bounds.inputs", str(root), *map(str, budgets)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_MMAP_THRESHOLD_": str(MiB)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_spilled(tmp_store: Path) -> None:
    # All in memory comes last: what a run leaves behind makes the next one look smaller, and so less saved.
    *bounded, unbounded = measured(tmp_store, 0, 4 * INPUT_NBYTES, -1)
    for num_inputs, found in zip((0, 4), bounded, strict=True):
        assert found["losses"] == unbounded["losses"]
        saved = unbounded["taken"] - found["taken"]
        # One is in use by the block that runs, one by its caller, in both.
        assert saved >= (LAYERS - num_inputs - 2) * INPUT_NBYTES, f"{saved / MiB:.0f} MiB saved"
