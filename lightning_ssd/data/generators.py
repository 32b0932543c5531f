"""States of all random generators, as tensors and numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

States = dict[str, Any]
"""What `generator_states` returns."""


def generator_states() -> States:
    """States of the Python, NumPy, torch CPU and torch CUDA generators, as tensors and numbers only."""
    version, inner, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: States = {
        "python": [version, torch.tensor(inner, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_generator_states(states: States) -> None:
    """Undo `generator_states`; CUDA states are set on as many devices as there are."""
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(inner.tolist()), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    for device, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state.cpu(), device)
