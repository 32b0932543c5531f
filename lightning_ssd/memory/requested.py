"""The sizes of memory that the user asks for, in bytes."""

from __future__ import annotations

import torch

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.memory.limits import AUTO_SHARE, available_nbytes
from lightning_ssd.sizes import parse_nbytes


def host_budget(host_memory: int | str) -> int | None:
    """Bytes that ``host_memory`` allows; None for ``"min"``.

    Raises:
        ConfigurationError: If it is no size, or more than this process may take.
    """
    if host_memory == "min":
        return None
    available = available_nbytes()
    if host_memory == "auto":
        return int(available * AUTO_SHARE)
    budget = nbytes_of("host_memory", host_memory, "auto", "min")
    if budget is not None and budget > available:
        raise ConfigurationError(
            f"host_memory={host_memory!r} is {budget} bytes, this process can take {available} (the limits of the "
            "machine and its control group): set a smaller one, or 'auto'"
        )
    return budget


def device_budget(device_memory: int | str, device: torch.device) -> int | None:
    """Bytes that ``device_memory`` allows; None for ``"auto"``.

    Raises:
        ConfigurationError: If it is no size, or the device has no memory of its own.
    """
    if device_memory != "auto" and device.type == "cpu":
        raise ConfigurationError(
            f"device_memory={device_memory!r} bounds the memory of a GPU, this run computes on the CPU, where "
            "host_memory bounds everything: leave device_memory at 'auto'"
        )
    return nbytes_of("device_memory", device_memory, "auto")


def nbytes_of(name: str, value: int | str, *words: str) -> int | None:
    """Bytes of the option ``name``; None for one of its ``words``.

    Raises:
        ConfigurationError: If it is no size.
    """
    if value in words:
        return None
    try:
        return parse_nbytes(value)
    except ValueError as error:
        raise ConfigurationError(f"{name}: {error}; or {' or '.join(map(repr, words))}") from None
