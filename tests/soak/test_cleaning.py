"""Cleaning up in a loop ends nobody who lives, loses nothing of theirs, and leaves nothing of the dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY


def cleaning(directory: Path, rounds: int, *works: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.soak.cleaning", str(directory), str(rounds), *works]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-6000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert all(report["done"].get(work, 0) > 0 for work in works), report
    return report


def test_a_little_cleaning_beside_the_living(tmp_store: Path) -> None:
    cleaning(tmp_store, 60, "run", "save", "remove", "copy", "probe_save")


@pytest.mark.soak
def test_a_thousand_rounds_beside_the_living_and_the_dying(tmp_store: Path) -> None:
    works = ("run", "save", "remove", "copy", "export", "probe_save", "train")
    report = cleaning(tmp_store, 1000, *works)
    assert {"dead run", "unfinished save"} <= set(report["removed"])
