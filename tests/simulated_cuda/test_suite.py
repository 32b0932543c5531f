"""Runs tests in processes that have the simulated device: its own, and a core of those that train.

All tests that train run there by ``make soak-device``, and any test where ``TEST_DEVICE=simulated_cuda`` is set.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.simulated_cuda.build import MODULE

CORE = ("tests/parity/test_on_any_device.py", "tests/parity/test_cuda.py")
FAST = "on_any_device or streamed-plain-32 or streamed-accumulate-bf16-mixed or streamed-clip-16"


def run_on_device(seeds: str, *arguments: str) -> None:
    """Run pytest on the device with each of ``seeds``; fails with the end of its output."""
    if not MODULE.exists():
        pytest.skip("the simulated CUDA device is not built: python -m tests.simulated_cuda.build")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--show-capture=no", "--tb=short", *arguments]
    environment = os.environ | {"TEST_DEVICE": f"simulated_cuda:{seeds}"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"


def test_the_device_finds_what_is_missing() -> None:
    run_on_device("0", "tests/simulated_cuda")


@pytest.mark.parametrize("seeds", ["0-1", pytest.param("2-19", marks=pytest.mark.soak)])
def test_a_core_of_training_is_right_on_the_device(seeds: str) -> None:
    run_on_device(seeds, "-k", FAST, *CORE)
