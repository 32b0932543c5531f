"""The pools of one plan, cut out of one arena, which the engine and the GPU know."""

from __future__ import annotations

import torch

from lightning_ssd.errors import Ending
from lightning_ssd.io.engine import Engine
from lightning_ssd.memory.limits import available_nbytes
from lightning_ssd.memory.pinned import Pinned
from lightning_ssd.memory.plan import MemoryPlan
from lightning_ssd.memory.pool import Pool, map_anonymous, pool_nbytes
from lightning_ssd.memory.views import address_of
from lightning_ssd.sizes import fmt

OFF_HOST = (
    "it is held in memory that is registered with the device, of which a forked process has nothing; read it before "
    "the fork, or start the process another way (multiprocessing_context='spawn')"
)


class PlanPools:
    """All memory of a plan that is taken at once.

    Args:
        plan: How much of what.
        engine: Registers the arena, where the system lets it.
        device: Where compute runs; a GPU gets the arena pinned.

    Attributes:
        arena: Anonymous memory from which the pools are cut.
        params: For parameters that stream.
        updates: For the chunks of updates.
        states: For optimizer states that the plan holds in memory, and on a GPU for parameters too.
        spill: For saved inputs on their way to the disk.
        grads: For gradients that come off a GPU; None on the CPU.
        images: For saved inputs that come off a GPU; None on the CPU, where their own memory counts, or if none may.
        in_memory_params: For parameters that the plan holds in memory; None on a GPU. No engine pins it, so that forked
            processes have it.
    """

    def __init__(self, plan: MemoryPlan, engine: Engine, device: torch.device) -> None:
        is_off_host = device.type != "cpu"
        own_nbytes = 0 if is_off_host else plan.in_memory_param_nbytes
        self.in_memory_params = Pool(own_nbytes, "in-memory parameter") if own_nbytes else None
        sizes = {
            "parameter": plan.param_nbytes,
            "update": plan.update_nbytes,
            "in-memory state": plan.in_memory_nbytes - own_nbytes,
            "saved input": plan.spill_nbytes,
        }
        if is_off_host:
            sizes["gradient"] = plan.grad_nbytes
        if is_off_host and plan.activation_nbytes:
            sizes["saved input's image"] = plan.activation_nbytes
        self.arena = map_anonymous(sum(map(pool_nbytes, sizes.values())))
        # Where it is refused (a limit on locked memory), transfers cost more CPU time and work the same.
        engine.register_memory(address_of(self.arena), len(self.arena))
        self._pinned = Pinned(address_of(self.arena), len(self.arena), device) if is_off_host else None
        begin, pools = 0, {}
        for name, size in sizes.items():
            pools[name] = Pool(size, name, arena=self.arena, begin=begin)
            begin += pool_nbytes(size)
        self.params, self.updates, self.states, self.spill = list(pools.values())[:4]
        self.grads, self.images = pools.get("gradient"), pools.get("saved input's image")
        self._all = [*pools.values(), *([self.in_memory_params] if self.in_memory_params is not None else [])]

    def pass_on(self) -> tuple[list[tuple[int, int]], str]:
        """Let a process that is forked next have parameters: those in use, and those held in memory; [Note: forks].

        Returns:
            What is passed on of the arena, ``(offset, nbytes)`` each, and why in-memory parameters are not; empty if
            they are.
        """
        passed_on = self.params.pass_on()
        if self.in_memory_params is None:
            return passed_on, OFF_HOST
        # What the next update changes exists twice then, as long as the child lives. That memory is not in the plan.
        need, available = self.in_memory_params.nbytes, available_nbytes()
        if available < need:
            return passed_on, (
                f"parameters that are held in memory take {fmt(need)} once more when they change while a forked "
                f"process has them, and {fmt(available)} were left at the fork; lower host_memory"
            )
        self.in_memory_params.pass_on()
        return passed_on, ""

    def withhold(self) -> None:
        """Undo `pass_on`."""
        for pool in (self.params, self.in_memory_params):
            if pool is not None:
                pool.withhold()

    def forbid(self, passed_on: list[tuple[int, int]], *, has_in_memory: bool) -> None:
        """In a forked process: an access to anything but what `pass_on` has passed on ends the process."""
        self.params.forbid(passed_on)
        if self.in_memory_params is not None and not has_in_memory:
            self.in_memory_params.forbid([])

    def close(self) -> None:
        """Give the memory back; the engine, which knew the arena, is closed."""
        with Ending() as ending:
            for pool in self._all:
                ending.callback(pool.close)
            if self._pinned is not None:
                ending.callback(self._pinned.close)
        del self.arena  # this object may be held longer
