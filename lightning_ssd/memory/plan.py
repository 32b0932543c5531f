"""Bytes of host memory, decided before the first is taken. Pure arithmetic.

The budget is cut into reserves that are never traded: parameters (what one chain of nested modules needs at once, and
one unit arriving), gradients (the largest unit's, while they are on their way to the update) and the update (depth x
chunk of every kind, or the whole state of a unit where the rule is not elementwise). What the budget leaves over
enlarges the chunks, then keeps parameters and waiting gradients in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_ssd.errors import MemoryPlanError
from lightning_ssd.sizes import MiB, fmt, round_up

CHUNK_STEP_NUMEL = 1 << 19
"""Chunks are multiples of this: then a chunk of any kind is a multiple of 1 MiB, the extent of a checksum."""

MAX_CHUNK_NUMEL = 8 * CHUNK_STEP_NUMEL
DEPTH = 3
STAGING_NBYTES = 8 * MiB
"""Memory used to stream tensors into files."""


@dataclass(frozen=True)
class UnitSize:
    """What one unit needs, in bytes.

    Attributes:
        name: Its name.
        param_nbytes: Buffer for its parameters.
        grad_nbytes: Gradients of its trainable parameters.
        numel: Elements whose state an update moves; 0 if frozen.
        state_nbytes: Bytes per element in an update, over all kinds.
    """

    name: str
    param_nbytes: int
    grad_nbytes: int
    numel: int
    state_nbytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What is allocated. Bytes.

    Attributes:
        param_nbytes: Pool for parameters.
        update_nbytes: Pool for updates.
        grad_nbytes: Gradients that compute allocates while a unit waits for its update, and kept ones.
        staging_nbytes: Pool for streaming tensors into files.
        chunk_numel: Elements of a chunk.
        depth: Chunks in memory at a time.
        keep_cache: Released parameters stay while there is room.
        keep_grads: Gradients that wait stay in memory; else they are mapped files.
        smallest_nbytes: The smallest budget that works.
    """

    param_nbytes: int
    update_nbytes: int
    grad_nbytes: int
    staging_nbytes: int
    chunk_numel: int
    depth: int
    keep_cache: bool
    keep_grads: bool
    smallest_nbytes: int

    @property
    def host_nbytes(self) -> int:
        """All of it."""
        return self.param_nbytes + self.update_nbytes + self.grad_nbytes + self.staging_nbytes


def make_plan(
    units: Sequence[UnitSize],
    chains: Sequence[Sequence[str]],
    *,
    budget_nbytes: int | None,
    is_elementwise: bool,
    budget_name: str = "host_memory",
) -> MemoryPlan:
    """Cut the budget.

    Args:
        units: All units.
        chains: Sets of units that modules nested in each other need at the same time.
        budget_nbytes: What may be used; None for the smallest plan that works, which keeps nothing in memory.
        is_elementwise: Updates run in chunks.
        budget_name: What messages call the budget.

    Raises:
        MemoryPlanError: If the budget is too small; names the smallest that works and what needs it.
    """
    by_name = {unit.name: unit for unit in units}
    param = _parameters(by_name, chains)
    grad = max((u.grad_nbytes for u in units), default=0)
    update = _update(units, CHUNK_STEP_NUMEL, is_elementwise)
    smallest = param + grad + update + STAGING_NBYTES
    if budget_nbytes is None:
        return MemoryPlan(
            param, update, grad, STAGING_NBYTES, CHUNK_STEP_NUMEL, DEPTH, False, False, smallest_nbytes=smallest
        )
    if budget_nbytes < smallest:
        raise MemoryPlanError(_too_small(units, param, grad, update, smallest, budget_nbytes, budget_name))
    spare = budget_nbytes - smallest
    chunk = CHUNK_STEP_NUMEL
    while chunk < MAX_CHUNK_NUMEL and _update(units, 2 * chunk, is_elementwise) - update <= spare // 4:
        chunk *= 2
    spare -= _update(units, chunk, is_elementwise) - update
    update = _update(units, chunk, is_elementwise)
    all_grads = sum(u.grad_nbytes for u in units)
    keep_grads = all_grads - grad <= spare // 2
    if keep_grads:
        spare -= all_grads - grad
        grad = all_grads
    all_params = sum(round_up(u.param_nbytes) for u in units)
    largest = max((u.param_nbytes for u in units), default=0)
    extra = min(spare, max(0, all_params + largest - param))
    # Kept units push the ones in use into the middle; then one side must still hold the largest that may arrive.
    keep_cache = 0 < largest <= extra
    return MemoryPlan(
        param + extra, update, grad, STAGING_NBYTES, chunk, DEPTH, keep_cache, keep_grads, smallest_nbytes=smallest
    )


def _parameters(by_name: dict[str, UnitSize], chains: Sequence[Sequence[str]]) -> int:
    return max((_chain(by_name, chain) for chain in chains), default=0)


def _chain(by_name: dict[str, UnitSize], chain: Sequence[str]) -> int:
    """Room for one chain and the largest unit that may arrive beside it."""
    members = [by_name[name].param_nbytes for name in chain]
    others = max((u.param_nbytes for name, u in by_name.items() if name not in chain), default=0)
    # A nested fetch finds the free memory in pieces between the buffers in use; as much again as the largest member,
    # for each unit beyond the first, makes sure that one piece is long enough wherever they lie.
    nested = max(others, max(members, default=0)) * (len(members) - 1)
    return sum(members) + max(others, nested)


def _update(units: Sequence[UnitSize], chunk_numel: int, is_elementwise: bool) -> int:
    if not is_elementwise:
        return max((round_up(u.numel * u.state_nbytes) + 64 * 4096 for u in units if u.numel), default=0)
    largest = max((u.numel for u in units), default=0)
    width = max((u.state_nbytes for u in units if u.numel), default=0)
    depth = min(DEPTH, -(-largest // chunk_numel))
    return depth * chunk_numel * width


def _too_small(
    units: Sequence[UnitSize], param: int, grad: int, update: int, smallest: int, budget: int, name: str
) -> str:
    largest = max(units, key=lambda u: u.param_nbytes)
    return (
        f"{name}={fmt(budget)} cannot work: parameters in use and one unit arriving need {fmt(param)}, gradients of "
        f"one unit {fmt(grad)}, the update {fmt(update)}, staging {fmt(STAGING_NBYTES)}: together {fmt(smallest)} "
        f"({smallest} bytes). The "
        f"largest unit is {largest.name!r} with {fmt(largest.param_nbytes)}. Set {name} to at least "
        f"{-(-smallest // MiB)}MiB, or cut smaller units with units=..."
    )
