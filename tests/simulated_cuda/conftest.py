"""Tests here run where the simulated device does; elsewhere `test_suite` runs them in a process that has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fixtures import _poisoned_pools, _sessions_end  # noqa: F401
from tests.simulated_cuda import requested

RUNS_ELSEWHERE = "test_suite.py"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """The suite starts the others, and the others need the device."""
    if collection_path.name.startswith("test_") and (collection_path.name == RUNS_ELSEWHERE) == bool(requested()):
        return True
    return None


@pytest.fixture
def _races_are_expected() -> Iterator[None]:
    """What the device reports is the test's to look at: it fails nothing afterwards."""
    from tests.simulated_cuda.device import core

    yield
    core.clear_report()
