"""Whether a run fits into the memory of its machine and control groups: if not, it is refused, not killed. Bytes."""

from __future__ import annotations

import ctypes
import mmap

from lightning_ssd.errors import MemoryPlanError
from lightning_ssd.memory.limits import available_nbytes
from lightning_ssd.memory.plan import MemoryPlan
from lightning_ssd.sizes import KiB, MiB, fmt

COMPUTE_NBYTES = 96 * MiB
"""Memory to leave for activations, libraries that the first step loads, and fragments of the heap."""

STEP_NBYTES = 32 * MiB
"""The same during the first step."""

PARAMETER_NBYTES = 8 * KiB
"""Memory of Python's and autograd's objects for one parameter, measured with 20,000 parameters."""


class Headroom:
    """Refuses a plan that does not fit beside what else this process takes.

    What compute will take is not known before the first step. So until that is over, each fetch of a unit checks that
    what the plan has yet to take is available, by reading a few small files of the system.

    Args:
        plan: The memory that will be taken; none of it is taken yet.
        num_params: Parameters of the model.

    Raises:
        MemoryPlanError: Less is available.
    """

    def __init__(self, plan: MemoryPlan, num_params: int) -> None:
        self._plan = plan
        self._arena: mmap.mmap | None = None
        self._is_in_backward = False
        need = plan.host_nbytes + COMPUTE_NBYTES + num_params * PARAMETER_NBYTES
        available = available_nbytes()
        if need > available:
            raise MemoryPlanError(
                f"the plan takes {fmt(plan.host_nbytes)} of host memory, and {fmt(need - plan.host_nbytes)} must be "
                f"left for compute and objects of {num_params} parameters; this process can take {fmt(available)} "
                f"(limits of the machine and its control group). {self._remedy(available - need)}"
            )

    def watch(self, arena: mmap.mmap) -> None:
        """The first step begins; the memory of the pools comes from ``arena``."""
        self._arena = arena

    @property
    def is_watching(self) -> bool:
        """Whether the first backward is not over yet."""
        return self._arena is not None

    def look(self) -> None:
        """Check, before a unit is fetched, whether the rest of the plan is available.

        Raises:
            MemoryPlanError: Compute has left less than the plan has yet to take.
        """
        if self._arena is not None and available_nbytes() < self._plan.host_nbytes + STEP_NBYTES:
            self._require(0)

    def begin_backward(self, repeated_nbytes: int) -> None:
        """Check the same when a backward begins.

        Args:
            repeated_nbytes: Gradients of parameters that forward used several times, which autograd adds up.

        Raises:
            MemoryPlanError: As `look`.
        """
        self._require(max(repeated_nbytes - self._plan.shared_grad_nbytes, 0))
        self._is_in_backward = True

    def end(self) -> None:
        """The first backward is over."""
        self._arena = None

    def _require(self, more_nbytes: int) -> None:
        if self._arena is None:
            return
        plan, available = self._plan, available_nbytes()
        # In backward some gradients exist already, but not how many is known; so none is counted.
        grads = 0 if self._is_in_backward else plan.grad_nbytes + plan.temporary_nbytes
        need = _untouched_nbytes(self._arena) + grads + more_nbytes + STEP_NBYTES
        if need > available:
            raise MemoryPlanError(
                f"compute has taken so much memory in the first step that {fmt(available)} are left, and "
                f"host_memory has yet to take {fmt(need)} of its {fmt(plan.host_nbytes)}"
                + (f" ({fmt(more_nbytes)} for gradients of what a forward uses several times)" if more_nbytes else "")
                + f". {self._remedy(available - need)}, or activations='recompute', or a smaller batch"
            )

    def _remedy(self, missing_nbytes: int) -> str:
        most = self._plan.host_nbytes + missing_nbytes
        if most < self._plan.smallest_nbytes:
            return f"The smallest plan takes {fmt(self._plan.smallest_nbytes)}: allow more memory, or cut smaller units"
        return f"Set host_memory to at most {most // MiB}MiB"


def _untouched_nbytes(memory: mmap.mmap) -> int:
    """Bytes of anonymous memory that have no pages yet."""
    num_pages = -(-len(memory) // mmap.PAGESIZE)
    pages = (ctypes.c_ubyte * num_pages)()
    address = ctypes.c_char.from_buffer(memory)
    if ctypes.CDLL(None).mincore(ctypes.byref(address), ctypes.c_size_t(len(memory)), pages) != 0:
        return 0
    return bytes(pages).count(0) * mmap.PAGESIZE
