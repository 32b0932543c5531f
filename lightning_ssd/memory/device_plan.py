"""How much of a GPU's memory parameters may take, decided before any is allocated. Pure arithmetic on bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lightning_ssd.errors import MemoryPlanError
from lightning_ssd.sizes import MiB, fmt, round_up

ALLOCATION_NBYTES = 512
"""torch's CUDA allocator rounds sizes up to multiples of this."""

RESERVE_PART = 8
"""An eighth of the device is left free at least."""


def tensors_nbytes(sizes: Iterable[int]) -> int:
    """Device memory that tensors of these sizes take."""
    return sum(round_up(nbytes, ALLOCATION_NBYTES) for nbytes in sizes)


def device_capacity(units: Mapping[str, int], chains: Sequence[Sequence[str]], budget_nbytes: int | None) -> int:
    """Device memory for all units that are in use, cached after a release, or being copied there.

    Args:
        units: Device memory of each unit.
        chains: Sets of units that nested modules need at the same time.
        budget_nbytes: ``device_memory``; None for just enough to copy one unit while others compute.

    Raises:
        MemoryPlanError: The budget is smaller than the largest chain.
    """
    need, chain = max((sum(units[name] for name in chain), list(chain)) for chain in chains)
    if budget_nbytes is None:
        return need + max(units.values(), default=0)
    if budget_nbytes < need:
        parts = ", ".join(f"{name!r} {fmt(units[name])}" for name in chain)
        raise MemoryPlanError(
            f"device_memory={fmt(budget_nbytes)} cannot work: parameters that are needed at the same time take "
            f"{fmt(need)} ({parts}). Set device_memory to at least {-(-need // MiB)}MiB, or cut smaller units with "
            "units=... (activations and gradients on the device come on top of it)"
        )
    return budget_nbytes


def device_allowance(total_nbytes: int, ours_nbytes: int, others_nbytes: int) -> int:
    """What units and saved inputs may take of a device of which the rest of a step has been seen.

    The reserve is once and a half of what that rest took at most, or, if it is more, that and an eighth of the device:
    for longer batches, workspaces, and the pieces of free memory that torch's allocator cannot use.

    Args:
        total_nbytes: Memory of the device.
        ours_nbytes: What this process has of it, or could have.
        others_nbytes: The most that tensors other than units and inputs have taken.
    """
    return ours_nbytes - others_nbytes - max(others_nbytes // 2, total_nbytes // RESERVE_PART)
