"""The state of its thread that a forward depends on: random generators, autocast, and the default dtype."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch


class Ambient:
    """A snapshot of that state, taken when it is constructed.

    Args:
        device: Where the forward computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generators = _generators(device)
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


def _generators(device: torch.device) -> list[tuple[Callable[[Any], object], Any]]:
    """Of each global generator of Python, NumPy and torch: what sets its state, and the state that it has now."""
    found: list[tuple[Callable[[Any], object], Any]] = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    if device.type == "cuda":
        found.append((partial(torch.cuda.set_rng_state, device=device), torch.cuda.get_rng_state(device)))
    return found


@contextmanager
def _generators_at(states: list[tuple[Callable[[Any], object], Any]], device: torch.device) -> Iterator[None]:
    before = _generators(device)
    for put, state in states:
        put(state)
    try:
        yield
    finally:
        for put, state in before:
            put(state)


def _autocast_states(device: torch.device) -> dict[str, tuple[bool, torch.dtype, bool]]:
    return {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
        for kind in {device.type, "cpu"}
    }
