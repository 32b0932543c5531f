"""What is lent of a pool."""

from __future__ import annotations

from lightning_ssd.memory.pool import Pool


def num_lent(pool: Pool) -> int:
    """Number of buffers that have an owner now."""
    return len(pool._lent)


def lingering(pool: Pool) -> list[str]:
    """Owners of buffers that were given back but are still in use."""
    pool._collect()
    return [buffer.owner for buffer in pool._lingering]
