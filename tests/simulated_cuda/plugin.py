"""Pytest plugin: tests run on the simulated device. `tests/conftest.py` loads it where ``TEST_DEVICE`` asks for it.

Every ``Trainer(accelerator="cpu")`` runs on the device. Optimizers work parameter by parameter, as on the CPU: CUDA's
default of many at a time has other bits. A race is a failure of the test in which it happened.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.simulated_cuda import requested
from tests.simulated_cuda.device import begin, core

import lightning.pytorch as pl  # isort: skip  # after the device: it imports torch
import torch.optim.optimizer as torch_optimizer  # isort: skip

MAX_SHOWN = 8
SWITCH = requested()
assert SWITCH is not None


def _run_trainers_on_the_device() -> None:
    init = pl.Trainer.__init__

    @functools.wraps(init)
    def on_device(self: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("accelerator") == "cpu":
            kwargs["accelerator"] = "gpu"
        init(self, *args, **kwargs)

    pl.Trainer.__init__ = on_device  # type: ignore[method-assign]
    torch_optimizer._get_foreach_kernels_supported_devices = lambda: []
    torch_optimizer._get_fused_kernels_supported_devices = lambda: ["cpu", "cuda"]


_run_trainers_on_the_device()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test with each seed, unless it is one's turn."""
    if len(SWITCH.seeds) > 1 and SWITCH.turn is None:
        metafunc.parametrize("device_seed", SWITCH.seeds, indirect=True, ids=lambda seed: f"seed{seed}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here."""
    for mark in item.iter_markers("not_simulated"):
        if any(part in item.name for part in mark.kwargs.get("only", [""])):
            pytest.skip(f"not on a simulated device: {mark.kwargs['reason']}")


@pytest.fixture
def device_seed(request: pytest.FixtureRequest) -> int:
    """Draws the order of work."""
    return int(getattr(request, "param", SWITCH.seed_of(request.node.nodeid)))


@pytest.fixture(autouse=True)
def _races_fail(request: pytest.FixtureRequest, device_seed: int) -> Iterator[None]:
    request.node.add_report_section("call", "device", f"TEST_DEVICE=simulated_cuda:{device_seed}:{SWITCH.policy}")
    begin(device_seed, SWITCH.policy)
    yield
    races = Counter(core.races())
    if races:
        shown = "\n".join(f"{number} x {race}" for race, number in races.most_common(MAX_SHOWN))
        pytest.fail(f"{len(races)} kinds of races on the device, such as\n{shown}")
