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


def measured(budget: int, root: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.memory_bounds.inputs", str(budget), str(root)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_spilled(tmp_store: Path) -> None:
    unbounded = measured(-1, tmp_store)
    for num_inputs in (0, 4):
        bounded = measured(num_inputs * INPUT_NBYTES, tmp_store)
        assert bounded["losses"] == unbounded["losses"]
        saved = unbounded["taken"] - bounded["taken"]
        # One is in use by the block that runs, one by its caller, in both.
        assert saved >= (LAYERS - num_inputs - 2) * INPUT_NBYTES, f"{saved / MiB:.0f} MiB saved"
