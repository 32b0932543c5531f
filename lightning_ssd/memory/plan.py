"""How the budget of host memory is divided, decided before any is allocated. Pure arithmetic on bytes.

The budget is divided into reserves of fixed size: for parameters (the units that one chain of nested modules needs at
once, and the units that are being read), for gradients (of the unit that backward is in, and of units that wait for
their update), and for updates (depth x chunk of every kind that streams, or the whole state of a unit if the rule is
not elementwise). The rest of the budget holds units in memory, parameters before states: a byte of a parameter there
saves two bytes read and one written in each step, a byte of a state one and one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_ssd.errors import MemoryPlanError
from lightning_ssd.sizes import MiB, fmt, round_up

CHUNK_STEP_NUMEL = 1 << 19
"""Chunks are multiples of this, so that a chunk of any dtype is a multiple of the 1 MiB that a checksum covers."""

MAX_CHUNK_NUMEL = 2 * CHUNK_STEP_NUMEL
MIN_DEPTH, MAX_DEPTH = 3, 6
STAGING_NBYTES = 8 * MiB
"""Memory through which tensors are streamed into files."""

SPILL_NBYTES = 8 * MiB
"""Memory through which saved inputs go to the disk and come back."""


@dataclass(frozen=True)
class UnitSize:
    """What one unit needs, in bytes.

    Attributes:
        name: Its name.
        param_nbytes: Buffer for its parameters, a multiple of 4096.
        grad_nbytes: Gradients of its trainable parameters.
        numel: Elements whose state an update moves; 0 if frozen.
        param_width: Bytes per element of its parameters.
        state_width: Bytes per element of its states, a float32 master of 16-bit parameters among them.
        in_memory_state_nbytes: What its states take if they are held in memory; 0 if it has none.
        shared_grad_nbytes: Of the gradients, those of parameters that several modules have; see [Note: sums].
        temporary_nbytes: What an optimizer class allocates while it updates the largest of its parameters.
        is_persistent: Its parameters are always in memory. So are those that an optimizer updates whole.
    """

    name: str
    param_nbytes: int
    grad_nbytes: int
    numel: int
    param_width: int
    state_width: int
    in_memory_state_nbytes: int = 0
    shared_grad_nbytes: int = 0
    temporary_nbytes: int = 0
    is_persistent: bool = False


@dataclass(frozen=True)
class Demand:
    """What the plan depends on beside the units.

    Attributes:
        is_elementwise: Updates run in chunks.
        is_overlapped: Updates run beside compute.
        waits_for_all_grads: No update before all gradients are there: clipping by norm, accumulation, a loss scaler, a
            callback that reads gradients.
        window: Units in memory at once, the one in use included, not counting nested ones; None for as many as fit.
        recomputes: Whether blocks are recomputed in backward, so that only their inputs are saved; None: unless
            everything fits.
        sums_in_place: The gradients of several uses of a parameter are added without a third tensor; see [Note: sums].
        whole_nbytes: State of optimizers that cannot update one parameter at a time, which their classes allocate.
    """

    is_elementwise: bool = True
    is_overlapped: bool = True
    waits_for_all_grads: bool = False
    window: int | None = None
    recomputes: bool | None = False
    sums_in_place: bool = False
    whole_nbytes: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """How much memory each part of the run gets.

    Attributes:
        host_nbytes: The sum of all parts.
        param_nbytes: Pool for parameters that stream.
        update_nbytes: Pool for updates.
        temporary_nbytes: What an optimizer class allocates in an update.
        grad_nbytes: All gradients in memory.
        shared_grad_nbytes: The part of them that autograd holds of parameters that several modules have.
        staging_nbytes: Pool for streaming tensors into files.
        in_memory_nbytes: Parameters and states that are held in memory.
        in_memory_param_nbytes: The part of it for parameters.
        activation_nbytes: Inputs of blocks that are saved in memory; more of them are spilled.
        spill_nbytes: Pool for inputs on their way to the disk and back; 0 if nothing is recomputed.
        whole_nbytes: See `Demand`.
        chunk_numel: Elements of a chunk.
        depth: Chunks in memory at a time.
        keep_cache: Released parameters stay cached while there is room, and as many units are prefetched as fit.
        in_memory_grads: Gradients that wait for all others are in memory; otherwise they are mapped files.
        queue_nbytes: The part of the gradients that may wait for their update while backward goes on.
        in_memory_params: Units whose parameters are held in memory.
        in_memory_states: Units whose states are.
        fits: Everything is in memory: no step uses the disk.
        recomputes: Blocks are recomputed in backward.
        smallest_nbytes: The smallest budget that works.
    """

    host_nbytes: int
    param_nbytes: int
    update_nbytes: int
    temporary_nbytes: int
    grad_nbytes: int
    shared_grad_nbytes: int
    staging_nbytes: int
    in_memory_nbytes: int
    in_memory_param_nbytes: int
    activation_nbytes: int
    spill_nbytes: int
    chunk_numel: int
    depth: int
    keep_cache: bool
    in_memory_grads: bool
    queue_nbytes: int
    in_memory_params: frozenset[str]
    in_memory_states: frozenset[str]
    fits: bool
    recomputes: bool
    smallest_nbytes: int
    whole_nbytes: int


def make_plan(
    units: Sequence[UnitSize],
    chains: Sequence[Sequence[str]],
    *,
    budget_nbytes: int | None,
    demand: Demand,
) -> MemoryPlan:
    """Divide the budget.

    Args:
        units: All units, in forward order.
        chains: Sets of units that nested modules need at the same time.
        budget_nbytes: The budget; None for the smallest plan that streams everything.
        demand: What the plan depends on beside the units.

    Raises:
        MemoryPlanError: The budget is too small; names the smallest one that works, and what needs it.
    """
    streams = _Draft(units, chains, demand)
    # A small model takes less memory than the reserves through which it would stream.
    holds = _Draft(units, chains, replace(demand, recomputes=bool(demand.recomputes)))
    holds.hold_everything()
    smallest = min(streams.total, holds.total)
    if budget_nbytes is None:
        return streams.plan(smallest)
    drafts = [draft for draft in (holds, streams) if draft.total <= budget_nbytes]
    if not drafts:
        raise MemoryPlanError(_too_small(min(streams, holds, key=lambda d: d.total), budget_nbytes))
    for draft in drafts:
        draft.grow(budget_nbytes)
    # Overlap first: a larger budget never ends it.
    best = max(drafts, key=lambda draft: (draft.queue_nbytes > 0, draft.fits))
    if demand.recomputes is None and best.fits:  # it was chosen to recompute, but grew to hold everything
        best.spill_nbytes = best.activation_nbytes = 0
    return best.plan(smallest)


class _Draft:
    """A plan in the making: a few choices, and every reserve computed from them."""

    def __init__(self, units: Sequence[UnitSize], chains: Sequence[Sequence[str]], demand: Demand) -> None:
        self.units = units
        self.demand = demand
        self._chains = chains
        self._by_name = {unit.name: unit for unit in units}
        self._largest_grad = max((u.grad_nbytes for u in units), default=0)
        self._all_grads = sum(u.grad_nbytes for u in units)
        self.shared_grad_nbytes = sum(u.shared_grad_nbytes for u in units)
        self.temporary_nbytes = max((u.temporary_nbytes for u in units), default=0)
        self.chunk_numel = CHUNK_STEP_NUMEL
        self.depth = MIN_DEPTH
        self.spill_nbytes = 0 if demand.recomputes is False else SPILL_NBYTES
        self.activation_nbytes = 0
        self.num_queued = 0  # of the largest gradients
        self.in_memory_grads = False
        self.keep_cache = False
        self.in_memory_params = {unit.name for unit in units if unit.is_persistent}
        self.in_memory_states: set[str] = set()

    # -- reserves ------------------------------------------------------------------------------------------------

    @property
    def streamed(self) -> list[UnitSize]:
        """Units whose parameters stream."""
        return [unit for unit in self.units if unit.name not in self.in_memory_params]

    @property
    def param_nbytes(self) -> int:
        """The largest chain of units that stream, and the units that are being read beside it."""
        streamed = {unit.name: unit.param_nbytes for unit in self.streamed}
        largest_first = sorted(streamed, key=lambda name: -streamed[name])
        largest = streamed[largest_first[0]] if largest_first else 0
        chains = ([name for name in chain if name in streamed] for chain in self._chains)
        chain = max((_chain(streamed, largest_first, members) for members in chains), default=0)
        more = max((self.demand.window or 2) - 2, 0)
        # Cached and prefetched units can leave those in use in the middle of the pool. With room for one more, the free
        # memory on one side still holds the largest unit.
        return chain + largest * (max(more, 1) if self.keep_cache or more else 0)

    @property
    def update_nbytes(self) -> int:
        """Chunk buffers of all kinds that stream."""
        updated = [u for u in self.units if u.numel]
        per_unit = [(u.numel, self._streamed_width(u)) for u in updated]
        if not self.demand.is_elementwise:
            return max((round_up(n * width) + 64 * 4096 for n, width in per_unit if width), default=0)
        width = max((width for _, width in per_unit), default=0)
        return self._num_chunks * self.chunk_numel * width

    @property
    def _num_chunks(self) -> int:
        """Chunks in memory at a time: `depth`, or those of the largest unit if it has fewer."""
        largest = max((u.numel for u in self.units if u.numel and self._streamed_width(u)), default=0)
        return min(self.depth, -(-largest // self.chunk_numel))

    def _streamed_width(self, unit: UnitSize) -> int:
        """Bytes per element of the kinds of ``unit`` that an update streams."""
        param = 0 if unit.name in self.in_memory_params else unit.param_width
        return param + (0 if unit.name in self.in_memory_states else unit.state_width)

    @property
    def queue_nbytes(self) -> int:
        """Gradients that wait for their update while backward goes on."""
        return min(self.num_queued * self._largest_grad, self._all_grads)

    @property
    def grad_nbytes(self) -> int:
        """All gradients in memory.

        [Note: sums] Of a parameter that several modules have (a tied embedding), autograd holds the gradient of the
        first use through backward until that of the last use is there; then both, and their sum, are in memory at once.
        Where the first one is a view, as a Linear's is unless autocast has made a copy, the sum is a third tensor.
        """
        summed = max((u.shared_grad_nbytes for u in self.units), default=0) * (1 if self.demand.sums_in_place else 2)
        if self.in_memory_grads:
            return self._all_grads + summed
        now = max(self._largest_grad, summed) + self.queue_nbytes
        return min(now + self.shared_grad_nbytes, self._all_grads + summed)

    @property
    def in_memory_nbytes(self) -> int:
        """Parameters and states that are held in memory."""
        states = sum(self._by_name[name].in_memory_state_nbytes for name in self.in_memory_states)
        return self.in_memory_param_nbytes + states

    @property
    def in_memory_param_nbytes(self) -> int:
        """Parameters that are held in memory."""
        return sum(self._by_name[name].param_nbytes for name in self.in_memory_params)

    @property
    def total(self) -> int:
        """The sum of all parts."""
        pools = self.param_nbytes + self.update_nbytes + STAGING_NBYTES + self.spill_nbytes
        pools += self.temporary_nbytes + self.demand.whole_nbytes
        return pools + self.grad_nbytes + self.in_memory_nbytes + self.activation_nbytes

    @property
    def fits(self) -> bool:
        """Whether everything is held in memory."""
        return not self.streamed and all(
            u.name in self.in_memory_states for u in self.units if u.in_memory_state_nbytes
        )

    def hold_everything(self) -> None:
        """Let nothing stream."""
        self.in_memory_params = {unit.name for unit in self.units}
        self.in_memory_states = {unit.name for unit in self.units if unit.in_memory_state_nbytes}

    # -- growing -------------------------------------------------------------------------------------------------

    def grow(self, budget: int) -> None:
        """Spend the rest of the budget on what helps most first."""
        demand = self.demand
        if self.spill_nbytes:  # the size of inputs is not known before the first step
            self.activation_nbytes = (budget - self.total) // 8
        trained = self._largest_grad > 0
        if trained and demand.is_overlapped:
            self._try(budget, num_queued=1)
        if demand.window is None and self.streamed:
            self._try(budget, keep_cache=True)
        if trained and demand.is_elementwise:
            share = self.total + (budget - self.total) // 8
            while self.depth < MAX_DEPTH and self._try(share, depth=self.depth + 1):
                pass
            while self.chunk_numel < MAX_CHUNK_NUMEL and self._try(share, chunk_numel=2 * self.chunk_numel):
                pass
        if self.num_queued and not demand.waits_for_all_grads:
            # What is still queued after backward is updated under the next forward.
            share = self.total + (budget - self.total) // 8
            self._queue(share)
        if trained and demand.waits_for_all_grads and self._all_grads - self.grad_nbytes <= (budget - self.total) // 2:
            self._try(budget, in_memory_grads=True)
        # The largest first: the reserve for units in use shrinks with the largest unit that streams.
        self._hold(budget, sorted(self.units, key=lambda u: -u.param_nbytes), self.in_memory_params)
        # The first in forward order: their gradients come last, when no backward is left to overlap their update with.
        self._hold(budget, [unit for unit in self.units if unit.in_memory_state_nbytes], self.in_memory_states)
        # What was rejected above is not tried again, even if room is left: more memory must never end the overlap.
        if self.num_queued:
            self._queue(budget)

    def _queue(self, budget: int) -> None:
        """Let as many gradients wait as there is room for."""
        # First as many as fit if each is the largest; then one by one.
        most = min(budget - self.total, self._all_grads - self.queue_nbytes) // self._largest_grad
        self.num_queued += max(most, 0)
        while self.queue_nbytes < self._all_grads and self._try(budget, num_queued=self.num_queued + 1):
            pass

    def _hold(self, budget: int, units: Sequence[UnitSize], held: set[str]) -> None:
        before = set(held)
        held.update(unit.name for unit in units)
        if self.total <= budget:
            return
        held.intersection_update(before)
        for unit in units:
            if unit.name not in held:
                held.add(unit.name)
                if self.total > budget:
                    held.discard(unit.name)

    def _try(self, budget: int, **choices: int | bool) -> bool:
        before = {name: getattr(self, name) for name in choices}
        vars(self).update(choices)
        if self.total <= budget:
            return True
        vars(self).update(before)
        return False

    def plan(self, smallest_nbytes: int) -> MemoryPlan:
        """The plan with the choices made so far."""
        return MemoryPlan(
            host_nbytes=self.total,
            param_nbytes=self.param_nbytes,
            update_nbytes=self.update_nbytes,
            temporary_nbytes=self.temporary_nbytes,
            grad_nbytes=self.grad_nbytes,
            shared_grad_nbytes=self.shared_grad_nbytes,
            staging_nbytes=STAGING_NBYTES,
            in_memory_nbytes=self.in_memory_nbytes,
            in_memory_param_nbytes=self.in_memory_param_nbytes,
            activation_nbytes=self.activation_nbytes,
            spill_nbytes=self.spill_nbytes,
            chunk_numel=self.chunk_numel,
            depth=max(self._num_chunks, 1),
            keep_cache=self.keep_cache,
            in_memory_grads=self.in_memory_grads,
            queue_nbytes=self.queue_nbytes,
            in_memory_params=frozenset(self.in_memory_params),
            in_memory_states=frozenset(self.in_memory_states),
            fits=self.fits,
            recomputes=self.spill_nbytes > 0,
            smallest_nbytes=smallest_nbytes,
            whole_nbytes=self.demand.whole_nbytes,
        )


def _chain(sizes: Mapping[str, int], largest_first: Sequence[str], chain: Sequence[str]) -> int:
    """Room for one chain and the largest unit that may be read beside it."""
    members = [sizes[name] for name in chain]
    others = next((sizes[name] for name in largest_first if name not in chain), 0)
    # A nested fetch finds the free memory fragmented by the buffers in use. With as much again as the largest member
    # for each unit after the first, one fragment is long enough wherever the buffers lie.
    nested = max(others, max(members, default=0)) * (len(members) - 1)
    return sum(members) + max(others, nested)


def _too_small(draft: _Draft, budget: int) -> str:
    largest = max(draft.units, key=lambda u: u.param_nbytes)
    held = draft.demand.whole_nbytes
    whole = f", state of an optimizer that cannot run on one parameter at a time {fmt(held)}" if held else ""
    update, staging = draft.update_nbytes + draft.temporary_nbytes, STAGING_NBYTES + draft.spill_nbytes
    return (
        f"host_memory={fmt(budget)} cannot work: parameters in use and one unit being read need "
        f"{fmt(draft.param_nbytes)}, what is always in memory {fmt(draft.in_memory_nbytes)}{whole}, gradients of one "
        f"unit and of tied parameters {fmt(draft.grad_nbytes)}, the update {fmt(update)}, staging {fmt(staging)}: "
        f"together {fmt(draft.total)} ({draft.total} bytes). The largest unit is {largest.name!r} with "
        f"{fmt(largest.param_nbytes)}. Set host_memory to at least {-(-draft.total // MiB)}MiB, or cut smaller "
        "units with units=..."
    )
