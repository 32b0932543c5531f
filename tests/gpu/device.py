"""The device that the GPU's checks run on: a GPU, or the simulated one, on which they are tried out.

Import this before torch. On the simulated device kernels take time, and their values are right.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SIMULATED = "simulated"
IS_SIMULATED = os.environ.get("GPU_DEVICE", "") == SIMULATED

if IS_SIMULATED:
    from tests.simulated_cuda import device as simulated

import torch  # noqa: E402  # isort: skip


@contextmanager
def working() -> Iterator[None]:
    """Inside, the device is there, and takes time.

    Raises:
        SystemExit: There is no GPU.
    """
    if not IS_SIMULATED:
        if not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA device; GPU_DEVICE=simulated tries everything out without one")
        yield
        return
    rates = simulated.Rates(operations=2e11, memory=2e10, pinned=5e9, pageable=2e9)
    with simulated.takes_time(rates):
        yield
