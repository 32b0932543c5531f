"""The state of its thread that a forward depends on: random generators, autocast, and the default dtype."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Ambient:
    """A snapshot of that state, taken when it is constructed.

    Args:
        device: Where the forward computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generators = _generator_states(device)
        self._autocast = _autocast_states(device)
        self._default_dtype = torch.get_default_dtype()  # under bf16-true, that of the parameters

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the thread has the state of the snapshot."""
        with ExitStack() as stack:
            stack.enter_context(_generators_at(self._generators, self._device))
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self._default_dtype)
            for device_type, (enabled, dtype, cache) in self._autocast.items():
                stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield


@dataclass(frozen=True)
class _Generators:
    """States of the global generators of Python, NumPy and torch."""

    python: Any
    numpy: Any
    torch_cpu: Tensor
    torch_cuda: Tensor | None


def _generator_states(device: torch.device) -> _Generators:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return _Generators(random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpu)


def _set_generator_states(states: _Generators, device: torch.device) -> None:
    random.setstate(states.python)
    np.random.set_state(states.numpy)
    torch.set_rng_state(states.torch_cpu)
    if states.torch_cuda is not None:
        torch.cuda.set_rng_state(states.torch_cuda, device)


@contextmanager
def _generators_at(states: _Generators, device: torch.device) -> Iterator[None]:
    before = _generator_states(device)
    _set_generator_states(states, device)
    try:
        yield
    finally:
        _set_generator_states(before, device)


def _autocast_states(device: torch.device) -> dict[str, tuple[bool, torch.dtype, bool]]:
    return {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
        for kind in {device.type, "cpu"}
    }
