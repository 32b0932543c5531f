"""Gradients of one unit that wait on disk.

[Note: spilled] What waits in a mapped file passes the disk without the engine. So the system is asked whether it could
write it back, before autograd adds to it and before it is read: it tells nobody else, and may read older bytes again
afterwards. From the step to the update checksums are compared; before, a gradient is the user's, who may change it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_ssd.errors import CorruptionError, as_io_failure
from lightning_ssd.io.scratch import Scratch
from lightning_ssd.kernels.api import crc32c_each
from lightning_ssd.memory.forked import make_private
from lightning_ssd.memory.mapped_file import map_file, wait_for_write_back
from lightning_ssd.memory.views import Views, address_of
from lightning_ssd.store.layout import CHECK_NBYTES, MEMORY_ALIGNMENT
from lightning_ssd.units.inherited import refused_gradient
from lightning_ssd.units.unit import Unit


class SpilledGrads:
    """A mapped, unlinked file as large as the gradients of one unit."""

    def __init__(self, scratch: Scratch, number: int, unit: Unit, dtype: torch.dtype, *, verify: bool) -> None:
        self.dtype = dtype
        self._verify = verify
        self._unit = unit
        self._checks: dict[int, list[int]] = {}  # of gradients at the step, by parameter index
        sizes = (-(-shape.numel * dtype.itemsize // MEMORY_ALIGNMENT) * MEMORY_ALIGNMENT for shape in unit.shapes)
        self._offsets = list(itertools.accumulate(sizes, initial=0))
        self._file = file = scratch.make(f"{number:08d}-grad.safetensors", max(self._offsets[-1], 1))
        try:
            about = functools.partial(_gradient_at, unit.names, self._offsets)
            self._memory = map_file(file.tail_fd, file.nbytes, file.path, about)
        except BaseException:
            file.close()
            raise
        self._base = address_of(self._memory)
        self._views = [Views(self._memory) for _ in unit.shapes]
        self._ready: dict[int, Tensor] = {}  # nobody has seen them
        unit.spilled_grads = self

    def prepare(self, indices: Iterable[int]) -> None:
        """Make the tensors of parameters whose gradients may arrive."""
        for index in indices:
            if not self._views[index].in_use:
                self._ready[index] = self._tensor(index)

    def holds(self, index: int, grad: Tensor) -> bool:
        """Whether ``grad`` lives here: autograd has added to it in place."""
        return grad.data_ptr() == self._base + self._offsets[index]

    def is_looked_at(self, index: int) -> bool:
        """Whether the user kept an earlier gradient of this parameter; it must keep its values."""
        return index not in self._ready and self._views[index].in_use

    def copy(self, index: int, grad: Tensor) -> Tensor:
        """A copy of ``grad`` that lives here."""
        ready = self._ready.pop(index, None)
        return (self._tensor(index) if ready is None else ready).copy_(grad.detach())

    def _tensor(self, index: int) -> Tensor:
        shape = self._unit.shapes[index]
        return self._views[index].tensor(self._offsets[index], self.dtype, shape.shape, shape.stride)

    def require_written(self) -> None:
        """Refuse to go on where the system could not write back what lies here; [Note: spilled]."""
        with as_io_failure(self._file.path, 0, self._file.nbytes, f"write of gradients of unit {self._unit.name!r}"):
            wait_for_write_back(self._file.tail_fd)

    def check(self, grads: Mapping[int, Tensor], *, is_final: bool) -> None:
        """Refuse those of ``grads``, by parameter index, that wait here and were damaged.

        Args:
            grads: Gradients of the unit that are read next.
            is_final: They must be what they were at the call before; else they may have been changed.

        Raises:
            IOFailure: The system could not write some of them.
            CorruptionError: They are not what was written.
        """
        self.require_written()
        for index in [i for i, grad in grads.items() if self._verify and self.holds(i, grad)]:
            found = crc32c_each(self._base + self._offsets[index], grads[index].nbytes, CHECK_NBYTES)
            if is_final and self._checks.get(index, found) != found:
                raise CorruptionError(
                    f"the gradient of parameter {self._unit.names[index]!r}, which waited in {self._file.path!r}, is "
                    "not what it was at the step; the disk or its controller corrupts data: stop using it and resume "
                    "from the last checkpoint. (Or somebody wrote to the gradient after the step, by way of .data or "
                    "numpy.)"
                )
            self._checks[index] = found

    def refuse(self) -> None:
        """In a forked process: gradients that live here are the parent's, which goes on to write them."""
        with as_io_failure(self._file.path, 0, self._file.nbytes, "mapping"):
            make_private(self._memory, self._file.tail_fd)
        for index, param in enumerate(self._unit.params):
            if param.grad is not None and self.holds(index, param.grad):
                param.grad = refused_gradient(param.grad, self._unit.names[index])

    def close(self) -> None:
        """Close the file; its bytes live as long as a gradient views them."""
        self._unit.spilled_grads = None
        self._file.close()


def _gradient_at(names: Sequence[str], offsets: Sequence[int], offset: int) -> str:
    index = max(i for i, begin in enumerate(offsets[:-1]) if begin <= offset)
    return f"the gradient of parameter {names[index]!r}"
