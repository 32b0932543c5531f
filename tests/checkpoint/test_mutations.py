"""Thousands of mutated manifests, headers and small files, read in a process that may not grow: see `hostile`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY


def mutate(directory: Path, seed: int, count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.checkpoint.hostile", str(directory), str(seed), str(count)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    # A number such as -11 is a crash in native code.
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-3000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["outcomes"].values()) == count
    return found


def test_no_mutation_does_harm(tmp_store: Path) -> None:
    outcomes = mutate(tmp_store, 1, 1200)["outcomes"]
    # If one kind were always refused for its form, or never, the checks behind would not have been reached.
    for kind in ("manifest_values", "header_values", "header_bytes", "index_values"):
        assert outcomes[f"{kind}: refused"] > outcomes[f"{kind}: accepted"] > 0


@pytest.mark.soak
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_no_mutation_of_very_many_does_harm(tmp_store: Path, seed: int) -> None:
    mutate(tmp_store, seed, 8000)
