"""`kill -9` at random moments of all phases: what is resumed ends bit-identical to the run that was never killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

PHASES = ("forward", "backward", "update", "spill", "checkpoint", "remove", "export", "resume")


def storm(directory: Path, seed: int, count: int, *scenarios: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.soak.storm", str(directory), str(seed), str(count), *scenarios]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=3000)
    errors = "".join(path.read_text()[-2000:] for path in directory.glob("*/errors"))
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n{errors}"
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == count
    return report


def test_a_small_storm(tmp_store: Path) -> None:
    report = storm(tmp_store, 1, 14, "accumulate, clip", "bf16-true", "in memory, clip", "file")
    assert report["finished"] >= 3


@pytest.mark.soak
def test_a_storm_over_all_phases(tmp_store: Path) -> None:
    report = storm(tmp_store, 2, 220)
    missed = {phase: report["hit"].get(phase, 0) for phase in PHASES if report["hit"].get(phase, 0) < 1}
    assert not missed, report
